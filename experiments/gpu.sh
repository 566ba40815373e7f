#!/usr/bin/env bash
# The first things to measure on a GPU, in seven parts. Each part takes at most ten minutes and is
# independent of the others. A step that fails, hangs or kills its process stops no other step.
#
#   bash experiments/gpu.sh                  lists the parts
#   bash experiments/gpu.sh PART [FOLDER]    runs one part, by name or number
#   bash experiments/gpu.sh all [FOLDER]     runs all of them, one after the other
#
# FOLDER (default: experiments/gpu) gets rows.jsonl with one JSON row per measurement and per step,
# written right away, the output of each step as PART-STEP.txt, and the reports. The exit code is 1
# if a step failed; the last line of output names it.
#
#   SMALL=1      tiny shapes on the CPU, to try the script itself: a minute or two a part, without
#                what needs CUDA
#   PYTHON=...   the interpreter (default: .venv/bin/python if it exists, else python3)
#   DATA=...     the image folder for part 7 (default: data/cifar10-jpeg)
#   ARCHIVE=...  cifar10-jpeg.tar.xz, to unpack DATA from if it doesn't exist (default: the first
#                found in data/, experiments/, shared/data/ and ../shared/data/)
#   PART_SECONDS=540   time limit of a part: ends the running step and skips the rest

PARTS=(machine tests attention grids base training accuracy)
PART_SECONDS=${PART_SECONDS:-540}

usage() {
    cat <<'END'
usage: bash experiments/gpu.sh PART [FOLDER], or all [FOLDER]

  1  machine     versions; rates of copying and of matrix products in bf16, fp32 and tf32
  2  tests       pytest -m cuda
  3  attention   64x64 patches, square of step 2: full attention by torch's choice of kernel and
                 with cuDNN and FlashAttention-2 forced; each sparse backend
  4  grids       grids 14, 28 and 128; steps 1 and 3; plus and 1D
  5  base        ViT-B/16 at 224 px: 30 steps each, eager, compiled and with CUDA graphs; in TF32;
                 a profiler trace; share of the GPU's peak (MFU)
  6  training    ViT-Tiny/4 at 32 px: images/s of training, and its share of the bare model's rate
  7  accuracy    full and square attention, step 1, on CIFAR images (JPEG copy), 12 epochs, one seed
END
}

# --------------------------------------------------------------------------------------------------
# The parts

machine() {
    step ceilings 300 "${MEASURE[@]}" ceilings "$FOLDER" --device "$DEVICE"
}

tests() {
    step pytest 540 "$PYTHON" -m pytest -v -m cuda --durations 10 --junitxml "$FOLDER/tests.xml"
}

attention() {
    step full 120 "${MEASURE[@]}" full "$FOLDER" "${SHAPE[@]}" --grids "[$GRID]"
    # Each in its own process: one that fails on a GPU takes all work of its process with it.
    for backend in $("${MEASURE[@]}" backends | tr -d '[],"'); do
        pattern "$backend" 300 "$GRID" 2d_all_neighbors 2 --backends "[\"$backend\"]"
    done
}

grids() {
    local all
    all=$("${MEASURE[@]}" backends)
    for grid in "${OTHER_GRIDS[@]}"; do
        step "full_$grid" 90 "${MEASURE[@]}" full "$FOLDER" "${SHAPE[@]}" --grids "[$grid]"
        pattern "grid_$grid" 130 "$grid" 2d_all_neighbors 1 --backends "$all"
    done
    pattern step_1 100 "$GRID" 2d_all_neighbors 1 --backends "$all"
    pattern plus 100 "$GRID" 2d_cardinal 2 --backends "$all"
    pattern 1d 150 "$GRID" 1d_all_neighbors 2 --backends "$all"
    # Last, because compiling 49 diagonals takes minutes.
    pattern step_3 300 "$GRID" 2d_all_neighbors 3 --backends "$all"
}

pattern() { # STEP SECONDS GRID MASK_TYPE EXPANSION_STEP OPTIONS...
    step "$1" "$2" "${MEASURE[@]}" attention "$FOLDER" "${SHAPE[@]}" \
        --grids "[$3]" --mask_types "[\"$4\"]" --expansion_steps "[$5]" "${@:6}"
}

base() {
    local run=(--device "$DEVICE" "${VIT_BASE[@]}")
    for mode in off default reduce-overhead; do
        if [ "$SMALL" ] && [ "$mode" = reduce-overhead ]; then
            leave_out "$mode" "CUDA graphs need CUDA"
        else
            step "$mode" 180 "${MEASURE[@]}" training "$FOLDER" "${run[@]}" \
                --steps 10 --rounds 3 --compile "$mode"
        fi
    done
    step profile 120 "${MEASURE[@]}" profile "$FOLDER" "${run[@]}" --steps 3 --compile default
    if [ "$SMALL" ]; then
        leave_out tf32 "a mode of CUDA"
    else
        step tf32 150 "${MEASURE[@]}" training "$FOLDER" "${run[@]}" \
            --steps 10 --rounds 3 --compile default --precision tf32
    fi
}

training() {
    for mode in "${COMPILE_MODES[@]}"; do
        step "$mode" 200 "$PYTHON" benchmark.py --level training --device "$DEVICE" \
            --img_size 32 --patch_size 4 "${TINY[@]}" --compile "$mode" \
            --output "$FOLDER/training_32px_$mode.json"
    done
}

accuracy() {
    if [ "$SMALL" ]; then
        echo "SMALL=1: digits stand in for the CIFAR images"
    elif [ ! -d "$DATA" ]; then
        unpack || return
    fi
    step sweep 500 "$PYTHON" run_experiments.py "${SWEEP[@]}" \
        --mask_types '["full", "2d_all_neighbors"]' --expansion_steps '[1]' --seeds '[0]' \
        --output_dir "$FOLDER/runs" -- --device "$DEVICE" "${SWEPT_RUN[@]}"
}

unpack() { # whole or not at all
    local aside="$DATA.unpacked"
    rm -rf "$aside"
    step unpack 120 "$PYTHON" -m tarfile -e "$ARCHIVE" "$aside" || return
    local root=("$aside"/*)
    echo "CIFAR-10 (JPEG q75 copy)" >"${root[0]}/label.txt"
    mv "${root[0]}" "$DATA" && rmdir "$aside"
}

# --------------------------------------------------------------------------------------------------
# The building blocks of the parts

# step NAME SECONDS COMMAND...: run a command, with a time limit of SECONDS or what is left of the
# part, and note how it ended.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0
    local log="$FOLDER/$PART-$name.txt" left=$((PART_SECONDS - SECONDS))
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -le 0 ]; then
        code=124 # the same as of timeout
        echo "not started" >"$log"
    else
        echo "--- $PART, $name: at most $limit s"
        # In the background, so that signals reach this script at once. Into a file, because a pipe
        # would wait for stray children.
        timeout --kill-after=15 "$limit" "$@" >"$log" 2>&1 </dev/null &
        CHILD=$!
        wait "$CHILD" || code=$?
        CHILD=
    fi
    tail -n 30 "$log"
    [ "$code" = 124 ] && echo "$name: out of time"
    [ "$code" = 0 ] || FAILED+=("$name (exit code $code)")
    note "$name" "\"exit_code\": $code, \"seconds\": $((SECONDS - start))"
    return "$code"
}

leave_out() { # NAME REASON
    echo "--- $PART, $1: left out ($2)"
    note "$1" "\"left_out\": \"$2\""
}

note() { # NAME FIELDS
    printf '{"what": "step", "part": "%s", "name": "%s", %s}\n' "$PART" "$1" "$2" \
        >>"$FOLDER/rows.jsonl"
}

interrupted() {
    [ "$CHILD" ] && kill -TERM "$CHILD" && wait "$CHILD"
    echo "gpu.sh: interrupted; all results so far are in $FOLDER" >&2
    exit 130
}

refuse() {
    echo "gpu.sh: error: $1" >&2
    exit 2
}

# --------------------------------------------------------------------------------------------------
# The command line

if [ $# -eq 0 ]; then
    usage
    exit 0
fi
[ $# -le 2 ] || refuse "expected PART and FOLDER, got $*"
PART=$1
if [ "$PART" = all ]; then
    code=0
    for part in "${PARTS[@]}"; do
        bash "${BASH_SOURCE[0]}" "$part" "${@:2}" || code=$?
        [ "$code" = 130 ] && break # interrupted
    done
    exit "$code"
fi
[[ $PART =~ ^[1-7]$ ]] && PART=${PARTS[PART - 1]}
[[ " ${PARTS[*]} " = *" $PART "* ]] \
    || refuse "no part is called $PART; expected 1 to 7 or one of ${PARTS[*]} all"

REPOSITORY=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
FOLDER=$(realpath -m "${2:-$REPOSITORY/experiments/gpu}")
DATA=$(realpath -m "${DATA:-$REPOSITORY/data/cifar10-jpeg}")
if [ "$ARCHIVE" ]; then
    ARCHIVE=$(realpath -m "$ARCHIVE")
else
    for place in data experiments shared/data ../shared/data; do
        found="$REPOSITORY/$place/cifar10-jpeg.tar.xz"
        [ -f "$found" ] && ARCHIVE=$found && break
    done
fi
if [ "$PART" = accuracy ] && [ ! "$SMALL" ] && [ ! -d "$DATA" ] && [ ! -f "$ARCHIVE" ]; then
    refuse "no image folder $DATA; pass one as DATA=..., or its archive as ARCHIVE=..."
fi
mkdir -p "$FOLDER" && cd "$REPOSITORY" || exit 1
if [ ! "$PYTHON" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
MEASURE=("$PYTHON" experiments/gpu.py)
FAILED=()
CHILD=

if [ "$SMALL" ]; then
    DEVICE=cpu
    GRID=6
    OTHER_GRIDS=(3 5)
    SHAPE=(--device cpu --dtype bf16 --batch_size 1 --num_heads 2 --head_dim 16 --rounds 3)
    VIT_BASE=(--model vit_micro --img_size 16 --patch_size 8 --batch_size 8)
    TINY=(--model vit_micro --batch_size 8 --steps 1 --rounds 3 --workers 0)
    COMPILE_MODES=(off)
    SWEEP=(--dataset digits --gpus 0)
    SWEPT_RUN=(--model vit_micro --img_size 16 --patch_size 4 --epochs 1)
else
    DEVICE=cuda
    GRID=64
    OTHER_GRIDS=(14 28 128)
    SHAPE=(--device cuda --dtype bf16 --batch_size 8 --num_heads 12 --head_dim 64 --rounds 9)
    VIT_BASE=(--model vit_base --img_size 224 --patch_size 16 --batch_size 128)
    TINY=(--model vit_tiny --batch_size 512 --steps 20 --rounds 5 --workers 8)
    COMPILE_MODES=(off default reduce-overhead)
    SWEEP=(--dataset imagefolder --gpus 1 --runs_per_gpu 2)
    SWEPT_RUN=(--data_dir "$DATA" --model vit_tiny --img_size 32 --patch_size 4)
    SWEPT_RUN+=(--pool mean --dropout 0 --optimizer muon --lr 4e-3 --weight_decay 0.05)
    SWEPT_RUN+=(--batch_size 128 --epochs 12)
fi

trap interrupted INT TERM
"$PART"
if [ ${#FAILED[@]} -gt 0 ]; then
    printf -v names ', %s' "${FAILED[@]}"
    echo "gpu.sh: failed in part $PART: ${names:2}; see $FOLDER/$PART-*.txt"
    exit 1
fi
echo "gpu.sh: part $PART is done, results in $FOLDER"
