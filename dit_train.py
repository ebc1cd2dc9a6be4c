"""Stage 2: trains a Diffusion Transformer to draw the person a prototype stands for, in a given pose.

    python dit_train.py                                     # on the data and prototypes of runs/fr

Writes OUT/model.safetensors (averaged weights, and the poses of the training faces, but no embeddings or
names), OUT/state.pt, from which the same command continues a run that was killed, OUT/log.txt, which keeps
what is printed, and OUT/preview-STEP.jpg: up to four virtual people, a row each, at guidance 2.
"""
import argparse
import copy
import math
from pathlib import Path

import torch
from torch import nn
from torchvision.utils import save_image

from data import Faces, batches, rows_of
from model import (DEVICE, DIT_RECIPES, DIT_SIZES, RANK, WORLD, DiT, autocast, claim, compiled, dit_loss,
                   dpm_solver, embed, fail, guided, load_recogniser, log, over_ranks, positive, replacing,
                   resume, run, save_model, save_state, shared, stop_unless_finite, to_uint8, until_stopped)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", default="runs/fr", metavar="DIR", help="the recogniser's run folder (default: %(default)s)")
flag("--data", nargs="+", metavar="DIR", help="image folders (default: those of --fr)")
flag("--out", default="runs/dit", metavar="DIR", help="run folder (default: %(default)s)")
flag("--arch", choices=[f"{size}/{patch}" for size in DIT_SIZES for patch in (4, 8)], metavar="SIZE/PATCH",
     help=f"{', '.join(DIT_SIZES)} with patches of 4 or 8 pixels (default: Ti/8 up to 64 pixels, B/8 above)")
flag("--paper", action="store_true", help="the identity loss as published: see dit_loss (default: off)")
flag("--steps", type=positive, help="training steps (default: by network, see DIT_RECIPES)")
flag("--batch", type=positive, help="images per step (default: by network, see DIT_RECIPES)")
flag("--lr", type=float, help="learning rate (default: by network, see DIT_RECIPES)")
flag("--weights", metavar="PATH", help="RetinaFace's, where landmarks are missing (default: fetched)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")


def mirror(x, landmarks):
    """Mirrors half of the images (B, 3, S, S) and of their landmarks (B, 5, 2), chosen by chance."""
    flip = torch.rand(len(x), 1, 1, device=x.device) < 0.5
    horizontal, vertical = landmarks[:, [1, 0, 2, 4, 3]].unbind(2)  # left and right points change places
    mirrored = torch.stack([1 - horizontal, vertical], 2)
    return torch.where(flip[..., None], x.flip(3), x), torch.where(flip, mirrored, landmarks)


def preview(path, dit, backbone, w, landmarks, seed, real=0):
    """Draws the people w (R, D) in eight poses of landmarks (M, 5, 2), and writes a picture, a row each.

    Returns the cosine of each drawn face to its prototype, (R, 8). The first `real` people are not shown.
    """
    generator = torch.Generator().manual_seed(seed)                     # the same poses and noise every time
    poses = landmarks[torch.randint(len(landmarks), (8,), generator=generator)].to(DEVICE)
    noise = torch.randn(8 * len(w), 3, dit.size, dit.size, generator=generator).to(DEVICE)
    everybody = w.repeat_interleave(8, 0)
    with autocast():
        denoise = guided(dit, everybody, poses.repeat(len(w), 1, 1), guidance=2.0)      # clearer early on
        images = to_uint8(dpm_solver(denoise, noise, steps=10))
    if real < len(w):
        with replacing(path) as temporary:
            save_image(images[8 * real:].cpu() / 255, temporary, "JPEG", nrow=8, padding=1)
    return (embed(backbone, images) * everybody).sum(1).view(-1, 8)


def fill_in(args, faces):
    """Sets the flags that were left out, by the size of the images and of the network."""
    args.arch = args.arch or ("Ti/8" if faces.size <= 64 else "B/8")
    recipe = DIT_RECIPES[args.arch.split("/")[0]]
    args.steps = args.steps or recipe["steps"]
    args.lr = args.lr or recipe["lr"]
    args.batch = min(args.batch or recipe["batch"], len(faces))
    args.seed %= 2 ** 40                                    # PyTorch's end at 2 ** 64
    if args.batch % WORLD:
        fail(f"--batch {args.batch}: expected a multiple of {WORLD}, the number of ranks that share it")


def main():
    args = parser.parse_args()
    out = Path(args.out)

    # The recogniser, its prototypes, and the faces that it knows.
    backbone, prototypes, fr = load_recogniser(args.fr)
    faces = Faces(args.data or fr["data"], fr["config"]["size"])
    W, n = prototypes.to_draw(), len(prototypes.real)
    shown = torch.cat([W[:n][:4], W[n:][:4]])                           # in previews
    if unknown := sorted(faces.people.keys() - fr["names"]):
        fail(f"{args.fr}: {len(unknown)} people have no prototype, such as {unknown[0]}; train it on them")
    own_w = W[rows_of(faces.people, fr["names"])]                       # own_w[label]: the person's prototype

    fill_in(args, faces)
    # What must not change when a run continues; --out and --weights may.
    incomplete = faces.landmarks.isnan().any()
    claim(out, "dit", args, faces, fr=fr["sha256"], ranks=WORLD, weights=None)
    if incomplete:
        from tools.retinaface import complete_landmarks
        complete_landmarks(faces, out, args.weights)

    # The network, its average, and the state of a run that was killed.
    steps, seen = args.steps, args.steps * args.batch
    torch.manual_seed(args.seed)
    name, patch = args.arch.split("/")
    dit = DiT(faces.size, fr["config"]["dim"], int(patch), **DIT_SIZES[name]).to(DEVICE)
    average = copy.deepcopy(dit).requires_grad_(False)
    decay = min(0.9999, steps / (steps + 20))               # the average spans a twentieth of short runs
    fast, fast_backbone = shared(compiled(dit, seen)), compiled(backbone, seen)
    optimizer = torch.optim.AdamW(dit.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    losses = torch.zeros(2, device=DEVICE)                  # the sum since the last line that was printed
    modules = {"dit": dit, "average": average, "optimizer": optimizer, "losses": nn.ParameterList([losses])}
    save = lambda done: save_state(out, done, modules)
    first = resume(out, modules)

    every = min(5000, math.ceil(steps / 6))                 # steps between previews and saves
    order = batches(faces, args.batch, args.seed, first, steps)
    for step, (x, labels, landmarks) in until_stopped(order, save, out.name, first, steps):
        # A resumed run draws the same numbers, each rank others.
        torch.manual_seed(args.seed * 1_000_003 + step + RANK * 10 ** 9)
        # The learning rate rises for 2 % of the steps, then falls linearly.
        slope = min((step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))
        optimizer.param_groups[0]["lr"] = args.lr * slope

        x, landmarks = mirror(x, landmarks)
        with autocast():
            mse, identity = dit_loss(fast, fast_backbone, x, own_w[labels], landmarks, paper=args.paper)
        (mse + 0.1 * identity).backward()                   # paper: gives no weight; 0.1 is ours
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, new in zip(average.parameters(), dit.parameters()):
                slow.lerp_(new, 1 - decay)

        # Their mean over ranks; .item() would wait for the GPU.
        losses += over_ranks(torch.stack([mse, identity]).detach()) / WORLD
        if (step + 1) % every == 0 or step + 1 == steps:
            mse, identity = stop_unless_finite(losses / (step % every + 1), step + 1, out)
            losses.zero_()
            if RANK:
                continue                                    # rank 0 alone saves and prints
            path = out / f"preview-{step + 1:06d}.jpg"
            cosines = preview(path, average, backbone, shown, faces.landmarks, args.seed, min(4, n))
            line = f"step {step + 1:6d}/{steps}  loss v {mse:.4f} identity {identity:.4f}  own cosine"
            for kind, own in (("real", cosines[:min(4, n)]), ("virtual", cosines[min(4, n):])):
                line += f" {kind} {own.mean():.3f}" if len(own) else ""
            log(out, line)
            save(step + 1)                                  # last: never newer than the log

    if RANK == 0:
        parts = {"dit": average.state_dict(), "poses": {"landmarks": faces.landmarks}}
        save_model(out, "dit", average.config, parts, fr_sha256=fr["sha256"], data=faces.digest())


if __name__ == "__main__":
    run(main)
