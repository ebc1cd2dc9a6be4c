"""Samples a dataset of people who do not exist: virtual prototypes, drawn by the DiT in poses of real people.

    python sample.py                                        # a small set from runs/dit
    python sample.py --virtual 10000 --per-id 50            # the paper's VIGFace(S)

Writes OUT/v000123/0007.jpg (the eighth picture of virtual prototype 123), OUT/manifest.csv (a row per
picture: whose pose it has, its cosine to its own prototype and to the nearest real one), OUT/grid.jpg to look
at and OUT/run.json (settings). Each picture follows from the seed, its identity and its index alone; the same
command continues a run that was killed.
"""
import argparse
import csv
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from model import (DiT, DiTConfig, autocast, compiled, dpm_solver, embed, fail, guided, load_model,
                   load_recogniser, part, replace_file, to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--dit", default="runs/dit", metavar="DIR", help="the DiT's run folder (default: %(default)s)")
flag("--fr", metavar="DIR", help="the recogniser's run folder (default: the one the DiT was trained with)")
flag("--out", default="runs/virtual", metavar="DIR", help="the dataset's folder (default: %(default)s)")
flag("--virtual", type=int, default=300, metavar="K", help="identities, 0 to K-1 (default: %(default)s)")
flag("--per-id", type=int, default=8, help="pictures of each (default: %(default)s)")
flag("--steps", type=int, default=10, help="solver steps (default: %(default)s)")
flag("--guidance", type=float, default=2.0, help="classifier-free, 1 for none (default: %(default)s)")
flag("--interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("T0", "T1"),
     help="guide only at these times, 0 being the image and 1 noise (default: 0 1)")
flag("--batch", type=int, default=256, help="pictures drawn at once (default: %(default)s)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

COLUMNS = ["file", "identity", "index", "seed", "landmarks_from", "cos_own", "cos_nearest_real"]


def seeded(*what):
    """A random generator that depends on `what` alone, such as (seed, identity, index)."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def yaw_of(landmarks):
    """How far faces (M, 5, 2) look aside: the nose's offset from between the eyes, in eye distances (M,)."""
    left, right, nose = landmarks[:, :3, 0].unbind(1)
    return (nose - (left + right) / 2) / (right - left).abs().clamp(min=1e-3)


def choose_poses(by_yaw, people, per_id, generator):
    """Indices of per_id training faces, spread evenly over yaw, each of another person if there are enough.

    by_yaw: faces (M,) sorted by yaw; people: whose face each is (M,). So no virtual identity inherits the
    poses of one real person. (paper: unstated how poses are chosen)
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
    """Pictures of manifest rows, an identity a line, each with its cosine to its own prototype drawn on."""
    names = list(dict.fromkeys(row["identity"] for row in rows))
    grid = Image.new("RGB", (side * (1 + max(int(row["index"]) for row in rows)), side * len(names)))
    for row in rows:
        image = Image.open(root / row["file"]).resize((side, side), Image.Resampling.BICUBIC)
        label = {"text": row["cos_own"][:-2], "fill": "white", "stroke_width": 1, "stroke_fill": "black"}
        ImageDraw.Draw(image).text((3, side - 13), **label)
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
    n, k, W, S = len(prototypes.real), len(prototypes.virtual), prototypes.unit(), dit.cfg.size
    if (S, dit.cfg.dim) != (backbone.cfg.size, backbone.cfg.dim):
        fail(f"{args.dit} draws {S} px for {dit.cfg.dim}-d prototypes, {args.fr} has {backbone.cfg.size} px "
             f"and {backbone.cfg.dim}-d; name the recogniser this DiT was trained with")
    if not 0 < args.virtual <= k:
        fail(f"--virtual {args.virtual}: expected 1 to {k}, the virtual prototypes that {args.fr} holds; "
             "train fr_train.py with a larger --virtual for more")
    if min(args.per_id, args.steps, args.batch) < 1:
        fail("--per-id, --steps and --batch: expected 1 or more of each")

    out, total = Path(args.out), args.virtual * args.per_id
    settings = {**vars(args), "dit_step": meta["step"], "fr_step": fr["step"]}
    del settings["batch"]                                               # how fast, not what
    run, manifest, partial = (out / name for name in ("run.json", "manifest.csv", "manifest.part.csv"))
    if run.is_file():
        for key, value in json.loads(run.read_text()).items():
            if settings[key] != value:
                fail(f"{run}: this set was started with {key} = {value}, now {settings[key]}; give the same "
                     "settings or another --out")
    if manifest.is_file():
        print(f"{manifest}: already complete, {total} images")
        return
    replace_file(run, lambda path: path.write_text(json.dumps(settings, indent=1)))

    # A finished batch leaves its rows in the partial manifest; a restart goes on after the last whole batch.
    lines = partial.read_text().splitlines(keepends=True) if partial.is_file() else []
    done = max(0, sum(line.endswith("\n") for line in lines) - 1) // args.batch * args.batch
    text = "".join(lines[:done + 1]) if done else ",".join(COLUMNS) + "\n"
    replace_file(partial, lambda path: path.write_text(text))
    if done:
        print(f"continuing {out} at image {done} of {total}")

    landmarks, people = tensors["poses.landmarks"], tensors["poses.labels"]
    by_yaw, fast = yaw_of(landmarks).argsort(), compiled(dit, device, 2 * total * args.steps)
    with ThreadPoolExecutor() as pool, open(partial, "a", newline="") as file, \
            tqdm(total=total, initial=done, desc=out.name, unit="img", leave=False) as progress:
        writer = csv.writer(file, lineterminator="\n")
        for start in range(done, total, args.batch):
            numbers = [divmod(m, args.per_id) for m in range(start, min(start + args.batch, total))]
            poses = {who: choose_poses(by_yaw, people, args.per_id, seeded(args.seed, who))
                     for who in {who for who, _ in numbers}}
            jobs = [(who, i, poses[who][i]) for who, i in numbers]      # identity, index, whose pose
            padded = jobs + jobs[-1:] * (args.batch - len(jobs))        # one shape, so one compilation
            noise = [torch.randn(3, S, S, generator=seeded(args.seed, identity, i))
                     for identity, i, _ in padded]
            w = W[[n + identity for identity, _, _ in padded]]
            pose = landmarks[[source for _, _, source in padded]].to(device)
            with torch.no_grad(), autocast(device):
                denoise = guided(fast, w, pose, args.guidance, args.interval)
                images = to_uint8(dpm_solver(denoise, torch.stack(noise).to(device), args.steps))
            f = embed(backbone, images, args.batch)
            own, real = (f * w).sum(1).tolist(), (f @ W[:n].T).amax(1).tolist()

            rows = []
            for (identity, i, source), o, r in zip(jobs, own, real):
                name = f"v{identity:06d}"
                rows.append([f"{name}/{i:04d}.jpg", name, i, args.seed, source, f"{o:.4f}", f"{r:.4f}"])
            list(pool.map(lambda row, image: replace_file(out / row[0], lambda path: to_pil_image(image).save(
                path, "JPEG", quality=95, subsampling=0)), rows, images.cpu()))
            writer.writerows(rows)
            file.flush()
            progress.update(len(jobs))
    with open(partial, newline="") as file:
        rows = list(csv.DictReader(file))
    draw_grid(out, [row for row in rows[:8 * args.per_id] if int(row["index"]) < 10], out / "grid.jpg")
    partial.rename(manifest)                                            # last: it says the set is complete
    own, real = (sum(float(row[key]) for row in rows) / total for key in ("cos_own", "cos_nearest_real"))
    print(f"{total} images of {args.virtual} people in {out}; mean cosine to the own prototype {own:.3f}, "
          f"to the nearest real one {real:.3f}")


if __name__ == "__main__":
    main()
