"""Faces: training sources and their batches, benchmarks and landmarks.

A source is a folder of identity/image.jpg, or of InsightFace's train.rec and train.idx (identities are
labels, file names are keys). It may hold landmarks.csv (file,x1,y1,...,x5,y5 in pixels: eyes, nose, mouth
corners, left to right) and *.bin benchmarks. tools/inputs.py judges what is no plain folder of images.
Photographs become aligned crops by tools/align.py.
"""
import contextlib
import csv
import hashlib
import itertools
import os
from functools import cached_property
from multiprocessing import util
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from model import DEVICE, RANK, WORLD, fail, reading, replacing, to_float

# ---------------------------------------------------------------------------------------------------- images

SUFFIXES = [*".jpg .jpeg .jfif .png .webp .avif .gif .bmp .tif .tiff .pgm .ppm".split(), ""]   # "": none
Image.init()                # formats that Pillow reads without other programs; an older Pillow lacks AVIF
FORMATS = [name for name in "JPEG PNG WEBP AVIF GIF BMP TIFF PPM".split() if name in Image.OPEN]


def open_image(file):
    """A PIL image, RGB, of a path or an open file, turned upright."""
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > 2 ** 27:                            # a header may ask for any memory
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
        with contextlib.suppress(Exception):                                # EXIF tags may be broken
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF" or image.has_transparency_data:                # 16 or 32 bits deep; see-through
        from tools.inputs import plain_image
        image = plain_image(image)
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


def list_files(folder, below=""):
    """Yields name, with slashes, and size of what lies below a folder, however deep; None of what is no file.

    Hidden folders and those of the system are passed by.
    """
    for entry in os.scandir(folder):
        name = below + entry.name
        if os.path.isfile(entry):
            yield name, entry.stat().st_size
        elif not os.path.isdir(entry):                          # a pipe would hang; a link may lead nowhere
            yield name, None
        elif not entry.name.startswith(SYSTEM):
            yield from list_files(entry, f"{name}/")


def list_source(root):
    """Lists a folder: itself, its images (identity, name, size) in the order of names, names of other files.

    An image is identity/image, however deep, and neither hidden nor in a folder that is no person's.
    """
    images, others = [], []
    for name, size in sorted(list_files(root)):
        identity, slash, _ = name.partition("/")
        file = Path(name)
        somebody = slash and identity.lower() not in SPLITS and file.name[0] != "."
        if somebody and size is not None and file.suffix.lower() in SUFFIXES:
            images.append((identity, name, size))
        elif slash or name != "grid.jpg" and file.suffix not in (".csv", ".bin"):
            others.append(name)
    return root, images, others


def list_sources(sources, flag):
    """What sources, which `flag` names, hold together.

    Returns their folders, people {identity: label}, the paths of files that are left out, and of each image
    name in bytes, size, number of its source, label. For a train.rec, key and offset are name and size.
    """
    roots = [*map(Path, sources)]
    there = all(root.is_dir() for root in roots)
    listed = [list_source(root) for root in roots if there]
    plain = all(images and not others for _, images, others in listed)
    if len(listed) != 1 or not plain:
        from tools.inputs import judge_sources
        listed = judge_sources(roots, listed, flag)

    people, left_out, rows = {}, set(), []
    for i, (root, images, others) in enumerate(listed):
        left_out |= {f"{root}/{name}" for name in others}
        for identity, name, size in images:
            label = people.setdefault(identity, len(people))
            rows.append((os.fsencode(name), size, i, label))
    return [root for root, _, _ in listed], people, left_out, rows


class Faces(Dataset):
    """All images of some sources, which `flag` names; equal names of identities are one person.

    An item is an image, uint8 array (3, S, S), and its index, by which labels and landmarks ([0, 1], or NaN)
    are found. In place of an image that cannot be read comes the next one that can, with that one's index.
    Sets that fit in `memory` bytes are decoded once, others when needed. `left_out` has the paths of files
    that are not shown: see tools/inputs.py, and images that could not be read in a scan.
    """

    def __init__(self, sources, size=None, memory=3e9, flag="--data"):
        self.roots, self.people, self.left_out, rows = list_sources(sources, flag)
        # Arrays, because Python lists are copied into every worker.
        self.names, self.places, self.source, labels = map(np.array, zip(*rows))
        self.labels = torch.from_numpy(labels)

        # The first image of a source that can be read tells the size of all.
        self.sides, self.items = [], None
        for i, root in enumerate(self.roots):
            with reading(root, "images"):
                image, _ = self.readable(np.searchsorted(self.source, i))
            self.sides.append(image.width)
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
        return open_image(read_record(self, i))

    def readable(self, i):
        """The PIL image i, or the next of its source that can be read, and its index."""
        try:
            return self.open(i), i
        except Exception:                                           # images break in every possible way
            from tools.inputs import stand_in
            return stand_in(self, i)

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
            for batch in loader:
                images, indices = map(torch.from_numpy, batch)
                yield images.pin_memory() if pin else images, indices
        except ValueError as error:                 # a worker's has its traceback before the last line
            fail(str(error).splitlines()[-1].removeprefix("ValueError: "))

    def scan(self, indices, title):
        """Yields the images at `indices` (M,) once, in batches as `loader` does, under a progress bar."""
        order = indices.split(256)
        loaded = tqdm(self.loader(order), title, len(order), leave=False)
        for wanted, (images, i) in zip(order, loaded):
            self.left_out |= {*map(self.path, wanted[wanted != i].tolist())}
            yield images, i


def rows_of(people, names):
    """The place in `names` of each of the people (I,); somebody who is not there gets one after the last."""
    row_of = {name: row for row, name in enumerate(names)}
    return torch.tensor([row_of.get(name, len(names) + i) for i, name in enumerate(people)])


def stacked(items):
    """Items of `Faces` as one batch of arrays."""
    return [np.stack(part) for part in zip(*items)]


def apart(_):
    """Lets a worker end with the training loop, not by a signal to all: the running step needs its images."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    # Python runs this when a worker exits, before it waits for its last images to be read. Nobody reads them
    # if the loop was killed, and the worker would wait for ever.
    util.Finalize(None, os._exit, [0], exitpriority=0)


def batches(faces, batch, seed, first, last, landmarks=True):
    """Yields images in [-1, 1], labels and landmarks, if asked for, on DEVICE, of steps first to last - 1.

    Seed and step alone decide what a batch holds, so a resumed run sees what it would have seen. Images that
    do not fill a whole batch are left out of an epoch. Each of several ranks gets its part of a batch.
    """
    per_epoch = len(faces) // batch

    def order():
        for step in range(first, last):
            epoch, place = divmod(step, per_epoch)
            if step == first or place == 0:
                shuffled = np.random.default_rng([abs(seed), epoch]).permutation(len(faces))
            yield shuffled[place * batch:][:batch][RANK::WORLD]

    columns = [faces.labels, faces.landmarks] if landmarks else [faces.labels]
    for images, i in faces.loader(order()):
        parts = [images, *(column[i] for column in columns)]
        images, *rest = (part.to(DEVICE, non_blocking=True) for part in parts)
        yield to_float(images), *rest


# ------------------------------------------------------------------------------------------------ benchmarks

def read_benchmark(path, size):
    """Images uint8 (2P, 3, S, S) of an InsightFace .bin; whether images 2p and 2p + 1 are one person (P,)."""
    from tools.insightface import read_benchmark
    return read_benchmark(path, size)


def find_benchmarks(paths, folders=()):
    """{name: path} of the benchmarks at some paths, or, if none are named, of those that folders hold."""
    beside = [path for folder in folders for path in sorted(Path(folder).glob("*.bin"))]
    if not paths and not beside:
        return {}
    from tools.insightface import choose_benchmarks, named_benchmarks
    return named_benchmarks(paths) if paths else choose_benchmarks(beside)


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
    header = "file x1 y1 x2 y2 x3 y3 x4 y4 x5 y5".split()
    write_csv(path, header, ([name, *map("{:.2f}".format, face.flatten().tolist())] for name, face in rows))


def read_landmarks(root, names, side):
    """Landmarks (M, 5, 2) in [0, 1] of images of `side` pixels, by their names; NaN where there are none."""
    path, rows, none = root / "landmarks.csv", {}, np.full(10, np.nan)
    if path.is_file():
        with reading(path, "lines of file,x1,y1,...,x5,y5 in pixels"):
            lines = read_csv(path)
            header = lines and lines[0][-1].strip()[:1].isalpha()
            for name, *numbers in lines[bool(header):]:
                points = np.array(numbers, np.float64) / side
                if points.shape != (10,) or not (abs(points - 0.5) < 1.5).all():
                    raise ValueError(f"the row of {name} is {numbers}, not ten numbers in or near {side} "
                                     "pixels")
                rows[name] = points
    landmarks = np.array([rows.get(name, none) for name in names])
    landmarks = torch.from_numpy(landmarks).float().view(-1, 5, 2)
    distance = (landmarks - TEMPLATE).norm(dim=2).nanmean()
    unknown = rows.keys() - {*names}
    if unknown or distance > 0.2:                                   # right files had 0.15 at most
        from tools.inputs import tell_landmarks
        tell_landmarks(path, rows, unknown, distance)
    return landmarks
