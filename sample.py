"""Samples a dataset of people who do not exist: virtual prototypes, drawn by the DiT in poses of real people.

    python sample.py                                        # a small set from runs/dit
    python sample.py --virtual 10000 --per-id 50            # the paper's VIGFace(S)
    python sample.py --real-to 50                           # more pictures of real people with fewer than 50
    torchrun --nproc-per-node 8 sample.py --virtual 10000 --per-id 50           # any number of GPUs share it

A picture too near a real person is drawn again, and left out after five attempts. Writes OUT/v000123/0007.jpg
(eighth picture of virtual prototype 123), manifest.csv (a row for each drawn), landmarks.csv, grid.jpg. The
same command continues a killed run; the set comes out the same.
"""
import csv
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image
from tqdm import tqdm

from data import read_image, write_csv, write_landmarks
from evaluate import FaceSet, nearest, person_moment, resemblance, thumbnails
from model import (DEVICE, DiT, around, autocast, build, compiled, digest, dpm_solver, embed, fail, guided,
                   load_model, load_recogniser, options, reading, replace_file, run, same_settings, to_uint8)

parser, flag = options(__doc__)
flag("--dit", default="runs/dit", metavar="DIR", help="the DiT's run folder (default: %(default)s)")
flag("--fr", metavar="DIR", help="the recogniser's run folder (default: the one the DiT was trained with)")
flag("--out", metavar="DIR", help="the set's folder (default: runs/virtual; runs/real-aug with --real-to)")
flag("--virtual", type=int, default=2000, metavar="K", help="identities, 0 to K-1 (default: %(default)s)")
flag("--per-id", type=int, default=4, help="pictures of each (default: %(default)s)")
flag("--real-to", type=int, metavar="N", help="instead, fill every real person up to N images (default: off)")
flag("--steps", type=int, default=10, help="solver steps (default: %(default)s)")
flag("--guidance", type=float, default=1.0, help="classifier-free, 1 for none (default: %(default)s)")
flag("--spread", type=float, default=0.4, help="around prototypes, 1 as of real faces (default: %(default)s)")
flag("--max-real", type=float, help="highest cosine to a real person or image (default: as evaluate.py)")
flag("--batch", type=int, default=256 if DEVICE.type == "cuda" else 64, help="at once (default: %(default)s)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

COLUMNS = ["file", "identity", "index", "attempt", "landmarks_from", "verdict",         # of manifest.csv
           "cos_own", "cos_nearest_real", "cos_nearest_image", "copy", "own_is_nearest", "quality"]


def seed_of(*what):
    """A number that depends on `what` alone."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest(), "big")


class Artist:
    """What turns jobs (row of the prototypes, index, attempt, pose) into judged pictures."""

    def __init__(self, args, device):
        tensors, meta = load_model(args.dit, "dit")
        args.fr = args.fr or meta["fr"]
        self.args, self.device = args, device
        self.dit = build(DiT, tensors, "dit", args.dit, meta["config"]).to(device)
        self.backbone, self.prototypes, fr = load_recogniser(args.fr, device)
        if digest(args.fr) != meta["fr_sha256"]:
            fail(f"{args.fr}: {args.dit} was trained with another recogniser; name it, or train again")
        self.landmarks, self.owners = tensors["poses.landmarks"], tensors["poses.rows"]
        f, labels, thumbs = (tensors[f"real.{name}"].to(device) for name in ("f", "labels", "thumbs"))
        self.real, self.lines = FaceSet(f.float(), labels, thumbs.float()), meta["lines"]
        self.W, self.n = self.prototypes.unit(person_moment(f.float(), labels)), len(self.prototypes.real)
        self.names = [*fr["names"], *(f"v{i:06d}" for i in range(len(self.W) - self.n))]
        if args.max_real is not None:
            self.lines |= {"centre": args.max_real, "image": args.max_real}

    def noise(self, row, index, attempt, _):
        """Standard normal numbers (D + 3 S S,) of a job, from its own seed."""
        seed = seed_of(self.args.seed, self.names[row], index, attempt)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.dit.dim + 3 * self.dit.size ** 2, generator=generator, device=self.device)

    def draw(self, dit, jobs):
        """Pictures uint8 (batch, 3, S, S), on the device; the last job fills up, for one shape of batch."""
        jobs = jobs + jobs[-1:] * (self.args.batch - len(jobs))
        rows, _, _, poses = map(list, zip(*jobs))
        noise = torch.stack([self.noise(*job) for job in jobs])
        direction, noise = noise.tensor_split([self.dit.dim], 1)
        # paper: each picture of the prototype itself; here: around it, because else pictures are too alike.
        w = around(self.W[rows], direction, self.prototypes.sigma2, self.args.spread)
        denoise = guided(dit, w, self.landmarks[poses].to(self.device), self.args.guidance)
        with autocast(self.device):
            return to_uint8(dpm_solver(denoise, noise.unflatten(1, (3, -1, self.dit.size)), self.args.steps))

    def judge(self, jobs, images):
        """Whether pictures leak (B,); their scores (B, 6): own cosine, `resemblance` to real people (centre,
        image, copy), is the own prototype the nearest of all, quality."""
        f = embed(self.backbone, images, len(images), unit=False)[:len(jobs)] / 2
        rows = torch.tensor([row for row, *_ in jobs], device=self.device)
        drawn = FaceSet(F.normalize(f), rows, thumbnails(images[:len(jobs)]))
        own, other = (drawn.f * self.W[rows]).sum(1), nearest(drawn.f, self.W, rows)[0]
        found = {test: similarity for test, (similarity, _) in resemblance(drawn, self.real, rows).items()}
        leaks = torch.stack([found[test] > self.lines[test] for test in found]).any(0)
        scores = [own, *found.values(), own > other, self.prototypes.quality(f)[:, 0]]
        return leaks.tolist(), torch.stack(scores, 1).tolist()

    def people(self):
        """{row of the prototypes: number of pictures to draw}; ends the program if there is nobody."""
        args, k = self.args, len(self.W) - self.n
        if args.real_to:
            have = torch.bincount(self.owners, minlength=self.n).tolist()
            wanted = {row: args.real_to - count for row, count in enumerate(have) if 0 < count < args.real_to}
            return wanted or fail(f"--real-to {args.real_to}: everybody has as many images; give more")
        if not 0 < args.virtual <= k:
            fail(f"--virtual {args.virtual}: expected 1 to {k}, as {args.fr} has; train it with more")
        return {self.n + i: args.per_id for i in range(args.virtual)}


def write_person(folder, rows, pictures):
    """Writes a person's pictures {file: image or None}, then person.csv, which says that this is all."""
    shutil.rmtree(folder, ignore_errors=True)                           # of a run that was killed
    for file, image in pictures.items():
        if image:
            replace_file(folder / file, lambda path: image.save(path, "JPEG", quality=95, subsampling=0))
    write_csv(folder / "person.csv", COLUMNS, sorted(rows, key=lambda row: row[2:4]))


def draw_people(artist, wanted, out):
    """Draws and judges pictures of {row: count} people, rejected ones again, and writes them to `out`."""
    # One queue runs over everybody: batches are full. Without threads: a GPU draws while files are written.
    args, names = artist.args, artist.names
    dit = compiled(artist.dit, artist.device, sum(artist.people().values()) * args.steps)
    # paper: unstated how; here: poses of any training faces, because even over yaw they taught no more.
    first = ((row, index, 0, seed_of(args.seed, names[row], index) % len(artist.landmarks))
             for row in wanted for index in range(wanted[row]))
    rows, drawn = {}, {}                                                # of incomplete people
    settled, again = [], []                                             # judged, not written; rejected jobs

    with tqdm(total=sum(wanted.values()), desc=out.name) as progress:
        while (jobs := [*itertools.islice(itertools.chain(again, first), args.batch)]) or settled:
            del again[:len(jobs)]
            images = artist.draw(dit, jobs) if jobs else None           # a GPU does so during what follows
            for (row, index, attempt, pose), leak, score, image in settled:
                rows.setdefault(row, []).append([f"{names[row]}/{index:04d}.jpg", names[row], index, attempt,
                    pose, "leak" if leak else "accepted", *map("{:.4f}".format, score)])
                if leak and attempt < 4:                                # five attempts at most
                    again.append((row, index, attempt + 1, pose))
                    continue
                progress.update()
                drawn.setdefault(row, {})[f"{index:04d}.jpg"] = None if leak else to_pil_image(image)
                if len(drawn[row]) == wanted[row]:
                    write_person(out / names[row], rows.pop(row), drawn.pop(row))
            settled = [*zip(jobs, *artist.judge(jobs, images), images.cpu())] if jobs else []


def finish(artist, wanted, out):
    """Joins everybody's rows into manifest.csv, which says that the set is complete; says how it went."""
    people = [out / artist.names[row] / "person.csv" for row in wanted]         # about 1 KB of rows a picture
    rows = [row for file in people for row in csv.DictReader(os.fsdecode(file.read_bytes()).split("\n"))]
    accepted = [row for row in rows if row["verdict"] == "accepted"] or fail(
        f"{out}: every picture was rejected; train stage 2 longer, or set --max-real")
    poses = artist.dit.size * artist.landmarks[[int(row["landmarks_from"]) for row in accepted]]
    write_landmarks(out / "landmarks.csv", zip((row["file"] for row in accepted), poses))
    pictures = [[*some] for _, some in itertools.groupby(accepted, lambda row: row["identity"])][:8]
    width = min(8, max(map(len, pictures)))
    grid = [read_image(out / some[i * len(some) // width]["file"]) for some in pictures for i in range(width)]
    replace_file(out / "grid.jpg", lambda path: save_image(torch.stack(grid) / 255, path, "JPEG", nrow=width))
    write_csv(out / "manifest.csv", COLUMNS, (row.values() for row in rows))
    mean = lambda column: sum(float(row[column]) for row in accepted) / len(accepted)
    loud = "WARNING: over half was rejected; " if len(rows) > 2 * len(accepted) else ""
    print(f"{loud}{out}: {len(accepted)} images of {len(wanted)} people, cosine to the own prototype "
          f"{mean('cos_own'):.3f}, the nearest for {mean('own_is_nearest'):.1%}; {len(rows) - len(accepted)} "
          f"too near a real person, {sum(wanted.values()) - len(accepted)} pictures left out")


def main():
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # as torchrun sets
    if min(args.per_id, args.steps, args.batch) < 1:
        fail("--per-id, --steps and --batch: expected 1 or more of each")
    artist = Artist(args, DEVICE)
    wanted = artist.people()
    out = Path(args.out or ("runs/real-aug" if args.real_to else "runs/virtual"))
    settings = vars(args) | {"out": "", "dit_sha256": digest(args.dit), "fr_sha256": digest(args.fr)}
    if (out / "run.json").is_file():
        with reading(out / "run.json", "the settings of a set"):
            same_settings(out / "run.json", json.loads((out / "run.json").read_text()), settings)
    elif out.is_dir() and any(not entry.name.startswith("run.json") for entry in out.iterdir()):
        fail(f"--out {out}: a folder of something else; name one that is empty or not there yet")
    if (out / "manifest.csv").is_file():
        return print(f"{out / 'manifest.csv'}: already complete")
    replace_file(out / "run.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
    complete = lambda row: (out / artist.names[row] / "person.csv").is_file()
    draw_people(artist, {row: wanted[row] for row in [*wanted][rank::world] if not complete(row)}, out)
    if all(map(complete, wanted)):
        finish(artist, wanted, out)                                     # several ranks may come here: no harm


if __name__ == "__main__":
    run(main)
