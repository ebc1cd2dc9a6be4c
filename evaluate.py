"""Accuracy of recognisers, and quality and leakage of face datasets, side by side in one report.

    python evaluate.py                      # every runs/fr*; runs/virtual against the real training set
    python evaluate.py --fr A B --pairs lfw.bin agedb_30.bin --datasets runs/virtual dcface/ --real casia/
    python evaluate.py --fr adaface.ckpt --datasets SET --real casia/ --strict      # code 3 unless clean

The first recogniser that had no part in making the datasets judges them. Writes OUT/report.json and
OUT/report.md (the tables it prints), OUT/leaks.csv (each person and image that comes too near to a real
person, and to whom) and the nearest pairs as a picture. fr_train.py tests with `verification`, and sample.py
looks at real faces by `embed_faces`, `strangers_to` and `nearest`.
"""
import argparse
import json
import math
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from data import Faces, find_benchmarks, read_benchmark, write_csv
from model import (DEVICE, class_sums, embed, fail, load_recogniser, reading, refuse_inside, replacing,
                   run)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--fr", nargs="+", metavar="PATH", help="run folders or published weights (default: every runs/fr*)")
flag("--bgr", action=argparse.BooleanOptionalAction,
     help="published recognisers read BGR images (default: AdaFace's checkpoints do, others do not)")
flag("--pairs", nargs="*", metavar="BIN", help="benchmarks (default: those of the first recogniser)")
flag("--datasets", nargs="*", metavar="DIR", help="sets to judge (default: runs/virtual if there)")
flag("--real", nargs="+", metavar="DIR", help="real faces not to leak (default: the first recogniser's data)")
flag("--strict", action="store_true", help="exit with code 3 unless all sets are clean (default: report it)")
flag("--weights", metavar="PATH", help="RetinaFace's: are sets aligned? (default: those in runs/, if any)")
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
    """Detail of 16 x 16 grey versions (M, 256) of uint8 images (M, 3, S, S), of unit length.

    In place of brightness stands its rank among the 256, which no change of tone moves. The mean of 5 x 5
    ranks around each is taken off, because light and the shape of a head are alike in many strangers.
    """
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16)
    rank = grey.flatten(1).argsort(1).argsort(1).float().view_as(grey)
    around = F.avg_pool2d(rank, 5, stride=1, padding=2, count_include_pad=False)
    return F.normalize((rank - around).flatten(1))


KIND = torch.half if DEVICE.type == "cuda" else torch.float            # of embeddings and thumbnails


def embed_faces(backbone, prototypes, faces):
    """The FaceSet of `faces`."""
    columns = []
    for images, i in faces.scan(torch.arange(len(faces)), "embedding"):
        f = embed(backbone, images, unit=False) / 2             # the mean, as `certainty` learned it
        columns.append((F.normalize(f).to(KIND), thumbnails(images.to(DEVICE)).to(KIND),
                        prototypes.certainty(f)[:, 0], i))
    f, thumbs, quality, i = (torch.cat(column) for column in zip(*columns))
    return FaceSet(f, faces.labels[i].to(DEVICE), thumbs, quality, faces, i)


def embed_benchmarks(backbone, benchmarks):
    """The FaceSet of the people in benchmarks {name: path}."""
    from tools.insightface import benchmark_people
    images, labels = benchmark_people(benchmarks, backbone.config["size"])
    thumbs = torch.cat([thumbnails(some.to(DEVICE)) for some in images.split(256)])
    return FaceSet(embed(backbone, images).to(KIND), labels.to(DEVICE), thumbs.to(KIND))


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


def places(labels):
    """Which image of its person each image is, from 0, and how many this person has, (M,) each."""
    order, count = labels.argsort(stable=True), torch.bincount(labels)
    first = (count.cumsum(0) - count)[labels[order]]
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels), device=labels.device) - first
    return place, count[labels]


def centres_of(faces):
    """The unit centre of each person's embeddings (I, D), zero for somebody without images."""
    return F.normalize(class_sums(faces.f, faces.labels)[0]).to(faces.f)


def resemblance(faces, real, own=None):
    """How near faces come to real people: {test: (cosine, person or image of `real`)}.

    person: from the centre of each person's images (I,) to the nearest person's centre. centre: from each
    image (M,) to the nearest person's centre. image: to the nearest image. copy: to the nearest thumbnail,
    if `faces` have thumbnails, mirrored or not, negative or not. own (M,), if given, is each image's own
    person, who is left out for it.
    """
    own = torch.full_like(faces.labels, -1) if own is None else own             # -1 is nobody's label
    whole, centres = centres_of(faces), centres_of(real)
    people = torch.arange(len(centres), device=own.device)
    own_of = own.new_full((len(whole),), -1).scatter(0, faces.labels, own)
    found = {"person": nearest(whole, centres, own_of, people),
             "centre": nearest(faces.f, centres, own, people),
             "image": nearest(faces.f, real.f, own, real.labels)}
    if faces.thumbs is not None:
        mirrored = real.thumbs.view(-1, 16, 16).flip(2).flatten(1)
        versions = torch.cat([real.thumbs, mirrored, -real.thumbs, -mirrored])
        cosine, which = nearest(faces.thumbs, versions, own, real.labels.repeat(4))
        found["copy"] = cosine, which % len(real.f)
    return found


def as_many(count, wanted):
    """How many images to take of people who have count (I,), to have as many as others have, wanted (J,).

    A centre of few images is farther from everybody. So people with fewer images than nine tenths of the
    others have are left out, but not more than nine tenths of all people.
    """
    enough = min(quantile(wanted, 0.1), quantile(count[count > 0], 0.9))
    order = count.argsort(descending=True, stable=True)[:(count >= enough).sum()]
    rank = (torch.arange(len(order), device=count.device) + 0.5) / len(order)
    goal = wanted.sort(descending=True).values[(rank * len(wanted)).long()]
    return torch.zeros_like(count).index_copy(0, order, torch.minimum(count[order], goal))


def strangers_to(real, wanted, unseen=None):
    """The `resemblance` to real people of strangers, who have as many images as the people of `wanted` (J,).

    They are the people of `unseen`, a FaceSet, or else the real people, each compared with all others.
    """
    pool = unseen or real
    place, _ = places(pool.labels)
    some = place < as_many(torch.bincount(pool.labels), wanted)[pool.labels]
    thumbs = None if pool.thumbs is None else pool.thumbs[some]
    own = pool.labels[some]
    faces = FaceSet(pool.f[some], own.unique(return_inverse=True)[1], thumbs)
    return resemblance(faces, real, None if unseen else own)


def genuine(real, wanted):
    """Cosines (I,) between two halves of a real person's images, of those who have as many as `wanted`."""
    place, count = places(real.labels)
    some = (as_many(torch.bincount(real.labels), wanted)[real.labels] > 0) & (count > 1)
    halves, size = class_sums(real.f[some], 2 * real.labels[some] + place[some] % 2)
    halves = halves[size > 0].unflatten(0, (-1, 2))
    return F.cosine_similarity(halves[:, 0], halves[:, 1])


def lines_of(strangers):
    """{test: cosine} that 99 % of strangers stay below; of copies, halfway from what 99.9 % do to 1."""
    lines = {test: quantile(cosine, 0.99) for test, (cosine, _) in strangers.items()}
    if "copy" in strangers:
        lines["copy"] = min(0.99, (1 + quantile(strangers["copy"][0], 0.999)) / 2)
    return lines


def allowed(over, strangers, people):
    """How many of `people` may be over a line that `over` of `strangers` are over.

    If these people are strangers, too, more of them are over it once in a thousand times: with nothing known
    of the rate but what strangers show, the number of people is negative binomial.
    """
    j = torch.arange(people + 1, dtype=torch.double)
    log_p = torch.lgamma(j + over + 1) - torch.lgamma(j + 1) + j * math.log(people / (people + strangers))
    return int((log_p.softmax(0).cumsum(0) < 0.999).sum())


def tail(cosines, line):
    """The share of strangers over a line, from their cosines (I,), even if none of these is.

    Above what nine tenths stay below, the tail is taken for exponential, which is heavier than that of
    cosines. Its mean is uncertain, so the share is that of a Lomax distribution.
    """
    start = quantile(cosines, 0.9)
    excess = cosines[cosines > start].double() - start
    if line <= start or not len(excess):
        return (cosines > line).double().mean().item()
    return len(excess) / len(cosines) * (1 + (line - start) / excess.sum().item()) ** -len(excess)


def leak_tests(found, strangers, lines):
    """{test: {line, over, allowed}}: how many of a set are over a line, and may be over it; copies: none."""
    def over(near, test):
        return int((near[test][0] > lines[test]).sum())

    people, tests = len(found["person"][0]), {}
    for test, line in lines.items():
        most = 0
        if test == "person":
            most = allowed(over(strangers, test), len(strangers[test][0]), people)
        elif test == "somebody":        # hardly any stranger is, so their share is inferred, not counted
            many = 1e9                  # with a share that is taken as known, the number is Poisson's
            most = allowed(many * tail(strangers[test][0], line), many, people)
        elif test != "copy":            # a person's images are alike: what counts is the number of people
            most = tests["person"]["allowed"] * len(found[test][0]) // people
        tests[test] = {"line": line, "over": over(found, test), "allowed": most}
    return tests


def verdict_of(leakage, independent):
    """The verdict on a set: `clean`, or the first reason why it is not."""
    if any(row["over"] > row["allowed"] for row in leakage["tests"].values()):
        return "leaks"
    if abs(leakage["misaligned"] or 0) > 0.1:
        return "not aligned"
    if leakage["recognised"] < 0.5:
        return "judge too weak"
    return "clean" if independent else "not independent"


def quality_row(data, prototypes):
    """One dataset's row of the report on quality."""
    consistency, separability = consistency_separability(data.f, data.labels)
    return {
        "identities": len(data.faces.people),
        "images": len(data.f),
        "consistency": consistency,
        "separability": separability,
        # Published networks have no quality head, and so no D.
        "diversity": diversity(data.quality, data.labels) if len(prototypes.real) else None}


def judge_set(data, real, unseen):
    """What the set `data` shows of real people: its `resemblance`, and a row of the report on leakage."""
    wanted = torch.bincount(data.labels)
    found, strangers = resemblance(data, real), strangers_to(real, wanted, unseen)
    found["somebody"], strangers["somebody"] = found["person"], strangers["person"]
    halves = genuine(real, wanted)
    # Somebody: nearer to a real person than most people are to themselves.
    lines = lines_of(strangers) | {"somebody": quantile(halves, 0.5) if len(halves) else 1.0}
    tests = leak_tests(found, strangers, lines)
    recognised = (halves > lines["person"]).float().mean().item() if len(halves) else 0.0
    leakage = {
        "strangers": len(strangers["person"][0]),
        "recognised": recognised,
        "mistaken": (strangers["person"][0] > lines["somebody"]).float().mean().item(),
        "copies": tests["copy"]["over"],
        "tests": tests}
    return found, leakage


def offenders(data, found, tests, real):
    """Rows of leaks.csv for what is over a line: identity or file, test, cosine, real person and image."""
    people, labels = [*real.faces.people], real.labels.cpu()
    names = [*data.faces.people]
    for test, columns in found.items():
        cosine, which = (column.cpu() for column in columns)
        for i in (cosine > tests[test]["line"]).nonzero()[:, 0].tolist():
            whole = test in ("person", "somebody")
            name = names[i] if whole else data.faces.path(data.index[i])
            person, image = which[i], ""
            if test in ("image", "copy"):
                person, image = labels[which[i]], real.faces.path(real.index[which[i]])
            yield [name, test, f"{cosine[i]:.4f}", people[person], image]


def closest(data, found, real):
    """The eight images nearest to a real image, and then the real images, (16, 3, S, S) in [0, 1]."""
    cosine, which = found["image"]
    top = cosine.argsort(descending=True)[:8]
    images = [data.faces[i][0] for i in data.index[top.cpu()]]
    images += [real.faces[i][0] for i in real.index[which[top].cpu()]]
    return torch.from_numpy(np.stack(images)) / 255


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
    for name, row in report["datasets"].items():
        leakage = row["leakage"]
        misaligned = leakage["misaligned"]
        checked = "not checked" if misaligned is None else f"{misaligned:+.0%} of images that are not"
        text += table(f"{name}: {leakage['verdict']}\n\nThe judge recognises {leakage['recognised']:.0%} of "
                      f"real people, and takes {leakage['mistaken']:.2%} of {leakage['strangers']} strangers "
                      f"({report['strangers']}) for somebody. Alignment: {checked}. Files left out: "
                      f"{leakage['left_out']}.", leakage["tests"])
    return text


def resolved(folders):
    """Folders, or None, as a set of paths that compare, wherever links lead."""
    return {Path(folder).resolve() for folder in folders or ()}


def had_part(meta, name):
    """Whether a recogniser was trained on the set `name`, or rejected pictures when sample.py made it."""
    path = Path(name)
    if path.resolve() in resolved(meta["data"]):
        return True
    if not (path / "run.json").is_file():
        return False
    with reading(path / "run.json", "the settings of sample.py"):
        return json.loads((path / "run.json").read_text())["fr"] == meta.get("sha256")


def judge_sets(args, judge, recogniser, benchmarks, datasets):
    """The report on `datasets`, by one recogniser, the rows of leaks.csv, and {name: `closest`}."""
    from tools.retinaface import misaligned, weights_at_hand
    backbone, prototypes, meta = recogniser
    if not args.real:
        fail("unknown what the first recogniser was trained on; name real faces with --real")
    trained_on = resolved(meta["data"])
    known = resolved(args.real) & trained_on
    for name in datasets:
        if Path(name).resolve() in trained_on | resolved(args.real):
            fail(f"{name}: it is among the real faces, or {judge} was trained on it; name other --real or --fr")
    size = backbone.config["size"]
    real = embed_faces(backbone, prototypes, Faces(args.real, size, flag="--real"))
    people = len(real.faces.people)
    if people < 2:
        fail("--real: expected two people or more; with one, strangers are unknown")
    print(f"real: {len(real.f)} images of {people} people in {', '.join(map(str, real.faces.roots))}")
    weights = args.weights or weights_at_hand()
    usual = misaligned(real.faces, weights) if weights else 0

    # Training has pushed the judge's own people apart, so then others must stand for strangers.
    unseen = embed_benchmarks(backbone, benchmarks) if known and benchmarks else None
    whose = "of the benchmarks" if unseen else "of the real people, each to the others"
    report = {"judge": judge, "strangers": whose,
              "real": quality_row(real, prototypes), "datasets": {}}
    leaks, pictures = [], {}
    for number, name in enumerate(datasets, 1):
        data = embed_faces(backbone, prototypes, Faces([name], size, flag="--datasets"))
        found, leakage = judge_set(data, real, unseen)
        # Other crops of a person would look like nobody.
        leakage["misaligned"] = misaligned(data.faces, weights) - usual if weights else None
        leakage["left_out"] = len(data.faces.left_out)
        leakage["verdict"] = verdict_of(leakage, not had_part(meta, name))
        report["datasets"][name] = quality_row(data, prototypes) | {"leakage": leakage}
        leaks += ([name, *row] for row in offenders(data, found, leakage["tests"], real))
        pictures[f"{number}-{Path(name).name}/closest.jpg"] = closest(data, found, real)
    return report, leaks, pictures


def main():
    args = parser.parse_args()
    out = Path(args.out)

    folders = args.fr or sorted(path.parent.as_posix() for path in Path("runs").glob("fr*/model.safetensors"))
    for path in () if args.fr else Path("runs").glob("fr*"):
        if not (path / "model.safetensors").is_file():
            print(f"{path}: left out, because its training is not finished")
    if not folders:
        fail("runs/: no recogniser in it; train one, or name it with --fr")
    recognisers = {folder: load_recogniser(folder, args.bgr) for folder in folders}
    datasets = args.datasets
    if datasets is None:
        datasets = ["runs/virtual"] if Path("runs/virtual/manifest.csv").is_file() else []
    refuse_inside(out, datasets)

    # Who had a part in making a set is no judge of it, if there is another.
    others = [folder for folder, (_, _, meta) in recognisers.items()
              if not any(had_part(meta, name) for name in datasets)]
    judge = (others or folders)[0]
    first = recognisers[folders[0]][2]
    args.real = args.real or first["data"]          # the judge's own may be virtual people
    benchmarks = find_benchmarks(first["val"] if args.pairs is None else args.pairs)
    if not datasets and (args.strict or not benchmarks):
        fail("there is no set to judge: sample one, name one with --datasets, or benchmarks with --pairs")

    averaged = averaged_of(benchmarks)
    models = verify(recognisers, benchmarks, averaged) if benchmarks else {}
    report, leaks, pictures = {"datasets": {}}, [], {}
    if datasets:
        report, leaks, pictures = judge_sets(args, judge, recognisers[judge], benchmarks, datasets)
    report["models"] = models

    text = describe(report, averaged)
    print(text)
    write_csv(out / "leaks.csv", ["dataset", "what", "test", "similarity", "person", "image"], leaks)
    for name, images in pictures.items():
        with replacing(out / name) as temporary:
            save_image(images, temporary, "JPEG", nrow=len(images) // 2)
    for name, content in (("report.json", json.dumps(report, indent=1)), ("report.md", text)):
        with replacing(out / name) as temporary:
            temporary.write_bytes(content.encode(errors="backslashreplace"))
    print(f"wrote {out / 'report.json'}, report.md, leaks.csv and pictures")
    leakages = [row["leakage"] for row in report["datasets"].values()]
    if args.strict and any(leakage["verdict"] != "clean" or leakage["left_out"] for leakage in leakages):
        raise SystemExit(3)


if __name__ == "__main__":
    run(main, "name one set at a time with --datasets")
