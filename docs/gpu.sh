#!/usr/bin/env bash
# All that a GPU must show: bash docs/gpu.sh FOLDER FACES "BENCHMARK.bin ..." [DIT [SEEDS]]
# The tests, the speeds, and docs/real.sh at 112 pixels, which takes DIT and SEEDS. What each prints is also
# in FOLDER/{tests,speed,real}.txt; what is finished (FOLDER/*.done) is not done again.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(realpath "$1")
once() {                                        # NAME COMMAND...
    [ -e "$folder/$1.done" ] && return
    "${@:2}" | tee "$folder/$1.txt"
    touch "$folder/$1.done"
}
once tests env -C "$home" python -m pytest -q
once speed python "$home/docs/speed.py"
once real bash "$home/docs/real.sh" "$folder" "$2" "$3" 112 "${4:---steps 20000}" "${5:-0 1 2}"
