"""Verification accuracy of recognisers, and quality and leakage of face datasets, side by side in one report.

    python evaluate.py                                      # every runs/fr*, and runs/virtual against the real training set
    python evaluate.py --fr runs/fr runs/fr-virtual --pairs lfw.bin cfp_fp.bin --datasets runs/virtual --real casia/

The first recogniser judges the datasets. Writes OUT/report.json and OUT/report.md, and prints the same tables.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Faces, read_bin
from model import embed, fail, load_recogniser, replace_file

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--fr", nargs="+", metavar="DIR", help="recognisers' run folders (default: every runs/fr* there is)")
parser.add_argument("--pairs", nargs="+", metavar="BIN", help="benchmarks (default: those of the first recogniser's data)")
parser.add_argument("--datasets", nargs="*", metavar="DIR", help="image folders to judge (default: runs/virtual if there)")
parser.add_argument("--real", nargs="+", metavar="DIR", help="real faces nobody may leak (default: the first recogniser's data)")
parser.add_argument("--out", default="runs/report", metavar="DIR", help="report folder (default: runs/report)")


def verification(backbone, images, same, folds=10):
    """Accuracy and its spread over folds, as fractions, of pairs (images 2p, 2p + 1 are the same person: same[p]).

    The field's protocol: |f1 - f2|^2 of flip-summed unit embeddings under a threshold from 0 to 4 by 0.01; ten
    contiguous folds, each judged at the first threshold that is best on the other nine.
    """
    f, same = embed(backbone, images).cpu(), same.numpy()
    distance = (f[0::2] - f[1::2]).square().sum(1).numpy()                      # (P,)
    correct = (distance < np.arange(0, 4, 0.01)[:, None]) == same               # (thresholds, P)
    sizes = [len(fold) for fold in np.array_split(same, folds)]
    starts = np.cumsum([0, *sizes[:-1]])
    hits = np.add.reduceat(correct, starts, axis=1, dtype=np.int64)             # (thresholds, folds)
    best = (hits.sum(1, keepdims=True) - hits).argmax(0)                        # on the other nine, per fold
    accuracy = hits[best, np.arange(folds)] / sizes
    return {"accuracy": float(accuracy.mean()), "std": float(accuracy.std())}


def nearest(queries, centres, own=None, chunk=4096):
    """Cosine (M,) of each unit query (M, D) to its nearest unit centre (K, D), not counting centre own[i] (M,)."""
    best = []
    for start in range(0, len(queries), chunk):
        cos = queries[start:start + chunk] @ centres.T
        if own is not None:
            cos.scatter_(1, own[start:start + chunk, None], -2)
        best.append(cos.amax(1))
    return torch.cat(best)


@torch.no_grad()
def embed_faces(backbone, faces, chunk=512):
    """Unit embeddings (M, D) of a whole image source, on the backbone's device."""
    pieces = torch.arange(len(faces)).split(chunk)
    return torch.cat([embed(backbone, faces.__getitems__(piece)[0])
                      for piece in tqdm(pieces, "embedding", leave=False, mininterval=1)])


def sums(f, labels, classes):
    """Sum (I, D) and number (I,) of the embeddings of each class."""
    total = torch.zeros(classes, f.shape[1], device=f.device).index_add_(0, labels, f)
    return total, torch.bincount(labels, minlength=classes)


def consistency_separability(f, labels, classes):
    """C, the mean cosine of pairs within a class (None without any); S, the mean cosine distance between class centres."""
    total, count = sums(f, labels, classes)
    many = count > 1
    within = (total.square().sum(1) - count) / (count * (count - 1)).clamp(min=1)   # sum over pairs i != j of f_i f_j
    centres = F.normalize(total)
    between = (centres.sum(0) @ centres.sum(0) - classes) / max(1, classes * (classes - 1))
    return within[many].mean().item() if many.any() else None, 1 - between.item()


def judge_dataset(backbone, prototypes, faces, real_centres, baseline):
    """One dataset's row of the report: consistency, separability, own_top1, and leakage against real class centres.

    baseline (M,): what real images score against the nearest centre of another person. The leakage threshold is its
    99 % quantile, "two real strangers look this much alike"; a set is clean if at most 1 % of its images exceed it.
    """
    device = real_centres.device
    f, labels = embed_faces(backbone, faces), faces.labels.to(device)
    consistency, separability = consistency_separability(f, labels, len(faces.names))
    closest, threshold = nearest(f, real_centres), baseline.quantile(0.99)
    q99, over = closest.quantile(0.99).item(), int((closest > threshold).sum())
    top1, numbers = None, [name[1:] for name in faces.names]
    if all(name[0] == "v" and name[1:].isdigit() and int(name[1:]) < len(prototypes.virtual) for name in faces.names):
        owners = torch.tensor([int(number) for number in numbers], device=device)[labels]
        virtual = prototypes.unit()[len(prototypes.real):]
        top1 = torch.cat([(piece @ virtual.T).argmax(1) for piece in f.split(4096)]).eq(owners).float().mean().item()
    clean = over <= 0.01 * len(faces) and q99 <= threshold.item()
    return {"identities": len(faces.names), "images": len(faces), "consistency": consistency,
            "separability": separability, "own_top1": top1,
            "leakage": {"threshold": threshold.item(), "images_over": over, "q99": q99, "baseline_q99": threshold.item(),
                        "verdict": "clean" if clean else "leaks"}}


def table(header, rows):
    """Rows of text as a Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
             for row in [header, *rows]]
    rule = " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = args.fr or [path.parent.as_posix() for path in sorted(Path("runs").glob("fr*/model.safetensors"))]
    if not folders:
        fail("runs/: no recogniser found; train one with fr_train.py or name its folder with --fr")
    recognisers = {folder: load_recogniser(folder, device) for folder in folders}
    judge, prototypes, meta = recognisers[folders[0]]
    pairs = [Path(path) for path in (meta["val"] if args.pairs is None else args.pairs)]

    report, loaded = {"judge": folders[0], "models": {}, "datasets": {}}, {}
    for folder, (backbone, _, fr) in recognisers.items():
        scores, size = {}, fr["config"]["size"]
        for path in pairs:
            if (path, size) not in loaded:
                loaded[path, size] = read_bin(path, size)
            scores[path.stem] = verification(backbone, *loaded[path, size])
        scores["average"] = float(np.mean([score["accuracy"] for score in scores.values()])) if scores else None
        report["models"][folder] = scores
    names = [path.stem for path in pairs]
    texts = ["Verification accuracy, % (mean ± standard deviation over 10 folds)\n\n" + table(
        ["recogniser", *names, "average"],
        [[folder, *(f"{100 * scores[name]['accuracy']:.2f} ± {100 * scores[name]['std']:.2f}" for name in names),
          f"{100 * scores['average']:.2f}" if names else "-"] for folder, scores in report["models"].items()])]
    if not names:
        texts[0] += "\n\nNo benchmark: none beside the training data; name some with --pairs."

    datasets = args.datasets
    if datasets is None:
        datasets = ["runs/virtual"] if Path("runs/virtual/manifest.csv").is_file() else []
    if datasets:
        real = Faces(args.real or meta["data"], meta["config"]["size"])
        f, labels = embed_faces(judge, real), real.labels.to(device)
        centres = F.normalize(sums(f, labels, len(real.names))[0])
        baseline = nearest(f, centres, own=labels)
        rows = []
        for folder in datasets:
            row = judge_dataset(judge, prototypes, Faces([folder], meta["config"]["size"]), centres, baseline)
            report["datasets"][folder] = row
        real_name = " ".join(args.real or meta["data"])
        C, S = consistency_separability(f, labels, len(real.names))
        report["real"] = {"source": real_name, "identities": len(real.names), "images": len(real), "consistency": C,
                          "separability": S}
        for folder, row in report["datasets"].items():
            leak, top1 = row["leakage"], "-" if row["own_top1"] is None else f"{100 * row['own_top1']:.1f} %"
            rows.append([folder, str(row["identities"]), str(row["images"]), f"{row['consistency']:.3f}",
                         f"{row['separability']:.3f}", top1, f"{leak['q99']:.3f}",
                         f"{leak['images_over']} over {leak['threshold']:.3f}", leak["verdict"]])
        rows.append([f"{real_name} (real)", str(len(real.names)), str(len(real)), f"{C:.3f}", f"{S:.3f}", "-",
                     f"{baseline.quantile(0.99):.3f}", "-", "-"])
        texts.append(f"Datasets, judged by {folders[0]} (nearest real: cosine to the nearest real class centre, of another "
                     "person for real images)\n\n" + table(
                         ["dataset", "people", "images", "consistency", "separability", "own top-1", "nearest real, q99",
                          "images over", "verdict"], rows))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    replace_file(out / "report.md", lambda path: path.write_text("\n\n".join(texts) + "\n"))
    print("\n\n".join(texts))
    print(f"\nwrote {out / 'report.json'} and {out / 'report.md'}")


if __name__ == "__main__":
    main()
