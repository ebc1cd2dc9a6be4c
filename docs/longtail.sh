#!/usr/bin/env bash
# The paper's augmentation table on drawn faces: bash docs/longtail.sh FOLDER. Of 1,500 people the i-th has
# 16 / (1 + i / 100) images, but at least 2; then 300 virtual people, real people filled up to 8, and both.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && cd "$1"
python - <<P
import sys; sys.path.insert(0, "$home")
import data, pathlib
data.draw_demo("real", people=1500, held_out=200, per_person=16, seed=5)
for i, person in enumerate(sorted(pathlib.Path("real").glob("p*"))):
    for image in sorted(person.iterdir())[max(2, round(16 / (1 + i / 100))):]:
        image.unlink()
P
fr() {
  python "$home/fr_train.py" --val real/heldout.bin "$@" | grep "mean accuracy" | sed "s|^|${*: -1}: |"
}
python "$home/fr_train.py" --data real
python "$home/dit_train.py" --steps 1200
python "$home/sample.py"
python "$home/sample.py" --real-to 8
for seed in 0 1 2; do
  fr --data real --virtual 0 --seed $seed --out runs/x-real-$seed
  fr --data real runs/virtual --virtual 0 --seed $seed --out runs/x-virtual-$seed
  fr --data real runs/real-aug --virtual 0 --seed $seed --out runs/x-realid-$seed
  fr --data real runs/real-aug runs/virtual --virtual 0 --seed $seed --out runs/x-all-$seed
done
