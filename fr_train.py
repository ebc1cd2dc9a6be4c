"""Stage 1: trains a face recogniser that keeps room for people who do not exist.

    python fr_train.py                                      # the demo: toy faces, painted into runs/demo
    python fr_train.py --data casia/                        # identity/image.jpg or train.rec, aligned
    python fr_train.py --data runs/virtual --virtual 0 --out runs/fr-virtual        # virtual people alone

Writes OUT/model.safetensors, and OUT/state.pt, from which the same command continues a run that was killed.
OUT/log.txt keeps what is printed.
"""
import argparse
import math
import os
from pathlib import Path

import torch

from data import Faces, batches, find_benchmarks, read_benchmark
from evaluate import nearest, pair_distances, quantile, verification
from model import (DEVICE, MARGINS, RECOGNISERS, WORLD, Prototypes, Recogniser, autocast, claim,
                   compiled, fail, log, person_moment, positive, resume, run, save_model, save_state,
                   stop_unless_finite, until_stopped, vigface_loss, virtual_batch_size)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--data", nargs="+", metavar="DIR", help="folders, united by identity (default: toy faces, runs/demo)")
flag("--val", nargs="+", metavar="BIN", help="benchmarks (default: the *.bin beside the data)")
flag("--out", default="runs/fr", metavar="DIR", help="run folder (default: %(default)s)")
flag("--size", type=int, help="image side in pixels, a multiple of 16 (default: that of the data)")
flag("--arch", choices=RECOGNISERS, help="network (default: tiny up to 64 pixels, ir_se50 above)")
flag("--head", choices=MARGINS, default="arcface", help="margin (default: %(default)s)")
flag("--virtual", type=int, metavar="K", help="virtual prototypes (default: as many as real identities)")
flag("--paper", action="store_true", help="as published: see Prototypes and vigface_loss (default: off)")
flag("--epochs", type=positive, help="(default: by network, see RECOGNISERS, and at least 1,250 steps)")
flag("--batch", type=positive, help="images per step (default: by network, see RECOGNISERS)")
flag("--lr", type=float, default=0.1, help="learning rate per 512 images of a batch (default: %(default)s)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")


def learning_rate(step, steps, warmup, peak):
    """Rises for `warmup` steps, then falls to a tenth three times, at 46, 77 and 92 % of the run."""
    drops = sum(step >= share * steps for share in (0.46, 0.77, 0.92))
    return peak * min(1, (step + 1) / warmup) * 0.1 ** drops


def make_optimizer(parameters):
    """SGD with momentum; batch norms, biases and PReLU do not decay, prototypes do."""
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5e-4},
              {"params": [p for p in parameters if p.ndim < 2]}]
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


def augment(x, p=0.2):
    """Mirrors half of the images (B, 3, S, S); of a share p only a random box is left (AdaFace)."""
    B, _, S, _ = x.shape

    def uniform(low, high):
        return torch.empty(B, 1, 1, 1, device=x.device).uniform_(low, high)

    x = torch.where(uniform(0, 1) < 0.5, x, x.flip(3))

    # A box of a fifth of the image or more, its sides from 3 : 4 to 4 : 3, anywhere.
    area, ratio = uniform(0.2, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    sides = torch.stack([area / ratio, area * ratio]).sqrt().clamp(max=1)       # (2, B, 1, 1, 1): tall, wide
    start = torch.rand_like(sides) * (1 - sides)                                # top, left
    grid = (torch.arange(S, device=x.device) + 0.5) / S
    rows, columns = (grid > start) & (grid < start + sides)                     # (B, 1, 1, S) each
    cropped = torch.where(rows.mT & columns, x, -1.0)                           # -1 is black
    return torch.where(uniform(0, 1) < p, cropped, x)


@torch.no_grad()
def room(prototypes):
    """A line on how near prototypes are to the nearest real one, as cosines."""
    W, n = prototypes.to_draw(), len(prototypes.real)
    rows = torch.arange(len(W), device=DEVICE)
    line = "room: nearest real prototype, mean / 99 % / largest:"
    for title, w, own in (("real people", W[:n], rows[:n]),
                          ("virtual as trained", prototypes.unit()[n:], rows[n:]),
                          ("as drawn", W[n:], rows[n:])):
        cosine, _ = nearest(w, W[:n], own, rows[:n])
        line += f"  {title} {cosine.mean():.3f} / {quantile(cosine, 0.99):.3f} / {cosine.max():.3f}"
    return line


def fill_in(args, faces):
    """Sets the flags that were left out, by the faces; ends the program if the flags make no sense."""
    n, args.size = len(faces.people), faces.size
    args.virtual = n if args.virtual is None else args.virtual
    args.arch = args.arch or ("tiny" if args.size <= 64 else "ir_se50")
    recipe = RECOGNISERS[args.arch]
    args.batch = min(args.batch or recipe["batch"], len(faces))
    if args.size % 16 or args.size < 32:
        fail(f"--size {args.size}: expected a multiple of 16, 32 or more (tools/align.py crops photographs)")
    if n < 2 or args.batch < 2 or args.virtual < 0:
        fail("expected 2 or more people, --batch of 2 or more, --virtual of 0 or more; found "
             f"{n}, {args.batch}, {args.virtual}")
    args.epochs = args.epochs or max(recipe["epochs"], math.ceil(1250 / (len(faces) // args.batch)))
    args.seed %= 2 ** 40                                    # PyTorch's end at 2 ** 64


def main():
    args = parser.parse_args()
    if WORLD > 1:
        fail("fr_train.py uses one GPU: start it without torchrun")
    out = Path(args.out)

    faces = Faces(args.data or ["runs/demo"], args.size)
    fill_in(args, faces)
    n, k, batch, recipe = len(faces.people), args.virtual, args.batch, RECOGNISERS[args.arch]
    per_epoch = len(faces) // batch
    steps = args.epochs * per_epoch
    val = find_benchmarks(args.val, faces.roots)
    benchmarks = {name: read_benchmark(path, args.size) for name, path in val.items()}

    # The networks, and the state of a run that was killed.
    torch.manual_seed(args.seed)
    backbone = Recogniser(size=args.size, **recipe["net"]).to(DEVICE, memory_format=torch.channels_last)
    prototypes = Prototypes(n, k, backbone.config["dim"], args.paper).to(DEVICE)
    fast = compiled(backbone, steps * batch)
    optimizer = make_optimizer([*backbone.parameters(), *prototypes.parameters()])
    losses = torch.zeros(3, device=DEVICE)                  # the sum since the last line that was printed
    modules = {"backbone": backbone, "prototypes": prototypes, "optimizer": optimizer,
               "losses": torch.nn.ParameterList([losses])}
    save = lambda done: save_state(out, done, modules)
    # What must not change when a run continues; --out and --val may.
    claim(out, "fr", args, faces, val=None)
    first = resume(out, modules)
    print(f"{len(faces)} images of {n} people, {k} virtual; {args.arch}, {steps} steps of {batch}, {DEVICE}")

    # Whole epochs, at least a tenth of the run and 100 steps, between tests and saves.
    every = per_epoch * math.ceil(max(1000, steps) / (10 * per_epoch))
    order = batches(faces, batch, args.seed, first, steps, landmarks=False)
    for step, (x, labels) in until_stopped(order, save, out.name, first, steps):
        torch.manual_seed(args.seed * 1_000_003 + step)                 # a resumed run draws the same numbers
        lr = learning_rate(step, steps, per_epoch, args.lr * batch / 512)
        for group in optimizer.param_groups:
            group["lr"] = lr

        with autocast():
            f = fast(augment(x))
        # paper: unstated; here the margin grows over a tenth of the run, or prototypes would collapse.
        parts = vigface_loss(f, labels, prototypes, virtual_batch_size(step, k, batch, n), args.head,
                             ramp=min(1, 10 * step / steps), scale=recipe["scale"])
        sum(parts).backward()
        # The backbone alone, as InsightFace does: the prototypes' gradients would dominate the norm.
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        optimizer.step()
        optimizer.zero_grad()

        losses += torch.stack(parts).detach()                           # .item() would wait for the GPU
        if (step + 1) % every == 0 or step + 1 == steps:
            means = stop_unless_finite(losses / (step % every + 1), step + 1, out)
            losses.zero_()
            backbone.eval()
            line = f"epoch {(step + 1) // per_epoch}/{args.epochs}  lr {lr:.4f}  "
            line += "loss real {:.3f} virtual {:.3f} certainty {:.3f}".format(*means)
            for name, (images, same) in benchmarks.items():
                line += f"  {name} {verification(pair_distances(backbone, images), same)['accuracy']:.2%}"
            log(out, line)
            save(step + 1)                                  # last: never newer than the log
            backbone.train()

    backbone.eval()
    if k and not args.paper:
        prototypes.settle(person_moment(backbone, faces))               # takes a pass over the images
    if k:
        log(out, room(prototypes))
    weights = {"backbone": backbone.state_dict(), "prototypes": prototypes.state_dict()}
    save_model(out, "fr", backbone.config, weights, prototypes=prototypes.config, names=[*faces.people],
               data=[*map(os.path.abspath, faces.roots)], val=[*map(os.path.abspath, val.values())])


if __name__ == "__main__":
    run(main)
