"""Speed and quality of sampling, after the README's first command: python docs/sampling.py [quality]

Without an argument: pictures a second of sample.py, with and without the audit, and of a naive loop (one
picture at a time, both guidance passes, JPEG and audit in line). With `quality`: own cosine, consistency and
accuracy of a recogniser trained on the pictures, against solver steps and guidance. All of seed 0.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

home = Path(__file__).parent.parent
sys.path.insert(0, str(home))
from model import (DiT, DiTConfig, autocast, build, dpm_solver, embed, guided, load_model, load_recogniser,
                   part, to_uint8)


def script(line):
    """Runs a script of ours; its output and its seconds."""
    start, (name, *flags) = time.time(), line.split()
    done = subprocess.run([sys.executable, home / name, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.time() - start


def naive_rate(guidance, steps=10, count=24):
    """Pictures a second of the loop one would write first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors, meta = load_model("runs/dit", "dit")
    dit = build(DiT, DiTConfig, meta, part(tensors, "dit"), "runs/dit").to(device).eval()
    backbone, prototypes, _ = load_recogniser("runs/fr", device)
    w, landmarks = prototypes.unit()[-count:], tensors["poses.landmarks"][:count].to(device)
    start = time.time()
    for i in range(count):
        with torch.no_grad(), autocast(device):
            noise = torch.randn(1, 3, dit.cfg.size, dit.cfg.size, device=device)
            denoise = guided(dit, w[i:i + 1], landmarks[i:i + 1], guidance + 1e-6)      # never skips a pass
            image = to_uint8(dpm_solver(denoise, noise, steps))
        (embed(backbone, image) @ prototypes.unit().T).amax().item()
        to_pil_image(image[0].cpu()).save(Path(scratch) / f"{i}.jpg", quality=95)
    return count / (time.time() - start)


with tempfile.TemporaryDirectory() as scratch:
    if sys.argv[1:] == ["quality"]:
        for steps, guidance in ((8, 1), (12, 1), (20, 1), (50, 1), (10, 1.5), (10, 2), (10, 4)):
            out = f"{scratch}/{steps}-{guidance}"
            script(f"sample.py --steps {steps} --guidance {guidance} --out {out}")
            said, _ = script(f"fr_train.py --data {out} --virtual 0 --val runs/demo/heldout.bin --out {out}f")
            accuracy = [line.split()[5].strip(",") for line in said.splitlines() if "mean accuracy" in line]
            script(f"evaluate.py --fr runs/fr --datasets {out} --out {out}-report")
            row = json.loads(Path(f"{out}-report/report.json").read_text())["datasets"][out]
            own = json.loads(Path(f"{out}/audit.json").read_text())["mean_cos_own"]
            print(f"steps {steps:2d} guidance {guidance:3} virtual-only {accuracy[0]}  own cosine {own:.3f}  "
                  f"consistency {row['consistency']:.3f}  separability {row['separability']:.3f}  "
                  f"own nearest {row['own_top1']:.1%}  {row['leakage']['verdict']}", flush=True)
    else:
        for guidance in (1, 2):
            rates = {}
            for audit in ("", " --no-audit"):
                line = f"sample.py --guidance {guidance}{audit} --out {scratch}/{guidance}{audit.strip()}"
                _, small = script(f"{line}-small --virtual 8")
                _, large = script(f"{line}-large --virtual 200")
                rates[audit] = 192 * 8 / (large - small)
            naive = naive_rate(guidance)
            rate, unaudited = rates.values()
            print(f"guidance {guidance}: {rate:.1f} img/s, {unaudited:.1f} without the audit, which takes "
                  f"{1 - rate / unaudited:.1%} of the time; naive loop {naive:.1f} img/s: "
                  f"{rate / naive:.1f} times", flush=True)
