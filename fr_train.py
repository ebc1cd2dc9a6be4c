"""Stage 1: trains a face recogniser that keeps room for people who do not exist.

    python fr_train.py                                      # the demo: faces drawn by data.py
    python fr_train.py --data casia/                        # root/identity/image.jpg, 112 x 112, aligned
    python fr_train.py --data runs/virtual --virtual 0 --out runs/fr-virtual    # on virtual people alone

Writes OUT/model.safetensors (backbone, real and virtual prototypes, sigma) and OUT/state.pt, from which the same
command continues a run that was killed.
"""
import argparse
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import Faces, batches, benchmarks
from evaluate import nearest, verification
from model import (FR_ARCHS, FRConfig, Prototypes, Recogniser, autocast, compiled, fail, load_state, save_model,
                   save_state, to_float, vigface_loss, virtual_batch_size)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", nargs="+", default=["demo"], metavar="DIR",
                    help="image folders, united by identity name, or 'demo' (default: demo)")
parser.add_argument("--val", nargs="+", metavar="BIN", help="benchmarks (default: the *.bin beside the data)")
parser.add_argument("--out", default="runs/fr", metavar="DIR", help="run folder (default: runs/fr)")
parser.add_argument("--size", type=int, help="image side in pixels, a multiple of 16 (default: that of the data)")
parser.add_argument("--arch", choices=FR_ARCHS, help="(default: tiny up to 64 pixels, ir_se50 above)")
parser.add_argument("--virtual", type=int, metavar="K",
                    help="virtual prototypes to reserve (default: as many as there are real identities)")
parser.add_argument("--epochs", type=int, help="(default: 26 for ir_se50, 10 for tiny; more if that is under 1,250 steps)")
parser.add_argument("--batch", type=int, help="images per step (default: 512 for ir_se50, 128 for tiny)")
parser.add_argument("--lr", type=float, default=0.1, help="learning rate at batch 512; scales with it (default: 0.1)")
parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def learning_rate(step, steps, warmup, peak):
    """One warm-up epoch, then a tenth at 46, 77 and 92 % of the run: epochs 12, 20, 24 of 26."""
    return peak * min(1, (step + 1) / warmup) * 0.1 ** sum(step >= drop * steps for drop in (0.46, 0.77, 0.92))


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faces = Faces(args.data, args.size)
    n, out = len(faces.names), Path(args.out)
    if n < 2:
        fail(f"--data {' '.join(args.data)}: expected two identities or more, found {n}; nobody to tell apart")
    if faces.size % 16 or faces.size < 32:
        fail(f"--size {faces.size}: expected a multiple of 16 from 32 on; give --size 32, 48, ... or 112")
    arch = args.arch or ("tiny" if faces.size <= 64 else "ir_se50")
    k = n if args.virtual is None else args.virtual
    batch = min(args.batch or (128 if arch == "tiny" else 512), len(faces))
    per_epoch = len(faces) // batch
    epochs = args.epochs or max(26 if arch == "ir_se50" else 10, -(-1250 // per_epoch))
    steps, peak = epochs * per_epoch, args.lr * batch / 512
    tests = benchmarks(args.val, args.data, faces.size)

    torch.manual_seed(args.seed)
    cfg = FRConfig(size=faces.size, **FR_ARCHS[arch])
    backbone, prototypes = Recogniser(cfg), Prototypes(n, k, cfg.dim)
    layout = torch.channels_last
    backbone.to(device, memory_format=layout).train()
    prototypes.to(device)
    fast = compiled(backbone, device, steps * batch)
    trained = [*backbone.parameters(), *prototypes.parameters()]
    matrices = [p for p in trained if p.ndim > 1]                               # biases, norms, PReLU: no decay
    optimizer = torch.optim.SGD([{"params": matrices, "weight_decay": 5e-4},
                                 {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0}],
                                lr=peak, momentum=0.9, fused=True)

    config = {"data": args.data, "size": faces.size, "arch": arch, "virtual": k, "epochs": epochs, "batch": batch,
              "lr": args.lr, "seed": args.seed, "images": len(faces), "identities": n}
    out.mkdir(parents=True, exist_ok=True)
    first = 0
    if state := load_state(out / "state.pt", config):
        first = state["step"]
        for name, part in (("backbone", backbone), ("prototypes", prototypes), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        print(f"continuing {out} at step {first} of {steps}")
    print(f"{len(faces)} images of {n} people, {k} virtual; {arch} at {cfg.size} px, {epochs} epochs of {per_epoch} "
          f"steps, on {device}")

    def save(step):
        save_state(out / "state.pt", config, step=step, backbone=backbone.state_dict(),
                   prototypes=prototypes.state_dict(), optimizer=optimizer.state_dict())
        tensors = {f"backbone.{name}": t for name, t in backbone.state_dict().items()}
        tensors |= {f"prototypes.{name}": t for name, t in prototypes.state_dict().items()}
        save_model(out, "fr", cfg, tensors, data=args.data, val=[str(path) for path in tests], names=list(faces.names),
                   colour="RGB", step=step, steps=steps)

    every = per_epoch * -(-100 // per_epoch)                    # log and save at whole epochs, 100 steps apart or more
    losses, logged, since, checked = torch.zeros(2, device=device), first, time.time(), time.time()
    progress = tqdm(batches(faces, batch, args.seed, first, steps), initial=first, total=steps, mininterval=1,
                    desc=out.name, leave=False)
    for step, (images, labels, _) in enumerate(progress, first):
        torch.manual_seed(args.seed * 1_000_003 + step)         # every step's randomness follows from its number
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, per_epoch, peak)
        x = to_float(images.to(device, non_blocking=True))
        x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x, x.flip(3))
        with autocast(device):
            f = fast(x)
        real_loss, virtual_loss = vigface_loss(f, labels.to(device), prototypes,
                                               virtual_batch_size(step, k, batch, n))
        optimizer.zero_grad(set_to_none=True)
        (real_loss + virtual_loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 5)
        optimizer.step()
        losses += torch.stack([real_loss.detach(), virtual_loss.detach()])

        if (step + 1) % every == 0 or step + 1 == steps:
            count = step + 1 - logged
            real, virtual = (losses / count).tolist()
            if not real + virtual < float("inf"):
                fail(f"{out}: the loss is {real + virtual} at step {step + 1}; the checkpoint before it is kept. Lower --lr")
            line = f"epoch {(step + 1) // per_epoch:3d}/{epochs}  loss real {real:6.3f} virtual {virtual:6.3f}" \
                   f"  lr {optimizer.param_groups[0]['lr']:.4f}  {batch * count / (time.time() - since):6.0f} img/s"
            save(step + 1)
            if step + 1 == steps or time.time() - checked > 60:
                backbone.eval()
                line += "".join(f"  {path.stem} {verification(backbone, *test)['accuracy']:.2%}"
                                for path, test in tests.items())
                backbone.train()
                checked = time.time()
            tqdm.write(line)
            losses.zero_()
            logged, since = step + 1, time.time()

    with torch.no_grad():
        W, own = prototypes.unit(), torch.arange(n + k, device=device)
        rows = [("real-real", nearest(W[:n], W[:n], own[:n]))]
        if k:
            rows += [("virtual-real", nearest(W[n:], W[:n])), ("virtual-virtual", nearest(W[n:], W[n:], own[:k]))]
    for name, cosine in rows:
        print(f"nearest prototype, {name:16s}  mean cosine {cosine.mean():.3f}   max {cosine.max():.3f}")
    print(f"wrote {out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
