"""Compares landmarks found with those a folder has: python docs/landmarks.py lfw112 [WEIGHTS [STRIDE]]

Every STRIDE-th image of the folder (default 1). Prints the share found, images a second, the distance to the
landmarks in its landmarks.csv and to those the same detector finds without bf16, in pixels of the crop, and
the rate of `largest_face` on photographs of 200 pixels: the crops with a border, a thread for each processor,
as tools/align.py does.
"""
import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Faces, processors
from model import DEVICE
from tools import retinaface
from tools.align import largest_face

faces = Faces([sys.argv[1]])
detector = retinaface.load_detector((sys.argv[2:] or [None])[0], "runs")
chosen = torch.arange(0, len(faces), int((sys.argv[3:] or [1])[0]))


def find():
    """Landmarks (M, 5, 2) in pixels of the chosen images, and images a second after the first batch, or 0."""
    found = []
    for images, _ in faces.loader(chosen.split(64)):
        found.append(retinaface.crop_landmarks(detector, images.to(DEVICE)))
        start = time.time() if len(found) == 1 else start
    return faces.size * torch.cat(found), max(0, len(chosen) - 64) / (time.time() - start)


def describe(name, points, others):
    """Prints how far landmarks (M, 5, 2) lie from each other, where both were found."""
    distance = (points - others).norm(dim=2)                                    # (M, 5)
    distance = distance[~distance.isnan().any(1)]
    if len(distance):
        print(f"pixels to {name}, {len(distance)} faces: mean {distance.mean():.3f}, median "
              f"{distance.median():.3f}, 99th percentile {distance.quantile(0.99):.3f}; largest mean of five "
              f"{distance.mean(1).max():.2f}")


def photograph(i):
    """Image i as a photograph of 200 pixels, with its border repeated."""
    image = torch.from_numpy(faces[i][0])[None]
    image = F.interpolate(image.float(), size=112, mode="bilinear", antialias=True)
    return to_pil_image(F.pad(image, (44,) * 4, mode="replicate")[0].round().clamp(0, 255).byte())


points, rate = find()
share = (~points.isnan().flatten(1).any(1)).float().mean()
print(f"{len(points)} images, found {share:.2%}, {rate:.0f} img/s on {DEVICE}")
describe("landmarks.csv", points, faces.size * faces.landmarks[chosen])
retinaface.autocast, kept = contextlib.nullcontext, retinaface.autocast
exact, _ = find()
retinaface.autocast = kept
describe("the same detector without bf16", points, exact)


def seen(image):
    """Is there a face in a photograph?"""
    try:
        return len(largest_face(detector, image)) == 5
    except ValueError:
        return False


photographs = [photograph(i) for i in chosen[:2000].tolist()]
torch.set_num_threads(1)
with ThreadPoolExecutor(processors()) as pool:
    any(pool.map(seen, photographs[:32]))                                       # warms up
    start = time.time()
    count = sum(pool.map(seen, photographs))
print(f"largest_face: {count} faces in {len(photographs)} photographs of 200 pixels, "
      f"{len(photographs) / (time.time() - start):.0f} img/s with {processors()} threads")
