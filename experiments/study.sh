#!/usr/bin/env bash
# The study behind the figure at the top of the README, part by part.
#
#   bash experiments/study.sh                  lists the parts
#   bash experiments/study.sh PART             runs one; run again, it goes on where it stopped
#   bash experiments/study.sh PART --dry_run   options go to run_experiments.py
#
# Parts that compare accuracy alone train two runs at a time, with half of the cores each. digits,
# tiny* and pixels compare time as well: one run at a time, on a machine with nothing else running.
#
#   PYTHON=...   the interpreter (default: .venv/bin/python if it exists, else python3)
#   DATA=...     the folder of the datasets (default: data)
#   LOGS=...     where the runs go (default: experiments/logs)

set -eo pipefail

PARTS=(digits cifar longer rates cutmix class_token fashion tiny tiny_rates pixels analyses)

usage() {
    cat <<'END'
usage: bash experiments/study.sh PART [OPTIONS of run_experiments.py]

  digits        digits of scikit-learn, a grid of 8x8 patches, 8 patterns, 5 seeds
  cifar         CIFAR images, a grid of 8x8 patches, 8 patterns, 3 seeds
  longer        the same for 20 epochs instead of 12, full attention and the plus of 9, 3 seeds
  rates         the same at three learning rates, on held-out training images, one seed
  cutmix        the same with CutMix, full attention and the square of 9, 3 seeds
  class_token   the same with a class token, full attention and the square of 9, 3 seeds
  fashion       Fashion-MNIST, a grid of 14x14, 6 patterns, 2 seeds
  tiny          20 classes of Tiny ImageNet, a grid of 16x16, 5 patterns, 2 seeds, 20 minutes a run
  tiny_rates    the same at other learning rates, full attention and the square of 9, seed 1
  pixels        5,000 CIFAR images, a grid of 32x32 pixels, 3 patterns, 2 seeds, 20 minutes a run
  analyses      where the models of digits, cifar and cutmix look, and on which images some disagree
END
}

refuse() {
    echo "study.sh: error: $1" >&2
    exit 2
}

[ $# -gt 0 ] || { usage; exit 0; }
PART=$1
OPTIONS=("${@:2}")
[[ " ${PARTS[*]} " = *" $PART "* ]] || refuse "no part is called $PART; expected one of ${PARTS[*]}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3}
DATA=${DATA:-data}
LOGS=${LOGS:-experiments/logs}

# --------------------------------------------------------------------------------------------------
# What the parts have in common

sweep() { # FOLDER OPTIONS -- OPTIONS OF EACH RUN
    local folder=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    # Of an option that is given twice, the last one counts.
    "$PYTHON" run_experiments.py --gpus 0 --output_dir "$LOGS" --dataset_name "$folder" \
        "${options[@]}" "${OPTIONS[@]}" "$@"
}

report() { # FOLDER OPTIONS: the page of a part
    if [[ " ${OPTIONS[*]} " != *" --dry_run "* ]]; then
        "$PYTHON" plot_result.py --results_path "$LOGS/$1" "${@:2}"
    fi
}

# That of the 15-minute record (experiments/README.md), uncompiled and apart from its epochs.
MODEL=(--model vit_micro --num_heads 2 --pool mean --optimizer muon --lr 4e-3 --weight_decay 0.05)
MODEL+=(--dropout 0 --batch_size 128)

IMAGES=(--dataset imagefolder)
CIFAR=(--data_dir "$DATA/cifar10-jpeg" "${MODEL[@]}" --img_size 32 --patch_size 4)
TINY=(--data_dir "$DATA/tiny-imagenet-20" "${MODEL[@]}" --img_size 64 --patch_size 4 --minutes 20)

# A 1D window of 9 is the same under both names; it is trained under the first.
ALL=(--mask_types '["full", "1d_all_neighbors", "1d_cardinal", "2d_cardinal", "2d_all_neighbors"]')
ALL+=(--expansion_steps '[1, 2]')
FULL=(--mask_types '["full"]' --expansion_steps '[1]')
FULL_AND_SQUARE=(--mask_types '["full", "2d_all_neighbors"]' --expansion_steps '[1]')
FULL_AND_SQUARES=(--mask_types '["full", "2d_all_neighbors"]' --expansion_steps '[1, 2]')
FULL_AND_PLUS=(--mask_types '["full", "2d_cardinal"]' --expansion_steps '[2]')
PLUS=(--mask_types '["2d_cardinal"]' --expansion_steps '[2]')
WINDOW=(--mask_types '["1d_all_neighbors"]' --expansion_steps '[1]')
WINDOWS=(--mask_types '["1d_all_neighbors"]' --expansion_steps '[1, 2]')

# --------------------------------------------------------------------------------------------------
# The parts

digits() {
    sweep digits --dataset digits --expansion_steps '[1, 2]' --seeds '[0, 1, 2, 3, 4]' -- \
        --model vit_micro --img_size 16 --patch_size 2 --pool mean --epochs 12 --batch_size 32 \
        --lr 2e-3 --dropout 0 --weight_decay 0.05
    report digits
}

cifar() {
    sweep cifar10-jpeg --runs_per_gpu 2 "${IMAGES[@]}" "${ALL[@]}" --seeds '[0, 1, 2]' -- \
        "${CIFAR[@]}" --epochs 12
    report cifar10-jpeg --no_speed
}

# Not seed 0, by which the plus of 9 was chosen.
longer() {
    sweep cifar10-jpeg-20-epochs --runs_per_gpu 2 "${IMAGES[@]}" "${FULL_AND_PLUS[@]}" \
        --seeds '[1, 2, 3]' -- "${CIFAR[@]}" --epochs 20
    report cifar10-jpeg-20-epochs --no_speed
}

# The rate is an option of a run, so each rate is a sweep of its own.
rates() {
    for rate in 2e-3 4e-3 8e-3; do
        sweep "cifar10-jpeg-lr-$rate" --runs_per_gpu 2 "${IMAGES[@]}" "${FULL_AND_SQUARE[@]}" -- \
            "${CIFAR[@]}" --epochs 12 --holdout 0.1 --lr "$rate"
        report "cifar10-jpeg-lr-$rate" --no_speed
    done
}

# CutMix on half of the batches to the end, as Yun et al. (2019) do on CIFAR; no MixUp.
cutmix() {
    sweep cifar10-jpeg-cutmix --runs_per_gpu 2 "${IMAGES[@]}" "${FULL_AND_SQUARE[@]}" \
        --seeds '[0, 1, 2]' -- "${CIFAR[@]}" --epochs 12 --mix 0.5 --mixup_alpha 0 --mix_off 0
    report cifar10-jpeg-cutmix --no_speed
}

class_token() {
    sweep cifar10-jpeg-class-token --runs_per_gpu 2 "${IMAGES[@]}" "${FULL_AND_SQUARE[@]}" \
        --seeds '[0, 1, 2]' -- "${CIFAR[@]}" --epochs 12 --pool cls
    report cifar10-jpeg-class-token --no_speed
}

fashion() {
    fashion_of "${FULL_AND_SQUARES[@]}"
    fashion_of "${WINDOWS[@]}"
    fashion_of "${PLUS[@]}"
    report fashion_mnist --no_speed
}

fashion_of() { # PATTERNS
    sweep fashion_mnist --runs_per_gpu 2 --dataset fashion_mnist "$@" --seeds '[0, 1]' -- \
        --data_dir "$DATA" "${MODEL[@]}" --img_size 28 --patch_size 2 --epochs 3
}

# Seed by seed, so that runs that are compared are trained close to each other in time.
tiny() {
    for seed in 0 1; do
        tiny_of "$seed" "${FULL_AND_SQUARES[@]}"
        tiny_of "$seed" "${WINDOW[@]}"
        tiny_of "$seed" "${PLUS[@]}"
    done
    report tiny-imagenet-20
}

tiny_of() { # SEED PATTERNS
    sweep tiny-imagenet-20 "${IMAGES[@]}" --seeds "[$1]" "${@:2}" -- "${TINY[@]}"
}

# The rate of each pattern is halved and doubled until its accuracy falls, on test images.
tiny_rates() {
    local rate
    for rate in 8e-3 2e-3; do
        tiny_at "$rate" "${FULL_AND_SQUARE[@]}"
    done
    for rate in 16e-3 32e-3; do
        tiny_at "$rate" "${FULL[@]}"
    done
}

tiny_at() { # RATE PATTERNS
    local folder="tiny-imagenet-20-lr-$1"
    sweep "$folder" "${IMAGES[@]}" "${@:2}" --seeds '[1]' -- "${TINY[@]}" --lr "$1"
    report "$folder"
}

pixels() {
    sweep cifar10-jpeg-pixels "${IMAGES[@]}" "${FULL_AND_SQUARES[@]}" --seeds '[0, 1]' -- \
        --data_dir "$DATA/cifar10-jpeg-5000" "${MODEL[@]}" --img_size 32 --patch_size 1 --minutes 20
    report cifar10-jpeg-pixels
}

# Of finished runs, as far as they have not been made. Takes no options.
analyses() {
    local folder
    [ ${#OPTIONS[@]} -eq 0 ] || refuse "analyses takes no options, got ${OPTIONS[*]}"
    for folder in "$LOGS"/{digits,cifar10-jpeg,cifar10-jpeg-cutmix}/*/seed_*; do
        if [ -f "$folder/summary.json" ] && [ ! -f "$folder/analysis_test.json" ]; then
            "$PYTHON" eval.py --checkpoint "$folder/last.pt" --analyze
        fi
    done
    disagreements digits 2d_all_neighbors_expansion_2
    disagreements cifar10-jpeg 2d_cardinal_expansion_2
    disagreements tiny-imagenet-20 2d_all_neighbors_expansion_1
    # How much two seeds of one pattern disagree, to compare with.
    "$PYTHON" eval.py --compare "$LOGS"/cifar10-jpeg/full/seed_{0,1}/last.pt
}

disagreements() { # FOLDER PATTERN
    local full local_one
    for full in "$LOGS/$1"/full/seed_*; do
        local_one="$LOGS/$1/$2/$(basename "$full")"
        if [ -f "$full/summary.json" ] && [ -f "$local_one/summary.json" ]; then
            "$PYTHON" eval.py --compare "$local_one/last.pt" "$full/last.pt"
        fi
    done
}

"$PART"
