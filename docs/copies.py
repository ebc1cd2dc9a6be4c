"""Which copies of real faces does evaluate.py name? python docs/copies.py runs/fr train112/

Changes 300 images of the folder in many ways, one at a time, and counts which of them are over the thresholds
of the recogniser, of "copy" and of "image". Then counts strangers: all images against other people's, and
those of half of the people against the other half, ten times, with that half's threshold.
"""
import io
import sys
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Faces, open_image, to_tensor
from evaluate import FaceSet, embed_faces, lines_of, resemblance, thumbnails
from model import DEVICE, embed, load_recogniser


def tone(image, function):
    """Each value x, in [0, 1], becomes function(x)."""
    levels = [round(255 * min(1, function(x / 255))) for x in range(256)]
    return image.point(levels * 3)


def turn_hue(image, degrees):
    hue, *others = image.convert("HSV").split()
    hue = hue.point(lambda x: (x + round(degrees * 256 / 360)) % 256)
    return Image.merge("HSV", (hue, *others)).convert("RGB")


def jpeg(image, quality):
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return open_image(file)


def zoom(image, factor):
    W, H = image.size
    left, top = W / 2 - W / 2 / factor, H / 2 - H / 2 / factor
    return image.resize((W, H), Image.BICUBIC, (left, top, W - left, H - top))


def frame(image):
    border = round(0.05 * image.width)
    inside = image.crop((border, border, image.width - border, image.height - border))
    return ImageOps.expand(inside, border)


CHANGES = {
    "none": lambda image: image,
    "mirrored": ImageOps.mirror,
    "negative": ImageOps.invert,
    "negative, mirrored": lambda image: ImageOps.invert(ImageOps.mirror(image)),
    "gamma 0.5": lambda image: tone(image, lambda x: x ** 0.5),
    "gamma 2": lambda image: tone(image, lambda x: x ** 2),
    "brightness 0.6": lambda image: tone(image, lambda x: 0.6 * x),
    "brightness 1.6": lambda image: tone(image, lambda x: 1.6 * x),
    "equalised": ImageOps.equalize,
    "hue + 40 degrees": lambda image: turn_hue(image, 40),
    "blue channel alone": lambda image: image.split()[2].convert("RGB"),
    "JPEG 10": lambda image: jpeg(image, 10),
    "JPEG 3": lambda image: jpeg(image, 3),
    "blurred, sigma 2 of 112 pixels": lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 56)),
    "moved by 3 of 112 pixels": lambda image: ImageChops.offset(image, round(image.width * 3 / 112), 0),
    "zoomed 1.1": lambda image: zoom(image, 1.1),
    "framed, 5 %": frame}


def some_of(real, keep):
    """The FaceSet of the images where `keep` (M,) is true."""
    columns = real.f[keep], real.labels[keep], real.thumbs[keep]
    return FaceSet(*columns, None, real.faces, real.index[keep.cpu()])


def over(found, thresholds):
    """How many images are over the thresholds of copies and of images."""
    return [int((found[test][0] > thresholds[test]).sum()) for test in ("copy", "image")]


backbone, prototypes, meta = load_recogniser(sys.argv[1])
faces = Faces([sys.argv[2]], meta["config"]["size"])
real = embed_faces(backbone, prototypes, faces)
strangers = resemblance(real, real, real.labels)
thresholds = lines_of(strangers)
print(f"copy: threshold {thresholds['copy']:.3f}; image: threshold {thresholds['image']:.3f}")

torch.manual_seed(0)
originals = [open_image(faces.path(i)) for i in torch.randperm(len(faces))[:300].tolist()]
print("of 300 copies over the thresholds: copy, image")
for name, change in CHANGES.items():
    images = torch.stack([to_tensor(change(image), faces.size) for image in originals]).to(DEVICE)
    f, thumbs = embed(backbone, images).to(real.f), thumbnails(images).to(real.thumbs)
    copies = FaceSet(f, torch.zeros_like(real.labels[:300]), thumbs)
    print(f"{name}: {over(resemblance(copies, real), thresholds)}", flush=True)

print(f"strangers of all {len(real.f)}: {over(strangers, thresholds)}")
cosine, which = (column.cpu() for column in strangers["copy"])
for i in cosine.argsort(descending=True)[:12].tolist():
    print(f"  {cosine[i]:.3f} {faces.path(real.index[i])} {faces.path(real.index[which[i]])}")
for _ in range(10):
    half = (torch.rand(len(faces.people)) < 0.5).to(DEVICE)[real.labels]
    known, others = some_of(real, half), some_of(real, ~half)
    line = lines_of(resemblance(known, known, known.labels))
    print(f"strangers among {len(others.f)} images of other people: {over(resemblance(others, known), line)}")
