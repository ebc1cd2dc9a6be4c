"""Run with `python -m pytest -q`: formulas against naive ones, invariants, scripts as users run them."""
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import resource
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import data
import evaluate
import fr_train
import model
import sample

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY_DIT = model.DiTConfig(size=32, dim=64, patch=4, width=64, depth=2, heads=1)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def to_bytes(images):
    """Images (B, 3, S, S) in [0, 1] as uint8."""
    return (255 * images).round().to(torch.uint8)


def jpeg(images, quality):
    """Images uint8 (B, 3, S, S) after JPEG has been at them."""
    def encode(image):
        to_pil_image(image).save(buffer := io.BytesIO(), "JPEG", quality=quality)
        return data.read_image(buffer)[0]
    return torch.stack([encode(image) for image in images])


def script(name, *args, cwd, code=0):
    """Runs a script in cwd, checks its exit code, and returns stdout, or stderr where it should fail."""
    command, env = [sys.executable, HERE / name, *map(str, args)], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr


def here(name, *args, cwd, code=0, env={}):
    """As `script`, in this process, which has imported PyTorch already: saves three seconds each time."""
    out, err, exit_code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(HERE / name), *map(str, args)])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for key, value in env.items():
            patch.setenv(key, value)
        try:
            runpy.run_path(str(HERE / name), run_name="__main__")
        except SystemExit as stop:
            exit_code = stop.code
    assert exit_code == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()


# --------------------------------------------------------------------------------------------- the recogniser


def test_ir_se50_is_the_published_network():
    net = model.Recogniser(model.FRConfig()).eval()
    assert sum(p.numel() for p in net.parameters()) == 43_808_320
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    assert len(net.body) == 24 and shapes["input_layer.0.weight"] == (64, 3, 3, 3)
    assert shapes["output_layer.3.weight"] == (512, 512 * 7 * 7) and "output_layer.4.weight" not in shapes
    assert shapes["body.3.shortcut_layer.0.weight"] == (128, 64, 1, 1)
    assert "body.0.shortcut_layer.0.weight" not in shapes
    assert shapes["body.23.res_layer.se_block.fc1.weight"] == (32, 512, 1, 1)
    with torch.no_grad():
        assert net(torch.randn(2, 3, 112, 112)).shape == (2, 512)


def test_embedding_is_unit_and_blind_to_mirroring():
    net = model.Recogniser(model.FRConfig(size=32, **model.FR_ARCHS["tiny"])).eval()
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    f = model.embed(net, images, batch=2)
    assert torch.allclose(f.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(f, model.embed(net, images.flip(3)), atol=0.02)      # bf16 on machines that have it


# ------------------------------------------------------------------------------ margin and virtual prototypes


@pytest.mark.parametrize("cosine", [0.9, 0.2, -0.5, -0.95, 1.0, -1.0])
def test_arcface_against_the_definition(cosine):
    cos = torch.tensor([[0.3, cosine, -0.1]], dtype=torch.float64, requires_grad=True)
    logits = model.arcface(cos, torch.tensor([1]))
    theta = math.acos(cosine)
    expected = math.cos(theta + 0.5) if theta + 0.5 <= math.pi else cosine - 0.5 * math.sin(0.5)
    assert logits[0].tolist() == pytest.approx([64 * 0.3, 64 * expected, -6.4], abs=2e-3)
    logits.sum().backward()
    assert cos.grad.isfinite().all()
    if abs(cosine) < 0.9:
        slope = math.sin(theta + 0.5) / math.sin(theta)                      # d cos(theta + m) / d cos(theta)
        assert cos.grad[0].tolist() == pytest.approx([64, 64 * slope, 64])


def test_arcface_never_rewards_a_wider_angle():
    cos = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None]
    logits = model.arcface(cos, torch.zeros(2001, dtype=torch.long))
    assert (logits.diff(dim=0) > 0).all()


@pytest.mark.parametrize("scaler", [-1.0, -0.3, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("cosine", [0.98, 0.2, -0.5, -0.98])
def test_adaface_against_the_definition(scaler, cosine):
    cos = torch.tensor([[0.3, cosine, -0.1]], dtype=torch.float64, requires_grad=True)
    logits = model.adaface(cos, torch.tensor([1]), torch.tensor([[scaler]], dtype=torch.float64))
    theta, m = math.acos(cosine), 0.4
    angle = min(max(theta - m * scaler, 1e-3), math.pi - 1e-3)                  # g_angle = -m scaler
    expected = math.cos(angle) - (m + m * scaler)                               # g_add = m + m scaler
    assert logits[0].tolist() == pytest.approx([64 * 0.3, 64 * expected, -6.4])
    logits.sum().backward()
    slope = math.sin(angle) / math.sin(theta) if 1e-3 < angle < math.pi - 1e-3 else 0
    assert cos.grad[0].tolist() == pytest.approx([64, 64 * slope, 64])


def test_adaface_s_two_ends():
    cos, labels = torch.rand(5, 7, dtype=torch.float64) * 1.2 - 0.6, torch.arange(5)
    one = torch.ones(5, 1, dtype=torch.float64)
    assert torch.allclose(model.adaface(cos, labels, -one), model.arcface(cos, labels, margin=0.4))
    cosface = cos.clone()
    cosface[range(5), range(5)] -= 0.4
    assert torch.allclose(model.adaface(cos, labels, 0 * one), 64 * cosface)


def test_adaface_reads_quality_off_the_norm_as_a_naive_loop_does():
    prototypes, mean, std = model.Prototypes(3, 0, 4), 20.0, 100.0
    for scale in (1e-6, 5.0, 30.0, 1e4):
        f = scale * torch.randn(6, 4)
        scaler = model.norm_scaler(f, prototypes)
        norms = [min(max(math.sqrt(sum(x * x for x in row)), 1e-3), 100) for row in f.tolist()]
        mean = 0.01 * np.mean(norms) + 0.99 * mean
        std = 0.01 * np.std(norms, ddof=1) + 0.99 * std
        naive = [min(max((norm - mean) / (std + 1e-3) * 0.333, -1), 1) for norm in norms]
        assert scaler[:, 0].tolist() == pytest.approx(naive, abs=1e-5)
    assert model.norm_scaler(f[:1], prototypes).isfinite().all() and prototypes.norm_std.isfinite()


@pytest.mark.parametrize("head", ["arcface", "adaface"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_no_embedding_breaks_the_loss(head, kind):
    prototypes = model.Prototypes(4, 4, 8)
    f = torch.cat([prototypes.real[:1].detach(), -prototypes.real[1:2].detach(), torch.zeros(1, 8),
                   1e4 * torch.ones(1, 8)]).to(kind).requires_grad_()       # cos = 1, cos = -1, no norm, huge
    sum(model.vigface_loss(f, torch.arange(4), prototypes, 3, head)).backward()
    assert f.grad.isfinite().all() and all(p.grad.isfinite().all() for p in prototypes.parameters())
    assert all(buffer.isfinite().all() for buffer in prototypes.buffers())


def test_quality_head_learns_the_cr_fiqa_ratio_and_disturbs_nothing():
    prototypes, labels = model.Prototypes(4, 3, 8), torch.arange(5) % 4
    f = torch.randn(5, 8, requires_grad=True)
    cos = F.normalize(f) @ F.normalize(prototypes.real).T
    loss = model.quality_loss(f, cos, labels, prototypes)
    naive = []
    for i, y in enumerate(labels.tolist()):
        ratio = cos[i, y] / (max(cos[i, j] for j in range(4) if j != y) + 1 + 1e-9)
        gap = abs(prototypes.quality(f[i]) - ratio).item()
        naive.append(gap ** 2 if gap < 0.5 else gap - 0.25)                     # smooth L1, beta 1/2
    assert loss.item() == pytest.approx(np.mean(naive), rel=1e-4)
    loss.backward()
    assert f.grad is None and prototypes.real.grad is None and prototypes.quality.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("head", ["arcface", "adaface"])
def test_virtual_embeddings_update_virtual_prototypes_only(head):
    f = torch.randn(6, 8, requires_grad=True)
    prototypes = model.Prototypes(5, 4, 8)
    _, virtual_loss, _ = model.vigface_loss(f, torch.arange(6) % 5, prototypes, 7, head)
    virtual_loss.backward()
    assert f.grad is None or not f.grad.any()
    assert prototypes.real.grad is None or not prototypes.real.grad.any()
    assert prototypes.virtual.grad.abs().sum() > 0


def test_real_embeddings_meet_virtual_prototypes_as_negatives():
    f = torch.randn(6, 8)
    prototypes = model.Prototypes(5, 4, 8)
    real_loss, _, _ = model.vigface_loss(f, torch.arange(6) % 5, prototypes, b_virtual=0)
    cos = F.normalize(f) @ prototypes.unit().T
    assert real_loss.item() == pytest.approx(F.cross_entropy(model.arcface(cos, torch.arange(6) % 5),
                                                             torch.arange(6) % 5).item(), rel=1e-5)
    real_loss.backward()
    assert prototypes.virtual.grad.abs().sum() > 0 and prototypes.real.grad.abs().sum() > 0


def test_virtual_prototypes_lie_where_real_ones_do():
    prototypes = model.Prototypes(40, 30, 8)
    with torch.no_grad():
        prototypes.real[:, 3:] = 0                                      # faces vary in three ways only
    for _ in range(20):
        model.vigface_loss(torch.randn(6, 8), torch.arange(6), prototypes, 20)[1].backward()
        with torch.no_grad():
            prototypes.virtual -= 0.01 * prototypes.virtual.grad
    virtual = prototypes.unit()[40:].detach()
    assert torch.allclose(virtual.norm(dim=1), torch.ones(30)) and virtual[:, 3:].abs().max() == 0
    assert (virtual[:, :3].T @ virtual[:, :3]).det() > 0.5              # and spread over all three


def test_sigma_against_a_naive_moving_average():
    prototypes, naive = model.Prototypes(3, 2, 4), np.zeros(4)
    for _ in range(5):
        f, labels = torch.randn(6, 4), torch.randint(3, (6,))
        model.vigface_loss(f, labels, prototypes, b_virtual=2)
        squares = []
        for x, y in zip(f.numpy(), labels):
            w = prototypes.real[y].detach().numpy()
            squares.append((x / np.linalg.norm(x) - w / np.linalg.norm(w)) ** 2)
        naive = 0.9 * naive + 0.1 * np.mean(squares, 0)
    assert np.allclose(prototypes.sigma2.numpy(), naive, atol=1e-6)


@pytest.mark.parametrize("head, margin", [("arcface", 0.5), ("adaface", 0.4)])
def test_the_ramp_scales_the_margin(head, margin):
    f, labels, prototypes = torch.randn(6, 8), torch.arange(6) % 5, model.Prototypes(5, 4, 8)
    cos = F.normalize(f) @ prototypes.unit().T
    for ramp in (0.0, 0.3, 1.0):
        scaler = [] if head == "arcface" else [model.norm_scaler(f, copy.deepcopy(prototypes))]
        logits = getattr(model, head)(cos, labels, *scaler, margin=ramp * margin)
        real, _, _ = model.vigface_loss(f, labels, prototypes, 0, head, ramp)
        assert real.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert ramp == 1 and real > F.cross_entropy(64 * cos, labels)


def test_points_around_a_prototype_spread_as_far_as_asked():
    w, sigma2 = F.normalize(torch.randn(500, 64)), torch.full((64,), 0.004)
    near, far = model.around(w, sigma2, 0.5), model.around(w, sigma2)
    for points, scale in ((near, 0.5), (far, 1.0)):
        assert torch.allclose(points.norm(dim=1), torch.ones(500), atol=1e-5)
        expected = (1 + scale ** 2 * 64 * 0.004) ** -0.5                # the noise is orthogonal to w, nearly
        assert (points * w).sum(1).mean().item() == pytest.approx(expected, abs=0.01)
    assert torch.allclose(model.around(w, 0 * sigma2), w, atol=1e-6)


def test_the_dit_sees_points_around_the_prototype_and_is_judged_by_them():
    seen = []

    def spy(x, t, w, landmarks):
        seen.append(w)
        return x
    w = F.normalize(torch.randn(400, 16))
    model.dit_loss(spy, lambda x: x.flatten(1)[:, :16], torch.randn(400, 3, 4, 4), w, None,
                   torch.full((16,), 0.05), drop=0)
    cosine = (seen[0] * w).sum(1)                       # spread by u sigma, u even from 0 to 1
    assert cosine.max() > 0.999 and 0.4 < cosine.min() < 0.8 and 0.85 < cosine.mean() < 0.97


def test_virtual_embeddings_spread_as_sigma_says(monkeypatch):
    seen = []
    monkeypatch.setattr(model, "arcface", lambda cos, labels, margin: seen.append(cos) or cos)
    prototypes = model.Prototypes(4, 1, 512)
    f = F.normalize(prototypes.real.detach()) + 0.02 * torch.randn(4, 512)  # own cosine about 0.91
    for _ in range(60):
        model.vigface_loss(f, torch.arange(4), prototypes, b_virtual=64)
    real = seen[-2][range(4), range(4)].mean()
    virtual = seen[-1][:, 4].mean()
    assert 0.85 < real < 0.95 and abs(real - virtual) < 0.02


@pytest.mark.parametrize("k, b_real, n", [(5, 4, 5), (7, 4, 5), (1, 3, 10), (120, 2, 11), (0, 4, 5)])
def test_virtual_batch_has_the_paper_s_size_on_average(k, b_real, n):
    sizes = [model.virtual_batch_size(step, k, b_real, n) for step in range(50)]
    assert sum(sizes) == 50 * k * b_real // n
    assert all(abs(size - k * b_real / n) < 1 for size in sizes)


def test_augmentations_change_as_many_images_as_asked():
    x = torch.rand(600, 3, 32, 32) * 1.8 - 0.9
    assert torch.equal(fr_train.augment(x, p=0), x)
    once = fr_train.augment(x, p=0.2)
    assert once.min() >= -1 and once.max() <= 1
    changed = (once != x).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 0.58                                                 # 1 - 0.8^3 = 0.488
    black = (once == -1).all(1).flatten(1).float().mean(1)                  # the crop: a fifth of all images,
    assert 0.14 < (black > 0.01).float().mean() < 0.26 and black.max() < 0.85  # 20 % or more is kept


# --------------------------------------------------------------------------------------------- DiT, diffusion


def test_patchify_round_trip():
    x = torch.randn(2, 6, 32, 32)
    tokens = model.patchify(x, 4)
    assert tokens.shape == (2, 64, 96)
    assert torch.equal(model.unpatchify(tokens, 4), x)
    assert torch.equal(tokens[1, 9].view(6, 4, 4), x[1, :, 4:8, 4:8])     # token 9: second row, second column


def test_a_fresh_dit_block_is_the_identity_and_a_fresh_dit_predicts_zero():
    x = torch.randn(2, 16, 64)
    block = model.DiTBlock(64, 4)
    assert torch.equal(block(x, torch.randn(2, 64)), x)
    dit = model.DiT(TINY_DIT)
    assert not dit(torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 64), torch.rand(2, 5, 2)).any()


def test_attention_is_the_library_s():
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    assert torch.allclose(model.attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)


def test_landmark_image_puts_colours_where_landmarks_are():
    landmarks = torch.tensor([[[.25, .25], [.75, .25], [.5, .5], [.25, .75], [.75, .75]]])
    image = model.landmark_image(landmarks, 64)[0]                              # (3, 64, 64)
    for (x, y), channel in zip(landmarks[0], (0, 0, 1, 2, 2)):
        pixel = image[:, int(y * 64), int(x * 64)]
        assert pixel.argmax() == channel and pixel[channel] > 0.8 and pixel.sum() < 1.01
    assert image.mean() < 0.05


def test_image_noise_and_velocity_round_trip():
    x, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0., .3, .7, 1.])
    a, s = model.signal_noise(t)
    x_t, v = a * x + s * noise, a * noise - s * x
    assert torch.allclose(a ** 2 + s ** 2, torch.ones_like(a))
    assert torch.allclose(a * x_t - s * v, x, atol=1e-5) and torch.allclose(s * x_t + a * v, noise, atol=1e-5)
    assert torch.equal(x_t[0], x[0]) and torch.allclose(x_t[3], noise[3], atol=1e-6)


class Oracle(torch.nn.Module):
    """A DiT that knows the only image there is: its velocity is exact, whoever is asked for."""

    def __init__(self, x):
        super().__init__()
        self.x = torch.nn.Parameter(x)

    def forward(self, x_t, t, w, landmarks):
        a, s = model.signal_noise(t)
        return (a * x_t - self.x) / s                                         # x0 = a x_t - s v, solved for v


def test_losses_of_a_perfect_dit(monkeypatch):
    x = torch.rand(64, 3, 8, 8) * 2 - 1
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
    w = F.normalize(backbone(x)).detach()
    v_loss, identity_loss = model.dit_loss(Oracle(x), backbone, x, w, None, torch.zeros(16))
    assert v_loss < 1e-6 and identity_loss < 1e-6
    _, opposite = model.dit_loss(Oracle(x), backbone, x, -w, None, torch.zeros(16), drop=0)     # 4 times a^2
    assert 1.5 < opposite < 2.5                                     # t is symmetric about 1/2: mean a^2 = 1/2
    _, nobody = model.dit_loss(Oracle(x), backbone, x, -w, None, torch.zeros(16), drop=1)
    assert nobody == 0


def test_prototype_is_dropped_as_often_as_asked():
    seen = []

    def spy(x, t, w, landmarks):
        seen.append(w)
        return x
    x, w = torch.randn(2000, 3, 2, 2), torch.ones(2000, 4)
    model.dit_loss(spy, lambda x: x.flatten(1)[:, :4], x, w, None, torch.zeros(4))
    dropped = (seen[0] == 0).all(1)
    assert 0.07 < dropped.float().mean() < 0.13 and (seen[0][~dropped] == 0.5).all()


def test_solver_recovers_a_gaussian():
    """For data N(m, d^2) the best x0 is known and so is the flow: noise e ends at m + d e."""
    m, d = 0.7, 0.4

    def denoise(x, t):
        a, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        return m + a * d ** 2 / (a ** 2 * d ** 2 + s ** 2) * (x - a * m)
    noise = torch.randn(2000, 1, dtype=torch.float64)
    error = {steps: (model.dpm_solver(denoise, noise, steps) - (m + d * noise)).abs().mean().item()
             for steps in (10, 80, 320)}
    assert error[10] < 0.04 and error[320] < error[80] / 6                  # first order would give a quarter
    assert model.dpm_solver(denoise, noise, 1).std() < 1e-9                # one step: x0 at t = 1 is the mean


def test_guidance_is_linear_and_skips_what_it_does_not_need():
    calls = []

    def dit(x, t, w, landmarks):
        calls.append(bool(w.any()))
        return 0.1 * w.mean() * torch.ones_like(x)
    x, w = torch.zeros(2, 3, 4, 4), torch.ones(2, 8)
    x0 = {g: model.guided(dit, w, None, g)(x, 1.0) for g in (0.0, 1.0, 3.0)}    # at t = 1, x0 = -v
    assert torch.allclose(x0[3.0], 3 * x0[1.0] - 2 * x0[0.0]) and torch.allclose(x0[1.0], torch.tensor(-0.1))
    calls.clear()
    denoise = model.guided(dit, w, None, 2.0, interval=(0.3, 0.6))
    for t in (0.9, 0.5, 0.1):
        denoise(x, t)
    assert calls == [True, True, False, True]


# -------------------------------------------------------------------------------------------- saving, loading


def test_save_and_load_give_back_the_same_network(tmp_path):
    net = model.Recogniser(model.FRConfig(size=32, **model.FR_ARCHS["tiny"]))
    prototypes = model.Prototypes(3, 2, 64)
    net(torch.randn(4, 3, 32, 32))                                              # moves the running statistics
    tensors = {f"backbone.{name}": t for name, t in net.state_dict().items()}
    tensors |= {f"prototypes.{name}": t for name, t in prototypes.state_dict().items()}
    model.save_model(tmp_path, "fr", net.cfg, tensors, names=["a", "b", "ü"])
    loaded, loaded_prototypes, meta = model.load_recogniser(tmp_path, CPU)
    assert meta["names"] == ["a", "b", "ü"] and not loaded.training
    for name, t in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t)
    assert torch.equal(loaded_prototypes.unit(), prototypes.unit())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def published(path, prefix="model.", **changes):
    """A checkpoint file as others publish IR-SE50: a prefix on every key, and a head we have no use for."""
    state = {f"{prefix}{name}": t for name, t in model.Recogniser(model.FRConfig()).state_dict().items()}
    state |= {"head.kernel": torch.zeros(512, 10), f"{prefix}head.kernel": torch.zeros(512, 10), **changes}
    torch.save({"state_dict": state, "epoch": 3}, path)
    return {name[len(prefix):]: t for name, t in state.items()}


def test_published_checkpoints_load(tmp_path, capsys):
    state = published(tmp_path / "a.ckpt")
    backbone, prototypes, _ = model.load_recogniser(tmp_path / "a.ckpt", CPU)
    bgr, _, _ = model.load_recogniser(tmp_path / "a.ckpt", CPU, bgr=True)
    assert torch.equal(backbone.body[3].res_layer[1].weight, state["body.3.res_layer.1.weight"])
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.allclose(backbone(x), bgr(x.flip(1))) and not torch.allclose(backbone(x), bgr(x))
    for key, named in (("body.3.res_layer.1.weight", "size mismatch for body.3.res_layer.1.weight"),
                       ("extra", "Unexpected key(s) in state_dict: \"extra\"")):
        published(tmp_path / "b.pth", **{f"model.{key}": torch.zeros(1)})
        with pytest.raises(SystemExit):
            model.load_recogniser(tmp_path / "b.pth", CPU)
        assert named in capsys.readouterr().err
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(SystemExit):
        model.load_recogniser(tmp_path / "c.pth", CPU)
    assert "expected published weights that fit Recogniser" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_a_truncated_checkpoint_is_one_clear_line(tmp_path, keep, capsys):
    model.save_model(tmp_path, "dit", TINY_DIT, model.DiT(TINY_DIT).state_dict())
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(SystemExit) as stop:
        model.load_model(tmp_path, "dit")
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ faces


def test_similarity_is_least_squares():
    source, target = torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    scale, shift = data.similarity(source, target)
    for s, t, moved in zip(source.numpy(), target.numpy(), data.move(source, scale, shift).numpy()):
        # x' = a x - b y + c and y' = a y + b x + d, solved for a, b, c, d
        rows = np.concatenate([np.stack([s[:, 0], -s[:, 1], np.ones(5), np.zeros(5)], 1),
                               np.stack([s[:, 1], s[:, 0], np.zeros(5), np.ones(5)], 1)])
        solution = np.linalg.lstsq(rows, t.T.reshape(-1), rcond=None)[0]
        assert np.allclose((rows @ solution).reshape(2, 5).T, moved)


def test_drawn_people_are_themselves_in_every_picture():
    who = torch.rand(6, data.IDENTITY_DIALS).repeat_interleave(5, 0)
    images, landmarks = data.draw_faces(who, torch.rand(30, data.NUISANCE_DIALS), 32)
    assert images.shape == (30, 3, 32, 32) and images.isfinite().all()
    assert images.min() >= 0 and images.max() <= 1
    assert (landmarks - data.TEMPLATE).abs().mean() < 0.08             # aligned to the template, but for pose
    yaw = torch.full((2, data.NUISANCE_DIALS), 0.5)
    yaw[0, 0], yaw[1, 0] = 0, 1                                               # the first nuisance dial is yaw
    turned = data.yaw_of(data.draw_faces(who[:1].expand(2, -1), yaw, 32)[1])
    assert turned[0] * turned[1] < 0 and (turned[0] - turned[1]).abs() > 0.5


def test_landmarks_lie_on_the_features():
    """Where a landmark says an eye is, the drawing has it: one dial (eyelids) moves pixels there alone."""
    who, how = torch.full((1, data.IDENTITY_DIALS), 0.5), torch.full((1, data.NUISANCE_DIALS), 0.5)
    one, landmarks = data.draw_faces(who, how, 112)
    changed = []
    for dial in range(data.NUISANCE_DIALS):
        shut = how.clone()
        shut[0, dial] = 0.0
        difference = (data.draw_faces(who, shut, 112)[0] - one).abs().sum(1)[0]
        weight = difference / difference.sum().clamp(min=1e-9)
        eyes = [(round(112 * x), round(112 * y)) for x, y in landmarks[0, :2].tolist()]
        near = sum(weight[y - 9:y + 10, x - 12:x + 13].sum() for x, y in eyes)
        changed.append(near.item())
    assert max(changed) > 0.95                                        # the eyelid dial moves eyes alone


def folder(root, people, per_person, size=32, landmarks=True):
    """A small image folder of drawn people, for tests."""
    who = torch.rand(people, data.IDENTITY_DIALS).repeat_interleave(per_person, 0)
    images, points = data.draw_faces(who, torch.rand(len(who), data.NUISANCE_DIALS), size)
    files = [f"person {i // per_person}/{i % per_person}.png" for i in range(len(who))]
    for name, image in zip(files, images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data.write_png(root / name, model.to_uint8(2 * image - 1))
    if landmarks:
        data.write_landmarks(root / "landmarks.csv", zip(files, points * size))
    return images, points


def test_sources_unite_by_identity_name(tmp_path):
    images, points = folder(tmp_path / "a", 3, 2)
    folder(tmp_path / "b", 4, 1, size=48, landmarks=False)
    faces = data.Faces([tmp_path / "a", tmp_path / "b"])
    assert list(faces.names) == ["person 0", "person 1", "person 2", "person 3"] and faces.size == 32
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2, 3]
    x, i, bad = faces.__getitems__([3, 9])
    assert x.dtype == torch.uint8 and x.shape == (2, 3, 32, 32) and i.tolist() == [3, 9] and not bad
    assert (x[0] / 255 - images[3]).abs().max() < 0.0041
    assert torch.allclose(faces.landmarks[3], points[3], atol=1e-3) and faces.landmarks[9].isnan().all()
    lazy = data.Faces([tmp_path / "a", tmp_path / "b"], memory=0)               # the way large sets are read
    assert torch.equal(lazy.__getitems__([3, 9])[0], x) and lazy.images is None


def write_records(root, images, labels, parts=()):
    """train.rec and train.idx as InsightFace has them: a header, images, a list of identities with no image.

    Images named in `parts` are cut in two with the magic between, as RecordIO does where the bytes contain
    it.
    """
    content, index = b"", ""
    empty = [(0, struct.pack("<IfQQff", 2, 0.0, 0, 0, len(images) + 1.0, len(images) + 3.0))]
    bodies = [(i + 1, struct.pack("<IfQQ", 0, float(label), i, 0) + png if i % 2 else
               struct.pack("<IfQQff", 2, 0.0, i, 0, float(label), 0.0) + png)  # every other label is a vector
              for i, (png, label) in enumerate(zip(images, labels))]
    tail = [(len(images) + 1 + i, struct.pack("<IfQQff", 2, float(i), 0, 0, 1.0, 3.0)) for i in range(2)]
    for key, body in [*empty, *bodies, *tail]:
        index += f"{key}\t{len(content)}\n"
        pieces = [(0, body)] if key not in parts else [(1, body[:60]), (2, body[60:99]), (3, body[99:])]
        for flag, piece in pieces:
            content += struct.pack("<II", 0xced7230a, flag << 29 | len(piece)) + piece
            content += b"\0" * (-len(piece) % 4)
    root.mkdir(exist_ok=True)
    (root / "train.rec").write_bytes(content)
    (root / "train.idx").write_text(index)


def test_records_are_read_as_folders_are(tmp_path):
    folder(tmp_path / "a", 3, 2)
    faces = data.Faces([tmp_path / "a"])
    pngs = [file.read_bytes() for file in faces.files]
    write_records(tmp_path / "r", pngs, [7, 7, 0, 0, 4, 4])
    records = data.Faces([tmp_path / "r"])
    assert list(records.names) == ["7", "0", "4"] and torch.equal(records.labels, faces.labels)
    assert torch.equal(records.images, faces.images)
    assert len(data.Faces([tmp_path / "a", tmp_path / "r"])) == 12
    write_records(tmp_path / "r", [pngs[0]], [3], parts=[1])
    record = data.read_index(tmp_path / "r/train.rec")[0][0]
    joined = record.open("rb").read()
    magic = struct.pack("<I", 0xced7230a)
    assert joined.count(magic) == 2 and joined.replace(magic, b"") == pngs[0]


def test_a_corrupt_image_among_many_is_skipped_named_and_counted(tmp_path, capsys):
    folder(tmp_path / "a", 2, 60)
    (tmp_path / "a/person 1/7.png").write_bytes(b"broken")
    faces = data.Faces([tmp_path / "a"])
    assert len(faces) == len(faces.labels) == len(faces.landmarks) == 119
    assert "person 1/7.png" in capsys.readouterr().err
    lazy = data.Faces([tmp_path / "a"], memory=0)                              # found out only while training
    seen = drawn_batches(lazy, 40, 0, 3)
    assert "person 1/7.png" in capsys.readouterr().err and len(lazy.bad) == 1
    assert sorted(len(x) for x, _ in seen) == [39, 40, 40] and all(len(x) == len(y) for x, y in seen)
    (tmp_path / "a/person 0/9.png").write_bytes(b"broken")                      # two of 120 are too many
    for memory in (0, 3e9):
        with pytest.raises(SystemExit):
            drawn_batches(data.Faces([tmp_path / "a"], memory=memory), 40, 0, 3)
        assert capsys.readouterr().err.count("error:") == 1


def drawn_batches(faces, batch, first, last):
    """Images and labels of all batches of steps first to last - 1."""
    return [(x, labels) for _, x, labels, _, _ in data.batches(faces, batch, 0, first, last, CPU, "test")]


def test_batches_are_a_function_of_the_step(tmp_path):
    folder(tmp_path / "a", 5, 2)
    faces = data.Faces([tmp_path / "a"])
    whole = [labels.tolist() for _, labels in drawn_batches(faces, 3, 0, 9)]
    assert whole[4:] == [labels.tolist() for _, labels in drawn_batches(faces, 3, 4, 9)]
    assert len(whole) == 9 and whole[:3] != whole[3:6]
    epoch = torch.cat([x for x, _ in drawn_batches(faces, 3, 0, 3)])
    assert len({image.numpy().tobytes() for image in epoch}) == 9               # no image twice
    assert sorted(sum(whole[:3], []))[0] == 0 and len(sum(whole[:3], [])) == 9  # one epoch


def test_benchmark_round_trip_and_protocol(tmp_path):
    people = torch.stack([torch.full((4, 3, 8, 8), 10 * i, dtype=torch.uint8) for i in range(20)])
    data.write_bin(tmp_path / "t.bin", people, 300, torch.Generator().manual_seed(0))
    images, same = data.read_benchmark(tmp_path / "t.bin", 8)
    first, second = images[0::2, 0, 0, 0], images[1::2, 0, 0, 0]
    assert torch.equal(first == second, same) and same.float().mean() == 0.5
    for fold in range(10):                                                      # folds share no person
        inside = {*first.chunk(10)[fold].tolist(), *second.chunk(10)[fold].tolist()}
        assert len(inside) == 2


def test_a_hostile_benchmark_runs_nothing(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    (tmp_path / "bad.bin").write_bytes(pickle.dumps((Payload(), [True])))
    with pytest.raises(SystemExit) as stop:
        data.read_benchmark(tmp_path / "bad.bin", 32)
    assert stop.value.code == 2 and not (tmp_path / "owned").exists()
    assert "system" in capsys.readouterr().err


def png(colour="red"):
    Image.new("RGB", (8, 8), colour).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def test_benchmarks_written_by_python_2_with_numpy_images_are_read(tmp_path):
    bins = [np.frombuffer(png(), np.uint8) for _ in range(20)]
    (tmp_path / "old.bin").write_bytes(pickle.dumps((bins, [True, False] * 5), protocol=2))
    images, same = data.read_benchmark(tmp_path / "old.bin", 8)
    assert images.shape == (20, 3, 8, 8) and images[:, 0].min() == 255 and same.sum() == 5


@pytest.mark.parametrize("content", [
    pickle.dumps(([png()] * 21, [True, False] * 5)), pickle.dumps(([png()] * 20, [True, False] * 5))[:-40],
    pickle.dumps(([png()] * 20, [True] * 10)), pickle.dumps(([png()[:30]] * 20, [True, False] * 5)),
    pickle.dumps(([], [])), pickle.dumps(7), b""],
    ids=["odd", "cut", "all same", "broken", "empty", "int", "no"])
def test_a_malformed_benchmark_is_one_clear_line(tmp_path, capsys, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        data.read_benchmark(tmp_path / "x.bin", 8)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "x.bin" in error


def test_lfw_s_pairs_txt_and_what_can_be_wrong_with_it(tmp_path, capsys):
    for person, colour in (("A_B", "red"), ("C", "blue")):
        (tmp_path / "lfw" / person).mkdir(parents=True)
        for i in (1, 2):
            (tmp_path / f"lfw/{person}/{person}_{i:04d}.png").write_bytes(png(colour))
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("5\t1\n" + "A_B\t1\t2\nA_B\t1\tC\t2\n" * 5)
    images, same = data.read_benchmark(pairs, 8, tmp_path / "lfw")
    assert same.tolist() == [True, False] * 5 and images.shape == (20, 3, 8, 8)
    assert images[2, 0].min() == 255 and images[3, 2].min() == 255
    for line, named in (("A_B 1 3", "no A_B/A_B_0003"), ("A_B 1", "line 12"), ("../lfw/C 1 2 x", "line 12"),
                        ("C 1 3", "no C/C_0003")):
        pairs.write_text("5\t1\n" + "A_B\t1\t2\nC\t1\tA_B\t2\n" * 5 + line)
        with pytest.raises(SystemExit):
            data.read_benchmark(pairs, 8, tmp_path / "lfw")
        assert named in capsys.readouterr().err


# --------------------------------------------------------------------------------- landmarks and alignment


SHARED = HERE.parent / "shared/data"
WEIGHTS = SHARED / "weights/mobilenet0.25_Final.pth"


def test_the_detector_decodes_its_anchors_as_a_loop_does():
    net = model.RetinaFace().eval()
    for head, biases in ((net.ClassHead, (0., 1, 0, 2)), (net.BboxHead, (.5, -1, .2, .4) * 2),
                         (net.LandmarkHead, [0.1 * i for i in range(20)])):
        for level in head:
            torch.nn.init.zeros_(level["conv1x1"].weight)
            level["conv1x1"].bias.data = torch.tensor(biases)
    with torch.no_grad():
        scores, boxes, points = net(torch.zeros(1, 3, 70, 100, dtype=torch.uint8))
    at = 0
    for step, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        for row in range(math.ceil(70 / step)):
            for column in range(math.ceil(100 / step)):
                for anchor, side in enumerate(sides):
                    x, y = (column + .5) * step, (row + .5) * step
                    w, h = side * math.exp(.04), side * math.exp(.08)
                    cx, cy = x + .05 * side, y - .1 * side
                    assert boxes[0, at].tolist() == pytest.approx(
                        [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=1e-3)
                    naive = [[x + .1 * side * .1 * (10 * anchor + 2 * i),
                              y + .1 * side * .1 * (10 * anchor + 2 * i + 1)] for i in range(5)]
                    assert np.allclose(points[0, at], naive, atol=1e-3)
                    assert scores[0, at] == pytest.approx(1 / (1 + math.exp(-1 - anchor)))
                    at += 1
    assert at == boxes.shape[1]


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="published RetinaFace weights are not at hand")
def test_published_detector_finds_lfw_s_landmarks():
    detector = data.load_detector(WEIGHTS, None, CPU)                           # strict: every key matches
    rows = list(csv.reader((SHARED / "lfw112/landmarks.csv").open()))[1::330]
    images = torch.stack([data.read_image(SHARED / "lfw112" / row[0])[0] for row in rows])
    points, found = data.crop_landmarks(detector, images)
    error = 112 * points - torch.tensor([[float(x) for x in row[1:]] for row in rows]).view(-1, 5, 2)
    assert found.float().mean() >= 0.97 and error.norm(dim=2).mean(1).median() < 2.3


def test_a_crop_is_the_similarity_that_least_squares_gives():
    source, target = torch.rand(5, 2, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    scale, shift = data.similarity(source, target)
    x, y = source - source.mean(0), target - target.mean(0)                     # Umeyama 1991, eq. 40 to 43
    u, singular, vt = torch.linalg.svd(y.T @ x / 5)
    sign = torch.diag(torch.tensor([1, torch.det(u @ vt).sign()], dtype=torch.float64))
    rotation = u @ sign @ vt
    factor = (singular * sign.diag()).sum() / (x ** 2).sum() * 5
    assert torch.allclose(data.move(source, scale, shift), factor * x @ rotation.T + target.mean(0))
    assert torch.allclose(data.move(data.move(source, scale, shift), 1 / scale, -shift / scale), source)


@pytest.mark.parametrize("zoom, angle", [(1.0, 0.0), (0.6, 0.4), (6.0, -0.7)])
def test_crops_put_the_landmarks_where_they_say(zoom, angle):
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = 112 * zoom * (data.TEMPLATE - 0.5) @ turn + 500
    points[2] += 3 * zoom                                                       # a nose off the template
    grid = np.arange(1000) + 0.5                                                # of the pixels' middles
    far = np.min([np.hypot(grid - x, grid[:, None] - y) for x, y in points.tolist()], 0)
    photo = Image.fromarray(np.uint8(255 * (3 * zoom + 0.5 - far).clip(0, 1))).convert("RGB")
    crop, landmarks = data.crop_face(photo, points, 112)
    light = np.asarray(crop.convert("L"), float)
    grid = np.arange(112) + 0.5
    for x, y in landmarks.tolist():
        near = light * (np.hypot(grid - x, grid[:, None] - y) < 7)
        found = (near.sum(0) @ grid / near.sum(), near.sum(1) @ grid / near.sum())
        assert np.hypot(found[0] - x, found[1] - y) < 0.5
    assert (landmarks - 112 * data.TEMPLATE).norm(dim=1).max() < 4


def test_shrinking_does_not_alias():
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (1200, 600))).convert("RGB")
    crop, _ = data.crop_face(stripes, 1000 * data.TEMPLATE + 100, 112)
    assert np.ptp(np.asarray(crop)[8:-8, 8:-8]) <= 30


def test_weights_are_fetched_once_and_checked(tmp_path, monkeypatch, capsys):
    (tmp_path / "served").mkdir()
    torch.save(model.RetinaFace().state_dict(), tmp_path / "served/w.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/w.pth")
    with pytest.raises(SystemExit):
        data.load_detector(None, tmp_path / "a", CPU)                           # not the published file
    assert "invalid hash" in capsys.readouterr().err and not list((tmp_path / "a").iterdir())
    content = (tmp_path / "served/w.pth").read_bytes()
    monkeypatch.setattr(data, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest())
    data.load_detector(None, tmp_path / "a", CPU)
    server.shutdown()
    server.server_close()
    data.load_detector(None, tmp_path / "a", CPU)                               # no server needed any more
    with pytest.raises(SystemExit):
        data.load_detector(None, tmp_path / "b", CPU)
    assert f"put that file at {tmp_path}/b/w.pth" in capsys.readouterr().err


def test_photographs_become_aligned_crops(tmp_path, monkeypatch, capsys):
    """With a detector that sees every red square as a face; its score is the green in it."""
    face = lambda x, y, side: (torch.tensor([x, y, x + side, y + side], dtype=torch.float32),
                               torch.tensor([x, y]) + side * data.TEMPLATE)

    def detect(_, images):
        for image in images:
            mask = (image[0] > 200) & (image[2] < 60)
            ys, xs = mask.nonzero().T
            if not len(xs):
                yield torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 5, 2)
                continue
            right = xs > image.shape[1] // 2
            faces = [face(xs[half].min(), ys[half].min(), (xs[half].max() - xs[half].min() + 1).item())
                     for half in (right, ~right) if half.any()]
            boxes, points = map(torch.stack, zip(*faces))
            yield torch.ones(len(faces)), boxes, points
    monkeypatch.setattr(data, "detect_faces", detect)
    (tmp_path / "photos/ann").mkdir(parents=True)

    def photo(name, *squares, size=(900, 600), mode="RGB", **options):
        image = Image.new("RGB", size, "white")
        for x, y, side in squares:
            ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), (255, side // 4, 0))
            ImageDraw.Draw(image).rectangle((x, y, x + side // 2, y + side - 1), (255, side // 4 + 90, 0))
        image.convert(mode).save(tmp_path / "photos/ann" / name, **options)
    photo("one.jpg", (100, 100, 200))
    photo("two.png", (40, 40, 300), (500, 250, 100), mode="RGBA")
    photo("print.jpg", (100, 100, 200), mode="CMYK")
    photo("huge.png", (1000, 1000, 900), size=(5000, 4000))
    photo("small.png", (100, 100, 30))
    photo("none.png")
    turned = Image.Exif()
    turned[0x112] = 6                                                   # seen after a quarter turn
    photo("turned.jpg", (10, 250, 200), exif=turned)
    (tmp_path / "photos/ann/broken.jpg").write_bytes(b"no picture")
    args = (tmp_path / "photos", tmp_path / "out", None, CPU)
    data.align(*args)
    crops = sorted(path.name for path in (tmp_path / "out/ann").iterdir())
    assert crops == ["huge.png.jpg", "one.jpg", "print.jpg", "turned.jpg", "two.png.jpg"]
    for path in (tmp_path / "out/ann").iterdir():
        crop = data.read_image(path)[0].float()
        assert crop.shape == (3, 112, 112) and crop[0].mean() > 225 and crop[2, 8:-8, 8:-8].mean() < 40, path
    green = lambda name: data.read_image(tmp_path / "out/ann" / name)[0][1].float()
    assert green("one.jpg")[:, :56].mean() > green("one.jpg")[:, 56:].mean() + 50   # lighter on its left
    assert green("turned.jpg")[:56].mean() > green("turned.jpg")[56:].mean() + 50       # which came to be up
    rejected = dict(csv.reader((tmp_path / "out/rejected.csv").open()))
    assert rejected == {"file": "reason", "ann/broken.jpg": "unreadable: UnidentifiedImageError",
                        "ann/none.png": "no face", "ann/small.png": "no face of 40 pixels"}
    faces = data.Faces([tmp_path / "out"])
    assert torch.allclose(faces.landmarks, data.TEMPLATE.expand(5, 5, 2), atol=1e-3)
    two = (tmp_path / "out/ann/two.png.jpg").read_bytes()
    data.align(*args[:1], tmp_path / "centre", *args[2:], face="centre")
    assert (tmp_path / "centre/ann/two.png.jpg").read_bytes() != two            # the other face

    whole = (tmp_path / "out/landmarks.csv").read_bytes()
    for name in ("landmarks.csv", "rejected.csv"):                              # killed in line three
        lines = (tmp_path / "out" / name).read_text().splitlines(keepends=True)
        (tmp_path / "out" / name).write_text("".join(lines[:2]) + lines[2][:9])
    data.align(*args)
    assert (tmp_path / "out/landmarks.csv").read_bytes() == whole
    assert dict(csv.reader((tmp_path / "out/rejected.csv").open())) == rejected


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("pairs", [100, 103, 11])                               # folds of unequal size, too
def test_verification_against_a_literal_protocol(monkeypatch, pairs):
    f = F.normalize(torch.randn(2 * pairs, 4))
    f[1::2] = F.normalize(f[0::2] + 0.8 * torch.randn(pairs, 4))
    same = torch.rand(pairs) < 0.5
    f[2:16:2], f[3:16:2] = f[0], f[1]                                           # ties
    f[4] = f[5]                                                                 # and an image twice
    monkeypatch.setattr(evaluate, "embed", lambda *_: f)
    squared = evaluate.pair_distances(None, None)
    result = evaluate.verification(squared, same)
    distance = [sum((a - b) ** 2 for a, b in zip(x, y)) for x, y in zip(f[0::2].tolist(), f[1::2].tolist())]
    assert squared.tolist() == pytest.approx(distance, abs=1e-6)
    distance = squared.tolist()
    indices, accuracies, start = list(range(pairs)), [], 0
    for fold in range(10):
        stop = start + pairs // 10 + (fold < pairs % 10)
        test = indices[start:stop]
        train = [i for i in indices if i not in test]
        scores = [np.mean([(distance[i] < threshold) == bool(same[i]) for i in train])
                  for threshold in np.arange(0, 4, 0.01)]
        threshold = np.arange(0, 4, 0.01)[int(np.argmax(scores))]
        accuracies.append(np.mean([(distance[i] < threshold) == bool(same[i]) for i in test]))
        start = stop
    assert result["accuracy"] == pytest.approx(np.mean(accuracies))
    assert result["std"] == pytest.approx(np.std(accuracies))


def test_tar_at_far_and_eer_against_loops():
    same, distance = torch.rand(3000) < 0.5, torch.rand(3000).round(decimals=3)         # many ties
    distance[same] *= 0.5
    result = evaluate.verification(distance.numpy(), same)
    genuine, impostor = distance[same].tolist(), distance[~same].tolist()
    accepted = lambda cut, kind: np.mean([d <= cut for d in kind])
    cuts = [-1, *sorted(set(distance.tolist()))]
    for limit in (1e-3, 1e-4):
        naive = max(accepted(cut, genuine) for cut in cuts if accepted(cut, impostor) <= limit)
        assert result[f"tar_at_far_{limit:.0e}"] == pytest.approx(naive)
    errors = [(accepted(cut, impostor), 1 - accepted(cut, genuine)) for cut in cuts]
    assert result["eer"] == pytest.approx(np.mean(min(errors, key=lambda e: abs(e[0] - e[1]))))


def test_bootstrap_interval_is_that_of_resampled_answers():
    generator = np.random.default_rng(1)
    answers = [generator.random(400) < 0.9, generator.random(900) < 0.7]
    low, high = evaluate.bootstrap_interval([a.mean() for a in answers], [400, 900])
    resampled = [np.mean([generator.choice(a, len(a)).mean() for a in answers]) for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(resampled, (0.025, 0.975)), abs=0.002)


def test_consistency_separability_and_nearest_against_loops():
    f, labels = F.normalize(torch.randn(12, 6)), torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [3])
    C, S = evaluate.consistency_separability(f, labels)
    pairs = [[(f[i] @ f[j]).item() for i in range(12) for j in range(i) if labels[i] == labels[j] == c]
             for c in range(3)]
    centres = [F.normalize(f[labels == c].mean(0), dim=0) for c in range(4)]
    assert C == pytest.approx(np.mean([np.mean(p) for p in pairs]), abs=1e-5)
    apart = [1 - (centres[i] @ centres[j]).item() for i in range(4) for j in range(4) if i != j]
    assert S == pytest.approx(np.mean(apart), abs=1e-5)
    close, which = evaluate.nearest(f, torch.stack(centres), labels)
    naive = [max(((f[i] @ centres[c]).item(), c) for c in range(4) if c != labels[i]) for i in range(12)]
    assert list(zip(close.tolist(), which.tolist())) == [pytest.approx(pair, abs=1e-5) for pair in naive]
    image, which = evaluate.nearest(f, f, labels, labels)
    naive = [max(((f[i] @ f[j]).item(), j) for j in range(12) if labels[i] != labels[j]) for i in range(12)]
    assert list(zip(image.tolist(), which.tolist())) == [pytest.approx(pair, abs=1e-5) for pair in naive]
    quality = torch.rand(12)
    naive = np.mean([quality[labels == c].numpy().var(ddof=1) for c in range(3)])
    assert evaluate.diversity(quality, labels) == pytest.approx(naive, rel=1e-4)
    assert evaluate.diversity(quality[:4], torch.arange(4)) is None


def face_set(f, labels, thumbs=None, names=None):
    """A FaceSet without images."""
    class Named:
        files = [f"{i}.jpg" for i in range(len(f))]
    Named.names = dict.fromkeys(names or [f"p{i}" for i in range(int(labels.max()) + 1)])
    thumbs = F.normalize(torch.randn(len(f), 256)) if thumbs is None else thumbs
    return evaluate.FaceSet(Named, f, labels, torch.zeros(len(f)), thumbs, torch.arange(len(f)))


def test_a_dataset_s_outliers_and_near_duplicates_are_found():
    centres = F.normalize(torch.randn(40, 64))
    labels = torch.arange(40).repeat_interleave(6)
    real = face_set(F.normalize(centres[labels] + 0.05 * torch.randn(240, 64)), labels)
    strangers, lines = evaluate.baseline_lines(real)
    people = F.normalize(torch.randn(20, 64))
    people[7] = F.normalize(people[3] + 0.02 * torch.randn(64), dim=0)               # the same person twice
    labels = torch.arange(20).repeat_interleave(5)
    f = F.normalize(people[labels] + 0.05 * torch.randn(100, 64))
    f[52] = F.normalize(people[11] + 0.05 * torch.randn(64), dim=0)                    # of another person
    virtual, prototypes = face_set(f, labels), model.Prototypes(40, 5, 64)
    row = evaluate.judge(virtual, evaluate.resemblance(virtual, real), lines, prototypes)
    assert row["near_duplicates"] == 2 and 1 <= row["outliers"] <= 10           # of 3 and 7, any may stray
    assert row["leakage"]["verdict"] == "clean" and row["own_top1"] is None
    alone = face_set(people, torch.arange(20))                                  # one image of each person
    row = evaluate.judge(alone, evaluate.resemblance(alone, real), lines, prototypes)
    assert row["consistency"] is None and row["outliers"] == 0


def test_leaks_towards_centres_and_towards_single_images_are_told_apart():
    directions = F.normalize(torch.randn(60, 64))
    labels = torch.arange(30).repeat_interleave(2)
    real = face_set(F.normalize(directions + 0.3 * directions[labels]), labels)  # two unlike images a person
    strangers, lines = evaluate.baseline_lines(real)
    assert all((strangers[test][0] > lines[test]).float().mean() <= 0.02 for test in ("centre", "image"))
    clean = F.normalize(torch.randn(400, 64))
    clean = clean[(clean @ real.f.T).amax(1) < lines["image"]][:200]
    f = torch.cat([clean, real.f[[5, 8, 31]]])
    virtual = face_set(f, torch.arange(len(f)) // 2)
    found = evaluate.resemblance(virtual, real)
    row = evaluate.judge(virtual, found, lines, model.Prototypes(30, 0, 64))["leakage"]
    assert row["images_over_image"] == 3 and row["verdict"] == "leaks" and row["copies"] == 0
    listed = [line for line in evaluate.leaks(virtual, found, lines, real) if line[1] == "image"]
    assert [(line[0], line[3], line[4]) for line in listed] == [
        (f"{len(clean)}.jpg", "p2", "5.jpg"), (f"{len(clean) + 1}.jpg", "p4", "8.jpg"),
        (f"{len(clean) + 2}.jpg", "p15", "31.jpg")]


def test_thumbnails_know_copies_from_strangers():
    who, how = torch.rand(60, data.IDENTITY_DIALS), torch.rand(60, data.NUISANCE_DIALS)
    faces = to_bytes(data.draw_faces(who, how, 64)[0])
    thumbs = evaluate.thumbnails(faces)
    strangers = (thumbs @ thumbs.T).fill_diagonal_(-1).amax()
    for copies in (faces[:, [2, 0, 1]], (faces.float() * 0.6 + 30).to(torch.uint8), jpeg(faces, 60)):
        assert (evaluate.thumbnails(copies) * thumbs).sum(1).min() > max(0.99, strangers)
    real = face_set(thumbs, torch.arange(60), thumbs)
    mirrored = face_set(-thumbs, torch.arange(60), evaluate.thumbnails(faces.flip(3)))
    value, which = evaluate.resemblance(mirrored, real)["copy"]
    assert which.tolist() == list(range(60)) and value.min() > 0.9999


# --------------------------------------------------------------------------------------------------- sampling


def test_poses_are_spread_over_yaw_and_people():
    bank = torch.rand(400, 5, 2) * 0.1 + data.TEMPLATE
    people, by_yaw = torch.arange(400) // 10, data.yaw_of(bank).argsort()
    poses = sample.choose_poses(by_yaw, people, 8, sample.seeded(0, 1, "poses"))
    assert poses == sample.choose_poses(by_yaw, people, 8, sample.seeded(0, 1, "poses"))
    assert poses != sample.choose_poses(by_yaw, people, 8, sample.seeded(0, 2, "poses"))
    yaw = data.yaw_of(bank)[poses]
    assert len(set(people[poses].tolist())) == 8 and (yaw.diff() >= 0).all()
    assert len(sample.choose_poses(by_yaw[:4], people, 8, sample.seeded(0))) == 8


# --------------------------------------------------------------------------- the scripts, as a user runs them


SAMPLE = ("--virtual", 5, "--per-id", 3, "--steps", 2, "--max-real", 2)         # nobody is near at cosine 2


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """All four scripts once, on a small drawn set: (working folder, printed texts)."""
    cwd = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    folder(cwd / "faces", 24, 4)
    people = (255 * data.draw_faces(torch.rand(20, data.IDENTITY_DIALS).repeat_interleave(4, 0),
                                    torch.rand(80, data.NUISANCE_DIALS), 32)[0]).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    data.write_bin(cwd / "faces/held.bin", people.view(20, 4, 3, 32, 32), 300, generator)
    printed = {"fr": script("fr_train.py", "--data", "faces", "--batch", 32, "--epochs", 2, cwd=cwd),
               "dit": script("dit_train.py", "--steps", 4, "--batch", 8, cwd=cwd),
               "sample": script("sample.py", *SAMPLE, "--batch", 4, cwd=cwd),
               "fr-virtual": script("fr_train.py", "--data", "runs/virtual", "--virtual", 0, "--batch", 8,
                                    "--epochs", 1, "--init", "runs/fr", "--out", "runs/fr-virtual", cwd=cwd),
               "evaluate": script("evaluate.py", cwd=cwd)}
    return cwd, printed


def test_pipeline_leaves_what_the_readme_says(pipeline):
    cwd, printed = pipeline
    virtual = cwd / "runs/virtual"
    files = sorted(path.relative_to(virtual).as_posix() for path in virtual.rglob("*.*"))
    pictures = [f"v{i:06d}/{j:04d}.jpg" for i in range(5) for j in range(3)]
    assert files == ["README.md", "audit.json", "grid.jpg", "landmarks.csv", "manifest.csv", "run.json",
                     *pictures]
    rows = list(csv.DictReader((cwd / "runs/virtual/manifest.csv").open()))
    assert [row["file"] for row in rows] == pictures and all(-1 <= float(row["cos_own"]) <= 1 for row in rows)
    assert all(Image.open(cwd / "runs/virtual" / name).size == (32, 32) for name in pictures)
    assert len(list((cwd / "runs/dit").glob("preview-*.jpg"))) == 4
    report = json.loads((cwd / "runs/report/report.json").read_text())
    assert set(report["models"]) == {"runs/fr", "runs/fr-virtual"}
    for scores in report["models"].values():
        assert 0 <= scores["held"]["accuracy"] <= 1 and scores["average"] == scores["held"]["accuracy"]
    row = report["datasets"]["runs/virtual"]
    assert (row["identities"], row["images"]) == (5, 15) and row["leakage"]["verdict"] in ("clean", "leaks")
    assert set(row["leakage"]) >= {"threshold", "images_over", "q99", "baseline_q99", "verdict"}
    pictures = [path.name for path in sorted((cwd / "runs/report").rglob("*.*g"))]
    assert pictures == ["pairs-held.png", "closest.jpg", "multiview.jpg", "nearest-real.png",
                        "similarity.png"]
    assert "CPLFW" in printed["evaluate"].split("Absent")[1] and "VIGFace(L)" in printed["evaluate"]
    assert "virtual to any other" in printed["fr"] and "own cosine real" in printed["dit"]
    assert "runs/fr-virtual" in printed["evaluate"]


def test_landmarks_are_found_on_the_way_where_they_are_missing(pipeline, tmp_path):
    """With a detector that knows nothing, so that the template stands in."""
    folder(tmp_path / "bare", 4, 4, landmarks=False)
    weights = {f"module.{name}": t for name, t in model.RetinaFace().state_dict().items()}
    for level in range(3):
        weights[f"module.ClassHead.{level}.conv1x1.bias"] = torch.tensor([50., -50., 50., -50.])
    torch.save(weights, tmp_path / "w.pth")
    printed = here("data.py", "landmarks", "bare", "--weights", "w.pth", cwd=tmp_path)
    assert "found the landmarks of 0 of 16 images; for 16 the template stands in" in printed
    (tmp_path / "bare/landmarks.csv").unlink()
    here("fr_train.py", "--data", "bare", "--epochs", 1, "--batch", 4, cwd=tmp_path)
    assert "for 16 the template" in here("dit_train.py", "--steps", 2, "--batch", 4, "--weights", "w.pth",
                                         cwd=tmp_path)
    faces = data.Faces([tmp_path / "bare"])
    assert torch.allclose(faces.landmarks, data.TEMPLATE.expand(16, 5, 2), atol=1e-3)


def test_the_audit_catches_a_planted_copy(pipeline, tmp_path):
    """One copy of a real image in a hundred: as it is, mirrored, recoloured, re-encoded."""
    cwd, _ = pipeline
    torch.manual_seed(9)
    folder(tmp_path / "set", 50, 2)

    def audit(code):
        here("evaluate.py", "--fr", "runs/fr", "--datasets", tmp_path / "set", "--strict", "--audit-fr",
             "runs/fr-virtual", "--pairs", "faces/held.bin", "--out", tmp_path, cwd=cwd, code=code)
        return list(csv.DictReader((tmp_path / "leaks.csv").open()))
    for row in audit(3):                                # a hundredth of strangers are over a line, or more:
        Path(row["file"]).unlink(missing_ok=True)       # without them the set is clean
    assert not audit(0)
    original = sorted((cwd / "faces").glob("*/*.png"))[5]
    image = data.read_image(original)[0]
    for copy in (image, image.flip(2), image[[2, 0, 1]], jpeg(image[None], 80)[0]):
        data.write_png(tmp_path / "set/person 0/copy.png", copy)
        copies = [row for row in audit(3) if row["test"] == "copy"]
        assert {row["judge"] for row in copies} == {"runs/fr", "runs/fr-virtual"}
        assert {(row["person"], Path(row["image"]).name) for row in copies} == {
            (original.parent.name, original.name)}
    report = json.loads((tmp_path / "report.json").read_text())
    for judged in (report, report["audit"]):
        leakage = judged["datasets"][str(tmp_path / "set")]["leakage"]
        assert leakage["copies"] == 1 and leakage["verdict"] == "leaks"


def test_a_finished_run_is_not_run_again(pipeline):
    cwd, _ = pipeline
    before = (cwd / "runs/virtual/v000000/0000.jpg").stat().st_mtime_ns
    assert "already complete" in here("sample.py", *SAMPLE, "--batch", 4, cwd=cwd)
    assert (cwd / "runs/virtual/v000000/0000.jpg").stat().st_mtime_ns == before
    error = here("sample.py", *SAMPLE, "--batch", 4, "--virtual", 4, cwd=cwd, code=2)
    assert "virtual = 5, now 4" in error
    error = here("fr_train.py", "--data", "faces", "--batch", 32, "--epochs", 3, cwd=cwd, code=2)
    assert "epochs = 2, now 3" in error


def sampled(pipeline, where, *arguments, **options):
    """Runs sample.py in folder `where`; -> what it left in where/set, as {name: bytes}."""
    where.mkdir(exist_ok=True)
    runs = pipeline[0] / "runs"
    here("sample.py", *SAMPLE, "--batch", 1, "--dit", runs / "dit", "--fr", runs / "fr", "--out", "set",
         *arguments, cwd=where, **options)
    return {path.relative_to(where).as_posix(): path.read_bytes() for path in where.rglob("set/**/*.*")}


def killed_at(script_name, function, count, arguments, cwd):
    """Runs a script that gets SIGKILL when it calls model.`function` the count-th time; -> whether it did."""
    killer = (f"import os, runpy, signal, sys, model; call, left = model.{function}, [{count}]\n"
              "def counted(*a, **b):\n"
              "    left[0] -= 1\n"
              "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
              "    return call(*a, **b)\n"
              f"model.{function} = counted; sys.argv = {[str(HERE / script_name), *map(str, arguments)]!r}\n"
              f"runpy.run_path({str(HERE / script_name)!r}, run_name='__main__')")
    env = {**os.environ, "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", killer], cwd=cwd, env=env, capture_output=True)
    return done.returncode == -9


@pytest.fixture(scope="module")
def rejecting(pipeline, tmp_path_factory):
    """A set of which the audit rejects about half at first: (the flags, its files)."""
    rows = csv.DictReader((pipeline[0] / "runs/virtual/manifest.csv").open())
    line = np.sort([float(row["cos_nearest_real"]) for row in rows])[6:8].mean()    # between two of all
    flags = ("--max-real", f"{line:.5f}", "--format", "jpg")
    return flags, sampled(pipeline, tmp_path_factory.mktemp("whole") / "a", *flags)


def test_the_audit_draws_again_and_leaves_out_whom_it_must(rejecting):
    flags, files = rejecting
    audit = json.loads(files["set/audit.json"])
    rows = list(csv.DictReader(io.StringIO(files["set/manifest.csv"].decode())))
    assert audit["accepted"] == len(rows) == sum(name.endswith("g") for name in files) - 1      # and the grid
    assert audit["drawn"] == audit["accepted"] + audit["leak"]
    assert audit["leak"] == len(audit["rejected_pictures"])
    assert audit["accepted"] + audit["left_out"] == 15 and audit["leak"] > 0
    assert all(float(row["cos_nearest_real"]) <= float(flags[1]) for row in rows)
    assert all(float(row["cos_nearest_real"]) > float(flags[1]) for row in audit["rejected_pictures"])
    assert {row["attempt"] for row in rows} > {"0"}                                     # some came later
    tries = [(row["identity"], row["index"], row["attempt"]) for row in [*rows, *audit["rejected_pictures"]]]
    assert len(set(tries)) == len(tries) == audit["drawn"]
    assert f"{audit['accepted']} pictures" in files["set/README.md"].decode()


def test_killed_sampling_gives_the_same_set_byte_for_byte(pipeline, rejecting, tmp_path):
    flags, whole = rejecting
    arguments = [*SAMPLE, "--batch", 1, "--dit", pipeline[0] / "runs/dit", "--fr", pipeline[0] / "runs/fr",
                 "--out", "set", *flags]
    for moment in (2, 4, 9, 3, 5):                                              # files after the start
        assert killed_at("sample.py", "replace_file", moment, arguments, tmp_path)
        for picture in tmp_path.rglob("set/v*/*.jpg"):
            name = picture.relative_to(tmp_path).as_posix()
            assert picture.read_bytes() == whole[name]                          # never half of it
    assert sampled(pipeline, tmp_path, *flags) == whole


def test_two_ranks_give_the_set_of_one(pipeline, rejecting, tmp_path):
    flags, whole = rejecting
    first = sampled(pipeline, tmp_path, *flags, env={"RANK": "1", "WORLD_SIZE": "2"})
    assert "set/manifest.csv" not in first and any(name.endswith("jpg") for name in first)
    assert sampled(pipeline, tmp_path, *flags, env={"RANK": "0", "WORLD_SIZE": "2"}) == whole


def test_records_hold_the_same_pictures(pipeline, rejecting, tmp_path):
    flags, whole = rejecting
    sampled(pipeline, tmp_path, *flags, "--format", "rec")
    faces = data.Faces([tmp_path / "set"])
    assert (tmp_path / "set/property").read_text() == f"{len(faces.names)},32,32\n"
    rows = list(csv.DictReader((tmp_path / "set/manifest.csv").open()))
    folder_rows = list(csv.DictReader(io.StringIO(whole["set/manifest.csv"].decode())))
    assert [{**row, "file": 0} for row in rows] == [{**row, "file": 0} for row in folder_rows]
    names = list(faces.names)
    assert [str(24 + int(row["identity"][1:])) for row in rows] == [names[y] for y in faces.labels]
    pictures = [data.read_image(io.BytesIO(whole[f"set/{row['file']}"]))[0] for row in folder_rows]
    assert torch.equal(faces.images, torch.stack(pictures)) and not faces.landmarks.isnan().any()
    index = dict(line.split("\t") for line in (tmp_path / "set/train.idx").read_text().splitlines())
    content = (tmp_path / "set/train.rec").read_bytes()
    labels = lambda key: struct.unpack_from("<ff", content, int(index[str(key)]) + 8 + 24)
    start, stop = map(int, labels(0))                                   # as InsightFace's loaders find people
    assert start == len(rows) + 1 and stop - start == len({row["identity"] for row in rows})
    ends = [labels(key)[1] for key in range(start, stop)]
    assert [labels(key)[0] for key in range(start, stop)] == [1, *ends[:-1]]
    assert labels(stop - 1)[1] == start


def test_records_survive_the_magic_number_inside(tmp_path):
    magic = struct.pack("<I", data.Record.MAGIC)
    for image in (b"abcd" + magic, magic, b"abc" + magic + b"d", magic * 2 + b"xy", b"", b"12345678"):
        record = data.pack_record(3, [7], image)
        (tmp_path / "x.rec").write_bytes(record)
        data.mapped.cache_clear()
        assert data.Record(tmp_path / "x.rec", 3, 0).open("rb").read() == image and len(record) % 4 == 0


def test_real_people_are_filled_up(pipeline, tmp_path):
    files = sampled(pipeline, tmp_path, "--real-to", 6, "--min-own", -1)
    rows = list(csv.DictReader(io.StringIO(files["set/manifest.csv"].decode())))
    assert len(rows) == 24 * 2 and all(f"set/{row['file']}" in files for row in rows)
    united = data.Faces([pipeline[0] / "faces", tmp_path / "set"])
    assert len(united.names) == 24 and united.labels.bincount().tolist() == [6] * 24
    assert "real people" in files["set/README.md"].decode()


@pytest.mark.parametrize("stage, arguments", [
    ("fr", "fr_train.py --data faces --batch 16 --epochs 20 --head adaface --augment".split()),
    ("dit", "dit_train.py --steps 4 --batch 8 --preview 2".split())])
def test_killed_training_continues_to_the_same_weights(pipeline, tmp_path, stage, arguments):
    """SIGKILL between the second model and its state, then the same command: as if never killed."""
    cwd, _ = pipeline
    here(*arguments, "--out", tmp_path / "whole", cwd=cwd)
    assert killed_at(arguments[0], "save_state", 2, [*arguments[1:], "--out", tmp_path / "cut"], cwd)
    assert "continuing" in here(*arguments, "--out", tmp_path / "cut", cwd=cwd)
    whole, cut = (model.load_model(tmp_path / name, stage)[0] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_error_is_not_glued_to_a_progress_bar(capsys):
    with pytest.raises(SystemExit), tqdm(range(9), "busy") as bar:
        bar.update()
        model.fail("no such thing")
    assert "error: no such thing" in capsys.readouterr().err.replace("\r", "\n").splitlines()


def test_compiled_networks_say_what_plain_ones_say(monkeypatch, capsys):
    torch.manual_seed(0)
    net = model.Recogniser(model.FRConfig(32, 16, 16, units=(1, 1, 1, 1))).eval().requires_grad_(False)
    assert model.compiled(net, CPU, 29_999) is net                      # too few images to repay it
    x = torch.randn(3, 3, 32, 32)
    assert torch.allclose(model.compiled(net, CPU, 30_000)(x), net(x), atol=1e-4)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(model.shutil, "which", lambda name: None)
    assert model.compiled(net, CPU, 30_000) is net and "no C++ compiler" in capsys.readouterr().out


def test_an_interrupted_run_says_one_line_and_continues(pipeline, tmp_path):
    """And while it runs nobody else may run there."""
    line = [HERE / "fr_train.py", "--data", "faces", "--batch", 4, "--epochs", 300,
            "--out", tmp_path / "out"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)               # also under nohup
    process = subprocess.Popen([sys.executable, *map(str, line)], cwd=pipeline[0], env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen)
    while not (tmp_path / "out/state.pt").exists():
        time.sleep(0.05)
    assert "another process" in script(*line, cwd=pipeline[0], code=2)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1].replace("\r", "\n")
    assert process.returncode == 130 and "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("interrupted")]
    step = torch.load(tmp_path / "out/state.pt")["step"]
    assert step > 0 and model.load_model(tmp_path / "out", "fr")[1]["step"] >= step


@pytest.mark.parametrize("tenth", range(10))
def test_a_checkpoint_cut_short_is_refused(pipeline, tmp_path, capsys, tenth):
    net = torch.nn.Linear(2, 2)
    for name, read in (("fr/model.safetensors", lambda path: model.load_recogniser(path.parent, CPU)),
                       ("fr/state.pt", lambda path: model.resume(path, {}, {"backbone": net}))):
        content = (pipeline[0] / "runs" / name).read_bytes()
        path = tmp_path / Path(name).name
        path.write_bytes(content[:len(content) * tenth // 10])
        with pytest.raises(SystemExit) as stop:
            read(path)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_costs_nothing_that_was_there(tmp_path, capsys):
    (tmp_path / "x").write_text("before")

    def half(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit) as stop:
        model.replace_file(tmp_path / "x", half)
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "before" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("metadata", [
    {"config": {"size": 10 ** 12}}, {"config": {"size": 32, "dim": 64, "width": 4096, "units": [9] * 4}},
    {"config": {"units": [-1]}}, {"config": []}, {"names": ["../../outside"]}, {"names": 3}, {"stage": None}])
def test_absurd_metadata_of_a_checkpoint_is_refused(pipeline, tmp_path, capsys, metadata):
    tensors, meta = model.load_model(pipeline[0] / "runs/fr", "fr")
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m/model.safetensors", {"vigface": json.dumps(meta | metadata)})
    with pytest.raises(SystemExit) as stop:
        model.load_recogniser(tmp_path / "m", CPU)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [
    b"\x80\x02cnumpy\nndarray\n(I4294967296\ntR.", b"\x80\x02]r\xff\xff\xff\xff.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00abc.", b"(" * 100_000 + b"."],
    ids=["array of any size", "memo far out", "absurd length", "deep"])
def test_a_pickle_cannot_ask_for_memory(tmp_path, capsys, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(SystemExit):
        data.read_benchmark(tmp_path / "x.bin", 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2 ** 20     # KiB


def test_an_image_that_promises_too_much_is_not_decoded(tmp_path):
    folder(tmp_path, 60, 2)
    Image.new("1", (9000, 9000)).save(tmp_path / "person 7/1.png")              # 10 kB, 243 MB as RGB
    faces = data.Faces([tmp_path])
    assert len(faces) == 119


def bad_input(case, root):
    """Makes one kind of bad input in root; -> (arguments, what the error must name)."""
    if case == "missing folder":
        return ("fr_train.py", "--data", root / "nowhere"), "nowhere: no such folder"
    if case == "empty folder":
        return ("fr_train.py", "--data", root), "no images"
    if case == "no identity folders":
        Image.new("RGB", (32, 32)).save(root / "a.jpg")
        return ("fr_train.py", "--data", root), "expected identity/image.jpg"
    if case == "one identity":
        folder(root, 1, 4)
        return ("fr_train.py", "--data", root), "two identities"
    if case == "unreadable image":
        folder(root, 2, 4)
        (root / "person 0/2.png").write_bytes(b"not an image")
        return ("fr_train.py", "--data", root), "person 0/2.png"
    if case.startswith("record"):
        pngs = []
        folder(root / "a", 2, 60)
        pngs = [file.read_bytes() for file in data.Faces([root / "a"]).files]
        write_records(root / "r", pngs, [0] * 60 + [1] * 60)
        rec, idx = (root / "r/train.rec"), (root / "r/train.idx")
        if case == "record file truncated":
            rec.write_bytes(rec.read_bytes()[:-500])
            return ("fr_train.py", "--data", root / "r"), "ends beyond"
        if case == "record index of another file":
            idx.write_text("".join(f"{i}\t{40 * i}\n" for i in range(9)))
            return ("fr_train.py", "--data", root / "r"), "lacks the magic number"
        if case == "record index unreadable":
            idx.write_text("one two\n")
            return ("fr_train.py", "--data", root / "r"), "expected a line of key and offset"
    if case == "batch of one":
        folder(root, 2, 2)
        return ("fr_train.py", "--data", root, "--batch", 1, "--head", "adaface"), "--batch 1: expected 2"
    if case == "odd size":
        folder(root, 2, 2)
        return ("fr_train.py", "--data", root, "--size", 40), "multiple of 16"
    if case == "no recogniser":
        return ("dit_train.py", "--fr", root), "no such checkpoint"
    if case == "wrong stage":
        return ("dit_train.py", "--fr", "runs/dit"), "expected a 'fr' checkpoint"
    if case == "checkpoint of another size":
        folder(root, 4, 2, size=48)
        here("fr_train.py", "--data", root, "--out", root / "fr48", "--epochs", 1, "--batch", 4, cwd=root)
        return ("sample.py", "--fr", root / "fr48", "--virtual", 2), "48 px"
    if case == "no landmarks":
        folder(root, 2, 2, landmarks=False)
        here("fr_train.py", "--data", root, "--out", root / "fr", "--epochs", 1, "--batch", 2, cwd=root)
        return ("dit_train.py", "--fr", root / "fr", "--weights", root / "w.pth"), "w.pth: expected published"
    if case == "people nobody knows":
        folder(root, 30, 1)
        return ("dit_train.py", "--data", root), "have no prototype"
    if case == "too many virtual people":
        return ("sample.py", "--virtual", 25), "expected 1 to 24"
    if case == "broken benchmark":
        (root / "x.bin").write_bytes(b"\x80\x04nonsense")
        return ("evaluate.py", "--pairs", root / "x.bin"), "x.bin"


@pytest.mark.parametrize("case", [
    "missing folder", "empty folder", "no identity folders", "one identity", "unreadable image",
    "record file truncated", "record index of another file", "record index unreadable", "batch of one",
    "odd size", "no recogniser", "wrong stage", "checkpoint of another size", "no landmarks",
    "people nobody knows", "too many virtual people", "broken benchmark"])
def test_bad_input_is_one_clear_line_and_nothing_is_written(pipeline, tmp_path, case):
    arguments, named = bad_input(case, tmp_path)
    error = here(*arguments, "--out", tmp_path / "out", cwd=pipeline[0], code=2)
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and named in lines[0], error
    assert not (tmp_path / "out").exists()
