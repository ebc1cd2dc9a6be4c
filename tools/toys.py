"""The toy faces of the demo, painted by formulas; tools/inputs.py asks for them when no --data is named.

A toy head is a sphere, seen higher than wide, on which spots are painted one over the other. A place on it
is also its normal: (right, down, ahead), of length 1. Every number of a person and of a picture varies
independently, in [-1, 1], so that toy people differ as widely as virtual people must.
"""
import io
import itertools
import os
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from data import TEMPLATE, write_landmarks
from model import replacing
from tools.align import move, similarity

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


def paint(place, edge, people):
    """Colours (B, 3, P) of places (B, 3, P) on toy people (B, PERSON), whose outlines are `edge` wide."""
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
    """Images (B, 3, S, S) of toy people (B, PERSON) in circumstances (B, PICTURE), and landmarks (B, 5, 2).

    Both are in [0, 1].
    """
    turn, shift, lamp, tint, colour, slope = pictures[..., None].split([2, 10, 3, 3, 3, 6], 1)
    axis = F.pad(turn.mT * torch.tensor([.3, .8]), (0, 1))                  # pitch, yaw, no roll
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
    """Writes an InsightFace .bin of I people, images uint8 (I, P, 3, S, S): in each fold other people.

    Every other of the `pairs` pairs shows one person.
    """
    encoded, same = [], [p % 2 == 1 for p in range(pairs)]
    for p, fold in enumerate(fold for fold in images.tensor_split(10) for _ in range(pairs // 10)):
        (i, j), (a, b) = (torch.randperm(n, generator=generator)[:2] for n in fold.shape[:2])
        for image in (fold[i, a], fold[i if same[p] else j, b]):
            to_pil_image(image).save(file := io.BytesIO(), "PNG")
            encoded.append(file.getvalue())
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps((encoded, same), protocol=4))


def draw_demo(root, people=2000, held_out=200, per_person=8, size=32):
    """Draws the demo: a folder of toy `people` with landmarks.csv, and heldout.bin of `held_out` others."""
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
