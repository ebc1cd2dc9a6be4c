"""Stage 2: trains a Diffusion Transformer to draw the person a prototype stands for, in a given pose.

    python dit_train.py                                     # on the data and prototypes of runs/fr

Writes OUT/model.safetensors (averaged weights, and poses and embeddings of real faces for sample.py),
OUT/state.pt, from which the same command continues a run that was killed, and OUT/preview-STEP.jpg, four
real and four virtual people at guidance 2. Watch their cosine to the own prototype: of virtual people it
shows whether a space of people was learned.
"""
import copy
from pathlib import Path

import torch
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, batches, complete_landmarks
from evaluate import baseline, embed_faces, person_moment
from model import (DEVICE, DIT_SIZES, DiT, autocast, compiled, digest, dit_loss, dpm_solver, embed, fail,
                   guided, load_recogniser, options, replace_file, resume, run, save_model, save_state,
                   stop_unless_finite, to_uint8)

parser, flag = options(__doc__)
flag("--fr", default="runs/fr", metavar="DIR", help="the recogniser's run folder (default: %(default)s)")
flag("--data", nargs="+", metavar="DIR", help="image folders (default: those of --fr)")
flag("--out", default="runs/dit", metavar="DIR", help="run folder (default: %(default)s)")
flag("--arch", choices=[f"{size}/{patch}" for size in DIT_SIZES for patch in (4, 8)], metavar="SIZE/PATCH",
     help=f"{', '.join(DIT_SIZES)} with patches of 4 or 8 pixels (default: Ti/8 up to 64 pixels, B/8 above)")
flag("--steps", type=int, help="training steps (default: 1,100 for Ti, 200,000 for others)")
flag("--batch", type=int, help="images per step (default: 32 for Ti, 256 for others)")
flag("--lr", type=float, help="learning rate (default: 2e-3 for Ti, 2e-4 for others)")
flag("--weights", metavar="PATH", help="RetinaFace's, where landmarks are missing (default: fetched)")
flag("--seed", type=int, default=0, help="(default: %(default)s)")


def mirror(x, landmarks):
    """Images (B, 3, S, S) and landmarks (B, 5, 2), half of them, by chance, mirrored: twice the data."""
    flip = torch.rand(len(x), 1, 1, device=x.device) < 0.5
    mirrored = landmarks[:, [1, 0, 2, 4, 3]] * landmarks.new_tensor([-1, 1]) + landmarks.new_tensor([1, 0])
    return torch.where(flip[..., None], x.flip(3), x), torch.where(flip, mirrored, landmarks)


def preview(path, dit, backbone, W, n, landmarks, seed, rows=4, columns=8):
    """Draws people of prototypes W, n real ones first; returns both kinds' mean cosine to their own."""
    generator = torch.Generator().manual_seed(seed)
    kinds = W[:n], W[n:] if n < len(W) else W
    w = torch.cat([kind[torch.linspace(0, len(kind) - 1, rows).long()] for kind in kinds])
    w = w.repeat_interleave(columns, 0)
    pose = landmarks[torch.randint(len(landmarks), (columns,), generator=generator)].repeat(2 * rows, 1, 1)
    noise = torch.randn(len(w), 3, dit.size, dit.size, generator=generator).to(W.device)
    with autocast(W.device):
        images = to_uint8(dpm_solver(guided(dit, w, pose.to(W.device), guidance=2.0), noise, steps=10))
    replace_file(path, lambda path: save_image(images.cpu() / 255, path, "JPEG", nrow=columns, padding=1))
    return (embed(backbone, images) * w).sum(1).view(2, -1).mean(1).tolist()


def main():
    args = parser.parse_args()
    backbone, prototypes, fr = load_recogniser(args.fr, DEVICE)
    data, out = args.data or fr["data"] or fail(f"{args.fr}: no run of fr_train.py"), Path(args.out)
    faces = Faces(data, fr["config"]["size"])
    if unknown := sorted(faces.people.keys() - fr["names"]):
        fail(f"{args.fr}: {len(unknown)} people have no prototype, such as {unknown[0]}; train it on --data")
    row_of = {name: row for row, name in enumerate(fr["names"])}
    rows = torch.tensor([row_of[name] for name in faces.people], device=DEVICE)     # of W, for each label
    args.arch = args.arch or ("Ti/8" if faces.size <= 64 else "B/8")
    size, patch = args.arch.split("/")
    steps, batch, lr = (1100, 32, 2e-3) if size == "Ti" else (200_000, 256, 2e-4)       # paper: not given
    steps, batch, lr = args.steps or steps, min(args.batch or batch, len(faces)), args.lr or lr
    every = min(5000, -(-steps // 6))

    complete_landmarks(faces, out, args.weights, DEVICE)
    torch.manual_seed(args.seed)
    dit = DiT(faces.size, fr["config"]["dim"], int(patch), **DIT_SIZES[size]).to(DEVICE)
    average = copy.deepcopy(dit).requires_grad_(False)
    decay = min(0.9999, steps / (steps + 20))                   # the average spans a twentieth of short runs
    fast, fast_backbone = (compiled(net, DEVICE, steps * batch) for net in (dit, backbone))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    settings = vars(args) | {"data": data, "steps": steps, "batch": batch, "images": len(faces),
                             "fr": digest(args.fr), "out": ""}
    modules = {"dit": dit, "average": average, "optimizer": optimizer}
    first = resume(out / "state.pt", settings, modules)
    # What sample.py draws must be clean by the rule of evaluate.py: it gets the real faces as that sees them.
    seen = embed_faces(backbone, prototypes, faces, DEVICE, torch.randperm(len(faces))[:500_000])
    real = {"f": seen.f.half(), "labels": rows[seen.labels], "thumbs": seen.thumbs.half()}
    _, lines, _ = baseline(seen)
    W = prototypes.unit(person_moment(seen.f, seen.labels))

    losses = torch.zeros(2, device=DEVICE)
    for step, x, labels, landmarks in batches(faces, batch, args.seed, first, steps, DEVICE, out.name):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.02 * steps), (steps - step) / (0.98 * steps))
        x, landmarks = mirror(x, landmarks)
        with autocast(DEVICE):
            mse, identity = dit_loss(fast, fast_backbone, x, W[rows[labels]], landmarks, prototypes.sigma2)
        (mse + 0.1 * identity).backward()                              # paper: no weight given
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_([*average.parameters()], [p.detach() for p in dit.parameters()], 1 - decay)
        losses += torch.stack([mse, identity]).detach()

        if (step + 1) % every == 0 or step + 1 == steps:
            # Means over the steps since the last line.
            v_mean, identity_mean = stop_unless_finite(losses / (step % every + 1), step + 1, out)
            real_own, virtual_own = preview(out / f"preview-{step + 1:06d}.jpg", average, backbone, W,
                                            len(row_of), faces.landmarks, args.seed)
            poses = {"landmarks": faces.landmarks, "rows": rows.cpu()[faces.labels]}
            parts = {"dit": average.state_dict(), "poses": poses, "real": real}
            save_model(out, "dit", average.config, parts, fr=args.fr, fr_sha256=settings["fr"], lines=lines,
                       step=step + 1, steps=steps)
            save_state(out / "state.pt", settings, step + 1, modules)   # last: never newer than the model
            tqdm.write(f"step {step + 1:6d}/{steps}  loss v {v_mean:.4f} identity {identity_mean:.4f}  "
                       f"own cosine real {real_own:.3f} virtual {virtual_own:.3f}")
            losses.zero_()


if __name__ == "__main__":
    run(main)
