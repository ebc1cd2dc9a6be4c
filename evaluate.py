"""Accuracy of recognisers, and quality and leakage of face datasets, side by side in one report.

    python evaluate.py                      # every runs/fr*; runs/virtual against the real training set
    python evaluate.py --fr A B --pairs lfw.bin agedb_30.bin --datasets runs/virtual dcface/ --real casia/
    python evaluate.py --fr adaface.ckpt --bgr --datasets SET --real casia/ --strict   # exit code 3 on a leak

The first recogniser judges the datasets. Writes OUT/report.json and OUT/report.md (the tables it prints),
OUT/leaks.csv (every image that comes too close to a real person, and to whom) and two pictures for each set.
"""
import functools
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.utils import save_image
from tqdm import tqdm

from data import Faces, read_benchmark, write_csv
from model import DEVICE, embed, fail, load_recogniser, options, replace_file, run

parser, flag = options(__doc__)
flag("--fr", nargs="+", metavar="PATH", help="run folders or published .pth (default: every runs/fr*)")
flag("--bgr", action="store_true", help="published recognisers read BGR images (default: RGB)")
flag("--pairs", nargs="+", metavar="BIN", help="benchmarks (default: those of the first recogniser)")
flag("--datasets", nargs="*", metavar="DIR", help="sets to judge (default: runs/virtual if there)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the first recogniser's data)")
flag("--strict", action="store_true", help="exit with code 3 if a set leaks (default: report it)")
flag("--out", default="runs/report", metavar="DIR", help="report folder (default: %(default)s)")

FIELD = {"lfw": "LFW", "cfp_fp": "CFP-FP", "cplfw": "CPLFW", "agedb_30": "AgeDB", "calfw": "CALFW"}


def pair_distances(backbone, images):
    """Squared distances (P,) of the flip-summed unit embeddings of images 2p and 2p + 1, from 0 to 4."""
    return embed(backbone, images).unflatten(0, (-1, 2)).diff(dim=1).square().sum((1, 2)).cpu().numpy()


def verification(distance, same, folds=10):
    """Mean and standard deviation of the accuracy over contiguous folds, of distances (P,), same or not (P,).

    The field's protocol: each fold is judged at the first threshold that is best on all others."""
    right = (distance < np.arange(0, 4, 0.01)[:, None]) == np.asarray(same)     # (thresholds, P)
    tests = np.array_split(np.arange(len(same)), folds)
    accuracy = [right[np.delete(right, test, axis=1).sum(1).argmax(), test].mean() for test in tests]
    return {"accuracy": float(np.mean(accuracy)), "std": float(np.std(accuracy))}


# ------------------------------------------------------------------------------- quality and leakage of a set


# A dataset as a judge sees it, M images: f, unit embeddings (M, D); labels (M,); thumbs (M, 256), see
# `thumbnails`; quality, CR-FIQA scores (M,); faces, a `Faces`; index (M,), which of `faces` an image is.
FaceSet = namedtuple("FaceSet", "f labels thumbs quality faces index", defaults=(None, None, None))


def thumbnails(images):
    """16 x 16 grey versions (M, 256) of uint8 images (M, 3, S, S), of unit length, without their mean."""
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16).flatten(1)
    return F.normalize(grey - grey.mean(1, keepdim=True))


def embed_faces(backbone, prototypes, faces, device, some=None):
    """The FaceSet of `faces`, or of `some` of them (indices)."""
    order = (torch.arange(len(faces)) if some is None else some).split(512)
    columns = [(embed(backbone, images, unit=False) / 2, thumbnails(images.to(device)), i)
               for images, i in tqdm(faces.loader(order), "embedding", len(order), leave=False)]
    f, thumbs, i = map(torch.cat, zip(*columns))
    return FaceSet(F.normalize(f), faces.labels[i].to(device), thumbs, prototypes.quality(f)[:, 0], faces, i)


def nearest(queries, targets, labels=None, target_labels=None):
    """Cosine to, index of the nearest unit target (K, D) of another label, of queries (M, D): (M,) each."""
    own = queries.new_full((len(queries),), -1) if labels is None else labels           # -1: nobody's
    ids = torch.arange(len(targets), device=targets.device) if target_labels is None else target_labels
    chunk = max(1, 2 ** 26 // len(targets))                                     # cosines in memory at once
    found = [(f @ targets.T).masked_fill_(label[:, None] == ids, -2).max(1)
             for f, label in zip(queries.split(chunk), own.split(chunk))]
    return tuple(map(torch.cat, zip(*found)))


def quantile(values, q):
    """The q-quantile of a tensor of any length, which torch.quantile refuses above 16 million."""
    return np.quantile(values.cpu().numpy(), q).item()


def class_sums(f, labels):
    """Of each class: the sum of its embeddings (I, D), number of images (I,)."""
    count = torch.bincount(labels)
    return torch.zeros(len(count), f.shape[1], device=f.device).index_add_(0, labels, f), count


def person_moment(f, labels):
    """The second moment (D, D) of people, of trace 1, as unit embeddings f (M, D) of their images show it:
    the mean of f_i f_j^T over pairs of one person's images, which have nothing in common but the person."""
    total, count = class_sums(f, labels)
    weight = 1 / (count * (count - 1)).clamp(min=1)[:, None]
    # People with one image add nothing to the difference; all images decide, by 1e-3, if nobody has two.
    pairs = (total * weight).mT @ total - (f * weight[labels]).mT @ f + 1e-3 * f.mT @ f / len(f)
    return pairs / pairs.trace()


def consistency_separability(f, labels):
    """C, mean cosine of two images of a class (None without any); S, mean cosine distance of two centres."""
    total, count = class_sums(f, labels)
    within = ((total.square().sum(1) - count) / (count * (count - 1)))[count > 1]       # f_i f_j over i != j
    between = (F.normalize(total).sum(0).square().sum() - len(count)) / max(1, len(count) * (len(count) - 1))
    return within.mean().item() if len(within) else None, 1 - between.item()


def diversity(quality, labels):
    """D, variance of the quality scores (M,) within a class, mean over classes; None without any of two."""
    classes = quality[labels.argsort()].split(torch.bincount(labels).tolist())
    spread = [scores.var() for scores in classes if len(scores) > 1]
    return torch.stack(spread).mean().item() if spread else None


def resemblance(faces, real, own=None):
    """How near images come to real people: {test: (similarity, index in `real`) (M,) each}.

    centre: cosine to the nearest person's centre; image: to the nearest image; copy: of thumbnails, mirrored
    or not. Images of the person own (M,) are left out, if given."""
    mirrored = real.thumbs.view(-1, 16, 16).flip(2).flatten(1)
    copy, which = nearest(faces.thumbs, torch.cat([real.thumbs, mirrored]), own, real.labels.repeat(2))
    return {"centre": nearest(faces.f, F.normalize(class_sums(real.f, real.labels)[0]), own),
            "image": nearest(faces.f, real.f, own, real.labels), "copy": (copy, which % len(real.f))}


def baseline(real):
    """What real strangers look like to each other: their `resemblance`, a line for each test, and the cap.

    99 % of real images stay below the lines for centre and image, unless the cap is lower: the median cosine
    of an image to the centre of the person's others. That for copy is halfway from 99.9 % to identical."""
    strangers = resemblance(real, real, own=real.labels)
    total, count = class_sums(real.f, real.labels)
    own = F.cosine_similarity(total[real.labels] - real.f, real.f)[count[real.labels] > 1]
    cap = quantile(own, 0.5) if len(own) else 1.0
    lines = {test: min(cap, quantile(strangers[test][0], 0.99)) for test in ("centre", "image")}
    lines["copy"] = min(0.99, (1 + quantile(strangers["copy"][0], 0.999)) / 2)
    return strangers, lines, cap


def judge(data, found, lines, prototypes):
    """One dataset's row of the report: quality and leakage, from its `resemblance` to real people.

    Clean: at most 1 % of the images are over the line for centres, or for images, and none is a copy."""
    consistency, separability = consistency_separability(data.f, data.labels)
    over = {test: int((similarity > lines[test]).sum()) for test, (similarity, _) in found.items()}
    leaks = max(over["centre"], over["image"]) > 0.01 * len(data.f) or over["copy"] > 0
    leakage = {"verdict": "leaks" if leaks else "clean", "q99": quantile(found["centre"][0], 0.99),
               "threshold": lines["centre"], "images_over": over["centre"], "image_threshold": lines["image"],
               "images_over_image": over["image"], "copy_threshold": lines["copy"], "copies": over["copy"]}
    # Published networks have no quality head, and so no D.
    return {"identities": len(data.faces.people), "images": len(data.f), "consistency": consistency,
            "separability": separability, "leakage": leakage,
            "diversity": diversity(data.quality, data.labels) if len(prototypes.real) else None}


def offenders(data, found, lines, real):
    """Rows of leaks.csv: each image over a line, which one, how far, whom and what image it resembles."""
    people = list(real.faces.people)
    for test, (similarity, which) in found.items():
        for i in (similarity > lines[test]).nonzero()[:, 0].tolist():
            person = which[i] if test == "centre" else real.labels[which[i]]
            image = "" if test == "centre" else real.faces.path(real.index[which[i]])
            yield [data.faces.path(data.index[i]), test, f"{similarity[i]:.4f}", people[person], image]


def draw_pictures(out, data, found, real, strangers, line):
    """Writes nearest-real.png, a histogram of cosines to real people; closest.jpg, the nearest pairs."""
    image = Image.new("RGB", (720, 240), "white")                              # cosines -0.2 to 1, 600 a unit
    pen = ImageDraw.Draw(image, "RGBA")
    pen.text((10, 8), "blue: real images, to another person; red: this set; each to its own scale", "black")
    for cosines, colour in ((strangers["centre"][0], "#2a6fb090"), (found["centre"][0], "#d1603d90")):
        counts = torch.histc(cosines.cpu().clamp(-0.2, 1), 120, -0.2, 1)
        outline = (220 - 180 * counts / counts.max()).repeat_interleave(6)      # at each column of pixels
        pen.polygon([(0, 220), *enumerate(outline.tolist()), (720, 220)], fill=colour)
    for cosine in (0, 0.2, 0.4, 0.6, 0.8):
        pen.text((120 + 600 * cosine, 224), str(cosine), "black", anchor="ma")
    pen.line([(120 + 600 * line, 40), (120 + 600 * line, 220)], "black", 2)
    replace_file(out / "nearest-real.png", lambda path: image.save(path, "PNG"))
    top = found["image"][0].argsort(descending=True)[:8]
    pairs = ((data, top), (real, found["image"][1][top]))
    images = [torch.from_numpy(seen.faces.__getitems__(seen.index[i.cpu()])[0]) / 255 for seen, i in pairs]
    replace_file(out / "closest.jpg", lambda path: save_image(torch.cat(images), path, "JPEG", nrow=len(top)))


# ----------------------------------------------------------------------------------------------------- report


def table(title, rows):
    """A title and {row: {column: value}} as a Markdown table; None is a dash, nested values are left out."""
    text = lambda value: "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    line = lambda cells: "| " + " | ".join(f"{cell:>13}" for cell in cells) + " |\n"
    columns = [name for name, value in next(iter(rows.values())).items() if not isinstance(value, dict)]
    body = [line([name, *(text(row[column]) for column in columns)]) for name, row in rows.items()]
    return "".join([title, "\n\n", line(["", *columns]), line(["---"] * (len(columns) + 1)), *body, "\n"])


def verify(recognisers, paths):
    """Verification on benchmarks {name: path}: rows of report.json, and text, in the field's order."""
    models, rows = {folder: {} for folder in recognisers}, {}
    for name in sorted(paths, key=[*FIELD, *paths].index):
        read = functools.cache(functools.partial(read_benchmark, paths[name]))         # once for all
        for folder, (backbone, _, _) in recognisers.items():
            images, same = read(backbone.config["size"])
            models[folder][name] = verification(pair_distances(backbone, images), same)
    for folder, scores in models.items():
        average = float(np.mean([score["accuracy"] for score in scores.values()])) if scores else None
        rows[folder] = {FIELD.get(name, name): f"{100 * score['accuracy']:.2f} ± {100 * score['std']:.2f}"
                        for name, score in scores.items()}
        rows[folder]["average"] = f"{100 * average:.2f}" if scores else None
        scores["average"] = average
    absent = ", ".join(title for name, title in FIELD.items() if name not in paths) or "none"
    return models, table(f"Accuracy: mean ± standard deviation over folds, percent; absent: {absent}", rows)


def main():
    args = parser.parse_args()
    trained = sorted(path.parent.as_posix() for path in Path("runs").glob("fr*/model.safetensors"))
    folders = args.fr or trained or fail("runs/: no recogniser in it; train one, or name it with --fr")
    recognisers = {folder: load_recogniser(folder, DEVICE, args.bgr) for folder in folders}
    backbone, prototypes, meta = recognisers[folders[0]]
    sources = args.real or meta["data"]
    drawn = [path.parent.as_posix() for path in Path("runs").glob("virtual/manifest.csv") if sources]
    datasets = drawn if args.datasets is None else args.datasets
    if args.strict and not datasets:
        fail("--strict: there is no set to judge; sample one, or name it with --datasets")
    if datasets and not sources:
        fail(f"{folders[0]}: unknown what it was trained on; name real faces with --real")
    models, text = verify(recognisers, {Path(path).stem: path for path in args.pairs or meta["val"]})
    report = {"judge": folders[0], "models": models, "datasets": {}}
    leaks, out = [], Path(args.out)

    if datasets:
        see = lambda names: embed_faces(backbone, prototypes, Faces(names, backbone.config["size"]), DEVICE)
        real = see(sources)
        strangers, lines, cap = baseline(real)
        for number, name in enumerate(datasets, 1):
            data = see([name])
            found = resemblance(data, real)
            report["datasets"][name] = judge(data, found, lines, prototypes)
            leaks += ([name, *row] for row in offenders(data, found, lines, real))
            draw_pictures(out / f"{number}-{Path(name).name}", data, found, real, strangers, lines["centre"])
        report["real"] = judge(real, strangers, lines, prototypes)
        report["real"]["leakage"]["verdict"] = "baseline"
        rows = report["datasets"] | {"the real faces": report["real"]}
        text += table(f"Quality of datasets, judged by {folders[0]}", rows)
        bites = "; the CAP BITES: this judge cannot tell real people apart" if cap in lines.values() else ""
        text += table(f"Leakage: copies; images over the lines 99 % of real ones keep; cap {cap:.3f}{bites}",
                      {name: row["leakage"] for name, row in rows.items()})
    write_csv(out / "leaks.csv", ["dataset", "file", "test", "similarity", "person", "image"], leaks)
    replace_file(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    replace_file(out / "report.md", lambda path: path.write_bytes(text.encode()))
    print(f"{text}wrote {out / 'report.json'}, report.md, leaks.csv and pictures")
    if args.strict and any(row["leakage"]["verdict"] == "leaks" for row in report["datasets"].values()):
        raise SystemExit(3)


if __name__ == "__main__":
    run(main)
