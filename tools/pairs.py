"""Makes a benchmark of aligned faces and a list of pairs: python tools/pairs.py lfw/ pairs.txt --out lfw.bin

The list is LFW's pairs.txt: first the number of folds and of pairs, then in each fold lines `name i j` (one
person) and `name i other j` (two), where image i of a person is lfw/name/name_000i.jpg. Or each line is
`file1 file2 1` (one person) or `file1 file2 0`, with names of files below the folder. Tabs, commas or spaces
separate. The pairs keep their order, which decides the folds: ten of equal length.
"""
import argparse
import math
import pickle
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import SUFFIXES, open_image
from model import fail, reading, replacing, run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("images", metavar="DIR", help="folder of aligned faces; tools/align.py makes them")
flag("pairs", metavar="TXT", help="list of pairs")
flag("--out", default="pairs.bin", metavar="BIN", help="the benchmark (default: %(default)s)")


def split_line(line):
    """The fields of a line, between tabs if it has some, or else commas, or else spaces."""
    separator = next((mark for mark in "\t," if mark in line), None)
    return [field.strip() for field in line.split(separator) if field.strip()]


def parse_pair(fields):
    """The names of two images, without suffix where the list has none, and whether they show one person."""
    numbered = lambda name, i: f"{name}/{name}_{int(i):04d}"
    match fields, [field.isdecimal() for field in fields]:
        case [name, i, j], [_, True, True]:
            return numbered(name, i), numbered(name, j), True
        case [name, i, other, j], [_, True, _, True]:
            return numbered(name, i), numbered(other, j), False
        case [first, second, "0" | "1" as same], _:
            return first, second, same == "1"
    raise ValueError("it is no pair")


def read_list(path):
    """The pairs of a list, see `parse_pair`; ends the program at a line that is none, or if some are missing.

    A first line of numbers says how many there must be; one that ends with a word names columns.
    """
    with reading(path, "a list of pairs, as text"):
        text = Path(path).read_text("utf-8-sig", errors="surrogateescape")
        lines = enumerate(map(split_line, text.split("\n")), 1)
        lines = [(number, fields) for number, fields in lines if fields]
        first = lines[0][1] if lines else []
        promised = None
        if len(first) in (1, 2) and all(field.isdecimal() for field in first):
            promised = 2 * math.prod(map(int, first))                   # one fold has no number of folds
        if promised is not None or first and not first[-1].isdecimal():
            lines.pop(0)

    pairs = []
    for number, fields in lines:
        try:
            pairs.append(parse_pair(fields))
        except ValueError:
            fail(f"{path}, line {number}: expected `name i j`, `name i other j` or `file1 file2 0` (or 1), "
                 f"found {' '.join(fields)[:100]}")
    if promised not in (None, len(pairs)):
        fail(f"{path}: its first line promises {promised} pairs, but it has {len(pairs)}")
    if len(pairs) < 10 or len({same for _, _, same in pairs}) < 2:
        fail(f"{path}: {len(pairs)} pairs; expected ten or more, of one person and of two")
    return pairs


def read_images(root, names):
    """{name: encoded image} of images below a folder; ends the program if one lacks or is no aligned face."""
    def find(name):
        paths = (root / f"{name}{suffix}" for suffix in ["", *SUFFIXES])
        return next((path for path in paths if path.is_file()), None)

    paths = {name: find(name) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        fail(f"{root}: {len(missing)} of {len(paths)} images are not there, such as {missing[0]}; name the "
             "folder that the list's names begin in, or take these pairs out of it")

    encoded = {}
    for name, path in tqdm(paths.items(), str(root), leave=False, mininterval=1):
        with reading(path, "a square image, cropped by tools/align.py"):
            width, height = open_image(path).size
            if width != height:
                raise ValueError(f"it has {width} x {height} pixels")
        encoded[name] = path.read_bytes()
    return encoded


def main():
    args = parser.parse_args()
    if Path(args.out).suffix != ".bin" or Path(args.out).exists():
        fail(f"--out {args.out}: expected a new file that ends with .bin")
    pairs = read_list(args.pairs)
    encoded = read_images(Path(args.images), [name for *two, _ in pairs for name in two])

    content = [encoded[name] for *two, _ in pairs for name in two], [same for *_, same in pairs]
    with replacing(args.out) as temporary:
        temporary.write_bytes(pickle.dumps(content, protocol=4))
    print(f"{args.out}: {len(pairs)} pairs of {len(encoded)} images, {sum(content[1])} pairs of one person")


if __name__ == "__main__":
    run(main)
