"""Samples a dataset of people who do not exist: virtual prototypes, drawn by the DiT in poses of real people.

    python sample.py                                        # a small set from runs/dit
    python sample.py --virtual 10000 --per-id 50            # the paper's VIGFace(S)
    python sample.py --real-to 50                           # more pictures of real people with fewer than 50
    torchrun --nproc-per-node 8 sample.py --virtual 10000 --per-id 50           # any number of GPUs share it

One picture, in short:

    w = prototypes.to_draw()[row]                                               # who
    denoise = guided(dit, w, landmarks, guidance)                               # in which pose
    image = dpm_solver(denoise, noise, steps)

A picture too near a real person is drawn again, and left out after five attempts. Writes OUT/v000123/0007.jpg
(eighth picture of virtual prototype 123), manifest.csv (a row for each drawn), landmarks.csv, grid.jpg. The
same command continues a killed run; the set comes out the same.
"""
import argparse
import hashlib
import itertools
import json
import os
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, open_image, read_csv, write_csv, write_landmarks
from evaluate import FaceSet, embed_faces, resemblance, thresholds_of
from model import (DEVICE, RANK, DiT, autocast, build, compiled, digest, dpm_solver, embed, fail, guided,
                   load_model, load_recogniser, nearest, positive, reading, replacing, run, same_settings, to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--dit", default="runs/dit", metavar="DIR", help="the DiT's run folder (default: %(default)s)")
flag("--fr", metavar="DIR", help="the recogniser's run folder (default: the one the DiT was trained with)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the recogniser's data)")
flag("--out", metavar="DIR", help="the set's folder (default: runs/virtual; runs/real-aug with --real-to)")
flag("--virtual", type=positive, default=2000, metavar="K", help="identities, 0 to K-1 (default: %(default)s)")
flag("--per-id", type=positive, default=4, help="pictures of each (default: %(default)s)")
flag("--real-to", type=positive, metavar="N", help="instead, fill every real person up to N images (default: off)")
flag("--steps", type=int, default=10, help="solver steps (default: %(default)s)")
# paper: guidance 4; here 1: half the cost, and pictures of one person stay varied.
flag("--guidance", type=float, default=1.0, help="classifier-free, 1 for none (default: %(default)s)")
flag("--batch", type=positive, default=256 if DEVICE.type == "cuda" else 64,
     help="pictures at once (default: %(default)s)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

ATTEMPTS = 5        # paper: unstated; here pictures too near a real person are drawn again

# A picture to draw: the index-th of the person with this row of W and this name, in a training face's pose.
Job = namedtuple("Job", "row name index attempt pose")

# What became of it: a row of manifest.csv.
Verdict = namedtuple("Verdict", "file identity index attempt landmarks_from verdict cos_own cos_nearest_real "
                                "cos_nearest_image own_is_nearest quality")


def seed_of(*what):
    """A number that depends on `what` alone."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest(), "big")


def load(args):
    """The DiT, the poses it was trained on, backbone, prototypes and metadata of its recogniser."""
    tensors, meta = load_model(args.dit, "dit")
    args.fr = args.fr or meta["fr"]
    backbone, prototypes, fr = load_recogniser(args.fr)
    if not fr["names"] or digest(args.fr) != meta["fr_sha256"]:
        fail(f"{args.fr}: {args.dit} was trained with another recogniser; name it, or train again")
    dit = build(DiT, tensors, "dit", args.dit, meta["config"]).to(DEVICE)
    return dit, tensors["poses.landmarks"], backbone, prototypes, fr


def embed_real(backbone, prototypes, names, sources):
    """The FaceSet of the real faces, its labels being rows of W, and the thresholds that a picture must stay
    below.
    """
    faces = Faces(sources, backbone.config["size"])
    new = len(prototypes.real) + len(prototypes.virtual)         # people without a prototype: rows after W's
    row_of = {name: new + i for i, name in enumerate(faces.people)}
    row_of |= {name: row for row, name in enumerate(names)}
    rows = torch.tensor([row_of[name] for name in faces.people], device=DEVICE)
    real = embed_faces(backbone, prototypes, faces)
    real = real._replace(labels=rows[real.labels])
    thresholds, _ = thresholds_of(real, resemblance(real, real, real.labels))
    return real, thresholds


def draw(dit, W, poses, jobs, args):
    """Pictures uint8 (args.batch, 3, S, S) of jobs, each from its own seed; the last job fills the batch up.
    """
    jobs = jobs + jobs[-1:] * (args.batch - len(jobs))          # one shape: nothing is compiled again
    noise = []
    for job in jobs:
        generator = torch.Generator(DEVICE).manual_seed(seed_of(args.seed, job.name, job.index, job.attempt))
        noise.append(torch.randn(3, dit.size, dit.size, generator=generator, device=DEVICE))
    w = W[[job.row for job in jobs]]
    landmarks = poses[[job.pose for job in jobs]].to(DEVICE)
    with autocast():
        denoise = guided(dit, w, landmarks, args.guidance)
        return to_uint8(dpm_solver(denoise, torch.stack(noise), args.steps))


def judge(backbone, prototypes, W, real, thresholds, jobs, images):
    """A Verdict on the picture of each job: whether it is over a threshold, and so a leak.

    Pictures of a real person (--real-to) may resemble this person's own images.
    """
    f = embed(backbone, images, unit=False)[:len(jobs)] / 2      # the mean with the mirrored image
    unit = F.normalize(f)
    rows = torch.tensor([job.row for job in jobs], device=DEVICE)
    own = (unit * W[rows]).sum(1)
    nearest_other, _ = nearest(unit, W, rows)
    near = resemblance(FaceSet(unit.to(real.f), rows), real, rows)
    centre, image = near["centre"][0], near["image"][0]
    leaks = (centre > thresholds["centre"]) | (image > thresholds["image"])
    numbers = torch.stack([own, centre, image, own > nearest_other, prototypes.quality(f)[:, 0]], 1)

    return [Verdict(f"{job.name}/{job.index:04d}.jpg", job.name, job.index, job.attempt, job.pose,
                    "leak" if leak else "accepted", *map("{:.4f}".format, scores))
            for job, leak, scores in zip(jobs, leaks.tolist(), numbers.tolist())]


def people_to_draw(args, names, n, real):
    """{row of W: number of pictures to draw}; ends the program if there is nobody."""
    if args.real_to:
        images = torch.bincount(real.labels).tolist()
        wanted = {row: args.real_to - count for row, count in enumerate(images[:n]) if 0 < count < args.real_to}
        if not wanted:
            fail(f"--real-to {args.real_to}: nobody whom {args.fr} knows has 1 to {args.real_to - 1} images; give more")
        return wanted
    k = len(names) - n
    if args.virtual > k:
        fail(f"--virtual {args.virtual}: expected 1 to {k}, as {args.fr} has; train it with more")
    return {n + i: args.per_id for i in range(args.virtual)}


def write_person(out, name, pictures, verdicts):
    """Writes a person's accepted pictures {file: image}, then the verdicts, which say that these are all."""
    for file, image in pictures.items():
        with replacing(out / file) as path:
            to_pil_image(image).save(path, "JPEG", quality=95, subsampling=0)
    verdicts.sort(key=lambda verdict: (verdict.index, verdict.attempt))
    write_csv(out / ".people" / f"{name}.csv", Verdict._fields, verdicts)


def finish(out, names, wanted, poses, size):
    """Joins everybody's verdicts into manifest.csv, which says that the set is complete; says how it went."""
    verdicts = [Verdict(*values) for row in wanted
                for values in read_csv(out / ".people" / f"{names[row]}.csv")[1:]]
    accepted = [verdict for verdict in verdicts if verdict.verdict == "accepted"]
    if not accepted:
        fail(f"{out}: every picture was too near a real person; train stage 2 longer")
    landmarks = size * poses[[int(verdict.landmarks_from) for verdict in accepted]]
    write_landmarks(out / "landmarks.csv", zip((verdict.file for verdict in accepted), landmarks))

    people = [[*some] for _, some in itertools.groupby(accepted, lambda verdict: verdict.identity)][:8]
    width = min(8, max(map(len, people)))
    files = [out / some[i * len(some) // width].file for some in people for i in range(width)]
    grid = [pil_to_tensor(open_image(file)) for file in files]
    with replacing(out / "grid.jpg") as path:
        save_image(torch.stack(grid) / 255, path, "JPEG", nrow=width)
    write_csv(out / "manifest.csv", Verdict._fields, verdicts)

    def mean(column):
        return sum(float(getattr(verdict, column)) for verdict in accepted) / len(accepted)
    loud = "WARNING: over half was rejected; " if len(verdicts) > 2 * len(accepted) else ""
    rejected, left_out = len(verdicts) - len(accepted), sum(wanted.values()) - len(accepted)
    print(f"{loud}{out}: {len(accepted)} images of {len(wanted)} people; by the recogniser that taught them, cosine "
          f"to the own prototype {mean('cos_own'):.3f}, the nearest for {mean('own_is_nearest'):.1%}; "
          f"{rejected} too near a real person, {left_out} left out")


def main():
    args = parser.parse_args()
    if args.steps < 3:
        fail(f"--steps {args.steps}: expected 3 or more; fewer end in a blur")
    dit, poses, backbone, prototypes, fr = load(args)
    W, n = prototypes.to_draw(), len(prototypes.real)
    names = [*fr["names"], *(f"v{i:06d}" for i in range(len(W) - n))]

    out = Path(args.out or ("runs/real-aug" if args.real_to else "runs/virtual"))
    # A set may be moved, or continued with another --batch.
    settings = vars(args) | dict(out=None, batch=None, dit_sha256=digest(args.dit), fr_sha256=digest(args.fr))
    if (out / "run.json").is_file():
        with reading(out / "run.json", "the settings of a set"):
            before = json.loads((out / "run.json").read_text())
            same_settings(out / "run.json", before, settings)
    elif out.is_dir() and any(not entry.name.startswith("run.json") for entry in out.iterdir()):
        fail(f"--out {out}: a folder of something else; name one that is empty or not there yet")
    if (out / "manifest.csv").is_file():
        return print(f"{out / 'manifest.csv'}: already complete")

    real, thresholds = embed_real(backbone, prototypes, fr["names"], args.real or fr["data"])
    wanted = people_to_draw(args, names, n, real)
    with replacing(out / "run.json") as path:
        path.write_text(json.dumps(settings, indent=1))

    # One queue runs over everybody, so that batches are full.
    complete = lambda row: (out / ".people" / f"{names[row]}.csv").is_file()
    mine = [row for row in [*wanted][RANK::int(os.environ.get("WORLD_SIZE", 1))] if not complete(row)]
    # paper: does not say which poses; here any training face's, because poses even over yaw taught no more.
    queue = (Job(row, names[row], index, 0, seed_of(args.seed, names[row], index) % len(poses))
             for row in mine for index in range(wanted[row]))
    fast = compiled(dit, sum(wanted.values()) * args.steps)     # by the whole set, so that all ranks decide alike
    verdicts, pictures, left = {}, {}, dict(wanted)             # of people who are not complete
    writing, again = deque(), []                                # again: rejected jobs, never more than a batch
    total = sum(wanted[row] for row in mine)
    with tqdm(total=total, desc=out.name) as progress, ThreadPoolExecutor(16) as pool:
        while jobs := [*itertools.islice(itertools.chain(again, queue), args.batch)]:
            images = draw(fast, W, poses, jobs, args)
            judged = judge(backbone, prototypes, W, real, thresholds, jobs, images)
            again = []
            for job, verdict, image in zip(jobs, judged, images.cpu()):
                verdicts.setdefault(job.row, []).append(verdict)
                leak = verdict.verdict == "leak"
                if leak and job.attempt + 1 < ATTEMPTS:
                    again.append(job._replace(attempt=job.attempt + 1))
                    continue
                progress.update()
                left[job.row] -= 1
                if not leak:
                    pictures.setdefault(job.row, {})[verdict.file] = image
                if not left[job.row]:
                    person = pictures.pop(job.row, {}), verdicts.pop(job.row)
                    writing.append(pool.submit(write_person, out, job.name, *person))
            while len(writing) > 64:
                writing.popleft().result()                      # raises what went wrong; bounds memory
        for written in writing:
            written.result()
    if all(map(complete, wanted)):
        finish(out, names, wanted, poses, dit.size)             # several ranks may come here and write the same
    else:
        print(f"{out}: this rank is done, the last one completes the set; if all have ended, run it again")


if __name__ == "__main__":
    run(main)
