"""RetinaFace, a face detector, and the landmarks that it finds.

dit_train.py asks it for the landmarks that a training set lacks, evaluate.py whether a set is aligned;
tools/align.py cuts photographs by it.
"""
import socket
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, nms

from data import TEMPLATE
from model import DEVICE, autocast, build, conv, fail, reading, replacing
from tools.published import read_published

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
    """Face detector (Deng et al. 2020) on MobileNet-0.25, with the keys of Pytorch_Retinaface's weights."""

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
        """Scores (B, A), boxes (B, A, 4), points (B, A, 5, 2), in pixels, of images uint8 (B, 3, H, W)."""
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
        print(f"fetching {WEIGHTS_URL} (1.8 MB)", flush=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)                # a network may accept and never answer
        try:
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256)
        except Exception as error:
            fail(f"{WEIGHTS_URL}: cannot be fetched ({error}); put it at {path}, or name it with --weights")
        finally:
            socket.setdefaulttimeout(before)
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
    """Fills in the landmarks that `faces` lack, one or more; what is found is kept in folder/landmarks.pt."""
    missing = faces.landmarks[:, 0, 0].isnan().nonzero()[:, 0]
    path, digest = Path(folder) / "landmarks.pt", faces.digest()
    kept = {}
    if path.is_file():
        with reading(path, "landmarks that this script found (delete it)"):
            kept = torch.load(path, weights_only=True)
    if kept.get("faces") != digest or not torch.equal(kept["missing"], missing):
        detector = load_detector(weights, folder)
        scan = faces.scan(missing, "landmarks")
        found = [crop_landmarks(detector, images.to(DEVICE)) for images, _ in scan]
        kept = {"faces": digest, "missing": missing, "landmarks": torch.cat(found)}
        with replacing(path) as temporary:
            torch.save(kept, temporary)
    faces.landmarks[missing] = kept["landmarks"]
    lost = faces.landmarks[:, 0, 0].isnan()
    faces.landmarks[lost] = TEMPLATE
    count = len(missing) - lost.sum()
    print(f"landmarks: found in {count} of {len(missing)} images, the template's for others")


def similarity(source, target):
    """Complex scale and shift (..., 1) that carry points (..., 5, 2) to others, by least squares."""
    source, target = (torch.view_as_complex(points.contiguous()) for points in (source, target))
    s, t = (z - z.mean(-1, keepdim=True) for z in (source, target))
    scale = (s.conj() * t).sum(-1, keepdim=True) / (s.abs() ** 2).sum(-1, keepdim=True)
    return scale, target.mean(-1, keepdim=True) - scale * source.mean(-1, keepdim=True)


def weights_at_hand():
    """The weights that dit_train.py has fetched into a folder of runs/, or None."""
    return next(Path("runs").glob("*/" + WEIGHTS_URL.split("/")[-1]), None)


def misaligned(faces, weights):
    """The share of `faces`, of 300 at most, that are not aligned, as a detector with these weights sees them.

    Aligned crops were made by a similarity that carries landmarks to the template. So in whatever pose a head
    is, a second one finds nothing to change. Of train112's images 0.7 % are called misaligned, of CFP's, half
    of them profiles, 17 %; zoomed by 0.75 or 1.3, or turned by 20 degrees, 83 % and more.
    """
    detector = load_detector(weights, ".")
    some = torch.linspace(0, len(faces) - 1, min(300, len(faces))).long()
    scan = faces.scan(some, "aligned?")
    points = torch.cat([crop_landmarks(detector, images.to(DEVICE)) for images, _ in scan])
    scale, _ = similarity(TEMPLATE, points)
    moved = (points - TEMPLATE).mean(1).norm(dim=1)
    aligned = ((scale[:, 0] - 1).abs() <= 0.15) & (moved <= 0.06)       # both are NaN where there is no face
    return 1 - aligned.float().mean().item()


def alignment_like(real, weights):
    """A function of `faces`: by how much the share that is not aligned exceeds that of the `real` ones.

    Without weights, named or at hand, it gives None.
    """
    weights = weights or weights_at_hand()
    usual = misaligned(real, weights) if weights else 0
    return lambda faces: misaligned(faces, weights) - usual if weights else None
