"""What people hand in in place of plain folders of faces: tells and refuses, and reads odd images.

data.py asks when a source holds more than images identity/image.jpg, or shares people with another; when an
image is deeper than 8 bits, transparent or broken; and when landmarks look wrong. model.py asks what a file
is that cannot be read, and what stopped a script.
"""
import contextlib
import errno
import json
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from data import SPLITS, SUFFIXES, list_source
from model import fail, reading

# ------------------------------------------------------------------------------------------ training sources

DEMO = Path("runs/demo")            # its toy faces are painted when they are first asked for


def judge_sources(roots, listed, flag):
    """Folder, images and left-out names of each source, the last those that fill up people of others.

    `listed` has folder, images and other files, or is empty if one of the folders is not there. Ends the
    program if `flag`, which names them, names none, or what is no source or not complete, or strangers.
    """
    if not roots:
        fail(f"nobody said which faces: {flag} names their folders")
    if roots == [DEMO] and not DEMO.is_dir():
        from tools.toys import draw_demo
        draw_demo(DEMO)
        listed = [list_source(DEMO)]
    if missing := [root for root in roots if not root.is_dir()]:
        fail(f"{missing[0]}: no such folder; {flag} names a folder, of what is unpacked, or of a train.rec")

    judged, people = [], set()
    for root, images, others in sorted(listed, key=lambda source: fills_up(source[0])):
        images, left_out = judge_source(root, images, others)
        own = {identity for identity, _, _ in images}
        if people & own:
            refuse_strangers(root, people & own)
        people |= own
        judged.append((root, images, left_out))
    return judged


def fills_up(root):
    """Whether a source shows people of others (sample.py --real-to)."""
    if not (root / "run.json").is_file():
        return False
    if not (root / "manifest.csv").is_file():
        fail(f"{root}: sample.py has not finished it, or it is no set of faces")
    with reading(root / "run.json", "the settings of sample.py"):
        return json.loads((root / "run.json").read_text())["real_to"] is not None


def judge_source(root, images, others):
    """Images (identity, name, size) of a source, or its records (identity, key, offset); names left out.

    Left out, aloud, are hidden images, images in nobody's folder, and what lies in somebody's folder and is
    no image. Ends the program if there are no images, or if folders are parts of a set and not people.
    """
    left_out = []
    for name in others:
        file = Path(name.lower())
        hidden = file.name[0] == "."
        if "/" in name and not hidden or {*file.suffixes} & {*SUFFIXES}:        # also .1.jpg.icloud
            left_out.append(name)
        split = name.split("/")[0]
        if split.lower() in SPLITS and "/" in name and not hidden and file.suffix in SUFFIXES:
            fail(f"{root}/{split} would be a person; expected identity/image.jpg below --data {root}/{split}")
    if left_out:
        print(f"{root}: left out {len(left_out)} files that are hidden, in nobody's folder, or no images by "
              f"their names, such as {min(left_out)}")

    if (root / "train.rec").is_file():
        if images:
            fail(f"{root}: holds train.rec and folders of images, such as {images[0][1]}; expected one")
        from tools.insightface import list_records
        return list_records(root / "train.rec"), left_out
    if not images:
        fail(f"{root}: no images identity/image.jpg in it, and no train.rec; unpack what is packed")
    return images, left_out


def refuse_strangers(root, shared):
    """Says how many people a source shares with those before it, by their names.

    Ends the program if they are bare numbers, because number 7 is somebody else in every set; not so if the
    source fills up people of other sources.
    """
    print(f"{root}: {len(shared)} of its people are in other sources, too, such as {min(shared)}")
    if not fills_up(root) and any(name.isdigit() for name in shared):
        fail(f"{root}: people who are numbers in two sources, such as {min(shared)}, may be strangers; give "
             "them other names, in folders, or use one of the sources")


# ---------------------------------------------------------------------------------------------------- images

def plain_image(image):
    """A PIL image 8 bits deep, on white where it is transparent."""
    if image.mode[0] in "IF":                                               # grey, 16 or 32 bits deep
        values = np.asarray(image).astype(np.float32)
        # A guess: white is the smallest of the usual numbers that no pixel is above.
        white = next((white for white in (1, 255, 2 ** 16 - 1) if values.max() <= white), values.max())
        image = Image.fromarray((values * 255 / white).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def stand_in(faces, i):
    """The first image from i on of its source that can be read, after its last one the first; and its index.

    Warns of each that cannot be read; raises an error if none can, or if it is the system that fails.
    """
    first, end = np.searchsorted(faces.source, faces.source[i] + [0, 1])
    for j in [*range(i, end), *range(first, i)]:
        try:
            return faces.open(j), j
        except Exception as error:                                  # images break in every possible way
            if system_failed(error):
                raise
            cause = why(faces.path(j), error)
            warnings.warn(f"{faces.path(j)}: cannot be read ({cause}); the next image stands in")
    raise ValueError(f"{faces.path(i)}: neither this nor any other image can be read")


def why(path, error):
    """Why a file cannot be read: what it is in place of what was expected, or else the error."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(50).strip().lower()
        if start.startswith(b"version https://git-lfs"):
            return "it is a pointer of Git LFS; `git lfs pull` fetches the file itself"
        if start.startswith((b"<!doctype", b"<html")):
            return "it is a web page; download the file itself"
    if "weights_only" in str(error):                        # where PyTorch advises to run what is in it
        return "it is damaged, or holds more than tensors"
    return f"{type(error).__name__}: {str(error)[:300]}"


def system_failed(error):
    """Whether the system caused an error, and not a file: no memory, a disk that fails, no permission."""
    if isinstance(error, RuntimeError):                     # PyTorch's; only the text tells its kind
        kinds = ("out of memory", "alloc", "dataloader worker", "new thread", "connection closed")
        return any(kind in str(error).lower() for kind in kinds)
    # Pillow's have no number; ENOENT is a file that is not there, EINVAL one that is damaged.
    return isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EINVAL)


def why_stopped(error, less):
    """What stopped a script from outside, in a line; None if it is a mistake in the code.

    `less` says how this script needs less memory.
    """
    if isinstance(error, RuntimeError) and not system_failed(error):
        return None
    lines = f"{type(error).__name__}: {error}".splitlines()
    reason = lines[-1 if "Traceback" in str(error) else 0]              # a worker's comes last
    if isinstance(error, OSError) or "thread" in reason or "closed" in reason:
        return reason
    return f"the memory does not suffice ({reason}); {less}; or free some"


# ------------------------------------------------------------------------------------------------- landmarks

def tell_landmarks(path, rows, unknown, distance):
    """Says which of the {name: numbers} of a landmarks.csv are of no image, and whether they are off."""
    if unknown:
        print(f"{path}: {len(unknown)} of its {len(rows)} rows name no image here, such as {min(unknown)}")
    if distance > 0.2:
        print(f"{path}: WARNING landmarks are {distance:.2f} of the image away from an aligned face's; they "
              "should be pixels, x before y, of left eye, right eye, nose, left and right mouth corner")
