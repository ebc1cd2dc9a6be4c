"""Stage 2: trains a Diffusion Transformer to draw the person a prototype stands for, in a given pose.

    python dit_train.py                                     # on the data and prototypes of runs/fr

Writes OUT/model.safetensors (averaged weights, and the poses of the training faces, but no embeddings or
names), OUT/state.pt, from which the same command continues a run that was killed, and OUT/preview-STEP.jpg:
four real and four virtual people, a row each, at guidance 2.
"""
import argparse
import copy
import math
from pathlib import Path

import torch
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, batches
from model import (DEVICE, DIT_SIZES, DiT, autocast, compiled, digest, dit_loss, dpm_solver, embed, fail,
                   guided, load_recogniser, positive, replacing, resume, run, save_model, save_state,
                   stop_unless_finite, to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", default="runs/fr", metavar="DIR", help="the recogniser's run folder (default: %(default)s)")
flag("--data", nargs="+", metavar="DIR", help="image folders (default: those of --fr)")
flag("--out", default="runs/dit", metavar="DIR", help="run folder (default: %(default)s)")
flag("--arch", choices=[f"{size}/{patch}" for size in DIT_SIZES for patch in (4, 8)], metavar="SIZE/PATCH",
     help=f"{', '.join(DIT_SIZES)} with patches of 4 or 8 pixels (default: Ti/8 up to 64 pixels, B/8 above)")
flag("--steps", type=positive, help="training steps (default: 1,100 for Ti, 200,000 for others)")
flag("--batch", type=positive, help="images per step (default: 32 for Ti, 256 for others)")
flag("--lr", type=float, help="learning rate (default: 2e-3 for Ti, 2e-4 for others)")
flag("--weights", metavar="PATH", help="RetinaFace's, where landmarks are missing (default: fetched)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

MIRRORED = torch.tensor([1, 0, 2, 4, 3], device=DEVICE)     # left and right change places


def mirror(x, landmarks):
    """Mirrors half of the images (B, 3, S, S) and of their landmarks (B, 5, 2), chosen by chance."""
    flip = torch.rand(len(x), 1, 1, device=x.device) < 0.5
    right, down = landmarks[:, MIRRORED].unbind(2)
    mirrored = torch.stack([1 - right, down], 2)
    return torch.where(flip[..., None], x.flip(3), x), torch.where(flip, mirrored, landmarks)


def preview(path, dit, backbone, W, n, landmarks, seed, rows=4, columns=8):
    """Draws four of the n real people of W, and four virtual ones if there are any.

    Returns the mean cosine of each four to their own prototypes.
    """
    kinds = [kind for kind in (W[:n], W[n:]) if len(kind)]
    chosen = [kind[torch.linspace(0, len(kind) - 1, rows).long()] for kind in kinds]
    w = torch.cat(chosen).repeat_interleave(columns, 0)

    generator = torch.Generator().manual_seed(seed)
    pose = landmarks[torch.randint(len(landmarks), (columns,), generator=generator)].repeat(len(kinds) * rows, 1, 1)
    noise = torch.randn(len(w), 3, dit.size, dit.size, generator=generator)
    with autocast():
        denoise = guided(dit, w, pose.to(DEVICE), guidance=2.0)         # shows identity sooner
        images = to_uint8(dpm_solver(denoise, noise.to(DEVICE), steps=10))
    with replacing(path) as temporary:
        save_image(images.cpu() / 255, temporary, "JPEG", nrow=columns, padding=1)
    return (embed(backbone, images) * w).sum(1).view(len(kinds), -1).mean(1).tolist()


def main():
    args = parser.parse_args()
    backbone, prototypes, fr = load_recogniser(args.fr)
    if not fr["names"]:
        fail(f"{args.fr}: expected a run of fr_train.py, with prototypes")
    data, out = args.data or fr["data"], Path(args.out)
    faces = Faces(data, fr["config"]["size"])
    if unknown := sorted(faces.people.keys() - fr["names"]):
        fail(f"{args.fr}: {len(unknown)} people have no prototype, such as {unknown[0]}; train it on this --data")
    row_of = {name: row for row, name in enumerate(fr["names"])}
    W, n = prototypes.to_draw(), len(row_of)
    own_w = W[[row_of[name] for name in faces.people]]                  # own_w[label]: that person's prototype

    args.arch = args.arch or ("Ti/8" if faces.size <= 64 else "B/8")
    name, patch = args.arch.split("/")
    steps, batch, lr = (1100, 32, 2e-3) if name == "Ti" else (200_000, 256, 2e-4)       # paper: not given
    steps, batch, lr = args.steps or steps, min(args.batch or batch, len(faces)), args.lr or lr

    if faces.landmarks.isnan().any():
        from tools.retinaface import complete_landmarks
        complete_landmarks(faces, out, args.weights)
    torch.manual_seed(args.seed)
    dit = DiT(faces.size, fr["config"]["dim"], int(patch), **DIT_SIZES[name]).to(DEVICE)
    average = copy.deepcopy(dit).requires_grad_(False)
    decay = min(0.9999, steps / (steps + 20))               # the average spans a twentieth of short runs
    fast, fast_backbone = compiled(dit, steps * batch), compiled(backbone, steps * batch)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    modules = {"dit": dit, "average": average, "optimizer": optimizer}
    settings = vars(args) | dict(fr=digest(args.fr), data=data, steps=steps, batch=batch, images=len(faces))
    settings |= dict(out=None, weights=None)                # these may change when a run continues
    first = resume(out / "state.pt", settings, modules)

    every = min(5000, math.ceil(steps / 6))
    losses = torch.zeros(2, device=DEVICE)
    progress = tqdm(batches(faces, batch, args.seed, first, steps), out.name, steps, leave=False, initial=first)
    for step, (x, labels, landmarks) in enumerate(progress, first):
        torch.manual_seed(args.seed * 1_000_003 + step)     # a resumed run repeats itself
        for group in optimizer.param_groups:                # warm-up, then linearly down
            group["lr"] = lr * min((step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))

        x, landmarks = mirror(x, landmarks)
        with autocast():
            mse, identity = dit_loss(fast, fast_backbone, x, own_w[labels], landmarks)
        (mse + 0.1 * identity).backward()                   # paper: no weight given
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, new in zip(average.parameters(), dit.parameters()):
                slow.lerp_(new, 1 - decay)

        losses += torch.stack([mse, identity]).detach()     # .item() would wait for the GPU
        if step % 50 == 0:
            progress.set_postfix(loss=f"{mse.item():.4f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            means = stop_unless_finite(losses / (step % every + 1), step + 1, out)
            losses.zero_()
            path = out / f"preview-{step + 1:06d}.jpg"
            cosines = preview(path, average, backbone, W, n, faces.landmarks, args.seed)
            parts = {"dit": average.state_dict(), "poses": {"landmarks": faces.landmarks}}
            save_model(out, "dit", average.config, parts, fr=args.fr, fr_sha256=settings["fr"], step=step + 1,
                       steps=steps)
            save_state(out / "state.pt", settings, step + 1, modules)   # last: never newer than the model
            own = " ".join(map("{} {:.3f}".format, ("real", "virtual"), cosines))
            tqdm.write(f"step {step + 1:6d}/{steps}  loss v {means[0]:.4f} identity {means[1]:.4f}  "
                       f"own cosine {own}")


if __name__ == "__main__":
    run(main)
