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


def judge(data, found, lines, prototypes):
    """One dataset's row of the report: quality and leakage, from its `resemblance` to real people.

    Clean: at most 1 % of the images are over the line for centres, or for images, as among real strangers,
    and none is a copy.
    """
    consistency, separability = consistency_separability(data.f, data.labels)
    has_quality = len(prototypes.real) > 0                              # published networks have no such head
    over = {test: int((similarity > lines[test]).sum()) for test, (similarity, _) in found.items()}
    leaks = max(over["centre"], over["image"]) > 0.01 * len(data.f) or over["copy"] > 0
    return {"identities": len(data.faces.people), "images": len(data.f), "consistency": consistency,
            "separability": separability,
            "diversity": diversity(data.quality, data.labels) if has_quality else None,
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


def histogram(path, series, line, width=720, height=260, bins=90):
    """Draws {name: cosines} as overlaid histograms, each with area one, and a line at one cosine."""
    everything = np.concatenate([*series.values(), [line]])
    low, high = everything.min() - 0.02, everything.max() + 0.02
    x_of = lambda cosine: (cosine - low) / (high - low) * width
    shares = [np.histogram(values, bins, (low, high))[0] / len(values) for values in series.values()]
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    for row, (name, share, colour) in enumerate(zip(series, shares, ("#2a6fb0", "#d1603d"))):
        y = height - 20 - (height - 60) * np.array([0, *share.repeat(2), 0]) / np.max(shares)
        pen.polygon([*zip(np.linspace(0, width, bins + 1).repeat(2), y)], fill=f"{colour}90")
        pen.text((10, 8 + 16 * row), name, colour)
    for cosine in np.arange(np.ceil(low * 5) / 5, high, 0.2):
        pen.text((x_of(cosine), height - 16), f"{cosine:.1f}", "black", anchor="ma")
    pen.line((x_of(line), 40, x_of(line), height - 20), "black", 2)
    replace_file(path, lambda temporary: image.save(temporary, "PNG"))


def draw_pictures(out, name, data, found, real, strangers, line):
    """Writes nearest-real.png, and closest.jpg: the eight images nearest to a real one, which is below each."""
    series = {"real images, to another person": strangers["centre"][0], name: found["centre"][0]}
    histogram(out / "nearest-real.png", {key: cosines.cpu().numpy() for key, cosines in series.items()}, line)
    similarity, which = (column.cpu() for column in found["image"])
    top = similarity.argsort(descending=True)[:8]
    pairs = np.concatenate([data.faces.__getitems__(data.index[top])[0],
                            real.faces.__getitems__(real.index[which[top]])[0]])
    replace_file(out / "closest.jpg", lambda path: save_image(torch.from_numpy(pairs) / 255, path, "JPEG",
                                                              nrow=len(top)))


# ----------------------------------------------------------------------------------------------------- report


def table(header, rows):
    """Rows of values as a Markdown table; None is a dash."""
    text = lambda value: "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    lines = [header, ["---"] * len(header), *([text(value) for value in row] for row in rows)]
    return "".join("| " + " | ".join(f"{cell:>13}" for cell in line) + " |\n" for line in lines) + "\n"


def verify(recognisers, paths):
    """Verification of each recogniser on each benchmark: rows for report.json, Markdown for report.md."""
    rank = {name: i for i, name in enumerate(FIELD)}
    names = sorted(paths, key=lambda name: (rank.get(name, len(rank)), name))
    models = {}
    for folder, (backbone, _, _) in recognisers.items():
        models[folder] = {name: verification(pair_distances(backbone, images), same) for name in names
                          for images, same in [read_benchmark(paths[name], backbone.config["size"])]}
        accuracies = [score["accuracy"] for score in models[folder].values()]
        models[folder]["average"] = float(np.mean(accuracies)) if accuracies else None
    absent = [title for name, title in FIELD.items() if name not in names]
    return models, "Verification accuracy: mean ± standard deviation over folds, percent\n\n" + table(
        ["recogniser", *(FIELD.get(name, name) for name in names), "average"],
        [[folder, *(f"{100 * scores[name]['accuracy']:.2f} ± {100 * scores[name]['std']:.2f}" for name in names),
          f"{100 * scores['average']:.2f}" if names else None] for folder, scores in models.items()]
    ) + f"Absent, and not in the average: {', '.join(absent) or 'none'}.\n\n"


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
    models, text = verify(recognisers, {Path(path).stem: path for path in args.pairs or meta["val"]})
    report, leaks = {"judge": folders[0], "models": models, "datasets": {}}, []

    if datasets:
        see = lambda sources: embed_faces(backbone, prototypes, Faces(sources, backbone.config["size"]), device)
        real = see(sources)
        if len(real.faces.people) < 2:
            fail(f"--real {' '.join(sources)}: expected two people or more, to know how alike strangers are")
        strangers, lines, cap = baseline(real)
        rows = report["datasets"]
        for name in datasets:
            data = see([name])
            found = resemblance(data, real)
            rows[name] = judge(data, found, lines, prototypes)
            leaks += [[name, *row] for row in offenders(data, found, lines, real)]
            draw_pictures(out / Path(name).name, name, data, found, real, strangers, lines["centre"])
        report["real"] = judge(real, strangers, lines, prototypes)
        report["real"]["leakage"]["verdict"] = "baseline"
        named = [*rows.items(), ("the real faces", report["real"])]
        text += f"Quality of datasets, judged by {folders[0]}\n\n" + table(
            ["dataset", *[*report["real"]][:5]], [[name, *[*row.values()][:5]] for name, row in named])
        text += (f"Leakage, judged by {folders[0]}: images over the lines that 99 % of real images keep to strangers, "
                 "by centre and by image; and copies\n\n") + table(
            ["dataset", *report["real"]["leakage"]], [[name, *row["leakage"].values()] for name, row in named])
        if cap in lines.values():
            text += (f"A line is the cap, {cap:.3f}, people's median cosine to their own other images: strangers come "
                     "closer, so this judge cannot tell real people apart, or some are in the real data twice.\n\n")
    write_csv(out / "leaks.csv", ["dataset", "file", "test", "similarity", "person", "image"], leaks)
    replace_file(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    replace_file(out / "report.md", lambda path: path.write_text(text))
    print(f"{text}wrote {out / 'report.json'}, report.md, leaks.csv and pictures")
    if args.strict and any(row["leakage"]["verdict"] == "leaks" for row in report["datasets"].values()):
        raise SystemExit(3)


if __name__ == "__main__":
    run(main)
