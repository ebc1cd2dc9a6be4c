"""Samples a dataset of people who do not exist: virtual prototypes, drawn by the DiT in poses of real people.

    python sample.py                                        # a small set from runs/dit
    python sample.py --virtual 10000 --per-id 50            # the paper's VIGFace(S)
    python sample.py --real-to 50                           # more pictures of real people with fewer than 50
    torchrun --nproc-per-node 8 -- sample.py --virtual 10000 --per-id 50        # any number of GPUs share it

One picture, in short:

    w = prototypes.to_draw()[row]                                               # who
    denoise = guided(dit, w, landmarks, guidance)                               # in which pose
    image = dpm_solver(denoise, noise, steps)

Pictures are drawn in rounds: first each one once, then again those that came too near a real person. A
picture that is too near even after five attempts is left out. Each batch is drawn, judged and written. In the
end somebody is left out whose pictures together come too near a real person.

Writes OUT/3fa2b1-000123/0007.jpg (eighth picture of virtual prototype 123 of a recogniser 3fa2b1...),
manifest.csv (a row for each picture drawn, with its verdict), landmarks.csv, grid.jpg. The same command
continues a killed run; the set comes out the same.
"""
import argparse
import contextlib
import hashlib
import itertools
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, open_image, read_csv, rows_of, write_csv, write_landmarks
from evaluate import centres_of, embed_faces, lines_of, nearest, strangers_to
from model import (DEVICE, RANK, DiT, autocast, build, claim, compiled, digest, dpm_solver, embed, fail,
                   guided, load_model, load_recogniser, positive, replacing, run, to_uint8, until_stopped)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--dit", default="runs/dit", metavar="DIR", help="the DiT's run folder (default: %(default)s)")
flag("--fr", default="runs/fr", metavar="DIR", help="the recogniser's run folder (default: %(default)s)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the recogniser's data)")
flag("--out", metavar="DIR", help="the set's folder (default: runs/virtual; runs/real-aug with --real-to)")
flag("--virtual", type=positive, default=2000, metavar="K", help="virtual people (default: %(default)s)")
flag("--per-id", type=positive, default=4, help="pictures of each (default: %(default)s)")
flag("--real-to", type=positive, metavar="N", help="instead, fill up every real person to N images")
flag("--steps", type=int, default=10, help="solver steps (default: %(default)s)")
flag("--guidance", type=float, help="classifier-free, 1 for none (default: 1; 4 with --paper)")
flag("--paper", action="store_true", help="guidance 4, as published (default: off)")
flag("--batch", type=positive, default=256 if DEVICE.type == "cuda" else 64,
     help="pictures at once (default: %(default)s)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

ATTEMPTS = 5        # paper: unstated; here pictures too near a real person are drawn again
ENOUGH = 100        # strangers: of fewer nobody can tell what 99 % stay below

# A picture to draw: of which person (their row of W, and name), which of their pictures, at which attempt,
# and in the pose of which training face.
Job = namedtuple("Job", "row name index attempt pose")

# What became of it: a row of manifest.csv. The verdict is `leak` or `accepted`, or in place of this `person`,
# if the pictures of this person together are too near somebody. Cosines are to the own prototype, to the
# centre of the nearest real person, and to the nearest real image; with --real-to, the own person is none.
Verdict = namedtuple("Verdict", "file identity index attempt landmarks_from verdict cos_own cos_nearest_real "
                                "cos_nearest_image")


# ------------------------------------------------------------------------------------------- what is needed

def seed_of(*what):
    """A number that depends on `what` alone."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest(), "big")


def load(args):
    """The DiT, its poses, its metadata, and backbone, prototypes and metadata of its recogniser."""
    tensors, meta = load_model(args.dit, "dit")
    backbone, prototypes, fr = load_recogniser(args.fr)
    if fr.get("sha256") != meta["fr_sha256"]:
        fail(f"{args.fr}: {args.dit} was trained with another recogniser; name it with --fr")
    dit = build(DiT, tensors, "dit", args.dit, meta["config"]).to(DEVICE)
    return dit, tensors["poses.landmarks"], meta, backbone, prototypes, fr


# The real people, as the recogniser sees them: embeddings of images (M, D), their rows of W (M,), the centre
# of each row's images (I, D), and for each test of evaluate.py the cosine that 99 % of strangers stay below.
Real = namedtuple("Real", "f labels centres lines")


def embed_real(backbone, prototypes, faces, rows, wanted):
    """The Real of `faces`, whose people have these rows of W (I,), for people of wanted (J,) pictures."""
    # Without thumbnails nobody looks for copies: pictures are drawn from noise.
    real = embed_faces(backbone, prototypes, faces)
    real = real._replace(labels=rows.to(DEVICE)[real.labels], thumbs=None)
    strangers = strangers_to(real, wanted)
    lines = lines_of(strangers)
    people = len(strangers["person"][0])
    if people < ENOUGH:
        print(f"{people} strangers do not tell whose pictures together are too near: that is not tested")
        lines["person"] = 1.0
    return Real(real.f, real.labels, centres_of(real), lines)


def near_people(real, f, rows):
    """How near each unit embedding (B, D) comes to the centre of a real person who is not its row's (B,)."""
    people = torch.arange(len(real.centres), device=DEVICE)
    return nearest(f.to(real.f), real.centres, rows, people)[0]


def people_to_draw(args, names, n, rows):
    """{row of W: number of pictures to draw}, given the rows (M,) of the real images."""
    if args.real_to:
        images = torch.bincount(rows).tolist()
        wanted = {row: args.real_to - count for row, count in enumerate(images[:n]) if count}
        wanted = {row: count for row, count in wanted.items() if count > 0}
        if not wanted:
            fail(f"--real-to {args.real_to}: nobody whom {args.fr} knows has images, but fewer; name more")
        return wanted
    k = len(names) - n
    if args.virtual > k:
        fail(f"--virtual {args.virtual}: expected 1 to {k}, as {args.fr} has; train it with more")
    return {n + i: args.per_id for i in range(args.virtual)}


# ----------------------------------------------------------------------------------------- draw, judge, write

def make_job(seed, row, names, index, attempt, pose_count):
    """The Job of a picture. Its pose, one of pose_count, is chosen by chance, and all attempts have it."""
    # paper: does not say which poses; here any training face's, because poses even over yaw taught no more.
    return Job(row, names[row], index, attempt, seed_of(seed, names[row], index) % pose_count)


def draw(dit, W, poses, jobs, args):
    """Pictures uint8 (B, 3, S, S) of jobs, each from its own seed."""
    noise = []
    for job in jobs:
        generator = torch.Generator(DEVICE).manual_seed(seed_of(args.seed, job.name, job.index, job.attempt))
        noise.append(torch.randn(3, dit.size, dit.size, generator=generator, device=DEVICE))
    w = W[[job.row for job in jobs]]
    landmarks = poses[[job.pose for job in jobs]].to(DEVICE)
    with autocast():
        denoise = guided(dit, w, landmarks, args.guidance)
        return to_uint8(dpm_solver(denoise, torch.stack(noise), args.steps))


def judge(backbone, W, real, jobs, images):
    """A Verdict on the picture of each job: whether it is over a line, and so a leak; and embeddings (B, D).

    Pictures of a real person (--real-to) may resemble this person's own images.
    """
    f = embed(backbone, images)
    rows = torch.tensor([job.row for job in jobs], device=DEVICE)
    own, centre = (f * W[rows]).sum(1), near_people(real, f, rows)
    image, _ = nearest(f.to(real.f), real.f, rows, real.labels)
    leaks = (centre > real.lines["centre"]) | (image > real.lines["image"])

    cosines = torch.stack([own, centre, image], 1).tolist()
    return [Verdict(f"{job.name}/{job.index:04d}.jpg", job.name, job.index, job.attempt, job.pose,
                    "leak" if leak else "accepted", *map("{:.4f}".format, row))
            for job, leak, row in zip(jobs, leaks.tolist(), cosines)], f


def write_batch(out, jobs, images, verdicts, f):
    """Writes the accepted ones of uint8 images (B, 3, S, S), the sum of their embeddings f (B, D) for each
    person, and then the verdicts: the batch is done."""
    def write(verdict, image):
        if verdict.verdict == "accepted":
            with replacing(out / verdict.file) as path:
                to_pil_image(image).save(path, "JPEG", quality=95, subsampling=0)

    with ThreadPoolExecutor(16) as pool:                        # the disk's answers take longest
        list(pool.map(write, verdicts, images))

    accepted = [verdict.verdict == "accepted" for verdict in verdicts]
    rows, person = np.unique(np.array([job.row for job in jobs], np.int32)[accepted], return_inverse=True)
    sums = np.zeros((len(rows), f.shape[1]), np.int32)          # whole numbers: sums in any order are equal
    np.add.at(sums, person, (f[accepted].numpy() * 2 ** 20).round().astype(np.int32))
    first = jobs[0]
    path = out / ".verdicts" / f"{first.row}-{first.index}-{first.attempt}.csv"
    try:
        with replacing(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, np.column_stack([rows, sums]))
        write_csv(path, Verdict._fields, verdicts)
    except OSError:                                             # another process may have completed the set
        if not (out / "manifest.csv").is_file():
            raise


def attempts_after(verdict):
    """How many attempts a picture has had after this verdict; an accepted one counts as having had all."""
    return ATTEMPTS if verdict.verdict == "accepted" else int(verdict.attempt) + 1


def verdicts_of(out):
    """Yields the verdicts on all pictures that have been drawn for the set `out`, in no order."""
    with contextlib.suppress(FileNotFoundError):                # another rank has just completed the set
        for path in (out / ".verdicts").glob("*.csv"):
            yield from map(Verdict._make, read_csv(path)[1:])


def attempts_made(out, people):
    """How many attempts each picture of {name: number of pictures} has had: int8 (people, pictures).

    ATTEMPTS says that nothing is left to draw, also where a person gets fewer pictures than others.
    """
    made = np.full((len(people), max(people.values(), default=0)), ATTEMPTS, np.int8)
    line_of = dict(zip(people, made))
    for name, count in people.items():
        line_of[name][:count] = 0
    for verdict in verdicts_of(out):
        if verdict.identity in line_of:                         # other ranks draw the others
            line, index = line_of[verdict.identity], int(verdict.index)
            line[index] = max(line[index], attempts_after(verdict))
    return made


def rounds(made, batch):
    """Yields an attempt, and the places in `made` of a batch that needs it: first attempts, then second."""
    for attempt in range(ATTEMPTS):
        todo = np.flatnonzero(made == attempt)
        for first in range(0, len(todo), batch):
            yield attempt, todo[first:first + batch]


def too_near_together(out, real, names):
    """The names, of `names` of W's rows, of people whose accepted pictures together are too near somebody."""
    sums = np.zeros((len(names), real.f.shape[1]), np.int64)
    for path in (out / ".verdicts").glob("*.csv"):
        rows, part = np.split(np.load(path.with_suffix(".npy")), [1], 1)
        sums[rows[:, 0]] += part
    centres = F.normalize(torch.from_numpy(sums).double()).float().to(DEVICE)
    near = near_people(real, centres, torch.arange(len(names), device=DEVICE)) > real.lines["person"]
    return {names[row] for row in near.nonzero()[:, 0].tolist()}


def finish(out, total, poses, size, real, names):
    """If nothing is left to draw, writes landmarks.csv, grid.jpg and manifest.csv, and says how it went."""
    if (out / "manifest.csv").is_file():
        shutil.rmtree(out / ".verdicts", ignore_errors=True)
        return print(f"{out}: another process has completed it")
    # Texts, because millions of tuples would not fit in memory. No file's name holds a zero byte.
    drawn = sorted({"\0".join(verdict) for verdict in verdicts_of(out)})
    verdicts = lambda: (Verdict(*text.split("\0")) for text in drawn)
    if sum(attempts_after(verdict) == ATTEMPTS for verdict in verdicts()) < total:
        return print(f"{out}: this rank is done; the last one completes the set, or this command once more")

    near = too_near_together(out, real, names)
    for name in near:
        shutil.rmtree(out / name, ignore_errors=True)

    def final(verdict):
        together = verdict.verdict == "accepted" and verdict.identity in near
        return verdict._replace(verdict="person") if together else verdict

    accepted = lambda: (verdict for verdict in verdicts()
                        if verdict.verdict == "accepted" and verdict.identity not in near)
    cosines = np.array([float(verdict.cos_own) for verdict in accepted()])
    if not len(cosines):
        fail(f"{out}: every picture was too near a real person; train stage 2 longer")
    write_landmarks(out / "landmarks.csv",
                    ((verdict.file, size * poses[int(verdict.landmarks_from)]) for verdict in accepted()))
    draw_grid(out, accepted())
    write_csv(out / "manifest.csv", Verdict._fields, map(final, verdicts()))    # says that the set is complete
    shutil.rmtree(out / ".verdicts", ignore_errors=True)

    leaks = sum(verdict.verdict == "leak" for verdict in verdicts())
    loud = "WARNING: over half was rejected; " if len(drawn) > 2 * len(cosines) else ""
    print(f"{loud}{out}: {len(cosines)} images; {leaks} too near a real person, "
          f"{total - len(cosines)} left out, {len(near)} people among them; cosine to the own prototype "
          f"{cosines.mean():.3f}, by the recogniser that taught them")


def draw_grid(out, accepted, rows=8, columns=8):
    """Writes grid.jpg: a row for each of the first people, of pictures at even distances among theirs."""
    people = itertools.groupby(accepted, lambda verdict: verdict.identity)
    people = [[verdict.file for verdict in some] for _, some in itertools.islice(people, rows)]
    columns = min(columns, max(map(len, people)))
    files = [files[i * len(files) // columns] for files in people for i in range(columns)]
    grid = torch.stack([pil_to_tensor(open_image(out / file)) for file in files])
    with replacing(out / "grid.jpg") as path:
        save_image(grid / 255, path, "JPEG", nrow=columns)


def main():
    args = parser.parse_args()
    # paper: 4; here 1: half the cost, and pictures of one person stay varied.
    if args.guidance is None:
        args.guidance = 4.0 if args.paper else 1.0
    if args.steps < 3:
        fail(f"--steps {args.steps}: expected 3 or more; fewer end in a blur")
    out = Path(args.out or ("runs/real-aug" if args.real_to else "runs/virtual"))

    # Who can draw, whom, and who is real.
    dit, poses, meta, backbone, prototypes, fr = load(args)
    W, n = prototypes.to_draw(), len(prototypes.real)
    names = [*fr["names"], *(f"{fr['sha256'][:6]}-{i:06d}" for i in range(len(W) - n))]
    faces = Faces(args.real or fr["data"], dit.size, flag="--real")
    if not args.real and faces.digest() != meta.get("data"):
        fail(f"{args.dit}: trained on other faces than {args.fr}; name all that are real with --real")
    print(f"real: {len(faces)} images of {len(faces.people)} people in {', '.join(map(str, faces.roots))}")
    rows = rows_of(faces.people, names)                         # of W, for each label
    wanted = people_to_draw(args, names, n, rows[faces.labels])

    # A set may be moved, or continued with another --batch.
    claim(out, "set", args, faces, dit=digest(args.dit), fr=fr["sha256"], real=None, batch=None)
    if (out / "manifest.csv").is_file():
        return print(f"{out / 'manifest.csv'}: already complete")
    real = embed_real(backbone, prototypes, faces, rows, torch.tensor([*wanted.values()], device=DEVICE))

    # This rank's people, and how far each of their pictures is.
    mine = np.array([*wanted][RANK::int(os.environ.get("WORLD_SIZE") or 1)], np.int64)
    made = attempts_made(out, {names[row]: wanted[row] for row in mine})
    fast = compiled(dit, sum(wanted.values()) * args.steps)     # of the whole set: all ranks decide alike
    with tqdm(total=int((made < ATTEMPTS).sum()), desc=out.name) as progress, ThreadPoolExecutor(1) as writer:
        writing = writer.submit(bool)                           # an empty task for result() to wait for
        for _, (attempt, some) in until_stopped(rounds(made, args.batch), lambda _: writing.result()):
            lines, indices = np.unravel_index(some, made.shape)
            jobs = [make_job(args.seed, row, names, index, attempt, len(poses))
                    for row, index in zip(mine[lines].tolist(), indices.tolist())]
            # The last job fills up the batch: with one shape nothing is compiled again, or rounded differently.
            full = jobs + jobs[-1:] * (max(args.batch, 16) - len(jobs))
            images = draw(fast, W, poses, full, args)
            verdicts, f = judge(backbone, W, real, full, images)
            verdicts = verdicts[:len(jobs)]

            writing.result()                                    # of the batch before; raises what went wrong
            writing = writer.submit(write_batch, out, jobs, images.cpu(), verdicts, f[:len(jobs)].cpu())
            made.flat[some] = [attempts_after(verdict) for verdict in verdicts]
            progress.update(int((made.flat[some] == ATTEMPTS).sum()))
        writing.result()

    # Several ranks may write the same.
    finish(out, sum(wanted.values()), poses, dit.size, real, names)


if __name__ == "__main__":
    run(main, "a smaller --batch continues this set")
