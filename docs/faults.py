"""Kills and starves the scripts on a few toy faces: python docs/faults.py [KILLS [SEED [STAGE]]]

Each script is killed (SIGKILL) KILLS times (default 20), at random moments, and started again each time, in a
new folder when it came to its end; what it leaves then must equal, byte for byte, what a run leaves that
nobody touched. Then: two ranks at once, a checkpoint cut short, Ctrl-C, another locale and time zone, a
folder that cannot be written, a disk that is full (a small tmpfs, where it may be mounted). Prints a line
each, "ok" or "BAD". On a CPU, some twenty minutes. With a STAGE (fr, dit, virtual or report) only its kills.
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
from torchvision.io import write_png

home = Path(__file__).parent.parent
sys.path.insert(0, str(home))
import data
from tools import toys

kills, seed = int((sys.argv[1:] or [20])[0]), int((sys.argv[2:] or [0])[0])
only = (sys.argv[3:] or [None])[0]
rng, root = random.Random(seed), Path(tempfile.mkdtemp())
torch.manual_seed(seed)
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
bad = []
stages = {"fr": "fr_train.py --data faces --epochs 100 --batch 32 --out {}/fr",
          "dit": "dit_train.py --fr whole/fr --steps 20 --batch 8 --out {}/dit",
          "virtual": "sample.py --dit whole/dit --virtual 20 --batch 2 --out {}/virtual",
          "report": "evaluate.py --fr whole/fr --datasets whole/virtual --out {}/report"}


def start(line, **env):
    """A running script; it listens to Ctrl-C also under nohup."""
    script, *flags = line.split()
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, home / script, *flags], cwd=root, env={**os.environ, **env},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def check(what, good, detail=""):
    print(f"{'ok ' if good else 'BAD'} {what} {detail}", flush=True)
    if not good:
        bad.append(what)


def run(line, code=0, what=None):
    """Runs a script to its end; an error must be one line without a traceback."""
    process = start(line)
    said = process.communicate()[1]
    errors = [text for text in said.replace("\r", "\n").splitlines() if text.startswith("error:")]
    good = process.returncode == code and "Traceback" not in said and len(errors) == (code != 0)
    if what or not good:
        check(what or line, good, errors[0][:150] if good and errors else "" if good else said[-600:])


def result(folder):
    """{name: bytes} of all a run leaves for others; its own resume state holds no more than that."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and path.name != "state.pt"}


def differences(folder, whole):
    """The files of a folder that are not as in `whole`."""
    found = result(folder)
    return sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))


def draw():
    """faces/, the toy faces of 30 people, with landmarks and a benchmark."""
    who = (2 * torch.rand(30, toys.PERSON) - 1).repeat_interleave(4, 0)
    images, points = toys.draw_faces(who, 2 * torch.rand(120, toys.PICTURE) - 1, 32)
    images = (255 * images).to(torch.uint8)
    names = [f"person {i // 4}/{i % 4}.png" for i in range(120)]
    for name, image in zip(names, images):
        (root / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(image, str(root / "faces" / name))
    data.write_landmarks(root / "faces/landmarks.csv", zip(names, 32 * points))
    images = images.view(30, 4, 3, 32, 32)
    toys.write_bin(root / "faces/held.bin", images, 100, torch.Generator().manual_seed(0))


def kill(stage, line, length):
    """Kills a script again and again, and looks at what it leaves when it comes to its end."""
    whole, hit, ended, differ = result(root / "whole" / stage), 0, 0, set()
    while hit < kills or ended == 0:
        process = start(line.format("cut"))
        try:
            process.wait(rng.uniform(0.3, 0.9) * length if hit < kills else None)
            differ |= {f"exit code {process.returncode}"} if process.returncode else set()
            differ |= set(differences(root / "cut" / stage, whole))
            shutil.rmtree(root / "cut" / stage, ignore_errors=True)
            ended += 1
        except subprocess.TimeoutExpired:
            process.kill()
            hit += 1
        process.communicate()
        for path in (root / "cut").rglob("*.jpg"):                              # never half a picture
            data.open_image(path)
    check(f"{stage}: killed {hit} times, a life of {length:.0f} s; {ended} ends as if never killed",
          not differ, sorted(differ)[:3] if differ else "")


draw()
for stage, line in stages.items():
    begun = time.time()
    run(line.format("whole"))
    if only in (None, stage):
        kill(stage, line, time.time() - begun)
    if only == stage:
        sys.exit(len(bad))

ranks = [start(stages["virtual"].format("ranks"), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
said = "".join(process.communicate()[1] for process in ranks)
differ = differences(root / "ranks/virtual", result(root / "whole/virtual"))
check("two ranks at once draw the same set", not differ and "Traceback" not in said, differ[:3] or "")

for name in ("fr/state.pt", "fr/model.safetensors"):
    for tenth in range(10):
        shutil.rmtree(root / "broken", ignore_errors=True)
        shutil.copytree(root / "whole/fr", root / "broken/fr")
        content = (root / "whole" / name).read_bytes()
        (root / "broken" / name).write_bytes(content[:len(content) * tenth // 10])
        line = "dit_train.py --fr broken/fr --out broken/dit" if "model" in name else stages["fr"]
        run(line.format("broken"), 2, f"{name} cut to {tenth} tenths")

line = stages["fr"].format("stopped")
process = start(line)
while not (root / "stopped/fr/state.pt").is_file() and process.poll() is None:
    time.sleep(0.1)
process.send_signal(signal.SIGINT)
said = process.communicate()[1]
check("Ctrl-C", process.returncode == 130 and "interrupted" in said and "Traceback" not in said)
run(line, what="and the same command again")
differ = differences(root / "stopped/fr", result(root / "whole/fr"))
check("which ends as if never stopped", not differ)
process = start(stages["dit"].format("elsewhere"), LC_ALL="C", TZ="Asia/Kathmandu", PYTHONUTF8="0")
process.communicate()
differ = differences(root / "elsewhere/dit", result(root / "whole/dit"))
check("another locale and time zone give the same weights", process.returncode == 0 and not differ)
(root / "file").write_text("")
for stage, line in stages.items():
    run(line.format("file"), 2, f"{stage}: --out cannot be made")

small = root / "small"
small.mkdir()
for stage, line in stages.items():
    if subprocess.run(f"mount -t tmpfs -o size=1m none {small}", shell=True, capture_output=True).returncode:
        print("-   disk full: no tmpfs may be mounted here, not run")
        break
    (small / "filler").write_bytes(bytes(2 ** 20 - 8192))                       # room for two small files
    run(line.format("small"), 2, f"{stage}: disk full")
    left = [path.name for path in small.rglob("*") if ".tmp" in path.name]
    check(f"{stage}: nothing half-written is left", not left, left or "")
    subprocess.run(["umount", small], check=True)
shutil.rmtree(root)
print(f"{len(bad)} bad" + "".join(f"; {what}" for what in bad))
sys.exit(len(bad) > 0)
