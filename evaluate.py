"""Accuracy of recognisers, and quality and leakage of face datasets, side by side in one report.

    python evaluate.py                      # every runs/fr*; runs/virtual against the real training set
    python evaluate.py --fr A B --pairs lfw.bin agedb_30.bin --datasets runs/virtual dcface/ --real casia/
    python evaluate.py --fr adaface.ckpt --datasets SET --real casia/ --strict      # exit code 3 on a leak

The first recogniser judges the datasets. Writes OUT/report.json and OUT/report.md (the tables it prints),
OUT/leaks.csv (every image that comes too close to a real person, and to whom) and the nearest pairs as a
picture. fr_train.py tests with `verification`, and it and sample.py look at real faces by `embed_faces`.
"""
import argparse
import json
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from data import Faces, named_benchmarks, read_benchmark, write_csv
from model import DEVICE, class_sums, embed, fail, load_recogniser, replacing, run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", nargs="+", metavar="PATH", help="run folders or published weights (default: every runs/fr*)")
flag("--bgr", action=argparse.BooleanOptionalAction,
     help="published recognisers read BGR images (default: AdaFace's checkpoints do, others do not)")
flag("--pairs", nargs="*", metavar="BIN", help="benchmarks (default: those of the first recogniser)")
flag("--datasets", nargs="*", metavar="DIR", help="sets to judge (default: runs/virtual if there)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the first recogniser's data)")
flag("--strict", action="store_true", help="exit with code 3 if a set leaks (default: report it)")
flag("--out", default="runs/report", metavar="DIR", help="report folder (default: %(default)s)")

FIELD = {"lfw": "LFW", "cfp_fp": "CFP-FP", "cplfw": "CPLFW", "agedb_30": "AgeDB", "calfw": "CALFW"}


# ---------------------------------------------------------------------------------------------- verification

def pair_distances(backbone, images):
    """Squared distances (P,), from 0 to 4, of the flip-summed unit embeddings of images 2p and 2p + 1."""
    # Benchmarks show an image in several pairs. It is embedded once.
    distinct, which = images.flatten(1).unique(dim=0, return_inverse=True)
    f = embed(backbone, distinct.view(-1, *images.shape[1:]), exact=True)[which]
    return f.unflatten(0, (-1, 2)).diff(dim=1).square().sum((1, 2)).cpu().numpy()


def verification(distance, same, folds=10):
    """Mean and standard deviation of the accuracy over contiguous folds, of distances (P,), same or not (P,).

    The field's protocol: each fold is judged at the first threshold that is best on all others.
    """
    thresholds = np.arange(0, 4, 0.01)[:, None]
    right = (distance < thresholds) == np.asarray(same)                 # (thresholds, P)
    accuracy = []
    for test in np.array_split(np.arange(len(same)), folds):
        best = np.delete(right, test, axis=1).sum(1).argmax()
        accuracy.append(right[best, test].mean())
    return {"accuracy": float(np.mean(accuracy)), "std": float(np.std(accuracy))}


# ------------------------------------------------------------------------------- quality and leakage of a set

def nearest(queries, targets, labels, target_labels):
    """For each unit query (M, D), the highest cosine to a unit target of another label, and which target.

    Targets are (T, D); labels are (M,) and (T,). Both results are (M,).
    """
    found = []
    bound = 2 ** 30 if queries.is_cuda else 2 ** 26                     # of the cosines held at once
    chunk = max(1, bound // len(targets))
    for f, label in zip(queries.split(chunk), labels.split(chunk)):
        cosines = (f @ targets.mT).float()
        found.append(cosines.masked_fill_(label[:, None] == target_labels, -2).max(1))
    return tuple(map(torch.cat, zip(*found)))


# A set of M images as a judge sees it: f, unit embeddings (M, D); labels (M,); thumbs (M, 256), see
# `thumbnails`; quality, CR-FIQA scores (M,); faces, a `Faces`; index (M,), each image's index there.
FaceSet = namedtuple("FaceSet", "f labels thumbs quality faces index", defaults=(None, None, None, None))


def thumbnails(images):
    """16 x 16 grey versions (M, 256) of uint8 images (M, 3, S, S), without their mean, of unit length."""
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16).flatten(1)
    return F.normalize(grey - grey.mean(1, keepdim=True))


def embed_faces(backbone, prototypes, faces):
    """The FaceSet of `faces`, in half precision on a GPU."""
    kind = torch.half if DEVICE.type == "cuda" else torch.float
    columns = []
    for images, i in faces.scan(torch.arange(len(faces)), "embedding"):
        f = embed(backbone, images, unit=False) / 2             # the mean, as `certainty` learned it
        columns.append((F.normalize(f).to(kind), thumbnails(images.to(DEVICE)).to(kind),
                        prototypes.certainty(f)[:, 0], i))
    f, thumbs, quality, i = (torch.cat(column) for column in zip(*columns))
    return FaceSet(f, faces.labels[i].to(DEVICE), thumbs, quality, faces, i)


def quantile(values, q):
    """The q-quantile of a tensor of any length; torch.quantile refuses more than 16 million values."""
    return np.quantile(values.cpu().numpy(), q).item()


def consistency_separability(f, labels):
    """C, mean cosine of two images of a class (None if no class has two); S, mean cosine distance of centres.

    If m unit vectors f_i have the sum s, then s^2 = m + sum of f_i f_j over i != j. So the mean cosine of two
    of them is (s^2 - m) / (m (m - 1)).
    """
    def mean_cosine(sum_of, m):
        return (sum_of.square().sum(-1) - m) / (m * (m - 1))

    total, count = class_sums(f, labels)
    total, count = total[count > 0], count[count > 0]           # leaves out who has no readable image
    several = count > 1
    within = mean_cosine(total[several], count[several])
    between = mean_cosine(F.normalize(total).sum(0), len(count)) if len(count) > 1 else torch.zeros(())
    return within.mean().item() if several.any() else None, 1 - between.item()


def diversity(quality, labels):
    """D, variance of the quality scores (M,) within a class, mean over classes; None if none has two."""
    classes = quality[labels.argsort()].split(torch.bincount(labels).tolist())
    spread = [scores.var() for scores in classes if len(scores) > 1]
    return torch.stack(spread).mean().item() if spread else None


def resemblance(faces, real, own=None):
    """How near each image comes to real people: {test: (cosine, person or image of `real`), (M,) each}.

    centre: to the nearest person's centre. image: to the nearest image. copy: to the nearest thumbnail,
    mirrored or not, if `faces` have thumbnails. own (M,), if given, is each image's own person, who is left
    out for it.
    """
    own = torch.full_like(faces.labels, -1) if own is None else own             # -1 is nobody's label
    centres = F.normalize(class_sums(real.f, real.labels)[0]).to(real.f)
    people = torch.arange(len(centres), device=own.device)
    found = {"centre": nearest(faces.f, centres, own, people),
             "image": nearest(faces.f, real.f, own, real.labels)}
    if faces.thumbs is not None:
        mirrored = real.thumbs.view(-1, 16, 16).flip(2).flatten(1)
        cosine, which = nearest(faces.thumbs, torch.cat([real.thumbs, mirrored]), own, real.labels.repeat(2))
        found["copy"] = cosine, which % len(real.f)
    return found


def thresholds_of(real, strangers):
    """{test: cosine} that 99 % of real images stay below with other people, and the cap on these thresholds.

    The cap is the median cosine of an image to the centre of its person's other images. Without it, a weak
    judge or a set with wrong labels would let copies pass. The threshold of copies lies halfway between what
    99.9 % stay below and 1, at most 0.99.
    """
    if len(real.faces.people) < 2:
        fail("--real: expected two people or more; with one, strangers are unknown")
    total, count = class_sums(real.f, real.labels)
    to_rest = F.cosine_similarity(total[real.labels] - real.f, real.f)[count[real.labels] > 1]
    cap = quantile(to_rest, 0.5) if len(to_rest) else 1.0
    thresholds = {test: min(cap, quantile(cosine, 0.99)) for test, (cosine, _) in strangers.items()}
    if "copy" in strangers:
        thresholds["copy"] = min(0.99, (1 + quantile(strangers["copy"][0], 0.999)) / 2)
    return thresholds, cap


def identities_over(labels, found, threshold):
    """How many identities have most of their images over the threshold to one and the same real person."""
    cosine, person = found
    over = cosine > threshold
    pairs, count = torch.stack([labels[over], person[over]]).unique(dim=1, return_counts=True)
    return int((2 * count > torch.bincount(labels)[pairs[0]]).sum())


def report_row(data, found, thresholds, prototypes):
    """One dataset's row of the report: quality, and leakage from its resemblance to real people.

    Clean: at most 1 % of the images are over the threshold to a centre, and to an image; at most 0.5 % of the
    identities are over it to one person with most of their images; at most one image in 10,000 is a copy.
    """
    consistency, separability = consistency_separability(data.f, data.labels)
    people, images = len(data.faces.people), len(data.f)
    over = {test: int((cosine > thresholds[test]).sum()) for test, (cosine, _) in found.items()}
    over["identity"] = identities_over(data.labels, found["centre"], thresholds["centre"])
    allowed = dict(centre=0.01 * images, image=0.01 * images, copy=1e-4 * images, identity=0.005 * people)
    leaks = any(over[test] > most for test, most in allowed.items())
    leakage = {
        "verdict": "leaks" if leaks else "clean",
        "median": quantile(found["centre"][0], 0.5),
        "q99": quantile(found["centre"][0], 0.99),
        "threshold": thresholds["centre"],
        "images_over": over["centre"],
        "identities_over": over["identity"],
        "image_threshold": thresholds["image"],
        "images_over_image": over["image"],
        "copy_threshold": thresholds["copy"],
        "copies": over["copy"]}
    return {
        "identities": people,
        "images": images,
        "consistency": consistency,
        "separability": separability,
        # Published networks have no quality head, and so no D.
        "diversity": diversity(data.quality, data.labels) if len(prototypes.real) else None,
        "leakage": leakage}


def offenders(data, found, thresholds, real):
    """Rows of leaks.csv for each image over a threshold: file, test, cosine, real person, real image."""
    people, labels = [*real.faces.people], real.labels.cpu()
    for test, columns in found.items():
        cosine, which = (column.cpu() for column in columns)
        for i in (cosine > thresholds[test]).nonzero()[:, 0].tolist():
            person, image = which[i], ""
            if test != "centre":
                person, image = labels[which[i]], real.faces.path(real.index[which[i]])
            yield [data.faces.path(data.index[i]), test, f"{cosine[i]:.4f}", people[person], image]


def draw_closest(path, data, found, real):
    """Writes a picture of the eight images nearest to a real image, above the real images."""
    cosine, which = found["image"]
    top = cosine.argsort(descending=True)[:8]
    images = [data.faces[i][0] for i in data.index[top.cpu()]]
    images += [real.faces[i][0] for i in real.index[which[top].cpu()]]
    with replacing(path) as temporary:
        save_image(torch.from_numpy(np.stack(images)) / 255, temporary, "JPEG", nrow=len(top))


# ----------------------------------------------------------------------------------------------------- report

def averaged_of(benchmarks):
    """The benchmarks that are averaged: those of the field's five, so that averages compare, or else all."""
    return [name for name in FIELD if name in benchmarks] or [*benchmarks]


def verify(recognisers, benchmarks, averaged):
    """{recogniser: {benchmark: {accuracy, std}, average: accuracy}} on benchmarks {name: path}."""
    models = {folder: {} for folder in recognisers}
    read = lru_cache(1)(read_benchmark)                         # again only where the size changes
    for name in dict.fromkeys([*averaged, *benchmarks]):        # in the field's order
        for folder, (backbone, _, _) in recognisers.items():
            images, same = read(benchmarks[name], backbone.config["size"])
            models[folder][name] = verification(pair_distances(backbone, images), same)
    for scores in models.values():
        scores["average"] = float(np.mean([scores[name]["accuracy"] for name in averaged]))
    return models


def table(title, rows):
    """A title and {row: {column: value}} as a Markdown table; None is a dash, nested values are left out."""
    def cell(value):
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = [name for name, value in [*rows.values()][0].items() if not isinstance(value, dict)]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row[column]) for column in columns)] for name, row in rows.items()]
    body = ["| " + " | ".join(text.rjust(13) for text in line) + " |" for line in lines]
    return "\n".join([title, "", *body, "\n"])


def describe(report, averaged):
    """The report as Markdown tables."""
    text = ""
    if averaged:
        rows = {}
        for folder, scores in report["models"].items():
            rows[folder] = {FIELD.get(name, name): f"{100 * score['accuracy']:.2f} ± {100 * score['std']:.2f}"
                            for name, score in scores.items() if name != "average"}
            rows[folder]["average"] = f"{100 * scores['average']:.2f}"
        absent = ", ".join(title for name, title in FIELD.items() if name not in averaged) or "none"
        text += table("Accuracy: mean ± standard deviation over folds, percent; "
                      f"average of {', '.join(averaged)}; absent: {absent}", rows)
    if report["datasets"]:
        rows = report["datasets"] | {"the real faces": report["real"]}
        text += table(f"Quality of datasets, judged by {report['judge']}", rows)
        leakage = {name: row["leakage"] for name, row in rows.items()}
        text += table(f"Leakage: images and identities over the thresholds, copies; {report['cap']}", leakage)
    return text


def main():
    args = parser.parse_args()
    out = Path(args.out)

    # Who judges what, by which real faces.
    folders = args.fr or sorted(path.parent.as_posix() for path in Path("runs").glob("fr*/model.safetensors"))
    if not folders:
        fail("runs/: no recogniser in it; train one, or name it with --fr")
    recognisers = {folder: load_recogniser(folder, args.bgr) for folder in folders}
    backbone, prototypes, meta = recognisers[folders[0]]
    sources = args.real or meta["data"]
    datasets = args.datasets
    if datasets is None:
        datasets = ["runs/virtual"] if Path("runs/virtual/manifest.csv").is_file() and sources else []
    benchmarks = named_benchmarks(meta["val"] if args.pairs is None else args.pairs)
    if not datasets and (args.strict or not benchmarks):
        fail("there is no set to judge: sample one, name one with --datasets, or benchmarks with --pairs")
    if datasets and not sources:
        fail(f"{folders[0]}: unknown what it was trained on; name real faces with --real")

    averaged = averaged_of(benchmarks)
    models = verify(recognisers, benchmarks, averaged) if benchmarks else {}
    report, leaks = {"judge": folders[0], "models": models, "datasets": {}}, []
    if datasets:
        real = embed_faces(backbone, prototypes, Faces(sources, backbone.config["size"]))
        strangers = resemblance(real, real, real.labels)
        thresholds, cap = thresholds_of(real, strangers)
        report["cap"] = f"cap {cap:.3f}"
        if cap in thresholds.values():
            report["cap"] += "; the CAP APPLIES: the judge is weak, or people are labelled wrongly"
        for number, name in enumerate(datasets, 1):
            data = embed_faces(backbone, prototypes, Faces([name], backbone.config["size"]))
            found = resemblance(data, real)
            report["datasets"][name] = report_row(data, found, thresholds, prototypes)
            leaks += ([name, *row] for row in offenders(data, found, thresholds, real))
            draw_closest(out / f"{number}-{Path(name).name}" / "closest.jpg", data, found, real)
        report["real"] = report_row(real, strangers, thresholds, prototypes)
        report["real"]["leakage"]["verdict"] = "baseline"

    text = describe(report, averaged)
    print(text)
    write_csv(out / "leaks.csv", ["dataset", "file", "test", "similarity", "person", "image"], leaks)
    for name, content in (("report.json", json.dumps(report, indent=1)), ("report.md", text)):
        with replacing(out / name) as temporary:
            temporary.write_bytes(content.encode(errors="backslashreplace"))
    print(f"wrote {out / 'report.json'}, report.md, leaks.csv and pictures")
    if args.strict and any(row["leakage"]["verdict"] == "leaks" for row in report["datasets"].values()):
        raise SystemExit(3)


if __name__ == "__main__":
    run(main, "name one set at a time with --datasets")
