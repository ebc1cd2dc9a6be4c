"""Samples a dataset of people who do not exist: virtual prototypes, drawn by the DiT in poses of the training set.

    python sample.py                                        # a small set from runs/dit
    python sample.py --virtual 10000 --per-id 50            # the paper's VIGFace(S)

Writes OUT/v000123/0007.jpg (the eighth picture of virtual prototype 123), OUT/manifest.csv (a row per picture: where
its pose came from, its cosine to its own prototype and to the nearest real one), OUT/grid.jpg to look at, and
OUT/run.json (settings). Each picture is a function of the seed, its identity and its index alone; the same command
continues a run that was killed.
"""
import argparse
import csv
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from model import (DiT, DiTConfig, autocast, compiled, dpm_solver, embed, fail, guided, load_model, load_recogniser,
                   part, replace_file, to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dit", default="runs/dit", metavar="DIR", help="the DiT's run folder (default: runs/dit)")
parser.add_argument("--fr", metavar="DIR", help="the recogniser's run folder (default: the one the DiT was trained with)")
parser.add_argument("--out", default="runs/virtual", metavar="DIR", help="the dataset's folder (default: runs/virtual)")
parser.add_argument("--virtual", type=int, default=300, metavar="K", help="identities, prototypes 0 ... K-1 (default: 300)")
parser.add_argument("--per-id", type=int, default=8, help="pictures of each (default: 8)")
parser.add_argument("--steps", type=int, default=20, help="solver steps (default: 20)")
parser.add_argument("--guidance", type=float, default=1.5, help="classifier-free guidance; 1 is none (default: 1.5)")
parser.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("T0", "T1"),
                    help="guide only at these times; 1 is noise, 0 the image (default: 0 1)")
parser.add_argument("--batch", type=int, default=256, help="pictures drawn at once; changes nothing else (default: 256)")
parser.add_argument("--seed", type=int, default=0, help="(default: 0)")

COLUMNS = ["file", "identity", "index", "seed", "landmarks_from", "cos_own", "cos_nearest_real"]


def seeded(*what):
    """A random generator that depends on `what` alone, such as (seed, identity, index)."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def yaw_of(landmarks):
    """How far each face (M, 5, 2) looks to a side: the nose's offset from between the eyes, in eye distances (M,)."""
    left, right, nose = landmarks[:, 0, 0], landmarks[:, 1, 0], landmarks[:, 2, 0]
    return (nose - (left + right) / 2) / (right - left).abs().clamp(min=1e-3)


def choose_poses(by_yaw, people, per_id, generator):
    """Indices of per_id training faces, spread evenly over yaw, each of another person while there are enough.

    by_yaw: indices of the bank (M,) sorted by yaw; people: the label of each face of the bank (M,).
    No virtual identity thus inherits the poses of one real person. (paper: unstated how poses are chosen)
    """
    chosen, seen = [], set()
    for index in range(per_id):
        for _ in range(32):
            rank = (index + torch.rand((), generator=generator).item()) / per_id * len(by_yaw)
            pose = int(by_yaw[int(rank)])
            if int(people[pose]) not in seen:
                break
        seen.add(int(people[pose]))
        chosen.append(pose)
    return chosen


def draw_grid(root, rows, path, side=96):
    """Writes a picture of manifest rows, an identity a line, each with its cosine to its own prototype (white) drawn on."""
    columns = max(int(row["index"]) for row in rows) + 1
    names = list(dict.fromkeys(row["identity"] for row in rows))
    grid = Image.new("RGB", (columns * side, len(names) * side))
    for row in rows:
        image = Image.open(root / row["file"]).resize((side, side), Image.Resampling.BICUBIC)
        ImageDraw.Draw(image).text((3, side - 13), row["cos_own"], "white", stroke_width=1, stroke_fill="black")
        grid.paste(image, (int(row["index"]) * side, names.index(row["identity"]) * side))
    replace_file(path, lambda temporary: grid.save(temporary, "JPEG", quality=92))


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors, meta = load_model(args.dit, "dit")
    args.fr = args.fr or meta["fr"]
    dit = DiT(DiTConfig(**meta["config"]))
    dit.load_state_dict(part(tensors, "dit"))
    dit.to(device).eval().requires_grad_(False)
    backbone, prototypes, fr = load_recogniser(args.fr, device)
    n, k, S = len(prototypes.real), len(prototypes.virtual), dit.cfg.size
    if (S, dit.cfg.dim) != (fr["config"]["size"], fr["config"]["dim"]):
        fail(f"{args.dit} draws {S} px for {dit.cfg.dim}-d prototypes, {args.fr} has {fr['config']['size']} px and "
             f"{fr['config']['dim']}-d; name the recogniser this DiT was trained with")
    if not 0 < args.virtual <= k:
        fail(f"--virtual {args.virtual}: expected 1 to {k}, the virtual prototypes {args.fr} holds; "
             "train fr_train.py with a larger --virtual for more people")

    out, total = Path(args.out), args.virtual * args.per_id
    settings = {**vars(args), "interval": list(args.interval), "dit_step": meta["step"], "fr_step": fr["step"]}
    del settings["batch"]
    run = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    if run.is_file():
        for key, value in json.loads(run.read_text()).items():
            if settings[key] != value:
                fail(f"{run}: this set was started with {key} = {value}, now {settings[key]}; give the same settings or "
                     "another --out")
    replace_file(run, lambda path: path.write_text(json.dumps(settings, indent=1)))

    # A finished batch leaves its rows in the partial manifest; a restart goes on after the last whole one.
    manifest, partial = out / "manifest.csv", out / "manifest.part.csv"
    if manifest.is_file():
        print(f"{manifest}: already complete, {total} images")
        return
    done = 0
    if partial.is_file():
        lines = partial.read_text().splitlines(keepends=True)
        done = (sum(line.endswith("\n") for line in lines) - 1) // args.batch * args.batch
        replace_file(partial, lambda path: path.write_text("".join(lines[:done + 1])))
        print(f"continuing {out} at image {done} of {total}")
    if not done:
        partial.write_text(",".join(COLUMNS) + "\n")

    bank, people = tensors["bank.landmarks"], tensors["bank.labels"]
    by_yaw, W, fast = yaw_of(bank).argsort(), prototypes.unit(), compiled(dit, device, 2 * total * args.steps)

    def plan(number):
        """Picture `number` of the set: (identity, index, landmark source)."""
        identity, index = divmod(number, args.per_id)
        if identity not in poses:
            poses.clear()
            poses[identity] = choose_poses(by_yaw, people, args.per_id, seeded(args.seed, identity, "poses"))
        return identity, index, poses[identity][index]

    poses = {}
    with ThreadPoolExecutor() as pool, open(partial, "a", newline="") as file, \
            tqdm(total=total, initial=done, desc=out.name, unit="img", mininterval=1, leave=False) as progress:
        writer = csv.writer(file, lineterminator="\n")
        for start in range(done, total, args.batch):
            jobs = [plan(number) for number in range(start, min(start + args.batch, total))]
            padded = jobs + jobs[-1:] * (args.batch - len(jobs))                # one shape, so one compilation
            noise = torch.stack([torch.randn(3, S, S, generator=seeded(args.seed, identity, index))
                                 for identity, index, _ in padded]).to(device)
            w = W[[n + identity for identity, _, _ in padded]]
            landmarks = bank[[source for _, _, source in padded]].to(device)
            with torch.no_grad(), autocast(device):
                denoise = guided(fast, w, landmarks, args.guidance, args.interval)
                images = to_uint8(dpm_solver(denoise, noise, args.steps))
            f = embed(backbone, images, args.batch)
            own, real = (f * w).sum(1).tolist(), (f @ W[:n].T).amax(1).tolist()

            names = [f"v{identity:06d}/{index:04d}.jpg" for identity, index, _ in jobs]
            for folder in {Path(name).parent for name in names}:
                (out / folder).mkdir(exist_ok=True)
            list(pool.map(lambda name, image: replace_file(out / name, lambda path: to_pil_image(image).save(
                path, "JPEG", quality=95, subsampling=0)), names, images.cpu()))
            writer.writerows([name, f"v{identity:06d}", index, args.seed, source, f"{o:.4f}", f"{r:.4f}"]
                             for name, (identity, index, source), o, r in zip(names, jobs, own, real))
            file.flush()
            progress.update(len(jobs))
    partial.rename(manifest)

    with open(manifest, newline="") as file:
        rows = csv.DictReader(file)
        draw_grid(out, [row for row in islice(rows, 8 * args.per_id) if int(row["index"]) < 10], out / "grid.jpg")
    with open(manifest, newline="") as file:
        cosines = torch.tensor([[float(row["cos_own"]), float(row["cos_nearest_real"])] for row in csv.DictReader(file)])
    print(f"{total} images of {args.virtual} people in {out}: cosine to the own prototype {cosines[:, 0].mean():.3f}, "
          f"to the nearest real one {cosines[:, 1].mean():.3f} (means)")


if __name__ == "__main__":
    main()
