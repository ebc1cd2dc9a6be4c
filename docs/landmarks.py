"""Compares landmarks found with those a folder has: python docs/landmarks.py lfw112 WEIGHTS [STRIDE]

Every STRIDE-th image of the folder (default 1). Prints the share found, the distance to the landmarks in its
landmarks.csv in pixels of the crop, and images a second; draws landmarks.jpg: above, found landmarks on faces
from the hardest tenth, below, on others, with the mean distance of the five points.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Faces, contact_sheet, crop_landmarks, load_detector

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
faces, detector = Faces([sys.argv[1]]), load_detector(sys.argv[2], None, device)
chosen = torch.arange(0, len(faces), int((sys.argv[3:] or [1])[0]))
start, points, known = time.time(), [], []
for images, i in faces.loader(chosen.split(64)):
    found, sure = crop_landmarks(detector, images.to(device))
    points.append(found)
    known.append(sure)
rate = len(chosen) / (time.time() - start)
points, known = torch.cat(points), torch.cat(known)
distance = faces.size * (points - faces.landmarks[chosen]).norm(dim=2)          # (M, 5)
mean = distance.mean(1)
quantiles = lambda x: "median {:.2f}, 99th percentile {:.2f}".format(
    *x.flatten().quantile(torch.tensor([0.5, 0.99])))
print(f"{len(chosen)} images, found {known.float().mean():.2%}, {rate:.0f} img/s on {device}; pixels off: "
      f"of a point {quantiles(distance)}; mean of five {quantiles(mean)}, largest {mean.max():.2f}")
order = mean.argsort(descending=True)
tenth = order[:len(order) // 10]
rows = []
for some in (tenth[::max(1, len(tenth) // 16)][:16], order[len(tenth)::len(order) // 16][:8]):
    for k in some.split(8):
        row = []
        for j in k.tolist():
            image = faces.__getitems__([chosen[j]])[0][0].clone()
            for x, y in (faces.size * points[j]).long().clamp(1, faces.size - 2).tolist():
                image[:, y - 1:y + 1, x - 1:x + 1] = torch.tensor([0, 255, 0])[:, None, None]
            row.append((image, f"{mean[j]:.1f}"))
        rows.append(row)
contact_sheet("landmarks.jpg", rows, side=faces.size)
