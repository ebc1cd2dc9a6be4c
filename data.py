"""Faces: the demo people this file draws, image folders, landmarks, and verification benchmarks.

A source is a folder `root/identity/image.jpg|png`, or one with InsightFace records (`train.rec`, `train.idx`:
identities are their labels, files their keys), with `root/landmarks.csv` where stage 2 needs it
(file,x1,y1, ...,x5,y5 in pixels: left eye, right eye, nose, left and right mouth corner) and `root/*.bin`
benchmarks where there are any. The source `demo` is drawn on first use into runs/demo, as just such a folder.
"""
import csv
import functools
import io
import math
import os
import pickle
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from model import fail, replace_file, to_uint8

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


# ------------------------------------------------------------------------------------------ the demo's people

IDENTITY_DIALS, NUISANCE_DIALS = 192, 32        # uniform numbers that make a person, and a picture of them


def draw_faces(identity, nuisance, size):
    """Draws people (B, 192) under nuisance (B, 32), both in [0, 1]: images (B, 3, S, S), landmarks (B, 5, 2).

    The head is an ellipsoid with bumps; each pixel's ray is cast onto it and features are painted in the
    head's own coordinates, so pose, parallax and landmarks are exact. Some 190 dials vary independently,
    because virtual people can only differ from everybody as much as the space of faces is wide.
    """
    B, pixel = len(identity), 2.2 / size                                # pixel: head units
    who, how = iter(identity.T[..., None]), iter(nuisance.T[..., None])
    dial = lambda low, high: low + (high - low) * next(who)             # a trait (B, 1) of the person
    vary = lambda low, high: low + (high - low) * next(how)             # a circumstance (B, 1) of the picture
    colour = lambda pick, low, high: torch.stack([pick(low, high) for _ in range(3)], 1)        # (B, 3, 1)
    edge = lambda inward, softness=1.0: (inward / (pixel * softness) + 0.5).clamp(0, 1)     # one pixel wide

    # The head: radii, turn (rows are the head's axes in view), and bumps for nose, chin, brow, cheeks, jaw.
    radii = torch.stack([dial(.80, .98), dial(1.08, 1.32), dial(.85, 1.05)], 1)                 # (B, 3, 1)
    yaw, pitch = vary(-.8, .8), vary(-.3, .3)
    sy, cy, sp, cp = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
    turn = torch.cat([cy, 0 * cy, -sy, -sy * sp, cp, -cy * sp, sy * cp, sp, cy * cp], 1).view(B, 3, 3)
    eye_x, eye_y, eye_skew, mid = dial(.33, .45), dial(-.24, -.08), dial(-.03, .03), 0 * yaw
    nose_x, nose_y, mouth_y, mouth_w = dial(-.025, .025), dial(.13, .25), dial(.44, .58), dial(.2, .32)
    smile, gape = vary(-.04, .09), vary(-.05, .1).clamp(min=0)
    mouth_w, jaw_x, jaw_y = mouth_w * (1 + 2 * smile), dial(.6, .75), dial(.5, .65)
    cheek_x, cheek_y = dial(.4, .55), dial(.1, .3)
    bump_x, bump_y, bump_w, bump_h, bump_out = (torch.stack(column, 1) for column in zip(  # (B, 8, 1) each
        (nose_x, nose_y, dial(.09, .16), dial(.09, .15), dial(.16, .34)),
        (nose_x, nose_y - .2, dial(.06, .1), mid + .2, dial(.03, .14)),
        (mid, mid + .85, dial(.2, .4), mid + .2, dial(-.1, .14)),
        (mid, eye_y - .18, mid + .5, mid + .1, dial(0, .08)),
        *((side * cheek_x, cheek_y, mid + .22, mid + .2, dial(-.08, .08)) for side in (-1, 1)),
        *((side * jaw_x, jaw_y, mid + .25, mid + .25, dial(-.14, .1)) for side in (-1, 1))))

    def swell(u, v):
        """The head's radius (B, P), in the ellipsoid's, in the direction seen at (u, v) from the front."""
        across, down = (u[:, None] - bump_x) / bump_w, (v[:, None] - bump_y) / bump_h
        return 1 + (bump_out * torch.exp(-across ** 2 - down ** 2)).sum(1)

    # Five landmarks on that surface, and the similarity that carries them to the template, a little off.
    u = torch.cat([-eye_x, eye_x, nose_x, -mouth_w, mouth_w], 1)
    v = torch.cat([eye_y - eye_skew, eye_y + eye_skew, nose_y, mouth_y - smile, mouth_y - smile], 1)
    points = torch.stack([u, v, (1 - u * u - v * v).sqrt()], 1) * radii * swell(u, v)[:, None]  # (B, 3, 5)
    points = (turn.mT @ points)[:, :2].mT                                                       # (B, 5, 2)
    scale, shift = similarity(points, TEMPLATE.expand(B, 5, 2))
    scale = scale * torch.polar(vary(.95, 1.05), vary(-.05, .05))
    shift = shift + torch.complex(vary(-.02, .02), vary(-.02, .02))

    # Cast every pixel's ray a + b z onto the surface |a + b z| = rho(u, v), by fixed-point iteration on rho.
    grid = (torch.arange(size) + .5) / size
    grid = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).view(1, -1, 2)            # (1, P, 2)
    xy = move(grid, 1 / scale, -shift / scale).mT                                               # (B, 2, P)
    a, b = turn[:, :, :2] @ xy / radii, turn[:, :, 2:] / radii                          # (B, 3, P), (B, 3, 1)
    aa, ab, bb, rho = (a * a).sum(1), (a * b).sum(1), (b * b).sum(1), torch.ones(B, size * size)
    for _ in range(4):
        inside = ab ** 2 - bb * (aa - rho ** 2)                         # > 0 where the ray hits
        z = (inside.clamp(min=0).sqrt() - ab) / bb
        u, v, w = ((a + b * z[:, None]) / rho[:, None]).unbind(1)       # (B, P) each: the face's coordinates
        rho = swell(u, v)
    facing = w > 0

    def blob(x, y, wide, tall, tilt=mid, bend=0.0, softness=1.0):
        """The mask (B, P) of an ellipse on the face at (x, y), tilted (radians) and bent like a brow."""
        across = ((u - x) * tilt.cos() + (v - y) * tilt.sin()) / wide
        down = (v - y) * tilt.cos() - (u - x) * tilt.sin() - bend * across ** 2
        return edge((1 - (across ** 2 + (down / tall) ** 2 + 1e-9).sqrt()) * tall, softness) * facing

    def paint(tint, mask):
        nonlocal canvas
        canvas = canvas + mask[:, None] * (tint - canvas)

    # Skin with a smooth random colouring; beard, cheeks, nose.
    skin = torch.tensor([.62, .44, .35])[:, None] + dial(-.27, .3)[:, None] + colour(dial, -.08, .08)
    hair, iris, lip = colour(dial, .02, .65), colour(dial, .05, .6), skin * colour(dial, .55, 1.05)
    canvas = skin.expand(B, 3, size * size)
    for k in range(5):
        phase = ((u * math.cos(2.4 * k) + v * math.sin(2.4 * k)) * (2.5 + 1.2 * k))[:, None]
        canvas = canvas + colour(dial, -.045, .045) * phase.sin() + colour(dial, -.045, .045) * phase.cos()
    beard = blob(mid, mouth_y + .25, dial(.2, .7), dial(.1, .4), softness=3) * dial(-.7, .8).clamp(min=0)
    paint(hair * .6 + skin * .3, beard)
    for side in (-1, 1):
        paint(skin * colour(dial, .7, 1.1), blob(side * .5, .3, .25, .2, softness=4))
        paint(skin * .6, blob(nose_x + side * dial(.1, .16), nose_y + .05, .02, .06) * .6)
        paint(skin * .45, blob(nose_x + side * dial(.05, .1), nose_y + .09, .035, .028))

    # Mouth: upper lip, lower lip, the opening.
    upper, lower, lower_w = dial(.03, .06) + gape, dial(.03, .07), mouth_w * dial(.6, .9)
    paint(lip, blob(mid, mouth_y - dial(0, .03), mouth_w, upper, dial(-.08, .08), -smile))
    paint(lip * colour(dial, .8, 1.2), blob(mid, mouth_y + .04 + gape, lower_w, lower, bend=-smile))
    paint(skin * .25, blob(mid, mouth_y + gape / 2, mouth_w * .9, .012 + gape * .7, bend=-smile))

    # Eyes and brows: both sides share their dials but for a little asymmetry.
    wide, tall, slant, lash = dial(.1, .16), dial(.05, .085), dial(-.3, .3), dial(.01, .03)
    shadow, bag, pupil = skin * colour(dial, .55, 1.05), skin * colour(dial, .7, 1), dial(.035, .055)
    brow, brow_gap, brow_w = hair * dial(.3, .9)[..., None], dial(.12, .2), dial(.13, .23)
    brow_h, brow_tilt, brow_bend = dial(.018, .05), dial(-.3, .3), dial(0, .08)
    lid, gaze, surprise = tall * vary(.5, 1.1), vary(-.05, .05), vary(-.015, .04)
    for side in (-1, 1):
        x, y, tilt = side * eye_x, eye_y + side * eye_skew, side * slant
        paint(shadow, blob(x, y - .03, wide * 1.5, tall * 1.6, softness=3))
        paint(bag, blob(x, y + .11, wide * 1.1, .04, softness=2) * .7)
        paint(skin * .3, blob(x, y - lash, wide * 1.08, lid + lash / 2, tilt))
        eyeball = blob(x, y, wide, lid, tilt)
        paint(torch.tensor([.93, .92, .9])[:, None], eyeball)
        paint(iris, blob(x + gaze, y, pupil, pupil) * eyeball)
        paint(iris * .15, blob(x + gaze, y, pupil * .45, pupil * .45) * eyeball)
        tilt = side * brow_tilt + dial(-.08, .08)
        paint(brow, blob(x, y - brow_gap - surprise, brow_w, brow_h * dial(.8, 1.2), tilt, brow_bend))

    # Up to five marks or moles, glasses (28 % wear them), hair (92 % have it).
    for _ in range(5):
        mark = blob(dial(-.75, .75), dial(-.6, .8), dial(.02, .09), dial(.02, .06), dial(-1.5, 1.5))
        paint(skin * colour(dial, .2, 1.2), mark * (dial(-.6, 1) > 0))
    worn, rim, thin = dial(0, 1) > .72, colour(dial, 0, .6), dial(.8, .9)
    glass_w, glass_h = dial(.17, .24), dial(.12, .2)
    for x in (-eye_x, eye_x):
        paint(rim, (blob(x, eye_y, glass_w, glass_h) - blob(x, eye_y, glass_w * thin, glass_h * thin)) * worn)
    paint(rim, blob(mid, eye_y, eye_x - glass_w, .025) * worn)
    hairline = dial(-.85, -.5) + dial(-.1, .5) * u ** 2
    for k in range(3, 13, 3):
        hairline = hairline + dial(-.05, .05) * (k * u).cos() + dial(-.05, .05) * (k * u).sin()
    sides = edge(u.abs() - dial(.75, 1.05) - .25 * (v - dial(-.2, .5)).clamp(min=0), 2) * (v < dial(-.1, .7))
    streak = 1 + dial(0, .35) * torch.sin(dial(8, 30) * u + dial(-8, 8) * v + dial(0, 6))
    has_hair = dial(0, 1) > .08
    paint(hair * streak[:, None], torch.maximum(edge(hairline - v, 2), sides).where(facing, 1.0) * has_hair)

    # Light on the surface normals, which are the slope of the depth map.
    depth = (z * (inside > 0)).view(B, size, size)
    slope_y, slope_x = (slope * scale.abs()[..., None] * size for slope in torch.gradient(depth, dim=(1, 2)))
    normal = F.normalize(torch.stack([-slope_x, -slope_y, torch.ones_like(depth)], 1), dim=1).view(B, 3, -1)
    light = F.normalize(torch.stack([vary(-1, 1), vary(-1, .5), vary(.5, 1)], 1), dim=1)
    lambert = (normal * light).sum(1, keepdim=True).clamp(min=0)
    lit = vary(.35, .65)[:, None] + vary(.5, .75)[:, None] * lambert
    head = canvas.clamp(0, 1) * lit * (1 + colour(vary, -.08, .08))

    # Background; in front of it the hair behind the head, the neck, the head.
    across, down = xy[:, :1], xy[:, 1:]
    image = colour(vary, .1, .8) + colour(vary, -.2, .2) * across + colour(vary, -.2, .2) * down
    image = image + .1 * torch.sin(across * vary(1, 6)[:, None] + down * vary(1, 6)[:, None])
    volume, below = dial(1.02, 1.25), dial(-.4, 1.4) - (a - b * (ab / bb)[:, None])[:, 1]
    behind = edge(ab ** 2 - bb * (aa - volume ** 2), 3) * edge(below, 2) * has_hair
    neck = edge(dial(.4, .65) - xy[:, 0].abs(), 2) * edge(xy[:, 1] - .6)
    for tint, mask in ((hair * .7, behind), (skin * .6, neck), (head, edge(inside, 3))):
        image = image + mask[:, None] * (tint - image)
    return image.view(B, 3, size, size).clamp(0, 1), move(points, scale, shift)


def write_landmarks(path, files, landmarks):
    """Writes landmarks.csv: file names relative to its folder, landmarks (M, 5, 2) in pixels."""
    rows = [[name, *map("{:.2f}".format, row)] for name, row in zip(files, landmarks.flatten(1).tolist())]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["file", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")], *rows])


def write_bin(path, images, pairs, generator):
    """Writes an InsightFace .bin of people (I, P, 3, S, S), uint8: ten folds sharing nobody, half same."""
    png, same = [], []
    for fold in images.chunk(10):
        for p in range(pairs // 10):
            i, j = torch.randperm(len(fold), generator=generator)[:2].tolist()
            a, b = torch.randperm(images.shape[1], generator=generator)[:2].tolist()
            for image in (fold[i, a], fold[i if p % 2 else j, b]):
                write_png(buffer := io.BytesIO(), image)
                png.append(buffer.getvalue())
            same.append(bool(p % 2))
    replace_file(path, lambda temporary: temporary.write_bytes(pickle.dumps((png, same), protocol=4)))


def draw_demo(root, people=2000, held_out=200, per_person=8, size=32, seed=0):
    """Draws the demo: a folder of `people` with landmarks.csv, and heldout.bin of others nobody trains on."""
    generator, total = torch.Generator().manual_seed(seed), people + held_out
    who = torch.rand(total, IDENTITY_DIALS, generator=generator).repeat_interleave(per_person, 0).split(400)
    how = torch.rand(total * per_person, NUISANCE_DIALS, generator=generator).split(400)
    images, landmarks = [], []
    for person, picture in zip(tqdm(who, f"drawing {total} people", leave=False, mininterval=1), how):
        drawn, points = draw_faces(person, picture, size)
        drawn += 0.01 * torch.randn(drawn.shape, generator=generator)           # sensor noise
        images.append(to_uint8(2 * drawn - 1))
        landmarks.append(points * size)
    images, count, temporary = torch.cat(images), people * per_person, Path(f"{root}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    files = [f"p{i // per_person:04d}/{i % per_person:04d}.png" for i in range(count)]
    for name, image in zip(files, images):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(temporary / name, image)
    write_landmarks(temporary / "landmarks.csv", files, torch.cat(landmarks))
    write_bin(temporary / "heldout.bin", images[count:].view(held_out, -1, 3, size, size), 3000, generator)
    os.replace(temporary, root)


# ----------------------------------------------------------------------- images, benchmarks, training sources


def read_image(file, size=None):
    """One image, uint8 (3, S, S) RGB, resized to `size` if need be, and its (width, height) before."""
    with Image.open(file) as image:
        before = image.size
        image = image.convert("RGB")
    if size and before != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2)
    return pil_to_tensor(image), before


def write_png(file, image):
    """Writes a uint8 image (3, S, S) to a path or a buffer, without loss."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")


@functools.lru_cache
def mapped(path):
    """The bytes of a file, mapped into memory once by each process."""
    return np.memmap(path, np.uint8, "r")


class Record(NamedTuple):
    """An image in an InsightFace RecordIO file: the file's path, the record's key and offset."""
    path: Path
    key: int
    offset: int

    MAGIC = 0xced7230a

    def __str__(self):
        return f"{self.path}, record {self.key}"

    def open(self, _):
        """The encoded image as a file. Records with the magic inside come in parts, cut where it stood."""
        content, parts, at, flag = mapped(self.path), [], self.offset, 1
        while flag in (1, 2):
            magic, word = struct.unpack_from("<II", content, at)
            flag, length = word >> 29, word & 0x1fffffff
            if magic != self.MAGIC or at + 8 + length > len(content):
                raise ValueError("broken record")
            parts.append(content[at + 8:at + 8 + length].tobytes())
            at += 8 + (length + 3) // 4 * 4
        record = struct.pack("<I", self.MAGIC).join(parts)
        return io.BytesIO(record[24 + 4 * struct.unpack_from("<I", record)[0]:])


def read_index(path):
    """Records of an InsightFace .rec file and their labels, by its .idx; all checked, none decoded.

    A record is magic, length, then flag, label, two ids, `flag` more labels (then those count), image.
    Records without an image (the header, and a list of identities at the end) are left out.
    """
    index = path.with_suffix(".idx")
    try:
        index = path.with_suffix(".idx")
        keys, offsets = np.array(index.read_text().split(), dtype=np.int64).reshape(-1, 2).T
        content = mapped(path)
    except (OSError, ValueError) as error:
        fail(f"{index}: expected a line of key and offset for every record of {path.name} ({error})")

    def words(at, count):
        return content.take(at[:, None] + np.arange(4 * count), mode="clip").view("<u4")        # (M, count)
    magic, length, flag, label = words(offsets, 4).T
    length &= 0x1fffffff
    bad = (offsets < 0) | (magic != Record.MAGIC) | (offsets + 8 + length > len(content))
    if bad.any():
        fail(f"{path}: {bad.sum()} of {len(keys)} records, key {keys[bad][0]} first, end beyond its "
             f"{len(content)} bytes or lack the magic number; cut short, or {index.name} is not its index")
    label = np.where(flag > 0, words(offsets + 32, 1)[:, 0], label).view("<f4").astype(np.int64)
    body = offsets + 32 + 4 * flag.astype(np.int64)
    start = words(body, 1)[:, 0] & 0xffff
    image = (body < offsets + 8 + length) & np.isin(start, (0xd8ff, 0x5089))    # JPEG, PNG
    found = zip(keys[image].tolist(), offsets[image].tolist())
    return [Record(path, key, offset) for key, offset in found], label[image].tolist()


class BinUnpickler(pickle.Unpickler):
    """Reads InsightFace .bin pickles and nothing else: bytes, lists, bools, numbers and numpy arrays."""

    ALLOWED = {("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype"), *(
        (f"numpy.{core}.{module}", name) for core in ("core", "_core") for module, name in (
            ("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")))}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no benchmark needs")
        return super().find_class(module, name)


def read_bin(path, size):
    """An InsightFace .bin benchmark: uint8 images (2P, 3, S, S), pair p is 2p and 2p + 1; same (P,) bool."""
    try:
        with open(path, "rb") as file:
            encoded, same = BinUnpickler(file, encoding="bytes").load()
        same = torch.as_tensor(np.asarray(same, dtype=bool))
        images = torch.stack([read_image(io.BytesIO(bytes(image)), size)[0] for image in encoded])
    except Exception as error:                                          # pickles fail in every possible way
        fail(f"{path}: not a readable InsightFace .bin benchmark ({type(error).__name__}: {error})")
    if len(images) != 2 * len(same) or len(same) < 10:
        fail(f"{path}: expected two images a pair and 10 pairs or more, found {len(images)} images "
             f"and {len(same)} pairs")
    return images, same


def benchmarks(paths, sources, size):
    """{path: (images, same)} of the benchmarks named, or of every *.bin beside the data."""
    if paths is None:
        paths = [path for source in sources for path in sorted(open_source(source).glob("*.bin"))]
    return {Path(path): read_bin(path, size) for path in paths}


def open_source(name):
    """The folder of a data source, drawing the demo first if it is asked for and not there yet."""
    root = Path("runs/demo" if name == "demo" else name)
    if name == "demo" and not root.is_dir():
        draw_demo(root)
    if not root.is_dir():
        fail(f"--data {name}: no such folder; give a folder of identity folders with images, or 'demo'")
    return root


class Faces(Dataset):
    """Images of one or more sources united by identity name: uint8 images, labels, landmarks ([0, 1] or NaN).

    Sets that fit in `memory` bytes are decoded once, by threads; larger ones by the loader's workers, each
    time.
    """

    def __init__(self, sources, size=None, memory=3e9):
        self.files, self.names, self.bad, self.images, self.size = [], {}, set(), None, None
        labels, landmarks, sides = [], [], []                           # names: {identity: label}
        for source in sources:
            root, found = open_source(source), []                       # found: (image, identity, file name)
            for path in sorted(root.glob("*.rec")):
                found += [(record, str(label), str(record.key)) for record, label in zip(*read_index(path))]
            people = sorted(entry for entry in root.iterdir() if entry.is_dir())
            for person in people:
                files = sorted(f for f in person.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
                found += [(file, person.name, f"{person.name}/{file.name}") for file in files]
            if not found:
                fail(f"--data {source}: no images in it; expected identity/image.jpg or .png, or train.rec "
                     f"with train.idx, found {len(people)} folders")
            first = len(self.files)
            images, names, files = zip(*found)
            self.files += images
            labels += [self.names.setdefault(name, len(self.names)) for name in names]
            # The crops of a source share one size: opening half a million files to ask takes minutes.
            decoded = map(self.decode, range(first, len(self)))
            side = next((image.shape[2] for image in decoded if image is not None), 32)
            landmarks.append(self.read_landmarks(root, files, side))
            sides.append(side)
        self.labels, self.landmarks, self.size = torch.tensor(labels), torch.cat(landmarks), size or sides[0]
        if len(self) * 3 * self.size ** 2 <= memory:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                decoded = pool.map(self.decode, range(len(self)))
                images = list(tqdm(decoded, "reading images", len(self), leave=False, mininterval=1))
            good = [i for i in range(len(self)) if images[i] is not None]
            self.report([i for i in range(len(self)) if images[i] is None])
            self.files, self.images = [self.files[i] for i in good], torch.stack([images[i] for i in good])
            self.labels, self.landmarks = self.labels[good], self.landmarks[good]

    def __len__(self):
        return len(self.files)

    @staticmethod
    def read_landmarks(root, files, side):
        """Landmarks (M, 5, 2) in [0, 1] of crops `side` wide, NaN where root/landmarks.csv has none."""
        path, unknown = root / "landmarks.csv", np.full((5, 2), np.nan, np.float32)
        if not path.is_file():
            return torch.from_numpy(unknown).repeat(len(files), 1, 1)
        try:
            with open(path, newline="") as file:
                rows = list(csv.reader(file))[1:]
            table = {row[0]: np.array(row[1:11], dtype=np.float32).reshape(5, 2) for row in rows}
        except (OSError, ValueError, IndexError) as error:
            fail(f"{path}: expected lines of file,x1,y1,...,x5,y5 ({error})")
        found = torch.from_numpy(np.stack([table.get(file, unknown) for file in files]))
        return found / torch.tensor(side)

    def decode(self, i):
        """Image i, uint8 (3, S, S), or None if it cannot be read."""
        try:
            with self.files[i].open("rb") as file:
                return read_image(file, self.size)[0]
        except (OSError, ValueError, struct.error, Image.DecompressionBombError):
            return None

    def report(self, bad):
        """Names images that could not be read and are skipped; ends the program if over 1 % are."""
        for i in set(bad) - self.bad:
            print(f"warning: {self.files[i]}: unreadable image, skipped", file=sys.stderr)
        self.bad |= set(bad)
        if len(self.bad) > 0.01 * len(self):
            fail(f"{self.files[min(self.bad)]}: unreadable image, one of {len(self.bad)} in {len(self)}; "
                 "over 1 % is no accident, replace or remove them")

    def __getitems__(self, indices):
        """A batch: uint8 images (B, 3, S, S), labels (B,), landmarks (B, 5, 2); last, which were unreadable.

        The place of an unreadable image goes to another of the batch.
        """
        if self.images is not None:
            i = torch.as_tensor(indices)
            return self.images[i], self.labels[i], self.landmarks[i], []
        read = {int(i): self.decode(int(i)) for i in indices}
        good = [i for i in read if read[i] is not None]
        i = torch.tensor([i if read[i] is not None else good[0] for i in read])
        images = torch.stack([read[int(j)] for j in i])
        return images, self.labels[i], self.landmarks[i], list(read.keys() - good)


def batches(faces, batch, seed, first, last):
    """Yields the batches of steps first ... last - 1; the order of images follows from (seed, step) alone."""
    per_epoch = len(faces) // batch                                     # drop_last

    def order():
        for step in range(first, last):
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == first:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                shuffled = torch.randperm(len(faces), generator=generator).tolist()
            yield shuffled[position * batch:(position + 1) * batch]

    loader = DataLoader(faces, batch_sampler=order(), collate_fn=tuple,
                        num_workers=0 if faces.images is not None else os.cpu_count(),
                        pin_memory=torch.cuda.is_available())
    for images, labels, landmarks, bad in loader:
        faces.report(bad)
        yield images, labels, landmarks
