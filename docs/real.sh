#!/usr/bin/env bash
# Real faces, all rows: bash docs/real.sh FOLDER FACES "BENCHMARK.bin ..." [SIZE [DIT [SEEDS [EPOCHS [FR]]]]]
# A recogniser and a DiT with the flags DIT are trained on FACES; then, for each seed, five recognisers with one recipe
# and about as many steps: real only, virtual only, both, real with real-ID fill-up, all. Every recogniser has the flags
# FR. What is finished is not done again.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
faces=$(realpath "$2") benchmarks=$(realpath $3) size=${4:-32}
dit=${5:-"--steps 3000"} seeds=${6:-"0 1 2"} epochs=${7:-8} fr=${8:-}
mkdir -p "$1" && cd "$1"
train() {                                       # OUT EPOCHS DATA...: a recogniser without virtual prototypes
    [ -e "$1/done" ] && return
    python "$home/fr_train.py" --out "$1" --epochs "$2" --data "${@:3}" --val $benchmarks --size $size --virtual 0 --seed $seed $fr
    rm "$1/state.pt" && touch "$1/done"
}
python "$home/fr_train.py" --data "$faces" --val $benchmarks --size $size --epochs $epochs $fr
python "$home/dit_train.py" $dit
python "$home/sample.py" --virtual 1500 --per-id 16
for seed in $seeds; do
    train runs/fr-real-$seed $epochs "$faces"
    train runs/fr-virtual-$seed $epochs runs/virtual
    train runs/fr-both-$seed $((epochs / 2)) "$faces" runs/virtual
done
python "$home/evaluate.py"
python "$home/sample.py" --real-to 4
for seed in $seeds; do
    train runs/fr-filled-$seed $((epochs * 5 / 8)) "$faces" runs/real-aug
    train runs/fr-all-$seed $((epochs * 3 / 8)) "$faces" runs/virtual runs/real-aug
done
