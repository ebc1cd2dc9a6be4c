"""The networks and the losses of VIGFace (ICCV 2025, arXiv 2403.08277), which the four scripts share.

They stand in the order of the stages. Stage 1: the recogniser, prototypes, margin losses and virtual
embeddings. Stage 2: the Diffusion Transformer, its losses and the sampler. Saving and loading come last.
A comment that begins with `paper:` marks where the code departs from the paper, or had to choose.

Shapes: B batch, S image side in pixels, C channels, N tokens, D embedding width, n real and k virtual people,
I people of a set, M its images, P its pairs. Networks see RGB images (B, 3, S, S) in [-1, 1]. Landmarks are
(B, 5, 2), x and y in [0, 1] of the image: left eye, right eye, nose, left and right mouth corner, as the
viewer sees left and right.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

# torchrun starts WORLD processes, each with a RANK, and a LOCAL_RANK on its machine.
RANK, WORLD = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
PROCESS = os.urandom(4).hex()                               # a name of its own, on any machine
GPU = int(os.environ.get("LOCAL_RANK") or 0) % max(1, torch.cuda.device_count())    # ranks may share one
DEVICE = torch.device(f"cuda:{GPU}" if torch.cuda.is_available() else "cpu")

torch.backends.cuda.enable_flash_sdp(DEVICE.type == "cuda")     # on CPUs its bf16 backward pass is slow
torch.set_float32_matmul_precision("high")          # TF32: the margin loss of 120,000 people is twice as fast

# ---------------------------------------------------------------------------------------------- small helpers

def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    tqdm.write(f"error: {' '.join(message.split())}", sys.stderr)       # keeps clear of progress bars
    raise SystemExit(2)


def positive(text):
    """The type of a flag that is a number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return int(text)


def refuse_inside(out, folders):
    """Ends the program if `out` lies in one of the folders: what is written there would become faces."""
    for folder in folders:
        if Path(folder).resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
            fail(f"--out {out}: lies in {folder}, and what is written there would become faces; name another")


@contextlib.contextmanager
def reading(path, expected):
    """Ends the program with one line if the block cannot make sense of the file at `path`."""
    try:
        yield
    except FileNotFoundError:
        fail(f"{path}: no such file; expected {expected}")
    except Exception as error:
        from tools.inputs import system_failed, why
        if system_failed(error):
            raise                                           # `run` reports it
        fail(f"{path}: expected {expected}; {why(path, error)}")


def to_float(images):
    """Turns stored images, uint8 (B, 3, S, S), into what networks see: (x - 127.5) / 127.5, in [-1, 1]."""
    return (images.float() - 127.5) / 127.5


def to_uint8(images):
    """Turns images of networks, in [-1, 1], back into uint8; the inverse of `to_float`."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def autocast():
    """bf16 autocast where bf16 is fast: on GPUs since Ampere and CPUs with AVX512-BF16 or AMX."""
    if DEVICE.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=fast)


def compiled(module, seen):
    """torch.compile's version of a module, if the module will see 200,000 images or more."""
    if seen >= 200_000:                                     # compiling takes a minute or two
        try:
            torch.compile(torch.sin)(torch.ones(8, device=DEVICE))      # fails here, not in mid-training
            return torch.compile(module)
        except Exception as error:
            print(f"torch.compile does not work here ({type(error).__name__}): running without it, slower")
    return module


# -------------------------------------------------------------- the recogniser: IR-SE50, images -> embeddings

# A convolution and its batch norm, as a Sequential of two. `*conv(...)` puts these two into a longer one.
conv = partial(Conv2dNormActivation, activation_layer=None)


class SqueezeExcite(nn.Module):
    """Channel gates from globally pooled features (Hu et al. 2018), reduction 16."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x):                                               # (B, C, H, W)
        pooled = x.mean((2, 3), keepdim=True)                           # (B, C, 1, 1)
        return x * self.fc2(F.relu(self.fc1(pooled))).sigmoid()


class ResidualUnit(nn.Module):
    """ArcFace's improved residual unit: BN-conv-BN-PReLU-conv(stride)-BN(-SE) beside a shortcut."""

    def __init__(self, c_in, c_out, stride, se):
        super().__init__()
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(c_in),
            *conv(c_in, c_out),
            nn.PReLU(c_out),
            *conv(c_out, c_out, stride=stride))
        if se:
            self.res_layer.add_module("se_block", SqueezeExcite(c_out))

        if c_in == c_out:
            self.shortcut_layer = nn.MaxPool2d(1, stride)               # takes every stride-th pixel
        else:
            self.shortcut_layer = conv(c_in, c_out, 1, stride)

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Recogniser(nn.Module):
    """f: images (B, 3, S, S) -> embeddings (B, D). The default is IR-SE50.

    Its tensors are named as in AdaFace's files, so that published weights load. Published networks differ in
    `units`, the residual units of each stage; some lack `se`, the channel gates; some were trained on `bgr`
    images. S must be a multiple of 16.
    """

    def __init__(self, size=112, dim=512, width=64, units=(3, 4, 14, 3), dropout=0.4, se=True, bgr=False):
        super().__init__()
        self.config = dict(size=size, dim=dim, width=width, units=units, dropout=dropout, se=se, bgr=bgr)
        self.bgr = bgr
        self.input_layer = nn.Sequential(*conv(3, width), nn.PReLU(width))

        body, c_in = [], width
        for stage, count in enumerate(units):
            c_out = width * 2 ** stage
            for unit in range(count):
                stride = 2 if unit == 0 else 1                          # each stage halves the image
                body.append(ResidualUnit(c_in, c_out, stride, se))
                c_in = c_out
        self.body = nn.Sequential(*body)

        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(c_in),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(c_in * (size // 16) ** 2, dim),
            nn.BatchNorm1d(dim, affine=False))

        for parameter in self.parameters():
            if parameter.ndim > 1:                                      # convolutions and the linear layer
                nn.init.kaiming_normal_(parameter)

    def forward(self, x):                                               # (B, 3, S, S), RGB
        if self.bgr:
            x = x.flip(1)
        x = self.input_layer(x)                                         # (B, width, S, S)
        x = self.body(x)                                                # (B, 8 width, S/16, S/16)
        return self.output_layer(x)                                     # (B, D)


# Networks by name, and how fr_train.py trains them: epochs, images a step, scale of the margin loss. At scale
# 64, as published, a small network cannot keep the margin.
RECOGNISERS = {
    "tiny": dict(epochs=6, batch=128, scale=32.0,
                 net=dict(dim=64, width=16, units=(1, 2, 2, 1), dropout=0.0)),
    "small": dict(epochs=6, batch=128, scale=32.0,
                  net=dict(dim=256, width=32, units=(1, 2, 2, 1), dropout=0.0)),
    "ir_se50": dict(epochs=26, batch=512, scale=64.0, net=dict())}


@torch.no_grad()
def embed(backbone, images, batch=256, unit=True, exact=False):
    """Embeddings (M, D) of uint8 images (M, 3, S, S): f(x) + f(mirrored x), as the field tests.

    `unit` gives them length 1. `exact` turns bf16 off, so that accuracies compare with published ones.
    """
    embeddings = []
    with contextlib.nullcontext() if exact else autocast():
        for chunk in images.split(batch):
            x = to_float(chunk.to(DEVICE))
            embeddings.append((backbone(x) + backbone(x.flip(3))).float())
    f = torch.cat(embeddings)                                           # (M, D)
    if not f.isfinite().all():
        fail(f"the recogniser gives NaN for some of {len(f)} images: train it again, or name another")
    return F.normalize(f) if unit else f


# -------------------------------------------------------------- prototypes and margin loss (VIGFace, stage 1)

class Prototypes(nn.Module):
    """The class prototypes of n real and k virtual people, and what stage 1 measures of embeddings."""

    def __init__(self, n, k, dim, paper=False):
        super().__init__()
        self.config = dict(n=n, k=k, dim=dim, paper=paper)
        self.paper = paper                                              # as published; see vigface_loss, too
        self.real = nn.Parameter(torch.randn(n, dim) * 0.01)
        self.virtual = nn.Parameter(torch.randn(k, dim) * 0.01)
        self.certainty = nn.Linear(dim, 1)                              # see `certainty_loss`
        self.register_buffer("settled", torch.zeros(k, dim))            # virtual ones for stage 2
        self.register_buffer("sigma2", torch.zeros(dim))                # mean (f - w)^2, for unit f and w
        self.register_buffer("norm_mean", torch.tensor(20.0))           # AdaFace: mean and standard deviation
        self.register_buffer("norm_std", torch.tensor(100.0))           # of norms, with its initial values

    def unit(self):
        """Unit prototypes as the margin loss sees them: (n + k, D), real ones first.

        paper: virtual prototypes are free vectors; here they are multiplied by M, the second moment of the
        real ones, because free vectors also point where no face lies. For random vectors the root of M would
        do. M is stronger, because the loss pushes virtual prototypes away from the real ones
        (docs/measurements.md, "Where should virtual prototypes lie").
        """
        real, virtual = F.normalize(self.real), F.normalize(self.virtual)
        if not self.paper:
            moment = (real.mT @ real).detach()
            virtual = F.normalize(virtual @ moment)
        return torch.cat([real, virtual])

    @torch.no_grad()
    def settle(self, people_moment):
        """Places the virtual prototypes for stage 2, once training is done: they get the spread of people.

        Whitening makes their second moment the unit matrix. The root of `people_moment` (D, D), see
        `person_moment`, then makes it that one. The moment of the real prototypes would not do: a prototype
        that was learned from few images holds chance features of these, and drawn people would differ in them
        (docs/measurements.md, "Where should virtual prototypes lie").
        """
        virtual = F.normalize(self.virtual)
        whitened = virtual @ power(virtual.mT @ virtual / len(virtual), -0.5)
        self.settled.copy_(F.normalize(whitened @ power(people_moment, 0.5)))

    def to_draw(self):
        """Unit prototypes as stages 2 and 3 use them: (n + k, D), real ones first.

        paper: virtual ones as trained; here settled, because the loss has moved them away from people.
        """
        virtual = F.normalize(self.virtual) if self.paper else self.settled
        return torch.cat([F.normalize(self.real), virtual])


def class_sums(f, labels):
    """The sum (I, D) and the number (I,) of the embeddings (M, D) of each class."""
    count = torch.bincount(labels)
    sums = torch.zeros(len(count), f.shape[1], device=f.device)
    for some, label in zip(f.split(2 ** 16), labels.split(2 ** 16)):    # f may be in half precision
        sums.index_add_(0, label, some.float())
    return sums, count


def person_moment(backbone, faces):
    """How people differ: the second moment (D, D), scaled to trace 1, of what a person's images share.

    It is the mean of f_i f_j^T over pairs i != j of a person's images, which share the person only. The sum
    over these pairs is that over all pairs, s s^T with s the sum of f_i, less that of f_i f_i^T. A pass over
    `faces` adds these up; nothing is kept of an image.
    """
    labels, dim = faces.labels.to(DEVICE), backbone.config["dim"]
    count = torch.bincount(labels)
    weight = (count > 1) / (count * (count - 1)).clamp(min=1)           # one image is no pair
    sums = torch.zeros(len(count), dim, device=DEVICE)
    rest = torch.zeros(dim, dim, device=DEVICE)
    for images, i in faces.scan(torch.arange(len(labels)), "embedding"):
        f, label = embed(backbone, images), labels[i.to(DEVICE)]
        sums.index_add_(0, label, f)
        # 1e-3 decides if everybody has one image: the weights are zero then.
        rest += (f * (1e-3 / len(labels) - weight[label])[:, None]).mT @ f
    moment = (sums * weight[:, None]).mT @ sums + rest
    return moment / moment.trace()


def power(moment, exponent):
    """A second moment (D, D) to a power, in double precision; its eigenvalues are kept above 1e-6."""
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * values.clamp(min=1e-6) ** exponent @ vectors.mT).float()


def arcface(cos, labels, quality=None, margin=0.5, scale=64.0):
    """ArcFace logits (B, classes): s cos(theta + m) at the label, s cos(theta) elsewhere (ArcFace, eq. 3).

    Where theta + m > pi the cosine would rise again; there it is s (cos(theta) - m sin(m)). `quality` counts
    in `adaface` only.
    """
    target = cos.gather(1, labels[:, None])                                     # (B, 1)
    sin = (1 - target ** 2).clamp(min=1e-9).sqrt()
    pushed = target * math.cos(margin) - sin * math.sin(margin)                 # cos(theta + m)
    pushed = torch.where(target > -math.cos(margin), pushed, target - margin * math.sin(margin))
    return scale * cos.scatter(1, labels[:, None], pushed)


def adaface(cos, labels, quality, margin=0.4, scale=64.0, eps=1e-3):
    """AdaFace logits (B, classes): s (cos(theta - m q) - m - m q) at the label (Kim et al. 2022).

    q (B, 1) is the image's `norm_quality`: at -1 this is ArcFace, at 0 CosFace.
    """
    cos = cos.clamp(eps - 1, 1 - eps)
    theta = cos.gather(1, labels[:, None]).acos() - margin * quality            # (B, 1)
    target = theta.clamp(eps, math.pi - eps).cos() - margin - margin * quality
    return scale * cos.scatter(1, labels[:, None], target)


MARGINS = {"arcface": (arcface, 0.5), "adaface": (adaface, 0.4)}


def norm_quality(f, prototypes, h=0.333, t_alpha=0.01):
    """AdaFace's image quality (B, 1) in [-1, 1]: the norm of f (B, D) against its averages, updated here."""
    with torch.no_grad():
        norm = f.norm(dim=1, keepdim=True).clamp(1e-3, 100)
        prototypes.norm_mean.lerp_(norm.mean(), t_alpha)
        prototypes.norm_std.lerp_(norm.std(), t_alpha)
        return ((norm - prototypes.norm_mean) / (prototypes.norm_std + 1e-3) * h).clamp(-1, 1)


def certainty_loss(f, cos, labels, prototypes):
    """Trains `certainty` to tell how clearly an image f (B, D) is of its person; cos (B, n) is to all people.

    Its target is own cosine / (nearest other cosine + 1 + eps) (CR-FIQA). evaluate.py alone uses it.
    """
    with torch.no_grad():
        other = cos.scatter(1, labels[:, None], -2).amax(1, keepdim=True)
        target = cos.gather(1, labels[:, None]) / (other + 1 + 1e-9)            # (B, 1)
    return F.smooth_l1_loss(prototypes.certainty(f.detach()), target, beta=0.5)


def virtual_batch_size(step, k, b_real, n):
    """b_v of one step: k b_r / n (paper), rounded so that the sum over all steps is exact."""
    return (step + 1) * k * b_real // n - step * k * b_real // n


def around(w, noise, sigma2, paper=False):
    """Virtual embeddings (B, D), of unit length, around prototypes w: w + noise sigma, normalised.

    paper: sigma^2 is the mean of (f - w)^2; here it is scaled, because normalising brings w + noise sigma
    back towards w. The cosine to w becomes about 1 / sqrt(1 + sum sigma^2). It should be the mean cosine of
    real embeddings to their prototypes.
    """
    if not paper:
        spread = sigma2.sum().clamp(min=1e-9)
        cosine = (1 - spread / 2).clamp(min=0.1)            # of real ones, since |f - w|^2 = 2 - 2 cosine
        wanted = 1 / cosine ** 2 - 1                        # what sum sigma^2 must be for this cosine
        sigma2 = sigma2 * wanted / spread
    return F.normalize(w + sigma2.sqrt() * noise)


def vigface_loss(f, labels, prototypes, b_virtual, head="arcface", ramp=1.0, scale=64.0, at_once=2 ** 25):
    """Three losses: of real embeddings f (B, D), of b_virtual virtual embeddings, and of `certainty`.

    For real embeddings, virtual prototypes are wrong classes. Virtual embeddings (`around`) train the virtual
    prototypes only. `ramp`, from 0 to 1, scales the margin. `at_once` bounds the memory: the number of cosines
    of virtual embeddings.

    paper: whether f and w are normalised is unstated; here they are, because the margin acts on the sphere.
    paper: one mean over both batches; here both sums are divided by the number of real embeddings, because
    more virtual people would otherwise shrink the backbone's gradient.
    """
    margin_logits, margin = MARGINS[head]
    divisor = len(f) + (b_virtual if prototypes.paper else 0)

    def margin_loss(cos, labels, quality):
        logits = margin_logits(cos, labels, quality, ramp * margin, scale)
        return F.cross_entropy(logits, labels, reduction="sum") / divisor

    with torch.autocast(f.device.type, enabled=False):
        f = f.float()
        n, k = len(prototypes.real), len(prototypes.virtual)
        direction = F.normalize(f, eps=0.01)            # eps bounds the gradient when the norm is near zero
        W = prototypes.unit()                                                   # (n + k, D)
        with torch.no_grad():                           # a running average, at the paper's rate
            prototypes.sigma2.lerp_((direction - W[labels]).square().mean(0), 0.1)

        cos = direction @ W.mT                                                  # (B, n + k)
        real_loss = margin_loss(cos, labels, norm_quality(f, prototypes))
        certain_loss = certainty_loss(f, cos[:, :n], labels, prototypes)

        # W[chosen] is not detached: virtual embeddings move with their prototype, and so train it. Real
        # prototypes are detached: people who exist do not make way.
        chosen = n + torch.randint(max(1, k), (b_virtual,), device=f.device)    # b_virtual is 0 if k is
        virtual_f = around(W[chosen], torch.randn_like(W[chosen]), prototypes.sigma2, prototypes.paper)
        fixed = torch.cat([W[:n].detach(), W[n:]]).mT                           # (D, n + k)

        # Quality 0 is the average: there is no norm to judge.
        part_loss = lambda f, labels: margin_loss(f @ fixed, labels, 0.0)
        # In parts, whose cosines are computed once more in the backward pass. Together those of 120,000 virtual
        # people would take 20 GB.
        rows = at_once // (n + k) + 1
        parts = zip(virtual_f.split(rows), chosen.split(rows))
        virtual_loss = sum(checkpoint(part_loss, *part, use_reentrant=False) for part in parts)
    return real_loss, virtual_loss, certain_loss


# ------------------------------------------------------------------------- diffusion: conventions (stage 2)
#
#   x_t = a x + s e,   v = a e - s x,   so   x = a x_t - s v,   e = s x_t + a v,   v = (a x_t - x) / s,
#   a = cos(pi t / 2), s = sin(pi t / 2):  t = 0 is the image x, t = 1 is noise e.

def signal_noise(t):
    """a and s of time t (B,), shaped (B, 1, 1, 1)."""
    angle = (t * math.pi / 2).view(-1, 1, 1, 1)
    return angle.cos(), angle.sin()


# ------------------------------------------------------------------------ the Diffusion Transformer (stage 2)

def landmark_image(landmarks, size):
    """Soft dots on black (B, 3, S, S): eyes red, nose green, mouth corners blue (the paper's figure)."""
    grid = (torch.arange(size, device=landmarks.device) + 0.5) / size
    dx, dy = (grid - landmarks[..., None]).unbind(2)                            # (B, 5, S) each
    squared = dx[:, :, None, :] ** 2 + dy[:, :, :, None] ** 2                   # (B, 5, S, S)
    dots = torch.exp(-squared / (2 * 0.025 ** 2))
    return torch.stack([dots[:, 0:2].amax(1), dots[:, 2], dots[:, 3:5].amax(1)], 1)


def sinusoids(x, width, longest=10_000):
    """Sines and cosines (..., width) of x (...) at frequencies from 1 down to 1 / longest."""
    frequencies = torch.exp(-math.log(longest) * torch.arange(width // 2, device=x.device) / (width // 2))
    angles = x[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulated(x, shift, scale):
    """Layer norm of x (B, N, C) whose gain and offset (B, 1, C) come from the condition (adaLN)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def zeroed(layer):
    """`layer` with its parameters set to zero, so that at first it changes nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class DiTBlock(nn.Module):
    """Self-attention and MLP, shifted, scaled, gated by the condition; at first the identity (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x, c):                                                    # (B, N, C), (B, C)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)    # (B, 1, C)
        h = self.qkv(modulated(x, shift1, scale1))                              # (B, N, 3 C)
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # (B, heads, N, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)                             # (B, heads, N, C/heads)
        x = x + gate1 * self.out(h.transpose(1, 2).flatten(2))                  # (B, N, C)
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))


class DiT(nn.Module):
    """v(x_t, t, w, landmarks): the DiT of Peebles & Xie in pixel space, told who (w) and which pose.

    Time, prototype and landmarks add up to the adaLN condition. The landmark image also joins the noisy image
    as input channels, which makes the pose exact in space. w = 0 stands for nobody in particular.

    paper: what the network predicts is unstated; here its output is x0, which `forward` turns into v, because
    a token is too narrow for the noise of a wide patch (as in "Back to Basics: Let Denoising Generative Models
    Denoise", Li & He 2025). At the end two convolutions see tokens and input, because patches alone leave
    seams.
    """

    FEATURES = 16                                                   # of each pixel, before the convolutions

    def __init__(self, size=112, dim=512, patch=8, width=768, depth=12, heads=12):
        super().__init__()
        self.config = dict(size=size, dim=dim, patch=patch, width=width, depth=depth, heads=heads)
        self.size, self.dim, self.patch = size, dim, patch

        self.patch_in = nn.Linear(6 * patch ** 2, width)            # noisy image and landmark image
        grid = torch.arange(size // patch)
        places = torch.cartesian_prod(grid, grid)                   # (N, 2): row, column
        self.register_buffer("position", sinusoids(places, width // 2).flatten(1))      # (N, C)

        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.identity = nn.Linear(dim, width)
        self.pose = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width))

        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.patch_out = nn.Linear(width, self.FEATURES * patch ** 2)
        self.pixels = nn.Sequential(
            nn.Conv2d(self.FEATURES + 6, 32, 3, padding=1),
            nn.SiLU(),
            zeroed(nn.Conv2d(32, 3, 3, padding=1)))

    def forward(self, x_t, t, w, landmarks):                        # (B, 3, S, S), (B,), (B, D), (B, 5, 2)
        c = self.time(sinusoids(1000 * t, 256))                     # (B, C)
        c = c + self.identity(w * self.dim ** 0.5)                  # numbers of about 1, not 1 / sqrt(D)
        c = c + self.pose(4 * landmarks.flatten(1) - 2)             # [0, 1] becomes [-2, 2]
        c = F.silu(c)

        image = torch.cat([x_t, landmark_image(landmarks, self.size)], 1)               # (B, 6, S, S)
        x = F.pixel_unshuffle(image, self.patch).flatten(2).mT      # (B, N, 6 patch^2)
        x = self.patch_in(x) + self.position                        # (B, N, C)
        for block in self.blocks:
            x = block(x, c)
        x = modulated(x, *self.modulation(c)[:, None].chunk(2, -1))

        x = self.patch_out(x).mT                                    # (B, FEATURES patch^2, N)
        x = x.unflatten(2, (self.size // self.patch, -1))           # (B, FEATURES patch^2, rows, columns)
        x = F.pixel_shuffle(x, self.patch)                          # (B, FEATURES, S, S)
        x0 = self.pixels(torch.cat([x, image], 1))                  # (B, 3, S, S)

        # v = (a x_t - x0) / s. Where s < 0.05, the clamp keeps an error of x0 from becoming a huge one of v.
        a, s = signal_noise(t)
        return (a * x_t - x0) / s.clamp(min=0.05)


DIT_SIZES = {
    "Ti": dict(width=192, depth=6, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16)}

# How dit_train.py trains them. paper: not given; here only Ti's is tuned, because larger ones need a GPU.
DIT_RECIPES = {"Ti": dict(steps=1100, batch=32, lr=2e-3)}
DIT_RECIPES |= dict.fromkeys(("S", "B", "L"), dict(steps=200_000, batch=256, lr=2e-4))


# --------------------------------------------------------------- the objective of stage 2, and the sampler

def dit_loss(dit, backbone, x, w, landmarks, drop=0.1, paper=False):
    """Stage 2's two losses on images x (B, 3, S, S) of prototypes w (B, D): MSE of v, and identity.

    paper: the identity loss pulls the drawn face x0 towards its prototype; here towards f(x), the embedding
    of this image, because faces pulled towards a prototype lose the variety that a recogniser learns from.
    """
    t = torch.randn(len(x), device=x.device).sigmoid()                  # logit-normal (Esser et al. 2024)
    a, s = signal_noise(t)
    noise = torch.randn_like(x)
    x_t = a * x + s * noise
    v = a * noise - s * x

    # w = 0 is nobody, for guidance. The identity loss applies then, too: x_t still shows who it is.
    keep = torch.rand(len(x), 1, device=x.device) >= drop
    v_hat = dit(x_t, t, w * keep, landmarks).float()
    x0 = a * x_t - s * v_hat

    f_hat = F.normalize(backbone(x0).float())
    with torch.no_grad():
        wanted = w if paper else F.normalize(backbone(x).float())
    # Weighted by a^2, because near t = 1 x0 is an average face.
    identity = ((f_hat - wanted).square().sum(1) * a.flatten() ** 2).mean()
    return F.mse_loss(v_hat, v), identity


def guided(dit, w, landmarks, guidance=1.0):
    """A function (x_t, t) -> x0, in [-1, 1], by classifier-free guidance: v = v(0) + g (v(w) - v(0))."""
    def denoise(x, t):                                                          # (B, 3, S, S), float
        times = torch.full((len(x),), t, device=x.device)
        a, s = signal_noise(times)
        v = dit(x, times, w, landmarks).float()
        if guidance != 1:
            nobody = dit(x, times, torch.zeros_like(w), landmarks).float()
            v = nobody + guidance * (v - nobody)
        return (a * x - s * v).clamp(-1, 1)
    return denoise


def dpm_solver(denoise, x, steps):
    """DPM-Solver++(2M) (Lu et al. 2022): turns noise x (B, ...) at t = 1 into images, in `steps` calls of
    `denoise`.

    Times are even in l = log(a / s), half the log-SNR. Second order: x0 is extrapolated from the last two
    estimates to the middle of the step. For even steps that is 1.5 times the new one less half the old one.
    """
    # From l = -4, almost noise, to 4, almost an image. With ten steps even in t instead, pictures varied half
    # as much in brightness and in fine detail. Beyond l = 3 the clamp in DiT.forward lets the last x0 keep a
    # part of x. To end at 3 instead loses fine detail, because x0 is the mean of all images that x may be.
    log_snr = torch.linspace(-4, 4, steps - 1).double()
    angles = [math.pi / 2, *torch.exp(-log_snr).atan().tolist()]        # pi t / 2; its tangent is s / a
    previous = None
    for angle, next_angle in zip(angles, angles[1:]):
        x0 = denoise(x, angle * 2 / math.pi)
        estimate = x0 if previous is None else 1.5 * x0 - 0.5 * previous
        # x' = s' / s x + (a' - a s' / s) x0, with ' at the next time; s a' - a s' is the sine of a difference
        x = (math.sin(next_angle) * x + math.sin(angle - next_angle) * estimate) / math.sin(angle)
        previous = x0 if angle < math.pi / 2 else None      # not from the first step, of infinite length
    return denoise(x, angles[-1] * 2 / math.pi)


# ---------------------------------------------------------------------------------------------- save and load

def run(main, less="or begin anew with a smaller --batch and another --out"):
    """Runs a script. Whatever stops it from outside becomes one line, and the same command continues it.

    `less` says how this script needs less memory.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # a notebook's have not
            stream.reconfigure(errors="backslashreplace")   # folder names may not be UTF-8
    try:
        main()
    except KeyboardInterrupt:
        tqdm.write("interrupted; the same command continues from what is saved", sys.stderr)
        raise SystemExit(130)
    except ModuleNotFoundError as error:
        if not f"{error.name}.".startswith("tools."):
            raise
        fail(f"this input needs {error.name}, which is not here; copy the folder tools/ beside the scripts")
    except (OSError, MemoryError, RuntimeError) as error:
        from tools.inputs import why_stopped
        if not (reason := why_stopped(error, less)):
            raise                                           # a mistake in the code
        fail(f"{reason}; put it right and give the same command again, which continues from what is saved")


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path. What the block writes there becomes `path`, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{PROCESS}.tmp")       # two processes may write the same file
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # a full disk, as Python and PyTorch report it
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error})") from error


def save_model(folder, stage, config, tensors, **meta):
    """Writes {part: {name: tensor}} to folder/model.safetensors, with what later stages must know as JSON."""
    flat = {f"{part}.{name}": tensor.detach().cpu().contiguous()
            for part, named in tensors.items() for name, tensor in named.items()}
    metadata = {"vigface": json.dumps(dict(stage=stage, config=config, **meta))}
    path = Path(folder) / "model.safetensors"
    if path.is_file():
        fail(f"{path}: another process has saved it since this one began; name another --out")
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(flat, metadata))


def load_model(folder, stage):
    """Tensors and metadata of folder/model.safetensors; ends the program unless it is of this stage."""
    path = Path(folder) / "model.safetensors"
    with reading(path, f"a finished run of {stage}_train.py"), safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = {"names": []} | json.loads(file.metadata()["vigface"]) | {"sha256": digest(folder)}
        if meta["stage"] != stage:
            raise ValueError(f"it is from {meta['stage']}_train.py")
        # The file may be somebody else's: no huge network, and no path outside of the folder of a set.
        if meta["config"].get("depth", 0) + sum(meta["config"].get("units", ())) > len(tensors):
            raise ValueError("it describes more layers than it holds")
        if any(name in ("", ".", "..") or {"/", "\0"} & {*name} for name in meta["names"]):
            raise ValueError("it has a person's name that cannot name a folder")
    return tensors, meta


def digest(folder):
    """The sha256 of folder/model.safetensors, by which a later stage knows an earlier one."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def build(module, tensors, prefix, path, arguments={}):
    """A frozen module(**arguments) with the tensors named `prefix`...; ends the program if they misfit."""
    with reading(path, f"the weights of a {module.__name__}"):
        with torch.device("meta"):
            net = module(**arguments)
        state = {name.removeprefix(f"{prefix}."): tensor
                 for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
        net.load_state_dict(state, assign=True)
    return net.requires_grad_(False).eval()


def load_recogniser(path, bgr=None):
    """Backbone and prototypes, frozen, on DEVICE, and metadata, of a run folder or of published weights."""
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    with reading(file, "a finished run of fr_train.py, or published weights (--fr)"):
        ours = b'"vigface"' in file.open("rb").read(64)                 # `save_model` writes it first
    if ours:
        tensors, meta = load_model(file.parent, "fr")
    else:
        from tools.published import load_published
        tensors, meta = load_published(file, bgr)
    backbone = build(Recogniser, tensors, "backbone", path, meta["config"])
    prototypes = build(Prototypes, tensors, "prototypes", path, meta.get("prototypes", {}))
    return backbone.to(DEVICE, memory_format=torch.channels_last), prototypes.to(DEVICE), meta


def claim(out, stage, args, faces, **others):
    """Makes `out` the folder of a run and keeps its settings in run.json; ends the program if they differ.

    Settings are what must stay: flags, but for those that `others` replaces. They hold no paths: models are
    known by `digest`, faces by theirs. `out` may not lie among the faces.
    """
    refuse_inside(out, faces.roots)
    settings = {"stage": stage} | vars(args) | {"out": None, "data": faces.digest()} | others
    path = Path(out) / "run.json"
    if path.is_file():
        with reading(path, "the settings of a run"):
            before = dict(json.loads(path.read_text()))
        for key, value in settings.items():
            if before.get(key) != value:
                fail(f"{path}: started with {key} = {before.get(key)}, now {value}; set it back, or name "
                     "another --out: a longer or a larger run is a new one")
        if (path.parent / "model.safetensors").is_file():
            print(f"{out}: its training is finished; another one needs another --out")
            raise SystemExit(0)
    elif path.parent.is_dir() and any(not entry.name.startswith(".run") for entry in path.parent.iterdir()):
        fail(f"--out {out}: a folder of something else; name one that is empty or not there yet")
    with replacing(path) as temporary:                      # again: whether --out can be written
        temporary.write_text(json.dumps(settings, indent=1))


def save_state(out, step, modules):
    """Writes what a killed run continues from: the step, and the state of {name: module or optimizer}."""
    state = {name: module.state_dict() for name, module in modules.items()}
    with replacing(Path(out) / "state.pt") as temporary:
        torch.save(state | {"step": step}, temporary)


def resume(out, modules):
    """Loads the modules that a killed run saved, if any, and returns its step."""
    path = Path(out) / "state.pt"
    if not path.is_file():
        return 0
    with reading(path, "the state of a run (delete it to start over)"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        step = int(state["step"])
    print(f"continuing {out} after step {step}")
    return step


# ------------------------------------------------------------------------- a run that is stopped, or has ranks

def until_stopped(items, save, title=None, first=0, steps=None):
    """Yields steps, counted from `first`, and items, under a progress bar if there is a title.

    Ctrl-C or SIGTERM ends the program after the step that is running, on all ranks, once rank 0 has called
    save(number of steps done). A second signal ends it at once.
    """
    asked = torch.zeros((), dtype=torch.int)

    def stop(number, _):
        if asked:
            raise SystemExit(128 + number)
        asked.fill_(number)

    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    progress = tqdm(items, title, steps, leave=False, initial=first, disable=RANK > 0 or not title)
    try:
        for step, item in enumerate(progress, first):
            yield step, item
            if over_ranks(asked.clone()):
                if RANK == 0:
                    save(step + 1)
                    tqdm.write("stopped; the same command continues", sys.stderr)
                raise SystemExit(128 + (int(asked) or signal.SIGTERM))
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def shared(module):
    """A module that several ranks train: each on its part of the batch, with the mean of their gradients."""
    if WORLD == 1:
        return module
    distributed.init_process_group()
    return nn.parallel.DistributedDataParallel(module)


def over_ranks(x):
    """The sum of a tensor over the ranks that train together."""
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x


def log(out, line):
    """Prints a line of training and adds it to out/log.txt: a lost terminal loses nothing."""
    tqdm.write(line)
    with open(Path(out) / "log.txt", "a") as file:
        print(line, file=file)


def stop_unless_finite(losses, step, out):
    """Mean losses, a tensor, as floats; ends the run if one is not finite. Its last checkpoint stays."""
    if not losses.isfinite().all():
        fail(f"{out}: the loss is {losses.tolist()} at step {step}; the last checkpoint is kept; start again "
             "with a lower --lr and another --out")
    return losses.tolist()
