"""Stage 2: trains a Diffusion Transformer to draw the person a prototype stands for, in the pose of five landmarks.

    python dit_train.py                                     # on the data and prototypes of runs/fr

Writes OUT/model.safetensors (the weight average, and the landmarks sample.py draws poses from), OUT/state.pt, from
which the same command continues a run that was killed, and preview grids OUT/preview-STEP.jpg: four real people and
four virtual ones, a row each. Watch the two numbers logged with them, the mean cosine of previews to their own
prototype: real people show what the network has learned by heart, virtual ones whether it learned a space of people.
"""
import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from data import Faces, batches
from model import (DIT_SIZES, DiT, DiTConfig, autocast, compiled, dit_loss, dpm_solver, embed, fail, guided,
                   load_recogniser, load_state, replace_file, save_model, save_state, to_float, to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--fr", default="runs/fr", metavar="DIR", help="the recogniser's run folder (default: runs/fr)")
parser.add_argument("--data", nargs="+", metavar="DIR", help="image folders with landmarks.csv (default: those of --fr)")
parser.add_argument("--out", default="runs/dit", metavar="DIR", help="run folder (default: runs/dit)")
parser.add_argument("--arch", metavar="SIZE/PATCH", help=f"{', '.join(DIT_SIZES)} and a patch of 4 or 8 pixels "
                    "(default: Ti/4 up to 64 pixels, B/8 above)")
parser.add_argument("--steps", type=int, help="training steps (default: 2,000 for Ti, 200,000 for others)")
parser.add_argument("--batch", type=int, help="images per step (default: 64 for Ti, 256 for others)")
parser.add_argument("--lr", type=float, help="peak learning rate (default: 1e-3 for Ti, 2e-4 for others)")
parser.add_argument("--identity-weight", type=float, default=0.05, help="weight of the identity loss (default: 0.05)")
parser.add_argument("--preview", type=int, help="steps between previews (default: an eighth of the run, 5,000 at most)")
parser.add_argument("--seed", type=int, default=0, help="(default: 0)")

PREVIEW_GUIDANCE, PREVIEW_STEPS = 2.0, 10


def learning_rate(step, steps, peak):
    """Warm-up over the first 2 % of the run (ours: the paper gives no schedule), then linearly to zero."""
    return peak * min((step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, prototypes, fr = load_recogniser(args.fr, device)
    faces = Faces(args.data or fr["data"], fr["config"]["size"])
    prototype_of = {name: i for i, name in enumerate(fr["names"])}
    if unknown := [name for name in faces.names if name not in prototype_of]:
        fail(f"{args.fr}: {len(unknown)} of {len(faces.names)} people have no prototype, {unknown[0]} first; "
             "train fr_train.py on the same --data")
    if missing := int(faces.landmarks.isnan().any((1, 2)).sum()):
        first = faces.files[faces.landmarks.isnan().any((1, 2)).nonzero()[0]]
        fail(f"{first}: no landmarks; expected a line for every image in landmarks.csv beside the identity folders, "
             f"{missing} of {len(faces)} have none")
    size, patch = (args.arch or ("Ti/4" if faces.size <= 64 else "B/8")).split("/")
    cfg = DiTConfig(size=faces.size, dim=fr["config"]["dim"], patch=int(patch), **DIT_SIZES[size])
    tiny = size == "Ti"
    steps, batch = args.steps or (2000 if tiny else 200_000), min(args.batch or (64 if tiny else 256), len(faces))
    peak, preview_every, out = args.lr or (1e-3 if tiny else 2e-4), args.preview or max(1, min(5000, steps // 8)), Path(args.out)

    torch.manual_seed(args.seed)
    dit = DiT(cfg).to(device).train()
    decay = min(0.9999, steps / (steps + 20))                   # of 2,000 steps it averages the last hundred or so
    average = AveragedModel(dit, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
    fast, fast_backbone = (compiled(module, device, steps * batch) for module in (dit, backbone))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    config = {"fr": args.fr, "fr_step": fr["step"], "data": args.data, "size": faces.size, "arch": f"{size}/{patch}",
              "steps": steps, "batch": batch, "lr": peak, "identity_weight": args.identity_weight, "seed": args.seed}
    out.mkdir(parents=True, exist_ok=True)
    first = 0
    if state := load_state(out / "state.pt", config):
        first = state["step"]
        for name, part in (("dit", dit), ("average", average), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        print(f"continuing {out} at step {first} of {steps}")
    print(f"DiT-{size}/{patch}, {sum(p.numel() for p in dit.parameters()) / 1e6:.1f}M parameters, {len(faces)} images at "
          f"{faces.size} px, {steps} steps of {batch}, on {device}")

    # The previews never change but for the network: people, poses and noise are fixed.
    generator = torch.Generator().manual_seed(args.seed)
    count, columns = (4, 8)
    chosen = torch.randint(len(faces), (columns,), generator=generator)
    n, k = len(prototypes.real), len(prototypes.virtual)
    people = torch.cat([torch.arange(count) * (n // count), n + torch.arange(count if k else 0) * (k // count)])
    W = prototypes.unit()
    preview_w = W[people].repeat_interleave(columns, 0)
    preview_landmarks = faces.landmarks[chosen].repeat(len(people), 1, 1).to(device)
    noise = torch.randn(len(preview_w), 3, cfg.size, cfg.size, generator=generator).to(device)

    def preview(step):
        """Draws the preview grid with the averaged weights; -> mean own-prototype cosine of (real, virtual) people."""
        with torch.no_grad(), autocast(device):
            denoise = guided(average.module, preview_w, preview_landmarks, PREVIEW_GUIDANCE)
            images = to_uint8(dpm_solver(denoise, noise, PREVIEW_STEPS))
        grid = make_grid(images.cpu(), columns, padding=1).float() / 255
        replace_file(out / f"preview-{step:06d}.jpg", lambda path: save_image(grid, path, "JPEG"))
        own = (embed(backbone, images) * preview_w).sum(1)
        return own[:count * columns].mean().item(), own[count * columns:].mean().item()

    def save(step):
        save_state(out / "state.pt", config, step=step, dit=dit.state_dict(), average=average.state_dict(),
                   optimizer=optimizer.state_dict())
        tensors = {f"dit.{name}": t for name, t in average.module.state_dict().items()}
        tensors |= {"bank.landmarks": faces.landmarks, "bank.labels": faces.labels}
        save_model(out, "dit", cfg, tensors, fr=args.fr, data=args.data or fr["data"], step=step, steps=steps)

    W_of_label = W[[prototype_of[name] for name in faces.names]]                # (people in the data, D)
    losses, logged, since = torch.zeros(2, device=device), first, time.time()
    progress = tqdm(batches(faces, batch, args.seed, first, steps), initial=first, total=steps, mininterval=1,
                    desc=out.name, leave=False)
    for step, (images, labels, landmarks) in enumerate(progress, first):
        torch.manual_seed(args.seed * 1_000_003 + step)         # every step's randomness follows from its number
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        x = to_float(images.to(device, non_blocking=True))
        with autocast(device):
            v_loss, identity_loss = dit_loss(fast, fast_backbone, x, W_of_label[labels], landmarks.to(device))
        optimizer.zero_grad(set_to_none=True)
        (v_loss + args.identity_weight * identity_loss).backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        average.update_parameters(dit)
        losses += torch.stack([v_loss.detach(), identity_loss.detach()])

        if (step + 1) % preview_every == 0 or step + 1 == steps:
            v_mean, identity_mean = (losses / (step + 1 - logged)).tolist()
            speed = batch * (step + 1 - logged) / (time.time() - since)
            if not v_mean + identity_mean < float("inf"):
                fail(f"{out}: the loss is {v_mean + identity_mean} at step {step + 1}; the checkpoint before it is kept. "
                     "Lower --lr")
            real, virtual = preview(step + 1)
            save(step + 1)
            tqdm.write(f"step {step + 1:6d}/{steps}  v {v_mean:.4f}  identity {identity_mean:.4f}  own cosine real "
                       f"{real:.3f} virtual {virtual:.3f}  {speed:5.0f} img/s")
            losses.zero_()
            logged, since = step + 1, time.time()
    print(f"wrote {out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
