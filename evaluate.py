"""Accuracy of recognisers, and quality and leakage of face datasets, side by side in one report.

    python evaluate.py                      # every runs/fr*; runs/virtual against the real training set
    python evaluate.py --fr runs/fr runs/fr-virtual --pairs lfw.bin --datasets runs/virtual --real casia/

The first recogniser judges the datasets. Writes OUT/report.json and OUT/report.md, prints the same tables.
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
flag = parser.add_argument
flag("--fr", nargs="+", metavar="PATH", help="run folders or published .pth (default: every runs/fr*)")
flag("--bgr", action="store_true", help="published recognisers read BGR images (default: RGB)")
flag("--pairs", nargs="+", metavar="BIN", help="benchmarks (default: those of the first recogniser)")
flag("--datasets", nargs="*", metavar="DIR", help="image folders to judge (default: runs/virtual if there)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the first recogniser's data)")
flag("--out", default="runs/report", metavar="DIR", help="report folder (default: %(default)s)")


def verification(backbone, images, same, folds=10):
    """Accuracy and its spread over folds, as fractions; images 2p, 2p + 1 show the same person if same[p].

    The field's protocol: |f1 - f2|^2 of flip-summed unit embeddings against a threshold from 0 to 4 by 0.01;
    ten contiguous folds, each judged at the first threshold that is best on the other nine.
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
    """Cosine (M,) of unit queries (M, D) to the nearest unit centre (K, D), centre own[i] (M,) left out."""
    best = []
    for start in range(0, len(queries), chunk):
        cos = queries[start:start + chunk] @ centres.T
        if own is not None:
            cos.scatter_(1, own[start:start + chunk, None], -2)
        best.append(cos.amax(1))
    return torch.cat(best)


def embed_faces(backbone, faces, device, chunk=512):
    """Unit embeddings (M, D) and labels (M,) of a whole image source."""
    pieces = torch.arange(len(faces)).split(chunk)
    f = [embed(backbone, faces.__getitems__(piece)[0]) for piece in tqdm(pieces, "embedding", leave=False)]
    return torch.cat(f), faces.labels.to(device)


def class_centres(f, labels):
    """Of each class: unit centre (I, D), length of the sum of its embeddings (I,), number of images (I,)."""
    count = torch.bincount(labels)
    total = torch.zeros(len(count), f.shape[1], device=f.device).index_add_(0, labels, f)
    return F.normalize(total), total.norm(dim=1), count


def consistency_separability(f, labels):
    """C, mean cosine of two images of a class (None without any); S, mean cosine distance of two centres."""
    centres, length, count = class_centres(f, labels)
    many, classes = count > 1, len(count)
    within = (length ** 2 - count) / (count * (count - 1)).clamp(min=1)         # mean of f_i f_j over i != j
    between = (centres.sum(0).square().sum() - classes) / max(1, classes * (classes - 1))
    return within[many].mean().item() if many.any() else None, 1 - between.item()


def judge(faces, f, labels, closest, threshold, prototypes):
    """One dataset's row of the report: consistency, separability, own_top1 (virtual people only), leakage.

    closest (M,): each image's cosine to the nearest real person's centre. The threshold is the 99 % quantile
    of the same for real images and other people's centres: two real strangers look this much alike. A set is
    clean if at most 1 % of it exceeds that.
    """
    consistency, separability = consistency_separability(f, labels)
    over, q99, own_top1 = int((closest > threshold).sum()), closest.quantile(0.99).item(), None
    virtual = prototypes.unit()[len(prototypes.real):]
    if all(name[0] == "v" and name[1:].isdigit() and int(name[1:]) < len(virtual) for name in faces.names):
        owner = torch.tensor([int(name[1:]) for name in faces.names], device=f.device)[labels]
        own_top1 = ((f * virtual[owner]).sum(1) > nearest(f, virtual, owner)).float().mean().item()
    leakage = {"threshold": threshold, "images_over": over, "q99": q99, "baseline_q99": threshold,
               "verdict": "clean" if over <= 0.01 * len(faces) and q99 <= threshold else "leaks"}
    return {"identities": len(faces.names), "images": len(faces), "consistency": consistency,
            "separability": separability, "own_top1": own_top1, "leakage": leakage}


def table(header, *rows):
    """Rows of values as a Markdown table whose columns also line up in a terminal; None is a dash."""
    texts = [["-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
             for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in texts]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = args.fr or sorted(path.parent.as_posix() for path in Path("runs").glob("fr*/model.safetensors"))
    if not folders:
        fail("runs/: no recogniser in it; train one with fr_train.py, or name its folder with --fr")
    recognisers = {folder: load_recogniser(folder, device, args.bgr) for folder in folders}
    teacher, prototypes, meta = recognisers[folders[0]]
    pairs = [Path(path) for path in args.pairs or meta["val"]]

    report, loaded = {"judge": folders[0], "models": {}, "datasets": {}}, {}
    for folder, (backbone, _, _) in recognisers.items():
        scores, size = {}, backbone.cfg.size
        for path in pairs:
            if (path, size) not in loaded:
                loaded[path, size] = read_bin(path, size)
            scores[path.stem] = verification(backbone, *loaded[path, size])
        average = sum(score["accuracy"] for score in scores.values()) / len(scores) if scores else None
        report["models"][folder] = {**scores, "average": average}
    names = [path.stem for path in pairs]
    rows = [[folder, *("{accuracy:.2%} ± {std:.2%}".format(**scores[name]) for name in names),
             f"{scores['average']:.2%}" if names else "no benchmark: name some with --pairs"]
            for folder, scores in report["models"].items()]
    text = "Verification accuracy (mean ± standard deviation over ten folds)\n\n"
    text += table(["recogniser", *names, "average"], *rows)

    datasets, source, size = args.datasets, args.real or meta["data"], teacher.cfg.size
    if datasets is None:
        datasets = ["runs/virtual"] if source and Path("runs/virtual/manifest.csv").is_file() else []
    if datasets and not source:
        fail(f"{folders[0]}: unknown what it was trained on; name real faces with --real")
    if datasets:
        real = Faces(source, size)
        f, labels = embed_faces(teacher, real, device)
        centres = class_centres(f, labels)[0]
        baseline = nearest(f, centres, own=labels)
        threshold = baseline.quantile(0.99).item()
        report["real"] = judge(real, f, labels, baseline, threshold, prototypes)
        report["real"]["leakage"]["verdict"] = "baseline"
        for folder in datasets:
            faces = Faces([folder], size)
            f, labels = embed_faces(teacher, faces, device)
            report["datasets"][folder] = judge(faces, f, labels, nearest(f, centres), threshold, prototypes)
        header = ["dataset", "people", "images", "consistency", "separability", "own top-1", "images over",
                  "nearest real q99", "threshold", "verdict"]
        rows = [[name, *list(row.values())[:5], *list(row["leakage"].values())[1:]] for name, row in
                {**report["datasets"], f"{' '.join(source)} (real)": report["real"]}.items()]
        text += (f"\n\nDatasets, judged by {folders[0]}; nearest real: cosine to the nearest real person's "
                 "centre, for real images to another person's\n\n") + table(header, *rows)

    out = Path(args.out)
    replace_file(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    replace_file(out / "report.md", lambda path: path.write_text(text + "\n"))
    print(f"{text}\n\nwrote {out / 'report.json'} and {out / 'report.md'}")


if __name__ == "__main__":
    main()
