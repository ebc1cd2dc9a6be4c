"""Samples a dataset of people who do not exist: virtual prototypes, drawn by the DiT in poses of real people.

    python sample.py                                        # a small set from runs/dit
    python sample.py --virtual 10000 --per-id 50            # the paper's VIGFace(S)
    python sample.py --real-to 50                           # more pictures of real people with fewer than 50
    torchrun --nproc-per-node 8 sample.py --virtual 120000 --per-id 50          # any number of GPUs share it

Every picture is judged by the recogniser and drawn again if it comes too near a real person, five times at
most. Writes OUT/v000123/0007.jpg (the eighth picture of virtual prototype 123) or, with --format rec,
InsightFace records; manifest.csv and landmarks.csv with a row for each, audit.json, grid.jpg to look at, and
README.md, the dataset's card. A picture follows from the seed, its identity, index and attempt alone; the
same command continues a run that was killed, and the set comes out the same.
"""
import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from data import contact_sheet, pack_record, read_image, write_csv, write_landmarks, yaw_of
from model import (DiT, DiTConfig, autocast, build, claim, compiled, dpm_solver, embed, fail, guided,
                   load_model, load_recogniser, part, reading, replace_file, run, same_settings, to_uint8)

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
flag("--interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("T0", "T1"),
     help="guide only at these times, 0 being the image and 1 noise (default: 0 1)")
flag("--max-real", type=float, help="highest cosine to a real person (default: that of 99 %% of strangers)")
flag("--min-own", type=float, help="lowest cosine to the own prototype (default: it must be the nearest, if "
                                   "it is for 80 %% of a first probe)")
flag("--no-audit", action="store_true", help="draw without judging (default: judge)")
flag("--format", choices=["jpg", "rec"], default="jpg", help="folders or records (default: %(default)s)")
flag("--quality", type=int, default=95, help="of the JPEG, 1 to 100 (default: %(default)s)")
flag("--batch", type=int, help="pictures drawn at once (default: 256 on a GPU, 64 on a CPU)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

ATTEMPTS, CHUNK = 5, 8                      # draws of a picture at most; batches whose rows are saved as one
VERDICTS = ("accepted", "leak", "identity")
COLUMNS = ["file", "identity", "index", "attempt", "seed", "landmarks_from", "cos_own", "cos_nearest_real",
           "quality"]                                                   # of manifest.csv


def seeded(*what):
    """A random generator that depends on `what` alone, such as (seed, identity, index)."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def choose_poses(by_yaw, people, count, generator):
    """Indices of `count` training faces, spread evenly over yaw, each of another person while there are any.

    by_yaw: faces (M,) sorted by yaw; people: whose face each is (M,). So no virtual identity inherits the
    poses of one real person. (paper: unstated how poses are chosen)
    """
    chosen, seen, M = [], set(), len(by_yaw)
    for u in (torch.arange(count) + torch.rand(count, generator=generator)) / count:
        near = (int(by_yaw[(int(u * M) + on) % M]) for on in range(M))   # on to a person not taken yet
        pose = next((pose for pose in near if int(people[pose]) not in seen), int(by_yaw[int(u * M)]))
        seen.add(int(people[pose]))
        chosen.append(pose)
    return chosen


def judged(f, W, n, rows, max_real):
    """Of unit embeddings f (B, D) drawn for prototypes W[rows]: own and real cosine, near real, astray (B,).

    Near real (the leak rule): the cosine to another person's real prototype is over max_real. Astray (the
    identity rule): another prototype of its kind, real or virtual, is nearer than its own.
    """
    cos = f @ W.T                                                               # (B, n + k)
    own = cos.gather(1, rows[:, None])[:, 0]
    cos.scatter_(1, rows[:, None], -2)
    real = cos[:, :n].amax(1)
    rival = torch.where(rows < n, real, cos[:, n:].amax(1) if len(W) > n else real)
    return own, real, real > max_real, own < rival


def stored(parts, verdicts=("accepted",)):
    """Rows of the parts with one of these verdicts, in order, as dicts."""
    for path in parts:
        with open(path, newline="") as file:
            yield from (row for row in csv.DictReader(file) if row["verdict"] in verdicts)


def write_records(out, rows, label_of, size):
    """Packs the pictures of `rows` as InsightFace's train.rec, train.idx, property; label_of(name) is an int.

    Record 0 says which keys at the end list the people, and those say from which key to which each one's are.
    """
    people, last = {}, 0                                        # identity: first key, key after its last
    with open(out / "train.rec.tmp", "wb") as rec, open(out / "train.idx.tmp", "w") as index:
        def put(key, labels, image=b""):
            index.write(f"{key}\t{rec.tell()}\n")
            rec.write(pack_record(key, labels, image))
        put(0, (0, 0))
        for last, row in enumerate(rows, 1):
            people.setdefault(row["identity"], [last, last])[1] = last + 1
            put(last, [label_of(row["identity"])], (out / row["file"]).read_bytes())
        for key, keys in enumerate(people.values(), last + 1):
            put(key, keys)
        rec.seek(0)
        rec.write(pack_record(0, (last + 1, last + 1 + len(people))))
    for name in ("train.rec", "train.idx"):
        os.replace(out / f"{name}.tmp", out / name)
    replace_file(out / "property", lambda path: path.write_text(f"{len(people)},{size},{size}\n"))


def write_audit(path, parts, rules):
    """Writes audit.json, each rejected picture as it comes by; returns the rest: rules, counts, means."""
    counts, means, comma = Counter(accepted=0, leak=0, identity=0, left_out=0), Counter(), ""
    with open(f"{path}.tmp", "w") as file:
        file.write('{"rejected_pictures": [')
        for row in stored(parts, VERDICTS):
            counts[row["verdict"]] += 1
            if row["verdict"] == "accepted":
                means.update({f"mean_{key}": float(row[key]) for key in ("cos_own", "cos_nearest_real")})
            else:
                counts["left_out"] += int(row["attempt"]) == ATTEMPTS - 1
                file.write(comma + json.dumps({key: row[key] for key in row if key != "file"}))
                comma = ",\n"
        summary = rules | counts | {key: total / counts["accepted"] for key, total in means.items()}
        summary["drawn"] = counts["accepted"] + counts["leak"] + counts["identity"]
        file.write("],\n" + json.dumps(summary, indent=1)[1:])
    os.replace(f"{path}.tmp", path)
    return summary


CARD = """# {accepted} pictures of {people} {kind} people

Drawn by VIGFace, {size} x {size} pixels: a Diffusion Transformer draws the person that a prototype of a face
recogniser stands for, in poses of its training set. Virtual prototypes stand for people who do not exist.

- Made by `{command}` from DiT `{dit}` (sha256 {dit_sha256})
  and recogniser `{fr}` (sha256 {fr_sha256}).
- Audit: {drawn} drawn, {accepted} accepted; {leak} rejected as nearer than cosine {max_real:.3f} to a real
  prototype, {identity} as somebody else (rule {identity_rule}); {left_out} left out.
- Intended use: training and testing face recognisers with fewer pictures of real people, or none.
- Limits: the audit asked the recogniser above about its own prototypes. That is evidence, no proof, that
  nobody real is recognisable. Before you publish the set let another recogniser compare it with the real
  images: `python evaluate.py --audit-fr OTHER --strict`. Virtual people have the biases of the training set.
- Files: `manifest.csv` (a row for each picture: seed, whose pose, cosine to its own prototype and to the
  nearest real one, quality), `landmarks.csv` (pixels), `audit.json` (every rejected picture), `run.json`.
"""


def main():
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # as torchrun sets
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(gpu if torch.cuda.is_available() else "cpu")
    tensors, meta = load_model(args.dit, "dit")
    args.fr = args.fr or meta["fr"]
    args.out = args.out or ("runs/real-aug" if args.real_to else "runs/virtual")
    batch = args.batch = args.batch or (256 if device.type == "cuda" else 64)
    dit = build(DiT, DiTConfig, meta, part(tensors, "dit"), args.dit).to(device).eval()
    backbone, prototypes, fr = load_recogniser(args.fr, device)
    n, k, W, S = len(prototypes.real), len(prototypes.virtual), prototypes.unit(), dit.cfg.size
    landmarks, owners = tensors["poses.landmarks"], tensors["poses.rows"]
    name_of = lambda row: fr["names"][row] if row < n else f"v{row - n:06d}"
    if (S, dit.cfg.dim) != (backbone.cfg.size, backbone.cfg.dim):
        fail(f"{args.dit} draws {S} px for {dit.cfg.dim}-d prototypes, {args.fr} has {backbone.cfg.size} px "
             f"and {backbone.cfg.dim}-d; name the recogniser this DiT was trained with")
    if not args.real_to and not 0 < args.virtual <= k:
        fail(f"--virtual {args.virtual}: expected 1 to {k}, the virtual prototypes that {args.fr} holds; "
             "train fr_train.py with a larger --virtual for more")
    if min(args.per_id, args.steps, batch, args.quality) < 1:
        fail("--per-id, --steps, --batch and --quality: expected 1 or more of each")
    if "strangers" not in fr:
        fail(f"{args.fr}: its training is not finished; run its fr_train.py command again")
    wanted = {n + i: args.per_id for i in range(args.virtual)}          # whom to draw how often, by row of W
    if args.real_to:
        have = torch.bincount(owners, minlength=n).tolist()
        wanted = {row: args.real_to - count for row, count in enumerate(have) if 0 < count < args.real_to}
        if not wanted:
            fail(f"--real-to {args.real_to}: everybody has as many images; give more")
        if args.format == "rec" and not all(name_of(row).isdigit() for row in wanted):
            fail("--format rec: records number people, and these have names; give --format jpg")

    # Chunks of whole people; a rank finishes one after another, and each is a part of the manifest.
    people = max(1, CHUNK * batch * len(wanted) // sum(wanted.values()))
    chunks = [list(wanted)[at:at + people] for at in range(0, len(wanted), people)]
    out = Path(args.out)
    parts = [out / "parts" / f"{number:06d}.csv" for number in range(len(chunks))]
    digest = lambda folder: hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
    settings = vars(args) | {"out": "", "dit_sha256": digest(args.dit), "fr_sha256": digest(args.fr)}
    if (out / "run.json").is_file():
        with reading(out / "run.json", "the settings of a set"):
            same_settings(out / "run.json", json.loads((out / "run.json").read_text()), settings)
    elif out.is_dir() and any(not entry.name.startswith(("run.json", "parts")) for entry in out.iterdir()):
        fail(f"--out {out}: a folder of something else; name one that is empty or not there yet")

    def tidy():
        """Removes what only the making needed; the pictures too, if they are in records now."""
        for name in ["parts", *(map(name_of, wanted) if args.format == "rec" else [])]:
            shutil.rmtree(out / name, ignore_errors=True)
        for stray in out.rglob("*.tmp"):                                # of a process that was killed
            stray.unlink()

    if (out / "manifest.csv").is_file():
        tidy()
        return print(f"{out / 'manifest.csv'}: already complete")
    replace_file(out / "run.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
    claim(out / "parts" / f"rank-{rank}")

    fast, by_yaw = compiled(dit, device, 2 * sum(wanted.values()) * args.steps), yaw_of(landmarks).argsort()
    poses_of = lambda row: choose_poses(by_yaw, owners, wanted[row], seeded(args.seed, name_of(row)))

    @torch.no_grad()
    def draw(jobs):
        """Pictures uint8 (B, 3, S, S), on the device, of jobs (row, index, attempt, pose)."""
        rows, _, _, poses = map(list, zip(*jobs))
        noise = torch.stack([torch.randn(3, S, S, generator=seeded(args.seed, name_of(row), index, attempt))
                             for row, index, attempt, _ in jobs])
        padding = [-1] * (batch - len(jobs)) if fast is not dit else []      # one shape, so one compilation
        w, pose, noise = (torch.cat([x, x[padding]]).to(device) for x in (W[rows], landmarks[poses], noise))
        with autocast(device):
            images = dpm_solver(guided(fast, w, pose, args.guidance, args.interval), noise, args.steps)
        return to_uint8(images[:len(jobs)])

    def audit(images, jobs):
        """Scores (B, 3): own cosine, nearest real one, quality; and (B,) each: near a real person, astray."""
        if args.no_audit:
            return [[math.nan] * 3] * len(jobs), [False] * len(jobs), [False] * len(jobs)
        f = embed(backbone, images, batch, unit=False) / 2
        rows = torch.tensor([row for row, *_ in jobs], device=device)
        own, real, near, astray = judged(F.normalize(f), W, n, rows, max_real)
        astray = astray if args.min_own is None else own < args.min_own
        scores = torch.stack([own, real, prototypes.quality(f)[:, 0]], 1)
        return scores.tolist(), near.tolist(), astray.tolist()

    def save(path, image):
        replace_file(path, lambda temporary: to_pil_image(image).save(
            temporary, "JPEG", quality=args.quality, subsampling=0))

    max_real = fr["strangers"] if args.max_real is None else args.max_real
    probe = [(row, 0, 0, poses_of(row)[0]) for row in list(wanted)[::-(-len(wanted) // 64)]]
    probes = [probe[at:at + batch] for at in range(0, len(probe), batch)]
    own_nearest = 1 - sum(sum(audit(draw(jobs), jobs)[2]) for jobs in probes) / len(probe)
    strict = args.min_own is not None or own_nearest >= 0.8             # the identity rule is enforced
    todo = [number for number in range(rank, len(chunks), world) if not parts[number].is_file()]
    total = sum(wanted[row] for number in todo for row in chunks[number])
    with ThreadPoolExecutor() as pool, tqdm(total=total, desc=out.name, unit="img", leave=False) as progress:
        for number in todo:
            queue = [(row, i, 0, pose) for row in chunks[number] for i, pose in enumerate(poses_of(row))]
            rows, writing = [], []
            while queue or writing:
                jobs, queue, drawn = queue[:batch], queue[batch:], []
                if jobs:
                    images = draw(jobs)
                    drawn = zip(jobs, images.cpu(), *audit(images, jobs))
                for written in writing:                         # encoding lags a batch behind, no more
                    written.result()
                writing = []
                for (row, i, attempt, pose), image, scores, near, astray in drawn:
                    verdict = "leak" if near else "identity" if astray and strict else "accepted"
                    file = f"{name_of(row)}/{i:04d}.jpg"
                    rows.append([file, name_of(row), i, attempt, args.seed, pose,
                                 *map("{:.4f}".format, scores), verdict])
                    if verdict == "accepted":
                        writing.append(pool.submit(save, out / file, image))
                        progress.update()
                    elif attempt + 1 < ATTEMPTS:
                        queue.append((row, i, attempt + 1, pose))
            write_csv(parts[number], [*COLUMNS, "verdict"], sorted(rows, key=lambda row: row[1:4]))

    # Whoever is last joins the parts, in order; the manifest comes last and says that the set is complete.
    if not all(path.is_file() for path in parts) or claim(out / "parts", wait=False) is None:
        return print(f"rank {rank} of {world} has drawn its share of {out}")
    rule = "off" if args.no_audit else "enforced" if strict else "reported"
    summary = write_audit(out / "audit.json", parts, {
        "max_real": max_real, "min_own": args.min_own, "identity_rule": rule,
        "own_nearest_in_probe": own_nearest})
    if not summary["accepted"]:
        fail(f"{out}: every picture was rejected, see audit.json; train longer, or set --max-real, --min-own")
    grid = []
    for _, line in itertools.islice(itertools.groupby(stored(parts), lambda row: row["identity"]), 8):
        line = list(line)
        grid.append([(read_image(out / row["file"])[0], f"{float(row['cos_own']):.2f}")
                     for row in line[::-(-len(line) // 8)]])            # eight poses, over all yaws
    contact_sheet(out / "grid.jpg", grid)
    if args.format == "rec":                # labels are rows of W: virtual people follow on the real ones
        write_records(out, stored(parts), lambda name: int(name) if args.real_to else n + int(name[1:]), S)
    files = lambda: ((key if args.format == "rec" else row["file"], row) for key, row in
                     enumerate(stored(parts), 1))
    write_landmarks(out / "landmarks.csv",
                    ((file, S * landmarks[int(row["landmarks_from"])]) for file, row in files()))
    replace_file(out / "README.md", lambda path: path.write_text(CARD.format(
        **settings | summary, people=len(wanted), size=S,
        kind="real" if args.real_to else "virtual", command=shlex.join(["python", *sys.argv]))))
    write_csv(out / "manifest.csv", COLUMNS, ([file, *(row[key] for key in COLUMNS[1:])]
                                              for file, row in files()))
    tidy()
    print(f"{summary['accepted']} images of {len(wanted)} people in {out}; mean cosine to the own prototype "
          f"{summary['mean_cos_own']:.3f}, to the nearest real one {summary['mean_cos_nearest_real']:.3f}; "
          f"rejected {summary['leak']} as too near a real person, {summary['identity']} as somebody else; "
          f"{summary['left_out']} left out")
    if summary["accepted"] < summary["drawn"] / 2:
        print(f"WARNING: over half of what was drawn was rejected; the DiT does not know these people, see "
              f"{out / 'audit.json'}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
