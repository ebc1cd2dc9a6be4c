"""Samples a dataset of people who do not exist: virtual prototypes, drawn by the DiT in poses of real people.

    python sample.py                                        # a small set from runs/dit
    python sample.py --virtual 10000 --per-id 50            # the paper's VIGFace(S)
    python sample.py --real-to 50                           # more pictures of real people with fewer than 50
    torchrun --nproc-per-node 8 sample.py --virtual 120000 --per-id 50          # any number of GPUs share it;
                                                            # after fr_train.py --virtual 120000 and its DiT

Every picture is judged by the recogniser and drawn again if it comes too near a real person, five times at
most. Writes OUT/v000123/0007.jpg (the eighth picture of virtual prototype 123); manifest.csv with a row for
each picture drawn, rejected ones too; landmarks.csv; grid.jpg to look at. A picture follows from the seed,
its identity, index and attempt alone; the same command continues a run that was killed, and the set comes out
the same.
"""
import argparse
import collections
import csv
import hashlib
import itertools
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image
from tqdm import tqdm

from data import read_image, write_csv, write_landmarks, yaw_of
from model import (DiT, autocast, build, compiled, digest, dpm_solver, embed, fail, guided, load_model,
                   load_recogniser, reading, replace_file, run, same_settings, to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--dit", default="runs/dit", metavar="DIR", help="the DiT's run folder (default: %(default)s)")
flag("--fr", metavar="DIR", help="the recogniser's run folder (default: the one the DiT was trained with)")
flag("--out", metavar="DIR", help="the set's folder (default: runs/virtual; runs/real-aug with --real-to)")
flag("--virtual", type=int, default=300, metavar="K", help="identities, 0 to K-1 (default: %(default)s)")
flag("--per-id", type=int, default=8, help="pictures of each (default: %(default)s)")
flag("--real-to", type=int, metavar="N", help="instead, fill every real person up to N images (default: off)")
flag("--steps", type=int, default=10, help="solver steps (default: %(default)s)")
flag("--guidance", type=float, default=1.0, help="classifier-free, 1 for none (default: %(default)s)")
flag("--max-real", type=float, help="highest cosine to a real person (default: that of 99 %% of strangers)")
flag("--batch", type=int, help="pictures drawn at once (default: 256 on a GPU, 64 on a CPU)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

ATTEMPTS = 5                                                            # draws of a picture at most
SCORES = ["cos_own", "cos_nearest_real", "own_is_nearest", "quality"]
COLUMNS = ["file", "identity", "index", "attempt", "landmarks_from", "verdict", *SCORES]        # of manifest.csv


def seeded(*what):
    """A random generator that depends on `what` alone, such as (seed, identity, index)."""
    key = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big"))


def choose_poses(yaw, by_yaw, count, generator):
    """Indices of `count` training faces, even over yaw; faces by_yaw (M,) have these yaws (M,), rising.

    The hundredth that looks aside most is left out. (paper: unstated how poses are chosen)
    """
    low, high = yaw[int(0.005 * len(yaw))], yaw[int(0.995 * len(yaw))]
    wanted = low + (high - low) * (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return by_yaw[torch.searchsorted(yaw, wanted).clamp(max=len(yaw) - 1)].tolist()


class Artist:
    """What turns jobs (row of the prototypes, index, attempt, pose) into judged pictures."""

    def __init__(self, args, device):
        tensors, meta = load_model(args.dit, "dit")
        args.fr = args.fr or meta["fr"]
        self.args, self.device = args, device
        self.dit = build(DiT, tensors, "dit", meta["config"], args.dit).to(device).eval()
        self.backbone, self.prototypes, fr = load_recogniser(args.fr, device)
        if digest(args.fr) != meta["fr_sha256"]:
            fail(f"{args.fr}: {args.dit} was trained with another recogniser; name it with --fr, or train again")
        self.W, self.n = self.prototypes.unit(), len(self.prototypes.real)
        self.landmarks, self.owners = tensors["poses.landmarks"], tensors["poses.rows"]
        self.names = [*fr["names"], *(f"v{i:06d}" for i in range(len(self.W) - self.n))]
        strangers, own = meta["strangers"], meta["own"]
        self.max_real = min(strangers, own) if args.max_real is None else args.max_real
        if own < strangers:
            print(f"WARNING: strangers come closer to real people ({strangers:.3f}) than their own pictures do "
                  f"({own:.3f}); the recogniser is bad, or people are in the data twice", file=sys.stderr)

    def noise(self, jobs):
        """Standard normal (batch, 3, S, S), each job's from its own seed; zeros for what jobs are missing."""
        noise = torch.zeros(self.args.batch, 3, self.dit.size, self.dit.size)
        for picture, (row, index, attempt, _) in zip(noise, jobs):
            picture.normal_(generator=seeded(self.args.seed, self.names[row], index, attempt))
        return noise.pin_memory() if self.device.type == "cuda" else noise

    @torch.no_grad()
    def draw(self, dit, jobs, noise):
        """Pictures uint8 (batch, 3, S, S), on the device; the last job fills up, for one shape of batch."""
        rows, _, _, poses = map(list, zip(*jobs + jobs[-1:] * (len(noise) - len(jobs))))
        denoise = guided(dit, self.W[rows], self.landmarks[poses].to(self.device), self.args.guidance)
        with autocast(self.device):
            return to_uint8(dpm_solver(denoise, noise.to(self.device, non_blocking=True), self.args.steps))

    def judge(self, jobs, images):
        """SCORES (B, 4) of pictures: own cosine, to the nearest other real person, is own nearest, quality."""
        f = embed(self.backbone, images, len(images), unit=False)[:len(jobs)] / 2
        rows = torch.tensor([row for row, *_ in jobs], device=self.device)[:, None]
        cos = F.normalize(f) @ self.W.T                                         # (B, n + k)
        own = cos.gather(1, rows)[:, 0]
        cos.scatter_(1, rows, -2)
        real, others, quality = cos[:, :self.n].amax(1), cos.amax(1), self.prototypes.quality(f)[:, 0]
        return torch.stack([own, real, own > others, quality], 1).tolist()

    def people(self):
        """{row of the prototypes: number of pictures to draw}; ends the program if there is nobody."""
        args, k = self.args, len(self.W) - self.n
        if args.real_to:
            have = torch.bincount(self.owners, minlength=self.n).tolist()
            wanted = {row: args.real_to - count for row, count in enumerate(have) if 0 < count < args.real_to}
            return wanted or fail(f"--real-to {args.real_to}: everybody has as many images; give more")
        if not 0 < args.virtual <= k:
            fail(f"--virtual {args.virtual}: expected 1 to {k}, as {args.fr} has; train it with a larger --virtual")
        return {self.n + i: args.per_id for i in range(args.virtual)}


def draw_people(artist, wanted, out):
    """Draws and judges pictures of {row: count} people, rejected ones again, and writes them to `out`.

    One queue runs over everybody, so that batches are full; the next one's noise is made meanwhile. A person
    is complete when person.csv, with a row for each picture drawn, is in their folder.
    """
    args, names = artist.args, artist.names
    dit = compiled(artist.dit, artist.device, 2 * sum(wanted.values()) * args.steps)
    yaw, by_yaw = yaw_of(artist.landmarks).sort()

    def first_attempts():
        for row, count in wanted.items():
            shutil.rmtree(out / names[row], ignore_errors=True)                 # of a run that was killed
            poses = choose_poses(yaw, by_yaw, count, seeded(args.seed, names[row]))
            yield from ((row, index, 0, pose) for index, pose in enumerate(poses))
    queue = collections.deque()                                                 # jobs to be drawn again
    jobs_left = first_attempts()

    def next_batch():
        jobs = [queue.popleft() for _ in range(min(len(queue), args.batch))]
        jobs += itertools.islice(jobs_left, args.batch - len(jobs))
        return jobs, pool.submit(artist.noise, jobs)

    def save(path, image):
        replace_file(path, lambda temporary: image.save(temporary, "JPEG", quality=95, subsampling=0))

    def settle():
        for picture in writing:
            picture.result()
        for row in complete:
            write_csv(out / names[row] / "person.csv", COLUMNS, sorted(rows.pop(row), key=lambda line: line[2:4]))
        writing.clear()
        complete.clear()
    missing, rows = dict(wanted), collections.defaultdict(list)         # pictures to come, rows of person.csv
    writing, complete = [], []                                          # of the last batch: pictures, people
    with ThreadPoolExecutor() as pool, tqdm(total=sum(wanted.values()), desc=out.name, unit="img") as progress:
        jobs, noise = next_batch()
        while jobs:
            images = artist.draw(dit, jobs, noise.result())
            upcoming = next_batch()
            scores = artist.judge(jobs, images)
            settle()                                                    # encoding lags a batch behind
            for (row, index, attempt, pose), image, score in zip(jobs, images.cpu(), scores):
                file, leak = f"{names[row]}/{index:04d}.jpg", score[1] > artist.max_real
                rows[row].append([file, names[row], index, attempt, pose, "leak" if leak else "accepted",
                                  *map("{:.4f}".format, score)])
                if not leak:
                    writing.append(pool.submit(save, out / file, to_pil_image(image)))
                if leak and attempt + 1 < ATTEMPTS:
                    queue.append((row, index, attempt + 1, pose))
                else:
                    progress.update()
                    missing[row] -= 1
                    complete += [row] if not missing[row] else []
            jobs, noise = upcoming if upcoming[0] else next_batch()     # the last ones that were rejected
        settle()


def finish(artist, wanted, out):
    """Joins the rows of all people into manifest.csv, which says that the set is complete; says how it went."""
    folders = [out / artist.names[row] for row in wanted]
    total = collections.Counter()

    def rows():
        for folder in folders:
            with open(folder / "person.csv", newline="") as file:
                yield from csv.DictReader(file)

    def accepted_landmarks():
        for row in rows():
            total["drawn"] += 1
            if row["verdict"] == "accepted":
                total.update(accepted=1, **{key: float(row[key]) for key in SCORES[:3]})
                yield row["file"], artist.dit.size * artist.landmarks[int(row["landmarks_from"])]
    write_landmarks(out / "landmarks.csv", accepted_landmarks())
    accepted, drawn = total["accepted"], total["drawn"]
    if not accepted:
        fail(f"{out}: every picture was rejected; train stage 2 longer, or set --max-real")
    pictures = [sorted(folder.glob("*.jpg")) for folder in folders[:8]]
    grid = [read_image(line[i * len(line) // 8]) for line in pictures if line for i in range(8)]
    replace_file(out / "grid.jpg", lambda path: save_image(torch.stack(grid) / 255, path, "JPEG", nrow=8))
    write_csv(out / "manifest.csv", COLUMNS, (row.values() for row in rows()))
    own, real, nearest = (total[key] / accepted for key in SCORES[:3])
    print(f"{accepted} images of {len(wanted)} people in {out}; {drawn - accepted} rejected as closer than "
          f"{artist.max_real:.3f} to a real person, {sum(wanted.values()) - accepted} left out; cosine to the own "
          f"prototype {own:.3f}, which is the nearest of all for {nearest:.1%}, to the nearest real one {real:.3f}")
    if drawn > 2 * accepted:
        print("WARNING: over half of what was drawn was rejected; does the DiT know these people?", file=sys.stderr)


def main():
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # as torchrun sets
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(gpu if torch.cuda.is_available() else "cpu")
    args.batch = args.batch or (256 if device.type == "cuda" else 64)
    if min(args.per_id, args.steps, args.batch) < 1:
        fail("--per-id, --steps and --batch: expected 1 or more of each")
    artist = Artist(args, device)
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
    if not all(map(complete, wanted)):
        return print(f"rank {rank} of {world} has drawn its share of {out}")
    finish(artist, wanted, out)                                         # several ranks may come here: no harm


if __name__ == "__main__":
    run(main)
