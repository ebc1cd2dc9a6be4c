"""Run with `python -m pytest -q`.

First the method, restated naively: what each function must give, in loops that follow the paper. Then faces
and their batches. Then the scripts, as users run them.
"""
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # before PyTorch looks for a GPU
os.environ["OMP_NUM_THREADS"] = "1"                     # networks are so small that threads would only wait

import contextlib
import copy
import csv
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import re
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.distributed import run as distributed_run
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

import data
import dit_train
import evaluate
import fr_train
import model
import sample
import tools.report
from model import DiT, DiTBlock, Prototypes, Recogniser
from tools import insightface, retinaface, toys

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """Each test starts from one seed, on one thread, as the scripts that it starts, and leaves no process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    for worker in multiprocessing.active_children():        # a loader that failed would wait 5 s for each
        worker.terminate()


# =============================================================================== the method, restated naively

def same(found, expected, within=1e-5):
    """Whether two tensors, lists or numbers agree but for rounding."""
    found = torch.as_tensor(found).double()
    expected = torch.as_tensor(expected).double()
    return found.shape == expected.shape and torch.allclose(found, expected, within, within)


def unit(x):
    """Vectors of length 1 in the direction of each row of x."""
    return x / x.square().sum(-1, keepdim=True).sqrt()


def units(*shape):
    """Random vectors of length 1."""
    return unit(torch.randn(*shape))


def normal(x, within):
    """Whether numbers look normally distributed: mean 0, standard deviation 1."""
    return abs(x.mean()) < within and abs(x.std() - 1) < within


def randomise(module, spread=0.3):
    """Gives every parameter and running statistic a random value, so that nothing is zero by chance."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, spread)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


# ------------------------------------------------------------------------- stage 1: recogniser and embeddings

def naive_recogniser(net, x):
    """IR-SE: a convolution, residual units, a linear layer; batch norms everywhere. The units' keys say what
    stands where.
    """
    def norm(x, layer):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def prelu(x, layer):
        slope = layer.weight.view(-1, 1, 1)
        return torch.where(x > 0, x, slope * x)

    first = net.input_layer
    x = F.conv2d(x, first[0].weight, padding=1)
    x = prelu(norm(x, first[1]), first[2])

    place = 0
    for count in net.config["units"]:
        for stride in [2] + [1] * (count - 1):              # the first unit of a stage halves the image
            block = net.body[place]
            place += 1
            norm1, conv1, norm2, slope, conv2, norm3, gates = block.res_layer
            h = F.conv2d(norm(x, norm1), conv1.weight, padding=1)
            h = prelu(norm(h, norm2), slope)
            h = F.conv2d(h, conv2.weight, padding=1, stride=stride)
            h = norm(h, norm3)

            pooled = h.mean((2, 3), keepdim=True)           # squeeze and excite
            gate = torch.relu(F.conv2d(pooled, gates.fc1.weight))
            gate = torch.sigmoid(F.conv2d(gate, gates.fc2.weight))
            h = h * gate

            shortcut = x[:, :, ::stride, ::stride]
            if x.shape[1] != h.shape[1]:
                shortcut = F.conv2d(shortcut, block.shortcut_layer[0].weight)
                shortcut = norm(shortcut, block.shortcut_layer[1])
            x = h + shortcut

    norm1, _, _, linear, norm2 = net.output_layer
    x = norm(x, norm1).flatten(1)
    return norm(x @ linear.weight.T + linear.bias, norm2)


def test_the_recogniser_is_ir_se():
    tiny = dict(size=32, dim=8, width=16, units=(1, 2, 1, 1))
    net = randomise(Recogniser(**tiny)).eval()
    bgr = Recogniser(**tiny, bgr=True).eval()
    bgr.load_state_dict(net.state_dict())
    x = torch.randn(3, 3, 32, 32)
    expected = naive_recogniser(net, x)
    assert same(net(x), expected, 1e-3)
    assert same(bgr(x[:, [2, 1, 0]]), expected, 1e-3)
    assert net.train()(x).shape == (3, 8)


def parameters_of(network, **config):
    """How many parameters a network would have."""
    with torch.device("meta"):
        net = network(**config)
    return sum(parameter.numel() for parameter in net.parameters())


def test_published_recognisers_have_as_many_parameters():
    assert parameters_of(Recogniser) == 43_808_320          # IR-SE50
    r18 = dict(units=(2, 2, 2, 2), se=False)                # AdaFace published it
    assert parameters_of(Recogniser, **r18) == 24_020_352


def test_a_fresh_recogniser_keeps_the_scale_of_its_features():
    net = Recogniser(size=32, dim=8)
    weight = net.body[-1].res_layer[1].weight
    variance = 2 / weight[0].numel()                        # He et al. 2015
    assert same(weight.var().item(), variance, 0.02 * variance)
    assert net.output_layer[1].p == 0.4                     # dropout


def test_ir_se50_is_trained_by_the_published_recipe():
    assert model.RECOGNISERS["ir_se50"] == dict(epochs=26, batch=512, scale=64.0, net={})
    defaults = fr_train.parser.parse_args([])
    assert defaults.lr == 0.1 and defaults.head == "arcface"


class Linear(nn.Module):
    """A recogniser of images of S x S pixels that is one matrix, so that all can be computed by hand."""

    def __init__(self, size=4, dim=6):
        super().__init__()
        self.config = dict(size=size, dim=dim)
        self.layer = nn.Linear(3 * size ** 2, dim)
        self.kinds = []                                     # of numbers, that it computed in

    def forward(self, x):
        f = self.layer(x.flatten(1))
        self.kinds.append(f.dtype)
        return f


def naive_embed(backbone, images):
    """The sum of the embeddings of each image and of its mirror image."""
    x = (images.float() - 127.5) / 127.5
    mirrored = x.flip(3)
    with torch.no_grad():
        return backbone.layer(x.flatten(1)) + backbone.layer(mirrored.flatten(1))


def random_images(count, size=4):
    """Images uint8 (count, 3, S, S) of noise."""
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def test_embeddings_sum_an_image_and_its_mirror_image(monkeypatch):
    backbone, images = Linear(), random_images(5)
    monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    expected = naive_embed(backbone, images)
    exact = model.embed(backbone, images, batch=2, unit=False, exact=True)
    assert same(exact, expected)
    assert set(backbone.kinds) == {torch.float32}           # accuracies compare with published ones
    exact = model.embed(backbone, images, batch=2, exact=True)
    assert same(exact, unit(expected))

    fast = model.embed(backbone, images, unit=False)
    assert backbone.kinds[-1] == torch.bfloat16 and fast.dtype == torch.float32
    assert same(fast, expected, 0.05)


def test_an_embedding_that_is_not_a_number_ends_the_program(capsys):
    backbone = Linear()
    backbone.layer.bias.data[0] = torch.nan
    assert "NaN" in stops(capsys, model.embed, backbone, random_images(2))


def test_networks_see_numbers_from_minus_one_to_one():
    stored = torch.arange(256, dtype=torch.uint8)
    seen = model.to_float(stored)
    assert seen[[0, 255]].tolist() == [-1, 1]
    assert seen[51].item() == pytest.approx((51 - 127.5) / 127.5)
    assert torch.equal(model.to_uint8(seen), stored)
    between = (torch.tensor([-90, 100.4, 100.6, 300]) - 127.5) / 127.5
    assert model.to_uint8(between).tolist() == [0, 100, 101, 255]


# ----------------------------------------------------------------------------- stage 1: the two margin losses

def cosines_of_one_image(cosine):
    """Its cosines to three people; it is of the second."""
    cosines = [[0.3, cosine, -0.1]]
    return torch.tensor(cosines, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("cosine", [0.9, 0.2, -0.5, -0.95, 1.0, -1.0])
def test_arcface_adds_the_margin_to_the_angle(cosine):
    """s cos(theta + m) at the label. Beyond pi the cosine would rise again: there it goes on falling."""
    cos = cosines_of_one_image(cosine)
    logits = model.arcface(cos, torch.tensor([1]))
    theta = math.acos(cosine)
    expected = math.cos(theta + 0.5)
    if theta + 0.5 > math.pi:
        expected = cosine - 0.5 * math.sin(0.5)
    assert same(logits[0] / 64, [0.3, expected, -0.1])

    logits.sum().backward()
    assert cos.grad.isfinite().all()
    if abs(cosine) < 0.9:
        slope = math.sin(theta + 0.5) / math.sin(theta)     # d cos(theta + m) / d cos(theta)
        assert same(cos.grad[0], [64, 64 * slope, 64])


@pytest.mark.parametrize("quality", [-1.0, -0.3, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("cosine", [0.98, 0.2, -0.5, -0.98])
def test_adaface_has_a_margin_that_depends_on_quality(quality, cosine):
    """s (cos(theta + g_angle) - g_add), where g_angle = -m q and g_add = m + m q."""
    cos = cosines_of_one_image(cosine)
    q = torch.tensor([[quality]], dtype=torch.float64)
    logits = model.adaface(cos, torch.tensor([1]), q)
    m, theta = 0.4, math.acos(cosine)
    angle = theta - m * quality
    angle = min(max(angle, 1e-3), math.pi - 1e-3)
    expected = math.cos(angle) - (m + m * quality)
    assert same(logits[0] / 64, [0.3, expected, -0.1])

    logits.sum().backward()
    slope = 0
    if 1e-3 < angle < math.pi - 1e-3:
        slope = math.sin(angle) / math.sin(theta)
    assert same(cos.grad[0], [64, 64 * slope, 64])


@pytest.mark.parametrize("head", [model.arcface, model.adaface])
def test_each_image_has_its_own_label_margin_and_scale(head):
    cos = torch.rand(3, 4) - 0.5
    labels = torch.tensor([2, 0, 3])
    quality = torch.tensor([[0.5], [0.0], [-0.5]])
    plain = head(cos, labels, quality, margin=0.0, scale=7.0)
    assert same(plain, 7 * cos)                             # without a margin, cosines are left
    logits = head(cos, labels, quality, margin=0.3, scale=7.0)
    for i in range(3):
        one = slice(i, i + 1)
        alone = head(cos[one], labels[one], quality[one], margin=0.3, scale=7.0)
        assert same(logits[one], alone)
        changed = (logits[i] - plain[i]).abs() > 1e-3
        assert changed.nonzero().flatten().tolist() == [labels[i]]


def test_the_margins_are_the_published_ones():
    assert model.MARGINS["arcface"] == (model.arcface, 0.5)
    assert model.MARGINS["adaface"] == (model.adaface, 0.4)
    cos, label, average = torch.tensor([[1.0, -1.0]]), torch.tensor([0]), torch.zeros(1, 1)
    logits = model.adaface(cos, label, average)
    assert same(logits[0, 1] / 64, 1e-3 - 1)                # cosines stay off 1, where acos has no slope


def test_norm_quality_compares_a_norm_with_its_running_averages():
    prototypes, mean, std = Prototypes(2, 2, 8), 20.0, 100.0
    for spread in (1, 300, 1e-5, 9):                        # norms count from 0.001 to 100
        f = spread * torch.rand(6, 1) * unit(torch.randn(6, 8))
        norms = f.norm(dim=1).clamp(1e-3, 100)
        mean = 0.99 * mean + 0.01 * norms.mean()
        std = 0.99 * std + 0.01 * norms.std()
        expected = 0.333 * (norms - mean) / (std + 1e-3)
        found = model.norm_quality(f, prototypes)
        assert same(found[:, 0], expected.clamp(-1, 1))
    assert same(prototypes.norm_mean, mean) and same(prototypes.norm_std, std)

    prototypes.norm_std.fill_(0.1)
    f = torch.tensor([[0.0, 0.0], [0.0, 90.0]])
    assert model.norm_quality(f, prototypes).tolist() == [[-1], [1]]


def test_the_quality_head_learns_the_cr_fiqa_ratio_and_disturbs_nothing():
    """Own cosine / (cosine to the nearest other person + 1), by a smooth L1 loss that turns at 1/2."""
    prototypes = Prototypes(4, 3, 8)
    f = torch.randn(5, 8, requires_grad=True)
    labels = [0, 1, 2, 3, 0]
    cos = unit(f) @ unit(prototypes.real).T
    losses = []
    for cosines, label, score in zip(cos.tolist(), labels, prototypes.certainty(f)):
        own = cosines.pop(label)
        ratio = own / (max(cosines) + 1 + 1e-9)
        gap = abs(score.item() - ratio)
        losses.append(gap ** 2 if gap < 0.5 else gap - 0.25)
    loss = model.certainty_loss(f, cos, torch.tensor(labels), prototypes)
    assert same(loss.item(), np.mean(losses))

    loss.backward()
    assert f.grad is None and prototypes.real.grad is None
    assert prototypes.certainty.weight.grad.any()


# -------------------------------------------------------------------------------- stage 1: virtual prototypes

def moment_of(vectors):
    """The second moment: the mean of v v^T."""
    return sum(v.outer(v) for v in vectors) / len(vectors)


def test_fresh_prototypes_are_short_so_that_they_turn_fast():
    prototypes = Prototypes(100, 100, 64)
    assert same(prototypes.real.std().item(), 0.01, 5e-4)
    assert same(prototypes.virtual.std().item(), 0.01, 5e-4)
    assert not prototypes.sigma2.any()
    assert prototypes.norm_mean == 20 and prototypes.norm_std == 100        # AdaFace's


def test_virtual_prototypes_are_seen_through_the_moment_of_real_ones():
    prototypes = randomise(Prototypes(5, 3, 4))
    real, virtual = unit(prototypes.real), unit(prototypes.virtual)
    found = prototypes.unit()
    assert same(found[:5], real)
    assert same(found[5:], unit(virtual @ moment_of(real)))
    found[5:].sum().backward()
    assert prototypes.real.grad is None or not prototypes.real.grad.any()
    assert prototypes.virtual.grad.any()

    paper = randomise(Prototypes(5, 3, 4, True))            # free vectors
    plain = torch.cat([unit(paper.real), unit(paper.virtual)])
    assert same(paper.unit(), plain)
    assert same(paper.to_draw(), plain)


def test_powers_of_a_moment():
    moment = moment_of(torch.randn(30, 5))
    root, inverse = model.power(moment, 0.5), model.power(moment, -0.5)
    assert same(root @ root, moment)
    assert same(inverse @ moment @ inverse, torch.eye(5), 1e-4)
    assert root.dtype == torch.float32
    flat = torch.tensor([[4.0, 0.0], [0.0, 0.0]])           # has no inverse: 1e-6 stands for 0
    assert same(model.power(flat, -0.5), [[0.5, 0.0], [0.0, 1000.0]])

    axes = torch.linalg.qr(torch.randn(5, 5))[0]
    thin = axes * torch.logspace(0, -5, 5) @ axes.T         # needs double precision
    values, vectors = np.linalg.eigh(thin.double().numpy())
    exact = vectors / np.sqrt(values) @ vectors.T
    assert same(model.power(thin, -0.5), exact)


def test_settled_prototypes_are_whitened_and_given_the_moment_of_people():
    prototypes = randomise(Prototypes(30, 20, 4))
    spread = torch.tensor([3, 1, 1, 0.2])
    people = moment_of(torch.randn(9, 4) * spread)
    prototypes.settle(people)
    real = unit(prototypes.real.detach())
    virtual = unit(prototypes.virtual.detach())
    white = virtual @ model.power(moment_of(virtual), -0.5)
    assert same(moment_of(white), torch.eye(4), 1e-4)
    settled = unit(white @ model.power(people, 0.5))
    assert same(prototypes.to_draw(), torch.cat([real, settled]), 1e-4)
    before = prototypes.to_draw()
    randomise(prototypes)                                   # training goes on: what is drawn stays
    prototypes.unit()
    assert torch.equal(prototypes.to_draw()[30:], before[30:])


def moment_of_people(f, labels, batch=3):
    """What a pass over images finds if f (M, D) are their embeddings."""
    scan = lambda indices, title: ((f[i], i) for i in indices.split(batch))
    faces = SimpleNamespace(labels=labels, scan=scan)
    backbone = SimpleNamespace(config={"dim": f.shape[1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "embed", lambda _, f: f)
        return model.person_moment(backbone, faces)


def test_the_moment_of_people_is_the_mean_over_pairs_of_images_of_one_person():
    f = units(11, 4)
    labels = torch.tensor([0] * 5 + [2] * 2 + [1] * 3 + [3])        # the last has one image: no pair
    total = 0
    for person in range(3):
        pairs = [*itertools.permutations(f[labels == person], 2)]
        total = total + sum(a.outer(b) for a, b in pairs) / len(pairs)
    total = total + 1e-3 * moment_of(f)                     # decides if nobody has two images
    assert same(moment_of_people(f, labels), total / total.trace())
    alone = units(5000, 4)                                  # so many that rounding would show
    moment = alone.T @ alone
    found = moment_of_people(alone, torch.arange(5000).flip(0), batch=256)
    assert same(found, moment / moment.trace(), 1e-4)

    sums, count = model.class_sums(f, labels)
    assert count.tolist() == [5, 3, 2, 1]
    for person in range(4):
        assert same(sums[person], f[labels == person].sum(0))


def test_sums_of_many_embeddings_in_half_precision_are_exact():
    f = torch.ones(70_000, 2, dtype=torch.half)             # half a float ends at 65,504
    sums, count = model.class_sums(f, torch.zeros(70_000, dtype=torch.long))
    assert sums.tolist() == [[70_000, 70_000]] and count.tolist() == [70_000]


def test_virtual_prototypes_lie_where_people_do():
    """People differ along 20 of 64 directions, and so must virtual ones."""
    n, k, dim, used = 3000, 2000, 64, 20
    axes = torch.linalg.qr(torch.randn(dim, dim))[0]
    spread = torch.linspace(1, -0.5, dim)
    spread[used:] = 0.02
    prototypes = Prototypes(n, k, dim)
    with torch.no_grad():
        prototypes.real.copy_(torch.randn(n, dim) * spread @ axes.T)
        fled = torch.randn(k, dim) * torch.linspace(0.1, 1, dim)
        prototypes.virtual.copy_(fled @ axes.T)
    inside = prototypes.unit()[n:] @ axes[:, :used]
    assert inside.square().sum(1).mean() > 0.99             # in training

    # Images of a person differ in the other directions, which are not of the person.
    noise = torch.randn(2 * n, dim) * (1 - spread) @ axes.T
    f = unit(prototypes.real.detach().repeat(2, 1) + noise)
    people = moment_of_people(f, torch.arange(n).repeat(2), batch=256)
    assert (people @ axes[:, used:]).norm() < 0.3 * people.norm()

    prototypes.settle(people)
    virtual = prototypes.to_draw()[n:]
    difference = virtual.T @ virtual / k - people
    assert difference.norm() < 0.25 * people.norm()         # to have length 1 moves them a little


# ---------------------------------------------------------------------------------- stage 1: VIGFace's losses

def naive_around(w, noise, sigma2):
    """w + sigma e on the sphere, with sigma such that the cosine to w is that of real embeddings, c."""
    total = sigma2.sum()                                    # |f - w|^2 = 2 - 2 c
    c = max(1 - total / 2, 0.1)
    sigma = (sigma2 / total * (1 / c ** 2 - 1)).sqrt()      # 1 / sqrt(1 + sum sigma^2) = c
    return unit(w + sigma * noise)


@pytest.mark.parametrize("total", [0.3, 1.2, 1.9])
def test_virtual_embeddings_are_drawn_around_a_prototype(total):
    w, noise = units(4, 8), torch.randn(4, 8)
    sigma2 = torch.rand(8)
    sigma2 *= total / sigma2.sum()
    assert same(model.around(w, noise, sigma2), naive_around(w, noise, sigma2))
    assert same(model.around(w, noise, torch.zeros(8)), w)


@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize("cosine", [0.5, 0.75, 0.95])
def test_virtual_embeddings_are_as_close_to_their_prototypes_as_real_ones(dim, cosine):
    w = units(500, dim)
    aside = unit(torch.randn_like(w) * torch.linspace(0.5, 1.5, dim))
    f = unit(w + aside * (1 / cosine ** 2 - 1) ** 0.5)
    sigma2 = (f - w).square().mean(0)
    virtual = model.around(w, torch.randn_like(w), sigma2)
    cosines = (virtual * w).sum(1)
    assert abs(cosines.mean() - cosine) < 0.02


@pytest.mark.parametrize("k", [0, 1, 5, 7, 120])
def test_a_virtual_batch_has_the_paper_s_size_on_average(k):
    """k b_r / n, rounded, and exact in the sum over steps."""
    b_real, n = 3, 10
    sizes = [model.virtual_batch_size(step, k, b_real, n) for step in range(50)]
    assert sum(sizes) == 50 * k * b_real // n
    assert all(abs(size - k * b_real / n) < 1 for size in sizes)


def naive_margin_loss(head, f, W, label, quality, ramp, scale):
    """Cross entropy of one unit embedding f over all prototypes W, with the margin at its label."""
    m = ramp * {"arcface": 0.5, "adaface": 0.4}[head]
    logits = []
    for row, w in enumerate(W):
        cosine = f @ w
        if row == label and head == "arcface":
            cosine = torch.cos(torch.acos(cosine) + m)
        if row == label and head == "adaface":
            cosine = torch.cos(torch.acos(cosine) - m * quality) - m - m * quality
        logits.append(scale * cosine)
    return torch.stack(logits).exp().sum().log() - logits[label]


class NaiveStatistics:
    """The running averages of stage 1: of (f - w)^2, a tenth new at each step; of norms, a hundredth."""

    def __init__(self, dim):
        self.sigma2, self.mean, self.std = torch.zeros(dim), 20.0, 100.0

    def update(self, f, direction, w):
        """Takes in a batch; returns AdaFace's quality of each of its images."""
        squared = (direction - w).square()
        self.sigma2 = 0.9 * self.sigma2 + 0.1 * squared.mean(0)
        norms = f.norm(dim=1).clamp(1e-3, 100)
        self.mean = 0.99 * self.mean + 0.01 * norms.mean()
        self.std = 0.99 * self.std + 0.01 * norms.std()
        return 0.333 * (norms - self.mean) / (self.std + 1e-3)


def same_gradients(loss, expected, parameters):
    """Whether two losses pull alike at the parameters, which one of them may not even see."""
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    one = torch.autograd.grad(loss, parameters, **options)
    other = torch.autograd.grad(expected, parameters, **options)
    return all(same(*pair, 1e-3) for pair in zip(one, other))


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("head", model.MARGINS)
@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_vigface_s_losses_and_their_gradients(monkeypatch, head, ramp, paper):
    """The loss of real embeddings, over all prototypes; the loss of virtual ones, which trains the virtual
    prototypes alone. Both are divided by the size of the real batch, in the paper by that of both batches.
    """
    n, k, scale, around, drawn = 5, 4, 8.0, model.around, []

    def spy(w, noise, sigma2, plain):
        assert plain == paper
        drawn.append((w.detach(), noise, sigma2.clone()))
        return around(w, noise, sigma2, plain)
    monkeypatch.setattr(model, "around", spy)
    prototypes, statistics = randomise(Prototypes(n, k, 8, paper)), NaiveStatistics(8)

    for batch in (6, 7):                                    # two, because averages move
        labels = torch.arange(batch) % n
        f = 9 * torch.randn(batch, 8)
        f[3] = 0.005 * unit(f[3])                           # short: counts as if its norm were 0.01
        f.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):         # makes no difference to the losses
            found = model.vigface_loss(f, labels, prototypes, 40, head, ramp, scale)

        W = prototypes.unit()
        direction = f / f.norm(dim=1, keepdim=True).clamp(min=0.01)
        with torch.no_grad():
            quality = statistics.update(f, direction, W[labels])
        real = 0
        for one, label, q in zip(direction, labels, quality):
            real = real + naive_margin_loss(head, one, W, label, q, ramp, scale)

        # Virtual embeddings are of prototypes chosen by chance. Real prototypes do not feel them.
        w, noise, sigma2 = drawn.pop()
        chosen = (w @ W.T).argmax(1)
        assert {*chosen.tolist()} == {*range(n, n + k)} and same(W[chosen], w)
        assert noise.shape == (40, 8) and normal(noise, 0.15)
        assert same(sigma2, statistics.sigma2)
        assert same(prototypes.sigma2, statistics.sigma2)
        f_virtual = naive_around(W[chosen], noise, sigma2)
        if paper:
            f_virtual = unit(W[chosen] + sigma2.sqrt() * noise)
        fixed = torch.cat([W[:n].detach(), W[n:]])
        virtual = 0
        for one, label in zip(f_virtual, chosen):
            virtual = virtual + naive_margin_loss(head, one, fixed, label, 0.0, ramp, scale)

        count = batch + 40 if paper else batch
        real, virtual = real / count, virtual / count
        assert same(found[0], real, 1e-4) and same(found[1], virtual, 1e-4)
        trained = [f, prototypes.real, prototypes.virtual]
        assert same_gradients(found[0], real, trained)
        assert same_gradients(found[1], virtual, trained)
        pull, = torch.autograd.grad(found[1], [prototypes.virtual])
        assert pull.any()

        cosines = direction @ W[:n].T                       # the quality head looks at real people alone
        assert same(found[2], model.certainty_loss(f, cosines, labels, prototypes))


@pytest.mark.parametrize("head", model.MARGINS)
def test_the_virtual_loss_in_parts_is_the_loss_and_keeps_no_cosines(head):
    fresh = randomise(Prototypes(50, 30, 8))
    f, labels = torch.randn(9, 8), torch.arange(9)
    found = []
    for at_once in (10 ** 6, 7 * 80):                       # all at once; seven rows of cosines, and one more
        torch.manual_seed(1)
        prototypes, kept = copy.deepcopy(fresh), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            losses = model.vigface_loss(f, labels, prototypes, 40, head, at_once=at_once)
        losses[1].backward()
        found.append((losses[1].detach(), prototypes.virtual.grad.clone()))
        assert max(kept) <= 9 * 80                          # of real embeddings, not 40 * 80
    assert all(map(same, *found)) and found[0][1].any()


def test_without_virtual_people_there_is_no_virtual_loss():
    prototypes = Prototypes(3, 0, 8)
    labels = torch.tensor([0, 1, 2, 0])
    real, virtual, _ = model.vigface_loss(torch.randn(4, 8), labels, prototypes, 0)
    assert real > 0 and virtual == 0


@pytest.mark.parametrize("head", model.MARGINS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_no_embedding_breaks_the_loss(head, kind):
    prototypes = Prototypes(4, 4, 8)
    own, other = prototypes.real[:2].detach()
    nothing, huge = torch.zeros(8), torch.full([8], 1e4)
    f = torch.stack([own, -other, nothing, huge])           # the first two have cosines 1 and -1
    f = f.to(kind).requires_grad_()
    losses = model.vigface_loss(f, torch.arange(4), prototypes, 3, head)
    sum(losses).backward()
    assert f.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in prototypes.parameters())
    assert all(buffer.isfinite().all() for buffer in prototypes.buffers())


# ----------------------------------------------------------------------------------------------- stage 2: DiT

def naive_sinusoids(x, width):
    """Cosines and sines of a number at frequencies that fall from 1 towards 1 / 10,000."""
    half = width // 2
    angles = torch.tensor([x * 10_000 ** (-i / half) for i in range(half)])
    return torch.cat([torch.cos(angles), torch.sin(angles)])


def naive_landmark_image(landmarks, size):
    """A soft dot at each landmark: eyes red, the nose green, corners of the mouth blue."""
    image = torch.zeros(3, size, size)
    colours = [0, 0, 1, 2, 2]
    for channel, (x, y) in zip(colours, landmarks.tolist()):
        for row in range(size):
            for column in range(size):
                dx = (column + 0.5) / size - x
                dy = (row + 0.5) / size - y
                squared = (dx ** 2 + dy ** 2) / 0.025 ** 2
                dot = math.exp(-squared / 2)
                image[channel, row, column] = max(image[channel, row, column], dot)
    return image


def naive_modulated(tokens, shift, scale):
    """Tokens (N, C), each without its mean and of standard deviation 1, scaled and shifted."""
    centred = tokens - tokens.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * (1 + scale) + shift


def naive_attention(tokens, block):
    """Each token looks at all: in each head, a mean of values, weighted by how queries and keys agree."""
    count, width = tokens.shape
    queries, keys, values = block.qkv(tokens).split(width, 1)
    side = width // block.heads
    looked = torch.zeros(count, width)
    for head in range(block.heads):
        part = slice(head * side, (head + 1) * side)
        for i in range(count):
            scores = keys[:, part] @ queries[i, part]
            weights = (scores / side ** 0.5).exp()
            weights = weights / weights.sum()
            looked[i, part] = weights @ values[:, part]
    return block.out(looked)


def naive_block(block, tokens, condition):
    """adaLN: the condition shifts and scales what attention and MLP see, and gates what they add."""
    width = tokens.shape[1]
    numbers = block.modulation(condition).split(width)
    shift1, scale1, gate1, shift2, scale2, gate2 = numbers
    tokens = tokens + gate1 * naive_attention(naive_modulated(tokens, shift1, scale1), block)
    h = block.mlp[0](naive_modulated(tokens, shift2, scale2))
    bent = (2 / math.pi) ** 0.5 * (h + 0.044715 * h ** 3)
    h = 0.5 * h * (1 + torch.tanh(bent))                    # GELU
    return tokens + gate2 * block.mlp[2](h)


def parts_at(t):
    """a and s, the parts of image and noise at time t; a^2 + s^2 = 1."""
    angle = math.pi * t / 2
    return math.cos(angle), math.sin(angle)


def naive_dit(dit, x_t, t, w, landmarks):
    """v of one noisy image (3, S, S) at time t, of person w, in the pose of landmarks (5, 2)."""
    def two_layers(net, numbers):
        h = net[0](numbers)
        return net[2](h * h.sigmoid())
    size, patch = dit.size, dit.patch
    width, rows = dit.patch_in.out_features, size // patch
    places = [*itertools.product(range(rows), repeat=2)]

    def pixels_of(image, row, column):
        down, right = row * patch, column * patch
        return image[:, down:down + patch, right:right + patch]

    # Time, person and pose add up to the condition.
    condition = two_layers(dit.time, naive_sinusoids(1000 * t, 256))
    condition = condition + dit.identity(w * len(w) ** 0.5)
    condition = condition + two_layers(dit.pose, 4 * landmarks.flatten() - 2)
    condition = condition * condition.sigmoid()

    # A token is a patch of the noisy image and of the landmark image, and where it lies.
    image = torch.cat([x_t, naive_landmark_image(landmarks, size)])
    tokens = []
    for place in places:
        position = torch.cat([naive_sinusoids(number, width // 2) for number in place])
        pixels = pixels_of(image, *place)
        tokens.append(dit.patch_in(pixels.flatten()) + position)
    tokens = torch.stack(tokens)

    for block in dit.blocks:
        tokens = naive_block(block, tokens, condition)
    shift, scale = dit.modulation(condition).split(width)
    tokens = dit.patch_out(naive_modulated(tokens, shift, scale))

    # Each token gives 16 features of each of its pixels. Convolutions turn them and the input into x0.
    features = torch.zeros(16, size, size)
    for token, place in zip(tokens, places):
        pixels_of(features, *place)[:] = token.view(16, patch, patch)
    first, _, second = dit.pixels
    h = torch.cat([features, image])
    h = F.conv2d(h, first.weight, first.bias, padding=1)
    h = h * h.sigmoid()
    x0 = F.conv2d(h, second.weight, second.bias, padding=1)

    a, s = parts_at(t)                                      # x_t = a x0 + s e, v = a e - s x0
    return (a * x_t - x0) / max(s, 0.05)


SMALL = dict(size=8, dim=6, patch=4, width=16, depth=2, heads=2)


def small_dit(spread=0.3):
    """A DiT for images of 8 x 8, of which no parameter is zero."""
    return randomise(DiT(**SMALL), spread)


def dit_input(count):
    """Noisy images, times, people and poses."""
    x_t, t = torch.randn(count, 3, 8, 8), torch.rand(count)
    return x_t, t, units(count, 6), torch.rand(count, 5, 2)


@torch.no_grad()
def test_the_dit_against_loops():
    dit = small_dit()
    x_t, _, w, landmarks = dit_input(3)
    times = [0.01, 0.4, 1.0]                                # at 0.01 there is less noise than the clamp
    found = dit(x_t, torch.tensor(times), w, landmarks)
    for i, t in enumerate(times):
        assert same(found[i], naive_dit(dit, x_t[i], t, w[i], landmarks[i]), 1e-3)


@torch.no_grad()
def test_a_block_against_loops():
    block = randomise(DiTBlock(16, 4))
    tokens, condition = torch.randn(2, 5, 16), torch.randn(2, 16)
    expected = [naive_block(block, *one) for one in zip(tokens, condition)]
    assert same(block(tokens, condition), torch.stack(expected), 1e-3)


@torch.no_grad()
def test_v_depends_on_who_when_pose_and_every_pixel():
    dit, given = small_dit(), dit_input(1)
    x_t, t, w, landmarks = given
    v = dit(*given)

    def moves(x_t=x_t, t=t, w=w, landmarks=landmarks):
        return not same(dit(x_t, t, w, landmarks), v, 1e-3)
    assert moves(w=-w) and moves(w=0 * w)
    assert moves(t=t / 2)
    assert moves(landmarks=landmarks.flip(0, 1))
    beyond = x_t.clone()
    beyond[0, :, 7, 7] += 5                                 # a pixel in the corner moves the opposite one
    far = dit(beyond, t, w, landmarks)
    assert not same(far[0, :, 0, 0], v[0, :, 0, 0], 1e-3)


@torch.no_grad()
def test_the_pose_reaches_the_dit_as_numbers_and_as_an_image(monkeypatch):
    dit, (x_t, t, w, landmarks) = small_dit(), dit_input(1)
    other = torch.rand(1, 5, 2)
    image, other_image = (model.landmark_image(points, 8) for points in (landmarks, other))
    monkeypatch.setattr(model, "landmark_image", lambda points, size: image)
    v = dit(x_t, t, w, landmarks)
    assert not same(dit(x_t, t, w, other), v, 1e-3)         # the image stays, the numbers change
    monkeypatch.setattr(model, "landmark_image", lambda points, size: other_image)
    assert not same(dit(x_t, t, w, landmarks), v, 1e-3)     # and the other way round


def test_a_fresh_dit_draws_grey_and_a_fresh_block_changes_nothing():
    block, tokens, condition = DiTBlock(64, 4), torch.randn(2, 16, 64), torch.randn(2, 64)
    assert torch.equal(block(tokens, condition), tokens)    # adaLN-Zero
    dit = DiT(**SMALL)
    x_t, t, w, landmarks = dit_input(2)
    t = t.clamp(min=0.1)
    a, s = naive_signal_noise(t)
    v = dit(x_t, t, w, landmarks)
    x0 = a * x_t - s * v
    assert same(x0, torch.zeros(2, 3, 8, 8))
    assert not dit.modulation.weight.any() and not dit.modulation.bias.any()


def test_landmark_images_and_sinusoids_against_loops():
    landmarks = torch.rand(2, 5, 2)
    landmarks[:, 1::3] = landmarks[:, 0::3] + 0.02          # dots that overlap
    expected = [naive_landmark_image(points, 20) for points in landmarks]
    assert same(model.landmark_image(landmarks, 20), torch.stack(expected))
    x = torch.tensor([0.0, 3.0, 700.0])
    expected = torch.stack([naive_sinusoids(number, 16) for number in x.tolist()])
    assert same(model.sinusoids(x, 16), expected, 1e-4)


def test_dit_sizes_are_those_of_the_dit_paper_and_a_small_one():
    millions = {"Ti": 4.6, "S": 33, "B": 131, "L": 459}
    for name, sizes in model.DIT_SIZES.items():
        count = parameters_of(DiT, **sizes) / 1e6
        assert 0.98 * millions[name] < count < 1.1 * millions[name]
        assert sizes["width"] // sizes["heads"] == 64


# ----------------------------------------------------------------------------------------- stage 2: diffusion

def naive_signal_noise(t):
    """a and s of times t (B,): parts of image and noise, a^2 + s^2 = 1, shaped to multiply images."""
    angle = t.view(-1, 1, 1, 1) * math.pi / 2
    return torch.cos(angle), torch.sin(angle)


class Blurred(nn.Module):
    """In place of a DiT: gives half of what it is given, and remembers it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t, t, w, landmarks):
        self.given = x_t, t, w, landmarks
        return x_t * self.gain


@pytest.mark.parametrize("paper", [False, True])
def test_stage_2_s_losses_against_their_definitions(paper):
    """MSE of v; and the squared distance of the drawn face's embedding to the picture's own, times a^2.

    In the paper, it is the distance to the prototype.
    """
    dit, backbone = Blurred(), Linear()
    x = torch.rand(3000, 3, 4, 4) * 2 - 1
    w, landmarks = units(3000, 6), torch.rand(3000, 5, 2)
    v_loss, identity_loss = model.dit_loss(dit, backbone, x, w, landmarks, paper=paper)
    x_t, t, asked, pose = dit.given
    assert torch.equal(pose, landmarks)

    # Times are logit-normal, noise is normal, and everything is each image's own.
    logit = (t / (1 - t)).log()
    assert normal(logit, 0.06)
    a, s = naive_signal_noise(t)
    noise = (x_t - a * x) / s
    assert normal(noise, 0.02)
    assert noise.mean(0).abs().max() < 0.1
    assert noise.mean((1, 2, 3)).abs().max() < 1

    # A tenth is drawn as nobody, w = 0, which guidance needs.
    nobody = (asked == 0).all(1)
    assert 0.08 < nobody.float().mean() < 0.12
    assert torch.equal(asked[~nobody], w[~nobody])

    v, v_hat = a * noise - s * x, x_t * dit.gain
    naive = (v_hat - v).square().mean()
    assert same(v_loss, naive) and same_gradients(v_loss, naive, [dit.gain])
    x_hat = a * x_t - s * v_hat
    drawn, own = unit(backbone(x_hat)), unit(backbone(x)).detach()
    wanted = w if paper else own
    distance = (drawn - wanted).square().sum(1)
    naive = (a.flatten() ** 2 * distance).mean()
    assert same(identity_loss, naive)
    trained = [dit.gain, *backbone.parameters()]
    assert same_gradients(identity_loss, naive, trained)    # none through the photograph


def test_a_perfect_dit_has_no_loss_whoever_is_asked_for():
    x, w = torch.rand(500, 3, 4, 4) * 2 - 1, units(500, 6)

    def oracle(x_t, t, w, landmarks):
        a, s = naive_signal_noise(t)
        return (a * x_t - x) / s                            # x0 = a x_t - s v, solved for v
    assert max(model.dit_loss(oracle, Linear(), x, w, None)) < 1e-6
    seen = Blurred()
    model.dit_loss(seen, Linear(), x, w, None, drop=0.7)
    nobody = (seen.given[2] == 0).all(1)
    assert 300 < nobody.sum() < 400


@torch.no_grad()
@pytest.mark.parametrize("t", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("g", [0.0, 0.5, 1.0, 3.0])
def test_guidance_goes_from_nobody_through_the_person_and_beyond(t, g):
    """v(nobody) + g (v(w) - v(nobody)); x0 = a x - s v, kept to what an image can be."""
    dit, asked = small_dit(spread=0.15), []
    x, _, w, landmarks = dit_input(4)

    def spy(x, times, w, landmarks):
        asked.append(bool(w.any()))
        return dit(x, times, w, landmarks)
    found = model.guided(spy, w, landmarks, g)(x, t)
    assert asked == ([True] if g == 1 else [True, False])   # without guidance, half the cost

    times, (a, s) = torch.full((4,), t), parts_at(t)
    own = dit(x, times, w, landmarks)
    nobody = dit(x, times, 0 * w, landmarks)
    x0 = a * x - s * (nobody + g * (own - nobody))
    assert x0.abs().max() > 1
    assert same(found, x0.clamp(-1, 1), 1e-4)


def naive_dpm_solver(denoise, x, steps):
    """DPM-Solver++(2M), as its authors write it, algorithm 2: noise x becomes an image.

    l = log(a / s) goes in even steps h from -4 to 4. Before them comes one step from pure noise. The first
    step of a kind is of first order. The last estimate of x0 is the image.
    """
    def parts(l):
        angle = math.atan(math.exp(-l))                     # tan = s / a
        return math.cos(angle), math.sin(angle)
    h = 8 / max(1, steps - 2)
    estimates = [denoise(x, 1.0)]
    if steps == 1:
        return estimates[0]
    a, s = parts(-4)
    x = a * estimates[0] + s * x
    estimates = []
    for i in range(steps - 1):
        l = -4 + i * h
        a, s = parts(l)
        estimates.append(denoise(x, math.atan2(s, a) * 2 / math.pi))
        D = estimates[-1]
        if i > 0:
            D = 1.5 * estimates[-1] - 0.5 * estimates[-2]
        a_next, s_next = parts(l + h)
        x = s_next / s * x - a_next * (math.exp(-h) - 1) * D
    return estimates[-1]


@pytest.mark.parametrize("steps", [1, 3, 4, 10])
def test_the_solver_is_dpm_solver(steps):
    noise, times = torch.randn(50, dtype=torch.float64), []

    def denoise(x, t):
        times.append(t)
        return torch.sin(3 * x + t)
    expected = naive_dpm_solver(denoise, noise, steps)
    asked = times.copy()
    times.clear()
    assert same(model.dpm_solver(denoise, noise, steps), expected, 1e-6)
    assert same(times, asked, 1e-6) and len(times) == steps


def test_the_solver_recovers_gaussians():
    """For data N(m, d^2) the best x0 is known, and so is the flow: noise e ends at m + d e."""
    m, noise = 0.7, torch.randn(2000, 1, dtype=torch.float64)

    def error(d, steps):
        def denoise(x, t):
            a, s = parts_at(t)
            gain = a * d ** 2 / (a ** 2 * d ** 2 + s ** 2)
            return m + gain * (x - a * m)
        found = (model.dpm_solver(denoise, noise, steps) - m) / d
        return (found - noise).abs().mean().item()
    for d in (0.1, 0.4, 1, 3, 10):                          # from fine detail to brightness
        assert error(d, 10) < 0.06
    assert error(1, 40) < error(1, 10) / 10                 # first order would give a quarter
    assert abs(error(1, 1) - noise.abs().mean()) < 1e-9     # one step: x0 at t = 1 is the mean


def test_the_clamp_of_v_keeps_fine_detail():
    """Of data N(0, d^2) as fine as 0.05 the last x0 alone, the mean, would keep two thirds (at l = 3)."""
    noise = torch.randn(2000, 1, dtype=torch.float64)
    for d in (0.05, 0.1):
        def denoise(x, t):
            a, s = parts_at(t)
            x0 = a * d ** 2 / (a ** 2 * d ** 2 + s ** 2) * x
            v = (a * x - x0) / max(s, 0.05)                 # as DiT.forward
            return a * x - s * v
        assert same(model.dpm_solver(denoise, noise, 10).std() / noise.std(), d, 0.05 * d)


# ----------------------------------------------------------------------------------------- the training loops

def test_the_learning_rate_of_stage_1():
    """A warm-up; then a tenth at 46, 77 and 92 % of the run each."""
    steps = [0, 49, 99, 459, 460, 769, 770, 919, 920, 999]
    rates = [0.002, 0.1, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    for step, rate in zip(steps, rates, strict=True):
        assert same(fr_train.learning_rate(step, 1000, 100, 0.2), rate, 1e-9)


def test_stage_1_mirrors_half_of_the_images():
    x = torch.rand(1000, 1, 4, 4)
    out = fr_train.augment(x, p=0)
    kept = (out == x).all((1, 2, 3))
    mirrored = (out == x.flip(3)).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 450 < kept.sum() < 550


def alike(x, y, within=0.04):
    """Whether two samples of numbers are of one distribution, by three of their quantiles."""
    q = torch.tensor([0.1, 0.5, 0.9])
    return same(x.quantile(q), y.quantile(q), within)


def test_stage_1_blacks_out_all_but_a_box_as_adaface_does():
    """The box has a share of the image from 0.2 to 1 and a shape from 3:4 to 4:3, and lies anywhere."""
    count, side = 3000, 50
    x = torch.rand(count, 1, side, side)
    x = x.expand(-1, 3, -1, -1)
    some = (fr_train.augment(x) == -1).any(3).any(2).any(1)
    assert 0.16 < some.float().mean() < 0.22                # a fifth, but for boxes that are all of the image

    out = fr_train.augment(x, p=1)
    kept = out != -1
    rows, columns = kept[:, 0].any(2), kept[:, 0].any(1)
    box = rows[:, None, :, None] & columns[:, None, None, :]
    assert torch.equal(kept, box.expand_as(kept))
    unchanged = (out == x) | (out == x.flip(3))
    assert (unchanged | ~kept).all()
    starts = rows.float().diff(dim=1) > 0
    assert (starts.sum(1) <= 1).all()                       # in one piece

    area = torch.empty(count).uniform_(0.2, 1)
    shape = torch.empty(count).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    naive_tall = (area / shape).sqrt().clamp(max=1)
    naive_wide = (area * shape).sqrt().clamp(max=1)
    tall, wide = rows.sum(1) / side, columns.sum(1) / side
    assert alike(tall, naive_tall) and alike(wide, naive_wide)
    assert alike(tall * wide, naive_tall * naive_wide)
    assert alike(wide / tall, naive_wide / naive_tall)

    for lit, length in ((rows, tall), (columns, wide)):
        start = lit.float().argmax(1) / side
        roomy = length < 0.7
        place = start[roomy] / (1 - length[roomy])
        assert alike(place, torch.rand(3000), 0.08)

    roomy = (tall < 0.7) & (wide < 0.7)                     # how high says nothing of how far left
    top = rows.float().argmax(1) / side / (1 - tall)
    left = columns.float().argmax(1) / side / (1 - wide)
    pairs = torch.stack([top[roomy], left[roomy]])
    assert pairs.corrcoef()[0, 1].abs() < 0.15


def save_set(root, images, per_person, landmarks):
    """Writes images (M, 3, S, S) as a folder of people, and landmarks.csv."""
    names = [f"person {i // per_person}/{i % per_person}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(root / name)
    data.write_landmarks(root / "landmarks.csv", zip(names, landmarks * images.shape[2]))


TINY = dict(width=16, units=(1, 1, 1, 1), dropout=0.0)      # a recogniser of a unit a stage


def decayed_of(backbone, prototypes):
    """What decays: weights of convolutions and linear layers, and prototypes."""
    layers = [*backbone.modules(), *prototypes.modules()]
    layers = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [layer.weight for layer in layers] + [prototypes.real, prototypes.virtual]


def naive_stage_1(faces, net, k, batch, epochs, peak, scale, seed):
    """Backbone, prototypes, mean losses and lengths of the backbone's gradients after all epochs."""
    torch.manual_seed(seed)
    n = len(faces.people)
    backbone = Recogniser(size=faces.size, **net)
    backbone.to(memory_format=torch.channels_last)          # rounds as the script does
    prototypes = Prototypes(n, k, net["dim"])
    parameters = [*backbone.parameters(), *prototypes.parameters()]
    decayed = decayed_of(backbone, prototypes)
    others = [p for p in parameters if not any(p is q for q in decayed)]
    groups = [dict(params=decayed, weight_decay=5e-4), dict(params=others, weight_decay=0)]
    sgd = torch.optim.SGD(groups, momentum=0.9, fused=True)

    per_epoch = len(faces) // batch
    steps = epochs * per_epoch
    losses, lengths = [], []
    for step, (x, labels, _) in enumerate(data.batches(faces, batch, seed, 0, steps)):
        torch.manual_seed(seed * 1_000_003 + step)          # chance is each step's own
        f = backbone(fr_train.augment(x))
        b_virtual = model.virtual_batch_size(step, k, batch, n)
        ramp = min(1, step / (steps / 10))                  # the margin grows over a tenth of the run
        parts = model.vigface_loss(f, labels, prototypes, b_virtual, "adaface", ramp, scale)
        losses.append([part.item() for part in parts])

        sgd.zero_grad()
        sum(parts).backward()
        length = nn.utils.clip_grad_norm_(backbone.parameters(), 5)     # the prototypes' would dominate
        lengths.append(length.item())
        for group in sgd.param_groups:                      # the warm-up is one epoch
            group["lr"] = fr_train.learning_rate(step, steps, per_epoch, peak)
        sgd.step()
    return backbone.eval(), prototypes, np.mean(losses, axis=0), lengths


def test_stage_1_trains_as_this_loop_does(tmp_path, monkeypatch):
    save_set(tmp_path / "faces", random_images(18, 32), 4, torch.rand(18, 5, 2))        # the last has two
    net = dict(dim=8) | TINY
    recipe = dict(epochs=4, batch=9, scale=6.0, net=net)
    monkeypatch.setitem(model.RECOGNISERS, "tiny", recipe)
    monkeypatch.setattr(fr_train, "autocast", contextlib.nullcontext)
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)
    flags = "--data faces --virtual 4 --batch 4 --epochs 5 --lr 25.6 --head adaface --seed 3"
    printed = here("fr_train.py", *flags.split(), cwd=tmp_path)
    tensors, meta = model.load_model(tmp_path / "runs/fr", "fr")
    assert meta["names"] == [f"person {i}" for i in range(5)]

    faces = data.Faces([tmp_path / "faces"])
    peak = 25.6 * 4 / 512                                   # in proportion to the batch
    expected = naive_stage_1(faces, net, k=4, batch=4, epochs=5, peak=peak, scale=6.0, seed=3)
    backbone, prototypes, losses, lengths = expected
    assert min(lengths) < 5 < max(lengths)                  # clipping matters at times
    for name, expected in backbone.state_dict().items():
        assert same(tensors[f"backbone.{name}"], expected), name
    state = prototypes.state_dict()
    for name in ("real", "virtual", "certainty.weight", "sigma2", "norm_mean", "norm_std"):
        assert same(tensors[f"prototypes.{name}"], state[name]), name
    for word, loss in zip(("real", "virtual", "certainty"), losses):
        assert f"{word} {loss:.3f}" in printed

    # At the end, virtual prototypes settle, given all embeddings of all faces.
    f = model.embed(backbone, images_of(faces))
    prototypes.settle(moment_of_people(f, faces.labels))
    _, saved, _ = model.load_recogniser(tmp_path / "runs/fr")
    assert same(saved.to_draw(), prototypes.to_draw(), 1e-4)


def test_free_prototypes_are_drawn_as_they_were_trained(tmp_path, monkeypatch):
    save_set(tmp_path / "faces", random_images(8, 32), 2, torch.rand(8, 5, 2))
    recipe = dict(epochs=1, batch=4, scale=6.0, net=dict(dim=8) | TINY)
    monkeypatch.setitem(model.RECOGNISERS, "tiny", recipe)
    for name, flags in (("paper", ["--paper"]), ("ours", [])):
        here("fr_train.py", "--data", "faces", "--epochs", 1, "--out", name, *flags, cwd=tmp_path)
        _, prototypes, _ = model.load_recogniser(tmp_path / name)
        left = same(prototypes.to_draw()[4:], unit(prototypes.virtual))
        assert left == (name == "paper") == (not prototypes.settled.any())
    nobody = "--data faces --epochs 1 --virtual 0"          # neither settles, nor has room for anybody
    assert "room" not in here("fr_train.py", *nobody.split(), cwd=tmp_path)


@pytest.mark.parametrize("paper", [False, True])
def test_stage_1_tells_how_near_virtual_prototypes_are_to_real_ones(paper):
    prototypes = randomise(Prototypes(7, 5, 4, paper=paper))
    prototypes.settle(torch.eye(4) / 4)
    trained, drawn = prototypes.unit().tolist(), prototypes.to_draw().tolist()
    real = drawn[:7]

    def numbers(people):
        """Mean, 99 % and largest, of the cosines to the nearest of other real prototypes."""
        cosines = [max(np.dot(w, other) for other in real if other != w) for w in people]
        return [np.mean(cosines), np.quantile(cosines, 0.99), max(cosines)]
    line = fr_train.room(prototypes)
    for title, people in (("real people", real), ("as trained", trained[7:]), ("as drawn", drawn[7:])):
        found = re.search(rf"{title} (\S+) / (\S+) / (\S+)", line).groups()
        assert same([*map(float, found)], numbers(people), 6e-4), title


def test_stage_1_tells_mean_losses_since_the_last_line(tmp_path, monkeypatch):
    """Here after 100 and after 120 steps, with the accuracy on the benchmarks that lie beside the data."""
    save_set(tmp_path / "faces", random_images(8, 32), 2, torch.rand(8, 5, 2))
    pairs = random_images(40, 32).view(20, 2, 3, 32, 32)
    toys.write_bin(tmp_path / "faces/pairs.bin", pairs, 20, torch.Generator())
    recipe = dict(epochs=1, batch=4, scale=6.0, net={})
    monkeypatch.setitem(model.RECOGNISERS, "tiny", recipe)
    monkeypatch.setattr(fr_train, "Recogniser", Linear)
    monkeypatch.setattr(fr_train, "verification", lambda *_: {"accuracy": 0.75, "std": 0.1})
    count = itertools.count(1)

    def losses(f, *_, **options):
        nothing = 0 * f.sum()
        return nothing + next(count), nothing + 2, nothing + 3
    monkeypatch.setattr(fr_train, "vigface_loss", losses)
    here("fr_train.py", "--data", "faces", "--epochs", 60, cwd=tmp_path)
    *lines, room = (tmp_path / "runs/fr/log.txt").read_text().splitlines()
    assert room.startswith("room: ")
    for line, epoch, real in zip(lines, (50, 60), (50.5, 110.5), strict=True):
        assert line.startswith(f"epoch {epoch}/60 ")
        assert f"real {real:.3f} virtual 2.000 certainty 3.000  pairs 75.00%" in line
    _, meta = model.load_model(tmp_path / "runs/fr", "fr")
    assert meta["val"] == [f"{tmp_path}/faces/pairs.bin"] and meta["data"] == [f"{tmp_path}/faces"]


def test_real_faces_are_embedded_batch_by_batch(monkeypatch):
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)
    images, labels = random_images(7), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    faces, backbone, prototypes = Counted(3, 7, 4), Linear(), randomise(Prototypes(3, 8, 6))
    faces.labels = labels
    faces.scan = lambda indices, title: [(images[some], some) for some in indices.flip(0).split(3)]
    with torch.no_grad():
        seen = evaluate.embed_faces(backbone, prototypes, faces)
    assert seen.index.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert same(seen.f, model.embed(backbone, images)[seen.index])
    assert torch.equal(seen.labels, labels[seen.index])


def test_norms_biases_and_prelu_do_not_decay():
    backbone, prototypes = Recogniser(size=32, dim=8, **TINY), Prototypes(3, 2, 8)
    parameters = [*backbone.parameters(), *prototypes.parameters()]
    optimizer = fr_train.make_optimizer(parameters)
    decay = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            decay[id(p)] = group["weight_decay"]
    assert len(decay) == len(parameters)
    decayed = {id(p) for p in decayed_of(backbone, prototypes)}
    for p in parameters:
        assert decay[id(p)] == (5e-4 if id(p) in decayed else 0)


def test_landmarks_are_mirrored_with_their_image():
    """What was the left eye, as the viewer sees it, is the right one of the mirror image."""
    x, landmarks = torch.rand(400, 3, 6, 6), torch.rand(400, 5, 2)
    out, points = dit_train.mirror(x, landmarks)
    flipped = 0
    for i in range(400):
        if torch.equal(out[i], x[i]):
            assert torch.equal(points[i], landmarks[i])
            continue
        flipped += 1
        assert torch.equal(out[i], x[i].flip(2))
        left_eye, right_eye, nose, left_mouth, right_mouth = landmarks[i].tolist()
        mirrored = [right_eye, left_eye, nose, right_mouth, left_mouth]
        assert same(points[i], [[1 - a, b] for a, b in mirrored])
    assert 160 < flipped < 240


def test_mirrored_twice_is_as_before(monkeypatch):
    x = torch.zeros(1, 3, 8, 8)
    landmarks = torch.rand(1, 5, 2)
    a, b = landmarks[0, 0] * 8                              # a white pixel at the left eye
    x[0, :, int(b), int(a)] = 1
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(shape))
    once, points = dit_train.mirror(x, landmarks)
    a, b = points[0, 1] * 8                                 # is now at the right one
    assert once[0, 0, int(b), int(a)] == 1
    twice, points = dit_train.mirror(once, points)
    assert torch.equal(twice, x) and same(points, landmarks)


def tiny_recogniser(folder, names, size=16, virtual=None, **meta):
    """Saves a recogniser that knows these people and as many virtual ones, if not told otherwise."""
    virtual = len(names) if virtual is None else virtual
    backbone = randomise(Recogniser(size=size, dim=6, **TINY))
    prototypes = randomise(Prototypes(len(names), virtual, 6))
    if virtual:
        prototypes.settle(torch.eye(6) / 6)
    tensors = {"backbone": backbone.state_dict(), "prototypes": prototypes.state_dict()}
    meta |= dict(names=names, val=[], prototypes=prototypes.config)
    (Path(folder) / "model.safetensors").unlink(missing_ok=True)
    model.save_model(folder, "fr", backbone.config, tensors, **meta)
    return backbone.eval().requires_grad_(False), prototypes.requires_grad_(False)


def naive_stage_2(faces, sizes, backbone, own_w, steps, batch, peak, seed):
    """The DiT, its average over steps, and the losses of all steps."""
    torch.manual_seed(seed)
    dit = DiT(faces.size, own_w.shape[1], 8, **sizes)
    parameters = [*dit.parameters()]
    average = [p.detach().clone() for p in parameters]
    keep = min(0.9999, steps / (steps + 20))
    adam = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    losses = []
    for step, (x, labels, landmarks) in enumerate(data.batches(faces, batch, seed, 0, steps)):
        torch.manual_seed(seed * 1_000_003 + step)
        x, landmarks = dit_train.mirror(x, landmarks)
        w = torch.stack([own_w[label] for label in labels.tolist()])
        v_loss, identity_loss = model.dit_loss(dit, backbone, x, w, landmarks)
        adam.zero_grad()
        (v_loss + 0.1 * identity_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1)
        warm_up = (step + 1) / (0.02 * steps)
        decay = (steps - step) / (0.98 * steps)
        adam.param_groups[0]["lr"] = peak * min(warm_up, decay)
        adam.step()
        for old, p in zip(average, parameters):
            old.mul_(keep).add_((1 - keep) * p.data)
        losses.append([v_loss.item(), identity_loss.item()])
    return dit, average, np.array(losses)


def test_stage_2_trains_as_this_loop_does(tmp_path, monkeypatch):
    """It saves the averaged network, of which previews are drawn, and the poses."""
    save_set(tmp_path / "faces", random_images(12, 16), 3, torch.rand(12, 5, 2))
    names = ["stranger", *(f"person {i}" for i in (2, 0, 3, 1))]        # rows of W are not labels
    backbone, prototypes = tiny_recogniser(tmp_path / "runs/fr", names, data=["faces"])
    sizes = dict(width=16, depth=1, heads=2)
    monkeypatch.setitem(model.DIT_SIZES, "Ti", sizes)
    monkeypatch.setattr(dit_train, "autocast", contextlib.nullcontext)
    previews = []

    def preview(path, dit, backbone, *given, **options):
        assert not any(p.requires_grad for p in dit.parameters())
        drawn = [p.clone() for p in dit.parameters()]
        previews.append((path.name, drawn, given))
        return torch.tensor([[0.25, 0.35]] * 4 + [[0.65, 0.85]] * 4)
    monkeypatch.setattr(dit_train, "preview", preview)
    steps, seed, lr = 28, 5, 0.01                           # the last line is of three steps
    flags = f"--steps {steps} --batch 5 --lr {lr} --seed {seed}"
    printed = here("dit_train.py", *flags.split(), cwd=tmp_path)

    faces, W = data.Faces([tmp_path / "faces"]), prototypes.to_draw()
    own_w = W[[names.index(name) for name in faces.people]]
    dit, average, losses = naive_stage_2(faces, sizes, backbone, own_w, steps, 5, lr, seed)
    tensors, meta = model.load_model(tmp_path / "runs/dit", "dit")
    assert meta["fr_sha256"] == model.digest(tmp_path / "runs/fr")
    assert meta["data"] == faces.digest()                   # which says neither where they are, nor who
    for (name, _), mean in zip(dit.named_parameters(), average):
        assert same(tensors[f"dit.{name}"], mean), name
    assert torch.equal(tensors["poses.landmarks"], faces.landmarks)

    names = [name for name, _, _ in previews]
    assert names == [f"preview-{step:06d}.jpg" for step in (5, 10, 15, 20, 25, 28)]
    _, drawn, (w, poses, seen_seed, real) = previews[-1]
    assert all(map(same, drawn, average))
    assert torch.equal(w, W[[0, 1, 2, 3, 5, 6, 7, 8]]) and real == 4    # four of each; the real are not shown
    assert torch.equal(poses, faces.landmarks) and seen_seed == seed
    lines = [line for line in printed.splitlines() if "loss v" in line]
    for i, line in enumerate(lines):
        v, identity = losses[5 * i:5 * i + 5].mean(0)
        found = re.search(r"v (\S+) identity (\S+)", line).groups()
        assert same([*map(float, found)], [v, identity], 1e-3)
    assert "real 0.300 virtual 0.750" in printed and len(lines) == 6


def train_as_rank(rank, world, port, cwd, flags, stop):
    """Runs dit_train.py in this process as one of several ranks; writes what it trained and its seeds. The
    last rank is sent SIGTERM in a step.
    """
    for module in (model, data, dit_train):
        module.RANK, module.WORLD = rank, world
    model.PROCESS = f"rank-{rank}"                  # a fork would have its parent's
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=world)
    os.environ |= {name: str(value) for name, value in where.items()}
    kept, seeds = [], []
    shared = dit_train.shared
    dit_train.shared = lambda module: kept.append(module) or shared(module)

    def loss(dit, backbone, x, w, landmarks, **options):
        """No chance: what ranks draw differs."""
        seeds.append(torch.initial_seed())
        assert len(x) == 6 // world
        if len(seeds) == stop and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        v = dit(x, torch.full((len(x),), 0.5), w, landmarks)
        return (v - x).square().mean(), v.square().mean()
    dit_train.dit_loss = loss
    dit_train.mirror = lambda x, landmarks: (x, landmarks)
    printed = here("dit_train.py", *flags, cwd=cwd, code=143 if stop else 0)
    torch.save((kept[0].state_dict(), seeds, printed), cwd / f"{world}-{rank}.pt")


def train_as_ranks(world, cwd, *flags, stop=None):
    """Runs dit_train.py as several ranks; what each trained, its seeds, and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes = forked(train_as_rank, *((rank, world, port, cwd, flags, stop) for rank in range(world)))
    assert codes == [0] * world
    return [torch.load(cwd / f"{world}-{rank}.pt") for rank in range(world)]


def test_ranks_train_one_network_as_one_rank_does(tmp_path, monkeypatch):
    """They share each batch; gradients and losses are means over the whole batch."""
    save_set(tmp_path / "faces", random_images(12, 16), 3, torch.rand(12, 5, 2))
    tiny_recogniser(tmp_path / "runs/fr", [f"person {i}" for i in range(4)], data=["faces"])
    monkeypatch.setitem(model.DIT_SIZES, "Ti", dict(width=16, depth=1, heads=2))
    monkeypatch.setattr(dit_train, "autocast", contextlib.nullcontext)
    monkeypatch.setattr(dit_train, "preview", lambda *_: torch.zeros(8, 8))
    flags = ["--steps", 5, "--batch", 6, "--out"]
    (alone, seeds, printed), = train_as_ranks(1, tmp_path, *flags, "one")
    (first, seeds_0, printed_0), (second, seeds_1, printed_1) = train_as_ranks(2, tmp_path, *flags, "two")
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]) and same(first[name], tensor, 1e-4), name
    log = (tmp_path / "one/log.txt").read_text()
    assert log == (tmp_path / "two/log.txt").read_text()
    assert "loss v" in printed_0 and "loss v" not in printed_1
    assert seeds == seeds_0 and not {*seeds_0} & {*seeds_1} and len({*seeds_1}) == 5

    # A signal to one of the ranks ends both after the same step; both continue.
    train_as_ranks(2, tmp_path, *flags, "stopped", stop=3)
    train_as_ranks(2, tmp_path, *flags, "stopped")
    assert model.digest(tmp_path / "stopped") == model.digest(tmp_path / "two")
    assert log == (tmp_path / "stopped/log.txt").read_text()

    said = here("dit_train.py", *flags, "two", cwd=tmp_path, code=2)
    assert "ranks = 2, now 1" in said
    monkeypatch.setattr(dit_train, "WORLD", 4)
    assert "multiple of 4" in here("dit_train.py", *flags, "new", cwd=tmp_path, code=2)


def interrupting(monkeypatch, module, function, count, number=signal.SIGTERM):
    """Sends this process a signal at the count-th call of a function."""
    calls, call = itertools.count(1), getattr(module, function)

    def spy(*args, **options):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return call(*args, **options)
    monkeypatch.setattr(module, function, spy)


def test_a_stopped_stage_1_continues_to_the_same_bytes(tmp_path, monkeypatch):
    """After the step that is running, be it the last one, which settles the virtual prototypes."""
    save_set(tmp_path / "faces", random_images(8, 32), 2, torch.rand(8, 5, 2))
    recipe = dict(epochs=6, batch=4, scale=6.0, net=dict(dim=8) | TINY)
    monkeypatch.setitem(model.RECOGNISERS, "tiny", recipe)
    command = ["fr_train.py", "--data", "faces", "--epochs", 6, "--seed", 10 ** 20, "--out"]

    def ended(name):
        """Gives the command once more; what it left."""
        here(*command, name, cwd=tmp_path)
        return [(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "log.txt")]
    whole = ended("whole")
    for step in (7, 12):
        with monkeypatch.context() as patch:
            interrupting(patch, fr_train, "vigface_loss", step)
            assert "same command continues" in here(*command, step, cwd=tmp_path, code=143)
        assert torch.load(tmp_path / f"{step}/state.pt")["step"] == step
        assert ended(f"{step}") == whole

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(fr_train, "person_moment", fails)
        ended("failed")
    assert torch.load(tmp_path / "failed/state.pt")["step"] == 12       # what is left is done again
    assert ended("failed") == whole
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_second_signal_ends_a_run_at_once():
    def train(numbers):
        steps = model.until_stopped(range(9), print)
        next(steps)
        for number in numbers:
            os.kill(os.getpid(), number)
        os._exit(7)                                         # the step ends
    for numbers, code in (([2], 7), ([15], 7), ([2, 2], 130), ([15, 15], 143), ([2, 15], 143)):
        assert forked(train, [numbers]) == [code]


def test_stage_1_uses_one_gpu_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(fr_train, "WORLD", 2)
    assert "uses one GPU" in here("fr_train.py", cwd=tmp_path, code=2)
    assert not contents(tmp_path)


def test_a_saved_recogniser_comes_back_frozen(tmp_path, capsys):
    saved, prototypes = tiny_recogniser(tmp_path, ["ann", "bob"], data=[])
    backbone, loaded, meta = model.load_recogniser(tmp_path)
    assert meta["names"] == ["ann", "bob"]
    written = (tmp_path / "model.safetensors").read_bytes()
    assert meta["sha256"] == model.digest(tmp_path) == hashlib.sha256(written).hexdigest()
    assert torch.equal(loaded.to_draw(), prototypes.to_draw())
    x = torch.randn(2, 3, 16, 16)
    assert same(backbone(x), saved(x))                      # in evaluation mode
    parameters = [*backbone.parameters(), *loaded.parameters()]
    assert not any(p.requires_grad for p in parameters)
    assert "from fr_train.py" in stops(capsys, model.load_model, tmp_path, "dit")


class Counted:
    """Faces of which only the numbers matter."""

    def __init__(self, people, images, size):
        self.people, self.images, self.size = range(people), images, size

    def __len__(self):
        return self.images


def filled_in(script, faces, *flags):
    """The flags of a training script, after it has filled in those that were left out."""
    args = script.parser.parse_args([*flags])
    script.fill_in(args, Counted(*faces))
    return args


@pytest.mark.parametrize("faces, flags, arch, batch, epochs, virtual", [
    ((50, 4000, 64), "", "tiny", 128, 41, 50),              # 1,250 steps of 31 an epoch
    ((50, 400_000, 80), "", "ir_se50", 512, 26, 50),
    ((3, 20, 64), "", "tiny", 20, 1250, 3),                 # no batch is larger than the set
    ((50, 4000, 64), "--arch small --batch 16 --epochs 2 --virtual 0", "small", 16, 2, 0)])
def test_stage_1_fills_in_what_was_left_out(faces, flags, arch, batch, epochs, virtual):
    args = filled_in(fr_train, faces, *flags.split())
    assert args.size == faces[2] and args.arch == arch and args.batch == batch
    assert args.epochs == epochs and args.virtual == virtual


@pytest.mark.parametrize("faces, flags, said", [
    ((2, 9, 40), "", "multiple of 16"),
    ((2, 9, 16), "", "32 or more"),
    ((1, 9, 32), "", "2 or more"),
    ((2, 9, 32), "--batch 1", "2 or more"),
    ((2, 9, 32), "--virtual -1", "0 or more")])
def test_stage_1_refuses_flags_that_make_no_sense(capsys, faces, flags, said):
    assert said in stops(capsys, filled_in, fr_train, faces, *flags.split())


@pytest.mark.parametrize("faces, flags, arch, steps, batch, lr", [
    ((9, 400, 64), "", "Ti/8", 1100, 32, 2e-3),
    ((9, 400, 80), "", "B/8", 200_000, 256, 2e-4),
    ((9, 20, 64), "", "Ti/8", 1100, 20, 2e-3),              # no batch is larger than the set
    ((9, 400, 112), "--arch Ti/4", "Ti/4", 1100, 32, 2e-3),
    ((9, 400, 64), "--arch S/4 --steps 7 --batch 9 --lr 0.5", "S/4", 7, 9, 0.5)])
def test_stage_2_fills_in_what_was_left_out(faces, flags, arch, steps, batch, lr):
    args = filled_in(dit_train, faces, *flags.split())
    assert args.seed < 2 ** 40
    assert args.arch == arch and args.steps == steps and args.batch == batch and args.lr == lr


def claimed(out, roots=(), stage="fr", **flags):
    """Claims a folder for a run with some flags, on faces in `roots` that are always the same."""
    faces = SimpleNamespace(roots=roots, digest=lambda: "two faces")
    model.claim(out, stage, Namespace(out=out, data=["faces"], **flags), faces, val=None)


def test_a_folder_belongs_to_one_run(tmp_path, monkeypatch, capsys):
    used = tmp_path / "used"
    for name in ("used", "used", "empty", "begun"):         # anew, once more, empty, killed at the start
        if name in ("empty", "begun"):
            (tmp_path / name).mkdir()
        if name == "begun":
            (tmp_path / "begun/.run.1a2b3c4d.tmp").touch()
        claimed(tmp_path / name, steps=3, val="x")
        settings = json.loads((tmp_path / name / "run.json").read_text())
        assert settings == dict(stage="fr", out=None, data="two faces", steps=3, val=None)
    said = stops(capsys, lambda: claimed(used, steps=4))
    assert "steps = 3, now 4" in said and "longer" in said
    assert "lr = None, now 1" in stops(capsys, lambda: claimed(used, steps=3, lr=1))
    assert "stage = fr, now dit" in stops(capsys, lambda: claimed(used, stage="dit", steps=3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").touch()
    assert "something else" in stops(capsys, claimed, tmp_path / "other")

    def fails(path):
        raise OSError("a disk that is for reading only")
    monkeypatch.setattr(model, "replacing", fails)
    with pytest.raises(OSError, match="reading only"):      # said before a run continues
        claimed(used, steps=3)


def test_a_run_lies_outside_of_its_data(tmp_path, monkeypatch, capsys):
    """There, previews and verdicts would become people."""
    monkeypatch.chdir(tmp_path)
    Path("faces").mkdir()
    Path("link").symlink_to("faces")
    for out in ("faces", "faces/runs/fr", "link/fr", f"{tmp_path}/faces/fr"):
        said = stops(capsys, claimed, out, ["others", "faces"])
        assert f"--out {out}: lies in faces" in said
    assert not list(Path("faces").iterdir())
    claimed("faces2/fr", ["faces"])


def test_a_finished_model_is_left_alone(tmp_path, capsys):
    """By the same command, also without its state, and by other processes."""
    claimed(tmp_path / "run")
    tiny_recogniser(tmp_path / "run", ["ann"], data=[])
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        claimed(tmp_path / "run")
    assert stop.value.code == 0 and "is finished" in capsys.readouterr().out
    said = stops(capsys, model.save_model, tmp_path / "run", "fr", {}, {})
    assert "another process" in said
    (tmp_path / "run/run.json").unlink()
    assert "something else" in stops(capsys, claimed, tmp_path / "run")
    del before["run/run.json"]
    assert before == contents(tmp_path)


def test_a_killed_run_gets_back_its_step_its_modules_and_its_log(tmp_path, capsys):
    assert model.resume(tmp_path, {}) == 0                  # nothing is saved yet
    saved, other = nn.Linear(2, 3), nn.Linear(2, 3)
    model.save_state(tmp_path, 7, {"net": saved, "optimizer": other})
    one, two = nn.Linear(2, 3), nn.Linear(2, 3)
    assert model.resume(tmp_path, {"net": one, "optimizer": two}) == 7
    assert torch.equal(one.weight, saved.weight) and torch.equal(two.bias, other.bias)
    model.log(tmp_path, "step 7")
    model.log(tmp_path, "step 8")
    assert (tmp_path / "log.txt").read_text() == "step 7\nstep 8\n"
    said = capsys.readouterr().out
    assert "after step 7" in said and said.endswith("step 7\nstep 8\n")


def test_a_state_runs_nothing(tmp_path, capsys):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)
    torch.save({"step": Program()}, tmp_path / "state.pt")
    stops(capsys, model.resume, tmp_path, {})
    assert not (tmp_path / "made").exists()


def test_a_run_continues_with_its_data_wherever_they_lie(tmp_path, monkeypatch):
    folder(tmp_path / "faces", 4, 2)
    recipe = dict(epochs=1, batch=4, scale=6.0, net=dict(dim=8) | TINY)
    monkeypatch.setitem(model.RECOGNISERS, "tiny", recipe)
    monkeypatch.setitem(model.DIT_SIZES, "Ti", dict(width=16, depth=1, heads=2))
    monkeypatch.setattr(dit_train, "preview", lambda *_: torch.zeros(8, 8))
    pairs = random_images(40, 32).view(20, 2, 3, 32, 32)
    toys.write_bin(tmp_path / "pairs.bin", pairs, 20, torch.Generator())
    save_state = model.save_state

    def spy(out, step, modules):                            # is never newer than the log
        assert len((out / "log.txt").read_text().splitlines()) == 1
        save_state(out, step, modules)
    for script in (fr_train, dit_train):
        monkeypatch.setattr(script, "save_state", spy)
    commands = [("fr_train.py --virtual 3 --epochs 1", "--val pairs.bin"),
                ("dit_train.py --fr fr_train.py --arch Ti/4 --steps 1 --batch 4", "--weights other")]
    for command, _ in commands:                             # the folder is named after the script
        name, *flags = command.split()
        here(name, *flags, "--data", "faces", "--out", name, cwd=tmp_path)
        settings = (tmp_path / name / "run.json").read_text()
        assert "8 images of 4 people" in settings and "faces" not in settings
    saved, _ = model.load_model(tmp_path / "dit_train.py", "dit")
    assert len(saved["dit.position"]) == 64                 # Ti/4 has tokens of 4 x 4 pixels

    (tmp_path / "faces").rename(tmp_path / "elsewhere")
    for command, harmless in commands[::-1]:
        name, *flags = command.split()
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
        again = [name, *flags, "--data", "./elsewhere", "--out", f"moved-{name}", *harmless.split()]
        assert "finished" in here(*again, cwd=tmp_path)
        assert "--data" in here(*again, "--data", "faces", cwd=tmp_path, code=2)
        (tmp_path / f"moved-{name}").rename(tmp_path / name)

    (tmp_path / "fr_train.py").rename(tmp_path / "renamed")             # it is the same recogniser
    name, *flags = commands[1][0].split()
    again = [name, *flags, "--out", name, "--data", "elsewhere"]
    assert "finished" in here(*again, "--fr", "renamed", cwd=tmp_path)
    (tmp_path / "renamed").rename(tmp_path / "fr_train.py")

    def refused():
        for command, _ in commands:
            name, *flags = command.split()
            again = [name, *flags, "--data", "elsewhere", "--out", name]
            assert "data = 8 images of 4 people" in here(*again, cwd=tmp_path, code=2)
    image = (tmp_path / "elsewhere/person 0/0.png")
    content = image.read_bytes()
    image.write_bytes(content + b" ")                       # another file of the same name
    refused()
    image.unlink()                                          # one less
    refused()
    image.write_bytes(content)
    (tmp_path / "elsewhere/person 3").rename(tmp_path / "elsewhere/a")  # labels move
    name, *flags = commands[0][0].split()
    assert "data =" in here(name, *flags, "--data", "elsewhere", "--out", name, cwd=tmp_path, code=2)


def test_stage_2_draws_in_the_size_of_its_recogniser(tmp_path, monkeypatch):
    """Also where nobody is virtual; a preview then shows four real people or fewer."""
    save_set(tmp_path / "faces", random_images(6, 32), 2, torch.rand(6, 5, 2))
    names = [f"person {i}" for i in range(3)]
    tiny_recogniser(tmp_path / "runs/fr", names, virtual=0, data=["faces"])
    monkeypatch.setitem(model.DIT_SIZES, "Ti", dict(width=16, depth=1, heads=2))
    numbered = lambda path, dit, backbone, w, *_: torch.arange(float(len(w)))[:, None].repeat(1, 8)
    monkeypatch.setattr(dit_train, "preview", numbered)
    said = here("dit_train.py", "--steps", 1, "--batch", 4, cwd=tmp_path)
    assert "own cosine real 1.000\n" in said
    _, meta = model.load_model(tmp_path / "runs/dit", "dit")
    assert meta["config"]["size"] == 16

    rows = data.read_csv(tmp_path / "faces/landmarks.csv")
    data.write_csv(tmp_path / "faces/landmarks.csv", rows[0], rows[1:-1])
    asked = []

    def complete(faces, out, weights):                      # a single face lacks landmarks
        asked.append((out.name, weights, faces.landmarks.isnan().any(2).any(1).tolist()))
        faces.landmarks[-1] = data.TEMPLATE
    monkeypatch.setattr(retinaface, "complete_landmarks", complete)
    tiny_recogniser(tmp_path / "runs/fr", names, virtual=2, data=["faces"])
    said = here(*"dit_train.py --steps 1 --batch 4 --out new --weights file".split(), cwd=tmp_path)
    assert "own cosine real 1.000 virtual 3.500\n" in said
    assert asked == [("new", "file", [False] * 5 + [True])]

    tiny_recogniser(tmp_path / "nobody", [], data=[])       # like published weights
    assert "--data" in here("dit_train.py", "--fr", "nobody", cwd=tmp_path, code=2)
    said = here("dit_train.py", "--fr", "nobody", "--data", "faces", cwd=tmp_path, code=2)
    assert "3 people have no prototype" in said
    tiny_recogniser(tmp_path / "others", names[1:], data=["faces"])
    said = here("dit_train.py", "--fr", "others", cwd=tmp_path, code=2)
    assert "1 people have no prototype, such as person 0" in said


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("before")
    with pytest.raises(OSError, match="kept.txt: cannot be written"):
        with model.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("the disk is full")
    assert contents(tmp_path) == {"kept.txt": b"before"}


def test_a_run_stops_at_a_loss_that_is_not_a_number(tmp_path, monkeypatch):
    """What was saved before stays; here that is nothing."""
    save_set(tmp_path / "faces", random_images(8, 32), 2, torch.rand(8, 5, 2))
    broken = lambda f, *_, **options: (f.sum() * torch.nan, f.sum(), f.sum())
    monkeypatch.setattr(fr_train, "vigface_loss", broken)
    printed = here("fr_train.py", "--data", "faces", "--epochs", 1, "--batch", 4, cwd=tmp_path, code=2)
    assert "lower --lr" in printed and not (tmp_path / "runs/fr/model.safetensors").exists()

    tiny_recogniser(tmp_path / "runs/fr", [f"person {i}" for i in range(4)], size=32, data=["faces"])
    broken = lambda dit, *_, **options: (dit.patch_in.bias.sum() * torch.nan, torch.zeros(()))
    monkeypatch.setattr(dit_train, "dit_loss", broken)
    printed = here("dit_train.py", "--steps", 1, "--batch", 4, cwd=tmp_path, code=2)
    assert "lower --lr" in printed and not (tmp_path / "runs/dit/model.safetensors").exists()


def test_only_long_runs_are_compiled(monkeypatch, capsys):
    net = nn.Linear(2, 2)
    assert model.compiled(net, 100_000) is net
    monkeypatch.setattr(torch, "compile", lambda module: ("compiled", module))
    monkeypatch.setattr(torch, "sin", lambda x: x)
    assert model.compiled(net, 10_000_000) is net           # a tuple cannot be called: no compiler works
    assert "running without it" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda module: lambda x: module(x))
    assert model.compiled(net, 10_000_000) is not net


def test_previews_show_people_in_the_same_poses(tmp_path, monkeypatch):
    asked = []

    def guided(dit, w, landmarks, guidance=1.0):
        asked.append([dit, w, landmarks, guidance])
        return lambda x, t: x

    def solver(denoise, noise, steps):
        asked[-1] += [noise, steps]
        return noise.clamp(-1, 1)
    monkeypatch.setattr(dit_train, "guided", guided)
    monkeypatch.setattr(dit_train, "dpm_solver", solver)
    monkeypatch.setattr(dit_train, "autocast", contextlib.nullcontext)
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)
    shown, save_image = [], dit_train.save_image
    spy = lambda images, *given, **options: shown.append(images) or save_image(images, *given, **options)
    monkeypatch.setattr(dit_train, "save_image", spy)
    dit, backbone = SimpleNamespace(size=4), Linear()
    people, landmarks = units(7, 6), torch.rand(30, 5, 2)
    path = tmp_path / "preview.jpg"
    with torch.no_grad():
        cosines = dit_train.preview(path, dit, backbone, people, landmarks, 7)
    seen, w, poses, guidance, noise, steps = asked[0]
    assert seen is dit and guidance == 2 and steps == 10

    # Eight pictures of each, rows of one person, columns of one pose.
    assert same(w, people.repeat_interleave(8, 0))
    assert torch.equal(poses, poses[:8].repeat(7, 1, 1))
    assert len(poses.unique(dim=0)) > 4
    for pose in poses[:8]:
        assert (landmarks == pose).all((1, 2)).any()
    assert len(noise.unique(dim=0)) == 56 and normal(noise, 0.1)
    with Image.open(path) as image:
        assert image.size == (8 * 5 + 1, 7 * 5 + 1)
        assert np.asarray(image).max() > 200                # as bright as what was drawn

    images = model.to_uint8(noise.clamp(-1, 1))
    f = unit(naive_embed(backbone, images))
    for person, own in enumerate(cosines):
        own_f = f[8 * person:8 * person + 8]
        assert same(own, own_f @ people[person])

    before = path.read_bytes()
    with torch.no_grad():
        dit_train.preview(path, dit, backbone, people, landmarks, 7)
        assert path.read_bytes() == before                  # steps compare: one noise for all
        dit_train.preview(path, dit, backbone, people, landmarks, 8)
        assert path.read_bytes() != before

        # Real people are measured, but not shown.
        found = dit_train.preview(path, dit, backbone, people, landmarks, 7, real=4)
        assert torch.equal(found, cosines) and torch.equal(shown[-1], shown[0][4 * 8:])
        path.unlink()
        found = dit_train.preview(path, dit, backbone, people, landmarks, 7, real=7)
        assert torch.equal(found, cosines) and not path.exists()


# --------------------------------------------------------------------------------------------------- sampling

def drawn(monkeypatch, jobs, W, poses, **flags):
    """What `draw` asks of the DiT, and the noise that it starts from, which stands in for the pictures."""
    asked = {}

    def guided(dit, w, landmarks, guidance=1.0):
        asked.update(dit=dit, w=w, landmarks=landmarks, guidance=guidance)

    def solver(denoise, noise, steps):
        asked.update(noise=noise, steps=steps)
        return noise.clamp(-1, 1)
    monkeypatch.setattr(sample, "guided", guided)
    monkeypatch.setattr(sample, "dpm_solver", solver)
    args = Namespace(**dict(batch=4, seed=0, guidance=1.0, steps=6) | flags)
    asked["images"] = sample.draw(SimpleNamespace(size=16), W, poses, jobs, args)
    return asked


def test_a_picture_follows_from_seed_person_index_and_attempt_alone(monkeypatch):
    W, poses = units(9, 6), torch.rand(20, 5, 2)
    jobs = [sample.Job(3, "one", index=0, attempt=0, pose=5),
            sample.Job(8, "other", index=0, attempt=0, pose=5),
            sample.Job(3, "one", index=1, attempt=0, pose=7),
            sample.Job(3, "one", index=0, attempt=1, pose=5)]
    asked = drawn(monkeypatch, jobs, W, poses, guidance=2.5)
    assert asked["guidance"] == 2.5 and asked["steps"] == 6
    assert torch.equal(asked["w"], W[[3, 8, 3, 3]])
    assert torch.equal(asked["landmarks"], poses[[5, 5, 7, 5]])
    noise = asked["noise"]
    assert noise.shape == (4, 3, 16, 16) and normal(noise, 0.05)
    assert len(noise.unique(dim=0)) == 4                    # other people, pictures, attempts: other noise
    assert torch.equal(asked["images"], model.to_uint8(noise))

    # Neither the batch nor the place in it matters.
    alone = drawn(monkeypatch, jobs[2:3] * 2, W, poses)
    assert torch.equal(alone["noise"], noise[[2, 2]])
    assert torch.equal(alone["w"], W[[3, 3]])
    assert torch.equal(alone["landmarks"], poses[[7, 7]])
    elsewhere = [sample.Job(5, "one", 0, 0, 5)]             # nor does the row of a name
    assert torch.equal(drawn(monkeypatch, elsewhere, W, poses)["noise"][0], noise[0])
    other_seed = drawn(monkeypatch, jobs, W, poses, seed=1)["noise"]
    assert (other_seed != noise).flatten(1).any(1).all()
    assert torch.equal(drawn(monkeypatch, jobs, W, poses)["noise"], noise)


def test_seeds_depend_on_every_part():
    seed = sample.seed_of(0, "a", 1)
    assert seed == sample.seed_of(0, "a", 1)
    for other in ([1, "a", 1], [0, "b", 1], [0, "a", 2], [0, "a", 1, 0], [0, "a1"]):
        assert seed != sample.seed_of(*other)
    seeds = [sample.seed_of(0, "name", index) for index in range(5000)]
    poses = torch.tensor(seeds) % 100
    assert poses.bincount(minlength=100).min() > 20         # all are as likely


def face_set(f, labels, **columns):
    """A FaceSet without files."""
    people = {f"p{label}": label for label in range(labels.max() + 1)}
    faces = SimpleNamespace(people=people, path=lambda i: f"{i}.jpg")
    index, quality = torch.arange(len(f)), torch.zeros(len(f))
    columns = dict(faces=faces, index=index, quality=quality) | columns
    return evaluate.FaceSet(f, labels, **columns)


@torch.no_grad()
def test_a_picture_is_judged_against_every_other_real_person_and_image(monkeypatch):
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)
    n, k = 4, 3
    backbone, prototypes = Linear(), randomise(Prototypes(n, k, 6))
    images = random_images(7)
    prototypes.real[0] = naive_embed(backbone, images)[1]   # the second picture is of the first person
    prototypes.settle(torch.eye(6) / 6)
    W = prototypes.to_draw()
    labels = torch.tensor([0] * 2 + [1] * 3 + [2] + [3] * 3)
    real = face_set(units(9, 6), labels)
    jobs = []
    for row in (5, 0, 3, 6, 1, 4, 2):
        jobs.append(sample.Job(row, f"name {row}", index=10 + row, attempt=row % 3, pose=2 * row))

    f = naive_embed(backbone, images) / 2
    naive = []
    for job, vector in zip(jobs, f):
        direction = unit(vector)
        cosines = (W @ direction).tolist()
        own = cosines[job.row]
        others = [person for person in range(n) if person != job.row]
        of_others = [real.f[labels == person] for person in others]
        centre = max(unit(f.mean(0)) @ direction for f in of_others)
        image = max((f @ direction).max() for f in of_others)
        naive.append([own, centre, image])
    naive = torch.tensor(naive)

    centres = torch.stack([unit(real.f[labels == person].mean(0)) for person in range(n)])

    def judged(centre, image):
        known = sample.Real(real.f, labels, centres, dict(centre=centre, image=image, person=-1.0))
        verdicts, found = sample.judge(backbone, W, known, jobs, images)
        assert same(found, unit(f))                         # their sum judges the person
        return verdicts
    verdicts = judged(0.5, 0.6)
    columns = ["cos_own", "cos_nearest_real", "cos_nearest_image"]
    found = [[float(getattr(verdict, column)) for column in columns] for verdict in verdicts]
    assert same(found, naive, 1e-4)
    for job, verdict in zip(jobs, verdicts, strict=True):
        file = f"{job.name}/{job.index:04d}.jpg"
        assert verdict[:5] == (file, job.name, job.index, job.attempt, job.pose)

    # Either test alone finds a leak.
    for column, test in ((1, "centre"), (2, "image")):
        cosines = naive[:, column].tolist()
        line = np.mean(sorted(cosines)[3:5])
        lines = {"centre": 2.0, "image": 2.0} | {test: line}
        expected = ["leak" if cosine > line else "accepted" for cosine in cosines]
        assert [verdict.verdict for verdict in judged(**lines)] == expected

    near = torch.full([7], 0.5)
    monkeypatch.setattr(sample, "nearest", lambda *_: (near, None))     # at the line is below it
    assert {verdict.verdict for verdict in judged(0.5, 0.5)} == {"accepted"}


def told(name, index, attempt, verdict="leak", pose=0, own=0.5):
    """A Verdict as it is read from a file."""
    file = f"{name}/{index:04d}.jpg"
    numbers = map(str, (index, attempt, pose))
    return sample.Verdict(file, name, *numbers, verdict, str(own), "0.1", "0.2")


PEOPLE = ["ann", "bob", "cy"]                                # of rows 0 to 2


def tell(out, name, verdicts, f=(1, 0, 0)):
    """Keeps verdicts as a rank does, of pictures that all have the unit embedding f."""
    data.write_csv(out / ".verdicts" / f"{name}.csv", sample.Verdict._fields, verdicts)
    accepted = [verdict.identity for verdict in verdicts if verdict.verdict == "accepted"]
    rows = [[row, *(accepted.count(PEOPLE[row]) * 2 ** 20 * np.array(f))] for row in range(3)]
    np.save(out / f".verdicts/{name}.npy", np.array(rows, np.int32))


def real_people(**lines):
    """Two of them, of rows 1 and 2, who are far from everybody of `tell` and from each other."""
    f = torch.eye(3)[1:]
    centres = torch.cat([torch.zeros(1, 3), f])
    return sample.Real(f, torch.tensor([1, 2]), centres, dict(centre=2.0, image=2.0, person=0.5) | lines)


def test_what_is_left_to_draw_follows_from_the_verdicts(tmp_path, monkeypatch):
    tell(tmp_path, "1", [told("ann", 0, 1), told("ann", 0, 0), told("ann", 1, 0, "accepted")])
    tell(tmp_path, "2", [told("of another rank", 0, 0)])
    made = sample.attempts_made(tmp_path, {"ann": 3, "bob": 1})
    assert made.tolist() == [[2, 5, 0], [0, 5, 5]]          # bob gets one picture
    assert sample.attempts_made(tmp_path, {}).size == 0     # there are more ranks than people
    found = [(attempt, [*places]) for attempt, places in sample.rounds(made, 3)]
    assert found == [(0, [2, 3]), (2, [0])]
    found = [(attempt, [*places]) for attempt, places in sample.rounds(made * 0, 4)]
    assert found == [(0, [0, 1, 2, 3]), (0, [4, 5])]

    gone = lambda path: Path("gone").read_text()            # the last rank has just completed the set
    monkeypatch.setattr(sample, "read_csv", gone)
    assert not [*sample.verdicts_of(tmp_path)]


def test_pictures_that_are_too_near_are_drawn_five_times():
    made, attempts = np.zeros((2, 2), np.int8), []
    for attempt, places in sample.rounds(made, 3):
        attempts += [attempt] * len(places)
        made.flat[places] = attempt + 1
    assert attempts == sorted([0, 1, 2, 3, 4] * 4)


def test_accepted_pictures_and_sums_are_written_before_their_verdicts(tmp_path, monkeypatch):
    images, f = random_images(6, 16), units(4, 5)           # the batch has two images more
    jobs = [sample.Job(3, "ann", 7 + i, 1, 0) for i in range(3)] + [sample.Job(2, "bob", 10, 1, 0)]
    verdicts = [told("ann", 7, 1, "accepted"), told("ann", 8, 1), told("ann", 9, 1, "accepted")]
    verdicts.append(told("bob", 10, 1, "accepted"))
    write_csv = data.write_csv

    def spy(*given):                                        # a killed run has no verdict without these
        assert (tmp_path / "ann/0007.jpg").is_file() and (tmp_path / ".verdicts/3-7-1.npy").is_file()
        write_csv(*given)
    monkeypatch.setattr(sample, "write_csv", spy)
    sample.write_batch(tmp_path, jobs, images, verdicts, f)
    files = contents(tmp_path)
    pictures = ["ann/0007.jpg", "ann/0009.jpg", "bob/0010.jpg"]
    assert {*files} == {*pictures, ".verdicts/3-7-1.csv", ".verdicts/3-7-1.npy"}
    for name, i in zip(pictures, (0, 2, 3)):
        assert files[name] == jpeg(images[i], quality=95, subsampling=0)
    assert [*sample.verdicts_of(tmp_path)] == verdicts

    # Row and sum of each person's accepted pictures, in 2 ** -20, so that no order of adding matters.
    sums = np.load(tmp_path / ".verdicts/3-7-1.npy")
    assert sums.dtype == np.int32 and sums[:, 0].tolist() == [2, 3]
    assert same(sums[:, 1:] / 2 ** 20, torch.stack([f[3], f[0] + f[2]]), 2e-6)


def test_a_batch_of_which_nothing_is_accepted_has_no_sums(tmp_path):
    jobs = [sample.Job(3, "ann", 7, 4, 0)]
    sample.write_batch(tmp_path, jobs, random_images(1, 16), [told("ann", 7, 4)], units(1, 3))
    assert np.load(tmp_path / ".verdicts/3-7-4.npy").shape == (0, 4)
    assert sample.too_near_together(tmp_path, real_people(), PEOPLE + ["virtual"]) == set()


def test_a_person_is_near_whose_pictures_together_are(tmp_path):
    """Over all batches; a real person is not compared with itself (--real-to)."""
    real = real_people()                                    # rows 1 and 2 are real
    near = lambda: sample.too_near_together(tmp_path, real, PEOPLE)
    tell(tmp_path, "1", [told("ann", 0, 0, "accepted")], f=(0.8, 0.6, 0))
    assert near() == {"ann"}                                # 0.6
    tell(tmp_path, "2", [told("ann", 1, 0, "accepted"), told("bob", 0, 0, "accepted")], f=(0.8, -0.6, 0))
    assert near() == set()                                  # ann's sum is (1.6, 0, 0)
    tell(tmp_path, "3", [told("ann", 2, 0, "accepted")] * 3, f=(0, 0.6, 0.8))
    assert near() == {"ann"}                                # (1.6, 1.8, 2.4)
    tell(tmp_path, "4", [told("bob", 1, 0, "accepted")] * 9, f=(0, 1, 0))
    assert near() == {"ann"}                                # bob is nearest to bob
    tell(tmp_path, "5", [told("bob", 2, 0, "accepted")] * 9, f=(0, 0, 1))
    assert near() == {"ann", "bob"}
    np.save(tmp_path / ".verdicts/6.npy", np.array([[2, 0, 2 ** 20, 0]], np.int32))
    assert near() == {"ann", "bob"}                         # killed before the verdicts were written


def grey(path, level, size=16):
    """Writes a grey picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level, level, level)).save(path, quality=95)


def test_a_set_is_completed_once_every_picture_is_drawn(tmp_path, monkeypatch, capsys):
    """Two pictures of ann are accepted, the first one at its second attempt; one of bob is not in five."""
    poses, out = torch.rand(9, 5, 2), tmp_path
    accepted = [told("ann", 0, 1, "accepted", pose=5, own=0.5)]
    accepted += [told("ann", 1, 0, "accepted", pose=3, own=0.3)]
    for verdict in accepted:
        grey(out / verdict.file, 99)
    tell(out, "b", [told("bob", 0, i) for i in range(4)] + accepted[::-1])
    tell(out, "c", [told("ann", 0, 0)] + accepted)          # two ranks drew the same
    finish = lambda: sample.finish(out, 3, poses, 16, real_people(), PEOPLE)
    before = contents(out)
    finish()
    assert "this rank is done" in capsys.readouterr().out and contents(out) == before

    tell(out, "a", [told("bob", 0, 4)])
    draw_grid = sample.draw_grid

    def spy(*given):
        assert not (out / "manifest.csv").exists()          # it says that the set is complete
        draw_grid(*given)
    monkeypatch.setattr(sample, "draw_grid", spy)
    finish()
    said = capsys.readouterr().out
    assert said.startswith("WARNING: over half")
    assert "2 images; 6 too near a real person, 1 left out, 0 people among them" in said
    assert "own prototype 0.400" in said
    rows = [(row["file"], row["attempt"], row["verdict"]) for row in manifest(out)]
    assert rows == [("ann/0000.jpg", "0", "leak"), ("ann/0000.jpg", "1", "accepted"),
                    ("ann/0001.jpg", "0", "accepted")] + [("bob/0000.jpg", str(i), "leak") for i in range(5)]
    landmarks = data.read_landmarks(out, ["ann/0000.jpg", "ann/0001.jpg"], 16)
    assert same(landmarks, poses[[5, 3]], 0.01 / 16)
    assert {*contents(out)} == {"ann/0000.jpg", "ann/0001.jpg", "grid.jpg", "landmarks.csv", "manifest.csv"}


def test_a_person_who_is_too_near_is_left_out_of_a_set_aloud(tmp_path, monkeypatch, capsys):
    """Here bob, whose pictures are accepted one by one; a run that is killed meanwhile ends alike."""
    poses = torch.rand(9, 5, 2)
    for out in (tmp_path / "whole", tmp_path / "killed"):
        tell(out, "a", [told("ann", i, 0, "accepted", own=0.5) for i in range(2)])
        bob = [told("bob", 0, 1, "accepted", own=0.9), told("bob", 1, 0, "accepted", own=0.9)]
        tell(out, "b", [told("bob", 0, 0), *bob], f=(0, 0, 1))
        for i, name in enumerate(("ann", "bob")):
            for index in range(2):
                grey(out / f"{name}/000{index}.jpg", 40 + 160 * i)
        if out.name == "killed":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(sample, "draw_grid", interrupted)
                sample.finish(out, 4, poses, 16, real_people(), PEOPLE)
        sample.finish(out, 4, poses, 16, real_people(), PEOPLE)
        said = capsys.readouterr().out
        assert "2 images; 1 too near a real person, 2 left out, 1 people among them; " in said
        assert "own prototype 0.500" in said
    assert contents(out) == contents(tmp_path / "whole")
    assert {*contents(out)} == {"ann/0000.jpg", "ann/0001.jpg", "grid.jpg", "landmarks.csv", "manifest.csv"}
    assert [row["verdict"] for row in manifest(out)] == ["accepted"] * 2 + ["leak"] + ["person"] * 2
    assert not (out / "bob").exists() and len(data.read_csv(out / "landmarks.csv")) == 3
    grid = data.open_image(out / "grid.jpg")
    assert grid.size == (2 * 18 + 2, 18 + 2) and np.asarray(grid).max() < 60        # ann alone


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_set_of_which_half_was_rejected_is_no_cause_for_alarm_and_one_of_nothing_is(tmp_path, capsys):
    poses = torch.rand(1, 5, 2)
    half, nothing = tmp_path / "half", tmp_path / "nothing"
    tell(half, "a", [told("ann", 0, 0), told("ann", 0, 1, "accepted")])
    grey(half / "ann/0000.jpg", 99)
    sample.finish(half, 1, poses, 16, real_people(), PEOPLE)
    assert "WARNING" not in capsys.readouterr().out
    tell(nothing, "a", [told("ann", 0, i) for i in range(5)])
    said = stops(capsys, sample.finish, nothing, 1, poses, 16, real_people(), PEOPLE)
    assert "every picture" in said and not (nothing / "manifest.csv").exists()


def test_the_grid_has_rows_of_people_and_pictures_at_even_distances(tmp_path):
    levels = {"ann": [0, 40, 80, 120], "bob": [200], "cy": [250]}
    verdicts = []
    for name, some in levels.items():
        for index, level in enumerate(some):
            verdicts.append(told(name, index, 0, "accepted"))
            grey(tmp_path / verdicts[-1].file, level)
    sample.draw_grid(tmp_path, verdicts)
    image = data.open_image(tmp_path / "grid.jpg")
    assert image.size == (4 * 18 + 2, 3 * 18 + 2)           # 18 pixels from one to the next; no row has more
    sample.draw_grid(tmp_path, verdicts, rows=2, columns=2)
    image = data.open_image(tmp_path / "grid.jpg")
    assert image.size == (2 * 18 + 2, 2 * 18 + 2)
    found = [image.getpixel((x, y))[0] for y in (10, 28) for x in (10, 28)]
    assert np.abs(np.subtract(found, [0, 80, 200, 200])).max() < 9


def test_real_people_are_filled_up_and_virtual_ones_begin_with_the_first(capsys):
    names = [f"name {i}" for i in range(7)]                 # 4 real people, 3 virtual ones
    rows = torch.tensor([0, 0, 2, 3, 3, 3, 3, 8, 8])        # of images; 8 has no prototype
    given = dict(real_to=None, virtual=2, per_id=5, fr="runs/fr")

    def wanted(**flags):
        args = Namespace(**given | flags)
        return sample.people_to_draw(args, names, 4, rows)
    assert wanted() == {4: 5, 5: 5}
    assert wanted(virtual=3, per_id=1) == {4: 1, 5: 1, 6: 1}
    assert wanted(real_to=4) == {0: 2, 2: 3}                # nobody has no image, and 3 has four
    assert "nobody" in stops(capsys, lambda: wanted(real_to=1))
    assert "expected 1 to 3" in stops(capsys, lambda: wanted(virtual=4))


def test_real_faces_are_labelled_by_the_rows_of_their_prototypes(tmp_path, monkeypatch, capsys):
    """People without a prototype come after all who have one."""
    monkeypatch.setattr(sample, "ENOUGH", 4)
    save_set(tmp_path / "faces", random_images(8, 16), 2, torch.rand(8, 5, 2))
    faces = data.Faces([tmp_path / "faces"])
    rows = data.rows_of(faces.people, ["person 3", "stranger", "person 0", "person 2"])
    after = rows[1].item()
    assert rows.tolist() == [2, after, 3, 0] and after >= 4
    prototypes = randomise(Prototypes(4, 3, 6))
    wanted = torch.tensor([2, 2, 2])
    backbone = Linear(16)
    real = sample.embed_real(backbone, prototypes, faces, rows, wanted)
    assert real.labels.tolist() == [2, 2, after, after, 3, 3, 0, 0]
    for row, centre in enumerate(real.centres):             # the first person after all rows is nobody
        of_row = real.f[real.labels == row]
        assert same(centre, unit(of_row.sum(0)) if len(of_row) else torch.zeros(6))
    strangers = evaluate.strangers_to(evaluate.FaceSet(real.f, real.labels), wanted)
    assert real.lines == evaluate.lines_of(strangers)
    assert {*real.lines} >= {"person", "centre", "image"}
    assert max(real.lines.values()) < 0.999                 # nobody is a stranger to themselves
    assert "strangers do not" not in capsys.readouterr().out

    # Who is too near by all pictures together needs enough strangers.
    monkeypatch.setattr(sample, "ENOUGH", 5)
    few = sample.embed_real(backbone, prototypes, faces, rows, wanted)
    assert few.lines == real.lines | {"person": 1.0}
    assert "4 strangers do not tell" in capsys.readouterr().out


def far(patch, **lines):
    """Sets the lines of sample.py by hand; at 2 nothing is too near."""
    lines = dict(centre=2.0, image=2.0, person=2.0) | lines
    patch.setattr(sample, "lines_of", lambda _: lines)
    patch.setattr(sample, "ENOUGH", 0)


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A folder with a recogniser of three people, a DiT, and faces; nothing is too near."""
    save_set(tmp_path / "faces", random_images(7, 16), 3, torch.rand(7, 5, 2))          # one of person 2
    tiny_recogniser(tmp_path / "runs/fr", [f"person {i}" for i in (2, 0, 1)], data=["faces"])
    dit = randomise(DiT(16, dim=6, width=16, depth=1, heads=2), 0.1)
    tensors = {"dit": dit.state_dict(), "poses": {"landmarks": torch.rand(9, 5, 2)}}
    digest = model.digest(tmp_path / "runs/fr")
    meta = dict(fr_sha256=digest, data=data.Faces([tmp_path / "faces"]).digest())
    model.save_model(tmp_path / "runs/dit", "dit", dit.config, tensors, **meta)
    far(monkeypatch)
    return tmp_path


FEW = "--virtual 2 --per-id 3 --steps 3 --batch 4".split()


@pytest.mark.parametrize("flags, guidance", [
    ("", 1), ("--paper", 4), ("--paper --guidance 2", 2), ("--guidance 0", 0)])
def test_guidance_is_the_paper_s_where_it_is_asked_for(studio, monkeypatch, flags, guidance):
    asked, guided = [], model.guided
    spy = lambda dit, w, landmarks, g: asked.append(g) or guided(dit, w, landmarks, g)
    monkeypatch.setattr(sample, "guided", spy)
    here("sample.py", *FEW, *flags.split(), cwd=studio)
    assert asked == [guidance, guidance]                    # two batches


def test_virtual_people_are_named_after_their_recogniser(studio):
    said = here("sample.py", *FEW, cwd=studio)
    assert "6 images; 0 too near a real person, 0 left out" in said
    out, prefix = studio / "runs/virtual", model.digest(studio / "runs/fr")[:6]
    expected = [f"{prefix}-{person:06d}/{i:04d}.jpg" for person in range(2) for i in range(3)]
    assert pictures_of(contents(out)) == expected
    poses = model.load_model(studio / "runs/dit", "dit")[0]["poses.landmarks"]
    chosen = [int(row["landmarks_from"]) for row in manifest(out)]
    assert same(data.Faces([out]).landmarks, poses[chosen], 0.01 / 16)
    for i, row in enumerate(manifest(out)):
        name = f"{prefix}-{i // 3:06d}"
        assert chosen[i] == sample.seed_of(0, name, i % 3) % 9 and row["identity"] == name


def test_a_finished_set_is_left_alone_and_may_be_moved(studio):
    here("sample.py", *FEW, cwd=studio)
    before = contents(studio / "runs/virtual")
    (studio / "runs/virtual").rename(studio / "moved")
    again = ["sample.py", *FEW, "--out", "moved", "--batch", 3]
    assert "already complete" in here(*again, cwd=studio)
    for other in (["--seed", 1], ["--per-id", 4], ["--guidance", 2], ["--steps", 4]):
        assert "started with" in here(*again, *other, cwd=studio, code=2)
    edit(studio / "runs/dit", step=2)
    assert "dit =" in here(*again, cwd=studio, code=2)
    assert before == contents(studio / "moved")
    edit(studio / "runs/fr", step=2)
    assert "another recogniser" in here(*again, cwd=studio, code=2)


def test_all_that_is_real_is_named_where_the_dit_saw_other_faces(studio):
    save_set(studio / "more", random_images(4, 16), 2, torch.rand(4, 5, 2))
    for other in ({"data": data.Faces([studio / "more"]).digest()}, {"data": None}):
        edit(studio / "runs/dit", **other)
        said = here("sample.py", *FEW, cwd=studio, code=2)
        assert "runs/dit: trained on other faces than runs/fr" in said and "with --real" in said
        assert not (studio / "runs/virtual").exists()
    said = here("sample.py", *FEW, "--real", "faces", "more", cwd=studio)
    assert "real: 11 images of 3 people in faces, more\n" in said


def test_real_people_are_filled_up_to_a_number_of_images(studio):
    here("sample.py", *FEW, "--real-to", 3, cwd=studio)
    files = pictures_of(contents(studio / "runs/real-aug"))
    assert files == ["person 2/0000.jpg", "person 2/0001.jpg"]
    save_set(studio / "few", random_images(4, 32), 2, torch.rand(4, 5, 2))              # of persons 0 and 1
    here("sample.py", *FEW, "--real-to", 3, "--real", "few", "--out", "more", cwd=studio)
    assert pictures_of(contents(studio / "more")) == ["person 0/0000.jpg", "person 1/0000.jpg"]


def test_of_two_samplers_of_a_set_both_end_well(studio, monkeypatch, capsys):
    """Here the other one completes the set while this one writes its first batch, or its last."""
    monkeypatch.setattr(sample, "until_stopped", lambda items, _: enumerate(items))     # it has no signals
    write_csv = sample.write_csv
    for count in (1, 2):
        left = itertools.count(1)

        def other(path, *given):
            if next(left) == count:
                write_batch, sample.write_csv = sample.write_batch, write_csv
                here("sample.py", *FEW, "--out", str(count), cwd=studio)
                sample.write_csv, sample.write_batch = other, write_batch
                raise OSError("its folder is no longer there")
            write_csv(path, *given)
        monkeypatch.setattr(sample, "write_csv", other)
        here("sample.py", *FEW, "--out", str(count), cwd=studio)
        files = contents(studio / str(count))
        assert len(pictures_of(files)) == 6 and "manifest.csv" in files
        assert not any(".verdicts" in name or name.endswith(".tmp") for name in files)


def test_each_process_has_temporary_names_of_its_own(tmp_path, monkeypatch):
    with model.replacing(tmp_path / "a.jpg") as one:
        monkeypatch.setattr(model, "PROCESS", "another")
        with model.replacing(tmp_path / "a.jpg") as two:
            assert one != two
            two.write_text("two")
        one.write_text("one")
        (tmp_path / "p").mkdir()
        one.with_name("p").joinpath(one.name).touch()       # left by a killed run
        (tmp_path / "p/b.jpg").touch()
        _, _, left_out, rows = data.list_sources([tmp_path], "--data")
        assert left_out == {f"{tmp_path}/a.jpg"} and [name for name, *_ in rows] == [b"p/b.jpg"]
    assert (tmp_path / "a.jpg").read_text() == "one"


def test_what_is_given_away_tells_of_no_folder(studio):
    here("sample.py", *FEW, "--real", studio / "faces", cwd=studio)
    settings = json.loads((studio / "runs/virtual/run.json").read_text())
    assert settings["fr"] == model.digest(studio / "runs/fr")
    assert settings["dit"] == model.digest(studio / "runs/dit")
    assert settings["data"] == data.Faces([studio / "faces"]).digest()
    assert not any("/" in str(value) for value in settings.values())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stopped_set_continues_to_the_same_bytes(studio, monkeypatch, batch):
    """After the batch that is running, which is written."""
    here("sample.py", *FEW, "--out", "whole", cwd=studio)
    with monkeypatch.context() as patch:
        interrupting(patch, sample, "judge", batch, signal.SIGINT)
        here("sample.py", *FEW, cwd=studio, code=130)
    before = contents(studio / "runs/virtual")
    assert len(pictures_of(before)) == (4, 6)[batch - 1] and "manifest.csv" not in before
    here("sample.py", *FEW, cwd=studio)
    assert contents(studio / "runs/virtual") == contents(studio / "whole")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_batch_that_cannot_be_written_ends_the_run(studio, monkeypatch, failing):
    count, write_batch = itertools.count(1), sample.write_batch

    def fails(*given):
        if next(count) == failing:
            raise OSError("the disk is full")
        write_batch(*given)
    monkeypatch.setattr(sample, "write_batch", fails)
    with pytest.raises(OSError, match="full"):
        here("sample.py", *FEW, "--batch", 2, cwd=studio)
    assert not (studio / "runs/virtual/manifest.csv").exists()


# ----------------------------------------------------------------------------------------------- verification

@pytest.mark.parametrize("pairs", [100, 103, 11])           # folds of unequal size, too
def test_verification_follows_the_field_s_protocol(monkeypatch, pairs):
    """Squared distances; ten contiguous folds; the first threshold that is best on the other nine."""
    first = units(pairs, 4)
    second = unit(first + 0.8 * torch.randn(pairs, 4))
    first[1:8], second[1:8] = first[0].clone(), second[0].clone()       # ties
    first[2] = second[2]                                    # and an image twice
    f = torch.stack([first, second], 1).flatten(0, 1)
    is_same = torch.rand(pairs) < 0.5

    # Each image is a number, by which its embedding is known. Two pairs show the same two images.
    numbers = torch.randperm(2 * pairs, dtype=torch.uint8)
    numbers[4:6] = numbers[2:4]
    of_number = torch.zeros(2 * pairs, 4)
    of_number[numbers.long()] = f
    of_number[numbers[2:4].long()] = f[2:4]
    first[2], second[2] = first[1], second[1]
    asked = []

    def embed(_, images, exact):
        asked.append(len(images))
        return of_number[images.flatten().long()] if exact else None
    monkeypatch.setattr(evaluate, "embed", embed)
    distance = evaluate.pair_distances(None, numbers.view(-1, 1, 1, 1))
    assert asked == [2 * pairs - 2]                         # an image that is there twice is embedded once
    assert same(distance, (first - second).square().sum(1), 1e-6)

    thresholds = np.arange(0, 4, 0.01)
    right = np.array([(distance < threshold) == is_same.numpy() for threshold in thresholds])
    accuracies = []
    for test in np.array_split(range(pairs), 10):
        train = [p for p in range(pairs) if p not in test]
        scores = right[:, train].mean(1)
        best = [*scores].index(max(scores))
        accuracies.append(right[best, test].mean())
    naive = {"accuracy": np.mean(accuracies), "std": np.std(accuracies)}
    assert evaluate.verification(distance, is_same) == pytest.approx(naive)


def test_a_recogniser_is_tested_on_each_benchmark_at_its_own_size(monkeypatch):
    read = {("one.bin", 8): (0.25, "same"), ("two.bin", 8): (0.75, "same")}
    monkeypatch.setattr(evaluate, "read_benchmark", lambda *asked: read[asked])
    monkeypatch.setattr(evaluate, "pair_distances", lambda backbone, images: (backbone, images))
    monkeypatch.setattr(evaluate, "verification", lambda *found: found)
    backbone = SimpleNamespace(config=dict(size=8))
    scores = evaluate.verify(backbone, {"one": "one.bin", "two": "two.bin"})
    assert scores == {"one": ((backbone, 0.25), "same"), "two": ((backbone, 0.75), "same")}


# ---------------------------------------------------------- consistency, separability, diversity; resemblance

def cosines_of_pairs(vectors):
    """The cosine of each pair of unit vectors."""
    return [(a @ b).item() for a, b in itertools.combinations(vectors, 2)]


def test_consistency_separability_and_diversity_against_loops():
    f, quality = units(12, 6), torch.rand(12)
    labels = torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [4])
    C, S = evaluate.consistency_separability(f, labels)     # nobody has label 3
    within, spread, centres = [], [], []
    for person in (0, 1, 2, 4):
        own = f[labels == person]
        centres.append(unit(own.mean(0)))
        if len(own) > 1:                                    # others have no pair
            within.append(np.mean(cosines_of_pairs(own)))
            spread.append(quality[labels == person].var().item())
    assert same(C, np.mean(within))
    assert same(S, 1 - np.mean(cosines_of_pairs(centres)))
    assert same(evaluate.diversity(quality, labels), np.mean(spread))

    alone = torch.arange(12)
    assert evaluate.consistency_separability(f, alone)[0] is None
    assert evaluate.diversity(quality, alone) is None
    assert evaluate.consistency_separability(f, 0 * alone)[1] == 1      # of one person


def naive_nearest(f, targets, labels, of):
    """For each row of f, the largest cosine to a target of another label, and which it is."""
    found = []
    for i, one in enumerate(f):
        best = -2, None
        for j, target in enumerate(targets):
            if of[j] != labels[i]:
                best = max(best, ((one @ target).item(), j))
        found.append(best)
    return torch.tensor(found).T


def test_the_nearest_against_loops():
    f, targets = units(9, 6), units(5, 6)
    labels = torch.arange(9) % 5
    of = torch.tensor([0, 0, 1, 2, 4])
    own = naive_nearest(f, targets, labels, of)
    assert same(torch.stack(evaluate.nearest(f, targets, labels, of)), own)


def test_many_are_compared_in_pieces():
    targets = units(2 ** 21, 3)
    f, labels = targets[:34], torch.arange(34)              # 2^26 cosines at once are 32 rows
    close, which = evaluate.nearest(f, targets, labels, torch.arange(2 ** 21))
    for i in (0, 31, 32, 33):
        cosines = targets @ f[i]
        cosines[i] = -2
        assert same(close[i], cosines.max()) and which[i] == cosines.argmax()


def naive_thumbnail(image):
    """Ranks of 16 x 16 grey means, each less the mean rank in a square of 5 around it, of length 1."""
    side = image.shape[1] // 16
    grey = image.float().mean(0)
    small = []
    for strip in grey.split(side):
        small += [block.mean() for block in strip.split(side, 1)]
    small = torch.stack(small)
    rank = torch.stack([(small < level).sum() for level in small]).view(16, 16).float()
    detail = torch.zeros(16, 16)
    for i, j in itertools.product(range(16), range(16)):
        around = rank[max(0, i - 2):i + 3, max(0, j - 2):j + 3]
        detail[i, j] = rank[i, j] - around.mean()
    return unit(detail.flatten())


def test_a_change_of_tone_does_not_change_a_thumbnail():
    """Also a negative is known, and a mirror image: as the same numbers, of another sign or order."""
    levels = torch.stack([torch.randperm(256) for _ in range(5)]).view(5, 1, 16, 16)
    pictures = levels.repeat_interleave(7, 2).repeat_interleave(7, 3).expand(-1, 3, -1, -1)
    plain = evaluate.thumbnails(pictures)
    assert same(plain.norm(dim=1), [1] * 5)
    assert (plain @ plain.mT - torch.eye(5)).abs().max() < 0.3
    for change in (lambda x: 0.5 * x, lambda x: 255 * (x / 255) ** 2, lambda x: (x / 3).exp()):
        assert same(evaluate.thumbnails(change(pictures.double()).float()), plain)
    assert same(evaluate.thumbnails(255 - pictures), -plain)
    expected = torch.stack([mirrored(thumb) for thumb in plain])
    assert same(evaluate.thumbnails(pictures.flip(3)), expected)


def test_faces_are_embedded_with_quality_and_thumbnail(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)
    images = random_images(7, 32)
    save_set(tmp_path / "faces", images, 3, torch.rand(7, 5, 2))
    faces, backbone = data.Faces([tmp_path / "faces"]), Linear(32)
    prototypes = randomise(Prototypes(2, 2, 6))
    with torch.no_grad():
        backbone.layer.weight *= 4                          # quality is seen in lengths that are not 1
        found = evaluate.embed_faces(backbone, prototypes, faces)
        f = naive_embed(backbone, images) / 2               # the mean with the mirrored image
        quality = prototypes.certainty(f)[:, 0]
    assert same(found.f, unit(f), 1e-4)
    assert same(found.quality, quality, 1e-4)
    thumbs = [naive_thumbnail(image) for image in images]
    assert same(found.thumbs, torch.stack(thumbs), 0.01)    # equal means have any order
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert found.index.tolist() == [*range(7)] and found.faces is faces


def random_set(count, people):
    """Images of people, some of whom have one image only."""
    labels = torch.randint(people, (count,))
    labels[:people] = torch.arange(people)
    return face_set(units(count, 6), labels, thumbs=units(count, 256))


def mirrored(thumb):
    """The thumbnail of the mirror image."""
    return thumb.view(16, 16).flip(1).flatten()


def test_people_of_benchmarks_are_embedded_as_faces_are(monkeypatch):
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)
    images, labels = random_images(300, 32), torch.randint(9, (300,))
    people = {("benchmarks", 32): (images, labels)}
    monkeypatch.setattr(insightface, "benchmark_people", lambda *asked: people[asked])
    backbone = Linear(32)
    backbone.config = dict(size=32)
    found = evaluate.embed_benchmarks(backbone, "benchmarks")
    assert same(found.f, unit(naive_embed(backbone, images)), 1e-4)
    assert torch.equal(found.labels, labels) and same(found.thumbs, evaluate.thumbnails(images))
    assert found.f.dtype == found.thumbs.dtype == evaluate.KIND         # they are compared with real faces'


def naive_centres(faces):
    """Who has images, and the unit centre of each one's embeddings."""
    people = faces.labels.unique()
    return people, unit(torch.stack([faces.f[faces.labels == person].sum(0) for person in people]))


def test_resemblance_to_real_people_against_loops():
    """To the nearest person's centre, image, and thumbnail, which may be mirrored, negative, or both."""
    drawn, real = random_set(12, 6), random_set(20, 8)
    others = [mirrored(thumb) for thumb in real.thumbs]
    copies = {3: others[11], 5: -real.thumbs[9], 7: -others[2], 8: real.thumbs[0]}
    for i, thumb in copies.items():
        drawn.thumbs[i] = thumb
    people, whole = naive_centres(drawn)
    _, centres = naive_centres(real)
    thumbs = torch.cat([real.thumbs, torch.stack(others)])
    thumbs = torch.cat([thumbs, -thumbs])
    nobody = torch.full((12,), -1)
    for given, own in ((None, nobody), (drawn.labels, drawn.labels)):
        found = evaluate.resemblance(drawn, real, given)
        expected = naive_nearest(whole, centres, nobody if given is None else people, range(8))
        assert same(torch.stack(found["person"]), expected)
        expected = naive_nearest(drawn.f, centres, own, range(8))
        assert same(torch.stack(found["centre"]), expected)
        expected = naive_nearest(drawn.f, real.f, own, real.labels)
        assert same(torch.stack(found["image"]), expected)
        cosine, which = naive_nearest(drawn.thumbs, thumbs, own, real.labels.repeat(4))
        assert same(found["copy"][0], cosine)
        assert same(found["copy"][1], which % 20)
    assert "copy" not in evaluate.resemblance(drawn._replace(thumbs=None), real)
    copied = evaluate.resemblance(drawn, real)["copy"]
    assert same(copied[0][[*copies]], [1] * 4)
    assert copied[1][[*copies]].tolist() == [11, 9, 2, 0]


# ---------------------------------------------------------------------------------------- strangers and lines

def test_places_of_images_among_those_of_their_person():
    labels = torch.tensor([2, 0, 2, 2, 0, 4])
    place, count = evaluate.places(labels)
    assert place.tolist() == [0, 0, 1, 2, 1, 0]
    assert count.tolist() == [3, 2, 3, 3, 2, 1]


@pytest.mark.parametrize("count, wanted, taken", [
    ([9] * 4, [1] * 7, [1] * 4),
    ([9] * 6, [2, 5, 8], [2, 2, 5, 5, 8, 8]),               # as many of each number
    ([3, 0, 9], [5, 5], [0, 0, 5]),                         # who has too few is left out,
    ([5] * 9 + [4], [5] * 20, [5] * 9),
    ([2] * 89 + [7] * 11, [20] * 5, [7] * 11),              # but not more than nine tenths of all
    ([2] * 95 + [7] * 5, [20] * 5, [2] * 95 + [7] * 5),
    ([1, 1, 4], [0, 0, 3], [0, 0, 3])])                     # some labels are nobody's
def test_strangers_have_as_many_images_as_the_people_of_a_set(count, wanted, taken):
    found = evaluate.as_many(torch.tensor(count), torch.tensor(wanted))
    assert sorted(found[found > 0].tolist()) == sorted(number for number in taken if number)
    assert (found <= torch.tensor(count)).all()


def first_images(faces, count):
    """Which images are among the first `count` of their person."""
    before = [faces.labels[:i].tolist().count(label) for i, label in enumerate(faces.labels)]
    return torch.tensor(before) < count


def test_strangers_are_real_people_among_themselves_or_people_whom_the_judge_never_saw():
    real, unseen = random_set(24, 8), random_set(30, 7)
    for faces in (real, unseen):
        faces.labels[:] = torch.randperm(len(faces.f)) % 8
    wanted, strangers = torch.tensor([2, 2, 2]), {}
    for name, faces in (("real", real), ("unseen", unseen)):
        some = first_images(faces, 2)
        strangers[name] = face_set(faces.f[some], faces.labels[some], thumbs=faces.thumbs[some])

    found = evaluate.strangers_to(real, wanted)
    _, whole = naive_centres(strangers["real"])
    _, centres = naive_centres(real)                        # of all their images
    among = naive_nearest(whole, centres, range(8), range(8))
    assert same(torch.stack(found["person"]), among)
    expected = evaluate.resemblance(strangers["real"], real, strangers["real"].labels)
    for test in ("centre", "image", "copy"):
        assert same(torch.stack(found[test]), torch.stack(expected[test]))

    found = evaluate.strangers_to(real, wanted, unseen)
    expected = evaluate.resemblance(strangers["unseen"], real)
    for test in ("person", "centre", "image", "copy"):
        assert same(torch.stack(found[test]), torch.stack(expected[test]))


def test_genuine_comparisons_are_between_halves_of_the_images_of_a_person():
    labels = torch.tensor([0, 3, 1, 0, 0, 1, 3, 0, 1, 3, 0])            # five, three, none, and three images
    real = face_set(units(11, 6), labels)
    naive = []
    for person in (0, 1, 3):
        own = real.f[labels == person]
        naive.append(unit(own[0::2].sum(0)) @ unit(own[1::2].sum(0)))
    assert same(evaluate.genuine(real, torch.tensor([3, 3])), naive)
    assert same(evaluate.genuine(real, torch.tensor([5, 5, 5])), naive[:1])         # who has so many
    assert same(evaluate.genuine(real, torch.tensor([1])), naive)
    alone = face_set(units(4, 6), torch.arange(4))
    assert len(evaluate.genuine(alone, torch.tensor([1]))) == 0


def test_lines_are_what_strangers_stay_below():
    values, index = torch.rand(300), torch.zeros(300)
    strangers = dict.fromkeys(["person", "image", "copy"], (values, index))
    line = np.quantile(values, 0.99)
    copy = (1 + np.quantile(values, 0.999)) / 2
    found = evaluate.lines_of({test: (0.9 * cosine, i) for test, (cosine, i) in strangers.items()})
    expected = {"person": 0.9 * line, "image": 0.9 * line, "copy": (1 + 0.9 * (2 * copy - 1)) / 2}
    assert found == pytest.approx(expected)
    assert evaluate.lines_of({"copy": (torch.ones(300), index)}) == {"copy": 0.99}
    assert "copy" not in evaluate.lines_of({"person": (values, index)})


@pytest.mark.parametrize("over, strangers, people", [(0, 6000, 10_000), (10, 1000, 500), (2, 150, 20),
                                                     (3, 300, 1)])
def test_what_is_allowed_is_the_bound_of_a_negative_binomial(over, strangers, people):
    share, below = people / (people + strangers), 0
    chances = [math.comb(j + over, over) * share ** j for j in range(people + 1)]
    for j, chance in enumerate(chances):
        below += chance / sum(chances)
        if below >= 0.999:
            break
    assert evaluate.allowed(over, strangers, people) == j


@pytest.mark.parametrize("strangers, people", [(1000, 500), (300, 2000)])
def test_strangers_are_over_what_is_allowed_once_in_a_thousand_times(strangers, people):
    chance = np.random.default_rng(0)
    cosines = chance.random((4000, strangers))
    lines = np.quantile(cosines, 0.99, axis=1, keepdims=True)
    over = (cosines > lines).sum(1)
    assert {*over} == {strangers // 100}
    found = chance.binomial(people, 1 - lines, (4000, 100))             # in a hundred sets for each line
    too_many = (found > evaluate.allowed(strangers // 100, strangers, people)).mean()
    assert 0.0001 < too_many < 0.002


# ----------------------------------------------------------------------------------------------- leak verdict

def test_how_many_strangers_are_over_a_line_that_none_reached():
    """Above nine tenths, as an exponential tail would have it; a bit more, because its mean is uncertain."""
    cosines = torch.cat([0.1 * torch.rand(9000), 0.1 - 0.02 * torch.rand(1000).log()])
    for line, share in ((0.12, 0.1 * math.exp(-1)), (0.2, 0.1 * math.exp(-5)), (0.3, 0.1 * math.exp(-10))):
        assert evaluate.tail(cosines, line) == pytest.approx(share, rel=0.5)
    few = torch.tensor([0.0] * 90 + [0.1] * 10)             # ten are 0.1 above the start of the tail
    assert evaluate.tail(few, 0.5) == pytest.approx(0.1 * (1 + (0.5 - 0.01) / 0.9) ** -10, rel=0.01)
    assert evaluate.tail(torch.arange(100) / 100, 0.495) == 0.5         # below it they are counted
    assert evaluate.tail(torch.zeros(100), 0.5) == 0


def test_people_over_a_line_and_images_are_counted_and_copies_are_never_allowed():
    near = lambda *cosines: (torch.tensor(cosines), torch.zeros(len(cosines)))
    found = {"person": near(0.5, 0.6), "centre": near(0.9, 0.9, 0.9, 0.5, 0.0, 0.0),
             "image": near(*[0.0] * 6), "copy": near(*[0.9] * 6), "somebody": near(0.5, 0.6)}
    strangers = {test: near(*[0.4] * 90, *[0.8] * 10) for test in found}
    strangers["somebody"] = near(*[0.1] * 40, *[0.6] * 10)              # a fifth is over the line
    lines = {test: 0.5 for test in found}                   # at the line is below it
    tests = evaluate.leak_tests(found, strangers, lines)
    over = {test: row["over"] for test, row in tests.items()}
    assert over == dict(person=1, centre=3, image=0, copy=6, somebody=1)
    people, somebody = evaluate.allowed(10, 100, 2), evaluate.allowed(2e8, 1e9, 2)
    expected = dict(person=people, centre=3 * people, image=3 * people, copy=0, somebody=somebody)
    assert {test: row["allowed"] for test, row in tests.items()} == expected
    assert all(row["line"] == 0.5 for row in tests.values())


@pytest.mark.parametrize("change, verdict", [
    ({}, "clean"),
    (dict(copies=1), "leaks"), (dict(somebody=1), "leaks"),
    (dict(person=3), "clean"), (dict(person=4), "leaks"),
    (dict(misaligned=None), "clean"), (dict(misaligned=0.1), "clean"),
    (dict(misaligned=0.11), "not aligned"), (dict(misaligned=-0.11), "not aligned"),
    (dict(recognised=0.5), "clean"), (dict(recognised=0.49), "judge too weak"),
    (dict(independent=False), "not independent"),
    (dict(independent=False, recognised=0.1), "judge too weak"),
    (dict(independent=False, recognised=0.1, misaligned=1.0), "not aligned"),
    (dict(independent=False, recognised=0.1, misaligned=1.0, person=4), "leaks")])
def test_each_clause_of_the_verdict_on_both_sides_of_its_limit(change, verdict):
    case = dict(copies=0, person=0, somebody=0, misaligned=0.0, recognised=0.9, independent=True) | change
    tests = {"person": dict(over=case["person"], allowed=3), "copy": dict(over=case["copies"], allowed=0),
             "somebody": dict(over=case["somebody"], allowed=0)}
    leakage = dict(tests=tests, misaligned=case["misaligned"], recognised=case["recognised"])
    assert evaluate.verdict_of(leakage, case["independent"]) == verdict


def test_a_row_on_quality_is_of_a_whole_set():
    labels = torch.randint(20, (100,))
    drawn = face_set(units(100, 6), labels, quality=torch.rand(100))
    C, S = evaluate.consistency_separability(drawn.f, labels)
    row = dict(identities=20, images=100, consistency=C, separability=S)
    D = evaluate.diversity(drawn.quality, labels)
    assert evaluate.quality_row(drawn, Prototypes(3, 0, 6)) == row | dict(diversity=D)
    published = evaluate.quality_row(drawn, Prototypes(0, 0, 6))
    assert published == row | dict(diversity=None)          # it has no head for quality


def somebodies(count):
    """Directions of people (I, 128), who differ in a quarter of the dimensions."""
    return F.pad(units(count, 32), (0, 96))


def photographs(people, counts, noise=0.6):
    """The FaceSet of as many photographs, which differ in all dimensions, of people (I, 128)."""
    counts = torch.as_tensor(counts).expand(len(people))
    labels = torch.arange(len(people)).repeat_interleave(counts)
    f = unit(people[labels] + noise * units(len(labels), 128))
    return face_set(f, labels, thumbs=units(len(labels), 256))


def judged(drawn, real, unseen=None):
    """What an independent judge says of a set that is aligned: the verdict and its row."""
    _, leakage = evaluate.judge_set(drawn, real, unseen)
    return evaluate.verdict_of(leakage | {"misaligned": 0}, True), leakage


FEW_AND_MANY = torch.tensor([20] * 100 + [2] * 900)         # images of a person, as benchmarks have them


def test_a_judgement_against_its_definitions():
    people = somebodies(60)
    real, unseen = photographs(people, 6), photographs(somebodies(50), 4)
    drawn = photographs(torch.cat([people[:5], somebodies(30)]), 4)
    found, leakage = evaluate.judge_set(drawn, real, unseen)
    assert found["somebody"] is found["person"]
    wanted = torch.full((35,), 4)
    strangers, halves = evaluate.strangers_to(real, wanted, unseen), evaluate.genuine(real, wanted)
    strangers["somebody"] = strangers["person"]
    lines = {test: evaluate.lines_of(strangers)[test] for test in ("person", "centre", "image", "copy")}
    lines["somebody"] = np.median(halves)                   # nearer than most people are to themselves
    assert leakage["tests"] == evaluate.leak_tests(found, strangers, lines)
    assert leakage["recognised"] == pytest.approx((halves > lines["person"]).float().mean().item())
    mistaken = (strangers["person"][0] > lines["somebody"]).float().mean().item()
    assert leakage["mistaken"] == pytest.approx(mistaken)
    assert leakage["strangers"] == 50 and leakage["copies"] == 0
    assert leakage["tests"]["somebody"]["over"] >= 4


@pytest.mark.parametrize("counts", [1, 20, torch.arange(200) % 20 + 1], ids=["one", "twenty", "mixed"])
@pytest.mark.parametrize("seed", range(3))
def test_strangers_do_not_leak_however_many_images_they_have(seed, counts):
    torch.manual_seed(seed)
    real, unseen = photographs(somebodies(400), 2), photographs(somebodies(1000), FEW_AND_MANY)
    verdict, leakage = judged(photographs(somebodies(200), counts), real, unseen)
    assert verdict == "clean"
    assert leakage["tests"]["person"]["over"] < 20 and leakage["recognised"] > 0.9


@pytest.mark.parametrize("counts", [1, 4])
@pytest.mark.parametrize("share", [10, 20, 200])
def test_other_photographs_of_real_people_leak(share, counts):
    people = somebodies(400)
    real, unseen = photographs(people, 2), photographs(somebodies(1000), FEW_AND_MANY)
    drawn = photographs(torch.cat([people[:share], somebodies(200 - share)]), counts)
    verdict, leakage = judged(drawn, real, unseen)
    assert verdict == "leaks" and leakage["copies"] == 0
    assert leakage["tests"]["person"]["over"] >= share - 1
    assert leakage["tests"]["somebody"]["over"] >= 0.8 * share


def test_a_judge_s_own_people_are_no_measure_of_strangers():
    """Training has pushed them apart: new people come nearer to them than they to each other."""
    apart = torch.eye(128)
    real, drawn = photographs(apart, 6, noise=0.3), photographs(units(400, 128), 6, noise=0.3)
    unseen = photographs(units(200, 128), 6, noise=0.3)
    assert judged(drawn, real)[0] == "leaks"
    assert judged(drawn, real, unseen)[0] == "clean"


def test_a_judge_that_knows_few_people_again_is_too_weak():
    real, drawn = photographs(somebodies(200), 2, noise=3.0), photographs(somebodies(100), 2, noise=3.0)
    verdict, leakage = judged(drawn, real)
    assert verdict == "judge too weak" and leakage["recognised"] < 0.5
    alone = photographs(somebodies(200), 1)                 # nobody's other image is there to know again
    verdict, leakage = judged(photographs(somebodies(100), 1), alone)
    assert verdict == "judge too weak" and leakage["tests"]["somebody"]["line"] == 1


@pytest.mark.parametrize("real, people, whole, copies", [
    (6000, 10_000, 50, 0), (6000, 10_000, 0, 1),
    (10_000, 120_000, 600, 0), (10_000, 120_000, 0, 600)])
def test_whole_people_and_copies_are_seen_among_many(real, people, whole, copies):
    """No share of a set may be real people, however large it is."""
    near = lambda values: (values, torch.zeros(len(values)))

    def seen(whole, copies):
        cosine, copied = torch.rand(people) / 2, torch.zeros(5 * people)
        cosine[:whole], copied[:copies] = 0.8, 0.95
        return {"person": near(cosine), "copy": near(copied), "somebody": near(cosine)}
    strangers = {test: near(torch.rand(real) / 2) for test in ("person", "copy", "somebody")}
    lines = {"person": 0.495, "copy": 0.9, "somebody": 0.7}
    for expected, planted in (("clean", (0, 0)), ("leaks", (whole, copies))):
        tests = evaluate.leak_tests(seen(*planted), strangers, lines)
        assert evaluate.verdict_of(dict(tests=tests, misaligned=None, recognised=1.0), True) == expected


def test_a_judge_names_copies_even_if_it_has_collapsed():
    """All embeddings are nearly one point, from which it learns nothing; copies are seen without it."""
    point = units(64)
    close = lambda count, spread: unit(point + spread * units(count, 64))
    labels = torch.arange(40).repeat_interleave(5)
    f = unit(close(40, 0.02)[labels] + 0.05 * torch.randn(200, 64))
    real = face_set(f, labels, thumbs=units(200, 256))
    planted = torch.cat([close(99, 0.3), real.f[[17]]])
    planted = face_set(planted, torch.arange(100), thumbs=units(100, 256))
    assert judged(planted, real)[0] != "clean"
    planted.thumbs[99] = mirrored(real.thumbs[17])
    verdict, leakage = judged(planted, real)
    assert verdict == "leaks" and leakage["copies"] == 1
    found, _ = evaluate.judge_set(planted, real, None)
    rows = [[*row] for row in tools.report.offenders(planted, found, leakage["tests"], real)]
    assert ["99.jpg", "copy", "1.0000", "p3", "17.jpg"] in rows


class Audit:
    """A folder with a recogniser of four people and sets that evaluate.py judges, by given lines."""

    def __init__(self, cwd, monkeypatch):
        self.cwd, self.monkeypatch = cwd, monkeypatch
        images = random_images(12, 16)
        save_set(cwd / "faces", images, 3, torch.rand(12, 5, 2))
        save_set(cwd / "copied", images[:4], 2, torch.rand(4, 5, 2))
        for name in ("new", "last", "strange"):
            save_set(cwd / name, random_images(6, 32), 3, torch.rand(6, 5, 2))
        names = [f"person {i}" for i in range(4)]
        for name in ("fr", "fr-other"):
            tiny_recogniser(cwd / "runs" / name, names, data=[str(cwd / "faces")])

    def __call__(self, *flags, code=0, line=2.0, genuine=3.0):
        """Runs evaluate.py, where only copies are found if the line is 2; what it prints, report, leaks."""
        lines = {"person": line, "centre": line, "image": line, "copy": 0.99}
        self.monkeypatch.setattr(evaluate, "lines_of", lambda _: lines)
        self.monkeypatch.setattr(evaluate, "genuine", lambda *_: torch.tensor([genuine]))
        printed = here("evaluate.py", *flags, cwd=self.cwd, code=code)
        with open(self.cwd / "runs/report/leaks.csv") as file:
            leaks = [*csv.DictReader(file)]
        return printed, json.loads((self.cwd / "runs/report/report.json").read_text()), leaks

    def strict(self, verdict, name="new", left_out=0, **options):
        """Whether --strict passes a set, which gets this verdict."""
        code = 0 if verdict == "clean" and not left_out else 3
        printed, report, _ = self("--datasets", name, "--strict", code=code, **options)
        leakage = report["datasets"][name]["leakage"]
        assert (leakage["verdict"], leakage["left_out"]) == (verdict, left_out)
        assert f"{name}: {verdict}\n" in printed and f"left out: {left_out}." in printed
        return printed

    def made_by(self, recogniser, name="new"):
        """Marks a set as drawn with a recogniser of runs/."""
        settings = {"real_to": None, "fr": model.digest(self.cwd / "runs" / recogniser)}
        (self.cwd / name / "run.json").write_text(json.dumps(settings))
        (self.cwd / name / "manifest.csv").touch()


@pytest.fixture
def audit(tmp_path, monkeypatch):
    return Audit(tmp_path, monkeypatch)


def test_each_set_has_its_own_verdict_and_one_leak_is_enough_for_strict(audit):
    sets = ["--datasets", "new", "copied", "last"]
    printed, report, leaks = audit(*sets, "--strict", code=3)
    verdicts = {name: row["leakage"]["verdict"] for name, row in report["datasets"].items()}
    assert verdicts == dict(new="clean", copied="leaks", last="clean")
    assert report["judge"] == "runs/fr" and report["models"] == {}
    assert report["real"]["images"] == 12 and report["real"]["identities"] == 4
    found = [(row["dataset"], row["what"], row["test"], row["image"]) for row in leaks]
    originals = ["person 0/0.png", "person 0/1.png", "person 0/2.png", "person 1/0.png"]
    for i, row in enumerate(found):
        file = f"copied/person {i // 2}/{i % 2}.png"
        assert row == ("copied", file, "copy", f"{audit.cwd}/faces/{originals[i]}")
    assert len(found) == 4
    pictures = [name for name in contents(audit.cwd / "runs/report") if name.endswith(".jpg")]
    assert sorted(pictures) == [f"{i}-{name}/closest.jpg" for i, name in enumerate(sets[1:], 1)]
    for text in ("the real faces", "copied: leaks", "new: clean", "separability",
                 "4 strangers (of the real people", "Alignment: not checked", "takes 0.00%", "recognises 100%"):
        assert text in printed
    assert "Accuracy" not in printed
    assert (audit.cwd / "runs/report/report.md").read_text() in printed

    audit(*sets)                                            # without --strict, a leak is only reported
    audit("--datasets", "new", "--strict")
    assert not audit("--datasets", "copied", "--real", "strange", "--strict")[2]
    assert {row["test"] for row in audit("--datasets", "new", line=-1.0)[2]} == {"person", "centre", "image"}


def test_strict_passes_only_what_is_clean_and_complete(audit, monkeypatch):
    audit.strict("clean")
    audit.strict("leaks", "copied")
    assert "recognises 0%" in audit.strict("judge too weak", genuine=1.5)       # the line is 2
    Image.new("RGB", (32, 32)).save(audit.cwd / "new/top.png")
    (audit.cwd / "new/person 0/.hidden.png").touch()
    audit.strict("clean", left_out=2)
    (audit.cwd / "strange/person 0/1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="cannot be read"):             # once it is looked at
        audit.strict("clean", "strange", left_out=1)
    audit.made_by("fr", "last")
    audit.made_by("fr-other", "last")
    audit.strict("clean", "last")                           # the other one judges
    (audit.cwd / "runs/fr/model.safetensors").unlink()
    audit.strict("not independent", "last")


@pytest.mark.parametrize("share, verdict", [(0.34, "clean"), (0.16, "clean"), (0.36, "not aligned"),
                                            (0.14, "not aligned")])
def test_a_set_that_is_less_or_more_aligned_than_real_faces_is_not_clean(audit, monkeypatch, share, verdict):
    """Of the real faces a quarter is called misaligned: what counts is the difference."""
    seen = []

    def misaligned(faces, weights):
        seen.append((Path(faces.roots[0]).name, weights))
        return 0.25 if len(seen) == 1 else share
    monkeypatch.setattr(retinaface, "misaligned", misaligned)
    monkeypatch.setattr(retinaface, "weights_at_hand", lambda: "fetched.pth")
    assert f"Alignment: {share - 0.25:+.0%} of images" in audit.strict(verdict)
    assert seen == [("faces", "fetched.pth"), ("new", "fetched.pth")]
    audit("--datasets", "new", "--weights", "named.pth")
    assert seen[-1] == ("new", "named.pth")


def test_who_had_a_part_in_a_set_does_not_judge_it_if_there_is_another(audit):
    audit.made_by("fr")
    printed, report, _ = audit("--datasets", "new", "last")
    assert report["judge"] == "runs/fr-other" and "judged by runs/fr-other" in printed
    assert audit("--datasets", "last")[1]["judge"] == "runs/fr"         # the first
    edit(audit.cwd / "runs/fr-other", data=[str(audit.cwd / "strange")])            # virtual people, say:
    printed, report, _ = audit("--datasets", "new")
    assert report["judge"] == "runs/fr-other"
    assert f"4 people in {audit.cwd}/faces" in printed      # not its own
    edit(audit.cwd / "runs/fr-other", data=[str(audit.cwd / "new")])    # was trained on it
    _, report, _ = audit("--datasets", "new", "last")
    assert report["judge"] == "runs/fr"                     # nobody is left: the first
    verdicts = {name: row["leakage"]["verdict"] for name, row in report["datasets"].items()}
    assert verdicts == dict(new="not independent", last="clean")


def test_who_had_a_part_in_a_set(audit):
    (audit.cwd / "link").symlink_to(audit.cwd / "last")
    meta = dict(data=[str(audit.cwd / "link")], sha256="a digest")
    part = lambda name, **changed: evaluate.had_part(meta | changed, audit.cwd / name)
    assert part("last") and part("link") and not part("new")            # its training data
    assert not part("last", data=[])
    audit.made_by("fr")
    assert not part("new") and part("new", sha256=model.digest(audit.cwd / "runs/fr"))
    assert not evaluate.had_part(dict(data=[]), audit.cwd / "new")      # published weights


def test_a_set_is_not_compared_with_itself_and_not_judged_by_who_was_trained_on_it(audit):
    (audit.cwd / "link").symlink_to("faces")

    def refused(*flags):
        printed = here("evaluate.py", "--datasets", *flags, cwd=audit.cwd, code=2)
        assert "among the real faces" in printed and not (audit.cwd / "runs/report").exists()
    refused("faces")
    refused("link")                                         # by another name
    refused("new", "faces", "--real", "strange")
    refused("new", "--real", "strange", "new/../new")
    edit(audit.cwd / "runs/fr", data=[str(audit.cwd / "link")])
    refused("faces", "--real", "strange")


def test_strangers_are_the_people_of_benchmarks_for_the_judge_s_own_people(audit):
    pairs = random_images(80, 16).view(20, 4, 3, 16, 16)
    toys.write_bin(audit.cwd / "held.bin", pairs, 100, torch.Generator())
    asked, strangers_to = [], evaluate.strangers_to

    def spy(real, wanted, unseen=None):
        asked.append(unseen)
        return strangers_to(real, wanted, unseen)
    audit.monkeypatch.setattr(evaluate, "strangers_to", spy)
    (audit.cwd / "link").symlink_to("faces")
    for flags, whose in (([], "of the benchmarks"), (["--real", "link"], "of the benchmarks"),
                         (["--real", "strange"], "of the real people, each to the others")):
        asked.clear()
        report = audit("--datasets", "new", "--pairs", "held.bin", *flags)[1]
        assert report["strangers"] == whose and (asked[0] is None) == (flags[-1:] == ["strange"])
        if asked[0]:
            distinct = data.read_benchmark(audit.cwd / "held.bin", 16)[0].unique(dim=0)
            assert len(asked[0].f) == len(distinct)
    assert audit("--datasets", "new", "--pairs")[1]["strangers"].startswith("of the real people")


def test_tables_are_printed_before_anything_is_written(audit):
    """Where the report's folder cannot be written, hours of embedding are not lost."""
    for writer in ("write_csv", "replacing"):
        audit.monkeypatch.setattr(tools.report, writer, lambda *_: model.fail("no space left"))
    printed = here("evaluate.py", "--datasets", "new", cwd=audit.cwd, code=2)
    assert printed.index("Quality of datasets") < printed.index("new: ") < printed.index("no space left")
    assert not (audit.cwd / "runs/report").exists()


def test_by_default_the_sampled_set_is_judged_by_the_first_recogniser(audit):
    shutil.copytree(audit.cwd / "new", audit.cwd / "runs/virtual")
    nothing = here("evaluate.py", cwd=audit.cwd, code=2)    # it is not complete
    assert "no set to judge" in nothing
    audit.made_by("fr", "runs/virtual")
    _, report, _ = audit("--fr", "runs/fr")
    assert [*report["datasets"]] == ["runs/virtual"]
    assert audit("--fr", "runs/fr-other", "runs/fr")[1]["judge"] == "runs/fr-other"

    edit(audit.cwd / "runs/fr", data=[])                    # as of published weights
    asked = here("evaluate.py", "--fr", "runs/fr", "--datasets", "new", cwd=audit.cwd, code=2)
    assert "name real faces with --real" in asked


def test_an_unfinished_run_is_left_out_of_the_report_aloud(audit):
    (audit.cwd / "runs/fr-big").mkdir()
    printed, report, _ = audit("--datasets", "new")
    assert "runs/fr-big: left out, because its training is not finished" in printed
    assert report["judge"] == "runs/fr"
    assert "fr-big" not in audit("--fr", "runs/fr", "--datasets", "new")[0]


def test_benchmarks_are_the_named_ones_or_those_of_the_recogniser(audit, monkeypatch):
    pairs = random_images(40, 16).view(20, 2, 3, 16, 16)
    for name in ("own", "lfw"):
        toys.write_bin(audit.cwd / f"{name}.bin", pairs, 20, torch.Generator())
    for name in ("runs/fr", "runs/fr-other"):
        edit(audit.cwd / name, val=["own.bin"])
    printed, report, _ = audit()
    assert {*report["models"]} == {"runs/fr", "runs/fr-other"}
    assert all({*scores} == {"own", "average"} for scores in report["models"].values())
    scores = audit("--pairs", "own.bin", "lfw.bin", "--fr", "runs/fr")[1]["models"]["runs/fr"]
    assert [*scores] == ["lfw", "own", "average"] and scores["average"] == scores["lfw"]["accuracy"]
    assert "Accuracy" not in audit("--pairs", "--datasets", "new")[0]
    printed = audit("--fr", "runs/fr")[0]
    accuracy, std = (100 * report["models"]["runs/fr"]["own"][key] for key in ("accuracy", "std"))
    assert f"{accuracy:.2f} ± {std:.2f} | {accuracy:13.2f} |" in printed

    asked, load = [], model.load_recogniser
    monkeypatch.setattr(evaluate, "load_recogniser", lambda path, bgr: asked.append(bgr) or load(path))
    audit("--bgr")
    audit("--no-bgr")
    audit()
    assert asked == [True] * 2 + [False] * 2 + [None] * 2


# ---------------------------------------------------------------------------------------------------- batches

def numbered_set(root, count=11):
    """A set whose images, people and landmarks all tell the number of the image."""
    numbers = torch.arange(count, dtype=torch.uint8)
    images = numbers.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    landmarks = numbers.view(-1, 1, 1).expand(-1, 5, 2) / 64
    save_set(root, images, 4, landmarks)
    return data.Faces([root])


def numbers_of(batch):
    """The numbers of the images of a batch, whose labels and landmarks must be their own."""
    x, labels, landmarks = batch
    numbers = [round(pixel * 127.5 + 127.5) for pixel in x[:, 0, 0, 0].tolist()]
    for number, image, label, points in zip(numbers, x, labels, landmarks, strict=True):
        assert same(image, torch.full((3, 8, 8), (number - 127.5) / 127.5))
        assert label == number // 4
        assert same(points, torch.full((5, 2), number / 64), 2e-3)
    return numbers


def test_each_epoch_shows_each_image_once_in_an_order_of_its_own(tmp_path):
    faces = numbered_set(tmp_path / "faces")

    def order(seed, first, last):
        return [numbers_of(batch) for batch in data.batches(faces, 3, seed, first, last)]
    steps = order(seed=0, first=0, last=9)                  # three epochs of three steps
    one, two, three = (sum(steps[i:i + 3], []) for i in (0, 3, 6))
    for numbers in (one, two, three):
        assert len({*numbers}) == 9                         # of eleven: the rest is left out
        assert numbers != sorted(numbers)
    assert {*one, *two, *three} == {*range(11)}
    assert one != two and two != three and three != one

    assert order(seed=0, first=4, last=8) == steps[4:8]     # a resumed run sees what it would have seen
    assert order(seed=1, first=0, last=9) != steps


# ====================================================================================================== faces

def stored(image, kind="PNG", **options):
    """A PIL image encoded, as an open file."""
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer


def jpeg(image, **options):
    """The bytes of a JPEG of an image (3, S, S)."""
    return stored(to_pil_image(image), "JPEG", **options).getvalue()


def contents(root):
    """The files below a folder, also behind links: {name: bytes}."""
    found = {}
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            path = Path(folder, file)
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def people(count, per_person, size=32):
    """Toy people, `per_person` pictures of each: images uint8, landmarks in [0, 1]."""
    who = 2 * torch.rand(count, toys.PERSON) - 1
    who = who.repeat_interleave(per_person, 0)
    circumstances = 2 * torch.rand(len(who), toys.PICTURE) - 1
    images, points = toys.draw_faces(who, circumstances, size)
    return model.to_uint8(2 * images - 1), points


def folder(root, count, per_person, size=32, landmarks=True):
    """A small image folder of toy people; what it holds."""
    images, points = people(count, per_person, size)
    save_set(root, images, per_person, points)
    if not landmarks:
        (root / "landmarks.csv").unlink()
    return images, points


def images_of(faces):
    """All images of a set, (M, 3, S, S)."""
    return torch.stack([torch.as_tensor(faces[i][0]) for i in range(len(faces))])


def test_folders_unite_by_identity_name(tmp_path):
    images, points = folder(tmp_path / "z", 3, 2)
    folder(tmp_path / "b", 4, 1, size=48, landmarks=False)
    faces = data.Faces([tmp_path / "z", tmp_path / "b"])
    assert list(faces.people) == ["person 0", "person 1", "person 2", "person 3"]
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2, 3]
    assert faces.size == 32 and len(faces) == 10            # the first decides on the size
    assert same(faces.landmarks[:6], points, 1e-3)
    assert faces.landmarks[6:].isnan().all()
    assert faces.path(3) == f"{tmp_path}/z/person 1/1.png"
    assert torch.equal(images_of(faces)[:6], images)


def test_people_are_the_rows_of_their_names_and_others_come_after_them():
    x, b, a, y = data.rows_of(["x", "b", "a", "y"], ["a", "b", "c"]).tolist()
    assert (a, b) == (0, 1) and x >= 3 and y >= 3 and x != y


def test_images_are_listed_by_person_and_name(tmp_path, capsys):
    """However deep they lie and behind links; not hidden ones, nor what lies above people."""
    names = "b/2.PNG a/1.jpg a/deep/0.png a/plain a/.hidden.png a/.git/3.png top.PNG a/a.txt grid.jpg"
    names += " lfw.bin landmarks.csv README a/.2.png.icloud a/.DS_Store a/.1.1a2b.tmp lost+found/1.png .Trash-0/p/1.png p/@eaDir/1.png"
    for name in names.split():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/5.webp").touch()
    (tmp_path / "set/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/link.png").symlink_to("link.png")    # leads nowhere
    os.mkfifo(tmp_path / "set/a/pipe.jpg")
    (tmp_path / "set/b/2.PNG").write_bytes(b"seven b")
    expected = ["a/1.jpg", "a/deep/0.png", "a/plain", "b/2.PNG", "c/5.webp"]
    left_out = ["a/.2.png.icloud", "a/.hidden.png", "a/a.txt", "a/link.png", "a/pipe.jpg", "top.PNG"]
    roots, people, others, rows = data.list_sources([tmp_path / "set"], "--data")
    said = capsys.readouterr().out
    assert "left out 6 files" in said and "a/.2.png.icloud" in said
    assert others == {f"{tmp_path}/set/{name}" for name in left_out}
    names, sizes, sources, labels = zip(*rows)
    assert roots == [tmp_path / "set"] and people == {"a": 0, "b": 1, "c": 2}
    assert [*map(os.fsdecode, names)] == expected and labels == (0, 0, 0, 1, 2)
    assert sizes == (0, 0, 0, 7, 0) and sources == (0,) * 5


def test_a_plain_folder_needs_no_tool(tmp_path, monkeypatch):
    """With what may lie beside its people, too; anything else is for tools/inputs.py to judge."""
    folder(tmp_path / "a", 2, 2)
    for name in ("lfw.bin", "grid.jpg", "manifest.csv"):
        (tmp_path / "a" / name).touch()
    for depth in ("L", "RGB"):
        Image.new(depth, (32, 32)).save(tmp_path / f"a/person 0/{depth}.jpg")
    monkeypatch.setitem(sys.modules, "tools.inputs", None)
    faces = data.Faces([tmp_path / "a"])
    assert len(faces) == 6 and faces.landmarks.isfinite().all((1, 2)).sum() == 4

    (tmp_path / "a/person 0/notes.txt").touch()
    for sources in (["a"], ["none"], [], ["b", "b"]):
        with pytest.raises(ModuleNotFoundError, match="inputs"):
            data.Faces([tmp_path / source for source in sources])


def test_tables_hold_any_name(tmp_path):
    rows = [["a, b", "1"], ["caf\udce9", "2"], ["two\nlines", ""]]
    data.write_csv(tmp_path / "new/table.csv", ["file", "number"], rows)
    assert data.read_csv(tmp_path / "new/table.csv") == [["file", "number"], *rows]
    with open(tmp_path / "new/table.csv", "a") as file:
        file.write("\n\n")                                  # empty lines are no rows
    assert len(data.read_csv(tmp_path / "new/table.csv")) == 4


@pytest.mark.parametrize("header", ["file,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n", ""])
def test_landmarks_are_found_by_name_in_pixels_of_their_image(tmp_path, header):
    points = data.TEMPLATE * 64
    points[0, 0] = -10                                      # near the image will do
    lines = []
    for name in ("b.png", "strange.png", "a.png"):
        lines.append(",".join([name, *map(str, points.flatten().tolist())]))
        points = points + 1
    (tmp_path / "landmarks.csv").write_text(header + "\n".join(lines))
    found = data.read_landmarks(tmp_path, ["a.png", "none.png", "b.png"], 64)
    assert same(found[2], (points - 3) / 64) and same(found[0], (points - 1) / 64)
    assert found[1].isnan().all()
    assert data.read_landmarks(tmp_path / "none", ["a.png"], 64).isnan().all()


@pytest.mark.parametrize("first", ["", "nan,", "200,", "-70,"])         # nothing, no number, far away
def test_landmarks_that_are_none_are_refused(tmp_path, capsys, first):
    (tmp_path / "landmarks.csv").write_text(f"a.png,{first}1,1,1,1,1,1,1,1,1")
    assert "a.png" in stops(capsys, data.read_landmarks, tmp_path, ["a.png"], 64)


def test_landmarks_are_written_with_two_digits_under_a_header(tmp_path):
    points = torch.arange(10.0).view(5, 2) + 0.126
    data.write_landmarks(tmp_path / "landmarks.csv", [("a.png", points)])
    header, row = data.read_csv(tmp_path / "landmarks.csv")
    assert header == "file x1 y1 x2 y2 x3 y3 x4 y4 x5 y5".split()
    assert row == ["a.png", *(f"{i}.13" for i in range(10))]


def test_faces_are_alike_in_memory_and_on_disk(tmp_path):
    """Of two sources: a set that was filled up comes last, whatever was named first."""
    folder(tmp_path / "real", 3, 2, size=48)
    folder(tmp_path / "more", 3, 2)
    (tmp_path / "more/person 1/0.png").write_bytes(b"broken")
    (tmp_path / "more/run.json").write_text('{"real_to": 4}')
    (tmp_path / "more/manifest.csv").touch()
    sources = [tmp_path / "more", tmp_path / "real"]
    with pytest.warns(UserWarning):
        memory, disk = data.Faces(sources), data.Faces(sources, memory=0)
        small = data.Faces(sources, 16)
        order = [torch.tensor([8, 0, 11]), torch.tensor([7])]           # 8 is broken
        loaded = [[*map(torch.cat, zip(*faces.loader(order)))] for faces in (memory, disk)]
    assert memory.size == disk.size == 48 and small.size == 16
    assert memory.items is not None and disk.items is None
    assert "/real/" in disk.path(0) and "/more/" in disk.path(6)
    assert disk.sides == [48, 32] and disk.source.tolist() == [0] * 6 + [1] * 6
    for images, indices in loaded:
        assert indices.tolist() == [9, 0, 11, 7]            # the next one stands in, with its index
        assert images.shape == (4, 3, 48, 48)
        for image, i in zip(images, indices.tolist()):
            with Image.open(disk.path(i)) as file:
                assert torch.equal(image, data.to_tensor(file.convert("RGB"), 48))
    for i in (0, 6):                                        # each source has landmarks of its own
        root = Path(disk.path(i)).parents[1]
        expected = data.read_landmarks(root, ["person 0/0.png"], disk.sides[disk.source[i]])
        assert torch.equal(disk.landmarks[i], expected[0])


def test_a_scan_shows_every_image_in_order(tmp_path):
    faces, order = numbered_set(tmp_path / "faces"), torch.arange(300) % 11
    seen = [*faces.scan(order, "two batches")]
    assert torch.equal(torch.cat([i for _, i in seen]), order)
    images = torch.cat([images for images, _ in seen])
    assert torch.equal(images[:, 0, 0, 0].long(), order)


def test_workers_are_spared_a_signal_to_the_group(tmp_path):
    """So that the training step which is running gets its images."""
    faces = numbered_set(tmp_path / "faces", 101)
    faces.items = None                                      # as if memory did not suffice
    seen = faces.loader([np.array([i]) for i in range(90)])
    begun = [next(seen)[1].item() for _ in range(32)]       # all workers have begun
    workers = multiprocessing.active_children()
    assert workers and all(os.getpgid(worker.pid) != os.getpgid(0) for worker in workers)
    assert begun + [i.item() for _, i in seen] == [*range(90)]


def test_a_killed_training_leaves_no_worker_behind(tmp_path):
    """Though nobody reads the batches that its workers have ready."""
    faces = numbered_set(tmp_path / "faces", 101)
    faces.items, faces.size = None, 64                      # batches larger than a pipe holds
    ended, alive = os.pipe()                                # closed once all who inherit it have ended

    def train():
        for _ in faces.loader([np.arange(20)] * 90):
            os.kill(os.getpid(), signal.SIGKILL)
    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join()
    os.close(alive)
    assert process.exitcode == -signal.SIGKILL
    assert select.select([ended], [], [], 30)[0]
    os.close(ended)


def test_a_crop_of_another_size_is_one_clear_line_from_a_worker_too(tmp_path, capsys):
    faces = numbered_set(tmp_path / "faces", 101)
    Image.new("RGB", (9, 8)).save(tmp_path / "faces/person 0/1.png")
    faces.items = None                                      # as if memory did not suffice
    said = stops(capsys, list, faces.loader([np.array([0, 1])]))
    assert said.startswith(f"error: {tmp_path}/faces/person 0/1.png: 9 x 8 pixels, expected 8 x 8")


def raises(error):
    """A script that fails so."""
    def main():
        raise error
    return main


WORKER = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\nOSError: [Errno 5] a.png"
NO_MEMORY = "the memory does not suffice"


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), NO_MEMORY),
    (RuntimeError("CUDA error: out of memory\nCompile with"), NO_MEMORY),
    (RuntimeError("std::bad_alloc"), NO_MEMORY),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), NO_MEMORY),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), NO_MEMORY),
    (MemoryError(), NO_MEMORY),
    (OSError(12, "Cannot allocate memory"), "Cannot allocate memory; put it right"),
    (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), NO_MEMORY),
    (RuntimeError("[pair.cc:547] Connection closed by peer"), "closed by peer; put it right"),
    (RuntimeError("can't start new thread"), "error: RuntimeError: can't start new thread; put it right"),
    (BlockingIOError(11, "Resource temporarily unavailable"), "temporarily unavailable; put it right"),
    (OSError(19, "No such device", "train.rec"), "No such device: 'train.rec'; put it right"),
    (OSError(WORKER), "error: OSError: [Errno 5] a.png; put it right"),
    (OSError(), "error: OSError: ; put it right")])
def test_what_the_system_refuses_is_one_line_that_says_how_to_continue(capsys, error, said):
    line = stops(capsys, model.run, raises(error), "or do less")
    assert said in line and ("or do less" in line) == (said == NO_MEMORY)
    assert "same command again, which continues" in line and "Traceback" not in line and "\n" not in line


def test_memory_that_a_cpu_lacks_is_told_apart_from_a_mistake(capsys):
    assert NO_MEMORY in stops(capsys, model.run, lambda: torch.empty(10 ** 15))
    assert NO_MEMORY in stops(capsys, model.run, lambda: np.empty(10 ** 15))
    with pytest.raises(RuntimeError, match="size"):
        model.run(lambda: torch.ones(2) + torch.ones(3))
    with pytest.raises(ValueError):
        model.run(raises(ValueError("a mistake")))


def test_scripts_run_where_streams_are_a_notebook_s():
    printed = io.StringIO()                                 # like those, it lacks `reconfigure`
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        model.run(lambda: print("done"))
    assert printed.getvalue() == "done\n"


def test_workers_that_fail_or_are_killed_are_one_line(tmp_path, monkeypatch, capsys):
    faces = numbered_set(tmp_path / "faces", 101)
    faces.items = None                                      # as if memory did not suffice
    order = [np.array([i]) for i in range(90)]

    def kill():
        for _ in faces.loader(order):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
    assert NO_MEMORY in stops(capsys, model.run, kill)

    def fails(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(data, "open_image", fails)
    line = stops(capsys, model.run, lambda: [*faces.loader(order)])
    assert line.startswith("error: PermissionError: [Errno 13] Permission denied: '")
    assert "person" in line and len(line) < 400


def test_a_folder_that_may_not_be_read_is_not_passed_by(tmp_path, monkeypatch):
    def refuses(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(PermissionError):
        list(data.list_files(tmp_path))


def test_for_an_unreadable_record_the_next_one_stands_in(tmp_path):
    images = random_images(2, 8)
    pngs = [stored(to_pil_image(image)).getvalue() for image in images]
    write_records(tmp_path / "set", [pngs[0], b"broken", pngs[1]], [0, 0, 1])
    with pytest.warns(UserWarning):
        faces = data.Faces([tmp_path / "set"])
    assert torch.equal(images_of(faces), images[[0, 1, 1]])
    assert [i for _, i in faces.items] == [0, 2, 2]


def test_the_last_image_is_followed_by_the_first_and_a_disk_that_fails_is_said(tmp_path, monkeypatch):
    folder(tmp_path / "a", 2, 2)
    (tmp_path / "a/person 1/1.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="person 1/1.png.*next image stands in"):
        assert data.Faces([tmp_path / "a"], memory=0)[3][1] == 0
    faces = data.Faces([tmp_path / "a"], memory=0)

    def fails(*_):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(data, "open_image", fails)
    with pytest.raises(OSError, match="Input/output"):
        faces[0]


def test_people_who_are_numbers_in_two_sources_may_be_strangers(tmp_path, capsys):
    """They are refused, unless the second source fills up the people of the first."""
    for source in "abc":
        for person in ("7", "both", f"name {source}"):
            folder(tmp_path / source / person, 1, 2, landmarks=False)
    sources = [tmp_path / source for source in "abc"]
    said = stops(capsys, data.Faces, sources[:2])
    assert "a" in said and "7" in said and "strangers" in said

    (tmp_path / "b/run.json").write_text('{"real_to": 4}')
    (tmp_path / "b/manifest.csv").touch()                   # it is complete
    for order in (sources[:2], sources[1::-1]):
        faces = data.Faces(order)
        assert faces.labels.bincount().tolist() == [4, 4, 2, 2]
        assert "2 of its people" in capsys.readouterr().out
    assert "7" in stops(capsys, data.Faces, [sources[1], sources[0], sources[2]])
    (tmp_path / "b/run.json").write_text('{"real_to": null}')           # virtual people, named alike
    assert "7" in stops(capsys, data.Faces, sources[:2])


def test_for_an_unreadable_image_the_next_one_stands_in(tmp_path):
    """With its own label and landmarks; batches keep their size."""
    folder(tmp_path / "a", 2, 60)
    broken = tmp_path / "a/person 0/9.png"                  # the last of person 0: names are sorted as text
    broken.write_bytes(b"broken")
    faces = data.Faces([tmp_path / "a"])
    first = faces.labels.tolist().index(1)
    seen = [*data.batches(faces, 40, 0, 0, 3)]              # one epoch
    x, labels, landmarks = (torch.cat(part) for part in zip(*seen))
    assert x.shape == (120, 3, 32, 32)
    assert labels.bincount().tolist() == [59, 61]
    stand_ins = (landmarks == faces.landmarks[first]).all((1, 2))
    assert stand_ins.sum() == 2


def test_an_unreadable_image_is_warned_about_and_a_set_of_them_refused(tmp_path, capsys):
    folder(tmp_path / "a", 2, 2)
    (tmp_path / "a/person 1/0.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="person 1/0.png"):
        images_of(data.Faces([tmp_path / "a"]))
    for path in (tmp_path / "a").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.warns(UserWarning):
        assert "any other" in stops(capsys, data.Faces, [tmp_path / "a"])
    folder(tmp_path / "b", 1, 1)
    with pytest.warns(UserWarning):                         # images of other sources do not stand in
        assert "a: expected images" in stops(capsys, data.Faces, [tmp_path / "b", tmp_path / "a"])


def test_a_training_step_waits_for_no_copy(tmp_path, monkeypatch):
    faces, to, asked = numbered_set(tmp_path / "faces"), torch.Tensor.to, []

    def spy(tensor, *given, **options):
        asked.append(options.get("non_blocking"))
        return to(tensor, *given, **options)
    monkeypatch.setattr(torch.Tensor, "to", spy)
    list(data.batches(faces, 5, 0, 0, 2))
    assert asked.count(True) == 2 * 3                       # images, labels, landmarks


def test_an_image_is_opened_as_it_is_meant_to_be_seen():
    """Upright, of any depth in 8 bits, and on white where it is transparent."""
    image = to_pil_image(people(1, 1)[0][0])
    exif = Image.Exif()
    exif[0x112] = 6                                         # seen after a quarter turn
    turned = stored(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert np.array_equal(data.open_image(turned), image)

    grey = np.asarray(image.convert("L"))
    deep = [(grey.astype(np.uint16) * 257, "PNG"),
            (grey.astype(np.int32) * 257, "TIFF"),
            (grey / np.float32(255), "TIFF")]
    for values, kind in deep:
        opened = data.open_image(stored(Image.fromarray(values), kind))
        assert np.array_equal(np.asarray(opened)[..., 0], grey)

    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(data.open_image(stored(clear))) == 255).all()


def test_an_image_starts_no_program(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    image = to_pil_image(people(1, 1)[0][0])
    with pytest.raises(Exception):
        data.open_image(stored(image, "EPS"))
    assert not (tmp_path / "started").exists()


def test_files_and_rows_that_are_not_used_are_said(tmp_path, capsys):
    folder(tmp_path / "a", 2, 2)
    (tmp_path / "a/person 0/2020").mkdir()
    (tmp_path / "a/person 0/0.png").rename(tmp_path / "a/person 0/2020/0.jfif")
    (tmp_path / "a/person 1/0.heic").touch()
    faces = data.Faces([tmp_path / "a"])
    assert faces.landmarks.isnan().sum() == 10
    said = capsys.readouterr().out
    assert faces.left_out == {f"{tmp_path}/a/person 1/0.heic"}
    assert faces.labels.tolist() == [0, 0, 1, 1]            # folders in folders belong to the person
    assert "left out 1 files" in said and "person 1/0.heic" in said
    assert "1 of its 4 rows name no image" in said


def test_images_that_cannot_be_read_are_left_out_once_they_are_looked_at(tmp_path):
    folder(tmp_path / "a", 2, 2)
    for i in (0, 1):
        (tmp_path / f"a/person 1/{i}.png").write_bytes(b"broken")
    broken = {f"{tmp_path}/a/person 1/{i}.png" for i in (0, 1)}
    with pytest.warns(UserWarning):
        assert data.Faces([tmp_path / "a"]).left_out == broken
        faces = data.Faces([tmp_path / "a"], memory=0)
        assert not faces.left_out
        for _ in range(2):
            list(faces.scan(torch.tensor([0, 2]), ""))
            assert faces.left_out == {f"{tmp_path}/a/person 1/0.png"}


def test_landmarks_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    faces = numbered_set(tmp_path / "faces")
    read_landmarks, asked = data.read_landmarks, []
    monkeypatch.setattr(data, "read_landmarks", lambda *given: asked.append(1) or read_landmarks(*given))
    x, labels = next(data.batches(faces, 3, 0, 0, 1, landmarks=False))
    assert x.shape == (3, 3, 8, 8) and labels.shape == (3,) and not asked
    for _ in range(2):
        assert len(next(data.batches(faces, 3, 0, 0, 1))) == 3
    assert asked == [1]


def test_a_digest_tells_data_by_what_they_are_and_not_by_where_they_lie(tmp_path, monkeypatch):
    folder(tmp_path / "a", 3, 2)
    monkeypatch.chdir(tmp_path)
    digest = data.Faces(["a"]).digest()
    assert digest.startswith("6 images of 3 people, digest ")
    Path("a").rename("b")
    assert data.Faces(["./b/"]).digest() == data.Faces([f"{tmp_path}/b"]).digest() == digest
    image = Path("b/person 1/0.png")
    content = image.read_bytes()

    found = {digest}
    image.write_bytes(content + b" ")
    found.add(data.Faces(["b"]).digest())
    image.rename("b/person 1/2.png")
    found.add(data.Faces(["b"]).digest())
    Path("b/person 1").rename("b/zoe")
    found.add(data.Faces(["b"]).digest())
    write_records(Path("r"), [PNG] * 3, [0, 1, 1])
    found.add(data.Faces(["r"]).digest())
    write_records(Path("r"), [PNG] * 3, [0, 0, 1])
    found.add(data.Faces(["r"]).digest())
    write_records(Path("r"), [PNG + bytes(4), PNG, PNG], [0, 0, 1])
    found.add(data.Faces(["r"]).digest())
    assert len(found) == 7


@pytest.mark.parametrize("content, said", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
    (b"\n<!DOCTYPE html><html>", "web page")])
def test_it_is_said_what_a_file_is_in_place_of_what_was_expected(tmp_path, capsys, content, said):
    for name in ("a/p/1.png", "fr.ckpt", "fr.safetensors", "lfw.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match=said):
        stops(capsys, data.Faces, [tmp_path / "a"])
    for name in ("fr.ckpt", "fr.safetensors"):
        assert said in stops(capsys, model.load_recogniser, tmp_path / name)
    assert said in stops(capsys, data.read_benchmark, tmp_path / "lfw.bin", 32)


def test_an_error_advises_nobody_to_run_what_is_in_a_file(tmp_path, capsys):
    torch.save({"step": Path("of a class")}, tmp_path / "state.pt")
    said = stops(capsys, model.resume, tmp_path, {})
    assert "holds more than tensors" in said and "weights_only" not in said


def test_landmarks_in_another_order_are_warned_about(tmp_path, capsys):
    folder(tmp_path / "a", 2, 2)
    path = tmp_path / "a/landmarks.csv"
    exchanged = []
    for name, *numbers in csv.reader(path.open()):
        eyes, nose, mouth = numbers[:4], numbers[4:6], numbers[6:]
        exchanged.append(",".join([name, *mouth, *nose, *eyes]))
    assert data.read_landmarks(tmp_path / "a", ["person 1/0.png"], 32).isfinite().all()
    assert "WARNING" not in capsys.readouterr().out
    path.write_text("\n".join(exchanged))
    assert data.read_landmarks(tmp_path / "a", ["person 1/0.png"], 32).isfinite().all()
    assert "WARNING" in capsys.readouterr().out


# ============================================================================= the scripts, as users run them

def here(name, *args, cwd, code=0, env={}, rank=0):
    """Runs a script in this process, which has imported PyTorch already; what it prints."""
    printed, exit_code = io.StringIO(), 0
    out, err = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with pytest.MonkeyPatch.context() as patch, out, err:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *map(str, args)])
        patch.setattr(os, "environ", os.environ | env)
        patch.setattr(sample, "RANK", rank)
        try:
            importlib.import_module(name.removesuffix(".py")).main()
        except SystemExit as stop:
            exit_code = stop.code
    assert exit_code == code, printed.getvalue()
    return printed.getvalue()


def forked(function, *calls):
    """Calls a function with each of several tuples of arguments at once, each in a copy of this process,
    which has imported PyTorch already; the exit codes. When one has failed, the others are ended.
    """
    def call(*arguments):
        tqdm.set_lock(threading.RLock())                    # the parent's would be shared, and kept if killed
        function(*arguments)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=call, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    try:
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes):
                break                                       # the others may wait for it for half an hour
            assert time.monotonic() < deadline, "a process has not ended within a minute"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def start(script, arguments, cwd):
    """Runs a script in this process as in a new one: none of our modules is imported yet."""
    os.chdir(cwd)
    for name in [*sys.modules]:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent in (HERE, HERE / "tools"):
            del sys.modules[name]
    elsewhere = [path for path in sys.path if Path(path).resolve() != HERE]
    sys.path[:] = [str(Path(script).parent), *elsewhere]
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


def subprocess_of(*command, cwd):
    """Runs a command with Python, as a user does, for a minute at most; its exit code and what it prints."""
    command = [sys.executable, *map(str, command)]
    started = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    try:
        printed, _ = started.communicate(timeout=60)
    except BaseException:
        os.killpg(started.pid, signal.SIGKILL)              # with all that it has started
        raise
    return started.returncode, printed


def stops(capsys, call, *args):
    """Calls what must end the program with exit code 2 and one line on stderr; that line."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    errors = re.findall("error: .*", capsys.readouterr().err)
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


FR = "--data faces --batch 8 --epochs 1 --head adaface".split()         # 12 steps
DIT = "--arch Ti/8 --steps 1 --batch 8".split()
SAMPLE = "--virtual 5 --per-id 3 --steps 3 --batch 4 --real twins".split()          # rejects nothing
ALONE = "--data runs/virtual --virtual 0 --batch 8 --epochs 1 --out runs/fr-virtual".split()
COMMANDS = [("fr_train.py", FR), ("dit_train.py", DIT), ("sample.py", SAMPLE), ("fr_train.py", ALONE),
            ("evaluate.py", [])]
PNG = stored(Image.new("RGB", (8, 8))).getvalue()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """All four scripts once, as a user runs them, on a small drawn set: (working folder, printed texts)."""
    cwd, printed = tmp_path_factory.mktemp("pipeline"), {}
    torch.manual_seed(0)
    folder(cwd / "faces", 24, 4)
    for name in ("one", "other"):                           # strangers who look the same: thresholds of 1
        (cwd / "twins" / name).mkdir(parents=True)
        (cwd / "twins" / name / "0.png").write_bytes(PNG)
    held_out = people(20, 4)[0].view(20, 4, 3, 32, 32)
    toys.write_bin(cwd / "faces/held.bin", held_out, 100, torch.Generator())
    for name, arguments in COMMANDS:
        if arguments is ALONE:
            here(name, *arguments, cwd=cwd)                 # a second subprocess of fr_train.py shows no more
            continue
        code, printed[name] = subprocess_of(HERE / name, *arguments, cwd=cwd)
        assert code == 0, printed[name]
    return cwd, printed


@pytest.fixture(scope="module")
def painter(pipeline):
    """Beside the pipeline's DiT, a smaller one of random weights, which draws everybody differently."""
    tensors, meta = model.load_model(pipeline[0] / "runs/dit", "dit")
    dit = randomise(DiT(32, dim=64, width=16, depth=1, heads=2), 0.1)
    parts = {"dit": dit.state_dict(), "poses": {"landmarks": tensors["poses.landmarks"]}}
    model.save_model(pipeline[0] / "small/dit", "dit", dit.config, parts, **{
        name: meta[name] for name in ("fr_sha256", "data")})
    return pipeline[0] / "small/dit"


@pytest.fixture
def copied(pipeline, tmp_path):
    """The pipeline's folder, to be changed."""
    return shutil.copytree(pipeline[0], tmp_path / "copied")


def edit(folder, change=lambda tensors: None, **meta):
    """Changes tensors and metadata of a checkpoint, of the stage that its folder is named after."""
    stage = folder.name.split("-")[0]
    tensors, before = model.load_model(folder, stage)
    change(tensors)
    metadata = {"vigface": json.dumps(before | meta)}
    save_file(tensors, folder / "model.safetensors", metadata)


def manifest(root):
    """The rows of a set's manifest.csv."""
    with open(root / "manifest.csv") as file:
        return list(csv.DictReader(file))


def pictures_of(files):
    """The names of the pictures of people in a set."""
    return sorted(name for name in files if name.endswith(".jpg") and "/" in name)


def test_the_sampled_set_is_what_the_readme_says(pipeline):
    virtual = pipeline[0] / "runs/virtual"
    files = contents(virtual)
    assert {*files} >= {"grid.jpg", "landmarks.csv", "manifest.csv", "run.json"}
    pictures = pictures_of(files)
    recogniser = model.digest(pipeline[0] / "runs/fr")[:6]  # so people of two recognisers have other names
    expected = [f"{recogniser}-{person:06d}/{i:04d}.jpg" for person in range(5) for i in range(3)]
    assert pictures == expected

    accepted = [row for row in manifest(virtual) if row["verdict"] == "accepted"]
    assert [row["file"] for row in accepted] == pictures
    poses = [int(row["landmarks_from"]) for row in accepted]
    assert len({*poses}) > 10                               # of any training faces
    known = data.Faces([pipeline[0] / "faces"]).landmarks
    drawn = data.Faces([virtual])
    assert drawn.size == 32
    assert same(drawn.landmarks, known[poses], 0.01 / 32)


def test_what_stage_2_saves_is_about_nobody(pipeline):
    cwd, printed = pipeline
    tensors, meta = model.load_model(cwd / "runs/dit", "dit")
    others = [name for name in tensors if not name.startswith("dit.")]
    assert others == ["poses.landmarks"] and not meta["names"]
    with Image.open(cwd / "runs/dit/preview-000001.jpg") as image:
        assert image.size == (8 * 33 + 1, 4 * 33 + 1)       # four virtual people, nobody real
    assert "own cosine real" in printed["dit_train.py"]


def test_the_report_of_the_pipeline(pipeline):
    cwd, printed = pipeline
    report = json.loads((cwd / "runs/report/report.json").read_text())
    assert {*report["models"]} == {"runs/fr", "runs/fr-virtual"}
    for scores in report["models"].values():
        assert 0 <= scores["average"] == scores["held"]["accuracy"] <= 1
    assert "CPLFW" in printed["evaluate.py"].split("bsent")[1]

    row = report["datasets"]["runs/virtual"]
    assert {*row} >= {"consistency", "separability", "diversity"}
    assert row["images"] == 15 and row["identities"] == 5
    assert report["real"]["images"] == 96
    leakage = row["leakage"]
    assert [*leakage["tests"]] == ["person", "centre", "image", "copy", "somebody"]
    # Both recognisers had a part: one rejected pictures, one was trained on those that are left.
    assert leakage["verdict"] == evaluate.verdict_of(leakage, False) != "clean"
    assert leakage["strangers"] == 15                      # people of held.bin who have three images
    assert report["strangers"] == "of the benchmarks"
    assert leakage["misaligned"] is None and leakage["left_out"] == 0
    assert any(name.endswith("closest.jpg") for name in contents(cwd / "runs/report"))


def test_the_first_recogniser_judges_sets_against_its_own_faces(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline[0])
    report = json.loads(Path("runs/report/report.json").read_text())
    assert report["judge"] == "runs/fr"
    backbone, prototypes, meta = model.load_recogniser("runs/fr")
    real = evaluate.embed_faces(backbone, prototypes, data.Faces(["faces"]))
    drawn = evaluate.embed_faces(backbone, prototypes, data.Faces(["runs/virtual"]))
    unseen = evaluate.embed_benchmarks(backbone, {"held": "faces/held.bin"})
    _, leakage = evaluate.judge_set(drawn, real, unseen)
    written = report["datasets"]["runs/virtual"]
    tests, expected = written["leakage"].pop("tests"), leakage.pop("tests")
    for test, row in expected.items():
        assert tests[test] == pytest.approx(row, abs=1e-4)
    assert {key: written["leakage"][key] for key in leakage} == pytest.approx(leakage, abs=1e-4)
    del written["leakage"]
    assert written == pytest.approx(evaluate.quality_row(drawn, prototypes), abs=1e-4)


def test_a_stage_refuses_what_is_not_its_own_or_unfinished_before_it_writes(copied):
    def refused(message, *command):
        before = contents(copied)
        assert message in here(*command, cwd=copied, code=2)
        assert before == contents(copied)
    assert "already complete" in here("sample.py", *SAMPLE, cwd=copied)
    refused("virtual = 5, now 4", "sample.py", *SAMPLE, "--virtual", 4)
    refused("epochs = 1, now 3", "fr_train.py", *FR, "--epochs", 3)
    edit(copied / "runs/fr", lambda tensors: tensors["prototypes.virtual"].neg_())      # as if trained anew
    refused("started with fr", "dit_train.py", *DIT)
    refused("another recogniser", "sample.py", *SAMPLE, "--out", "new")
    (copied / "runs/dit/model.safetensors").unlink()        # has not ended
    refused("runs/dit/model.safetensors: no such file", "sample.py", *SAMPLE, "--out", "new")
    (copied / "runs/fr/model.safetensors").unlink()
    refused("runs/fr/model.safetensors: no such file", "dit_train.py", *DIT, "--out", "new")


@pytest.mark.parametrize("flags", [[], ["--paper"]])
def test_the_identity_loss_is_the_paper_s_where_it_is_asked_for(studio, monkeypatch, flags):
    losses, dit_loss = [], model.dit_loss
    spy = lambda *given, paper: losses.append(paper) or dit_loss(*given, paper=paper)
    monkeypatch.setattr(dit_train, "dit_loss", spy)
    monkeypatch.setattr(dit_train, "preview", lambda *_: torch.zeros(8, 8))
    monkeypatch.setitem(model.DIT_SIZES, "Ti", dict(width=16, depth=1, heads=2))
    here("dit_train.py", *DIT, *flags, "--out", "new", cwd=studio)
    assert losses == [bool(flags)]


def test_landmarks_are_found_on_the_way_and_kept_beside_the_run(tmp_path, monkeypatch):
    images, points = folder(tmp_path / "bare", 4, 4, landmarks=False)
    here("fr_train.py", "--data", "bare", "--epochs", 1, "--batch", 4, cwd=tmp_path)
    before = contents(tmp_path / "bare")
    known = {image.numpy().tobytes(): face for image, face in zip(images, points)}
    known[images[0].numpy().tobytes()] = torch.full((5, 2), torch.nan)          # the detector finds no face

    def look(_, crops):
        return torch.stack([known[crop.numpy().tobytes()] for crop in crops])
    monkeypatch.setattr(retinaface, "load_detector", lambda *_: None)
    monkeypatch.setattr(retinaface, "crop_landmarks", look)
    monkeypatch.setattr(dit_train, "preview", lambda *_: torch.zeros(8, 8))
    command = "dit_train.py --arch Ti/8 --steps 1 --batch 4".split()
    assert "15 of 16" in here(*command, cwd=tmp_path)

    monkeypatch.delattr(retinaface, "crop_landmarks")             # what was found is not looked for again
    written = model.digest(tmp_path / "runs/dit")
    for name in ("state.pt", "model.safetensors"):          # as if killed before they were written
        (tmp_path / "runs/dit" / name).unlink()
    assert "15 of 16" in here(*command, cwd=tmp_path)
    assert written == model.digest(tmp_path / "runs/dit")
    poses = model.load_model(tmp_path / "runs/dit", "dit")[0]["poses.landmarks"]
    assert same(poses[1:], points[1:]) and same(poses[0], data.TEMPLATE)
    assert before == contents(tmp_path / "bare")


def test_one_planted_copy_in_a_hundred_images_is_caught(copied):
    """As it is, mirrored, with other colours, encoded anew: with the right person and file."""
    original = sorted((copied / "faces").glob("*/*.png"))[5]
    image = pil_to_tensor(data.open_image(original))
    encoded = pil_to_tensor(data.open_image(io.BytesIO(jpeg(image, quality=80))))
    torch.manual_seed(9)
    folder(copied / "none", 50, 2)
    copies = dict(same=image, mirrored=image.flip(2), recoloured=image[[2, 0, 1]], encoded=encoded)
    for name, copy in copies.items():
        shutil.copytree(copied / "none", copied / name)
        to_pil_image(copy).save(copied / name / "person 0/copy.png")
    here("evaluate.py", "--datasets", "none", *copies, "--out", "out", cwd=copied)

    report = json.loads((copied / "out/report.json").read_text())
    verdicts = {name: row["leakage"]["verdict"] for name, row in report["datasets"].items()}
    assert verdicts.pop("none") != "leaks" and verdicts == dict.fromkeys(copies, "leaks")
    with open(copied / "out/leaks.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["test"] == "copy"]
    assert [row["what"] for row in rows] == [f"{name}/person 0/copy.png" for name in copies]
    for row in rows:
        assert row["dataset"] == row["what"].split("/")[0]
        assert row["person"] == original.parent.name
        assert row["image"].endswith(str(original.relative_to(copied)))


def test_the_sampler_judges_as_the_report_and_compares_nobody_with_themselves(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline[0])
    monkeypatch.setattr(sample, "ENOUGH", 0)
    backbone, prototypes, fr = model.load_recogniser("runs/fr")
    faces, W = data.Faces(["faces"]), prototypes.to_draw()
    rows = data.rows_of(faces.people, fr["names"])
    wanted = torch.full([9], 3)                             # nine people of three pictures
    real = sample.embed_real(backbone, prototypes, faces, rows, wanted)
    naive = evaluate.embed_faces(backbone, prototypes, faces)
    expected = evaluate.lines_of(evaluate.strangers_to(naive, wanted))
    del expected["copy"]                                    # drawn pictures are no copies
    assert real.lines == expected
    prototypes.settle(moment_of_people(naive.f, naive.labels))
    assert same(W, prototypes.to_draw(), 1e-4)              # stage 1 did so before its last save

    chosen = [0, 5, 9]
    images = images_of(faces)[chosen]

    def verdicts(rows):
        jobs = [sample.Job(row, "somebody", 0, 0, 0) for row in rows]
        return sample.judge(backbone, W, real, jobs, images)[0]
    for verdict in verdicts([24, 24, 24]):                  # as of a virtual person
        assert verdict.verdict == "leak"
        assert float(verdict.cos_nearest_image) > 0.999
    for verdict in verdicts(faces.labels[chosen].tolist()):
        assert float(verdict.cos_nearest_image) < 0.999


def sampled(pipeline, where, *arguments, lines={}, **options):
    """Runs sample.py in folder `where` with such lines (without any: no rule); what it left in where/set."""
    where.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        far(patch, **lines)
        here("sample.py", *SAMPLE, *arguments, *flags_of(pipeline), cwd=where, **options)
    return contents(where / "set")


def flags_of(pipeline):
    """How sample.py is told of `painter` and the recogniser and faces of the pipeline, from elsewhere."""
    cwd = pipeline[0]
    return ["--dit", cwd / "small/dit", "--fr", cwd / "runs/fr", "--real", cwd / "faces", "--out", "set"]


def near_together(pipeline, root, drawn):
    """{identity: cosine to somebody real, of the sum of all pictures but leaks, as they were drawn}."""
    backbone, prototypes, _ = model.load_recogniser(pipeline[0] / "runs/fr")
    real = evaluate.embed_faces(backbone, prototypes, data.Faces([pipeline[0] / "faces"]))
    pictures, near = {}, {}
    for _, jobs, images in drawn:
        pictures |= {(job.name, str(job.index), str(job.attempt)): image for job, image in zip(jobs, images)}
    rows = [row for row in manifest(root) if row["verdict"] != "leak"]
    for name, some in itertools.groupby(rows, lambda row: row["identity"]):
        images = torch.stack([pictures[name, row["index"], row["attempt"]] for row in some])
        centre = unit(model.embed(backbone, images).sum(0))
        near[name] = (evaluate.centres_of(real) @ centre).max().item()
    return near


@pytest.fixture(scope="module")
def rejecting(pipeline, painter, tmp_path_factory):
    """A set of which about half was rejected at first, and then one person: (lines, its folder, its files,
    what was drawn).
    """
    everything, before, where = map(tmp_path_factory.mktemp, ("everything", "before", "whole"))
    sampled(pipeline, everything)
    nearest = []
    for row in manifest(everything / "set"):
        nearest.append(max(float(row["cos_nearest_real"]), float(row["cos_nearest_image"])))
    line = np.sort(nearest)[6:8].mean()                     # between two of all
    line = float(f"{line:.4f}5")                            # rows have four digits
    lines = dict(centre=line, image=line)
    drawn, draw = [], sample.draw

    def spy(dit, W, poses, jobs, args):
        images = draw(dit, W, poses, jobs, args)
        drawn.append((W, list(jobs), images))
        return images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "draw", spy)
        sampled(pipeline, before, lines=lines)
    near = near_together(pipeline, before / "set", drawn)
    lines["person"] = np.mean(sorted(near.values())[-2:])   # the nearest person is over it
    return lines, where / "set", sampled(pipeline, where, lines=lines), drawn


def test_pictures_too_near_to_real_people_are_drawn_again_and_left_out_at_last(rejecting):
    lines, root, files, drawn = rejecting
    rows, attempts = manifest(root), {}
    for row in rows:
        close = [float(row[column]) > lines["image"] for column in ("cos_nearest_real", "cos_nearest_image")]
        assert row["verdict"] in (["leak"] if any(close) else ["accepted", "person"])
        picture = row["identity"], row["index"]
        attempts.setdefault(picture, []).append((int(row["attempt"]), any(close)))
    assert len(attempts) == 15 < len(rows)
    for tries in attempts.values():                         # until one is accepted, five at most
        last = len(tries) - 1
        assert tries[:-1] == [(i, True) for i in range(last)]
        assert tries[-1] in ((last, False), (4, True))
    assert any(len(tries) > 1 for tries in attempts.values())

    accepted = [row["file"] for row in rows if row["verdict"] == "accepted"]
    assert accepted == pictures_of(files)
    landmarks = files["landmarks.csv"].decode().splitlines()[1:]
    assert accepted == [text.split(",")[0] for text in landmarks]


def test_a_person_whose_pictures_together_are_too_near_is_left_out(pipeline, rejecting):
    lines, root, files, drawn = rejecting
    near = near_together(pipeline, root, drawn)
    verdicts = {name: {row["verdict"] for row in manifest(root) if row["identity"] == name} for name in near}
    for name, cosine in near.items():
        left_out = cosine > lines["person"]
        assert left_out == ("person" in verdicts[name]) != ("accepted" in verdicts[name])
        assert left_out != (root / name).exists()
    assert max(near.values()) > lines["person"] > min(near.values())


def test_each_attempt_is_another_picture_of_a_settled_prototype_in_a_pose_of_its_own(pipeline, rejecting):
    _, _, _, drawn = rejecting
    _, prototypes, _ = model.load_recogniser(pipeline[0] / "runs/fr")
    pictures, poses = {}, {}
    for W, jobs, images in drawn:
        assert torch.equal(W, prototypes.to_draw())
        assert len(jobs) == 16 and len({*jobs}) <= 4        # of --batch 4; the last job fills the batch up
        for job, image in zip(jobs, images):
            assert job.row >= len(prototypes.real)
            pictures[job[:4]] = image.numpy().tobytes()
            poses.setdefault((job.row, job.index), set()).add(job.pose)
    assert len({*pictures.values()}) == len(pictures) > 15
    assert all(len(some) == 1 for some in poses.values())   # an attempt changes the noise, not the pose
    assert len(set.union(*poses.values())) > 10


def test_another_seed_draws_other_pictures_in_other_poses(pipeline, painter, tmp_path):
    before = sampled(pipeline, tmp_path / "0")
    after = sampled(pipeline, tmp_path / "1", "--seed", 1)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in pictures_of(before))
    poses = [[row["landmarks_from"] for row in manifest(tmp_path / seed / "set")] for seed in "01"]
    assert poses[0] != poses[1]


def run_until_killed(name, function, count, arguments, cwd, lines):
    """Runs a script in this process, which is killed at its count-th call of a function of model.py."""
    model.PROCESS = f"killed-{count}"                       # a fork would have its parent's
    patch = pytest.MonkeyPatch()
    interrupting(patch, model, function, count, signal.SIGKILL)
    for module in (data, evaluate, fr_train, dit_train, sample):
        patch.setattr(module, function, getattr(model, function), raising=False)
    if lines:
        far(patch, **lines)
    here(name, *arguments, cwd=cwd)


def killed(name, function, count, *arguments, cwd, lines=None):
    """Runs a script in a copy of this process and kills it at its count-th call of a function of model.py."""
    assert forked(run_until_killed, (name, function, count, arguments, cwd, lines)) == [-signal.SIGKILL]


def test_killed_sampling_continues_to_the_same_bytes(pipeline, rejecting, tmp_path):
    lines, _, whole, _ = rejecting
    for moment in (2, 4, 9, 3):                             # files after each start
        killed("sample.py", "replacing", moment, *SAMPLE, *flags_of(pipeline), cwd=tmp_path, lines=lines)
    for name, content in contents(tmp_path / "set").items():
        part = name.endswith(".tmp") or name.startswith(".verdicts")
        # Never half of a picture. Who is left out in the end is still there.
        assert part or content == whole.get(name, content)
    files = sampled(pipeline, tmp_path, lines=lines)
    assert {name: files[name] for name in files if not name.endswith(".tmp")} == whole


def test_shared_sampling_gives_the_same_bytes(pipeline, rejecting, tmp_path, monkeypatch):
    lines, _, whole, _ = rejecting
    sizes = set()                                           # of the work: whether to compile
    monkeypatch.setattr(sample, "compiled", lambda net, seen: sizes.add(seen) or net)
    options = dict(lines=lines, env={"WORLD_SIZE": "2"})
    first = sampled(pipeline, tmp_path, rank=1, **options)
    both = sampled(pipeline, tmp_path, rank=0, **options)
    assert "manifest.csv" not in first and 0 < len(pictures_of(first))
    assert both == whole and len(sizes) == 1
    assert sampled(pipeline, tmp_path / "7", "--batch", 7, lines=lines) == whole


def torchrun(arguments, cwd):
    """Does what torchrun does with these arguments, but its workers are copies of this process."""
    launch = distributed_run.elastic_launch

    def launch_copies(config, entrypoint):
        config.start_method = "fork"
        return lambda unbuffered, script, *flags: launch(config, start)(script, flags, cwd)
    distributed_run.elastic_launch = launch_copies
    distributed_run.main(arguments)


def test_the_readme_s_command_for_several_gpus(copied):
    text = (HERE / "README.md").read_text()
    options, = re.findall("`torchrun --nproc-per-node 8 (.*)sample.py --virtual 10000 --per-id 50`", text)
    one = contents(copied / "runs/virtual")
    shutil.rmtree(copied / "runs/virtual")
    arguments = ["--nproc-per-node", "2", *options.split(), str(HERE / "sample.py"), *SAMPLE]
    assert forked(torchrun, (arguments, copied)) == [0]
    assert contents(copied / "runs/virtual") == one


def test_the_lines_in_the_readme_compare_two_faces(copied, monkeypatch, capsys):
    lines, = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(copied)
    first, _, other = sorted(Path("faces").rglob("*.png"))[3:6]
    for image in (first, other):
        shutil.copy(first, "a.jpg")
        shutil.copy(image, "b.jpg")
        exec(lines, {})
    found = [float(cosine) for cosine in re.findall(r"cosine (\S+)", capsys.readouterr().out)]
    assert found[0] == 1 and -1 < found[1] < 1


def test_real_people_are_filled_up(pipeline, painter, tmp_path):
    sampled(pipeline, tmp_path, "--real-to", 6, "--batch", 16)
    united = data.Faces([pipeline[0] / "faces", tmp_path / "set"])
    assert len(united.people) == 24
    assert united.labels.bincount().tolist() == [6] * 24


def test_killed_training_continues_to_the_same_bytes(pipeline, tmp_path, monkeypatch):
    """SIGKILL before the model is written, then the same command: as if never killed."""
    commands = {"fr": ["fr_train.py", *FR], "dit": ["dit_train.py", *DIT]}
    monkeypatch.setattr(dit_train, "preview", lambda *_: torch.zeros(8, 8))
    for stage, command in commands.items():
        name, *arguments = command
        killed(name, "save_model", 1, *arguments, "--out", tmp_path / stage, cwd=pipeline[0])
        assert "continuing" in here(*command, "--out", tmp_path / stage, cwd=pipeline[0])
        assert model.digest(tmp_path / stage) == model.digest(pipeline[0] / "runs" / stage)
        assert "is finished" in here(*command, "--out", tmp_path / stage, cwd=pipeline[0])


ABSURD = [
    {"config": {"size": 10 ** 12}},
    {"config": {"size": 32, "width": 4096, "units": [9] * 4}},
    {"config": {"size": 32, "units": [10 ** 9]}},
    {"config": []},
    {"names": ["../../outside"]},
    {"names": [""]},
    {"names": ["."]},
    {"names": [".."]},
    {"names": ["a\0b"]},
    {"names": 3},
    {"stage": None}]


def test_a_checkpoint_with_absurd_metadata_is_refused(tmp_path, capsys):
    tiny_recogniser(tmp_path, ["ann", "bob"], data=[])
    path = tmp_path / "model.safetensors"
    tensors, meta = model.load_model(tmp_path, "fr")
    assert model.load_recogniser(path)[2] == meta           # the file stands for its folder
    for absurd in ABSURD:
        save_file(tensors, path, {"vigface": json.dumps(meta | absurd)})
        stops(capsys, model.load_recogniser, path.parent)
    save_file(tensors, path, {"vigface": json.dumps(meta)})
    model.load_recogniser(path.parent)                      # as it was, it is one


def test_a_checkpoint_that_was_cut_short_is_refused(copied, capsys):
    fr, state = copied / "runs/fr/model.safetensors", copied / "runs/fr/state.pt"
    for tenth in (9, 5, 1, 0):
        for path in (fr, state):
            os.truncate(path, path.stat().st_size * tenth // 10)
        stops(capsys, model.load_recogniser, fr.parent)
        stops(capsys, model.resume, state.parent, {})


def test_a_loss_that_is_not_finite_stops_a_run(capsys):
    losses = torch.tensor([1.0, 2.5])
    assert model.stop_unless_finite(losses, 7, "out") == [1.0, 2.5]
    losses[1] = torch.inf
    assert "step 7" in stops(capsys, model.stop_unless_finite, losses, 7, "out")


# -------------------------------------------------------------------------------------------------- bad input

def write_records(root, images, labels):
    """train.rec and train.idx as InsightFace has them: of each image its length, label and bytes."""
    content, index = b"", ""
    for key, (image, label) in enumerate(zip(images, labels)):
        index += f"{key}\t{len(content)}\n"
        body = struct.pack("<IfQQ", 0, label, key, 0) + image
        padding = b"\0" * (-len(body) % 4)
        content += struct.pack("<II", 0xced7230a, len(body)) + body + padding
    root.mkdir(exist_ok=True)
    (root / "train.rec").write_bytes(content)
    (root / "train.idx").write_text(index)


def damage(root, change, last=4):
    """Changes the last images of a folder."""
    for path in sorted(root.rglob("*.png"))[-last:]:
        change(Image.open(path)).save(path)


def of_faces(*arguments):
    """Fills the folder with toy faces."""
    return lambda root: folder(root, *arguments)


def records_cut_short(root):
    write_records(root, [PNG], [0])
    os.truncate(root / "train.rec", 30)


def two_record_files(root):
    for name in "ab":
        write_records(root / name, [PNG] * 4, [0, 1, 0, 1])


def records_and_folders(root):
    folder(root, 1, 1)
    write_records(root, [PNG], [0])


def crops_that_are_not_square(root):
    folder(root, 2, 2)
    damage(root, lambda image: image.resize((24, 32)))


def crops_of_two_sizes(root):
    folder(root, 2, 2)
    damage(root, lambda image: image.resize((48, 48)), last=1)


def landmarks_of_nan(root):
    folder(root, 2, 2)
    (root / "landmarks.csv").write_text("a,nan" + ",1" * 9)


def splits(root):
    for name in ("train", "Val"):
        folder(root / name, 2, 2)


def unfinished_set(root):
    folder(root, 2, 2)
    (root / "run.json").touch()


# The command, what must be said, and what fills the folder `set`.
BAD_INPUT = [
    ("fr_train.py --data nowhere", "nowhere: no such folder; --data", None),
    ("dit_train.py --data nowhere", "nowhere: no such folder; --data", None),
    ("sample.py --real nowhere", "nowhere: no such folder; --real", None),
    ("evaluate.py --real nowhere", "nowhere: no such folder; --real", None),
    ("evaluate.py --datasets nowhere", "nowhere: no such folder; --datasets", None),
    ("sample.py --fr nowhere", "nowhere: no such file; expected a finished run of fr_train.py", None),
    ("sample.py --fr nowhere", "--fr", None),
    ("fr_train.py --data faces/held.bin", "unpacked", None),
    ("fr_train.py --data set", "set/Val would be a person", splits),
    ("fr_train.py --data set", "below --data set/Val", splits),
    ("fr_train.py --data set --out set/runs", "set/runs: lies in set", of_faces(2, 2)),
    ("dit_train.py --out faces/dit", "faces/dit: lies in", None),
    ("fr_train.py --data faces --out runs/dit", "stage = dit, now fr", None),
    ("fr_train.py --data set", "2 or more", of_faces(1, 4)),
    ("fr_train.py --data set --batch 1", "2 or more", of_faces(2, 2)),
    ("fr_train.py --data set --epochs -1", "1 or more", of_faces(2, 2)),
    ("fr_train.py --data set", "train.idx: expected", records_cut_short),
    ("fr_train.py --data set/a set/b", "set/b", two_record_files),
    ("fr_train.py --data set", "expected one", records_and_folders),
    ("fr_train.py --data set", "square", crops_that_are_not_square),
    ("fr_train.py --data set", "size", crops_of_two_sizes),
    ("fr_train.py --data set", "align.py", of_faces(2, 2, 40)),
    ("dit_train.py --data set", "not ten numbers", landmarks_of_nan),
    ("fr_train.py --data set", "set: sample.py has not finished it", unfinished_set),
    ("dit_train.py --fr set", "set/model.safetensors", None),
    ("dit_train.py --fr runs/dit", "runs/dit/model.safetensors", None),
    ("dit_train.py --data set", "have no prototype", of_faces(30, 1)),
    ("sample.py --steps 2", "3 or more", None),
    ("sample.py --virtual 25", "expected 1 to 24", None),
    ("sample.py --virtual 2 --out set", "something else", of_faces(1, 1)),
    ("evaluate.py --pairs faces/held.bin faces", "of each name", None),
    ("evaluate.py --pairs runs/held.bin", "runs/held.bin: no such file; --val and --pairs", None),
    ("evaluate.py --pairs runs", "runs: no such file; --val and --pairs", None),
    ("fr_train.py --data faces --val faces/landmarks.csv", "tools/pairs.py makes one", None),
    ("evaluate.py --fr runs/fr --real set", "two people or more", of_faces(1, 4)),
    ("evaluate.py --datasets faces", "faces: it is among the real faces", None),
    ("evaluate.py --datasets --strict", "no set to judge", None)]


@pytest.mark.parametrize("command, said, prepare", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_nothing_is_written(pipeline, tmp_path, command, said, prepare):
    (tmp_path / "set").mkdir()
    for name in ("faces", "runs"):
        (tmp_path / name).symlink_to(pipeline[0] / name)
    if prepare:
        prepare(tmp_path / "set")

    def everything():                                       # folders as well, and behind the links
        walked = sorted(os.walk(tmp_path, followlinks=True))
        states = [os.stat(os.path.join(root, name)) for root, _, names in walked for name in names]
        return walked, [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]
    before = everything()
    name, *arguments = command.split()
    printed = here(name, "--out", "out", *arguments, cwd=tmp_path, code=2)
    assert said in printed and printed.count("error:") == 1
    assert everything() == before
