"""Places virtual prototypes in another way: python docs/placement.py FR DIT SHARE OUT [random]

Copies the run folders FR and DIT into OUT/fr and OUT/dit. There the virtual prototypes have SHARE of people's
moment (`person_moment`) and 1 - SHARE of that of the real prototypes: `Prototypes.settle` has a SHARE of 1. A
SHARE of -1 leaves them as they were trained. With `random`, directions drawn by chance take the place of the
trained ones. Then: python sample.py --fr OUT/fr --dit OUT/dit --out SET. Prints the room, as fr_train.py does.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

arguments, sys.argv = sys.argv[1:], sys.argv[:1]
sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Faces
from fr_train import room
from model import digest, load_model, load_recogniser, person_moment, power, save_model

fr, dit, share, out, *random = arguments
out, share = Path(out), float(share)
backbone, prototypes, meta = load_recogniser(fr)
real, virtual = F.normalize(prototypes.real), F.normalize(prototypes.virtual)
if random:
    virtual = torch.randn(virtual.shape, generator=torch.Generator().manual_seed(0)).to(virtual)
if share >= 0:
    people = person_moment(backbone, Faces(meta["data"], meta["config"]["size"]))
    moment = (1 - share) * (real.mT @ real / len(real)) + share * people
    whitened = virtual @ power(virtual.mT @ virtual / len(virtual), -0.5)
    settled = F.normalize(whitened @ power(moment, 0.5))
else:
    settled = prototypes.unit()[len(real):]
prototypes.settled.copy_(settled)
print(out, room(prototypes))


def parts_of(folder, stage, *names):
    """The tensors of a run folder as {part: {name: tensor}}, for `save_model`, and its metadata."""
    tensors, meta = load_model(folder, stage)
    parts = {part: {} for part in names}
    for name, tensor in tensors.items():
        part, name = name.split(".", 1)
        parts[part][name] = tensor
    return parts, meta


parts, _ = parts_of(fr, "fr", "backbone", "prototypes")
parts["prototypes"]["settled"] = settled
kept = {key: value for key, value in meta.items() if key not in ("stage", "config", "sha256")}
save_model(out / "fr", "fr", meta["config"], parts, **kept)
parts, meta = parts_of(dit, "dit", "dit", "poses")
save_model(out / "dit", "dit", meta["config"], parts, fr_sha256=digest(out / "fr"), data=meta["data"])
