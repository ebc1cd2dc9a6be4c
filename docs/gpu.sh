#!/usr/bin/env bash
# All that a GPU must show: bash docs/gpu.sh FOLDER FACES "BENCHMARK.bin ..." [DIT [SEEDS]]
# docs/real.sh at 112 pixels, which takes DIT and SEEDS, the speeds and the tests. What each prints is also in
# FOLDER/{real,speed,tests}.txt; what is finished (FOLDER/*.done) is not done again.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(realpath "$1")
once() {                                        # NAME COMMAND...
    [ -e "$folder/$1.done" ] && return
    "${@:2}" | tee "$folder/$1.txt"
    touch "$folder/$1.done"
}
once real bash "$home/docs/real.sh" "$folder" "$2" "$3" 112 "${4:---arch S/8 --lr 1e-3 --steps 1000}" "${5:-0}" 13
once speed python "$home/docs/speed.py"
once tests env -C "$home" python -m pytest -q
