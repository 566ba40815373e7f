#!/usr/bin/env bash
# Everything that only a GPU can tell, one PART a command. Each part ends within ten minutes and needs no other.
#
#     bash experiments/gpu.sh PART [FOLDER]      # FOLDER: where the results go (default: experiments/gpu)
#     SMALL=1 bash experiments/gpu.sh PART       # the same steps, tiny and on the CPU: does the script itself work?
#
#     1 machine     versions, and what copies and matrix products reach at most
#     2 tests       the tests that need CUDA
#     3 attention   64x64 patches, step 2: full attention by each of SDPA's kernels, and every backend
#     4 grids       other grids, steps and patterns
#     5 base        ViT-B/16 at 224: eager, compiled, with CUDA graphs; a profile; utilization
#     6 training    training at 32 pixels beside the bare model and the usual loop
#     7 accuracy    a short sweep on CIFAR images: DATA=<image folder>, or ARCHIVE=<cifar10-jpeg.tar.xz>
#
# A step that fails or runs out of time costs no other step; the last line names it, and the exit code is 1.
# Each step writes its JSON as soon as something is measured. PYTHON=<python> chooses the interpreter.

set -uo pipefail
cd "$(dirname "$0")/.."

PART=${1:-}
FOLDER=${2:-experiments/gpu}
PYTHON=${PYTHON:-python}
SMALL=${SMALL:-}
DEVICE=${SMALL:+cpu}
DEVICE=${DEVICE:-cuda}
DATA=${DATA:-data/cifar10-jpeg}
ARCHIVE=${ARCHIVE:-}
failed=()

# step SECONDS NAME COMMAND...
step() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$FOLDER/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || failed+=("$name (exit code $code)")
}

# What SMALL=1 puts in the place of the real size.
size() { if [ -n "$SMALL" ]; then echo "$2"; else echo "$1"; fi; }

measure() { "$PYTHON" experiments/gpu.py "$@" --device "$DEVICE" --output "$FOLDER/rows.jsonl" ${SMALL:+--small}; }
export -f measure
export PYTHON DEVICE FOLDER SMALL

machine() {
    step 300 ceilings bash -c 'measure ceilings'
}

tests() {
    step 580 tests "$PYTHON" -m pytest -m cuda -q
}

attention() {
    local grid
    grid=$(size 64 8)
    step 200 kernels bash -c 'measure kernels'
    step 380 attention "$PYTHON" benchmark.py --device "$DEVICE" --dtype bf16 --grids "[$grid]" --batch_size "$(size 8 1)" \
        --num_heads "$(size 12 2)" --head_dim 64 --mask_types '["2d_all_neighbors"]' --expansion_steps '[2]' \
        --backends "$(size '["dense", "diagonal", "flex"]' '["dense", "uncompiled"]')" --rounds "$(size 21 3)" \
        --output "$FOLDER/attention_64.json"
}

grids() {
    local backends rounds
    backends=$(size '["diagonal", "flex"]' '["uncompiled"]')
    rounds=$(size 21 3)
    for grid in $(size "14 28 128" "4"); do
        step 190 "grid_$grid" "$PYTHON" benchmark.py --device "$DEVICE" --dtype bf16 --grids "[$grid]" \
            --batch_size "$(size 8 1)" --num_heads "$(size 12 2)" --head_dim 64 \
            --mask_types '["1d_all_neighbors", "2d_cardinal", "2d_all_neighbors"]' --expansion_steps "$(size '[1, 3]' '[1]')" \
            --backends "$backends" --rounds "$rounds" --output "$FOLDER/attention_$grid.json"
    done
}

base() {
    for mode in off default $([ -n "$SMALL" ] || echo reduce-overhead); do
        MODE=$mode step 190 "base_$mode" bash -c 'measure model --compile "$MODE"'
    done
}

training() {
    step 580 training "$PYTHON" benchmark.py --level training --device "$DEVICE" --steps "$(size 40 1)" --rounds "$(size 7 3)" \
        --batch_size "$(size 512 4)" --model "$(size vit_tiny vit_micro)" --output "$FOLDER/training.json"
}

accuracy() {
    if [ ! -d "$DATA" ] && [ -n "$ARCHIVE" ]; then
        mkdir -p "$(dirname "$DATA")" && tar -xJf "$ARCHIVE" -C "$(dirname "$DATA")"
    fi
    local dataset=(--dataset imagefolder)
    local where=(--data_dir "$DATA")
    if [ -n "$SMALL" ]; then
        dataset=(--dataset digits)
        where=()
    elif [ ! -d "$DATA" ]; then
        failed+=("accuracy (no image folder $DATA; name one with DATA=, or the archive with ARCHIVE=)")
        return
    fi
    step 560 accuracy "$PYTHON" run_experiments.py --gpus "$(size 1 0)" --runs_per_gpu "$(size 2 1)" "${dataset[@]}" \
        --mask_types '["full", "2d_all_neighbors"]' --expansion_steps '[1]' --output_dir "$FOLDER/runs" -- "${where[@]}" \
        --model "$(size vit_tiny vit_micro)" --img_size "$(size 32 8)" --patch_size "$(size 4 2)" --pool mean --dropout 0 \
        --optimizer muon --lr 4e-3 --weight_decay 0.05 --batch_size 128 --epochs "$(size 8 1)"
}

case $PART in
    1 | machine) part=machine ;;
    2 | tests) part=tests ;;
    3 | attention) part=attention ;;
    4 | grids) part=grids ;;
    5 | base) part=base ;;
    6 | training) part=training ;;
    7 | accuracy) part=accuracy ;;
    *)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
        echo "gpu.sh: error: expected a part, 1 to 7 or its name, got '$PART'" >&2
        exit 2
        ;;
esac

mkdir -p "$FOLDER" || exit 1
FOLDER=$(cd "$FOLDER" && pwd)
"$part"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'gpu.sh: failed in part %s: ' "$part"
    printf '%s; ' "${failed[@]}"
    echo
    exit 1
fi
echo "gpu.sh: part $part is done, results in $FOLDER"
