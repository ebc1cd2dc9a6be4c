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
flag("--identity-weight", type=float, default=0.05, help="weight of the identity loss (default: %(default)s)")
flag("--preview", type=int, help="steps between previews (default: an eighth of the run, 5,000 at most)")
flag("--weights", metavar="PATH", help="RetinaFace's, where landmarks are missing (default: fetched)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")


def learning_rate(step, steps, peak):
    """Warm-up over the first 2 % of the run, then linearly to zero. (paper: no schedule given)"""
    return peak * min((step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))


def closeness(backbone, prototypes, faces, rows, device, most=10_000):
    """How close real images come to prototypes, for sample.py's leak rule: 99 % of strangers stay below
    `strangers`; the median cosine to the own one is `own`. Of `most` images at most; rows (labels,) of W."""
    some = torch.randperm(len(faces), generator=torch.Generator().manual_seed(0))[:most]
    seen = embed_faces(backbone, prototypes, faces, device, some)
    real, own = torch.nn.functional.normalize(prototypes.real), rows[seen.labels]
    return {"strangers": quantile(nearest(seen.f, real, own)[0], 0.99),
            "own": quantile((seen.f * real[own]).sum(1), 0.5)}


def make_preview(out, average, backbone, W, n, landmarks, seed):
    """A function of the step that draws fixed people, poses and noise: four real rows, four virtual ones."""
    generator, rows, columns = torch.Generator().manual_seed(seed), 4, 8
    people = [torch.linspace(0, n - 1, rows), torch.linspace(n, len(W) - 1, rows)][:1 + (len(W) > n)]
    w = W[torch.cat(people).long()].repeat_interleave(columns, 0)
    poses = torch.randint(len(landmarks), (columns,), generator=generator)
    pose = landmarks[poses].repeat(len(w) // columns, 1, 1).to(W.device)
    noise = torch.randn(len(w), 3, average.size, average.size, generator=generator).to(W.device)

    @torch.no_grad()
    def preview(step):
        """Draws with guidance 2; mean cosine to the own prototype of real people, and of virtual ones."""
        with autocast(W.device):
            images = to_uint8(dpm_solver(guided(average, w, pose, guidance=2.0), noise, steps=10))
        replace_file(out / f"preview-{step:06d}.jpg", lambda path: save_image(
            images.cpu() / 255, path, "JPEG", nrow=columns, padding=1))
        own = (embed(backbone, images) * w).sum(1)
        return own[:rows * columns].mean().item(), own[rows * columns:].mean().item()
    return preview


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, prototypes, fr = load_recogniser(args.fr, device)
    data, out = args.data or fr["data"], Path(args.out)
    faces = Faces(data, fr["config"]["size"])
    row_of = {name: i for i, name in enumerate(fr["names"])}
    if unknown := [name for name in faces.people if name not in row_of]:
        fail(f"{args.fr}: {len(unknown)} of {len(faces.people)} people have no prototype, {unknown[0]} first; "
             "train fr_train.py on the same --data")
    rows = torch.tensor([row_of[name] for name in faces.people], device=device)     # of W, for each label
    args.arch = args.arch or ("Ti/4" if faces.size <= 64 else "B/8")
    size, patch = args.arch.split("/")
    if faces.size % int(patch):
        fail(f"--arch {args.arch}: {faces.size} pixels are not whole patches of {patch}; give {size}/4")
    steps = args.steps = args.steps or (1200 if size == "Ti" else 200_000)
    batch = args.batch = min(args.batch or (64 if size == "Ti" else 256), len(faces))
    peak = args.lr = args.lr or (1e-3 if size == "Ti" else 2e-4)
    preview_every = args.preview or max(1, min(5000, steps // 8))

    torch.manual_seed(args.seed)
    dit = DiT(faces.size, fr["config"]["dim"], int(patch), **DIT_SIZES[size]).to(device)
    average = copy.deepcopy(dit).requires_grad_(False)
    decay = min(0.9999, steps / (steps + 20))          # the average spans the last 20 steps of a hundred
    fast, fast_backbone = (compiled(module, device, steps * batch) for module in (dit, backbone))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    settings = {**vars(args), "data": data, "fr_sha256": digest(args.fr), "images": len(faces),
                "fr": "", "out": "", "preview": ""}
    modules = {"dit": dit, "average": average, "optimizer": optimizer}
    first = resume(out / "state.pt", settings, modules)
    complete_landmarks(faces, out, args.weights, device)
    leak_line = closeness(backbone, prototypes, faces, rows, device)
    W = prototypes.unit()
    preview = make_preview(out, average, backbone, W, len(prototypes.real), faces.landmarks, args.seed)
    print(f"DiT-{args.arch}, {sum(p.numel() for p in dit.parameters()) / 1e6:.1f}M parameters, {len(faces)} "
          f"images at {faces.size} px, {steps} steps of {batch}, on {device}")

    losses, last_step, last_time = torch.zeros(2, device=device), first, time.time()
    for step, x, labels, landmarks in batches(faces, batch, args.seed, first, steps, device, out.name):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with autocast(device):
            v_loss, identity_loss = dit_loss(fast, fast_backbone, x, W[rows[labels]], landmarks,
                                             prototypes.sigma2)
        (v_loss + args.identity_weight * identity_loss).backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_([*average.parameters()], [*dit.parameters()], 1 - decay)
        losses += torch.stack([v_loss.detach(), identity_loss.detach()])

        if (step + 1) % preview_every == 0 or step + 1 == steps:
            v_mean, identity_mean = stop_unless_finite((losses / (step + 1 - last_step)).tolist(), step + 1, out)
            speed = batch * (step + 1 - last_step) / (time.time() - last_time)
            real, virtual = preview(step + 1)
            tensors = {f"dit.{name}": t for name, t in average.state_dict().items()}
            tensors |= {"poses.landmarks": faces.landmarks, "poses.rows": rows.cpu()[faces.labels]}
            save_model(out, "dit", average.config, tensors, fr=args.fr, fr_sha256=settings["fr_sha256"],
                       **leak_line, step=step + 1, steps=steps)
            save_state(out / "state.pt", settings, step + 1, modules)   # last: never newer than the model
            tqdm.write(f"step {step + 1:6d}/{steps}  loss v {v_mean:.4f} identity {identity_mean:.4f}  "
                       f"own cosine real {real:.3f} virtual {virtual:.3f}  {speed:5.0f} img/s")
            losses.zero_()
            last_step, last_time = step + 1, time.time()
    print(f"wrote {out / 'model.safetensors'}")


if __name__ == "__main__":
    run(main)
