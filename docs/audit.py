"""Both errors of the audit: python docs/audit.py JUDGE FACES... [TRIALS]

FACES are folders of people whom the recogniser JUDGE was not trained on. Their people are divided at random
into those who are real and those who are the set, TRIALS times (default: 20). A set of strangers must not be
called `leaks`; a set with other photographs of real people must. Prints how often each set is, and means of
what was found. In the end it makes up embeddings of 10,000 people with 50 images each, among them 50 copies, or
50 real people.
"""
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

arguments, sys.argv = sys.argv[1:], sys.argv[:1]
sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Faces  # noqa: E402
from evaluate import FaceSet, embed_faces, judge_set, nearest, places, verdict_of  # noqa: E402
from model import load_recogniser  # noqa: E402

trials = int(arguments.pop()) if arguments[-1].isdigit() else 20
backbone, prototypes, _ = load_recogniser(arguments[0])
everything = embed_faces(backbone, prototypes, Faces(arguments[1:], backbone.config["size"]))
thumbs, labels = everything.thumbs, everything.labels


def some_of(mask):
    """The FaceSet of the images where mask (M,) is true."""
    return FaceSet(everything.f[mask], labels[mask].unique(return_inverse=True)[1], thumbs[mask])


def verdict(data, real):
    """The verdict on a set, and what was found."""
    _, leakage = judge_set(data, real, None)
    return verdict_of(leakage | {"misaligned": None}, independent=True), leakage


# Photographs that lie there twice, under two names, would be copies in a set of strangers.
cosine, _ = nearest(thumbs, thumbs, labels, labels)
twice = cosine > 0.94
print(f"{len(labels)} images; left out {int(twice.sum())} that are somebody else's photograph, too")
everything = some_of(~twice)
thumbs, labels = everything.thumbs, everything.labels
place, count = places(labels)
N = int(labels.max()) + 1

found = defaultdict(list)
for trial in range(trials):
    chance = torch.Generator().manual_seed(trial)
    order = torch.randperm(N, generator=chance)
    is_real = torch.zeros(N, dtype=torch.bool).index_fill(0, order[:N // 2], True)[labels]
    for title, chosen in (("as they are", place >= 0), ("one image each", place == 0),
                          ("twenty images each", (place < 20) & (count >= 20))):
        found[f"strangers, {title}"].append(verdict(some_of(~is_real & chosen), some_of(is_real)))

    # Of some real people half of the images move from the real faces into the set, in place of strangers.
    several = labels[is_real & (count > 1)].unique()
    several = several[torch.randperm(len(several), generator=chance)]
    for share in (0.05, 0.1, 1.0):
        number = int(share * N / 2)
        leak = torch.isin(labels, several[:number])
        others = torch.isin(labels, order[N // 2 + number:])
        real = some_of(is_real & ~(leak & (place % 2 == 1)))
        for title, chosen in (("as they are", others | leak & (place % 2 == 1)),
                              ("one image each", others & (place == 0) | leak & (place == 1))):
            found[f"{share:.0%} real people, {title}"].append(verdict(some_of(chosen), real))

print("set | called leaks, of | recognised | person: over, allowed | somebody: over, allowed")
for title, results in found.items():
    rows = [leakage["tests"] for _, leakage in results]
    mean = lambda test, key: sum(row[test][key] for row in rows) / len(rows)
    print(f"{title} | {sum(name == 'leaks' for name, _ in results)} of {trials} | "
          f"{sum(leakage['recognised'] for _, leakage in results) / trials:.2f} | "
          f"{mean('person', 'over'):.1f}, {mean('person', 'allowed'):.1f} | "
          f"{mean('somebody', 'over'):.1f}, {mean('somebody', 'allowed'):.1f}", flush=True)

# 10,000 people x 50 images: centres with the moment of real centres, images around them as real ones are.
chance = torch.Generator().manual_seed(0)
half = torch.randperm(N, generator=chance)[:N // 2]
is_real = torch.zeros(N, dtype=torch.bool).index_fill(0, half, True)[labels]
whole = torch.isin(labels, labels[is_real & (count >= 20)].unique()[:50])
real = some_of(is_real & ~(whole & (place % 2 == 1)))
others = some_of(~is_real & (count >= 5))
sums = torch.zeros(int(others.labels.max()) + 1, others.f.shape[1]).index_add(0, others.labels, others.f)
means = sums / torch.bincount(others.labels)[:, None]
weights = torch.randn(10_000, len(means), generator=chance) / len(means) ** 0.5
centres = F.normalize(weights @ means) * means.norm(dim=1).mean()
rest = (others.f - means[others.labels])[torch.randint(len(others.f), (500_000,), generator=chance)]
two = torch.randint(len(others.f), (2, 500_000), generator=chance)
f = F.normalize(centres.repeat_interleave(50, 0) + rest)
pictures = F.normalize(others.thumbs[two[0]] + others.thumbs[two[1]])
people = torch.arange(10_000).repeat_interleave(50)
for title in ("nobody real", "50 copies", "50 real people"):
    data = FaceSet(f.clone(), people, pictures.clone())
    if title == "50 copies":
        data.thumbs[::10_000] = real.thumbs[:50 * 100:100]
    if title == "50 real people":
        for i, person in enumerate(labels[whole].unique().tolist()):
            mine = everything.f[(labels == person) & (place % 2 == 1)]
            data.f[50 * i:50 * i + 50] = mine[torch.arange(50) % len(mine)]
    name, leakage = verdict(data, real)
    tests = {test: (row["over"], row["allowed"]) for test, row in leakage["tests"].items()}
    print(f"10,000 x 50, {title}: {name}; over and allowed: {tests}", flush=True)
