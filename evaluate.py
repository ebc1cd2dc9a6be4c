"""Accuracy of recognisers, and quality and leakage of face datasets, side by side in one report.

    python evaluate.py                      # every runs/fr*; runs/virtual against the real training set
    python evaluate.py --fr A B --pairs lfw.bin agedb_30.bin --datasets runs/virtual dcface/ --real casia/
    python evaluate.py --audit-fr adaface.ckpt --bgr --strict     # a second judge; exit code 3 if a set leaks

The first recogniser judges the datasets. Writes OUT/report.json and OUT/report.md (the tables it prints),
OUT/leaks.csv (every image that comes too close to a real person, and to whom) and pictures.
"""
import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import Faces, contact_sheet, read_benchmark, write_csv, yaw_of
from model import embed, fail, load_recogniser, replace_file, run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", nargs="+", metavar="PATH", help="run folders or published .pth (default: every runs/fr*)")
flag("--bgr", action="store_true", help="published recognisers read BGR images (default: RGB)")
flag("--pairs", nargs="+", metavar="FILE", help=".bin or pairs.txt (default: those of the first recogniser)")
flag("--images", metavar="DIR", help="faces that a pairs.txt names (default: the folder it is in)")
flag("--datasets", nargs="*", metavar="DIR", help="sets to judge (default: runs/virtual if there)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the first recogniser's data)")
flag("--audit-fr", metavar="PATH", help="a second recogniser that judges the sets too (default: none)")
flag("--strict", action="store_true", help="exit with code 3 if a set leaks (default: report it)")
flag("--out", default="runs/report", metavar="DIR", help="report folder (default: %(default)s)")

FIELD = {"lfw": "LFW", "cfp_fp": "CFP-FP", "cplfw": "CPLFW", "agedb_30": "AgeDB", "calfw": "CALFW"}
PUBLISHED = {                               # of IR-SE50 with AdaFace, percent; the VIGFace authors' README
    "CASIA-WebFace (real), 0.49M": (99.40, 96.63, 90.23, 94.68, 93.70, 94.93),
    "DCFace, 0.5M": (98.55, 85.33, 82.62, 89.70, 91.60, 89.56),
    "Arc2Face, 0.5M": (98.81, 91.87, 85.16, 90.18, 92.63, 91.73),
    "VIGFace(S), 10K x 50": (99.02, 95.09, 87.72, 90.95, 90.00, 92.56),
    "VIGFace(B), 60K x 20": (99.48, 97.07, 90.15, 93.62, 92.88, 94.64),
    "VIGFace(L), 120K x 50": (99.33, 97.31, 91.12, 93.82, 92.95, 94.91)}
COLOURS = "#2a6fb0", "#d1603d", "#3d9a50", "#8556a8"

# ----------------------------------------------------------------------------------------------- verification


def pair_distances(backbone, images):
    """Squared distances (P,) of the flip-summed unit embeddings of images 2p and 2p + 1, from 0 to 4."""
    f = embed(backbone, images)
    return (f[0::2] - f[1::2]).square().sum(1).cpu().numpy()


def verification(distance, same, folds=10):
    """Scores, as fractions, of distances (P,) of pairs that show the same person or not (P,).

    The field's protocol: thresholds from 0 to 4 by 0.01; ten contiguous folds, each judged at the first
    threshold that is best on the other nine; mean and standard deviation over folds. TAR at a FAR: the most
    same pairs accepted while no larger a share of others is. EER: where false accepts equal false rejects.
    """
    same = np.asarray(same)
    correct = (distance < np.arange(0, 4, 0.01)[:, None]) == same               # (thresholds, P)
    sizes = [len(fold) for fold in np.array_split(same, folds)]
    starts = np.cumsum([0, *sizes[:-1]])
    hits = np.add.reduceat(correct, starts, axis=1, dtype=np.int64)             # (thresholds, folds)
    best = (hits.sum(1, keepdims=True) - hits).argmax(0)                        # on the other nine, per fold
    accuracy = hits[best, np.arange(folds)] / sizes
    cuts = np.append(-1, np.unique(distance))                                   # accepted: distance <= cut
    tar, far = (np.searchsorted(np.sort(kind), cuts, "right") / len(kind)
                for kind in (distance[same], distance[~same]))
    crossing = np.abs(far - (1 - tar)).argmin()
    return {"accuracy": float(accuracy.mean()), "std": float(accuracy.std()),
            **{f"tar_at_far_{limit:.0e}": float(tar[far <= limit].max()) for limit in (1e-3, 1e-4)},
            "eer": float(far[crossing] + 1 - tar[crossing]) / 2, "threshold": float(best.mean() / 100)}


def bootstrap_interval(accuracies, counts, draws=10_000):
    """95 % interval of the mean of accuracies over `counts` pairs each; resampled answers are binomial."""
    generator = np.random.default_rng(0)
    means = np.mean([generator.binomial(P, a, draws) / P for a, P in zip(accuracies, counts)], 0)
    return np.quantile(means, (0.025, 0.975)).tolist()


# ------------------------------------------------------------------------------- quality and leakage of a set


class FaceSet(NamedTuple):
    """A dataset as a judge sees it: M images of I people."""
    faces: Faces
    f: torch.Tensor                     # unit embeddings (M, D)
    labels: torch.Tensor                # (M,)
    quality: torch.Tensor               # CR-FIQA scores (M,)
    thumbs: torch.Tensor                # (M, 256), see `thumbnails`
    source: torch.Tensor                # (M,), which of `faces`


def thumbnails(images):
    """16 x 16 grey versions of uint8 images (M, 3, S, S), unit length without their mean (M, 256).

    Blind to colour balance, brightness, contrast and encoding, and no recogniser is asked: copies show.
    """
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16).flatten(1)
    return F.normalize(grey - grey.mean(1, keepdim=True))


def embed_faces(backbone, prototypes, faces, device):
    """The FaceSet of `faces`."""
    columns = []
    loader = faces.loader(torch.arange(len(faces)).split(512))
    for images, i in tqdm(loader, "embedding", -(-len(faces) // 512), leave=False):
        f = embed(backbone, images.to(device), unit=False) / 2
        columns.append((F.normalize(f), faces.labels[i].to(device), prototypes.quality(f)[:, 0],
                        thumbnails(images.to(device)), i))
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


def class_centres(f, labels):
    """Of each class: unit centre (I, D), the sum of its embeddings (I, D), number of images (I,)."""
    count = torch.bincount(labels)
    total = torch.zeros(len(count), f.shape[1], device=f.device).index_add_(0, labels, f)
    return F.normalize(total), total, count


def consistency_separability(f, labels):
    """C, mean cosine of two images of a class (None without any); S, mean cosine distance of two centres."""
    centres, total, count = class_centres(f, labels)
    many, classes = count > 1, len(count)
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
    centres = class_centres(real.f, real.labels)[0]
    mirrored = faces.thumbs.view(-1, 16, 16).flip(2).flatten(1)
    straight, turned = (nearest(thumbs, real.thumbs, own, real.labels) for thumbs in (faces.thumbs, mirrored))
    copy = [torch.where(straight[0] > turned[0], a, b) for a, b in zip(straight, turned)]
    return {"centre": nearest(faces.f, centres, own), "copy": copy,
            "image": nearest(faces.f, real.f, own, real.labels)}


def quantile(values, q):
    """The q-quantile of a tensor of any length, which torch.quantile refuses above 16 million."""
    return np.quantile(values.cpu().numpy(), q).item()


def baseline_lines(real):
    """What real strangers look like to each other: their `resemblance`, and the lines drawn from it.

    99 % of real images stay under the lines for centre and image, of real people under the one for people
    (cosine of two centres). The line for copy is halfway from the 99.9 % quantile to identical.
    """
    strangers, (centres, _, _) = resemblance(real, real, own=real.labels), class_centres(real.f, real.labels)
    people, _ = nearest(centres, centres, torch.arange(len(centres), device=centres.device))
    return strangers, {"centre": quantile(strangers["centre"][0], 0.99), "people": quantile(people, 0.99),
                       "image": quantile(strangers["image"][0], 0.99),
                       "copy": (1 + quantile(strangers["copy"][0], 0.999)) / 2}


def judge(data, found, lines, prototypes, own=False):
    """One dataset's row of the report: quality and leakage, from its `resemblance` to real people.

    Clean: no larger a share of the images than of real strangers (1 %) is over the line for centres, or for
    images, and none is a copy. Outliers are nearer to another identity's centre than to their own without
    them; near-duplicates are identities nearer to another than 99 % of real people are. own: the set was
    drawn from these prototypes, and own_top1 is the share of it nearest to the right virtual one.
    """
    consistency, separability = consistency_separability(data.f, data.labels)
    centres, total, count = class_centres(data.f, data.labels)
    beside, _ = nearest(centres, centres, torch.arange(len(centres), device=centres.device))
    own_centre = F.normalize(total[data.labels] - data.f)
    astray = (own_centre * data.f).sum(1) < nearest(data.f, centres, data.labels)[0]
    names, own_top1 = list(data.faces.names), None
    if own and all(name[0] == "v" and name[1:].isdigit() for name in names):
        owner = torch.tensor([int(name[1:]) for name in names], device=data.f.device)[data.labels]
        top = nearest(data.f, prototypes.unit()[len(prototypes.real):])[1]
        own_top1 = (top == owner).float().mean().item()
    over = {test: int((value > lines[test]).sum()) for test, (value, _) in found.items()}
    q99 = quantile(found["centre"][0], 0.99)
    close = max(over["centre"], over["image"]) > 0.01 * len(data.f) or q99 > lines["centre"]
    return {"identities": len(names), "images": len(data.f), "consistency": consistency,
            "separability": separability, "separability_nearest": 1 - beside.mean().item(),
            "diversity": diversity(data.quality, data.labels) if len(prototypes.real) else None,
            "own_top1": own_top1, "near_duplicates": int((beside > lines["people"]).sum()),
            "outliers": int((astray & (count[data.labels] > 1)).sum()),
            "leakage": {"verdict": "leaks" if close or over["copy"] else "clean",
                        "threshold": lines["centre"], "q99": q99, "baseline_q99": lines["centre"],
                        "images_over": over["centre"],
                        "image_threshold": lines["image"], "images_over_image": over["image"],
                        "copy_threshold": lines["copy"], "copies": over["copy"]}}


def leaks(data, found, lines, real):
    """Rows of leaks.csv: each image over a line, which one, how far, whom and what image it resembles."""
    people = list(real.faces.names)
    for test, (value, which) in found.items():
        for i in (value > lines[test]).nonzero().flatten().tolist():
            j = which[i].item()
            who, image = (j, "") if test == "centre" else (real.labels[j], real.faces.files[real.source[j]])
            yield [data.faces.files[data.source[i]], test, f"{value[i]:.4f}", people[who], image]


# --------------------------------------------------------------------------------------------------- pictures


def histogram(path, series, marks, width=720, height=280, margin=30):
    """Draws {name: cosines} as overlaid histograms, each with area one, and {name: cosine} as lines."""
    low, high = (pick([pick(values) for values in series.values()]) for pick in (min, max))
    low, high = min(low, *marks.values()) - 0.02, max(high, *marks.values()) + 0.02
    x_of = lambda value: margin + (value - low) / (high - low) * (width - 2 * margin)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    shares = {name: np.histogram(values, 90, (low, high))[0] / len(values) for name, values in series.items()}
    scale = (height - 2 * margin) / max(share.max() for share in shares.values())
    for row, (name, share) in enumerate(shares.items()):
        xs = np.repeat(x_of(np.linspace(low, high, 91)), 2)
        ys = height - margin - scale * np.concatenate([[0], np.repeat(share, 2), [0]])
        pen.polygon(list(zip(xs, ys)), fill=COLOURS[row] + "90")
        pen.text((margin, 8 + 18 * row), name, COLOURS[row], font_size=14)
    for name, value in marks.items():
        pen.line((x_of(value), margin, x_of(value), height - margin), "black", 2)
        pen.text((x_of(value) - 6, margin), f"{name} {value:.3f}", "black", font_size=14, anchor="ra")
    for tick in np.arange(np.ceil(low * 5) / 5, high, 0.2):
        at = x_of(tick), height - margin + 4
        pen.text(at, f"{round(tick, 1) + 0:.1f}", "black", font_size=14, anchor="ma")
    pen.line((margin, height - margin, width - margin, height - margin), "black")
    replace_file(path, lambda temporary: image.save(temporary, "PNG"))


def choose(data, people, each):
    """For each of the first people the places (<= each,) of some images, by yaw if landmarks are known."""
    for person in range(min(people, len(data.faces.names))):
        of = (data.labels == person).nonzero().flatten().cpu()
        by_yaw = of[yaw_of(data.faces.landmarks[data.source[of]]).argsort(stable=True)]
        yield by_yaw[torch.linspace(0, len(of) - 1, min(each, len(of))).long()]


def similarity_matrix(path, real, virtual, people=12, each=4, cell=6):
    """Draws the cosines of images of real and virtual people to each other: white is 1, black 0 or less."""
    parts = [data.f[torch.cat(list(choose(data, people, each)))] for data in (real, virtual)]
    cos = (torch.cat(parts) @ torch.cat(parts).T).clamp(0, 1).mul(255).byte().cpu().numpy()
    image, edge = Image.fromarray(cos.repeat(cell, 0).repeat(cell, 1)).convert("RGB"), cell * len(parts[0])
    pen = ImageDraw.Draw(image)
    pen.line((edge, 0, edge, image.height), COLOURS[1], 2)
    pen.line((0, edge, image.width, edge), COLOURS[1], 2)
    for at, text in ((4, "real"), (edge + 4, "virtual")):
        pen.text((at, at), text, "white", font_size=14, stroke_width=2, stroke_fill="black")
    replace_file(path, lambda temporary: image.save(temporary, "PNG"))


def draw_pictures(out, name, data, found, real, strangers, lines):
    """Pictures of one dataset: nearest-real.png, similarity.png, multiview.jpg and closest.jpg."""
    values = {"real images, to another person": strangers["centre"][0], name: found["centre"][0]}
    histogram(out / "nearest-real.png", {key: value.cpu().numpy() for key, value in values.items()},
              {"99 % of real": lines["centre"]})
    similarity_matrix(out / "similarity.png", real, data)
    picture = lambda data, i: data.faces.__getitems__([data.source[i]])[0][0]
    centres = class_centres(data.f, data.labels)[0]
    contact_sheet(out / "multiview.jpg", [
        [(picture(data, i), f"{data.f[i] @ centres[data.labels[i]]:.2f}") for i in places.tolist()]
        for places in choose(data, 8, 8)])
    similar, which = found["image"]
    top = similar.argsort(descending=True)[:8].tolist()
    contact_sheet(out / "closest.jpg", [[(picture(data, i), f"{similar[i]:.2f}") for i in top],
                                        [(picture(real, which[i]), "real") for i in top]])


# ----------------------------------------------------------------------------------------------------- report


def table(header, *rows):
    """Rows of values as a Markdown table whose columns also line up in a terminal; None is a dash."""
    texts = [["-" if v is None else str(v) if not isinstance(v, float) else f"{v:.3f}" if v > 0.01 else
              f"{v:.1e}" for v in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in texts]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]) + "\n\n"


def verify(recognisers, paths, folder, out):
    """Verification of each recogniser on each benchmark: rows for report.json, Markdown for report.md."""
    rows, order = {}, [*FIELD, *sorted(path.stem for path in paths)]
    paths = sorted(paths, key=lambda path: order.index(path.stem))
    names, sizes = [path.stem for path in paths], {net.cfg.size for net, _, _ in recognisers.values()}
    loaded = {(path, size): read_benchmark(path, size, folder) for path in paths for size in sizes}
    for name, (backbone, _, _) in recognisers.items():
        scores = {}
        for path in paths:
            images, same = loaded[path, backbone.cfg.size]
            distance = pair_distances(backbone, images)
            scores[path.stem] = verification(distance, same)
            if not rows:                                                # one picture, of the first recogniser
                histogram(out / f"pairs-{path.stem}.png", {"same person": 1 - distance[same] / 2,
                          "different people": 1 - distance[~same] / 2},
                          {"threshold": 1 - scores[path.stem]["threshold"] / 2})
        accuracies = [score["accuracy"] for score in scores.values()]
        rows[name] = scores | {"average": float(np.mean(accuracies)) if scores else None}
        if scores:
            pairs = [len(loaded[path, backbone.cfg.size][1]) for path in paths]
            rows[name]["interval"] = bootstrap_interval(accuracies, pairs)
    text = "Verification accuracy: mean ± standard deviation over folds; average with its 95 % interval\n\n"
    text += table(["recogniser", *(FIELD.get(name, name) for name in names), "average"], *(
        [name, *(f"{row[test]['accuracy']:.2%} ± {row[test]['std']:.2%}" for test in names),
         "{:.2%} ({:.2%} to {:.2%})".format(row["average"], *row["interval"]) if names else
         "no benchmark: name some with --pairs"] for name, row in rows.items()))
    if absent := [title for stem, title in FIELD.items() if stem not in names]:
        text += f"Absent, and not in the average: {', '.join(absent)}.\n\n"
    text += table(["recogniser", "benchmark", "TAR at FAR 1e-3", "TAR at FAR 1e-4", "EER"], *(
        [name, FIELD.get(test, test),
         *(f"{row[test][key]:.2%}" for key in ("tar_at_far_1e-03", "tar_at_far_1e-04", "eer"))]
        for name, row in rows.items() for test in names))
    text += "Published by the authors of VIGFace (IR-SE50, AdaFace), percent; not measured here\n\n"
    return rows, text + table(["trained on", *FIELD.values(), "average"],
                              *([name, *map("{:.2f}".format, row)] for name, row in PUBLISHED.items()))


def main():
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = args.fr or sorted(path.parent.as_posix() for path in Path("runs").glob("fr*/model.safetensors"))
    if not folders:
        fail("runs/: no recogniser in it; train one with fr_train.py, or name its folder with --fr")
    recognisers = {folder: load_recogniser(folder, device, args.bgr) for folder in folders}
    meta, out = recognisers[folders[0]][2], Path(args.out)
    sources, datasets = args.real or meta["data"], args.datasets
    if datasets is None:
        datasets = ["runs/virtual"] if sources and Path("runs/virtual/manifest.csv").is_file() else []
    if datasets and not sources:
        fail(f"{folders[0]}: unknown what it was trained on; name real faces with --real")
    models, text = verify(recognisers, [Path(path) for path in args.pairs or meta["val"]], args.images, out)
    report, close, leaking = {"judge": folders[0], "models": models, "datasets": {}}, [], False

    judges = [folders[0], args.audit_fr] if args.audit_fr else [folders[0]]
    for judge_name in judges if datasets else []:
        backbone, prototypes, _ = recognisers.get(judge_name) or load_recogniser(judge_name, device, args.bgr)
        real = embed_faces(backbone, prototypes, Faces(sources, backbone.cfg.size), device)
        if len(real.faces.names) < 2:
            fail(f"--real {' '.join(sources)}: expected two people or more, to know how alike strangers are")
        strangers, lines = baseline_lines(real)
        judged = {"judge": judge_name, "real": judge(real, strangers, lines, prototypes), "datasets": {}}
        judged["real"]["leakage"]["verdict"] = "baseline"
        for name in datasets:
            data = embed_faces(backbone, prototypes, Faces([name], backbone.cfg.size), device)
            found = resemblance(data, real)
            made = Path(name) / "run.json"                              # sample.py says whose prototypes
            own = made.is_file() and json.loads(made.read_text()).get("fr") == judge_name
            judged["datasets"][name] = judge(data, found, lines, prototypes, own)
            leaking |= judged["datasets"][name]["leakage"]["verdict"] == "leaks"
            close += [[name, judge_name, *row] for row in leaks(data, found, lines, real)]
            if judge_name == folders[0]:
                draw_pictures(out / Path(name).name, name, data, found, real, strangers, lines)
        rows = {**judged["datasets"], f"{' '.join(sources)} (real)": judged["real"]}
        text += f"Quality of datasets, judged by {judge_name}\n\n" + table(
            ["dataset", "people", "images", "consistency", "separability", "to nearest", "diversity",
             "own top-1", "near-duplicates", "outliers"],
            *([name, *list(row.values())[:-1]] for name, row in rows.items()))
        text += (f"Leakage, judged by {judge_name}: images over the line that 99 % of real images keep to "
                 "strangers, by centre and by image; and copies\n\n") + table(
            ["dataset", "verdict", "line", "q99", "over", "image line", "over", "copy line", "copies"],
            *([name, *(value for key, value in row["leakage"].items() if key != "baseline_q99")]
              for name, row in rows.items()))
        report |= judged if judge_name == folders[0] else {"audit": judged}

    write_csv(out / "leaks.csv", ["dataset", "judge", "file", "test", "similarity", "person", "image"], close)
    replace_file(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    replace_file(out / "report.md", lambda path: path.write_text(text))
    print(f"{text}wrote {out / 'report.json'}, report.md, leaks.csv and pictures")
    if args.strict and leaking:
        raise SystemExit(3)


if __name__ == "__main__":
    run(main)
