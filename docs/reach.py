"""Can the DiT draw people it never saw? In the folder of the README's first command: python docs/reach.py

Three kinds of people are asked for: prototypes it was trained on, centres of the toy faces of new people,
and virtual prototypes. Printed of each: how much of their squared length lies in the directions that hold
99 % of the real prototypes' (what lies outside no face can reach), and the cosine of generated faces to what
was asked for, at guidance 1 and 2, four poses each.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import (DEVICE, DiT, autocast, build, dpm_solver, embed, guided, load_model, load_recogniser,
                   to_uint8)
from tools.toys import PERSON, PICTURE, draw_faces

count = 100
torch.manual_seed(99)
backbone, prototypes, _ = load_recogniser("runs/fr")
tensors, meta = load_model("runs/dit", "dit")
dit = build(DiT, tensors, "dit", "runs/dit", meta["config"]).to(DEVICE)
poses, W, n = tensors["poses.landmarks"], prototypes.to_draw(), len(prototypes.real)

who = (2 * torch.rand(count, PERSON) - 1).repeat_interleave(8, 0)
new = torch.cat([draw_faces(some, 2 * torch.rand(len(some), PICTURE) - 1, dit.size)[0]
                 for some in who.split(200)])
centres = F.normalize(embed(backbone, to_uint8(2 * new - 1)).view(count, 8, -1).sum(1))

share, directions = torch.linalg.eigh(W[:n].T @ W[:n] / n)                      # ascending
inside = directions[:, share.cumsum(0) > 0.01]
print(f"{inside.shape[1]} of {W.shape[1]} directions hold 99 % of the real prototypes")
for name, asked in (("trained on", W[:n][:count]), ("drawn anew", centres), ("virtual", W[n:n + count])):
    w = asked.repeat_interleave(4, 0)
    pose = poses[torch.randint(len(poses), (len(w),))].to(DEVICE)
    noise = torch.randn(len(w), 3, dit.size, dit.size, device=DEVICE)
    line = f"{name}: {(asked @ inside).square().sum(1).mean():.1%} inside"
    for guidance in (1, 2):
        with torch.no_grad(), autocast():
            images = torch.cat([dpm_solver(guided(dit, *some, guidance), start, steps=10)
                                for *some, start in zip(w.split(100), pose.split(100), noise.split(100))])
        line += f"  guidance {guidance}: {(embed(backbone, to_uint8(images)) * w).sum(1).mean():.3f}"
    print(line)
