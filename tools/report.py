"""The report of evaluate.py: its tables, the rows of leaks.csv, and a picture of the nearest pairs.

evaluate.py calls `write_report` when all benchmarks are measured and the sets are to be judged.
"""
import json
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import save_image

from data import write_csv
from model import replacing

FIELD = {"lfw": "LFW", "cfp_fp": "CFP-FP", "cplfw": "CPLFW", "agedb_30": "AgeDB", "calfw": "CALFW"}


def averaged_of(benchmarks):
    """The benchmarks that are averaged: those of the field's five, so that averages compare, or else all."""
    return [name for name in FIELD if name in benchmarks] or [*benchmarks]


def with_average(scores):
    """{benchmark: {accuracy, std}} in the field's order, and then the average."""
    averaged = averaged_of(scores)
    ordered = {name: scores[name] for name in dict.fromkeys([*averaged, *scores])}
    average = np.mean([scores[name]["accuracy"] for name in averaged])
    return ordered | {"average": float(average)}


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


def table(title, rows):
    """A title and {row: {column: value}} as a Markdown table; None is a dash, nested values are left out."""
    def cell(value):
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = [name for name, value in [*rows.values()][0].items() if not isinstance(value, dict)]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row[column]) for column in columns)] for name, row in rows.items()]
    body = ["| " + " | ".join(text.rjust(13) for text in line) + " |" for line in lines]
    return "\n".join([title, "", *body, "\n"])


def accuracy_table(models):
    """The table of {recogniser: {benchmark: {accuracy, std}, average: accuracy}}."""
    rows = {}
    for folder, scores in models.items():
        rows[folder] = {FIELD.get(name, name): f"{100 * score['accuracy']:.2f} ± {100 * score['std']:.2f}"
                        for name, score in scores.items() if name != "average"}
        rows[folder]["average"] = f"{100 * scores['average']:.2f}"
    averaged = averaged_of([name for name in scores if name != "average"])
    absent = ", ".join(title for name, title in FIELD.items() if name not in averaged) or "none"
    return table("Accuracy: mean ± standard deviation over folds, percent; "
                 f"average of {', '.join(averaged)}; absent: {absent}", rows)


def describe(report):
    """The report as Markdown tables."""
    text = accuracy_table(report["models"]) if report["models"] else ""
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


def write_report(out, models, head={}, real=None, sets=()):
    """Prints the tables and writes the files to the folder `out`. Whether all sets are clean and complete.

    models has {benchmark: {accuracy, std}} of each recogniser; head is what report.json says of all sets, and
    real the FaceSet of the real faces. sets yields of each set its name, its row of the report, its FaceSet
    and its `resemblance`. It is asked for one set at a time, because several need not fit in memory.
    """
    out = Path(out)
    models = {folder: with_average(scores) for folder, scores in models.items() if scores}
    report = head | {"datasets": {}, "models": models}
    leaks, pictures = [], {}
    for number, (name, row, data, found) in enumerate(sets, 1):
        report["datasets"][name] = row
        leaks += ([name, *rest] for rest in offenders(data, found, row["leakage"]["tests"], real))
        pictures[f"{number}-{Path(name).name}/closest.jpg"] = closest(data, found, real)

    text = describe(report)
    print(text)                 # before anything is written, which may fail
    write_csv(out / "leaks.csv", ["dataset", "what", "test", "similarity", "person", "image"], leaks)
    for name, images in pictures.items():
        with replacing(out / name) as temporary:
            save_image(images, temporary, "JPEG", nrow=len(images) // 2)
    for name, content in (("report.json", json.dumps(report, indent=1)), ("report.md", text)):
        with replacing(out / name) as temporary:
            temporary.write_bytes(content.encode(errors="backslashreplace"))
    print(f"wrote {out / 'report.json'}, report.md, leaks.csv and pictures")
    leakages = [row["leakage"] for row in report["datasets"].values()]
    return all(leakage["verdict"] == "clean" and not leakage["left_out"] for leakage in leakages)
