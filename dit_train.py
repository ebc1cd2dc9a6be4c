"""Stage 2: trains a Diffusion Transformer to draw the person a prototype stands for, in a given pose.

    python dit_train.py                                     # on the data and prototypes of runs/fr

Writes OUT/model.safetensors (the weight average, and the landmarks that sample.py takes poses from),
OUT/state.pt, from which the same command continues a run that was killed, and preview grids
OUT/preview-STEP.jpg: four real people and four virtual ones, a row each. Watch the two numbers logged with
them, the mean cosine of previews to their own prototype: real people show what the network knows by heart,
virtual ones whether it learned a space of people.
"""
import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, batches, complete_landmarks
from evaluate import embed_faces, nearest, quantile
from model import (DIT_SIZES, DiT, autocast, compiled, digest, dit_loss, dpm_solver, embed, fail, guided,
                   load_recogniser, replace_file, resume, run, save_model, save_state, stop_unless_finite,
                   to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", default="runs/fr", metavar="DIR", help="the recogniser's run folder (default: %(default)s)")
flag("--data", nargs="+", metavar="DIR", help="image folders (default: those of --fr)")
flag("--out", default="runs/dit", metavar="DIR", help="run folder (default: %(default)s)")
flag("--arch", choices=[f"{size}/{patch}" for size in DIT_SIZES for patch in (4, 8)], metavar="SIZE/PATCH",
     help=f"{', '.join(DIT_SIZES)} with patches of 4 or 8 pixels (default: Ti/4 up to 64 pixels, B/8 above)")
flag("--steps", type=int, help="training steps (default: 1,200 for Ti, 200,000 for others)")
flag("--batch", type=int, help="images per step (default: 64 for Ti, 256 for others)")
flag("--lr", type=float, help="peak learning rate (default: 1e-3 for Ti, 2e-4 for others)")
flag("--weights", metavar="PATH", help="RetinaFace's, where landmarks are missing (default: fetched)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

IDENTITY_WEIGHT = 0.05                                                  # paper: not given


def learning_rate(step, steps, peak):
    """Warm-up over the first 2 % of the run, then linearly to zero. (paper: no schedule given)"""
    return peak * min((step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))


def mirror(x, landmarks):
    """Images (B, 3, S, S) and landmarks (B, 5, 2), half of them, by chance, mirrored: twice the data."""
    flip = torch.rand(len(x), 1, 1, device=x.device) < 0.5
    mirrored = landmarks[:, [1, 0, 2, 4, 3]] * landmarks.new_tensor([-1, 1]) + landmarks.new_tensor([1, 0])
    return torch.where(flip[..., None], x.flip(3), x), torch.where(flip, mirrored, landmarks)


def leak_lines(backbone, prototypes, faces, rows, device, most=10_000):
    """How near sample.py may come to a real person, from `most` real images; rows (labels,) of prototypes.

    strangers: the cosine that 99 % of strangers do not reach; own: the median cosine to the own prototype.
    """
    some = torch.randperm(len(faces), generator=torch.Generator().manual_seed(0))[:most]
    seen = embed_faces(backbone, prototypes, faces, device, some)
    real, own = F.normalize(prototypes.real), rows[seen.labels]
    return {"strangers": quantile(nearest(seen.f, real, own)[0], 0.99),
            "own": quantile((seen.f * real[own]).sum(1), 0.5)}


@torch.no_grad()
def preview(path, dit, backbone, W, real, landmarks, seed, rows=4, columns=8):
    """Draws people (prototypes W, the first those of `real` names), a row each, with guidance 2.

    Returns the mean cosine to the own prototype of both kinds. Poses and noise depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    n, last = len(real), len(W) - 1
    people = torch.cat([torch.linspace(0, n - 1, rows), torch.linspace(min(n, last), last, rows)]).long()
    w = W[people].repeat_interleave(columns, 0)
    pose = landmarks[torch.randint(len(landmarks), (columns,), generator=generator)].repeat(2 * rows, 1, 1)
    noise = torch.randn(len(w), 3, dit.size, dit.size, generator=generator).to(W.device)
    with autocast(W.device):
        images = to_uint8(dpm_solver(guided(dit, w, pose.to(W.device), guidance=2.0), noise, steps=10))
    replace_file(path, lambda path: save_image(images.cpu() / 255, path, "JPEG", nrow=columns, padding=1))
    return (embed(backbone, images) * w).sum(1).view(2, -1).mean(1).tolist()


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, prototypes, fr = load_recogniser(args.fr, device)
    data, out, W = args.data or fr["data"], Path(args.out), prototypes.unit()
    faces = Faces(data, fr["config"]["size"])
    if unknown := sorted(faces.people.keys() - fr["names"]):
        fail(f"{args.fr}: {len(unknown)} people have no prototype, such as {unknown[0]}; train it on --data")
    row_of = {name: row for row, name in enumerate(fr["names"])}
    rows = torch.tensor([row_of[name] for name in faces.people], device=device)     # of W, for each label
    args.arch = args.arch or ("Ti/4" if faces.size <= 64 else "B/8")
    size, patch = args.arch.split("/")
    if faces.size % int(patch):
        fail(f"--arch {args.arch}: {faces.size} pixels are not whole patches of {patch}; give {size}/4")
    default_steps, default_batch, default_lr = (1200, 64, 1e-3) if size == "Ti" else (200_000, 256, 2e-4)
    steps, lr = args.steps or default_steps, args.lr or default_lr
    batch, every = min(args.batch or default_batch, len(faces)), max(1, min(5000, steps // 8))

    torch.manual_seed(args.seed)
    dit = DiT(faces.size, fr["config"]["dim"], int(patch), **DIT_SIZES[size]).to(device)
    average = copy.deepcopy(dit).requires_grad_(False)
    decay = min(0.9999, steps / (steps + 20))                   # the average spans a twentieth of short runs
    fast, fast_backbone = (compiled(module, device, steps * batch) for module in (dit, backbone))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    settings = vars(args) | {"data": data, "steps": steps, "batch": batch, "lr": lr, "images": len(faces),
                             "fr": digest(args.fr), "out": ""}
    modules = {"dit": dit, "average": average, "optimizer": optimizer}
    first = resume(out / "state.pt", settings, modules)
    complete_landmarks(faces, out, args.weights, device)
    lines = leak_lines(backbone, prototypes, faces, rows, device)
    print(f"{len(faces)} images at {faces.size} px; DiT-{args.arch}, {steps} steps of {batch} on {device}")

    losses, last_step, last_time = torch.zeros(2, device=device), first, time.time()    # since the last line
    for step, x, labels, landmarks in batches(faces, batch, args.seed, first, steps, device, out.name):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        x, landmarks = mirror(x, landmarks)
        with autocast(device):
            w = W[rows[labels]]
            v_loss, identity_loss = dit_loss(fast, fast_backbone, x, w, landmarks, prototypes.sigma2)
        (v_loss + IDENTITY_WEIGHT * identity_loss).backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_([*average.parameters()], [*dit.parameters()], 1 - decay)
        losses += torch.stack([v_loss.detach(), identity_loss.detach()])

        if (step + 1) % every == 0 or step + 1 == steps:
            count = step + 1 - last_step
            v_mean, identity_mean = stop_unless_finite((losses / count).tolist(), step + 1, out)
            speed = batch * count / (time.time() - last_time)
            real, virtual = preview(out / f"preview-{step + 1:06d}.jpg", average, backbone, W, fr["names"],
                                    faces.landmarks, args.seed)
            poses = {"landmarks": faces.landmarks, "rows": rows.cpu()[faces.labels]}
            save_model(out, "dit", average.config, {"dit": average.state_dict(), "poses": poses}, fr=args.fr,
                       fr_sha256=settings["fr"], step=step + 1, steps=steps, **lines)
            save_state(out / "state.pt", settings, step + 1, modules)   # last: never newer than the model
            tqdm.write(f"step {step + 1:6d}/{steps}  loss v {v_mean:.4f} identity {identity_mean:.4f}  "
                       f"own cosine real {real:.3f} virtual {virtual:.3f}  {speed:5.0f} img/s")
            losses.zero_()
            last_step, last_time = step + 1, time.time()
    print(f"wrote {out / 'model.safetensors'}")


if __name__ == "__main__":
    run(main)
