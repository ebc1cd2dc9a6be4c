"""Accuracy of recognisers, and quality and leakage of face datasets, side by side in one report.

    python evaluate.py                      # every runs/fr*; runs/virtual against the real training set
    python evaluate.py --fr A B --pairs lfw.bin agedb_30.bin --datasets runs/virtual dcface/ --real casia/
    python evaluate.py --fr adaface.ckpt --bgr --datasets SET --real casia/ --strict   # exit code 3 on a leak

The first recogniser judges the datasets. Writes OUT/report.json and OUT/report.md (the tables it prints),
OUT/leaks.csv (every image that comes too close to a real person, and to whom) and two pictures for each set.
"""
import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, read_benchmark, write_csv
from model import embed, fail, load_recogniser, replace_file, run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", nargs="+", metavar="PATH", help="run folders or published .pth (default: every runs/fr*)")
flag("--bgr", action="store_true", help="published recognisers read BGR images (default: RGB)")
flag("--pairs", nargs="+", metavar="BIN", help="benchmarks (default: those of the first recogniser)")
flag("--datasets", nargs="*", metavar="DIR", help="sets to judge (default: runs/virtual if there)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the first recogniser's data)")
flag("--strict", action="store_true", help="exit with code 3 if a set leaks (default: report it)")
flag("--out", default="runs/report", metavar="DIR", help="report folder (default: %(default)s)")

FIELD = {"lfw": "LFW", "cfp_fp": "CFP-FP", "cplfw": "CPLFW", "agedb_30": "AgeDB", "calfw": "CALFW"}

# ----------------------------------------------------------------------------------------------- verification


def pair_distances(backbone, images):
    """Squared distances (P,) of the flip-summed unit embeddings of images 2p and 2p + 1, from 0 to 4."""
    f = embed(backbone, images)
    return (f[0::2] - f[1::2]).square().sum(1).cpu().numpy()


def verification(distance, same, folds=10):
    """Accuracy and its standard deviation over folds, as fractions, of distances (P,) of pairs, same or not.

    The field's protocol: thresholds from 0 to 4 by 0.01; ten contiguous folds, each judged at the first
    threshold that is best on the other nine.
    """
    same = np.asarray(same)
    correct = (distance < np.arange(0, 4, 0.01)[:, None]) == same               # (thresholds, P)
    sizes = [len(fold) for fold in np.array_split(same, folds)]
    starts = np.cumsum([0, *sizes[:-1]])
    hits = np.add.reduceat(correct, starts, axis=1, dtype=np.int64)             # (thresholds, folds)
    best = (hits.sum(1, keepdims=True) - hits).argmax(0)                        # on the other nine, per fold
    accuracy = hits[best, np.arange(folds)] / sizes
    return {"accuracy": float(accuracy.mean()), "std": float(accuracy.std())}


# ------------------------------------------------------------------------------- quality and leakage of a set


class FaceSet(NamedTuple):
    """A dataset as a judge sees it: M images of I people."""
    faces: Faces
    f: torch.Tensor                     # unit embeddings (M, D)
    labels: torch.Tensor                # (M,)
    quality: torch.Tensor               # CR-FIQA scores (M,)
    thumbs: torch.Tensor                # (M, 256), see `thumbnails`
    index: torch.Tensor                 # (M,), which of `faces`


def thumbnails(images):
    """16 x 16 grey versions of uint8 images (M, 3, S, S), unit length without their mean (M, 256).

    Blind to colour balance, brightness, contrast and encoding, and no recogniser is asked: copies show.
    """
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16).flatten(1)
    return F.normalize(grey - grey.mean(1, keepdim=True))


def embed_faces(backbone, prototypes, faces, device, some=None):
    """The FaceSet of `faces`, or of `some` of them (indices)."""
    columns, order = [], (torch.arange(len(faces)) if some is None else some).split(512)
    for images, i in tqdm(faces.loader(order), "embedding", len(order), leave=False):
        images = images.to(device)
        f = embed(backbone, images, unit=False) / 2
        columns.append((F.normalize(f), faces.labels[i].to(device), prototypes.quality(f)[:, 0],
                        thumbnails(images), i))
    return FaceSet(faces, *map(torch.cat, zip(*columns)))


def nearest(queries, targets, labels=None, target_labels=None):
    """Of unit queries (M, D): cosine to the nearest unit target (K, D), and its index, (M,) each.

    Targets of the query's own label are left out if labels (M,) are given; target j's is j by default.
    """
    found, chunk = [], max(1, 2 ** 26 // len(targets))
    if labels is not None and target_labels is None:
        target_labels = torch.arange(len(targets), device=targets.device)
    for start in range(0, len(queries), chunk):
        cos = queries[start:start + chunk] @ targets.T
        if labels is not None:
            cos.masked_fill_(labels[start:start + chunk, None] == target_labels, -2)
        found.append(cos.max(1))
    return tuple(map(torch.cat, zip(*found)))


def quantile(values, q):
    """The q-quantile of a tensor of any length, which torch.quantile refuses above 16 million."""
    return np.quantile(values.cpu().numpy(), q).item()


def class_sums(f, labels):
    """Of each class: the sum of its embeddings (I, D), number of images (I,)."""
    count = torch.bincount(labels)
    return torch.zeros(len(count), f.shape[1], device=f.device).index_add_(0, labels, f), count


def consistency_separability(f, labels):
    """C, mean cosine of two images of a class (None without any); S, mean cosine distance of two centres."""
    total, count = class_sums(f, labels)
    centres, many, classes = F.normalize(total), count > 1, len(count)
    within = (total.square().sum(1) - count) / (count * (count - 1)).clamp(min=1)   # mean f_i f_j over i != j
    between = (centres.sum(0).square().sum() - classes) / max(1, classes * (classes - 1))
    return within[many].mean().item() if many.any() else None, 1 - between.item()


def diversity(quality, labels):
    """D, variance of the quality scores (M,) within a class, mean over classes; None without any of two."""
    count, quality = torch.bincount(labels), quality.double()
    mean = torch.bincount(labels, quality) / count
    spread = torch.bincount(labels, (quality - mean[labels]) ** 2)[count > 1] / (count[count > 1] - 1)
    return spread.mean().item() if len(spread) else None


def resemblance(faces, real, own=None):
    """How near images come to real people: {test: (similarity, index in `real`) (M,) each}.

    centre: cosine to the nearest person's centre; image: to the nearest image; copy: of the thumbnail or its
    mirror image to the nearest thumbnail. Images of the person own (M,) are left out, if given.
    """
    mirrored = faces.thumbs.view(-1, 16, 16).flip(2).flatten(1)
    straight, turned = (nearest(thumbs, real.thumbs, own, real.labels) for thumbs in (faces.thumbs, mirrored))
    copy = [torch.where(straight[0] > turned[0], a, b) for a, b in zip(straight, turned)]
    return {"centre": nearest(faces.f, F.normalize(class_sums(real.f, real.labels)[0]), own),
            "image": nearest(faces.f, real.f, own, real.labels), "copy": copy}


def baseline(real):
    """What real strangers look like to each other: their `resemblance`, a line for each test, and the cap.

    99 % of real images stay below the lines for centre and image, unless the cap is lower: the median cosine
    of an image to the centre of the person's other images, which nobody else may come closer than. The line
    for copy is halfway from the 99.9 % quantile to identical.
    """
    strangers = resemblance(real, real, own=real.labels)
    total, count = class_sums(real.f, real.labels)
    others = F.normalize(total[real.labels] - real.f)[count[real.labels] > 1]
    own = (others * real.f[count[real.labels] > 1]).sum(1)
    cap = quantile(own, 0.5) if len(own) else 1.0
    return strangers, {"centre": min(cap, quantile(strangers["centre"][0], 0.99)),
                       "image": min(cap, quantile(strangers["image"][0], 0.99)),
                       "copy": (1 + quantile(strangers["copy"][0], 0.999)) / 2}, cap


def judge(data, found, lines, with_quality):
    """One dataset's row of the report: quality and leakage, from its `resemblance` to real people.

    Clean: at most 1 % of the images are over the line for centres, or for images, as among real strangers,
    and none is a copy.
    """
    consistency, separability = consistency_separability(data.f, data.labels)
    over = {test: int((similarity > lines[test]).sum()) for test, (similarity, _) in found.items()}
    leaks = max(over["centre"], over["image"]) > 0.01 * len(data.f) or over["copy"] > 0
    return {"identities": len(data.faces.people), "images": len(data.f), "consistency": consistency,
            "separability": separability,
            "diversity": diversity(data.quality, data.labels) if with_quality else None,
            "leakage": {"verdict": "leaks" if leaks else "clean", "threshold": lines["centre"],
                        "q99": quantile(found["centre"][0], 0.99), "images_over": over["centre"],
                        "image_threshold": lines["image"], "images_over_image": over["image"],
                        "copy_threshold": lines["copy"], "copies": over["copy"]}}


def offenders(data, found, lines, real):
    """Rows of leaks.csv: each image over a line, which one, how far, whom and what image it resembles."""
    people = list(real.faces.people)
    for test, (similarity, which) in found.items():
        for i in (similarity > lines[test]).nonzero()[:, 0].tolist():
            j = which[i].item()
            person = j if test == "centre" else real.labels[j].item()
            image = "" if test == "centre" else real.faces.path(real.index[j])
            yield [data.faces.path(data.index[i]), test, f"{similarity[i]:.4f}", people[person], image]


# --------------------------------------------------------------------------------------------------- pictures


def histogram(path, series, line, width=720, height=280, bins=90):
    """Draws {name: cosines} as overlaid histograms, each with area one, and a line at one cosine."""
    low, high = min(*map(np.min, series.values()), line) - 0.02, max(*map(np.max, series.values()), line) + 0.02
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    shares = [np.histogram(values, bins, (low, high))[0] / len(values) for values in series.values()]
    x = np.linspace(0, width, bins + 1).repeat(2)
    for row, (name, share, colour) in enumerate(zip(series, shares, ("#2a6fb0", "#d1603d"))):
        y = height - 20 - (height - 60) * np.concatenate([[0], share.repeat(2), [0]]) / np.max(shares)
        pen.polygon([*zip(x, y)], fill=f"{colour}90")
        pen.text((10, 8 + 16 * row), name, colour)
    for value in np.arange(np.ceil(low * 5) / 5, high, 0.2):
        pen.text(((value - low) / (high - low) * width, height - 16), f"{value:.1f}", "black", anchor="ma")
    at = (line - low) / (high - low) * width
    pen.line((at, 40, at, height - 20), "black", 2)
    pen.text((at - 5, 40), f"line {line:.3f}", "black", anchor="ra")
    replace_file(path, lambda temporary: image.save(temporary, "PNG"))


def draw_pictures(out, name, data, found, real, strangers, line):
    """Writes nearest-real.png and closest.jpg: the eight images nearest to a real one, and that one below."""
    series = {"real images, to another person": strangers["centre"][0], name: found["centre"][0]}
    histogram(out / "nearest-real.png", {key: cos.cpu().numpy() for key, cos in series.items()}, line)
    similarity, which = found["image"]
    top = similarity.argsort(descending=True)[:8]
    images = np.concatenate([data.faces.__getitems__(data.index[top.cpu()])[0],
                             real.faces.__getitems__(real.index[which[top].cpu()])[0]])
    replace_file(out / "closest.jpg", lambda path: save_image(torch.from_numpy(images) / 255, path, "JPEG",
                                                              nrow=len(top)))


# ----------------------------------------------------------------------------------------------------- report


def table(header, rows):
    """Rows of values as a Markdown table whose columns also line up in a terminal; None is a dash."""
    texts = [["-" if v is None else str(v) if not isinstance(v, float) else f"{v:.3f}" if v > 0.01 else
              f"{v:.1e}" for v in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in texts]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


def verify(recognisers, paths):
    """Verification of each recogniser on each benchmark: rows for report.json, Markdown for report.md."""
    order = [*FIELD, *sorted(path.stem for path in paths)]
    names = sorted({path.stem for path in paths}, key=order.index)
    models = {folder: {} for folder in recognisers}
    for path in paths:
        for folder, (backbone, _, _) in recognisers.items():
            images, same = read_benchmark(path, backbone.config["size"])
            models[folder][path.stem] = verification(pair_distances(backbone, images), same)
    for scores in models.values():
        accuracies = [score["accuracy"] for score in scores.values()]
        scores["average"] = float(np.mean(accuracies)) if accuracies else None
    text = "Verification accuracy: mean ± standard deviation over folds\n\n" + table(
        ["recogniser", *(FIELD.get(name, name) for name in names), "average"],
        [[folder, *(f"{scores[name]['accuracy']:.2%} ± {scores[name]['std']:.2%}" for name in names),
          f"{scores['average']:.2%}" if names else "no benchmark: name some with --pairs"]
         for folder, scores in models.items()])
    if absent := [title for stem, title in FIELD.items() if stem not in names]:
        text += f"Absent, and not in the average: {', '.join(absent)}.\n\n"
    return models, text


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = args.fr or sorted(path.parent.as_posix() for path in Path("runs").glob("fr*/model.safetensors"))
    if not folders:
        fail("runs/: no recogniser in it; train one with fr_train.py, or name its folder with --fr")
    recognisers = {folder: load_recogniser(folder, device, args.bgr) for folder in folders}
    backbone, prototypes, meta = recognisers[folders[0]]
    sources, datasets, out = args.real or meta["data"], args.datasets, Path(args.out)
    if datasets is None:
        datasets = ["runs/virtual"] if sources and Path("runs/virtual/manifest.csv").is_file() else []
    if datasets and not sources:
        fail(f"{folders[0]}: unknown what it was trained on; name real faces with --real")
    models, text = verify(recognisers, [Path(path) for path in args.pairs or meta["val"]])
    report, leaks = {"judge": folders[0], "models": models, "datasets": {}}, []

    if datasets:
        real = embed_faces(backbone, prototypes, Faces(sources, backbone.config["size"]), device)
        if len(real.faces.people) < 2:
            fail(f"--real {' '.join(sources)}: expected two people or more, to know how alike strangers are")
        strangers, lines, cap = baseline(real)
        with_quality = len(prototypes.real) > 0                         # a published network has no such head
        report["real"] = judge(real, strangers, lines, with_quality)
        report["real"]["leakage"]["verdict"] = "baseline"
        for name in datasets:
            data = embed_faces(backbone, prototypes, Faces([name], backbone.config["size"]), device)
            found = resemblance(data, real)
            report["datasets"][name] = judge(data, found, lines, with_quality)
            leaks += [[name, *row] for row in offenders(data, found, lines, real)]
            draw_pictures(out / Path(name).name, name, data, found, real, strangers, lines["centre"])
        rows = {**report["datasets"], f"{' '.join(sources)} (real)": report["real"]}
        text += f"Quality of datasets, judged by {folders[0]}\n\n" + table(
            ["dataset", "people", "images", "consistency", "separability", "diversity"],
            [[name, *[*row.values()][:5]] for name, row in rows.items()])
        text += (f"Leakage, judged by {folders[0]}: images over the line that 99 % of real images keep to "
                 "strangers, by centre and by image; and copies\n\n") + table(
            ["dataset", "verdict", "line", "q99", "over", "image line", "over", "copy line", "copies"],
            [[name, *row["leakage"].values()] for name, row in rows.items()])
        if cap in lines.values():
            text += (f"The line is the cap, {cap:.3f}, people's median cosine to their own other images: this judge "
                     "finds strangers closer than that, so it cannot tell real people apart, or some are in the "
                     "real data twice.\n\n")
    write_csv(out / "leaks.csv", ["dataset", "file", "test", "similarity", "person", "image"], leaks)
    replace_file(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    replace_file(out / "report.md", lambda path: path.write_text(text))
    print(f"{text}wrote {out / 'report.json'}, report.md, leaks.csv and pictures")
    if args.strict and any(row["leakage"]["verdict"] == "leaks" for row in report["datasets"].values()):
        raise SystemExit(3)


if __name__ == "__main__":
    run(main)
