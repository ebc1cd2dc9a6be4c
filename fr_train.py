"""Stage 1: trains a face recogniser that keeps room for people who do not exist.

    python fr_train.py                                      # the demo: faces drawn by data.py
    python fr_train.py --data casia/                    # identity/image.jpg, or train.rec; 112 x 112, aligned
    python fr_train.py --data runs/virtual --virtual 0 --out runs/fr-virtual    # virtual people alone

Writes OUT/model.safetensors, and OUT/state.pt, from which the same command continues a run that was killed.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Faces, batches, open_source, read_benchmark
from evaluate import nearest, pair_distances, quantile, verification
from model import (DEVICE, FR_ARCHS, MARGINS, Prototypes, Recogniser, autocast, compiled, fail, options,
                   resume, run, save_model, save_state, stop_unless_finite, vigface_loss, virtual_batch_size)

parser, flag = options(__doc__)
flag("--data", nargs="+", default=["demo"], metavar="DIR", help="folders, united by identity (default: demo)")
flag("--val", nargs="+", metavar="BIN", help="benchmarks (default: the *.bin beside the data)")
flag("--out", default="runs/fr", metavar="DIR", help="run folder (default: %(default)s)")
flag("--size", type=int, help="image side in pixels, a multiple of 16 (default: that of the data)")
flag("--arch", choices=FR_ARCHS, help="network (default: tiny up to 64 pixels, ir_se50 above)")
flag("--head", choices=MARGINS, default="arcface", help="margin (default: %(default)s)")
flag("--virtual", type=int, metavar="K", help="virtual prototypes (default: as many as real identities)")
flag("--free", action="store_true", help="virtual prototypes as in the paper, free vectors (default: off)")
flag("--epochs", type=int, help="(default: 26 for ir_se50, 6 for others; more if under 1,250 steps)")
flag("--batch", type=int, help="images per step (default: 512 for ir_se50, 128 for others)")
flag("--lr", type=float, default=0.1, help="learning rate per 512 images of a batch (default: %(default)s)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")

# Epochs, batch, scale of the margin loss: at 64, as published, the tiny network cannot keep the margin.
RECIPES = {"tiny": (6, 128, 32.0), "small": (6, 128, 32.0), "ir_se50": (26, 512, 64.0)}


def learning_rate(step, steps, warmup, peak):
    """One warm-up epoch, then a tenth at 46, 77 and 92 % of the run: epochs 12, 20, 24 of 26."""
    return peak * min(1, (step + 1) / warmup) * 0.1 ** sum(step >= x * steps for x in (0.46, 0.77, 0.92))


def make_optimizer(parameters):
    """SGD with momentum, in which norms, biases and PReLU do not decay."""
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5e-4},
              {"params": [p for p in parameters if p.ndim < 2]}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)


def augment(x, p=0.2):
    """Mirrors images (B, 3, S, S) in [-1, 1], and augments them as AdaFace does, each way of probability p: a
    box keeps its place in black; low resolution (AdaFace: a factor an image; here: a batch); light."""
    B, _, S, _ = x.shape
    uniform = lambda low, high: low + (high - low) * torch.rand(B, 1, 1, 1, device=x.device)
    chosen = lambda: uniform(0, 1) < p
    grid = (torch.arange(S, device=x.device) + 0.5) / S
    area, ratio = uniform(0.2, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    sides = torch.stack([area / ratio, area * ratio]).sqrt().clamp(max=1)       # (2, B, 1, 1): tall, wide
    start = torch.rand_like(sides) * (1 - sides)                                # top, left
    rows, columns = (grid > start) & (grid < start + sides)                     # (B, 1, 1, S) each
    x = torch.where(uniform(0, 1) < 0.5, x, x.flip(3))
    x = torch.where(chosen() & ~(rows.mT & columns), -1.0, x)
    small = F.interpolate(x, size=max(2, int(S * (0.2 + 0.8 * torch.rand(()).item()))), mode="area")
    x = torch.where(chosen(), F.interpolate(small, size=S, mode="bilinear"), x)
    light = (x + 1) * uniform(0.5, 1.5)
    light = light.mean((1, 2, 3), keepdim=True).lerp(light, uniform(0.5, 1.5))
    light = light.mean(1, keepdim=True).lerp(light, uniform(0.5, 1.5))
    return torch.where(chosen(), light.clamp(0, 2) - 1, x)


def describe_prototypes(W, n):
    """Says how near prototypes (n + k, D), n of them real, come to any other; loudly if some coincide."""
    cosine, _ = nearest(W, W, torch.arange(len(W), device=W.device))
    for kind, some in (("real", cosine[:n]), ("virtual", cosine[n:])):
        if len(some):
            over = (some > 0.9).float().mean().item()
            print(f"{kind} prototypes in training: cosine to the nearest {some.mean():.3f} in the mean, "
                  f"99 % below {quantile(some, 0.99):.3f}; {over:.1%} coincide (over 0.9)")
            if over > 0.01:
                print("WARNING: nobody can tell these people apart any more; lower --lr, or clean the data")


def main():
    args = parser.parse_args()
    faces, out = Faces(args.data, args.size), Path(args.out)
    n, size = len(faces.people), faces.size
    k = n if args.virtual is None else args.virtual
    args.arch = args.arch or ("tiny" if size <= 64 else "ir_se50")
    epochs, batch, scale = RECIPES[args.arch]
    batch = min(args.batch or batch, len(faces))
    if min(n, batch) < 2 or size % 16 or size < 32 or min(k, args.epochs or 0) < 0:
        fail(f"{n} people, --batch {batch}, --size {size}, --virtual {k}, --epochs {args.epochs}: "
             "expected 2 or more, 2 or more, a multiple of 16, 0 or more, 1 or more")
    per_epoch = len(faces) // batch
    epochs = args.epochs or max(epochs, -(-1250 // per_epoch))
    steps = epochs * per_epoch
    val = args.val or [path for source in args.data for path in sorted(open_source(source).glob("*.bin"))]
    benchmarks = {Path(path).stem: read_benchmark(path, size) for path in val}

    torch.manual_seed(args.seed)
    backbone = Recogniser(size=size, **FR_ARCHS[args.arch]).to(DEVICE, memory_format=torch.channels_last)
    prototypes = Prototypes(n, k, backbone.config["dim"], args.free).to(DEVICE)
    fast = compiled(backbone, DEVICE, steps * batch)
    optimizer = make_optimizer([*backbone.parameters(), *prototypes.parameters()])
    settings = vars(args) | {"size": size, "virtual": k, "batch": batch, "epochs": epochs, "out": "",
                             "val": "", "images": len(faces), "identities": n}
    modules = {"backbone": backbone, "prototypes": prototypes, "optimizer": optimizer}
    first = resume(out / "state.pt", settings, modules)
    print(f"{len(faces)} images of {n} people, {k} virtual; {args.arch}, {steps} steps of {batch}, {DEVICE}")

    # Tests, logs and saves at whole epochs, a tenth of the run or more apart, and 100 steps or more.
    every = per_epoch * -(-max(1000, steps) // (10 * per_epoch))
    losses = torch.zeros(3, device=DEVICE)
    for step, x, labels, _ in batches(faces, batch, args.seed, first, steps, DEVICE, out.name):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, per_epoch, args.lr * batch / 512)
        with autocast(DEVICE):
            f = fast(augment(x))
        # paper: unstated; here: the margin grows over a tenth of the run, else prototypes fell together.
        parts = vigface_loss(f, labels, prototypes, virtual_batch_size(step, k, batch, n), args.head,
                             ramp=min(1, 10 * step / steps), scale=scale)
        sum(parts).backward()
        # The backbone alone, as InsightFace does: prototypes' gradients would dominate the norm.
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += torch.stack(parts).detach()

        if (step + 1) % every == 0 or step + 1 == steps:
            # Means over the steps since the last line.
            real, virtual, quality = stop_unless_finite(losses / (step % every + 1), step + 1, out)
            line = (f"epoch {(step + 1) // per_epoch}/{epochs}  loss real {real:.3f} virtual {virtual:.3f} "
                    f"quality {quality:.3f}  lr {group['lr']:.4f}")
            weights = {"backbone": backbone.state_dict(), "prototypes": prototypes.state_dict()}
            save_model(out, "fr", backbone.config, weights, data=args.data, val=[str(path) for path in val],
                       free=args.free, names=list(faces.people), step=step + 1, steps=steps)
            save_state(out / "state.pt", settings, step + 1, modules)   # last: never newer than the model
            backbone.eval()
            for name, (images, same) in benchmarks.items():
                line += f"  {name} {verification(pair_distances(backbone, images), same)['accuracy']:.2%}"
            backbone.train()
            tqdm.write(line)
            losses.zero_()
    describe_prototypes(prototypes.unit().detach(), n)


if __name__ == "__main__":
    run(main)
