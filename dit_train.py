"""Stage 2: trains a Diffusion Transformer to draw the person a prototype stands for, in a given pose.

    python dit_train.py                                     # on the data and prototypes of runs/fr

Writes OUT/model.safetensors (the weight average, and the landmarks that sample.py takes poses from),
OUT/state.pt, from which the same command continues a run that was killed, and preview grids
OUT/preview-STEP.jpg: four real people and four virtual ones, a row each. Watch the two numbers logged with
them, the mean cosine of previews to their own prototype: real people show what the network knows by heart,
virtual ones whether it learned a space of people.
"""
import argparse
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, batches, complete_landmarks
from model import (DIT_SIZES, DiT, DiTConfig, autocast, claim, compiled, dit_loss, dpm_solver, embed, fail,
                   forward_flops, guided, load_recogniser, peak_flops, replace_file, resume, run, save_model,
                   save_state, stop_unless_finite, to_uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", default="runs/fr", metavar="DIR", help="the recogniser's run folder (default: %(default)s)")
flag("--data", nargs="+", metavar="DIR", help="image folders with landmarks.csv (default: those of --fr)")
flag("--out", default="runs/dit", metavar="DIR", help="run folder (default: %(default)s)")
flag("--arch", choices=[f"{size}/{patch}" for size in DIT_SIZES for patch in (4, 8)], metavar="SIZE/PATCH",
     help=f"{', '.join(DIT_SIZES)} with patches of 4 or 8 pixels (default: Ti/4 up to 64 pixels, B/8 above)")
flag("--steps", type=int, help="training steps (default: 2,000 for Ti, 200,000 for others)")
flag("--batch", type=int, help="images per step (default: 64 for Ti, 256 for others)")
flag("--lr", type=float, help="peak learning rate (default: 1e-3 for Ti, 2e-4 for others)")
flag("--identity-weight", type=float, default=0.05, help="weight of the identity loss (default: %(default)s)")
flag("--preview", type=int, help="steps between previews (default: an eighth of the run, 5,000 at most)")
flag("--weights", metavar="PATH", help="RetinaFace's, where landmarks are missing (default: fetched)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")


def learning_rate(step, steps, peak):
    """Warm-up over the first 2 % of the run, then linearly to zero. (paper: no schedule given)"""
    return peak * min((step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, prototypes, fr = load_recogniser(args.fr, device)
    data, out = args.data or fr["data"], Path(args.out)
    complete_landmarks(data, args.weights, out, device)
    faces = Faces(data, fr["config"]["size"])
    row_of = {name: i for i, name in enumerate(fr["names"])}
    if unknown := [name for name in faces.names if name not in row_of]:
        fail(f"{args.fr}: {len(unknown)} of {len(faces.names)} people have no prototype, {unknown[0]} first; "
             "train fr_train.py on the same --data")
    arch = args.arch = args.arch or ("Ti/4" if faces.size <= 64 else "B/8")
    size, patch = arch.split("/")
    cfg = DiTConfig(size=faces.size, dim=fr["config"]["dim"], patch=int(patch), **DIT_SIZES[size])
    if cfg.size % cfg.patch:
        fail(f"--arch {arch}: {cfg.size} pixels are not whole patches of {cfg.patch}; give {size}/4")
    steps = args.steps = args.steps or (2000 if size == "Ti" else 200_000)
    batch = args.batch = min(args.batch or (64 if size == "Ti" else 256), len(faces))
    peak = args.lr = args.lr or (1e-3 if size == "Ti" else 2e-4)
    preview_every = args.preview or max(1, min(5000, steps // 8))

    torch.manual_seed(args.seed)
    dit = DiT(cfg).to(device).train()
    decay = min(0.9999, steps / (steps + 20))        # of 2,000 steps it spans the last hundred
    average = AveragedModel(dit, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
    fast, fast_backbone = (compiled(module, device, steps * batch) for module in (dit, backbone))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    zeros = lambda *shape: torch.zeros(1, *shape, device=device)
    one = zeros(3, cfg.size, cfg.size)
    flops = 3 * forward_flops(dit, one, zeros(), zeros(cfg.dim), zeros(5, 2))  # backward is twice forward,
    share = (flops + 2 * forward_flops(backbone, one)) / peak_flops(device)  # once where weights are frozen
    settings = {**vars(args), "data": data, "fr_step": fr["step"], "images": len(faces)}
    del settings["out"], settings["preview"]
    modules = {"dit": dit, "average": average, "optimizer": optimizer}
    claim(out)
    first = resume(out / "state.pt", settings, modules)
    millions = sum(p.numel() for p in dit.parameters()) / 1e6
    print(f"DiT-{arch}, {millions:.1f}M parameters, {len(faces)} images at {cfg.size} px, {steps} steps of "
          f"{batch}, on {device}")

    # The previews never change but for the network: people, poses and noise are fixed.
    generator, rows, columns = torch.Generator().manual_seed(args.seed), 4, 8
    n, k, W = len(prototypes.real), len(prototypes.virtual), prototypes.unit()
    people = torch.linspace(0, n - 1, rows)
    if k:
        people = torch.cat([people, torch.linspace(n, n + k - 1, rows)])
    preview_w = W[people.long()].repeat_interleave(columns, 0)
    poses = torch.randint(len(faces), (columns,), generator=generator)
    preview_landmarks = faces.landmarks[poses].repeat(len(people), 1, 1).to(device)
    noise = torch.randn(len(preview_w), 3, cfg.size, cfg.size, generator=generator).to(device)

    def preview(step):
        """Draws the previews with the averaged weights, guidance 2; -> mean own cosine (real, virtual)."""
        with torch.no_grad(), autocast(device):
            denoise = guided(average.module, preview_w, preview_landmarks, guidance=2.0)
            images = to_uint8(dpm_solver(denoise, noise, steps=10))
        replace_file(out / f"preview-{step:06d}.jpg", lambda path: save_image(
            images.cpu() / 255, path, "JPEG", nrow=columns, padding=1))
        own = (embed(backbone, images) * preview_w).sum(1)
        return own[:rows * columns].mean().item(), own[rows * columns:].mean().item()

    rows_of = torch.tensor([row_of[name] for name in faces.names], device=device)       # of W, for each label
    losses, logged, since = torch.zeros(2, device=device), first, time.time()
    for step, x, labels, landmarks, _ in batches(faces, batch, args.seed, first, steps, device, out.name):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with autocast(device):
            v_loss, identity_loss = dit_loss(fast, fast_backbone, x, W[rows_of[labels]], landmarks,
                                             prototypes.sigma2)
        (v_loss + args.identity_weight * identity_loss).backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(dit)
        losses += torch.stack([v_loss.detach(), identity_loss.detach()])

        if (step + 1) % preview_every == 0 or step + 1 == steps:
            v_mean, identity_mean = stop_unless_finite((losses / (step + 1 - logged)).tolist(), step + 1, out)
            speed = batch * (step + 1 - logged) / (time.time() - since)
            real, virtual = preview(step + 1)
            tensors = {f"dit.{name}": t for name, t in average.module.state_dict().items()}
            tensors |= {"poses.landmarks": faces.landmarks, "poses.rows": rows_of.cpu()[faces.labels]}
            save_model(out, "dit", cfg, tensors, fr=args.fr, data=data, step=step + 1, steps=steps)
            save_state(out / "state.pt", settings, step + 1, modules)   # last: never newer than the model
            tqdm.write(f"step {step + 1:6d}/{steps}  loss v {v_mean:.4f} identity {identity_mean:.4f}  "
                       f"own cosine real {real:.3f} virtual {virtual:.3f}  {speed:5.0f} img/s "
                       f"{speed * share:4.0%} of peak")
            losses.zero_()
            logged, since = step + 1, time.time()
    print(f"wrote {out / 'model.safetensors'}")


if __name__ == "__main__":
    run(main)
