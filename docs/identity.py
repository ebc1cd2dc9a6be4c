"""How a judge sees the people of face sets: python docs/identity.py JUDGE SET...

JUDGE is a recogniser that had no part in the sets. Of each set it prints the mean cosine of two pictures of
one person, how often such a pair is above a pair of two people, and how many pairs of one person are above the
cosine that one in a thousand pairs of two people reaches. 200,000 pairs of each kind, drawn by chance with
seed 0. Every person counts with as many pairs, so sets of few and of many pictures compare.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Faces
from evaluate import embed_faces, quantile
from model import load_recogniser

PAIRS = 200_000

backbone, prototypes, meta = load_recogniser(sys.argv[1])
print("set | people, images | cosine of two pictures of one person | of two people | pairs told apart | "
      "true accepts at 1e-3")
for name in sys.argv[2:]:
    data = embed_faces(backbone, prototypes, Faces([name], meta["config"]["size"]))
    chance = torch.Generator().manual_seed(0)
    order = data.labels.argsort()
    count = torch.bincount(data.labels)
    first = count.cumsum(0) - count

    # One person: a person with two pictures or more, and two of these. Two people: any two.
    several = (count > 1).nonzero()[:, 0]
    person = several[torch.randint(len(several), (PAIRS,), generator=chance)]
    a = (torch.rand(PAIRS, generator=chance) * count[person]).long()
    b = (a + 1 + (torch.rand(PAIRS, generator=chance) * (count[person] - 1)).long()) % count[person]
    same = (data.f[order[first[person] + a]] * data.f[order[first[person] + b]]).sum(1)
    two = torch.randint(len(data.f), (2, PAIRS), generator=chance)
    two = two[:, data.labels[two[0]] != data.labels[two[1]]]
    other = (data.f[two[0]] * data.f[two[1]]).sum(1)

    apart = torch.searchsorted(other.sort().values, same).double().mean() / len(other)
    accepts = (same > quantile(other, 0.999)).double().mean()
    print(f"{name} | {len(several)}, {len(data.f)} | {same.mean():.3f} | {other.mean():.3f} | {apart:.1%} | "
          f"{accepts:.1%}", flush=True)
