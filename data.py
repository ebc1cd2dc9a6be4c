"""Faces: the demo people this file draws, image folders, landmarks, and verification benchmarks.

    python data.py align photos/ --out faces/           # identity/photo.jpg -> aligned 112 x 112 crops
    python data.py landmarks casia/                     # landmarks.csv for faces that are aligned already

A source is a folder `root/identity/image.jpg|png`, or one with InsightFace records (`train.rec`, `train.idx`:
identities are their labels, files their keys), with `root/landmarks.csv` where stage 2 needs it
(file,x1,y1, ...,x5,y5 in pixels: left eye, right eye, nose, left and right mouth corner) and `root/*.bin`
benchmarks where there are any. The source `demo` is drawn on first use into runs/demo, as just such a folder.
"""
import argparse
import csv
import functools
import io
import math
import os
import pickle
import re
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from model import (RetinaFace, claim, detect_faces, fail, load_published, reading, replace_file, run,
                   to_float, to_uint8)

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

IDENTITY_DIALS, NUISANCE_DIALS = 192, 32        # uniform numbers that make a person, and a picture of them


def draw_faces(identity, nuisance, size):
    """Draws people (B, 192) under nuisance (B, 32), both in [0, 1]: images (B, 3, S, S), landmarks (B, 5, 2).

    Everybody is a smooth deformation and colouring of one face, painted on an ellipsoid with bumps; each
    pixel's ray is cast onto it, so pose, parallax and landmarks are exact. The dials vary independently,
    because virtual people can only differ from everybody as much as the space of faces is wide.
    """
    B, pixel = len(identity), 2.2 / size                                # pixel: head units
    who, how = iter(identity.T[..., None]), iter(nuisance.T[..., None])
    dial = lambda low, high: low + (high - low) * next(who)             # a trait (B, 1) of the person
    vary = lambda low, high: low + (high - low) * next(how)             # a circumstance (B, 1) of the picture
    colour = lambda pick, low, high: torch.stack([pick(low, high) for _ in range(3)], 1)        # (B, 3, 1)
    edge = lambda inward, softness=1.0: (inward / (pixel * softness) + 0.5).clamp(0, 1)     # one pixel wide
    waves = [(k, l, m * math.pi / 2) for k in (1.5, 3.5) for l in (1.5, 3.5) for m in (0, 1)]

    # The person: radii of the head, a deformation, mirror symmetric, that is a sum of waves; bumps (x, y,
    # wide, tall, out) for nose tip and bridge, chin, brow, cheek, jaw. The turn has the head's axes as rows.
    radii = torch.stack([dial(.80, .98), dial(1.08, 1.32), dial(.85, 1.05)], 1)                 # (B, 3, 1)
    sway, lift = ([dial(-.1, .1) / k for k, *_ in waves] for _ in "uv")
    bumps = [(0, .19, dial(.09, .16), .12, dial(.16, .34)), (0, 0, dial(.06, .1), .2, dial(.03, .14)),
             (0, .85, dial(.2, .4), .2, dial(-.1, .14)), (0, -.34, .5, .1, dial(0, .08)),
             (.48, .2, .22, .2, dial(-.08, .08)), (.68, .58, .25, .25, dial(-.14, .1))]
    yaw, pitch = vary(-.8, .8), vary(-.3, .3)
    sy, cy, sp, cp = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
    turn = torch.cat([cy, 0 * cy, -sy, -sy * sp, cp, -cy * sp, sy * cp, sp, cy * cp], 1).view(B, 3, 3)

    def template(u, v):
        """Where on the one face the points (u, v) (B, P) of these people's faces lie."""
        return (u + sum(a * (k * u).sin() * (l * v + m).cos() for a, (k, l, m) in zip(sway, waves)),
                v + sum(a * (k * u).cos() * (l * v + m).cos() for a, (k, l, m) in zip(lift, waves)))

    def swell(u, v):
        """The head's radius (B, P), in the ellipsoid's, at template points (u, v)."""
        return 1 + sum(out * torch.exp(-((u.abs() - x) / wide) ** 2 - ((v - y) / tall) ** 2)
                       for x, y, wide, tall, out in bumps)

    # Five landmarks on that surface, and the similarity that carries them to the aligned crop, a little off.
    smile, gape = vary(-.04, .09), vary(-.05, .1).clamp(min=0)
    mouth_w, mouth_y = .26 * (1 + 2 * smile), .51 - smile
    wanted = u, v = (torch.cat([0 * yaw - .39, 0 * yaw + .39, 0 * yaw, -mouth_w, mouth_w], 1),
                     torch.cat([0 * yaw - .16, 0 * yaw - .16, 0 * yaw + .19, mouth_y, mouth_y], 1))
    for _ in range(12):                                                 # invert the deformation
        u, v = (now + want - there for now, want, there in zip((u, v), wanted, template(u, v)))
    points = torch.stack([u, v, (1 - u * u - v * v).sqrt()], 1) * radii * swell(*wanted)[:, None]
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
        u, v = template(u, v)
        rho = swell(u, v)
    side = u.abs()                                                      # the template is symmetric

    def blob(x, y, wide, tall, tilt=0 * yaw, bend=0.0, softness=1.0, u=side):
        """The mask (B, P) of an ellipse at (x, y) and its mirror image, tilted (radians) and bent."""
        across = ((u - x) * tilt.cos() + (v - y) * tilt.sin()) / wide
        down = (v - y) * tilt.cos() - (u - x) * tilt.sin() - bend * across ** 2
        return edge((1 - (across ** 2 + (down / tall) ** 2 + 1e-9).sqrt()) * tall, softness) * (w > 0)

    # Skin, coloured by the same waves, then what is painted on it, in turn, as (tint, mask).
    skin = torch.tensor([.62, .44, .35])[:, None] + dial(-.27, .3)[:, None] + colour(dial, -.08, .08)
    hair, iris, lip = colour(dial, .02, .65), colour(dial, .05, .6), skin * colour(dial, .55, 1.05)
    canvas = skin + sum(colour(dial, -.06, .06) * ((k * u).cos() * (l * v + m).cos())[:, None]
                        for k, l, m in waves)
    lid, upper, lower = dial(.05, .085) * vary(.5, 1.1), dial(.03, .06) + gape, dial(.03, .07)
    slant, eye_w, pupil, gaze = dial(-.3, .3), dial(.11, .16), dial(.035, .055), vary(-.05, .05) * u.sign()
    eye = blob(.39, -.16, eye_w, lid, slant)
    glass_w, glass_h, rim = dial(.17, .24), dial(.12, .2), dial(.8, .9)
    glasses = blob(.39, -.16, glass_w, glass_h) - blob(.39, -.16, glass_w * rim, glass_h * rim)
    glasses = torch.maximum(glasses, blob(0, -.16, .39 - glass_w, .025)) * (dial(0, 1) > .72)
    hairline = dial(-.85, -.5) + dial(-.1, .5) * u ** 2
    hairline = hairline + sum(dial(-.05, .05) * (k * u).cos() for k in (3, 6, 9, 12))
    curtain = edge(side - dial(.75, 1.05) - .25 * (v - dial(-.2, .5)).clamp(min=0), 2) * (v < dial(-.1, .7))
    streak = 1 + dial(0, .35) * torch.sin(dial(8, 30) * u + dial(-8, 8) * v + dial(0, 6))
    beard = blob(0, .76, dial(.2, .7), dial(.1, .4), softness=3)
    has_hair, white = dial(0, 1) > .08, torch.tensor([.93, .92, .9])[:, None]
    layers = [
        (hair * .6 + skin * .3, beard * dial(-.7, .8).clamp(min=0)),
        (skin * colour(dial, .7, 1.1), blob(.5, .3, .25, .2, softness=4)),                      # cheeks
        (skin * .45, blob(dial(.05, .1), .28, .035, .028)),                                     # nostrils
        (lip, blob(0, .51 - dial(0, .03), mouth_w, upper, bend=-smile)),
        (lip * colour(dial, .8, 1.2), blob(0, .55 + gape, mouth_w * dial(.6, .9), lower, bend=-smile)),
        (skin * .25, blob(0, .51 + gape / 2, mouth_w * .9, .012 + gape * .7, bend=-smile)),
        (skin * colour(dial, .55, 1.05), blob(.39, -.19, .2, .12, softness=3)),                 # eye shadow
        (skin * colour(dial, .7, 1), blob(.39, -.05, .15, .04, softness=2) * .7),               # and bags
        (skin * .3, blob(.39, -.16 - dial(.01, .03), eye_w * 1.08, lid, slant)),                # lashes
        (white, eye), (iris, blob(.39 + gaze, -.16, pupil, pupil) * eye),
        (iris * .15, blob(.39 + gaze, -.16, pupil * .45, pupil * .45) * eye),
        (hair * dial(.3, .9)[..., None], blob(.39, -.32 - vary(-.015, .04), dial(.13, .23), dial(.018, .05),
                                              dial(-.3, .3), dial(0, .08))),                    # brows
        *((skin * colour(dial, .2, 1.2), (dial(-.6, 1) > 0) * blob(                             # marks
            dial(-.75, .75), dial(-.6, .8), dial(.02, .09), dial(.02, .06), dial(-1.5, 1.5), u=u))
          for _ in range(5)),
        (colour(dial, 0, .6), glasses),
        (hair * streak[:, None], torch.maximum(edge(hairline - v, 2), curtain).where(w > 0, 1.0) * has_hair)]
    for tint, mask in layers:
        canvas = canvas + mask[:, None] * (tint - canvas)

    # Light on the surface normals, which are the slope of the depth map.
    depth = (z * (inside > 0)).view(B, size, size)
    slope_y, slope_x = (slope * scale.abs()[..., None] * size for slope in torch.gradient(depth, dim=(1, 2)))
    normal = F.normalize(torch.stack([-slope_x, -slope_y, torch.ones_like(depth)], 1), dim=1).view(B, 3, -1)
    light = F.normalize(torch.stack([vary(-1, 1), vary(-1, .5), vary(.5, 1)], 1), dim=1)
    lambert = (normal * light).sum(1, keepdim=True).clamp(min=0)
    lit = vary(.35, .65)[:, None] + vary(.5, .75)[:, None] * lambert
    head = canvas.clamp(0, 1) * lit * (1 + colour(vary, -.08, .08))

    # Background; in front of it the hair behind the head, the neck, the head.
    image = colour(vary, .1, .8) + colour(vary, -.2, .2) * xy[:, :1] + colour(vary, -.2, .2) * xy[:, 1:]
    volume, below = dial(1.02, 1.25), dial(-.4, 1.4) - (a - b * (ab / bb)[:, None])[:, 1]
    behind = edge(ab ** 2 - bb * (aa - volume ** 2), 3) * edge(below, 2) * has_hair
    neck = edge(dial(.4, .65) - xy[:, 0].abs(), 2) * edge(xy[:, 1] - .6)
    for tint, mask in ((hair * .7, behind), (skin * .6, neck), (head, edge(inside, 3))):
        image = image + mask[:, None] * (tint - image)
    return image.view(B, 3, size, size).clamp(0, 1), move(points, scale, shift)


def write_csv(path, header, rows):
    """Writes a CSV file, all of it or nothing."""
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    replace_file(path, write)


LANDMARKS_HEADER = ["file", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]


def landmarks_row(name, points):
    """The line of landmarks.csv for the file `name`, its landmarks (5, 2) in pixels."""
    return [name, *map("{:.2f}".format, points.flatten().tolist())]


def write_landmarks(path, rows):
    """Writes landmarks.csv from pairs of a file name in its folder and landmarks (5, 2) in pixels."""
    write_csv(path, LANDMARKS_HEADER, (landmarks_row(*row) for row in rows))


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
    write_landmarks(temporary / "landmarks.csv", zip(files, torch.cat(landmarks)))
    write_bin(temporary / "heldout.bin", images[count:].view(held_out, -1, 3, size, size), 3000, generator)
    os.replace(temporary, root)


# ----------------------------------------------------------------------- images, benchmarks, training sources


def read_image(file, size=None):
    """One image, uint8 (3, S, S) RGB, resized to `size` if need be, and its (width, height) before."""
    with Image.open(file) as image:
        before = image.size
        if before[0] * before[1] > 64e6:
            raise ValueError(f"{before[0]} x {before[1]} pixels are no face crop")
        image = image.convert("RGB")
    if size and before != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2)
    return pil_to_tensor(image), before


def write_png(file, image):
    """Writes a uint8 image (3, S, S) to a path or a buffer, without loss."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")


def contact_sheet(path, rows, side=96):
    """Writes rows of (uint8 image (3, S, S), caption) as one JPEG, each caption drawn on its picture."""
    sheet = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)))
    for y, row in enumerate(rows):
        for x, (image, caption) in enumerate(row):
            tile = to_pil_image(image).resize((side, side), Image.Resampling.BICUBIC)
            ImageDraw.Draw(tile).text((3, side - 15), caption, "white", stroke_width=1, stroke_fill="black")
            sheet.paste(tile, (x * side, y * side))
    replace_file(path, lambda temporary: sheet.save(temporary, "JPEG", quality=92))


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


def pack_record(key, labels, image=b""):
    """The bytes of one record, as `Record` reads it: several labels make a vector."""
    vector = np.array(labels, "<f4").tobytes() if len(labels) > 1 else b""
    body = struct.pack("<IfQQ", len(vector) // 4, labels[0], key, 0) + vector + image
    magic = struct.pack("<I", Record.MAGIC)
    cuts = 4 * np.flatnonzero(np.frombuffer(body[:len(body) // 4 * 4], "<u4") == Record.MAGIC)
    pieces = [body[start:stop] for start, stop in zip([0, *cuts + 4], [*cuts, len(body)])]
    flags = [0] if len(pieces) == 1 else [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(magic + struct.pack("<I", flag << 29 | len(piece)) + piece + b"\0" * (-len(piece) % 4)
                    for flag, piece in zip(flags, pieces))


def read_index(path):
    """Records of an InsightFace .rec file and their labels, by its .idx; all checked, none decoded.

    A record is magic, length, then flag, label, two ids, `flag` more labels (then those count), image.
    Records without an image (the header, and a list of identities at the end) are left out.
    """
    index, found = path.with_suffix(".idx"), []
    with reading(index, f"a line of key and offset for every record of {path.name}"):
        content = mapped(path)
        for line in index.read_text().splitlines():
            key, offset = map(int, line.split())
            magic, length, flag, label = struct.unpack_from("<IIIf", content, max(0, offset))
            if magic != Record.MAGIC or offset < 0 or offset + 8 + (length & 0x1fffffff) > len(content):
                raise ValueError(f"record {key} lacks the magic number or ends beyond {len(content)} bytes")
            image = offset + 32 + 4 * flag
            label, = struct.unpack_from("<f", content, offset + 32) if flag else (label,)
            if content[image:image + 2].tobytes() in (b"\xff\xd8", b"\x89P"):               # JPEG, PNG
                found.append((Record(path, key, offset), int(label)))
    return found


class BinUnpickler(pickle._Unpickler):
    """Reads InsightFace .bin pickles and nothing else: bytes, lists, bools, numbers and numpy arrays.

    The unpickler is Python's own in Python: the one in C can be asked for any amount of memory.
    """

    ALLOWED = {"_codecs.encode", "numpy.dtype", "numpy.core.multiarray.scalar",
               "numpy.core.numeric._frombuffer"}

    def find_class(self, module, name):
        wanted = f"{module}.{name}".replace("_core", "core")
        if wanted == "numpy.ndarray":
            return "the argument of _reconstruct, and nothing to call"
        if wanted == "numpy.core.multiarray._reconstruct":
            return lambda *_: np.array([], np.uint8)                    # what it has inside comes next
        if wanted not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no benchmark needs")
        return super().find_class(module, name)


def read_pairs(path, folder):
    """Files and verdicts of LFW's pairs.txt: lines of `name i j`, a person, or `name i other j`, two."""
    files, same = [], []
    for number, line in enumerate(path.read_text().splitlines()[1:], 2):        # the first counts the folds
        pair = re.fullmatch(r"([^\s/]+)\s+(\d+)\s+(?:([^\s/]+)\s+)?(\d+)\s*", line)
        if not pair:
            raise ValueError(f"line {number} is not 'name i j' or 'name i other j': '{line[:80]}'")
        name, i, other, j = pair.groups()
        same.append(other is None)
        for stem in (f"{name}/{name}_{int(i):04d}", f"{other or name}/{other or name}_{int(j):04d}"):
            crops = [file for end in CROPS if (file := folder / f"{stem}{end}").is_file()]
            if not crops:
                raise ValueError(f"{folder} has no {stem}.jpg or .png; give --images the people's folder")
            files.append(crops[0])
    return files, same


def read_benchmark(path, size, folder=None):
    """A .bin or pairs.txt benchmark: uint8 images (2P, 3, S, S), pair p is 2p and 2p + 1; same (P,) bool."""
    path = Path(path)
    with reading(path, "a .bin or pairs.txt benchmark"):
        if path.suffix == ".txt":
            files, same = read_pairs(path, Path(folder or path.parent))
        else:
            with open(path, "rb") as file:
                encoded, same = BinUnpickler(file, encoding="bytes").load()
            files = [io.BytesIO(bytes(image)) for image in encoded]
        images = torch.stack([read_image(file, size)[0] for file in files])
        same = torch.as_tensor(np.asarray(same, dtype=bool))
        if len(images) != 2 * len(same) or len(same) < 10 or same.all() or not same.any():
            raise ValueError(f"10 pairs or more, of one person and of two, are a benchmark: {len(images)} "
                             f"images, {same.sum()} pairs of one person and {(~same).sum()} of two found")
    return images, same


def benchmarks(paths, sources, size):
    """{path: (images, same)} of the benchmarks named, or of every *.bin beside the data."""
    if paths is None:
        paths = [path for source in sources for path in sorted(open_source(source).glob("*.bin"))]
    return {Path(path): read_benchmark(path, size) for path in paths}


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

    Sets that fit in `memory` bytes are decoded once, by threads; larger ones by the loader's workers, again
    and again. Unreadable images are left out.
    """

    def __init__(self, sources, size=None, memory=3e9):
        self.files, self.keys, self.names, self.bad, self.images, self.size = [], [], {}, set(), None, None
        labels, landmarks, sides = [], [], []                           # names: {identity: label}
        for source in sources:
            root, first = open_source(source), len(self)
            found = [(record, str(label), str(record.key)) for path in sorted(root.glob("*.rec"))
                     for record, label in read_index(path)]
            found += [(file, file.parent.name, f"{file.parent.name}/{file.name}")
                      for file in sorted(root.glob("*/*")) if file.suffix.lower() in CROPS]
            if not found:
                fail(f"--data {source}: no images in it; expected identity/image.jpg or .png, or train.rec "
                     "with train.idx")
            files, names, keys = zip(*found)
            self.files += files
            self.keys += keys                                           # as landmarks.csv names them
            labels += [self.names.setdefault(name, len(self.names)) for name in names]
            # The crops of a source share one size: opening half a million files to ask takes minutes.
            decoded = map(self.decode, range(first, len(self)))
            sides.append(next((image.shape[2] for image in decoded if image is not None), 32))
            landmarks.append(self.read_landmarks(root, keys, sides[-1]))
        self.labels, self.landmarks, self.size = torch.tensor(labels), torch.cat(landmarks), size or sides[0]
        if len(self) * 3 * self.size ** 2 <= memory:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                decoded = pool.map(self.decode, range(len(self)))
                images = list(tqdm(decoded, "reading images", len(self), leave=False, mininterval=1))
            good = [i for i, image in enumerate(images) if image is not None]
            self.report(set(range(len(self))) - set(good))
            self.files, self.keys = [self.files[i] for i in good], [self.keys[i] for i in good]
            self.labels, self.landmarks = self.labels[good], self.landmarks[good]
            self.images = torch.stack([images[i] for i in good])

    def __len__(self):
        return len(self.files)

    @staticmethod
    def read_landmarks(root, keys, side):
        """Landmarks (M, 5, 2) in [0, 1] of crops `side` wide, NaN where root/landmarks.csv has none."""
        path, table = root / "landmarks.csv", {}
        if path.is_file():
            with reading(path, "lines of file,x1,y1,...,x5,y5 in pixels"), open(path, newline="") as file:
                for key, *numbers in list(csv.reader(file))[1:]:
                    table[key] = np.array(numbers[:10], np.float32).reshape(5, 2) / side
                    if (np.abs(table[key] - 0.5) > 2).any():
                        raise ValueError(f"{key} has some far outside its {side} pixels")
        unknown = np.full((5, 2), np.nan, np.float32)
        return torch.from_numpy(np.stack([table.get(key, unknown) for key in keys]))

    def decode(self, i):
        """Image i, uint8 (3, S, S), or None if it cannot be read."""
        try:
            with self.files[i].open("rb") as file:
                return read_image(file, self.size)[0]
        except Exception:                                               # images break in every possible way
            return None

    def report(self, bad):
        """Names images that could not be read and are skipped; ends the program if over 1 % are."""
        for i in set(bad) - self.bad:
            tqdm.write(f"warning: {self.files[i]}: unreadable image, skipped", sys.stderr)
        self.bad |= set(bad)
        if len(self.bad) > 0.01 * len(self):
            fail(f"{self.files[min(self.bad)]}: unreadable image, one of {len(self.bad)} in {len(self)}; "
                 "over 1 % is no accident, replace or remove them")

    def __getitems__(self, indices):
        """A batch: uint8 images (B, 3, S, S), their indices (B,); last, the indices of unreadable ones."""
        if self.images is not None:
            i = torch.as_tensor(indices)
            return self.images[i], i, []
        read = {int(i): self.decode(int(i)) for i in indices}
        good = {i: image for i, image in read.items() if image is not None}
        images = torch.stack([*good.values()]) if good else torch.empty(0, 3, self.size, self.size)
        return images, torch.tensor([*good], dtype=torch.long), list(read.keys() - good)

    def loader(self, order):
        """Yields (images, indices) of the batches of indices in `order`, decoded by workers if need be."""
        workers = 0 if self.images is not None else os.cpu_count()
        for images, i, bad in DataLoader(self, batch_sampler=order, collate_fn=tuple, num_workers=workers,
                                         pin_memory=torch.cuda.is_available()):
            self.report(bad)
            yield images, i


def batches(faces, batch, seed, first, last, device, name):
    """Yields step, images in [-1, 1], labels, landmarks on `device`, and the seconds waited for data so far.

    All chance in a step, the order of images and what comes after, follows from (seed, step): a resumed run
    repeats itself.
    """
    per_epoch, waited, asked = len(faces) // batch, 0, time.time()              # drop_last

    def order():
        for step in range(first, last):
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == first:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                shuffled = torch.randperm(len(faces), generator=generator).tolist()
            yield shuffled[position * batch:(position + 1) * batch]
    progress = tqdm(faces.loader(order()), name, initial=first, total=last, mininterval=1, leave=False)
    for step, (images, i) in enumerate(progress, first):
        waited += time.time() - asked
        torch.manual_seed(seed * 1_000_003 + step)
        x = to_float(images.to(device, non_blocking=True))
        yield step, x, faces.labels[i].to(device), faces.landmarks[i].to(device), waited
        asked = time.time()


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
    return load_published(RetinaFace(), path).to(device).eval()


def crop_landmarks(detector, images):
    """Landmarks (B, 5, 2) in [0, 1] of aligned uint8 crops (B, 3, S, S), and whether one was found (B,).

    The detector wants a face of about 100 pixels with some room around it: crops are resized to 168 pixels,
    framed by 42 of grey, and seen as they are and mirrored; the mean counts. Of several faces the one nearest
    to the template is taken; where there is none, the template itself.
    """
    x = F.interpolate(images.float(), size=168, mode="bicubic", antialias=True, align_corners=False)
    x = F.pad(x.round().clamp(0, 255), (42,) * 4, value=114)
    views, found = [], torch.zeros(len(images), dtype=torch.bool)
    for view, order, sign in ((x, [0, 1, 2, 3, 4], 0), (x.flip(3), [1, 0, 2, 4, 3], 1)):
        for i, (_, _, points) in enumerate(detect_faces(detector, view, confidence=0.02)):
            points = (points[:, order] - 42) / 168
            points[..., 0] = sign + (1 - 2 * sign) * points[..., 0]
            distance = (points - TEMPLATE).norm(dim=2).mean(1)
            near = len(points) > 0 and distance.min() < 0.15
            found[i] |= near
            views.append(points[distance.argmin()] if near else torch.full((5, 2), torch.nan))
    mean = torch.stack(views).view(2, -1, 5, 2).nanmean(0)
    return torch.where(found[:, None, None], mean, TEMPLATE), found


def complete_landmarks(sources, weights, folder, device):
    """Finds the landmarks that sources of aligned crops lack and writes them to their landmarks.csv."""
    for source in sources:
        faces = Faces([source])
        missing = faces.landmarks.isnan().flatten(1).any(1).nonzero().flatten()
        if not len(missing):
            continue
        detector, lost = load_detector(weights, folder, device), 0
        loader = faces.loader(missing.split(64))
        for images, i in tqdm(loader, f"landmarks of {source}", -(-len(missing) // 64), leave=False):
            faces.landmarks[i], found = crop_landmarks(detector, images.to(device))
            lost += int((~found).sum())
        write_landmarks(open_source(source) / "landmarks.csv", zip(faces.keys, faces.landmarks * faces.size))
        print(f"{source}: found the landmarks of {len(missing) - lost} of {len(missing)} images"
              f"{f'; for {lost} the template stands in' if lost else ''}")


def letterbox(image, side=640):
    """An RGB photograph on a grey square, shrunk if need be: uint8 (3, side, side), and its scale there."""
    scale = min(1, side / max(image.size))
    canvas = Image.new("RGB", (side, side), (114, 114, 114))
    canvas.paste(image.resize([max(1, round(length * scale)) for length in image.size], reducing_gap=2))
    return pil_to_tensor(canvas), scale


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


def align(photos, out, detector, device, size=112, face="largest", min_face=40):
    """Crops one face of every photograph photos/identity/name to out/identity/, with its landmarks.

    Which: the largest box times score, or the one nearest the centre. Photographs without a face of min_face
    pixels are listed in rejected.csv. Those that are in it or in landmarks.csv are dealt with: the same
    command goes on after them.
    """
    photos, out = Path(photos), Path(out)
    names = [path.relative_to(photos).as_posix() for path in sorted(photos.glob("*/*"))
             if path.suffix.lower() in PHOTOGRAPHS]
    if not names:
        fail(f"{photos}: no photographs; expected identity/photo.jpg, .png, .webp, .bmp or .tif")
    held = claim(out)
    crop_of = lambda name: name if name.lower().endswith(".jpg") else f"{name}.jpg"
    paths, done = (out / "landmarks.csv", out / "rejected.csv"), []
    for path, header in zip(paths, (LANDMARKS_HEADER, ["file", "reason"])):
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []     # a torn last line is dropped
        lines = lines or [",".join(header)]
        replace_file(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in lines)))
        done.append({row[0] for row in csv.reader(lines[1:])})

    def read(name):
        try:
            with Image.open(photos / name) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
            return image, *letterbox(image)
        except Exception as error:                                      # images break in every possible way
            return None, torch.zeros(3, 640, 640, dtype=torch.uint8), type(error).__name__

    def finish(name, image, scale, faces):
        """The line of landmarks.csv (the crop is written first) or of rejected.csv for a photograph."""
        if image is None:
            return [name, f"unreadable: {scale}"]
        scores, boxes, points = faces
        sides = (boxes[:, 2:] - boxes[:, :2]) / scale
        large = sides.amin(1) >= min_face
        if not large.any():
            return [name, f"no face of {min_face} pixels" if len(large) else "no face"]
        middle = (boxes[:, 2:] + boxes[:, :2]) / 2 / scale - torch.tensor(image.size) / 2
        rank = sides.prod(1) * scores if face == "largest" else -middle.norm(dim=1)
        best = rank.where(large, torch.tensor(-torch.inf)).argmax()
        crop, landmarks = crop_face(image, points[best] / scale, size)
        replace_file(out / crop_of(name), lambda path: crop.save(path, "JPEG", quality=95, subsampling=0))
        return landmarks_row(crop_of(name), landmarks)

    todo = [name for name in names if crop_of(name) not in done[0] and name not in done[1]]
    with ThreadPoolExecutor() as pool, open(paths[0], "a", newline="") as good, \
            open(paths[1], "a", newline="") as bad:
        for start in tqdm(range(0, len(todo), 16), out.name, unit=" x 16 img", leave=False):
            batch = todo[start:start + 16]
            images, squares, scales = zip(*pool.map(read, batch))
            found = detect_faces(detector, torch.stack(squares).to(device))
            for row in pool.map(finish, batch, images, scales, found):
                csv.writer(good if len(row) == 11 else bad, lineterminator="\n").writerow(row)
            good.flush()
            bad.flush()
    os.close(held)
    count = sum(1 for _ in open(paths[1])) - 1
    print(f"{len(names) - count} faces in {out}; {count} photographs in rejected.csv")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("task", choices=["align", "landmarks"], help="cut faces out of photographs, or find their landmarks")
    flag("source", metavar="DIR", help="identity folders of photographs (align) or of faces; or train.rec")
    flag("--out", default="faces", metavar="DIR", help="align: aligned faces (default: %(default)s)")
    flag("--size", type=int, default=112, help="align: side of a crop in pixels (default: %(default)s)")
    flag("--face", choices=["largest", "centre"], default="largest",
         help="align: of several faces the largest, or the one nearest the centre (default: %(default)s)")
    flag("--min-face", type=int, default=40, help="align: smallest face in pixels (default: %(default)s)")
    flag("--weights", metavar="PATH", help="those of RetinaFace (default: fetched)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.task == "landmarks":
        return complete_landmarks([args.source], args.weights, "runs", device)
    detector = load_detector(args.weights, args.out, device)
    align(args.source, args.out, detector, device, args.size, args.face, args.min_face)


if __name__ == "__main__":
    run(main)
