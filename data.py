"""Faces: training sources and their batches, InsightFace's files, landmarks, and the toy faces of the demo.

A source is a folder of identity/image.jpg, or of InsightFace's train.rec and train.idx (identities are
labels, file names are keys). It may hold landmarks.csv (file,x1,y1,...,x5,y5 in pixels: eyes, nose, mouth
corners, left to right) and *.bin benchmarks. The source `demo` is drawn into runs/demo, as just such a
folder, on first use. Photographs become aligned crops by docs/align.py.
"""
import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import pickle
import struct
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import Conv2dNormActivation, nms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from model import DEVICE, autocast, build, conv, fail, read_published, reading, replacing, system_failed, to_float

# ---------------------------------------------------------------------------------------------------- images

SUFFIXES = ("", *".jpg .jpeg .jfif .png .webp .avif .gif .bmp .tif .tiff .pgm .ppm".split())
Image.init()                # only formats that Pillow reads itself; older ones lack some of them
FORMATS = [name for name in "JPEG PNG WEBP AVIF GIF BMP TIFF PPM".split() if name in Image.OPEN]


def open_image(file):
    """A PIL image, RGB, of a path or an open file: upright, grey of any depth in 8 bits, on white if
    transparent.
    """
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > 2 ** 27:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
        with contextlib.suppress(Exception):                                # EXIF tags may be broken
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                                               # 16 or 32 bits of grey
        values = np.asarray(image).astype(np.float32)
        whites = (1, 255, 2 ** 16 - 1) if image.mode == "F" else (2 ** 16 - 1, 2 ** 31)
        white = min((white for white in whites if values.max() <= white), default=values.max())
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

NO_RECORD = -1                                                              # the offset of an image file


def open_source(name):
    """The folder of a source, and what numbered its people: a record file, a recogniser, or nothing, None.

    Equal names from two numberings are different people. The demo is painted if it is not there yet.
    """
    root = Path("runs/demo" if name == "demo" else name)
    if name == "demo" and not root.is_dir():
        draw_demo(root)
    if (root / "train.rec").is_file():
        return root, f"{root}/train.rec"
    if not (root / "run.json").is_file():
        return root, None
    if not (root / "manifest.csv").is_file():
        fail(f"{root}: sample.py has not finished it; give its command again")
    with reading(root / "run.json", "the settings of sample.py"):
        settings = json.loads((root / "run.json").read_text())
        return root, None if settings["real_to"] else settings["fr_sha256"]


def list_files(root):
    """Yields the names, with slashes, of the files below a folder, however deep they lie; no hidden ones."""
    def refuse(error):
        raise error                                                 # os.walk would leave the folder out

    if not root.is_dir():
        fail(f"{root}: no such folder")
    for folder, _, files in os.walk(root, onerror=refuse, followlinks=True):
        below = Path(folder).relative_to(root).as_posix()
        names = (f"{below}/{file}".removeprefix("./") for file in files)
        yield from (name for name in names if "/." not in f"/{name}")


def list_images(root):
    """The names identity/image of the images in the folders of a folder."""
    names, others = [], Counter()
    for name in list_files(root):
        suffix = Path(name).suffix.lower()
        if "/" not in name:                                         # landmarks.csv and the like
            continue
        if suffix in SUFFIXES:
            names.append(name)
        else:
            others[suffix] += 1
    if others:
        print(f"{root}: left out, because they are no images by their names: "
              + ", ".join(f"{count} {suffix}" for suffix, count in others.most_common()))
    return sorted(names)


def list_source(root):
    """Identities, names and offsets of the images of a source: of its train.rec, or else of its folders."""
    names = list_images(root)
    if (root / "train.rec").is_file():
        if names:
            fail(f"{root}: holds train.rec and folders of images, such as {names[0]}; expected one")
        return list_records(root / "train.rec")
    if not names:
        fail(f"{root}: no images identity/image.jpg in it")
    return [name.split("/")[0] for name in names], names, [NO_RECORD] * len(names)


def open_stored(path, offset):
    """The PIL image of a file, or of the record at `offset` in the train.rec beside it."""
    return open_image(path if offset == NO_RECORD else read_record(Path(path).parent / "train.rec", offset))


class Faces(Dataset):
    """Images of one or more sources, united by identity name: images, labels, and landmarks ([0, 1] or NaN).

    An item is an image, uint8 array (3, S, S), or a text that says why it is refused, and its index. For an
    image that cannot be read the next one stands in, with its own index. Sets that fit in `memory` bytes are
    decoded once, others when needed.
    """

    def __init__(self, sources, size=None, memory=3e9):
        self.people, self.images = {}, None                                 # people: {identity: label}
        paths, offsets, labels, landmarks, sides, namers = [], [], [], [], [], []
        for source in sources:
            root, namer = open_source(source)
            identities, names, places = list_source(root)
            if shared := self.people.keys() & {*identities}:
                print(f"{root}: {len(shared)} of its people are in the sources before it, by their names")
                if namer and any(other not in (None, namer) for other in namers):
                    fail(f"{root}: {min(shared)} and others are different people in the sources before it; use "
                         "one of these sources, or give its people other names, in folders")
            namers.append(namer)
            labels += [self.people.setdefault(identity, len(self.people)) for identity in identities]
            paths += [os.fsencode(f"{root}/{name}") for name in names]
            offsets += places

            self.paths, self.offsets = paths, offsets                       # so far, for `readable`
            image, _ = next(self.readable(len(paths) - len(names)))
            sides += [image.width] * len(names)
            landmarks.append(read_landmarks(root, names, image.width))

        # Arrays, because Python lists are copied into every worker.
        self.paths, self.offsets, self.sides = map(np.array, (paths, offsets, sides))
        self.labels, self.landmarks = torch.tensor(labels), torch.cat(landmarks)
        self.size = size or sides[0]
        if len(self) * 3 * self.size ** 2 <= memory:
            read = self.scan(torch.arange(len(self)), "reading images")
            self.images, self.which = (torch.cat(part).numpy() for part in zip(*read))

    def __len__(self):
        return len(self.paths)

    def path(self, i):
        """The file of image i; the key of a record takes the place of a name."""
        return os.fsdecode(self.paths[i])

    def readable(self, i):
        """Yields the PIL images that can be read, with their indices, from image i on and around."""
        for j in itertools.chain(range(i, len(self)), range(i)):
            try:
                yield open_stored(self.path(j), self.offsets[j]), j
            except Exception as error:                              # images break in every possible way
                if system_failed(error):
                    raise
                warnings.warn(f"{self.path(j)}: cannot be read ({error}); the next image stands in")
        fail(f"{self.path(i)}: neither this nor any other image can be read")

    def __getitem__(self, i):
        if self.images is not None:
            return self.images[i], self.which[i]
        image, j = next(self.readable(i))
        side = self.sides[j]
        if image.size != (side, side):                                      # a text: see `loader`
            return (f"{self.path(j)}: {image.width} x {image.height} pixels, expected {side} x {side}: aligned "
                    "faces, square and all of one size in a source; docs/align.py makes them of photographs"), j
        return to_tensor(image, self.size).numpy(), j

    def loader(self, order):
        """Yields images (B, 3, S, S) and their indices (B,) for each batch of indices in `order`."""
        # Workers are slow to start. Arrays reach them by pipe; tensors would need /dev/shm.
        workers = 0 if self.images is not None or len(self) <= 100 else processors()
        loader = DataLoader(self, batch_sampler=map(np.asarray, order), num_workers=workers, collate_fn=stacked,
                            pin_memory=DEVICE.type == "cuda")               # for its thread, which reads ahead
        for images, indices in loader:
            if isinstance(images, str):                 # a worker that ended the run itself would hang it
                fail(images)
            images = torch.from_numpy(images)
            yield images.pin_memory() if DEVICE.type == "cuda" else images, torch.from_numpy(indices)

    def scan(self, indices, title):
        """Yields the images at `indices` (M,) once, in batches as `loader` does, under a progress bar."""
        order = indices.split(256)
        return tqdm(self.loader(order), title, len(order), leave=False)


def stacked(items):
    """Items of `Faces` as one batch of arrays; or why one of them is refused, and their indices."""
    images, indices = zip(*items)
    for image in images:
        if isinstance(image, str):
            return image, indices
    return np.stack(images), np.array(indices)


def batches(faces, batch, seed, first, last):
    """Yields images in [-1, 1], labels and landmarks, on DEVICE, of training steps first to last - 1.

    They follow from seed and step, so a resumed run sees what it would have seen. The rest of an epoch is
    left out.
    """
    @lru_cache(1)
    def shuffled(epoch):
        return np.random.default_rng([abs(seed), epoch]).permutation(len(faces))

    per_epoch = len(faces) // batch
    order = (shuffled(step // per_epoch)[step % per_epoch * batch:][:batch] for step in range(first, last))
    for images, i in faces.loader(order):
        images, labels, landmarks = (part.to(DEVICE, non_blocking=True)
                                     for part in (images, faces.labels[i], faces.landmarks[i]))
        yield to_float(images), labels, landmarks


# --------------------------------------------------------------------- InsightFace's records and benchmarks

def read_record(path, offset):
    """The encoded image, an open file, of the record at `offset`."""
    content = np.memmap(path, mode="r")
    _, length, flag = struct.unpack_from("<III", content, offset)
    return io.BytesIO(content[offset + 32 + 4 * flag:offset + 8 + length])


def list_records(path):
    """Identities, keys and offsets of the images in an InsightFace .rec file, which its .idx lists."""
    # A record: magic, length, flag, label, two ids, `flag` more labels (which then count), image or none.
    found, split = [], 0
    index = path.with_suffix(".idx")
    with reading(index, f"a line of key and offset for every record of {path.name}"):
        content = np.memmap(path, mode="r")
        for key, offset in np.loadtxt(index, np.int64, ndmin=2).tolist():
            magic, length, flag = struct.unpack_from("<III", content, offset)
            part, length = length >> 29, length % (1 << 29)
            if magic != 0xced7230a or offset + 8 + length > len(content):
                raise ValueError(f"record {key} lacks the magic number or ends beyond {len(content)} bytes")
            if part:                                        # its image holds the magic number
                split += 1
            elif length > 24 + 4 * flag:
                label, = struct.unpack_from("<f", content, offset + (32 if flag else 12))
                found.append((str(int(label)), str(key), offset))
    if split:
        print(f"{path}: left out {split} records that are stored in parts")
    if len({identity for identity, _, _ in found}) == 1:
        print(f"{path}: WARNING all records have one label; if a list has identities, unpack into folders")
    if not found:
        fail(f"{path}: it has no images that can be read")
    return zip(*found)


class StoredType:
    """Stands in for numpy.dtype while a .bin is unpickled, and keeps its name."""

    def __init__(self, name, *_):
        self.name = name if isinstance(name, str) else name.decode()

    def __setstate__(self, state):
        """The byte order does not matter for bytes and truth values."""


class StoredArray:
    """Stands in for a numpy array or number while a .bin is unpickled, and keeps its bytes or list."""

    def __init__(self, content=b"", kind=None):
        self.content, self.kind = content, kind

    def __setstate__(self, state):
        _, _, self.kind, _, self.content = state

    def values(self):
        """What it stands for, as a flat array or a list."""
        return self.content if isinstance(self.content, list) else np.frombuffer(self.content, self.kind.name)


class BinUnpickler(pickle.Unpickler):
    """Reads InsightFace's .bin and nothing else. It calls nothing outside this file, not even numpy, whose
    unpickling was not made for hostile bytes.
    """

    STAND_INS = {
        "_codecs.encode": lambda text, _: text.encode("latin1"),
        "numpy.dtype": StoredType,
        "numpy.ndarray": StoredArray,
        "numpy.core.multiarray._reconstruct": lambda *_: StoredArray(),
        "numpy.core.multiarray.scalar": lambda kind, content: StoredArray(content, kind),
        "numpy.core.numeric._frombuffer": lambda content, kind, *_: StoredArray(content, kind)}

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if full not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no benchmark needs")
        return self.STAND_INS[full]


def read_benchmark(path, size):
    """An InsightFace .bin: uint8 images (2P, 3, S, S), pair p is 2p and 2p + 1; same person or not (P,)."""
    plain = lambda stored: stored.values() if isinstance(stored, StoredArray) else stored
    decode = lambda image: to_tensor(open_image(io.BytesIO(memoryview(plain(image)))), size)
    with reading(path, "an InsightFace .bin benchmark"), ThreadPoolExecutor(processors()) as pool:
        encoded, same = BinUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="bytes").load()
        encoded = plain(encoded)
        same = torch.tensor([bool(np.any(plain(label))) for label in plain(same)])
        if len(encoded) != 2 * len(same) or len(same) < 10 or same.all() or not same.any():
            raise ValueError(f"{len(encoded)} images, {same.sum()} of {len(same)} pairs of one person, where "
                             "ten pairs or more are needed, of both kinds")
        images = tqdm(pool.map(decode, encoded), f"reading {path}", len(encoded), leave=False, mininterval=1)
        return torch.stack([*images]), same


def named_benchmarks(paths):
    """{name: path} of .bin files, which reports and verification know by the names of the files."""
    named = {Path(path).stem: str(path) for path in paths}
    if len(named) < len(paths):
        fail(f"{' '.join(map(str, paths))}: expected one benchmark of each name; rename some")
    return named


# --------------------------------------------------------------------------------- landmarks and the detector

# Where the five landmarks lie in an aligned 112 x 112 crop: the ArcFace template.
TEMPLATE = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                         [70.7299, 92.2041]]) / 112


def read_csv(path):
    """The rows of a CSV file; names of files may hold any character, and bytes that are not UTF-8."""
    return [row for row in csv.reader(io.StringIO(os.fsdecode(path.read_bytes()), newline="")) if row]


def write_csv(path, header, rows):
    """Writes a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with replacing(path) as temporary:
        temporary.write_bytes(os.fsencode(text.getvalue()))


def write_landmarks(path, rows):
    """Writes landmarks.csv from pairs of a file name in its folder and landmarks (5, 2) in pixels."""
    header = ["file", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]
    write_csv(path, header, ([name, *map("{:.2f}".format, face.flatten().tolist())] for name, face in rows))


def read_landmarks(root, names, side):
    """Landmarks (M, 5, 2) in [0, 1] of the images `names` of `side` pixels; NaN where landmarks.csv has none.
    """
    path, row_of = root / "landmarks.csv", {name: i for i, name in enumerate(names)}
    landmarks, unknown = torch.full((len(names), 5, 2), torch.nan), []
    if not path.is_file():
        return landmarks
    with reading(path, "lines of file,x1,y1,...,x5,y5 in pixels"):
        lines = read_csv(path)
        if lines and lines[0][-1].strip()[:1].isalpha():
            lines = lines[1:]                                   # the header
        for name, *numbers in lines:
            points = np.array(numbers, np.float64) / side
            if points.shape != (10,) or not (abs(points - 0.5) < 1.5).all():
                raise ValueError(f"the row of {name} is {numbers}, not ten numbers in or near {side} pixels")
            if name in row_of:
                landmarks[row_of[name]] = torch.from_numpy(points).view(5, 2)
            else:
                unknown.append(name)
    if unknown:
        print(f"{path}: {len(unknown)} of its {len(lines)} rows name no image here, such as {unknown[0]}")
    distance = (landmarks - TEMPLATE).norm(dim=2).nanmean()
    if distance > 0.2:                      # where files were right, 0.15 at most
        print(f"{path}: WARNING landmarks are {distance:.2f} of the image away from an aligned face's; expected"
              " pixels, x before y, in the order left eye, right eye, nose, left and right mouth corner")
    return landmarks


active_conv = partial(Conv2dNormActivation, activation_layer=partial(nn.LeakyReLU, 0.1))


def separable(c_in, c_out, stride=1):
    """MobileNet's block: a 3 x 3 convolution of each channel, then a 1 x 1 convolution of all."""
    return nn.Sequential(*active_conv(c_in, c_in, stride=stride, groups=c_in), *active_conv(c_in, c_out, 1))


class ContextModule(nn.Module):
    """SSH's context module: 3 x 3, 5 x 5 and 7 x 7 fields of view, made of 3 x 3 convolutions."""

    def __init__(self):
        super().__init__()
        self.conv3X3 = conv(64, 32)
        self.conv5X5_1, self.conv5X5_2 = active_conv(64, 16), conv(16, 16)
        self.conv7X7_2, self.conv7x7_3 = active_conv(16, 16), conv(16, 16)

    def forward(self, x):                                                       # (B, 64, H, W) -> the same
        h = self.conv5X5_1(x)                                                   # (B, 16, H, W)
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(h), self.conv7x7_3(self.conv7X7_2(h))], 1))


class RetinaFace(nn.Module):
    """Face detector (Deng et al. 2020) on MobileNet-0.25, with the keys of published Pytorch_Retinaface
    weights.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({
            "stage1": nn.Sequential(active_conv(3, 8, stride=2), separable(8, 16), separable(16, 32, 2),
                                    separable(32, 32), separable(32, 64, 2), separable(64, 64)),
            "stage2": nn.Sequential(separable(64, 128, 2), *(separable(128, 128) for _ in range(5))),
            "stage3": nn.Sequential(separable(128, 256, 2), separable(256, 256))})
        self.fpn = nn.ModuleDict({f"output{i}": active_conv(32 * 2 ** i, 64, 1) for i in (1, 2, 3)})
        self.fpn.update({f"merge{i}": active_conv(64, 64) for i in (1, 2)})
        self.ssh1, self.ssh2, self.ssh3 = ContextModule(), ContextModule(), ContextModule()

        def heads(width):                                               # one a level, two anchors a place
            return nn.ModuleList(nn.ModuleDict({"conv1x1": nn.Conv2d(64, 2 * width, 1)}) for _ in range(3))
        self.ClassHead, self.BboxHead, self.LandmarkHead = heads(2), heads(4), heads(10)

    def forward(self, images):
        """Scores (B, A), boxes (B, A, 4), points (B, A, 5, 2), in pixels, of uint8 RGB images (B, 3, H, W).
        """
        x = images.flip(1).float() - torch.tensor([104., 117., 123.], device=images.device).view(3, 1, 1)
        one = self.body["stage1"](x)                                            # (B, 64, H/8, W/8)
        two = self.body["stage2"](one)                                          # (B, 128, H/16, W/16)
        three = self.fpn["output3"](self.body["stage3"](two))                   # (B, 64, H/32, W/32)
        two = self.fpn["merge2"](self.fpn["output2"](two) + F.interpolate(three, size=two.shape[2:]))
        one = self.fpn["merge1"](self.fpn["output1"](one) + F.interpolate(two, size=one.shape[2:]))
        levels = [self.ssh1(one), self.ssh2(two), self.ssh3(three)]

        def read(heads, *shape):                                                # (B, A, *shape)
            maps = [head["conv1x1"](x).permute(0, 2, 3, 1).flatten(1) for head, x in zip(heads, levels)]
            return torch.cat(maps, 1).float().unflatten(1, (-1, *shape))

        logits, boxes, points = read(self.ClassHead, 2), read(self.BboxHead, 4), read(self.LandmarkHead, 5, 2)
        anchors = []                                                            # (H W 2, 3): y, x, side
        for level, step, sides in zip(levels, (8, 16, 32), ((16., 32.), (64., 128.), (256., 512.))):
            y, x = ((torch.arange(count, device=images.device) + 0.5) * step for count in level.shape[2:])
            anchors.append(torch.cartesian_prod(y, x, torch.tensor(sides, device=y.device)))
        centre, side = torch.cat(anchors)[:, [1, 0, 2]].split((2, 1), 1)        # (A, 2), (A, 1)
        middle = centre + 0.1 * side * boxes[..., :2]
        half = side / 2 * (0.2 * boxes[..., 2:]).exp()
        points = centre[:, None] + 0.1 * side[:, None] * points
        return logits.softmax(2)[..., 1], torch.cat([middle - half, middle + half], 2), points


def detect_faces(detector, images, confidence=0.5):
    """Yields the faces in each of uint8 images (B, 3, H, W): scores (K,), boxes (K, 4), points (K, 5, 2)."""
    with autocast():
        detections = detector(images.contiguous(memory_format=torch.channels_last))
    for score, box, points in zip(*(part.cpu() for part in detections)):
        keep = (score > confidence).nonzero()[:, 0]
        keep = keep[nms(box[keep], score[keep], 0.4)]
        yield score[keep], box[keep], points[keep]


WEIGHTS_URL = "https://github.com/xinntao/facexlib/releases/download/v0.1.0/detection_mobilenet0.25_Final.pth"
WEIGHTS_SHA256 = "2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220"


def load_detector(weights, folder):
    """RetinaFace with published weights: those named, or fetched (1.8 MB) into `folder` once and checked."""
    path = Path(weights or Path(folder) / WEIGHTS_URL.split("/")[-1])
    if not weights and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256)
        except Exception as error:
            fail(f"{WEIGHTS_URL}: cannot be fetched ({error}); put it at {path}, or name it with --weights")
    net = build(RetinaFace, read_published(path), "net", path)
    return net.to(DEVICE, memory_format=torch.channels_last)


def crop_landmarks(detector, images):
    """Landmarks (B, 5, 2) in [0, 1] of aligned uint8 crops (B, 3, S, S), NaN where no face is found."""
    # The detector wants about 100 pixels of face and room around it (measured on LFW): 168, and 42 of grey.
    x = F.interpolate(images.float(), size=168, mode="bicubic", antialias=True, align_corners=False)
    x = F.pad(x.round().clamp(0, 255), (42,) * 4, value=114)
    found = torch.full((len(images), 5, 2), torch.nan)
    for one, (_, _, points) in zip(found, detect_faces(detector, x, confidence=0.02)):
        points = (points - 42) / 168
        distance = (points - TEMPLATE).norm(dim=2).mean(1)
        if len(points) and distance.min() < 0.15:
            one[:] = points[distance.argmin()]
    return found


def complete_landmarks(faces, folder, weights):
    """Fills in the landmarks that `faces` lack, found by RetinaFace; they are kept in folder/landmarks.pt."""
    missing = faces.landmarks[:, 0, 0].isnan().nonzero()[:, 0]
    if not len(missing):
        return
    path, files = Path(folder) / "landmarks.pt", hashlib.sha256(faces.paths[missing]).hexdigest()
    kept = {}
    if path.is_file():
        with reading(path, "landmarks that this script found (delete it)"):
            kept = torch.load(path, weights_only=True)
    if kept.get("files") != files:
        detector = load_detector(weights, folder)
        found = [crop_landmarks(detector, images.to(DEVICE)) for images, _ in faces.scan(missing, "landmarks")]
        kept = {"files": files, "landmarks": torch.cat(found)}
        with replacing(path) as temporary:
            torch.save(kept, temporary)
    faces.landmarks[missing] = kept["landmarks"]
    lost = faces.landmarks[:, 0, 0].isnan()
    faces.landmarks[lost] = TEMPLATE
    print(f"landmarks: found in {len(missing) - lost.sum()} of {len(missing)} images, the template's for others")


# ------------------------------------------------------------------------------------------------- toy faces
#
# A toy head is a sphere, seen higher than wide, on which spots are painted one over the other. A place on it
# is also its normal: (right, down, ahead), of length 1. Every number of a person and of a picture varies
# independently, in [-1, 1], so that toy people differ as widely as virtual people must.

LANDMARKS = F.normalize(torch.tensor(
    [(-.4, -.17, .9), (.4, -.17, .9), (0, .2, .98), (-.26, .52, .8), (.26, .52, .8)]))
SPOTS = [       # right (on both sides unless 0), down, half width, half height, brightness, its place varies
    (0, .25, 1.1, .85, 1, .08),             # face, on hair
    (0, .74, .50, .28, .8, .10),            # beard
    (.42, -.37, .20, .05, .4, .05),         # brows
    (0, .18, .10, .07, .8, .04),            # nose
    (0, .52, .28, .08, .7, .05),            # lips
    (0, .52, .20, .03, .3, .03),            # mouth
    (.40, -.17, .16, .08, 1.3, .03),        # eyes
    (.40, -.17, .06, .07, .2, .02),         # irises
    *[(0, .1, .07, .05, .6, .6)] * 3]       # moles
PERSON, PICTURE = 30 + 7 * len(SPOTS), 27           # numbers that say who, and in which circumstances


def similarity(source, target):
    """Complex scale and shift (..., 1) that carry points (..., 5, 2) to others, by least squares."""
    source, target = (torch.view_as_complex(points.contiguous()) for points in (source, target))
    s, t = (z - z.mean(-1, keepdim=True) for z in (source, target))
    scale = (s.conj() * t).sum(-1, keepdim=True) / (s.abs() ** 2).sum(-1, keepdim=True)
    return scale, target.mean(-1, keepdim=True) - scale * source.mean(-1, keepdim=True)


def move(points, scale, shift):
    """Points (..., 2) carried by a similarity z -> scale z + shift."""
    return torch.view_as_real(scale * torch.view_as_complex(points.contiguous()) + shift)


def paint(place, edge, people):
    """Colours (B, 3, P) of P places (B, 3, P) on the heads of toy people (B, PERSON); outlines are `edge`
    wide.
    """
    right, down, ahead = place.split(1, 1)
    angle = torch.atan2(right, ahead)
    tone, hair, waves, spots = people[..., None].split([3, 3, 24, 7 * len(SPOTS)], 1)
    skin = torch.tensor([.72, .54, .45])[:, None] * (1 + .35 * tone[:, :1]) + .05 * tone

    # Smooth colour over the skin: eight waves in each channel.
    across, along, phase = torch.tensor([*itertools.product((1.5, 3.5), (1.5, 3.5), (0, 1.57))]).T[..., None]
    skin = skin + .06 * waves.view(-1, 3, 8) @ ((across * right).cos() * (along * down + phase).cos())
    canvas = .35 * skin * (1 + .5 * hair)

    for (u, v, width, height, brightness, vary), own in zip(SPOTS, spots.split(7, 1)):
        aside, below, wide, high, *colour = own.split(1, 1)
        x = (angle.abs() if u else angle) - u - vary * aside
        y = down - v - vary * below
        radius = torch.hypot(x / (width * (1 + .2 * wide)), y / (height * (1 + .2 * high)))
        cover = ((1 - radius) * height / edge + .5).clamp(0, 1)
        canvas = torch.lerp(canvas, brightness * skin * (1 + .25 * torch.cat(colour, 1)), cover)
    return canvas


def draw_faces(people, pictures, size):
    """Toy people (B, PERSON) in circumstances (B, PICTURE): images (B, 3, S, S), landmarks (B, 5, 2), in [0,
    1].
    """
    turn, shift, lamp, tint, colour, slope = pictures[..., None].split([2, 10, 3, 3, 3, 6], 1)
    axis = F.pad(turn.mT * torch.tensor([.3, .8]), (0, 1))                                  # pitch, yaw, no roll
    turn = torch.matrix_exp(torch.linalg.cross(torch.eye(3)[None], axis))                   # (B, 3, 3)
    stretch = torch.tensor([.9, 1.12])[:, None]                             # a head is higher than wide

    # Where the landmarks are seen, and the similarity that brings them near the template of aligned crops.
    points = (stretch * (turn.mT @ LANDMARKS.T)[:, :2]).mT                                  # (B, 5, 2)
    similar = similarity(points, TEMPLATE + .035 * shift.view(-1, 5, 2))
    grid = (torch.arange(size) + .5) / size
    grid = torch.cartesian_prod(grid, grid).flip(1)[None]                                   # (1, P, 2): x, y
    xy = move(grid, 1 / similar[0], -similar[1] / similar[0]).mT / stretch                  # (B, 2, P)
    radius, edge = xy.norm(dim=1, keepdim=True), 2.5 / size                                 # about one pixel
    normal = torch.cat([xy, (1 - radius ** 2).clamp(min=0).sqrt()], 1)                      # (B, 3, P)

    towards = torch.tensor([0, -.15, .55])[:, None] + .25 * lamp
    light = .5 + .06 * tint + (normal * towards).sum(1, keepdim=True).clamp(min=0)
    head = light * paint(turn @ normal, edge, people)
    behind = .45 + .25 * colour[:, :1] + .12 * colour + .08 * slope.view(-1, 3, 2) @ xy
    image = torch.lerp(behind, head, ((1 - radius) / edge + .5).clamp(0, 1))
    return image.view(-1, 3, size, size).clamp(0, 1), move(points, *similar)


def write_bin(path, images, pairs, generator):
    """Writes an InsightFace .bin of people, uint8 (I, P, 3, S, S): ten folds sharing nobody, half same."""
    encoded, same = [], [p % 2 == 1 for p in range(pairs)]
    for p, fold in enumerate(fold for fold in images.tensor_split(10) for _ in range(pairs // 10)):
        (i, j), (a, b) = (torch.randperm(n, generator=generator)[:2] for n in fold.shape[:2])
        for image in (fold[i, a], fold[i if same[p] else j, b]):
            to_pil_image(image).save(file := io.BytesIO(), "PNG")
            encoded.append(file.getvalue())
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps((encoded, same), protocol=4))


def draw_demo(root, people=2000, held_out=200, per_person=8, size=32):
    """Draws the demo: a folder of toy `people` with landmarks.csv, and heldout.bin of others nobody trains
    on.
    """
    generator, temporary = torch.Generator().manual_seed(0), Path(f"{root}.tmp")
    who = 2 * torch.rand(people + held_out, PERSON, generator=generator) - 1
    how = 2 * torch.rand(len(who) * per_person, PICTURE, generator=generator) - 1
    some = [*zip(who.repeat_interleave(per_person, 0).split(160), how.split(160))]
    drawn = [draw_faces(*batch, size) for batch in tqdm(some, "drawing toy faces", leave=False)]
    images, landmarks = map(torch.cat, zip(*drawn))
    noise = 2.5 * torch.randn(images.shape, generator=generator)                # of the sensor
    images = (255 * images + noise).clamp(0, 255).byte()

    names = [f"p{person:04d}/{i:04d}.png" for person in range(people) for i in range(per_person)]
    for name, image in zip(names, images):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(temporary / name)
    write_landmarks(temporary / "landmarks.csv", zip(names, size * landmarks))
    write_bin(temporary / "heldout.bin", images.unflatten(0, (-1, per_person))[people:], 3000, generator)
    os.replace(temporary, root)
