"""Faces: the demo people this file draws, image folders, landmarks, and verification benchmarks.

    python data.py align photos/ --out faces/           # identity/photo.jpg -> aligned 112 x 112 crops

A source is a folder of identity/image.jpg, or InsightFace's train.rec and train.idx (identities are labels,
files keys). It may hold landmarks.csv (file,x1,y1,...,x5,y5 in pixels: eyes, nose, mouth corners, left to
right) and *.bin benchmarks. The source `demo` is drawn into runs/demo, as just such a folder, on first use.
"""
import contextlib
import csv
import functools
import glob
import hashlib
import io
import os
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from model import (DEVICE, RetinaFace, build, detect_faces, fail, options, read_published, reading,
                   replace_file, run, to_float)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# Where the five landmarks lie in an aligned 112 x 112 crop: the ArcFace template.
TEMPLATE = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                         [70.7299, 92.2041]]) / 112


def similarity(source, target):
    """Complex scale and shift (..., 1), least squares, from points (..., 5, 2) to others."""
    source, target = (torch.view_as_complex(points.contiguous()) for points in (source, target))
    s, t = (z - z.mean(-1, keepdim=True) for z in (source, target))
    scale = (s.conj() * t).sum(-1, keepdim=True) / (s.abs() ** 2).sum(-1, keepdim=True)
    return scale, target.mean(-1, keepdim=True) - scale * source.mean(-1, keepdim=True)


def move(points, scale, shift):
    """Points (..., 2) carried by a similarity z -> scale z + shift."""
    return torch.view_as_real(scale * torch.view_as_complex(points.contiguous()) + shift)


# ------------------------------------------------------------------------------------------ the demo's people
#
# One face, painted on an ellipsoid with bumps, whose numbers vary independently: virtual people can differ
# from everybody only as much as the space of faces is wide. A place on the head is its direction from the
# middle (right, down, ahead), of length 1; u is how far aside, v how far down. B pictures, P pixels.

BUMPS = torch.tensor([          # u, v, width, height, mean and spread of how far it stands out
    (0, .19, .12, .12, .25, .09), (0, 0, .08, .20, .08, .05), (0, .85, .30, .20, .02, .12),
    # above: tip of the nose, its bridge, chin; below: forehead, cheeks, jaw
    (0, -.34, .50, .10, .04, .04), (.48, .20, .22, .20, 0, .08), (.68, .58, .25, .25, -.02, .12)])
SPOTS = [               # u, v, width, height, how they vary, opened by mouth, by lids; share of skin, of hair
    (0, .76, .50, .25, .3, 0, 0, .4, .5), (.43, -.37, .20, .04, .05, 0, 0, 0, .7),          # beard, brows
    (0, .52, .31, .07, .05, .6, 0, .75, 0), (0, .51, .27, .02, .05, .9, 0, .2, 0),          # lips, mouth
    (.40, -.18, .17, .09, .05, 0, .3, .3, 0), (.40, -.16, .15, .07, .05, 0, .3, 1, 0),      # lashes, eyes
    (.40, -.16, .05, .05, .02, 0, .2, .1, 0), *[(0, .1, .06, .04, .7, 0, 0, .6, 0)] * 5]    # irises, marks
LANDMARKS = torch.tensor([(-.39, -.16, .9), (.39, -.16, .9), (0, .19, 1), (-.26, .51, .8), (.26, .51, .8)])
WAVES = torch.tensor([(k, l, m) for k in (1.5, 3.5) for l in (1.5, 3.5) for m in (0, 1.57)])    # of colour
PERSON = dict(radii=3, bumps=len(BUMPS), waves=24, skin=4, hair=3, hairline=3, spots=8 * len(SPOTS))
PICTURE = dict(turn=2, expression=2, crop=10, light=3, tint=3, scene=9)


def swell(bumps, place):
    """The head's radius, in the ellipsoid's, at places (B, 3, P): (B, 1, P)."""
    u, v, width, height, mean, spread = BUMPS.T[..., None]
    distance = ((place[:, :1].abs() - u) / width) ** 2 + ((place[:, 1:2] - v) / height) ** 2    # (B, 6, P)
    return 1 + ((mean + spread * bumps) * torch.exp(-distance)).sum(1, keepdim=True)


def paint(place, pixel, expression, waves, skin, hair, hairline, spots):
    """Colours (B, 3, P) of places (B, 3, P) of the head; edges are one `pixel` (1 is its radius) wide."""
    right, down, ahead = place.split(1, 1)
    angle = torch.atan2(right, ahead)                                   # beyond a quarter turn is behind
    skin = torch.tensor([.63, .45, .36])[:, None] + .28 * skin[:, :1] + .08 * skin[:, 1:]
    k, l, m = WAVES.T[..., None]
    canvas = skin + .1 * waves.view(-1, 3, 8) @ ((k * right).cos() * (l * down + m).cos())
    hair = .33 + .31 * hair
    for spot, numbers in zip(SPOTS, spots.split(8, 1)):
        u, v, width, height, vary, by_mouth, by_lids, of_skin, of_hair = spot
        aside, lower, wide, high, tilt, *colour = numbers.split(1, 1)
        height = height * (1 + .25 * high) * (1 + by_mouth * expression[:, :1] + by_lids * expression[:, 1:])
        x = (angle.abs() if u else angle) - u - vary * aside            # two of what is off the middle
        y = down - v - vary * lower + .3 * tilt * x
        mask = ((1 - torch.hypot(x / width / (1 + .25 * wide), y / height)) * height / pixel + .5).clamp(0, 1)
        canvas = canvas + mask * (of_skin * skin + of_hair * hair + .25 * torch.cat(colour, 1) - canvas)
    top, arch, curl = hairline.split(1, 1)
    top = -.67 + .17 * top + (.3 + .15 * arch) * angle ** 2 + .05 * curl * (12 * angle).cos()
    return (canvas + ((top - down) / pixel + .5).clamp(0, 1) * (hair - canvas)).clamp(0, 1)


def draw_faces(identity, nuisance, size):
    """People (B or 1, 139), circumstances (B, 29), of [0, 1]: images (B, 3, S, S), landmarks (B, 5, 2)."""
    B, pixel = len(nuisance), 2.2 / size                                # in head units
    radii, bumps, *looks = (2 * identity - 1)[..., None].split([*PERSON.values()], 1)       # each in [-1, 1]
    turn, expression, crop, light, tint, scene = (2 * nuisance - 1)[..., None].split([*PICTURE.values()], 1)
    radii = torch.tensor([.89, 1.2, .95])[:, None] + .1 * radii
    axis = F.pad(turn.flip(1).mT * torch.tensor([.3, .8]), (0, 1))      # (B, 1, 3): pitch, yaw, no roll
    turn = torch.matrix_exp(torch.linalg.cross(torch.eye(3)[None], axis))                   # (B, 3, 3)

    # Five landmarks on the surface, and the similarity that carries them to the aligned crop, a little off.
    points = F.normalize(LANDMARKS).T[None]                                                 # (1, 3, 5)
    points = (turn.mT @ (points * radii * swell(bumps, points)))[:, :2].mT                  # (B, 5, 2)
    scale, shift = similarity(points, TEMPLATE + .035 * crop.view(B, 5, 2))

    # Cast every pixel's ray a + b z onto the surface |a + b z| = radius(place), by fixed-point iteration.
    grid = (torch.arange(size) + .5) / size
    grid = torch.cartesian_prod(grid, grid).flip(1)[None]                                   # (1, P, 2)
    xy = move(grid, 1 / scale, -shift / scale).mT                                           # (B, 2, P)
    a, b = turn[:, :, :2] @ xy / radii, turn[:, :, 2:] / radii                              # (B, 3, P or 1)
    aa, ab, bb = ((x * y).sum(1, keepdim=True) for x, y in ((a, a), (a, b), (b, b)))
    radius = 1.0
    for _ in range(4):
        inside = ab ** 2 - bb * (aa - radius ** 2)                      # > 0 where the ray hits
        z = (inside.clamp(min=0).sqrt() - ab) / bb
        place = (a + b * z) / radius
        radius = swell(bumps, place)

    # Light on the surface normals, which are the slope of the depth map; behind the head a coloured slope.
    depth = (z * (inside > 0)).view(B, size, size)
    down, right = (slope * scale.abs()[..., None] * size for slope in torch.gradient(depth, dim=(1, 2)))
    normal = F.normalize(torch.stack([-right, -down, torch.ones_like(depth)], 1), dim=1).flatten(2)
    towards = torch.tensor([0, -.1, .6])[:, None] + .3 * light          # the lamp; its length is its strength
    light = .5 + .1 * tint + (normal * towards).sum(1, keepdim=True).clamp(min=0)
    head = light * paint(place, pixel, expression, *looks)
    scene = .45 + .35 * scene[:, :3] + .2 * scene[:, 3:].view(B, 3, 2) @ xy
    image = torch.lerp(scene, head, (inside / (3 * pixel) + .5).clamp(0, 1))
    return image.view(B, 3, size, size).clamp(0, 1), move(points, scale, shift)


def write_csv(path, header, rows):
    """Writes a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    replace_file(path, lambda temporary: temporary.write_bytes(os.fsencode(text.getvalue())))


def write_landmarks(path, rows):
    """Writes landmarks.csv from pairs of a file name in its folder and landmarks (5, 2) in pixels."""
    header = ["file", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]
    write_csv(path, header, ([name, *map("{:.2f}".format, face.flatten().tolist())] for name, face in rows))


def write_bin(path, images, pairs, generator):
    """Writes an InsightFace .bin of people, uint8 (I, P, 3, S, S): ten folds sharing nobody, half same."""
    encoded, same = [], [p % 2 == 1 for p in range(pairs)]
    for p, fold in enumerate(fold for fold in images.tensor_split(10) for _ in range(pairs // 10)):
        (i, j), (a, b) = (torch.randperm(n, generator=generator)[:2].tolist() for n in fold.shape[:2])
        for image in (fold[i, a], fold[i if same[p] else j, b]):
            to_pil_image(image).save(file := io.BytesIO(), "PNG")
            encoded.append(file.getvalue())
    replace_file(path, lambda temporary: temporary.write_bytes(pickle.dumps((encoded, same), protocol=4)))


def draw_demo(root, people=2000, held_out=200, per_person=8, size=32):
    """Draws the demo: a folder of `people` with landmarks.csv, and heldout.bin of others nobody trains on."""
    generator, temporary = torch.Generator().manual_seed(0), Path(f"{root}.tmp")
    who = torch.rand(people + held_out, 1, sum(PERSON.values()), generator=generator)
    how = torch.rand(len(who), per_person, sum(PICTURE.values()), generator=generator)
    some = zip(who.expand(-1, per_person, -1).flatten(0, 1).split(80), how.flatten(0, 1).split(80))
    drawn = [draw_faces(*batch, size) for batch in tqdm([*some], "drawing people", leave=False)]
    images, landmarks = (torch.cat(parts).unflatten(0, (-1, per_person)) for parts in zip(*drawn))
    # The sensor's noise is 1 % of the brightest.
    images = (255 * images + 2.5 * torch.randn(images.shape, generator=generator)).clamp(0, 255).byte()
    names = [f"p{person:04d}/{i:04d}.png" for person in range(people) for i in range(per_person)]
    for name, image in zip(names, images.flatten(0, 1)):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(temporary / name)
    write_landmarks(temporary / "landmarks.csv", zip(names, size * landmarks.flatten(0, 1)))
    write_bin(temporary / "heldout.bin", images[people:], 3000, generator)
    os.replace(temporary, root)


# ----------------------------------------------------------------------- images, benchmarks, training sources


def read_image(file, size=None):
    """One image of a path or an open file, uint8 (3, S, S) RGB, resized to `size` if need be."""
    image = Image.open(file).convert("RGB")
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.BICUBIC, reducing_gap=2)
    return pil_to_tensor(image)


def read_record(path, offset):
    """The encoded image, an open file, of the record at `offset`."""
    # The few records that hold the magic number are stored in parts: as images that cannot be read.
    content = np.memmap(path, mode="r")
    _, length, flag = struct.unpack_from("<III", content, offset)
    return io.BytesIO(content[offset + 32 + 4 * flag:offset + 8 + length])


def list_records(path):
    """Yields identity, key, offset of the images in an InsightFace .rec file, which its .idx lists."""
    # A record: magic, length, flag, label, two ids, `flag` more labels (then those count), image or none.
    index = path.with_suffix(".idx")
    with reading(index, f"a line of key and offset for every record of {path.name}"):
        content = np.memmap(path, mode="r")
        for key, offset in np.loadtxt(index, np.int64, ndmin=2).tolist():
            magic, word, flag = struct.unpack_from("<III", content, offset)
            if magic != 0xced7230a or offset + 8 + word % (1 << 29) > len(content):
                raise ValueError(f"record {key} lacks the magic number or ends beyond {len(content)} bytes")
            label, = struct.unpack_from("<f", content, offset + (32 if flag else 12))
            if word % (1 << 29) > 24 + 4 * flag:
                yield str(int(label)), str(key), offset


def list_images(root):
    """The names identity/image, with slashes, of the images in the folders of a folder."""
    names = (Path(name).as_posix() for name in glob.glob("*/*", root_dir=root))
    return sorted(name for name in names if name.lower().endswith(IMAGES))


class BinUnpickler(pickle.Unpickler):
    """Reads InsightFace .bin pickles and nothing else: bytes, lists, bools, numbers and numpy arrays."""

    ALLOWED = {"_codecs.encode", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
               "numpy.core.multiarray.scalar", "numpy.core.numeric._frombuffer"}

    def find_class(self, module, name):
        if f"{module}.{name}".replace("_core", "core") not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no benchmark needs")
        return super().find_class(module, name)


def processors():
    """How many processors this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def threaded(function, items, title):
    """[function(item) for item in items], by threads, behind a progress bar."""
    with ThreadPoolExecutor(processors()) as pool:
        return list(tqdm(pool.map(function, items), title, len(items), leave=False, mininterval=1))


def read_benchmark(path, size):
    """An InsightFace .bin: uint8 images (2P, 3, S, S), pair p is 2p and 2p + 1; same person or not (P,)."""
    with reading(path, "an InsightFace .bin benchmark"):
        encoded, same = BinUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="bytes").load()
        decode = lambda image: read_image(io.BytesIO(bytes(image)), size)
        images = torch.stack(threaded(decode, encoded, f"reading {path}"))
        same = torch.as_tensor(np.asarray(same, dtype=bool))
        if len(images) != 2 * len(same) or len(same) < 10 or same.all() or not same.any():
            raise ValueError(f"{len(images)} images, {same.sum()} of {len(same)} pairs of one person")
    return images, same


def open_source(name):
    """The folder of a data source; draws the demo if it is asked for and not there yet."""
    root = Path("runs/demo" if name == "demo" else name)
    if name == "demo" and not root.is_dir():
        draw_demo(root)
    if (root / "run.json").is_file() and not (root / "manifest.csv").is_file():
        fail(f"{root}: sample.py has not finished it; give its command again")
    return root


def read_landmarks(root, paths, side):
    """Landmarks (M, 5, 2) in [0, 1] of files root/name of sides (2,); NaN where landmarks.csv has none."""
    path = root / "landmarks.csv"
    with reading(path, "lines of file,x1,y1,...,x5,y5 in pixels"):
        lines = os.fsdecode(path.read_bytes()).splitlines()[1:] if path.is_file() else []
        table = {f"{root}/{name}": np.array(numbers[:10], np.float32) for name, *numbers in csv.reader(lines)}
        rows = [table.get(os.fsdecode(file), [np.nan] * 10) for file in paths]
        return torch.from_numpy(np.array(rows, np.float32)).view(-1, 5, 2) / side


class Faces(Dataset):
    """Images of one or more sources united by identity name: uint8 images, labels, landmarks ([0, 1] or NaN).

    Sets that fit in `memory` bytes are decoded once, larger ones by the loader's workers whenever wanted. For
    an image that cannot be read the next one stands in, with its label and landmarks."""

    def __init__(self, sources, size=None, memory=3e9):
        self.people, self.bad, self.size, self.images = {}, set(), None, None   # people: {identity: label}
        self.paths, self.offsets, self.labels, landmarks = [], [], [], []
        for source in sources:
            root, first = open_source(source), len(self)
            records = [*list_records(root / "train.rec")] if (root / "train.rec").is_file() else []
            images = [(name.split("/")[0], name, -1) for name in list_images(root)]
            found = records + images or fail(f"{root}: no such folder or no images identity/image.jpg")
            if both := len({identity for identity, _, _ in found} & self.people.keys()):
                print(f"{root}: {both} of its people are also in the sources before it, by their names")
            self.labels += [self.people.setdefault(identity, len(self.people)) for identity, _, _ in found]
            self.paths += [os.fsencode(f"{root}/{name}") for _, name, _ in found]
            self.offsets += [offset for _, _, offset in found]
            side = torch.tensor(self.readable(first)[0].shape[:0:-1])   # as stored: width, height
            landmarks.append(read_landmarks(root, self.paths[first:], side))
            size = size or int(side[0])
        self.paths, self.offsets = map(np.array, (self.paths, self.offsets))  # lists fill every worker
        self.labels, self.landmarks, self.size = torch.tensor(self.labels), torch.cat(landmarks), size
        if len(self) * 3 * size ** 2 <= memory:
            order = torch.arange(len(self)).split(64)
            read = tqdm(self.loader(order), "reading images", len(order), leave=False)
            self.images, self.which = (torch.cat(part).numpy() for part in zip(*read))

    def __len__(self):
        return len(self.paths)

    def path(self, i):
        """The file of image i; a record's key takes the place of its name."""
        return os.fsdecode(self.paths[i])

    def readable(self, i):
        """Image i, or the next that can be read: uint8 array (3, S, S), and which one it is."""
        for j in ((i + on) % len(self) for on in range(len(self))):
            with contextlib.suppress(Exception):                        # images break in every possible way
                path, offset = Path(self.path(j)), self.offsets[j]
                file = path if offset < 0 else read_record(path.parent / "train.rec", offset)
                return read_image(file, self.size).numpy(), j
        fail(f"{self.path(i)}: neither this nor any other image can be read")

    def report(self, unreadable):
        """Names images that could not be read; ends the program if over 1 % are."""
        for i in set(unreadable.tolist()) - self.bad:
            tqdm.write(f"warning: {self.path(i)}: unreadable image, another stands in", sys.stderr)
            self.bad.add(i)
        if len(self.bad) > 0.01 * len(self):
            fail(f"{len(self.bad)} of {len(self)} images are unreadable, over 1 %: replace or remove them")

    def __getitems__(self, indices):
        """A batch: uint8 images (B, 3, S, S), which ones they are (B,), and which were wanted (B,)."""
        wanted = torch.as_tensor(indices).numpy()
        if self.images is not None:
            return self.images[wanted], self.which[wanted], wanted
        images, which = zip(*map(self.readable, wanted.tolist()))
        return np.stack(images), np.array(which), wanted

    def loader(self, order):
        """Yields (images, indices) of the batches of indices in `order`, decoded by workers if need be."""
        # Workers are slow to start, and send arrays by pipe: no /dev/shm.
        workers = 0 if self.images is not None or len(self) <= 100 else processors()
        for images, i, wanted in DataLoader(self, batch_sampler=order, collate_fn=tuple, num_workers=workers):
            self.report(wanted[i != wanted])
            images = torch.from_numpy(images)
            yield images.pin_memory() if torch.cuda.is_available() else images, torch.from_numpy(i)


def batches(faces, batch, seed, first, last, device, name):
    """Yields step, images in [-1, 1], labels, landmarks on `device`, of steps first to last - 1.

    All chance of a step, here and after, follows from (seed, step): a resumed run repeats itself."""
    @functools.lru_cache(1)
    def shuffled(epoch):
        return np.random.default_rng([abs(seed), epoch]).permutation(len(faces))
    per_epoch = len(faces) // batch                                             # the rest is left out
    order = (shuffled(step // per_epoch)[step % per_epoch * batch:][:batch] for step in range(first, last))
    progress = tqdm(faces.loader(order), name, initial=first, total=last, mininterval=1, leave=False)
    send = functools.partial(torch.Tensor.to, device=device, non_blocking=True)
    for step, (images, i) in enumerate(progress, first):
        torch.manual_seed(seed * 1_000_003 + step)
        yield step, to_float(send(images)), send(faces.labels[i]), send(faces.landmarks[i])


# ------------------------------------------------- landmarks and alignment: photographs to training crops

WEIGHTS_URL = "https://github.com/xinntao/facexlib/releases/download/v0.1.0/detection_mobilenet0.25_Final.pth"
WEIGHTS_SHA256 = "2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220"


def load_detector(weights, folder, device):
    """RetinaFace with published weights: those named, or fetched (1.8 MB) into `folder` once and checked."""
    path = Path(weights or Path(folder) / WEIGHTS_URL.split("/")[-1])
    if not weights and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with reading(WEIGHTS_URL, f"to fetch it (or put that file at {path}, or name it with --weights)"):
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256)
    return build(RetinaFace, read_published(path), "net", path).to(device, memory_format=torch.channels_last)


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


def complete_landmarks(faces, folder, weights, device):
    """Fills in the landmarks that `faces` lack; they are kept in folder/landmarks, a file for each 4,096."""
    missing = faces.landmarks[:, 0, 0].isnan().nonzero()[:, 0]
    if not len(missing):
        return
    detector = load_detector(weights, folder, device)
    for part in tqdm(missing.split(4096), "landmarks", leave=False):
        path = Path(folder, "landmarks", hashlib.sha256(faces.paths[part]).hexdigest()).with_suffix(".pt")
        if not path.is_file():
            found = [crop_landmarks(detector, x.to(device)) for x, _ in faces.loader(part.split(64))]
            replace_file(path, lambda temporary: torch.save(torch.cat(found), temporary))
        with reading(path, "landmarks that this script found; delete it"):
            faces.landmarks[part] = torch.load(path, weights_only=True)
    lost = faces.landmarks[:, 0, 0].isnan()
    faces.landmarks[lost] = TEMPLATE
    print(f"landmarks: found in {len(missing) - lost.sum()} of {len(missing)} images, else the template's")


def largest_face(detector, image, device, smallest, side=640):
    """Landmarks (5, 2) in pixels of the face with the largest box times score, seen at `side` at most."""
    small = ImageOps.contain(image, (min(side, image.width), min(side, image.height)))
    scale = small.width / image.width
    (scores, boxes, points), = detect_faces(detector, pil_to_tensor(small)[None].to(device))
    sides = (boxes[:, 2:] - boxes[:, :2]) / scale                               # (K, 2)
    rank = (sides.prod(1) * scores).where(sides.amin(1) >= smallest, 0.0)
    if not rank.any():
        raise ValueError(f"no face of {smallest} pixels" if len(rank) else "no face")
    return points[rank.argmax()] / scale


def crop_face(image, points, size):
    """The aligned crop of a photograph by landmarks (5, 2) in its pixels, and the landmarks in the crop's."""
    scale, shift = similarity(points, size * TEMPLATE)
    factor = max(1, int(1 / scale.abs()))                       # averaged down first: nothing aliases
    back, offset = 1 / scale / factor, -shift / scale / factor  # PIL asks where a pixel of the crop is from
    affine = torch.cat([back.real, -back.imag, offset.real, back.imag, back.real, offset.imag]).tolist()
    crop = image.reduce(factor).transform((size, size), Image.AFFINE, affine, Image.BICUBIC)
    return crop, move(points, scale, shift)


def align(photos, out, detector, device, size=112, smallest=40):
    """Crops the largest face, `smallest` pixels or more, of every photos/identity/name to out/identity/."""
    names = list_images(photos) or fail(f"{photos}: found no identity/photo with one of {' '.join(IMAGES)}")
    crops, rejected = [], []                                            # rows of the two tables

    def finish(name):
        """Writes the crop of one photograph, unless it is there, and its row."""
        crop_name = name.removesuffix(".jpg") + ".jpg"
        path = Path(out) / crop_name
        try:
            if not path.is_file():
                image = ImageOps.exif_transpose(Image.open(Path(photos) / name)).convert("RGB")
                crop, landmarks = crop_face(image, largest_face(detector, image, device, smallest), size)
                crop.info["comment"] = " ".join(map(str, landmarks.flatten().tolist()))    # for the next run
                replace_file(path, lambda temporary: crop.save(temporary, "JPEG", quality=95, subsampling=0))
            with Image.open(path) as crop:
                crops.append((crop_name, torch.tensor([*map(float, crop.info["comment"].split())])))
        except Exception as error:                                      # images break in every possible way
            rejected.append((name, str(error) if isinstance(error, ValueError) else f"unreadable: {error}"))
    torch.set_num_threads(1)                                            # each photograph has a thread
    threaded(finish, names, str(out))
    write_csv(Path(out) / "rejected.csv", ["file", "reason"], sorted(rejected))
    write_landmarks(Path(out) / "landmarks.csv", sorted(crops, key=lambda row: row[0]))
    print(f"{len(crops)} faces in {out}; {len(rejected)} photographs in rejected.csv")


def main():
    parser, flag = options(__doc__)
    flag("task", choices=["align"], help="cut faces out of photographs")
    flag("source", metavar="DIR", help="identity folders of photographs")
    flag("--out", default="faces", metavar="DIR", help="folder of the aligned faces (default: %(default)s)")
    flag("--weights", metavar="PATH", help="those of RetinaFace (default: fetched)")
    args = parser.parse_args()
    align(args.source, args.out, load_detector(args.weights, args.out, DEVICE), DEVICE)


if __name__ == "__main__":
    run(main)
