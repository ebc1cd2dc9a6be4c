"""Faces: training sources and their batches, benchmarks and landmarks.

A source is a folder of identity/image.jpg, or of InsightFace's train.rec and train.idx (identities are
labels, file names are keys). It may hold landmarks.csv (file,x1,y1,...,x5,y5 in pixels: eyes, nose, mouth
corners, left to right) and *.bin benchmarks. Where no source is named, toy faces are painted into runs/demo,
as just such a folder. Photographs become aligned crops by tools/align.py.
"""
import contextlib
import csv
import ctypes
import hashlib
import itertools
import json
import os
import signal
import sys
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from model import DEVICE, RANK, WORLD, fail, reading, replacing, system_failed, to_float, why

# ---------------------------------------------------------------------------------------------------- images

SUFFIXES = [*".jpg .jpeg .jfif .png .webp .avif .gif .bmp .tif .tiff .pgm .ppm".split(), ""]   # "": none
Image.init()                # formats that Pillow reads without other programs; an older Pillow lacks AVIF
FORMATS = [name for name in "JPEG PNG WEBP AVIF GIF BMP TIFF PPM".split() if name in Image.OPEN]


def open_image(file):
    """A PIL image, RGB, of a path or an open file: upright, 8 bits deep, on white where it is transparent."""
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > 2 ** 27:                            # a header may ask for any memory
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
        with contextlib.suppress(Exception):                                # EXIF tags may be broken
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                                               # grey, 16 or 32 bits deep
        values = np.asarray(image).astype(np.float32)
        # A guess: white is the smallest of the usual numbers that no pixel is above.
        white = next((white for white in (1, 255, 2 ** 16 - 1) if values.max() <= white), values.max())
        image = Image.fromarray((values * 255 / white).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image, size):
    """A PIL image as uint8 (3, S, S), resized to `size` if need be."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.BICUBIC, reducing_gap=2)
    return pil_to_tensor(image)


def processors():
    """How many processors this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


# ------------------------------------------------------------------------------------------ training sources

SYSTEM = (".", "lost+found", "@eaDir", "__MACOSX", "$RECYCLE", "System Volume")     # so folders begin
SPLITS = {"train", "val", "valid", "validation", "dev", "test"}                     # of people, no people


def demo():
    """The folder of the toy faces, which are painted on first use."""
    root = Path("runs/demo")
    if not root.is_dir():
        from tools.toys import draw_demo
        draw_demo(root)
    return str(root)


def check_source(name, flag):
    """Whether a source, which a flag named, shows people of others (sample.py --real-to), and its folder."""
    root = Path(name)
    if not root.is_dir():
        fail(f"{root}: no such folder; {flag} names a folder, of what is unpacked, or of a train.rec")
    if not (root / "run.json").is_file():
        return False, root
    if not (root / "manifest.csv").is_file():
        fail(f"{root}: sample.py has not finished it, or it is no set of faces")
    with reading(root / "run.json", "the settings of sample.py"):
        return json.loads((root / "run.json").read_text())["real_to"] is not None, root


def list_files(root):
    """Yields name, with slashes, and size of what lies below a folder, however deep; None of what is no file.

    Hidden folders and those of the system are passed by.
    """
    def refuse(error):
        raise error                                 # because os.walk skips a folder that it may not read

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(SYSTEM)]      # before they are opened
        below = Path(folder).relative_to(root).as_posix()
        for file in files:
            path = f"{folder}/{file}"
            size = os.path.getsize(path) if os.path.isfile(path) else None          # a pipe would hang
            yield f"{below}/{file}".removeprefix("./"), size


def list_images(root):
    """{name: size} of the images identity/image below a folder, by name; the names of files left out.

    These are hidden images, images in nobody's folder, and what lies in somebody's folder and is no image.
    """
    images, left_out = {}, []
    for name, size in list_files(root):
        file = Path(name.lower())
        of_somebody = "/" in name and file.name[0] != "."
        if of_somebody and size is not None and file.suffix in SUFFIXES:
            images[name] = size
        elif of_somebody or {*file.suffixes} & {*SUFFIXES} and name != "grid.jpg":      # also .1.jpg.icloud
            left_out.append(name)
    if left_out:
        print(f"{root}: left out {len(left_out)} files that are hidden, in nobody's folder, or no images by "
              f"their names, such as {min(left_out)}")
    return dict(sorted(images.items())), left_out


def list_source(root):
    """What a source holds: identity, name and size (of a record: offset) of each image; what is left out."""
    images, left_out = list_images(root)
    if (root / "train.rec").is_file():
        if images:
            fail(f"{root}: holds train.rec and folders of images, such as {min(images)}; expected one")
        from tools.insightface import list_records
        return *list_records(root / "train.rec"), left_out
    if not images:
        fail(f"{root}: no images identity/image.jpg in it, and no train.rec; unpack what is packed")
    identities = [name.split("/")[0] for name in images]
    if split := next((name for name in identities if name.lower() in SPLITS), None):
        fail(f"{root}/{split} would be a person; expected identity/image.jpg below --data {root}/{split}")
    return identities, [*images], [*images.values()], left_out


class Faces(Dataset):
    """All images of some sources, which `flag` names; equal names of identities are one person.

    An item is an image, uint8 array (3, S, S), and its index, by which labels and landmarks ([0, 1], or NaN)
    are found. In place of an image that cannot be read comes the next one that can, with that one's index.
    Sets that fit in `memory` bytes are decoded once, others when needed. `left_out` has the paths of files
    that are not shown: see `list_images`, and images that could not be read in a scan.
    """

    def __init__(self, sources, size=None, memory=3e9, flag="--data"):
        self.people, self.left_out, self.items = {}, set(), None            # {identity: label}
        self.roots, self.sides = [], []                                     # of each source
        self.names, self.places, self.source, labels = [], [], [], []       # of each image
        if not sources:
            fail(f"nobody said which faces: {flag} names their folders")
        checked = [check_source(source, flag) for source in sources]
        for fills_up, root in sorted(checked, key=lambda source: source[0]):
            identities, names, places, left_out = list_source(root)
            if shared := self.people.keys() & {*identities}:
                refuse_strangers(root, shared, fills_up)
            labels += [self.people.setdefault(identity, len(self.people)) for identity in identities]
            first = len(self.names)
            self.names += map(os.fsencode, names)
            self.places += places
            self.source += [len(self.roots)] * len(names)
            self.roots.append(root)
            self.left_out |= {f"{root}/{name}" for name in left_out}

            # The first image that can be read tells the size of all in this source.
            with reading(root, "images"):
                image, i = self.readable(first)
                if i < first:
                    raise ValueError("none of its images can be read")
            self.sides.append(image.width)

        # Arrays, because Python lists are copied into every worker.
        self.names, self.places, self.source = map(np.array, (self.names, self.places, self.source))
        self.labels = torch.tensor(labels)
        self.size = size or self.sides[0]
        if len(self) * 3 * self.size ** 2 <= memory:
            read = self.scan(torch.arange(len(self)), "reading images")
            self.items = [item for batch in read for item in zip(*(part.numpy() for part in batch))]

    @cached_property
    def landmarks(self):
        """(M, 5, 2) in [0, 1], NaN where unknown; read when asked for, because millions take minutes."""
        names = [[*map(os.fsdecode, self.names[self.source == i])] for i in range(len(self.roots))]
        return torch.cat([*map(read_landmarks, self.roots, names, self.sides)])

    def digest(self):
        """A text that is another one if people, names of files or their sizes are, wherever the files lie."""
        content = hashlib.sha256(b"".join([self.names, self.places, self.labels.numpy()]))
        return f"{len(self)} images of {len(self.people)} people, digest {content.hexdigest()[:16]}"

    def __len__(self):
        return len(self.names)

    def path(self, i):
        """The file of image i; the key of a record takes the place of a name."""
        return f"{self.roots[self.source[i]]}/{os.fsdecode(self.names[i])}"

    def open(self, i):
        """The PIL image i, of a file or of a record, whose name is a bare number."""
        if b"/" in self.names[i]:
            return open_image(self.path(i))
        from tools.insightface import read_record
        return open_image(read_record(self.roots[self.source[i]] / "train.rec", self.places[i]))

    def readable(self, i):
        """The PIL image i, or the next that can be read, and its index."""
        for j in range(i, i + len(self)):
            j %= len(self)
            try:
                return self.open(j), j
            except Exception as error:                              # images break in every possible way
                if system_failed(error):
                    raise
                cause = why(self.path(j), error)
                warnings.warn(f"{self.path(j)}: cannot be read ({cause}); the next image stands in")
        raise ValueError(f"{self.path(i)}: neither this nor any other image can be read")

    def __getitem__(self, i):
        if self.items is not None:
            return self.items[i]
        image, i = self.readable(i)
        side = self.sides[self.source[i]]
        if image.size != (side, side):
            raise ValueError(f"{self.path(i)}: {image.width} x {image.height} pixels, expected {side} x "
                             f"{side}: aligned faces are square and of one size; tools/align.py makes them")
        return to_tensor(image, self.size).numpy(), i

    def loader(self, order):
        """Yields images (B, 3, S, S) and their indices (B,) for each batch of indices in `order`."""
        # Workers are slow to start. Arrays reach them by pipe; tensors would need /dev/shm.
        workers = 0 if self.items is not None or len(self) <= 100 else processors()
        pin = DEVICE.type == "cuda"                 # does nothing to arrays, but its thread reads ahead
        loader = DataLoader(self, batch_sampler=map(np.asarray, order), num_workers=workers,
                            collate_fn=stacked, pin_memory=pin, worker_init_fn=apart)
        try:
            for images, indices in loader:
                images = torch.from_numpy(images)
                yield images.pin_memory() if pin else images, torch.from_numpy(indices)
        except ValueError as error:                 # a worker's has its traceback before the last line
            fail(str(error).splitlines()[-1].removeprefix("ValueError: "))

    def scan(self, indices, title):
        """Yields the images at `indices` (M,) once, in batches as `loader` does, under a progress bar."""
        order = indices.split(256)
        loaded = tqdm(self.loader(order), title, len(order), leave=False)
        for wanted, (images, i) in zip(order, loaded):
            self.left_out |= {*map(self.path, wanted[wanted != i].tolist())}
            yield images, i


def refuse_strangers(root, shared, fills_up):
    """Says how many people a source shares with those before it, by their names.

    Ends the program if they are bare numbers, because number 7 is somebody else in every set; not so if the
    source fills up people of other sources.
    """
    print(f"{root}: {len(shared)} of its people are in other sources, too, such as {min(shared)}")
    if not fills_up and any(name.isdigit() for name in shared):
        fail(f"{root}: people who are numbers in two sources, such as {min(shared)}, may be strangers; give "
             "them other names, in folders, or use one of the sources")


def rows_of(people, names):
    """The place in `names` of each of the people (I,); somebody who is not there gets one after the last."""
    row_of = {name: len(names) + i for i, name in enumerate(people)}
    row_of |= {name: row for row, name in enumerate(names)}
    return torch.tensor([row_of[name] for name in people])


def stacked(items):
    """Items of `Faces` as one batch of arrays."""
    return [np.stack(part) for part in zip(*items)]


def apart(_):
    """Lets a worker end with the training loop, not by a signal to all: the running step needs its images."""
    if sys.platform == "linux":
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                  # PR_SET_PDEATHSIG


def batches(faces, batch, seed, first, last, landmarks=True):
    """Yields images in [-1, 1], labels and landmarks, if asked for, on DEVICE, of steps first to last - 1.

    Seed and step alone decide what a batch holds, so a resumed run sees what it would have seen. Images that
    do not fill a whole batch are left out of an epoch. Each of several ranks gets its part of a batch.
    """
    per_epoch = len(faces) // batch

    def order():
        for epoch in itertools.count(first // per_epoch):
            shuffled = np.random.default_rng([abs(seed), epoch]).permutation(len(faces))
            yield from shuffled[:per_epoch * batch].reshape(per_epoch, batch)[:, RANK::WORLD]

    columns = [faces.labels, faces.landmarks] if landmarks else [faces.labels]
    before = first % per_epoch                                      # steps of this epoch that are done
    for images, i in faces.loader(itertools.islice(order(), before, before + last - first)):
        parts = [images, *(column[i] for column in columns)]
        images, *rest = (part.to(DEVICE, non_blocking=True) for part in parts)
        yield to_float(images), *rest


# ------------------------------------------------------------------------------------------------ benchmarks

def read_benchmark(path, size):
    """Images uint8 (2P, 3, S, S) of an InsightFace .bin; whether images 2p and 2p + 1 are one person (P,)."""
    from tools.insightface import decode_bin
    return decode_bin(path, size)


def find_benchmarks(paths, folders=()):
    """{name: path} of the benchmarks at some paths, or, if none are named, of those that folders hold."""
    beside = [path for folder in folders for path in sorted(Path(folder).glob("*.bin"))]
    if not paths and not beside:
        return {}
    from tools.insightface import choose_benchmarks, named_benchmarks
    return named_benchmarks(paths) if paths else choose_benchmarks(beside)


def benchmark_people(benchmarks, size):
    """All images (M, 3, S, S) of benchmarks {name: path}, and labels (M,): people, as their pairs tell."""
    from tools.insightface import people_of_pairs
    return people_of_pairs(read_benchmark(path, size) for path in benchmarks.values())


# ----------------------------------------------------------------------------------------- tables, landmarks

# Where the five landmarks lie in an aligned 112 x 112 crop: the ArcFace template.
TEMPLATE = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                         [70.7299, 92.2041]]) / 112


def read_csv(path):
    """The rows of a CSV file; names of files may hold any character, and bytes that are not UTF-8."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [row for row in csv.reader(file) if row]


def write_csv(path, header, rows):
    """Writes a CSV file, row by row."""
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(itertools.chain([header], rows))


def write_landmarks(path, rows):
    """Writes landmarks.csv from pairs of a file name in its folder and landmarks (5, 2) in pixels."""
    header = ["file", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]
    write_csv(path, header, ([name, *map("{:.2f}".format, face.flatten().tolist())] for name, face in rows))


def read_landmarks(root, names, side):
    """Landmarks (M, 5, 2) in [0, 1] of images of `side` pixels, by their names; NaN where there are none."""
    path, row_of = root / "landmarks.csv", {name: i for i, name in enumerate(names)}
    landmarks = torch.full((len(names), 5, 2), torch.nan)
    if not path.is_file():
        return landmarks
    with reading(path, "lines of file,x1,y1,...,x5,y5 in pixels"):
        lines = read_csv(path)
        header = lines and lines[0][-1].strip()[:1].isalpha()
        rows = {name: numbers for name, *numbers in lines[bool(header):]}
        for name, numbers in rows.items():
            points = np.array(numbers, np.float64) / side
            if points.shape != (10,) or not (abs(points - 0.5) < 1.5).all():
                raise ValueError(f"the row of {name} is {numbers}, not ten numbers in or near {side} pixels")
            if name in row_of:
                landmarks[row_of[name]] = torch.from_numpy(points).view(5, 2)
    if unknown := rows.keys() - row_of.keys():
        print(f"{path}: {len(unknown)} of its {len(rows)} rows name no image here, such as {min(unknown)}")
    distance = (landmarks - TEMPLATE).norm(dim=2).nanmean()
    if distance > 0.2:                      # right files had 0.15 at most
        print(f"{path}: WARNING landmarks are {distance:.2f} of the image away from an aligned face's; they "
              "should be pixels, x before y, of left eye, right eye, nose, left and right mouth corner")
    return landmarks
