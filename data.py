"""Faces: the demo people this file draws, image folders, landmarks, and verification benchmarks.

    python data.py align photos/ --out faces/           # identity/photo.jpg -> aligned 112 x 112 crops
    python data.py landmarks casia/                     # of aligned faces, ahead of dit_train.py

A source is a folder `root/identity/image.jpg|png`, or one with InsightFace records (`train.rec`, `train.idx`:
identities are their labels, files their keys), with `root/landmarks.csv` where there is one (file,x1,y1,
...,x5,y5 in pixels: left eye, right eye, nose, left and right mouth corner) and `root/*.bin` benchmarks where
there are any. The source `demo` is drawn on first use into runs/demo, as just such a folder.
"""
import argparse
import csv
import functools
import hashlib
import io
import math
import os
import pickle
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.io import encode_png, write_png
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from model import RetinaFace, detect_faces, fail, load_published, reading, replace_file, run, to_float, to_uint8

CROPS = (".jpg", ".jpeg", ".png")
PHOTOGRAPHS = (*CROPS, ".webp", ".bmp", ".tif", ".tiff")

# Where the five landmarks lie in an aligned 112 x 112 crop: the ArcFace template.
TEMPLATE = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                         [70.7299, 92.2041]]) / 112


def similarity(source, target):
    """Complex scale, shift (..., 1) of the least-squares scale z + shift of points (..., 5, 2) (Umeyama).

    In the plane, rotation and scale are one complex number, and least squares gives it as a quotient.
    """
    source, target = (torch.view_as_complex(points.contiguous()) for points in (source, target))
    s, t = (z - z.mean(-1, keepdim=True) for z in (source, target))
    scale = (s.conj() * t).sum(-1, keepdim=True) / (s.abs() ** 2).sum(-1, keepdim=True)
    return scale, target.mean(-1, keepdim=True) - scale * source.mean(-1, keepdim=True)


def move(points, scale, shift):
    """Points (..., 2) carried by a similarity z -> scale z + shift."""
    return torch.view_as_real(scale * torch.view_as_complex(points.contiguous()) + shift)


def yaw_of(landmarks):
    """How far faces (M, 5, 2) look aside: the nose's offset from between the eyes, in eye distances (M,)."""
    left, right, nose = landmarks[:, :3, 0].unbind(1)
    return (nose - (left + right) / 2) / (right - left).abs().clamp(min=1e-3)


# ------------------------------------------------------------------------------------------ the demo's people
#
# One face, painted on an ellipsoid with bumps, whose numbers vary independently, because virtual people can
# only differ from everybody as much as the space of faces is wide. Shapes here: B pictures, P pixels; numbers
# and masks (B, 1, P or 1), colours (B, 3, P or 1).

WAVES = torch.tensor([(k, l, m) for k in (1.5, 3.5) for l in (1.5, 3.5) for m in (0, math.pi / 2)])
BUMPS = torch.tensor([                          # x, y, width, height, mean and spread of how far it stands out
    (0, .19, .12, .12, .25, .09), (0, 0, .08, .20, .08, .05),                   # tip of the nose, its bridge
    (0, .85, .30, .20, .02, .12), (0, -.34, .50, .10, .04, .04),                # chin, forehead
    (.48, .20, .22, .20, 0, .08), (.68, .58, .25, .25, -.02, .12)])             # cheeks, jaw
SPOTS = [           # x, y, width, height, how they vary, is it opened by mouth and lids; share of skin and hair
    (0, .76, .45, .25, .3, 0, 0, .4, .5),                                       # beard
    (0, .52, .27, .07, .05, .6, 0, .75, 0), (0, .51, .23, .02, .05, .9, 0, .2, 0),          # lips, mouth
    (.39, -.18, .16, .09, .05, 0, .3, .3, 0), (.39, -.16, .14, .07, .05, 0, .3, 1, 0),      # lashes, eye
    (.39, -.16, .05, .05, .02, 0, .2, .1, 0), (.39, -.37, .19, .04, .05, 0, 0, 0, .7),      # iris, brow
    (.5, .3, .25, .2, .3, 0, 0, .8, 0),                                         # cheeks
    *[(0, .1, .06, .04, .7, 0, 0, .6, 0)] * 5]                                  # marks anywhere
FEATURES = torch.tensor([(-.39, -.16), (.39, -.16), (0, .19), (-.26, .51), (.26, .51)]).T     # five landmarks
PERSON = dict(radii=3, bumps=6, tint=24, skin=4, hair=3, hairline=4, spots=8 * len(SPOTS))    # numbers of each
PICTURE = dict(turn=2, expression=2, crop=4, light=5, colour=3, background=9)


def named(dials, counts):
    """Numbers (B, sum of counts) in [0, 1] by name, (B, count, 1) in [-1, 1]."""
    return SimpleNamespace(**dict(zip(counts, (2 * dials - 1)[..., None].split([*counts.values()], 1))))


def swell(who, u, v):
    """The head's radius, in the ellipsoid's, at the points (u, v) of the face."""
    x, y, width, height, mean, spread = BUMPS.T[..., None]
    bump = torch.exp(-((u.abs() - x) / width) ** 2 - ((v - y) / height) ** 2)   # (B, 6, P)
    return 1 + ((mean + spread * who.bumps) * bump).sum(1, keepdim=True)


def paint(who, how, u, v, front, pixel):
    """Colours (B, 3, P) of the points (u, v) of the face, if they are in front; `pixel` in head units."""
    edge = lambda inward: (inward / pixel + 0.5).clamp(0, 1)                    # one pixel wide
    k, l, m = WAVES.T[..., None]
    skin = torch.tensor([.63, .45, .36])[:, None] + .28 * who.skin[:, :1] + .08 * who.skin[:, 1:]
    hair = .33 + .31 * who.hair
    canvas = skin + .06 * who.tint.unflatten(1, (3, 8)).squeeze(-1) @ ((k * u).cos() * (l * v + m).cos())
    mouth, lids = how.expression.split(1, 1)
    for spot, numbers in zip(SPOTS, who.spots.split(8, 1)):
        x, y, width, height, vary, by_mouth, by_lids, of_skin, of_hair = spot
        right, down, wider, higher, tilt, *colour = numbers.split(1, 1)
        side = (u.abs() if x else u) - x - vary * right                 # there are two of what is off the middle
        across = (side + .3 * tilt * (v - y)) / (width * (1 + .25 * wider))
        height = height * (1 + .25 * higher) * (1 + by_mouth * mouth + by_lids * lids)
        along = (v - y - vary * down - .3 * tilt * side) / height
        mask = edge((1 - (across ** 2 + along ** 2 + 1e-9).sqrt()) * height) * front
        canvas = canvas + mask * (of_skin * skin + of_hair * hair + .25 * torch.cat(colour, 1) - canvas)
    top, arch, *curls = who.hairline.split(1, 1)
    top = -.67 + .17 * top + (.2 + .3 * arch) * u ** 2
    top = top + sum(.05 * curl * (6 * (i + 1) * u).cos() for i, curl in enumerate(curls))
    return (canvas + edge(top - v).where(front, 1.0) * (hair - canvas)).clamp(0, 1)


def draw_faces(identity, nuisance, size):
    """Draws people (B, 148) in circumstances (B, 25), in [0, 1]: images (B, 3, S, S), landmarks (B, 5, 2).

    Each pixel's ray is cast onto the surface of the head, so pose, parallax and landmarks are exact.
    """
    B, pixel = len(identity), 2.2 / size                                        # in head units
    who, how = named(identity, PERSON), named(nuisance, PICTURE)
    radii = torch.tensor([.89, 1.2, .95])[:, None] + .1 * who.radii
    yaw, pitch = .8 * how.turn[:, :1], .3 * how.turn[:, 1:]
    sy, cy, sp, cp = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
    turn = torch.cat([cy, 0 * cy, -sy, -sy * sp, cp, -cy * sp, sy * cp, sp, cy * cp], 1).view(B, 3, 3)

    # Five landmarks on the surface, and the similarity that carries them to the aligned crop, a little off.
    points = torch.cat([FEATURES, (1 - FEATURES.square().sum(0, keepdim=True)).sqrt()])
    points = (turn.mT @ (points * radii * swell(who, *FEATURES)))[:, :2].mT                 # (B, 5, 2)
    scale, shift = similarity(points, TEMPLATE.expand(B, 5, 2))
    zoom, tilt, right, down = how.crop.unbind(1)
    scale = scale * torch.polar(1 + .05 * zoom, .05 * tilt)
    shift = shift + .02 * torch.complex(right, down)

    # Cast every pixel's ray a + b z onto the surface |a + b z| = rho(u, v), by fixed-point iteration on rho.
    grid = (torch.arange(size) + .5) / size
    grid = torch.cartesian_prod(grid, grid).flip(1)[None]                                   # (1, P, 2)
    xy = move(grid, 1 / scale, -shift / scale).mT                                           # (B, 2, P)
    a, b = turn[:, :, :2] @ xy / radii, turn[:, :, 2:] / radii                              # (B, 3, P or 1)
    aa, ab, bb = ((x * y).sum(1, keepdim=True) for x, y in ((a, a), (a, b), (b, b)))
    rho = 1.0
    for _ in range(4):
        inside = ab ** 2 - bb * (aa - rho ** 2)                                 # > 0 where the ray hits
        z = (inside.clamp(min=0).sqrt() - ab) / bb
        u, v, w = ((a + b * z) / rho).split(1, 1)                               # coordinates of the face
        rho = swell(who, u, v)

    # Light on the surface normals, which are the slope of the depth map; behind the head a coloured slope.
    depth = (z * (inside > 0)).view(B, size, size)
    down, right = (slope * scale.abs()[..., None] * size for slope in torch.gradient(depth, dim=(1, 2)))
    normal = F.normalize(torch.stack([-right, -down, torch.ones_like(depth)], 1), dim=1).flatten(2)
    towards = F.normalize(how.light[:, 2:] + torch.tensor([0, -.3, 2])[:, None], dim=1)
    lambert = (normal * towards).sum(1, keepdim=True).clamp(min=0)
    light = .5 + .15 * how.light[:, :1] + (.62 + .13 * how.light[:, 1:2]) * lambert
    head = paint(who, how, u, v, w > 0, pixel) * light * (1 + .08 * how.colour)
    image = .45 + .35 * how.background[:, :3] + .2 * how.background[:, 3:].view(B, 3, 2) @ xy
    image = image + (inside / (3 * pixel) + 0.5).clamp(0, 1) * (head - image)
    return image.view(B, 3, size, size).clamp(0, 1), move(points, scale, shift)


def write_csv(path, header, rows):
    """Writes a CSV file, all of it or nothing."""
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    replace_file(path, write)


def write_landmarks(path, rows):
    """Writes landmarks.csv from pairs of a file name in its folder and landmarks (5, 2) in pixels."""
    header = ["file", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]
    write_csv(path, header, ([name, *map("{:.2f}".format, points.flatten().tolist())] for name, points in rows))


def write_bin(path, images, pairs, generator):
    """Writes an InsightFace .bin of people (I, P, 3, S, S), uint8: ten folds sharing nobody, half same."""
    encoded, same = [], [p % 2 == 1 for p in range(pairs)]
    for p, fold in enumerate(fold for fold in images.chunk(10) for _ in range(pairs // 10)):
        i, j = torch.randperm(len(fold), generator=generator)[:2].tolist()
        a, b = torch.randperm(images.shape[1], generator=generator)[:2].tolist()
        encoded += [bytes(encode_png(image).numpy()) for image in (fold[i, a], fold[i if same[p] else j, b])]
    replace_file(path, lambda temporary: temporary.write_bytes(pickle.dumps((encoded, same), protocol=4)))


def draw_demo(root, people=2000, held_out=200, per_person=8, size=32):
    """Draws the demo: a folder of `people` with landmarks.csv, and heldout.bin of others nobody trains on."""
    generator, temporary = torch.Generator().manual_seed(0), Path(f"{root}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pictures, landmarks = [], []
    for person in tqdm(range(people + held_out), "drawing people", leave=False):
        who = torch.rand(1, sum(PERSON.values()), generator=generator).expand(per_person, -1)
        images, points = draw_faces(who, torch.rand(per_person, sum(PICTURE.values()), generator=generator), size)
        noise = 0.02 * torch.randn(images.shape, generator=generator)           # of the sensor
        pictures.append(to_uint8(2 * images - 1 + noise))
        landmarks += ((f"p{person:04d}/{i:04d}.png", size * face) for i, face in enumerate(points))
    for (name, _), image in zip(landmarks[:people * per_person], torch.cat(pictures)):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(image, str(temporary / name))
    write_landmarks(temporary / "landmarks.csv", landmarks[:people * per_person])
    write_bin(temporary / "heldout.bin", torch.stack(pictures[people:]), 3000, generator)
    os.replace(temporary, root)


# ----------------------------------------------------------------------- images, benchmarks, training sources


def read_image(file, size=None):
    """One image of a path or an open file, uint8 (3, S, S) RGB, resized to `size` if need be."""
    with Image.open(file) as image:
        if image.width * image.height > 64e6:
            raise ValueError(f"{image.width} x {image.height} pixels are no face crop")
        image = image.convert("RGB")
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2)
    return pil_to_tensor(image)


MAGIC = 0xced7230a                                                      # begins each RecordIO record


@functools.cache
def mapped(path):
    """The bytes of a file, mapped into memory once by each process."""
    return np.memmap(path, np.uint8, "r")


def read_record(path, offset):
    """The encoded image, an open file, of the record at `offset`; one that holds MAGIC is cut there in parts."""
    content, parts, flag = mapped(path), [], 1
    while flag in (1, 2):                                               # begins, goes on; 0 is whole, 3 the end
        _, word = struct.unpack_from("<II", content, offset)
        flag, length = word >> 29, word & 0x1fffffff
        parts.append(content[offset + 8:offset + 8 + length].tobytes())
        offset += 8 + (length + 3) // 4 * 4
    record = struct.pack("<I", MAGIC).join(parts)
    return io.BytesIO(record[24 + 4 * struct.unpack_from("<I", record)[0]:])


def list_records(path):
    """Yields identity, key, offset of the images in an InsightFace .rec file, by its .idx; none is decoded.

    A record is magic, length, then flag, label, two ids, `flag` more labels (then those count), image.
    Records without an image (the header, and a list of identities at the end) are left out.
    """
    index = path.with_suffix(".idx")
    with reading(index, f"a line of key and offset for every record of {path.name}"):
        content = mapped(path)
        for line in index.read_text().splitlines():
            key, offset = map(int, line.split())
            magic, length, flag, label = struct.unpack_from("<IIIf", content, max(0, offset))
            if magic != MAGIC or offset < 0 or offset + 8 + (length & 0x1fffffff) > len(content):
                raise ValueError(f"record {key} lacks the magic number or ends beyond {len(content)} bytes")
            image = offset + 32 + 4 * flag
            label, = struct.unpack_from("<f", content, offset + 32) if flag else (label,)
            if content[image:image + 2].tobytes() in (b"\xff\xd8", b"\x89P"):               # JPEG, PNG
                yield str(int(label)), str(key), offset


def list_images(root):
    """Yields identity, name, offset of the images of a source: name as in landmarks.csv, offset in a .rec."""
    if (root / "train.rec").is_file():
        yield from list_records(root / "train.rec")
    for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        for name in sorted(os.listdir(root / folder)):
            if name.lower().endswith(CROPS):
                yield folder, f"{folder}/{name}", -1


class BinUnpickler(pickle.Unpickler):
    """Reads InsightFace .bin pickles and nothing else: bytes, lists, bools, numbers and numpy arrays."""

    ALLOWED = {"_codecs.encode", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
               "numpy.core.multiarray.scalar", "numpy.core.numeric._frombuffer"}

    def find_class(self, module, name):
        if f"{module}.{name}".replace("_core", "core") not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no benchmark needs")
        return super().find_class(module, name)


def read_benchmark(path, size):
    """An InsightFace .bin: uint8 images (2P, 3, S, S), pair p is 2p and 2p + 1; same person or not (P,) bool."""
    with reading(path, "an InsightFace .bin benchmark"), ThreadPoolExecutor(processors()) as pool:
        with open(path, "rb") as file:
            encoded, same = BinUnpickler(file, encoding="bytes").load()
        decoded = pool.map(lambda image: read_image(io.BytesIO(bytes(image)), size), encoded)
        images = torch.stack([*tqdm(decoded, f"reading {Path(path).name}", len(encoded), leave=False)])
        same = torch.as_tensor(np.asarray(same, dtype=bool))
        if len(images) != 2 * len(same) or len(same) < 10 or same.all() or not same.any():
            raise ValueError(f"10 pairs or more, of one person and of two, are a benchmark: {len(images)} "
                             f"images, {same.sum()} pairs of one person and {(~same).sum()} of two found")
    return images, same


def processors():
    """How many processors this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def open_source(name):
    """The folder of a data source, drawing the demo first if it is asked for and not there yet."""
    root = Path("runs/demo" if name == "demo" else name)
    if name == "demo" and not root.is_dir():
        draw_demo(root)
    if not root.is_dir():
        fail(f"--data {name}: no such folder; give a folder of identity folders with images, or 'demo'")
    return root


def read_landmarks(path, names, side):
    """Landmarks (M, 5, 2) in [0, 1] of crops `side` wide by their names; NaN where landmarks.csv has none."""
    table = {}
    if path.is_file():
        with reading(path, "lines of file,x1,y1,...,x5,y5 in pixels"), open(path, newline="") as file:
            for name, *numbers in list(csv.reader(file))[1:]:
                table[name] = np.array(numbers[:10], np.float32).reshape(5, 2) / side
                if (np.abs(table[name] - 0.5) > 2).any():
                    raise ValueError(f"{name} has some far outside its {side} pixels")
    unknown = np.full((5, 2), np.nan, np.float32)
    return torch.from_numpy(np.stack([table.get(name, unknown) for name in names]))


class Faces(Dataset):
    """Images of one or more sources united by identity name: uint8 images, labels, landmarks ([0, 1] or NaN).

    Sets that fit in `memory` bytes are decoded once, by threads; larger ones by the loader's workers, again
    and again. For an image that cannot be read the next one stands in, with its label and landmarks. Paths
    are one array of bytes: millions of Python strings would fill the memory, once a worker.
    """

    def __init__(self, sources, size=None, memory=3e9):
        self.people, self.bad, self.images, self.size = {}, set(), None, None   # people: {identity: label}
        self.paths, self.offsets, self.labels, self.landmarks = [], [], [], []
        for source in sources:
            root = open_source(source)
            found = [*list_images(root)]
            if not found:
                fail(f"--data {source}: no images in it; expected identity/image.jpg or .png, or train.rec "
                     "with train.idx")
            identities, names, offsets = zip(*found)
            first = len(self.paths)
            self.paths = np.append(self.paths, [os.fsencode(f"{root}/{name}") for name in names]).astype("S")
            self.offsets = np.append(self.offsets, offsets).astype(int)
            self.labels += [self.people.setdefault(identity, len(self.people)) for identity in identities]
            side = self.readable(first)[0].shape[2]                     # as stored, while self.size is None
            self.landmarks.append(read_landmarks(root / "landmarks.csv", names, side))
            size = size or side
        self.size, self.labels, self.landmarks = size, torch.tensor(self.labels), torch.cat(self.landmarks)
        if len(self) * 3 * size ** 2 <= memory:
            with ThreadPoolExecutor(processors()) as pool:
                decoded = pool.map(self.readable, range(len(self)))
                images, which = zip(*tqdm(decoded, "reading images", len(self), leave=False, mininterval=1))
            self.images, self.which = np.stack(images), np.array(which)
            self.report(np.flatnonzero(self.which != np.arange(len(self))))

    def __len__(self):
        return len(self.paths)

    def path(self, i):
        """The file of image i; a record's key takes the place of its name."""
        return os.fsdecode(self.paths[i])

    def readable(self, i):
        """Image i, or the next that can be read: uint8 array (3, S, S), and which one it is."""
        for j in ((i + on) % len(self) for on in range(len(self))):
            try:
                path, offset = Path(self.path(j)), self.offsets[j]
                file = path if offset < 0 else read_record(path.parent / "train.rec", offset)
                return read_image(file, self.size).numpy(), j
            except Exception:                                           # images break in every possible way
                continue
        fail(f"{self.path(i)}: neither this nor any other image can be read")

    def report(self, unreadable):
        """Names images that could not be read; ends the program if over 1 % are."""
        for i in set(unreadable.tolist()) - self.bad:
            tqdm.write(f"warning: {self.path(i)}: unreadable image, another stands in", sys.stderr)
            self.bad.add(i)
        if len(self.bad) > 0.01 * len(self):
            fail(f"{self.path(min(self.bad))}: unreadable image, one of {len(self.bad)} in {len(self)}; "
                 "over 1 % is no accident, replace or remove them")

    def __getitems__(self, indices):
        """A batch: uint8 images (B, 3, S, S), which ones they are (B,), and which were wanted (B,)."""
        wanted = np.array(indices)
        if self.images is not None:
            return self.images[wanted], self.which[wanted], wanted
        images, which = zip(*map(self.readable, wanted.tolist()))
        return np.stack(images), np.array(which), wanted

    def loader(self, order):
        """Yields (images, indices) of the batches of indices in `order`, decoded by workers if need be."""
        workers = 0 if self.images is not None else processors()        # arrays come by pipe: no /dev/shm
        for images, which, wanted in DataLoader(self, batch_sampler=order, collate_fn=tuple,
                                                num_workers=workers):
            self.report(wanted[which != wanted])
            images = torch.from_numpy(images)
            yield images.pin_memory() if torch.cuda.is_available() else images, torch.from_numpy(which)


def batches(faces, batch, seed, first, last, device, name):
    """Yields step, images in [-1, 1], labels, landmarks on `device`, for the steps from first to last - 1.

    All chance in a step, the order of images and what comes after, follows from (seed, step): a resumed run
    repeats itself.
    """
    per_epoch = len(faces) // batch                                             # drop_last

    def order():
        for step in range(first, last):
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == first:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                shuffled = torch.randperm(len(faces), generator=generator).tolist()
            yield shuffled[position * batch:(position + 1) * batch]
    progress = tqdm(faces.loader(order()), name, initial=first, total=last, mininterval=1, leave=False)
    for step, (images, i) in enumerate(progress, first):
        torch.manual_seed(seed * 1_000_003 + step)
        x, labels, landmarks = (tensor.to(device, non_blocking=True)
                                for tensor in (images, faces.labels[i], faces.landmarks[i]))
        yield step, to_float(x), labels, landmarks


# ------------------------------------------------- landmarks and alignment: photographs to training crops

WEIGHTS_URL = "https://github.com/xinntao/facexlib/releases/download/v0.1.0/detection_mobilenet0.25_Final.pth"
WEIGHTS_SHA256 = "2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220"


def load_detector(weights, folder, device):
    """RetinaFace with published weights: those named, or fetched (1.8 MB) into `folder` once and checked."""
    path = Path(weights or Path(folder) / WEIGHTS_URL.split("/")[-1])
    if not weights and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256)
        except (OSError, RuntimeError) as error:
            fail(f"{WEIGHTS_URL}: not fetched ({error}); put that file at {path}, or name it with --weights")
    return load_published(RetinaFace(), path).to(device, memory_format=torch.channels_last).eval()


def crop_landmarks(detector, images):
    """Landmarks (B, 5, 2) in [0, 1] of aligned uint8 crops (B, 3, S, S), NaN where no face is found.

    The detector wants a face of about 100 pixels with some room around it (as measured on LFW): crops are
    resized to 168 pixels and framed by 42 of grey. Of several faces the one nearest to the template is taken.
    """
    x = F.interpolate(images.float(), size=168, mode="bicubic", antialias=True, align_corners=False)
    x = F.pad(x.round().clamp(0, 255), (42,) * 4, value=114)
    found = torch.full((len(images), 5, 2), torch.nan)
    for one, (_, _, points) in zip(found, detect_faces(detector, x, confidence=0.02)):
        points = (points - 42) / 168
        distance = (points - TEMPLATE).norm(dim=2).mean(1)
        if len(points) and distance.min() < 0.15:
            one[:] = points[distance.argmin()]
    return found


def complete_landmarks(faces, folder, weights, device):
    """Fills in the landmarks that `faces` lack; they are kept in folder/landmarks, a file for each 4,096."""
    missing = faces.landmarks.isnan().flatten(1).any(1).nonzero()[:, 0]
    if not len(missing):
        return
    detector = load_detector(weights, folder, device)
    for part in tqdm(missing.split(4096), "landmarks", leave=False):
        key = hashlib.sha256(b"\n".join(faces.paths[part.numpy()])).hexdigest()[:16]
        path = Path(folder) / "landmarks" / f"{key}.npy"
        if not path.is_file():
            found = torch.cat([crop_landmarks(detector, images.to(device))
                               for images, _ in faces.loader(part.split(64))])
            replace_file(path, lambda temporary: found.numpy().tofile(temporary))
        with reading(path, f"landmarks of {len(part)} images (delete it to find them again)"):
            faces.landmarks[part] = torch.from_numpy(np.fromfile(path, np.float32)).view(len(part), 5, 2)
    lost = faces.landmarks.isnan().flatten(1).any(1)
    faces.landmarks[lost] = TEMPLATE
    print(f"found the landmarks of {len(missing) - lost.sum()} of {len(missing)} images"
          f"{f'; for {lost.sum()} the template stands in' if lost.any() else ''}")


def largest_face(detector, image, device, smallest, side=640):
    """Landmarks (5, 2) in pixels of the face of a photograph with the largest box times score.

    The photograph is shrunk to `side` if need be, and grey fills it up to multiples of the network's stride.
    """
    scale = min(1, side / max(image.size))
    small = pil_to_tensor(image.resize([max(1, round(length * scale)) for length in image.size], reducing_gap=2))
    right, below = (-length % 32 for length in (small.shape[2], small.shape[1]))
    padded = F.pad(small[None], (0, right, 0, below), value=114)
    (scores, boxes, points), = detect_faces(detector, padded.to(device))
    sides = (boxes[:, 2:] - boxes[:, :2]) / scale                               # (K, 2)
    rank = (sides.prod(1) * scores).where(sides.amin(1) >= smallest, 0.0)
    if not rank.any():
        raise ValueError(f"no face of {smallest} pixels" if len(rank) else "no face")
    return points[rank.argmax()] / scale


def crop_face(image, points, size):
    """The aligned crop of a photograph by landmarks (5, 2) in its pixels, and the landmarks in crop pixels.

    Similarity transform to the ArcFace template. Where that shrinks, the photograph is averaged down first,
    so that nothing aliases.
    """
    factor = max(1, int(1 / similarity(points, size * TEMPLATE)[0].abs()))
    image, points = image.reduce(factor), points / factor
    scale, shift = similarity(points, size * TEMPLATE)
    back, offset = 1 / scale, -shift / scale                    # PIL asks where a pixel of the crop is from
    affine = [back.real, -back.imag, offset.real, back.imag, back.real, offset.imag]
    crop = image.transform((size, size), Image.Transform.AFFINE, [x.item() for x in affine],
                           Image.Resampling.BICUBIC)
    return crop, move(points, scale, shift)


def align(photos, out, detector, device, size=112, smallest=40):
    """Crops the largest face of every photograph photos/identity/name to out/identity/, with its landmarks.

    A crop carries its landmarks as JPEG comment, so that what is there need not be done again. Photographs
    without a face of `smallest` pixels are listed in rejected.csv.
    """
    names = sorted(path.relative_to(photos).as_posix() for path in Path(photos).glob("*/*")
                   if path.suffix.lower() in PHOTOGRAPHS)
    if not names:
        fail(f"{photos}: no photographs; expected identity/photo.jpg, .png, .webp, .bmp or .tif")
    crops, rejected = [], []                                            # rows of the two tables

    def finish(name):
        """Writes the crop of one photograph, unless it is there, and its row."""
        crop_name = name if name.lower().endswith(".jpg") else f"{name}.jpg"
        path = Path(out) / crop_name
        try:
            if not path.is_file():
                with Image.open(Path(photos) / name) as image:
                    image = ImageOps.exif_transpose(image).convert("RGB")
                crop, landmarks = crop_face(image, largest_face(detector, image, device, smallest), size)
                comment = " ".join(map("{:.2f}".format, landmarks.flatten().tolist()))
                replace_file(path, lambda temporary: crop.save(temporary, "JPEG", quality=95, subsampling=0,
                                                               comment=comment))
            with Image.open(path) as crop:
                landmarks = torch.tensor([*map(float, crop.info["comment"].split())])
            crops.append((crop_name, landmarks))
        except Exception as error:                                      # images break in every possible way
            rejected.append((name, str(error) if isinstance(error, ValueError) else f"unreadable: {error}"))
    torch.set_num_threads(1)                                            # each photograph has a thread
    with ThreadPoolExecutor(processors()) as pool:
        for _ in tqdm(pool.map(finish, names), out, len(names), unit="img", leave=False):
            pass
    write_csv(Path(out) / "rejected.csv", ["file", "reason"], sorted(rejected))
    write_landmarks(Path(out) / "landmarks.csv", sorted(crops, key=lambda row: row[0]))
    print(f"{len(crops)} faces in {out}; {len(rejected)} photographs in rejected.csv")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("task", choices=["align", "landmarks"], help="cut faces out of photographs, or find their landmarks")
    flag("source", metavar="DIR", help="identity folders of photographs (align) or of faces; or train.rec")
    flag("--out", metavar="DIR", help="folder of the aligned faces, or of stage 2 (default: faces, runs/dit)")
    flag("--size", type=int, default=112, help="align: side of a crop in pixels (default: %(default)s)")
    flag("--weights", metavar="PATH", help="those of RetinaFace (default: fetched)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.task == "landmarks":
        return complete_landmarks(Faces([args.source]), args.out or "runs/dit", args.weights, device)
    out = args.out or "faces"
    align(args.source, out, load_detector(args.weights, out, device), device, args.size)


if __name__ == "__main__":
    run(main)
