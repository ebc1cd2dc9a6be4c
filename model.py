"""Every network and every objective of VIGFace; the five scripts share this one module.

Shapes: B batch, S image side in pixels, D embedding width, n real and k virtual identities, N tokens, C
width. Images inside the networks are RGB in [-1, 1], (B, 3, S, S); landmarks are (B, 5, 2), x and y in [0, 1]
of the image: left eye, right eye, nose, left and right mouth corner (left and right of the image).
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import zipfile
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, nms
from tqdm import tqdm

GPU = int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count())      # ranks may share one
DEVICE = torch.device(f"cuda:{GPU}" if torch.cuda.is_available() else "cpu")
torch.backends.cuda.enable_flash_sdp(DEVICE.type == "cuda")     # on CPUs its bf16 backward is slow
torch.set_float32_matmul_precision("high")      # TF32 on GPUs: the margin loss of 120K people twice as fast

# ---------------------------------------------------------------------------------------------- small helpers

def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    tqdm.write(f"error: {' '.join(message.split())}", sys.stderr)               # not behind a progress bar
    raise SystemExit(2)


def options(doc):
    """A parser that shows a script's docstring as it is written, and what adds a flag to it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser, parser.add_argument


@contextlib.contextmanager
def reading(path, expected):
    """Ends the program with one line if the block fails: a file can break in any way."""
    try:
        yield
    except Exception as error:
        fail(f"{path}: expected {expected}; {type(error).__name__}: {str(error)[:300]}")


def to_float(images):
    """Images as stored, uint8 (B, 3, S, S), to what the networks see: (x - 127.5) / 127.5 in [-1, 1]."""
    return (images.float() - 127.5) / 127.5


def to_uint8(images):
    """Images of the networks, [-1, 1], back to uint8; the inverse of `to_float`."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def autocast(device):
    """bf16 autocast where bf16 is fast: GPUs since Ampere, CPUs with AVX512-BF16 or AMX; fp32 elsewhere."""
    gpu, cpu = torch.cuda.is_bf16_supported, torch.cpu._is_avx512_bf16_supported    # with AMX, too
    return torch.autocast(device.type, torch.bfloat16, enabled=gpu(False) if device.type == "cuda" else cpu())


def compiled(module, device, images):
    """A second, compiled handle of `module`; itself without a compiler, or if it will see few `images`."""
    try:
        if images >= 200_000:                       # it takes a minute or two, on a CPU or a GPU
            torch.compile(torch.sin)(torch.ones(8, device=device))
            return torch.compile(module)
    except Exception as error:
        print(f"torch.compile does not work here ({type(error).__name__}): running without it, slower")
    return module


# -------------------------------------------------------------- the recogniser: IR-SE50, images -> embeddings

conv = partial(Conv2dNormActivation, activation_layer=None)             # a convolution and its batch norm


class SqueezeExcite(nn.Module):
    """Channel gates from globally pooled features (Hu et al. 2018), reduction 16."""
    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x):                                                       # (B, C, H, W)
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()    # by (B, C, 1, 1)


class ResidualUnit(nn.Module):
    """The improved residual unit of ArcFace: BN-conv-BN-PReLU-conv(stride)-BN(-SE) beside a shortcut."""
    def __init__(self, c_in, c_out, stride, se):
        super().__init__()
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(c_in), *conv(c_in, c_out), nn.PReLU(c_out), *conv(c_out, c_out, stride=stride))
        if se:
            self.res_layer.add_module("se_block", SqueezeExcite(c_out))
        self.shortcut_layer = nn.MaxPool2d(1, stride) if c_in == c_out else conv(c_in, c_out, 1, stride)

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Recogniser(nn.Module):
    """f: images (B, 3, S, S) -> embeddings (B, D); IR-SE50, with the keys of published AdaFace weights.

    Those are of R18, R50 and R100: other `units`, no `se`, and trained on `bgr` images."""
    def __init__(self, size=112, dim=512, width=64, units=(3, 4, 14, 3), dropout=0.4, se=True, bgr=False):
        super().__init__()
        self.config = dict(size=size, dim=dim, width=width, units=units, dropout=dropout)
        self.bgr = bgr
        self.input_layer = nn.Sequential(*conv(3, width), nn.PReLU(width))
        widths = [width * 2 ** stage for stage, count in enumerate(units) for _ in range(count)]
        strides = [2 if unit == 0 else 1 for count in units for unit in range(count)]       # first of a stage
        self.body = nn.Sequential(*map(ResidualUnit, [width, *widths], widths, strides, [se] * sum(units)))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.Dropout(dropout), nn.Flatten(),
            nn.Linear(widths[-1] * (size // 16) ** 2, dim), nn.BatchNorm1d(dim, affine=False))
        for weight in (p for p in self.parameters() if p.ndim > 1):     # of convolutions and the linear layer
            nn.init.kaiming_normal_(weight)

    def forward(self, x):                                               # (B, 3, S, S), RGB
        x = self.body(self.input_layer(x.flip(1) if self.bgr else x))   # (B, 8 width, S/16, S/16)
        return self.output_layer(x)                                     # (B, D)


FR_ARCHS = {"tiny": dict(dim=64, width=16, units=(1, 2, 2, 1), dropout=0.0),
            "small": dict(dim=256, width=32, units=(1, 2, 2, 1), dropout=0.0), "ir_se50": dict()}


@torch.no_grad()
def embed(backbone, images, batch=256, unit=True):
    """f(x) + f(flip x) of uint8 images (M, 3, S, S), as the field tests: (M, D), of length 1 or not."""
    chunks = (to_float(chunk.to(DEVICE, non_blocking=True)) for chunk in images.split(batch))
    with autocast(DEVICE):
        f = torch.cat([(backbone(x) + backbone(x.flip(3))).float() for x in chunks])            # (M, D)
    if not f.isfinite().all():
        fail(f"the recogniser gives NaN for some of {len(f)} images: train it again, or name another")
    return F.normalize(f) if unit else f


# -------------------------------------------------------------- prototypes and margin loss (VIGFace, stage 1)

def power(moment, exponent):
    """A second moment (D, D) to a power, in double precision; kept invertible."""
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * values.clamp(min=1e-6) ** exponent @ vectors.mT).float()


class Prototypes(nn.Module):
    """n real and k virtual class prototypes in R^D, what losses know of embeddings, and a quality head."""
    def __init__(self, n, k, dim, free=False):
        super().__init__()
        self.free = free
        self.real = nn.Parameter(torch.randn(n, dim) * 0.01)
        self.virtual = nn.Parameter(torch.randn(k, dim) * 0.01)
        self.quality = nn.Linear(dim, 1)                                # CR-FIQA's head, embedding -> quality
        self.register_buffer("sigma2", torch.zeros(dim))                # spread of real unit embeddings
        self.register_buffer("norm_mean", torch.tensor(20.0))          # AdaFace: norms of real embeddings, as
        self.register_buffer("norm_std", torch.tensor(100.0))           # published before the first step

    def unit(self, people=None):
        """All prototypes on the unit sphere, (n + k, D), real ones first. paper: virtual ones free; here,
        unless `free`: in training times the real ones' second moment, because free ones go where no face is;
        to be drawn, whitened and given 2/3 of that moment and 1/3 of `people`'s (D, D), because prototypes of
        few images differ as photographs do, but with the moment of people alone they crowd."""
        real, virtual = F.normalize(self.real), F.normalize(self.virtual)
        if len(virtual) and not self.free:
            seen = real.mT @ real
            if people is not None:
                people = people.lerp(seen / len(real), 2 / 3)
                seen = power(virtual.mT @ virtual / len(virtual), -0.5) @ power(people, 0.5)
            virtual = F.normalize(virtual @ seen.detach())
        return torch.cat([real, virtual])


def arcface(cos, labels, quality=None, margin=0.5, scale=64.0):
    """ArcFace logits (B, classes): s cos(theta + m) at the label, s cos(theta) elsewhere (ArcFace, eq. 3);
    s (cos(theta) - m sin(m)) where theta + m > pi and the cosine would rise again. quality: unused."""
    target = cos.gather(1, labels[:, None])                                     # (B, 1)
    sin = (1 - target ** 2).clamp(min=1e-9).sqrt()
    pushed = target * math.cos(margin) - sin * math.sin(margin)                 # cos(theta + m)
    pushed = torch.where(target > -math.cos(margin), pushed, target - margin * math.sin(margin))
    return scale * cos.scatter(1, labels[:, None], pushed)


def adaface(cos, labels, quality, margin=0.4, scale=64.0, eps=1e-3):
    """AdaFace logits (B, classes): s (cos(theta - m q) - m - m q) at the label (Kim et al. 2022);
    q (B, 1) is the image's `norm_quality`: at -1 this is ArcFace, at 0 CosFace."""
    cos = cos.clamp(eps - 1, 1 - eps)
    theta = cos.gather(1, labels[:, None]).acos() - margin * quality            # (B, 1)
    target = theta.clamp(eps, math.pi - eps).cos() - margin - margin * quality
    return scale * cos.scatter(1, labels[:, None], target)


MARGINS = {"arcface": (arcface, 0.5), "adaface": (adaface, 0.4)}


def norm_quality(f, prototypes, h=0.333, t_alpha=0.01):
    """AdaFace's image quality in [-1, 1] (B, 1): the norm of embeddings f (B, D) against its average."""
    with torch.no_grad():
        norm = f.norm(dim=1, keepdim=True).clamp(1e-3, 100)
        prototypes.norm_mean.lerp_(norm.mean(), t_alpha)
        prototypes.norm_std.lerp_(norm.std(), t_alpha)
        return ((norm - prototypes.norm_mean) / (prototypes.norm_std + 1e-3) * h).clamp(-1, 1)


def quality_loss(f, cos, labels, prototypes):
    """CR-FIQA's regression of own cosine / (nearest other + 1 + eps) from detached f (B, D); cos (B, n)."""
    with torch.no_grad():
        other = cos.scatter(1, labels[:, None], -2).amax(1, keepdim=True)
        target = cos.gather(1, labels[:, None]) / (other + 1 + 1e-9)                # (B, 1)
    return F.smooth_l1_loss(prototypes.quality(f.detach()), target, beta=0.5)


def virtual_batch_size(step, k, b_real, n):
    """b_v for one step: k b_r / n (paper), rounded so that the running sum is never off by one."""
    return (step + 1) * k * b_real // n - step * k * b_real // n


def around(w, noise, sigma2, scale=1.0):
    """Virtual embeddings (B, D) of prototypes w: w + noise sigma, of unit length; paper: sigma^2 = mean of
    (f - w)^2; here: times (1 + c) / (2 c^2), because only then their own cosine is c, as of real ones."""
    c = (1 - sigma2.sum() / 2).clamp(min=0.1)                                   # |f - w|^2 = 2 - 2 c
    sigma = (sigma2 * (1 + c) / (2 * c ** 2)).sqrt()                            # sum sigma^2 = 1 / c^2 - 1
    return F.normalize(w + scale * sigma * noise)


def vigface_loss(f, labels, prototypes, b_virtual, head="arcface", ramp=1.0, scale=64.0):
    """The margin loss over real embeddings f (B, D) and b_virtual virtual ones: real, virtual, quality.

    Virtual embeddings f'_j = w_v^j + N(0, 1) sigma (EMA, alpha = 0.9) update virtual prototypes only, which
    real ones meet as negatives. paper: normalisation unstated; here: f and w of unit length before sigma and
    f', because there the margin acts. paper: one loss over both batches; here: both sums over b_r, because
    b_r + b_v would shrink the backbone's step as k grows. ramp, 0 to 1, scales the margin."""
    logits, margin = MARGINS[head]
    with torch.autocast(f.device.type, enabled=False):
        f = f.float()
        n, k = len(prototypes.real), len(prototypes.virtual)
        unit = F.normalize(f, eps=0.01)                          # an embedding of no length: no huge gradient
        W = prototypes.unit()
        with torch.no_grad():
            prototypes.sigma2.lerp_((unit - W[labels]).square().mean(0), 0.1)
        cos = unit @ W.T                                                        # (B, n + k)
        real = F.cross_entropy(logits(cos, labels, norm_quality(f, prototypes), ramp * margin, scale), labels)
        quality = quality_loss(f, cos[:, :n], labels, prototypes)
        j = n + torch.randint(max(1, k), (b_virtual,), device=f.device)         # none if k = 0
        negatives = torch.cat([W[:n].detach(), W[n:]])
        cos = around(W[j], torch.randn_like(W[j]), prototypes.sigma2) @ negatives.T     # (b_v, n + k)
        average = torch.zeros_like(cos[:, :1])                          # an invented embedding has no norm
        virtual = F.cross_entropy(logits(cos, j, average, ramp * margin, scale), j, reduction="sum") / len(f)
        return real, virtual, quality


# ------------------------------------------------------------------------ the Diffusion Transformer (stage 2)

def landmark_image(landmarks, size):
    """Soft dots on black (B, 3, S, S): eyes red, nose green, mouth corners blue (the paper's figure)."""
    grid = (torch.arange(size, device=landmarks.device) + 0.5) / size
    dx, dy = (grid - landmarks[..., None]).unbind(2)                            # (B, 5, S) each
    dots = torch.exp(-(dx[:, :, None, :] ** 2 + dy[:, :, :, None] ** 2) / (2 * 0.025 ** 2))     # (B, 5, S, S)
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
    """`layer`, its parameters set to zero, so that at first it changes nothing."""
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

    Time, prototype and landmarks add up to the adaLN condition; the landmark image also joins the input as
    channels, so that pose is exact in space. Zeros for w stand for nobody in particular. paper: unstated what
    the network gives; here: x0, of which v follows, because the noise of a wide patch does not fit into
    one token; two convolutions draw it from tokens and input, because patches alone leave seams."""
    def __init__(self, size=112, dim=512, patch=8, width=768, depth=12, heads=12):
        super().__init__()
        self.config = dict(size=size, dim=dim, patch=patch, width=width, depth=depth, heads=heads)
        self.size, self.dim, self.patch = size, dim, patch
        self.patch_in = nn.Linear(6 * patch ** 2, width)
        grid = torch.arange(size // patch)                          # position (N, C): row, then column
        self.register_buffer("position", sinusoids(torch.cartesian_prod(grid, grid), width // 2).flatten(1))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.identity = nn.Linear(dim, width)
        self.pose = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.patch_out = nn.Linear(width, 16 * patch ** 2)
        self.pixels = nn.Sequential(nn.Conv2d(22, 32, 3, 1, 1), nn.SiLU(), zeroed(nn.Conv2d(32, 3, 3, 1, 1)))

    def forward(self, x_t, t, w, landmarks):                                 # (B,3,S,S), (B,), (B,D), (B,5,2)
        c = self.time(sinusoids(1000 * t, 256)) + self.identity(w * self.dim ** 0.5)    # (B, C); variance 1
        c = F.silu(c + self.pose(4 * landmarks.flatten(1) - 2))                 # [0, 1] -> [-2, 2]
        image = torch.cat([x_t, landmark_image(landmarks, self.size)], 1)       # (B, 6, S, S)
        x = F.pixel_unshuffle(image, self.patch).flatten(2).mT                  # (B, N, 6 patch^2)
        x = self.patch_in(x) + self.position                                    # (B, N, C)
        for block in self.blocks:
            x = block(x, c)
        x = self.patch_out(modulated(x, *self.modulation(c)[:, None].chunk(2, -1)))     # (B, N, 16 patch^2)
        x = x.mT.unflatten(2, (self.size // self.patch, -1))                # (B, 16 patch^2, rows, columns)
        x0 = self.pixels(torch.cat([F.pixel_shuffle(x, self.patch), image], 1))         # (B, 3, S, S)
        a, s = signal_noise(t)
        return (a * x_t - x0) / s.clamp(min=0.05)                               # v


DIT_SIZES = {"Ti": dict(width=192, depth=6, heads=3), "S": dict(width=384, depth=12, heads=6),
             "B": dict(width=768, depth=12, heads=12), "L": dict(width=1024, depth=24, heads=16)}


# ----------------------------------------------------------- diffusion: the one place that states conventions
#   x_t = a x + s e,   v = a e - s x,   so   x = a x_t - s v   and   e = s x_t + a v,
#   a = cos(pi t / 2), s = sin(pi t / 2):  t = 0 is the image, t = 1 is noise.

def signal_noise(t):
    """a and s of time t (B,), shaped (B, 1, 1, 1)."""
    angle = (t * math.pi / 2).view(-1, 1, 1, 1)
    return angle.cos(), angle.sin()


def dit_loss(dit, backbone, x, w, landmarks, sigma2, drop=0.1):
    """Stage 2's two losses on images x (B, 3, S, S) of people w (B, D): MSE of v, squared identity distance.

    paper: conditioned on the prototype; here: on points around it, up to as far as embeddings spread, because
    then a person's pictures vary more. The identity loss |f(x0_hat) / |f| - w|^2, zero for a dropped w, is
    weighted by a^2 = SNR / (1 + SNR): near t = 1 x0_hat is an average face on which f means nothing."""
    w = around(w, torch.randn_like(w), sigma2, torch.rand(len(x), 1, device=x.device))
    t = torch.randn(len(x), device=x.device).sigmoid()                  # logit-normal (Esser et al. 2024)
    keep = (torch.rand(len(x), device=x.device) >= drop).float()        # guidance needs w = 0, nobody
    a, s = signal_noise(t)
    noise = torch.randn_like(x)
    x_t = a * x + s * noise
    v = a * noise - s * x
    v_hat = dit(x_t, t, w * keep[:, None], landmarks).float()
    f = F.normalize(backbone(a * x_t - s * v_hat).float())
    return F.mse_loss(v_hat, v), ((f - w).square().sum(1) * keep * a.flatten() ** 2).mean()


def guided(dit, w, landmarks, guidance=1.0):
    """x0_hat(x_t, t) under classifier-free guidance: x0(nobody) + g (x0(w) - x0(nobody)), kept in [-1, 1]."""
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
    """DPM-Solver++(2M) (Lu et al. 2022): noise x (B, ...) at t = 1 to an image at t = 0 by steps even in
    l = log(a / s); all but the first two and the last extrapolate x0 from two, half a step ahead."""
    # From l = -4 to 4: ten steps even in t would halve the spread of brightness and of fine detail.
    times = [1.0, *(torch.linspace(4, -4, steps - 1).double().exp().atan() * 2 / math.pi).tolist()]
    levels = [(math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)) for t in times]        # a, s
    previous = None
    for t, (a, s), (a_next, s_next) in zip(times, levels, levels[1:]):
        x0 = denoise(x, t)
        estimate = x0 if previous is None else 1.5 * x0 - 0.5 * previous
        x = s_next / s * x + (a_next - a * s_next / s) * estimate
        previous = x0 if t < 1 else None                                # the first step is infinitely long
    return denoise(x, times[-1])


# ------------------------------------------------------------------- the detector: photographs -> landmarks

active_conv = partial(Conv2dNormActivation, activation_layer=partial(nn.LeakyReLU, 0.1))


def separable(c_in, c_out, stride=1):
    """MobileNet's block: a 3 x 3 convolution of each channel, then a 1 x 1 of all."""
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
    """Face detector (Deng et al. 2020) on MobileNet-0.25, with the keys of published Pytorch_Retinaface."""
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
        self.ClassHead, self.BboxHead, self.LandmarkHead = (
            nn.ModuleList(nn.ModuleDict({"conv1x1": nn.Conv2d(64, 2 * width, 1)}) for _ in range(3))
            for width in (2, 4, 10))                                            # two anchors a place

    def forward(self, images):
        """Of uint8 RGB images (B, 3, H, W): scores (B, A), boxes (B, A, 4), points (B, A, 5, 2), pixels."""
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
    with autocast(images.device):
        detections = detector(images.contiguous(memory_format=torch.channels_last))
    for score, box, points in zip(*(part.cpu() for part in detections)):
        keep = (score > confidence).nonzero()[:, 0]
        keep = keep[nms(box[keep], score[keep], 0.4)]
        yield score[keep], box[keep], points[keep]


# ---------------------------------------------------------------------------------------------- save and load

def replace_file(path, write):
    """Lets `write(temporary path)` make a file, flushes and renames it to `path`: nobody reads half."""
    temporary = Path(f"{path}.{os.environ.get('RANK', 0)}.tmp")         # two ranks may finish a set at once
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                    # a full disk, as Python and PyTorch say it
        temporary.unlink(missing_ok=True)
        fail(f"{path}: cannot be written ({error}); free space or choose another --out, and run it again")


def run(main):
    """Runs a script; what stops it from outside is one line, and the same command continues it."""
    try:
        main()
    except KeyboardInterrupt:
        tqdm.write("interrupted; the same command continues from what is saved", sys.stderr)
        raise SystemExit(130)
    except (OSError, torch.OutOfMemoryError) as error:                          # of a GPU: a smaller --batch
        fail(f"{error}; nothing is lost, put it right and give the same command again")


def save_model(folder, stage, config, tensors, **meta):
    """Writes folder/model.safetensors: {part: {name: tensor}}; what later stages need to know as JSON."""
    tensors = {f"{part}.{name}": tensor.detach().cpu().contiguous()
               for part, named in tensors.items() for name, tensor in named.items()}
    data = safetensors.torch.save(tensors, {"vigface": json.dumps(dict(stage=stage, config=config, **meta))})
    replace_file(Path(folder) / "model.safetensors", lambda path: path.write_bytes(data))


def load_model(folder, stage):
    """Tensors and metadata of folder/model.safetensors; ends the program if it is no finished `stage`."""
    path = Path(folder) / "model.safetensors"
    with reading(path, f"a finished run of {stage}_train.py"), safetensors.safe_open(path, "pt") as file:
        meta = {"names": []} | json.loads(file.metadata()["vigface"])
        if meta["stage"] != stage or meta["step"] < meta["steps"]:
            raise ValueError(f"it is from {meta['stage']}_train.py, step {meta['step']} of {meta['steps']}")
        if any(name == ".." or name != Path(name).name for name in meta["names"]):
            raise ValueError("it names people by paths")
        return {name: file.get_tensor(name) for name in file.keys()}, meta


def digest(folder):
    """The sha256 of folder/model.safetensors, by which a later stage knows an earlier one."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def build(module, tensors, prefix, path, arguments={}):
    """A frozen module(**arguments), to evaluate, of the tensors named `prefix.`...; refuses other shapes."""
    with reading(path, f"the weights of a {module.__name__}"):
        with torch.device("meta"):
            net = module(**arguments)
        state = {name.partition(".")[2]: t for name, t in tensors.items() if name.split(".")[0] == prefix}
        net.load_state_dict(state, assign=True)
        return net.requires_grad_(False).eval()


def read_published(path, prefix="net"):
    """The tensors of a .pth or .ckpt that others published, renamed to `prefix`..., without margin heads.

    A checkpoint may name classes of the trainer that wrote it: empty ones stand in, and nothing is run."""
    with reading(path, "published weights"):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        empty = {"__init__": lambda self, *_: None, "__setstate__": lambda self, _: None}
        ignored = [type(name, (), empty | {"__module__": module})
                   for module, _, name in (name.rpartition(".") for name in names)]
        with torch.serialization.safe_globals(ignored):
            state = torch.load(path, map_location="cpu", weights_only=True)
        bare = lambda name: name.removeprefix("module.").removeprefix("model.").removeprefix("backbone.")
        return {f"{prefix}.{bare(name)}": tensor for name, tensor in state.get("state_dict", state).items()
                if "head." not in name and torch.is_tensor(tensor)}


def load_recogniser(path, device, bgr=False):
    """Backbone and prototypes, frozen, on `device`, and metadata, of a run folder or published weights."""
    if Path(path).is_file():
        tensors = read_published(path, "backbone")
        widths = [tensor.shape[:1] for name, tensor in tensors.items() if "res_layer.4.weight" in name]
        se = "backbone.body.0.res_layer.se_block.fc1.weight" in tensors
        config = dict(size=112, dim=512, units=[*map(widths.count, sorted({*widths}))], se=se, bgr=bgr)
        meta = {"config": config, "free": False, "names": [], "data": [], "val": []}
        tensors |= {f"prototypes.{name}": t for name, t in Prototypes(0, 0, 512).state_dict().items()}
    else:
        tensors, meta = load_model(path, "fr")
    backbone = build(Recogniser, tensors, "backbone", path, meta["config"])
    n, k = (len(tensors.get(f"prototypes.{kind}", ())) for kind in ("real", "virtual"))
    arguments = dict(n=n, k=k, dim=meta["config"]["dim"], free=meta["free"])
    prototypes = build(Prototypes, tensors, "prototypes", path, arguments)
    return backbone.to(device, memory_format=torch.channels_last), prototypes.to(device), meta


def same_settings(path, before, now):
    """Ends the program unless the run saved at `path` had the settings of this command."""
    for key, value in now.items():
        if before.get(key) != value:
            fail(f"{path}: started with {key} = {before.get(key)}, now {value}; set it back or change --out")


def save_state(path, settings, step, modules):
    """Writes what a killed run continues from: settings, step, the state of {name: module or optimizer}."""
    state = {"settings": settings, "step": step} | {name: part.state_dict() for name, part in modules.items()}
    replace_file(path, lambda temporary: torch.save(state, temporary))


def resume(path, settings, modules):
    """Loads the modules saved at `path`, if any, and returns the step; other settings end the program."""
    if not Path(path).is_file():
        return 0
    with reading(path, "the state of a run (delete it to start over)"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        same_settings(path, state["settings"], settings)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        print(f"continuing {Path(path).parent} at step {state['step']}")
        return int(state["step"])


def stop_unless_finite(losses, step, out):
    """Mean losses, a tensor, as floats; ends the run if they are no numbers. Its last checkpoint stays."""
    return losses.tolist() if losses.isfinite().all() else fail(
        f"{out}: the loss is {losses.tolist()} at step {step}; the last checkpoint is kept; lower --lr")
