"""Kills, starves and crowds the scripts on a small drawn set: python docs/faults.py [KILLS [SEED [STAGE]]]

Each script is killed (SIGKILL) KILLS times, at random moments, and started again each time, in a new folder
when it came to its end; what it leaves then must equal, byte for byte, what a run leaves that nobody touched.
Then: a disk that is full (a small tmpfs, where it may be mounted), a truncated checkpoint, a second process
in the same folder, Ctrl-C, a folder that cannot be written, another locale and time zone. On a CPU, some
twenty minutes. With a STAGE (fr, dit, virtual or report) only that one's kills.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

home = Path(__file__).parent.parent
sys.path.insert(0, str(home))
import data

kills, seed = int((sys.argv[1:] or [20])[0]), int((sys.argv[2:] or [0])[0])
rng, root = random.Random(seed), Path(tempfile.mkdtemp())
torch.manual_seed(seed)
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
bad = []


def start(line, where=root, **env):
    script, *flags = line.split()
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)               # to Ctrl-C, also under nohup
    return subprocess.Popen([sys.executable, home / script, *flags], cwd=where, env={**os.environ, **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def check(what, good, detail=""):
    print(f"{'ok ' if good else 'BAD'} {what} {detail}", flush=True)
    bad.extend([] if good else [what])


def run(line, code=0, what=None, **options):
    """Runs a script to its end; an error must be one line without a traceback."""
    process = start(line, **options)
    said = process.communicate()[1]
    errors = [text for text in said.replace("\r", "\n").splitlines() if text.startswith("error:")]
    good = process.returncode == code and "Traceback" not in said and len(errors) == (code != 0)
    if what or not good:
        check(what or line, good, (errors or [said[-600:]])[0][:150] if code or not good else "")


def result(folder):
    """{name: bytes} of all a run leaves for others; its own resume state holds no more than that."""
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and path.name != "state.pt"}


who = torch.rand(24, data.IDENTITY_DIALS).repeat_interleave(4, 0)
images, points = data.draw_faces(who, torch.rand(96, data.NUISANCE_DIALS), 32)
names = [f"person {i // 4}/{i % 4}.png" for i in range(96)]
for name, image in zip(names, images):
    (root / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
    data.write_png(root / "faces" / name, (255 * image).to(torch.uint8))
data.write_landmarks(root / "faces/landmarks.csv", zip(names, 32 * points))
data.write_bin(root / "faces/held.bin", (255 * images).to(torch.uint8).view(24, 4, 3, 32, 32), 100,
               torch.Generator().manual_seed(0))
stages = {"fr": "fr_train.py --data faces --epochs 120 --batch 32 --out {}/fr",
          "dit": "dit_train.py --fr whole/fr --steps 20 --batch 8 --preview 4 --out {}/dit",
          "virtual": "sample.py --dit whole/dit --virtual 20 --batch 2 --max-real 2 --out {}/virtual",
          "report": "evaluate.py --fr whole/fr --datasets whole/virtual --out {}/report"}
for stage, line in stages.items():
    begun = time.time()
    run(line.format("whole"))
    if stage not in (sys.argv[3:] or stages):
        continue
    length, hit, ended, differ = time.time() - begun, 0, 0, set()
    whole = result(root / "whole" / stage)
    while hit < kills or ended == 0:
        process = start(line.format("cut"))
        try:
            process.wait(rng.uniform(0.3, 0.6) * length if hit < kills else None)
            cut = result(root / "cut" / stage)
            cut = {key: value.replace(b"cut/", b"whole/") for key, value in cut.items()}
            differ |= {str(key) for key in whole.keys() | cut.keys() if whole.get(key) != cut.get(key)}
            shutil.rmtree(root / "cut" / stage)
            ended += 1
        except subprocess.TimeoutExpired:
            process.kill()
            hit += 1
        process.communicate()
        for path in (root / "cut").rglob("*.jpg"):                      # never half a picture
            data.read_image(path)
    check(f"{stage}: killed {hit} times, a life of {length:.0f} s; {ended} ends as if never killed",
          not differ, sorted(differ)[:3])
    if sys.argv[3:]:
        sys.exit(len(bad))

for name in ("fr/state.pt", "fr/model.safetensors"):                    # a checkpoint cut at every tenth
    for tenth in range(10):
        shutil.rmtree(root / "broken", ignore_errors=True)
        shutil.copytree(root / "whole/fr", root / "broken/fr")
        content = (root / "whole" / name).read_bytes()
        (root / "broken" / name).write_bytes(content[:len(content) * tenth // 10])
        line = "dit_train.py --fr broken/fr --out broken/dit" if "model" in name else stages["fr"]
        run(line.format("broken"), 2, f"{name} cut to {tenth} tenths")

line = stages["fr"].format("two")
first = start(line)
while not (root / "two/fr").is_dir():
    time.sleep(0.1)
time.sleep(2)
run(line, 2, "a second process in the same folder")
first.send_signal(signal.SIGINT)
said = first.communicate()[1].replace("\r", "\n")
check("Ctrl-C", first.returncode == 130 and "interrupted" in said and "Traceback" not in said)
run(line, what="and the same command again")
process = start(stages["dit"].format("elsewhere"), LC_ALL="C", TZ="Asia/Kathmandu", PYTHONUTF8="0")
process.communicate()
check("another locale and time zone give the same weights", process.returncode == 0 and
      result(root / "elsewhere/dit") == result(root / "whole/dit"))
(root / "file").write_text("")
for stage, line in stages.items():
    run(line.format("file"), 2, f"{stage}: --out cannot be made")

small = root / "small"
small.mkdir()
if subprocess.run(f"mount -t tmpfs -o size=1m none {small}", shell=True, capture_output=True).returncode == 0:
    for stage, line in stages.items():
        if stage == "virtual":
            (small / "filler").write_bytes(bytes(900_000))
        if stage == "report":
            (small / "filler").write_bytes(bytes(1 << 19))
        run(line.format("small"), 2, f"{stage}: disk full")
        left = [path for path in small.rglob("*") if path.name.endswith(".tmp")]
        check(f"{stage}: nothing half-written is left", not left, left)
        subprocess.run(f"rm -rf {small}/*", shell=True)
    subprocess.run(["umount", small])
else:
    print("-   disk full: no tmpfs may be mounted here, not run")
shutil.rmtree(root)
print(f"{len(bad)} bad" + "".join(f"; {what}" for what in bad))
