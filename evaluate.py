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
from os.path import realpath
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Faces, find_benchmarks, read_benchmark
from model import DEVICE, class_sums, embed, fail, load_recogniser, reading, refuse_inside, run

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


# ---------------------------------------------------------------------------------------------- verification

def pair_distances(backbone, images):
    """Squared distances (P,), from 0 to 4, of the flip-summed unit embeddings of images 2p and 2p + 1."""
    # Benchmarks show an image in several pairs. It is embedded once.
    distinct, which = images.unique(dim=0, return_inverse=True)
    f = embed(backbone, distinct, exact=True)[which]
    difference = f[::2] - f[1::2]
    return difference.square().sum(1).cpu().numpy()


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
FaceSet = namedtuple("FaceSet", "f labels thumbs quality faces index", defaults=(None,) * 4)

KIND = torch.half if DEVICE.type == "cuda" else torch.float            # of embeddings and thumbnails


def thumbnails(images):
    """Detail of 16 x 16 grey versions (M, 256) of uint8 images (M, 3, S, S), of unit length.

    In place of brightness stands its rank among the 256, which no change of tone moves. The mean of 5 x 5
    ranks around each is taken off, because light and the shape of a head are alike in many strangers.
    """
    grey = F.adaptive_avg_pool2d(images.to(DEVICE).float().mean(1, keepdim=True), 16)
    rank = grey.flatten(1).argsort(1).argsort(1).float().view_as(grey)
    around = F.avg_pool2d(rank, 5, stride=1, padding=2, count_include_pad=False)
    return F.normalize((rank - around).flatten(1)).to(KIND)


def embed_faces(backbone, prototypes, faces):
    """The FaceSet of `faces`."""
    columns = []
    for images, i in faces.scan(torch.arange(len(faces)), "embedding"):
        f = embed(backbone, images, unit=False) / 2             # the mean, as `certainty` learned it
        quality = prototypes.certainty(f)[:, 0]
        columns.append((F.normalize(f).to(KIND), thumbnails(images), quality, i))
    f, thumbs, quality, i = (torch.cat(column) for column in zip(*columns))
    return FaceSet(f, faces.labels[i].to(DEVICE), thumbs, quality, faces, i)


def embed_benchmarks(backbone, benchmarks):
    """The FaceSet of the people in benchmarks {name: path}."""
    from tools.insightface import benchmark_people
    images, labels = benchmark_people(benchmarks, backbone.config["size"])
    thumbs = torch.cat([thumbnails(some) for some in images.split(256)])
    return FaceSet(embed(backbone, images).to(KIND), labels.to(DEVICE), thumbs)


def quantile(values, q):
    """The q-quantile of a tensor of any length; torch.quantile refuses more than 16 million values."""
    return np.quantile(values.cpu(), q).item()


def consistency_separability(f, labels):
    """C, mean cosine of two images of a class (None if no class has two); S, mean cosine distance of centres.

    If m unit vectors f_i have the sum s, then s^2 = m + sum of f_i f_j over i != j. So the mean cosine of two
    of them is (s^2 - m) / (m (m - 1)).
    """
    def mean_cosine(sum_of, m):
        return (sum_of.square().sum(-1) - m) / (m * (m - 1))

    total, count = class_sums(f, labels)
    several, centres = count > 1, F.normalize(total[count > 0])     # of those who have a readable image
    within = mean_cosine(total[several], count[several])
    between = mean_cosine(centres.sum(0), len(centres))             # 0 / 0 for one person
    consistency = within.mean().item() if len(within) else None
    separability = 1 - between.item() if len(centres) > 1 else 1.0
    return consistency, separability


def diversity(quality, labels):
    """D, variance of the quality scores (M,) within a class, mean over classes; None if none has two."""
    classes = quality[labels.argsort()].split(torch.bincount(labels).tolist())
    spread = [scores.var() for scores in classes if len(scores) > 1]
    return torch.stack(spread).mean().item() if spread else None


def places(labels):
    """Which image of its person each image is, from 0, and how many this person has, (M,) each."""
    order, count = labels.argsort(stable=True), torch.bincount(labels)
    first = count.cumsum(0) - count                             # of each person's images, in this order
    return order.argsort() - first[labels], count[labels]


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
    return torch.zeros_like(count).index_copy(0, order, count[order].minimum(goal))


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
    place, _ = places(real.labels)
    halves, _ = class_sums(real.f, 2 * real.labels + place % 2)
    count = torch.bincount(real.labels)
    people = ((count > 1) & (as_many(count, wanted) > 0)).nonzero()[:, 0]
    return F.cosine_similarity(halves[2 * people], halves[2 * people + 1])


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
    log_share = math.log(people / (people + strangers))
    log_p = torch.lgamma(j + over + 1) - torch.lgamma(j + 1) + j * log_share
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
    growth = 1 + (line - start) / excess.sum().item()
    return len(excess) / len(cosines) * growth ** -len(excess)


def leak_tests(found, strangers, lines):
    """{test: {line, over, allowed}}: how many of a set are over a line, and may be over it; copies: none."""
    people, cosines = len(found["person"][0]), strangers["person"][0]
    usual = allowed(int((cosines > lines["person"]).sum()), len(cosines), people)
    tests = {}
    for test, line in lines.items():
        near, _ = found[test]
        # A person's images are alike. So for each person who may be over, all images of one may be.
        most = usual * len(near) // people
        tests[test] = {"line": line, "over": int((near > line).sum()), "allowed": most}
    tests["copy"]["allowed"] = 0
    # Hardly any stranger is somebody, so their share is inferred, not counted. With very many strangers the
    # share counts as known, and the number is Poisson's.
    many, share = 1e9, tail(strangers["somebody"][0], lines["somebody"])
    tests["somebody"]["allowed"] = allowed(many * share, many, people)
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
    C, S = consistency_separability(data.f, data.labels)
    # Published networks have no quality head, and so no D.
    D = diversity(data.quality, data.labels) if len(prototypes.real) else None
    return {"identities": len(data.faces.people), "images": len(data.f),
            "consistency": C, "separability": S, "diversity": D}


def judge_set(data, real, unseen):
    """What the set `data` shows of real people: its `resemblance`, and a row of the report on leakage."""
    wanted = torch.bincount(data.labels)
    found, strangers = resemblance(data, real), strangers_to(real, wanted, unseen)
    # Somebody: nearer to a real person than most people are to themselves.
    found["somebody"], strangers["somebody"] = found["person"], strangers["person"]
    lines, halves = lines_of(strangers), genuine(real, wanted)
    lines["somebody"] = quantile(halves, 0.5) if len(halves) else 1.0
    tests, near = leak_tests(found, strangers, lines), strangers["person"][0]
    return found, {
        "strangers": len(near),
        "recognised": (halves > lines["person"]).float().mean().item() if len(halves) else 0.0,
        "mistaken": (near > lines["somebody"]).float().mean().item(),
        "copies": tests["copy"]["over"],
        "tests": tests}


# ------------------------------------------------------------------- many recognisers, many sets, one judge

def verify(backbone, benchmarks):
    """{benchmark: {accuracy, std}} of a recogniser on benchmarks {name: path}."""
    scores = {}
    for name, path in benchmarks.items():
        images, same = read_benchmark(path, backbone.config["size"])
        scores[name] = verification(pair_distances(backbone, images), same)
    return scores


def had_part(meta, name):
    """Whether a recogniser was trained on the set `name`, or rejected pictures when sample.py made it."""
    if realpath(name) in map(realpath, meta["data"]):           # wherever links lead
        return True
    path = Path(name) / "run.json"
    if not path.is_file():
        return False
    with reading(path, "the settings of sample.py"):
        return json.loads(path.read_text())["fr"] == meta.get("sha256")


def judge_sets(args, judge, recogniser, benchmarks, datasets):
    """Compares `datasets` with real faces, as one recogniser sees them: what `write_report` needs.

    That is what the report says of all sets, the FaceSet of the real faces, and an iterator that judges one
    set at a time: its name, row of the report, FaceSet and `resemblance`.
    """
    from tools.retinaface import alignment_like
    backbone, prototypes, meta = recogniser
    if not args.real:
        fail("unknown what the first recogniser was trained on; name real faces with --real")
    trained_on = {*map(realpath, meta["data"])}                 # wherever links lead
    real_folders = {*map(realpath, args.real)}
    for name in datasets:
        if realpath(name) in trained_on | real_folders:
            fail(f"{name}: it is among the real faces, or {judge} was trained on it; "
                 "name other --real or --fr")

    size = backbone.config["size"]
    real = embed_faces(backbone, prototypes, Faces(args.real, size, flag="--real"))
    if len(real.faces.people) < 2:
        fail("--real: expected two people or more; with one, strangers are unknown")
    print(f"real: {len(real.f)} images of {len(real.faces.people)} people in "
          f"{', '.join(map(str, real.faces.roots))}")
    misaligned = alignment_like(real.faces, args.weights)

    # Training has pushed the judge's own people apart, so then others must stand for strangers.
    known = trained_on & real_folders
    unseen = embed_benchmarks(backbone, benchmarks) if known and benchmarks else None
    whose = "of the benchmarks" if unseen else "of the real people, each to the others"

    def judged(name):
        data = embed_faces(backbone, prototypes, Faces([name], size, flag="--datasets"))
        found, leakage = judge_set(data, real, unseen)
        # Other crops of a person would look like nobody.
        leakage["misaligned"] = misaligned(data.faces)
        leakage["left_out"] = len(data.faces.left_out)
        leakage["verdict"] = verdict_of(leakage, not had_part(meta, name))
        return name, quality_row(data, prototypes) | {"leakage": leakage}, data, found

    head = {"judge": judge, "strangers": whose, "real": quality_row(real, prototypes)}
    return head, real, map(judged, datasets)


def main():
    args = parser.parse_args()
    recognisers = {}
    for folder in args.fr or sorted(map(Path.as_posix, Path("runs").glob("fr*"))):
        if args.fr or (Path(folder) / "model.safetensors").is_file():
            recognisers[folder] = load_recogniser(folder, args.bgr)
        else:
            print(f"{folder}: left out, because its training is not finished")
    if not recognisers:
        fail("runs/: no recogniser in it; train one, or name it with --fr")
    datasets = args.datasets
    if datasets is None:
        datasets = ["runs/virtual"] if Path("runs/virtual/manifest.csv").is_file() else []
    refuse_inside(args.out, datasets)

    # Who had a part in making a set is no judge of it, if there is another.
    had_part_in_any = lambda folder: any(had_part(recognisers[folder][2], name) for name in datasets)
    judge = min(recognisers, key=had_part_in_any)               # the first of several
    _, _, first = next(iter(recognisers.values()))
    args.real = args.real or first["data"]          # the judge's own may be virtual people
    benchmarks = find_benchmarks(first["val"] if args.pairs is None else args.pairs)
    if not datasets and (args.strict or not benchmarks):
        fail("there is no set to judge: sample one, name one with --datasets, or benchmarks with --pairs")

    models = {folder: verify(backbone, benchmarks)
              for folder, (backbone, _, _) in recognisers.items()}
    judged = judge_sets(args, judge, recognisers[judge], benchmarks, datasets) if datasets else ()
    from tools.report import write_report
    all_clean = write_report(args.out, models, *judged)
    if args.strict and not all_clean:
        raise SystemExit(3)


if __name__ == "__main__":
    run(main, "name one set at a time with --datasets")
