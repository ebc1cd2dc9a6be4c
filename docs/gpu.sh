#!/usr/bin/env bash
# The full-size run on real faces, for one GPU: bash docs/gpu.sh FOLDER lfw112 celeba.bin [DIT_STEPS] [ARCH]
# IR-SE50 and a DiT at 112 pixels, 2,000 virtual people x 8, virtual-only and mixed recognisers, report, speeds.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
faces=$(realpath "$2") benchmark=$(realpath "$3")
mkdir -p "$1" && cd "$1"
python "$home/docs/speed.py"
python "$home/fr_train.py" --data "$faces" --val "$benchmark" --batch 256 --epochs 40
python "$home/dit_train.py" --arch "${5:-S/8}" --steps "${4:-20000}" --batch 256
python "$home/sample.py" --virtual 2000 --per-id 8
python "$home/fr_train.py" --data runs/virtual --val "$benchmark" --virtual 0 --batch 256 --out runs/fr-virtual
python "$home/fr_train.py" --data "$faces" runs/virtual --val "$benchmark" --virtual 0 --batch 256 --epochs 40 --out runs/fr-mixed
python "$home/evaluate.py"
