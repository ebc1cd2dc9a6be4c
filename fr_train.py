"""Stage 1: trains a face recogniser that keeps room for people who do not exist.

    python fr_train.py                                      # the demo: faces drawn by data.py
    python fr_train.py --data casia/                    # identity/image.jpg, or train.rec; 112 x 112, aligned
    python fr_train.py --data runs/virtual --virtual 0 --out runs/fr-virtual    # virtual people alone

Writes OUT/model.safetensors (backbone, real and virtual prototypes, sigma) and OUT/state.pt, from which the
same command continues a run that was killed.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Faces, batches, benchmarks
from evaluate import embed_faces, nearest, pair_distances, verification
from model import (FR_ARCHS, FRConfig, Prototypes, Recogniser, autocast, claim, compiled, embed, fail,
                   forward_flops, load_recogniser, peak_flops, reading, resume, run, save_model, save_state,
                   stop_unless_finite, vigface_loss, virtual_batch_size)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--data", nargs="+", default=["demo"], metavar="DIR",
     help="image folders, united by identity name, or 'demo' (default: demo)")
flag("--val", nargs="+", metavar="BIN", help="benchmarks (default: the *.bin beside the data)")
flag("--out", default="runs/fr", metavar="DIR", help="run folder (default: %(default)s)")
flag("--size", type=int, help="image side in pixels, a multiple of 16 (default: that of the data)")
flag("--arch", choices=FR_ARCHS, help="network (default: tiny up to 64 pixels, ir_se50 above)")
flag("--head", choices=["arcface", "adaface"], default="arcface", help="margin (default: %(default)s)")
flag("--init", metavar="PATH", help="backbone to start from: run folder or published .pth (default: random)")
flag("--bgr", action="store_true", help="that published backbone reads BGR images (default: RGB)")
flag("--virtual", type=int, metavar="K", help="virtual prototypes (default: as many as real identities)")
flag("--epochs", type=int, help="(default: 26 for ir_se50, 10 for others; more if that is under 1,250 steps)")
flag("--batch", type=int, help="images per step (default: 512 for ir_se50, 128 for others)")
flag("--lr", type=float, default=0.1, help="learning rate per 512 images of a batch (default: %(default)s)")
flag("--augment", action=argparse.BooleanOptionalAction, default=True,
     help="AdaFace's augmentations besides mirroring (default: on)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")


def learning_rate(step, steps, warmup, peak):
    """One warm-up epoch, then a tenth at 46, 77 and 92 % of the run: epochs 12, 20, 24 of 26."""
    return peak * min(1, (step + 1) / warmup) * 0.1 ** sum(step >= x * steps for x in (0.46, 0.77, 0.92))


def augment(x, p=0.2):
    """AdaFace's augmentations of images (B, 3, S, S) in [-1, 1], each with probability p an image.

    Crop: a random box keeps its place, the rest turns black. Low resolution: down by one factor a batch and
    up again (AdaFace: a factor an image). Photometric: brightness, contrast and saturation by 0.5 to 1.5.
    """
    B, _, S, _ = x.shape
    uniform = lambda low, high: low + (high - low) * torch.rand(B, 1, 1, 1, device=x.device)
    chosen = lambda: uniform(0, 1) < p
    grid = (torch.arange(S, device=x.device) + 0.5) / S
    area, ratio = uniform(0.2, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    tall, wide = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    top, left = uniform(0, 1) * (1 - tall), uniform(0, 1) * (1 - wide)
    box = ((grid[:, None] > top) & (grid[:, None] < top + tall) & (grid > left) & (grid < left + wide))
    x = torch.where(chosen() & ~box, -1.0, x)
    small = F.interpolate(x, size=max(2, int(S * (0.2 + 0.8 * torch.rand(()).item()))), mode="area")
    x = torch.where(chosen(), F.interpolate(small, size=S, mode="bilinear"), x)
    light = (x + 1) * uniform(0.5, 1.5)
    light = light.mean((1, 2, 3), keepdim=True).lerp(light, uniform(0.5, 1.5))
    light = light.mean(1, keepdim=True).lerp(light, uniform(0.5, 1.5))
    return torch.where(chosen(), light.clamp(0, 2) - 1, x)


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faces, out = Faces(args.data, args.size), Path(args.out)
    n, size = len(faces.names), faces.size
    if n < 2:
        fail(f"--data {' '.join(args.data)}: expected two identities or more to tell apart, found {n}")
    if size % 16 or size < 32:
        fail(f"--size {size}: expected a multiple of 16 from 32 on; give --size 32, 48, ... or 112")
    args.size, args.arch = size, args.arch or ("tiny" if size <= 64 else "ir_se50")
    k = args.virtual = n if args.virtual is None else args.virtual
    full = args.arch == "ir_se50"
    batch = args.batch = min(args.batch or (512 if full else 128), len(faces))
    per_epoch = len(faces) // batch
    epochs = args.epochs = args.epochs or max(26 if full else 10, -(-1250 // per_epoch))
    steps, peak = epochs * per_epoch, args.lr * batch / 512
    if batch < 2:
        fail(f"--batch {batch}: expected 2 or more; one image has no spread to normalise by")
    tests, history = benchmarks(args.val, args.data, size), []

    torch.manual_seed(args.seed)
    cfg = FRConfig(size=size, bgr=args.bgr, **FR_ARCHS[args.arch])
    backbone = Recogniser(cfg)
    if args.init:
        with reading(args.init, f"a network like {args.arch} at {size} px"):
            backbone.load_state_dict(load_recogniser(args.init, device, args.bgr)[0].state_dict())
    backbone.to(device, memory_format=torch.channels_last).eval()
    share = 3 * forward_flops(backbone, torch.zeros(1, 3, size, size, device=device)) / peak_flops(device)
    backbone.train()
    prototypes = Prototypes(n, k, cfg.dim).to(device)
    fast = compiled(backbone, device, steps * batch)
    trained = [*backbone.parameters(), *prototypes.parameters()]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 5e-4},
              {"params": [p for p in trained if p.ndim < 2]}]           # norms, biases, PReLU: no decay
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, fused=True)

    settings = {**vars(args), "images": len(faces), "identities": n}
    del settings["out"], settings["val"]
    modules = {"backbone": backbone, "prototypes": prototypes, "optimizer": optimizer}
    claim(out)
    first = resume(out / "state.pt", settings, modules)
    print(f"{len(faces)} images of {n} people, {k} virtual; {args.arch} at {size} px, {epochs} epochs of "
          f"{per_epoch} steps of {batch}, on {device}")

    def save(step, **known):
        """Writes the model for later stages."""
        tensors = {f"{name}.{key}": t for name in ("backbone", "prototypes")
                   for key, t in modules[name].state_dict().items()}
        save_model(out, "fr", cfg, tensors, data=args.data, val=[str(path) for path in tests],
                   names=list(faces.names), colour="RGB", step=step, steps=steps, **known)

    every = per_epoch * -(-100 // per_epoch)           # log and save at whole epochs, 100 steps apart
    losses, logged, since, checked, before = torch.zeros(3, device=device), first, time.time(), time.time(), 0
    for step, x, labels, _, waited in batches(faces, batch, args.seed, first, steps, device, out.name):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, per_epoch, peak)
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x, x.flip(3))
        if args.augment:
            x = augment(x)
        with autocast(device):
            f = fast(x)
        b_virtual = virtual_batch_size(step, k, batch, n)
        # paper: full margin from the start; here: it grows over the first tenth of the run, because now and
        # then all prototypes fell together while it was too hard (85 % instead of 99; docs/measurements.md).
        ramp = min(1, 10 * step / steps)
        parts = vigface_loss(f, labels, prototypes, b_virtual, args.head, ramp)     # real, virtual, quality
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(trained, 5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += torch.stack(parts).detach()

        if (step + 1) % every == 0 or step + 1 == steps:
            count = step + 1 - logged
            real, virtual, quality = stop_unless_finite((losses / count).tolist(), step + 1, out)
            seconds, rate = time.time() - since, optimizer.param_groups[0]["lr"]
            speed, left = batch * count / seconds, (steps - step - 1) * seconds / count / 60
            line = (f"epoch {(step + 1) // per_epoch:3d}/{epochs}  loss real {real:6.3f} virtual "
                    f"{virtual:6.3f} quality {quality:.3f}  lr {rate:.4f}  {speed:5.0f} img/s  "
                    f"{speed * share:4.0%} of peak  data wait {(waited - before) / seconds:4.1%}  "
                    f"{left:5.1f} min left")
            save(step + 1)                              # first: never older than the state one continues from
            save_state(out / "state.pt", settings, step + 1, modules)
            if step + 1 == steps or time.time() - checked > 60:
                backbone.eval()
                scores = [verification(pair_distances(backbone, images), same)["accuracy"]
                          for images, same in tests.values()]
                line += "".join(f"  {path.stem} {accuracy:.2%}" for path, accuracy in zip(tests, scores))
                history.append((sum(scores) / max(1, len(scores)), (step + 1) // per_epoch))
                backbone.train()
                checked = time.time()
            tqdm.write(line)
            losses.zero_()
            logged, since, before = step + 1, time.time(), waited

    backbone.eval()
    for path, (pictures, _) in tests.items():
        q = prototypes.quality(embed(backbone, pictures, unit=False) / 2)     # the mean of both views' scores
        print(f"quality of {path.stem}: mean {q.mean():.3f}, standard deviation {q.std():.3f}")
    if tests and history:
        (last, _), (best, when) = history[-1], max(history)
        print(f"mean accuracy at the end {last:.2%}, best {best:.2%} after epoch {when}")
    W, own = prototypes.unit().detach(), torch.arange(n + k, device=device)
    data = embed_faces(backbone, prototypes, faces, device)
    strangers = nearest(data.f, W[:n], data.labels)[0].cpu().numpy()    # how near they come, for sample.py
    save(steps, strangers=float(np.quantile(strangers, 0.99)))
    for name, cosine in (("real to other real", nearest(W[:n], W[:n], own[:n])[0]),
                         ("virtual to any other", nearest(W[n:], W, own[n:])[0] if k else None)):
        if cosine is not None:
            print(f"nearest prototype, {name:20s}  mean cosine {cosine.mean():.3f}  max {cosine.max():.3f}")
    print(f"wrote {out / 'model.safetensors'}")


if __name__ == "__main__":
    run(main)
