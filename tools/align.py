"""Cuts faces out of photographs: python tools/align.py photos/ --out faces/ [--weights PATH]

RetinaFace finds the largest face of every photos/identity/photo.jpg. The crop, 112 x 112 pixels on the
ArcFace template, goes to faces/identity/photo.jpg (photo.png.jpg for photo.png), its landmarks to
faces/landmarks.csv. Every file of photos/ that could not be used has a row in faces/rejected.csv, with the
reason. The same command cuts photographs that were added to photos/ later.
"""
import argparse
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import (SUFFIXES, TEMPLATE, list_files, open_image, processors, read_csv, write_csv,
                  write_landmarks)
from model import DEVICE, fail, reading, refuse_inside, replacing, run
from tools.inputs import system_failed
from tools.retinaface import crop_landmarks, detect_faces, load_detector, similarity

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("photos", metavar="DIR", help="a folder for each identity, with photographs")
flag("--out", default="faces", metavar="DIR", help="folder of the aligned faces (default: %(default)s)")
flag("--weights", metavar="PATH", help="RetinaFace's (default: fetched)")

SIZE, SMALLEST = 112, 40                                        # pixels: of a crop, of a face in a photograph
FARTHEST = 0.05     # landmarks from the template's: good crops 0.043 at most, turned ones 0.056 at least


def move(points, scale, shift):
    """Points (..., 2) carried by a similarity z -> scale z + shift."""
    return torch.view_as_real(scale * torch.view_as_complex(points.contiguous()) + shift)


def largest_face(detector, image, side=640):
    """Landmarks (5, 2) in pixels of the face with the largest box times score, seen at `side` at most."""
    small = ImageOps.contain(image, (min(side, image.width), min(side, image.height)))
    scale = small.width / image.width
    (scores, boxes, points), = detect_faces(detector, pil_to_tensor(small)[None].to(DEVICE))
    sides = (boxes[:, 2:] - boxes[:, :2]) / scale                               # (K, 2)
    rank = (sides.prod(1) * scores).where(sides.amin(1) >= SMALLEST, 0.0)
    if not rank.any():
        raise ValueError(f"no face of {SMALLEST} pixels" if len(rank) else "no face")
    return points[rank.argmax()] / scale


def crop_face(image, points, size):
    """The aligned crop of a photograph by landmarks (5, 2) in its pixels, and the landmarks in the crop's."""
    scale, shift = similarity(points, size * TEMPLATE)
    factor = max(1, int(1 / scale.abs()))                       # averaged down first: nothing aliases
    back, offset = 1 / scale / factor, -shift / scale / factor  # PIL asks where a pixel of the crop is from
    affine = torch.cat([back.real, -back.imag, offset.real, back.imag, back.real, offset.imag]).tolist()
    crop = image.reduce(factor).transform((size, size), Image.AFFINE, affine, Image.BICUBIC)
    return crop, move(points, scale, shift)


def upright(detector, crop):
    """Whether a second look at a crop finds the landmarks where a face that stands upright has them."""
    found = crop_landmarks(detector, pil_to_tensor(crop)[None].to(DEVICE))
    return (found - TEMPLATE).norm(dim=2).mean() <= FARTHEST


def read_rows(path, kind, columns):
    """{file: the other columns} of a table of an earlier run, if there is one."""
    if not path.is_file():
        return {}
    with reading(path, "a table that this script wrote (delete it to cut all faces again)"):
        return {name: [*map(kind, rest)] for name, *rest in read_csv(path)[1:] if rest[columns - 1:]}


def align(photos, out, detector):
    """Cuts each photograph that has no row in landmarks.csv.

    Returns how many crops there are in all, and how many files were rejected now.
    """
    photos, out = Path(photos), Path(out)
    if not photos.is_dir():
        fail(f"{photos}: no such folder")
    refuse_inside(out, [photos])
    names = {name: size for name, size in list_files(photos) if Path(name).name[0] != "."}
    if not names:
        fail(f"{photos}: no files in it")
    crops = read_rows(out / "landmarks.csv", float, 10)         # {crop: ten numbers}
    rejected = {}

    def cut(name):
        # photo.png becomes photo.png.jpg; so photo.png.jpg becomes photo.png.jpg.jpg where both are there
        same_name = name.endswith(".jpg") and name.removesuffix(".jpg") not in names
        crop_name = name if same_name else f"{name}.jpg"
        if crop_name in crops and (out / crop_name).is_file():
            return
        try:
            if names[name] is None:
                raise ValueError("no file, or a link to none")
            if "/" not in name:
                raise ValueError("not in the folder of an identity")
            if Path(name).suffix.lower() not in SUFFIXES:
                raise ValueError("its suffix is not that of an image")
            image = open_image(photos / name)
            crop, landmarks = crop_face(image, largest_face(detector, image), SIZE)
            if not upright(detector, crop):
                raise ValueError("the face is not upright, or hardly seen")
            crop.save(encoded := io.BytesIO(), "JPEG", quality=95, subsampling=0)
        except Exception as error:                              # images break in every possible way
            if system_failed(error):
                raise
            rejected[name] = str(error) if isinstance(error, ValueError) else f"unreadable: {error}"
            return
        with replacing(out / crop_name) as path:
            path.write_bytes(encoded.getvalue())
        crops[crop_name] = landmarks.flatten().tolist()

    torch.set_num_threads(1)                                    # each photograph has a thread
    try:
        with ThreadPoolExecutor(processors()) as pool:
            list(tqdm(pool.map(cut, sorted(names)), str(out), len(names), leave=False, mininterval=1))
    finally:                                                    # a run that is stopped keeps what it did
        write_tables(out, names, crops, rejected)
    if not crops:
        fail(f"{photos}: no face found in any of {len(names)} files; {out}/rejected.csv says why")
    return len(crops), len(rejected)


def write_tables(out, names, crops, rejected):
    """Writes landmarks.csv and rejected.csv, where rows of photographs that are not in `names` stay."""
    old = {name: row[0] for name, row in read_rows(out / "rejected.csv", str, 1).items() if name not in names}
    write_csv(out / "rejected.csv", ["file", "reason"], sorted((old | rejected).items()))
    rows = ((name, torch.tensor(row)) for name, row in sorted(crops.items()))
    write_landmarks(out / "landmarks.csv", rows)


def main():
    args = parser.parse_args()
    count, rejected = align(args.photos, args.out, load_detector(args.weights, args.out))
    print(f"{count} faces in {args.out}; {rejected} files of {args.photos} in rejected.csv")


if __name__ == "__main__":
    run(main)
