"""Run with `python -m pytest -q`: formulas against naive ones, invariants, scripts as users run them."""
import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

os.environ["CUDA_VISIBLE_DEVICES"] = ""                                 # before the scripts look for a GPU
import data
import dit_train
import evaluate
import fr_train
import model
import sample
from tools import retinaface, toys

HERE = Path(__file__).parent
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)                                              # align sets one


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


def stops(capsys, call, *args):
    """Calls what must end the program with exit code 2 and one line on stderr; that line."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    errors = re.findall("error: .*", capsys.readouterr().err)
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


# -------------------------------------------------------------------------------- recogniser and prototypes

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


@pytest.mark.parametrize("quality", [-1.0, -0.3, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("cosine", [0.98, 0.2, -0.5, -0.98])
def test_adaface_against_the_definition(quality, cosine):
    cos = torch.tensor([[0.3, cosine, -0.1]], dtype=torch.float64, requires_grad=True)
    logits = model.adaface(cos, torch.tensor([1]), torch.tensor([[quality]], dtype=torch.float64))
    theta, m = math.acos(cosine), 0.4
    angle = min(max(theta - m * quality, 1e-3), math.pi - 1e-3)                 # g_angle = -m quality
    expected = math.cos(angle) - (m + m * quality)                              # g_add = m + m quality
    assert logits[0].tolist() == pytest.approx([64 * 0.3, 64 * expected, -6.4])
    logits.sum().backward()
    slope = math.sin(angle) / math.sin(theta) if 1e-3 < angle < math.pi - 1e-3 else 0
    assert cos.grad[0].tolist() == pytest.approx([64, 64 * slope, 64])


@pytest.mark.parametrize("head", model.MARGINS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_no_embedding_breaks_the_loss(head, kind):
    prototypes = model.Prototypes(4, 4, 8)
    f = torch.cat([prototypes.real[:1].detach(), -prototypes.real[1:2].detach(), torch.zeros(1, 8),
                   1e4 * torch.ones(1, 8)]).to(kind).requires_grad_()       # cos = 1, cos = -1, no norm, huge
    real, virtual, quality = model.vigface_loss(f, torch.arange(4), prototypes, 3, head)
    virtual.backward(retain_graph=True)                             # moves virtual prototypes, nothing else
    assert all(given.grad is None or not given.grad.any() for given in (f, prototypes.real))
    assert prototypes.virtual.grad.abs().sum() > 0
    (real + quality).backward()
    assert f.grad.isfinite().all() and all(p.grad.isfinite().all() for p in prototypes.parameters())
    assert all(buffer.isfinite().all() for buffer in prototypes.buffers())


@pytest.mark.parametrize("head", model.MARGINS)
def test_real_loss_is_the_margin_loss_over_all_prototypes_with_a_ramp(head):
    f, labels, (logits, margin) = 9 * torch.randn(6, 8), torch.arange(6) % 5, model.MARGINS[head]
    norm = f.norm(dim=1, keepdim=True)                  # AdaFace's quality, at the first step of its averages
    mean, std = 0.99 * 20 + 0.01 * norm.mean(), 0.99 * 100 + 0.01 * norm.std()
    quality = ((norm - mean) / (std + 1e-3) * 0.333).clamp(-1, 1)
    for ramp in (0.0, 0.3, 1.0):
        prototypes = model.Prototypes(5, 4, 8)
        expected = logits(F.normalize(f) @ prototypes.unit().T, labels, quality, margin=ramp * margin)
        real, _, _ = model.vigface_loss(f, labels, prototypes, 0, head, ramp)
        assert real.item() == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-4)
    real.backward()                                                 # virtual prototypes are its negatives
    assert prototypes.virtual.grad.abs().sum() > 0 and prototypes.real.grad.abs().sum() > 0


def test_quality_head_learns_the_cr_fiqa_ratio_and_disturbs_nothing():
    prototypes, f = model.Prototypes(4, 3, 8), torch.randn(5, 8, requires_grad=True)
    cos = F.normalize(f) @ F.normalize(prototypes.real).T
    loss, naive = model.quality_loss(f, cos, torch.arange(5) % 4, prototypes), []
    for i in range(5):
        own, nearest_other = cos[i, i % 4], max(cos[i, j] for j in range(4) if j != i % 4)
        gap = abs(prototypes.quality(f[i]) - own / (nearest_other + 1 + 1e-9)).item()
        naive.append(gap ** 2 if gap < 0.5 else gap - 0.25)                     # smooth L1, beta 1/2
    assert loss.item() == pytest.approx(np.mean(naive), rel=1e-4)
    loss.backward()
    assert f.grad is None and prototypes.real.grad is None and prototypes.quality.weight.grad.abs().sum() > 0


def test_virtual_prototypes_lie_where_people_do():
    n, dim, used = 3000, 64, 20
    prototypes, axes = model.Prototypes(n, 2000, dim), torch.linalg.qr(torch.randn(dim, dim))[0]
    spread = torch.linspace(1, -0.5, dim).where(torch.arange(dim) < used, torch.tensor(0.02))
    with torch.no_grad():
        prototypes.real.copy_(torch.randn(n, dim) * spread @ axes.T)
        prototypes.virtual.copy_(torch.randn(2000, dim) * torch.linspace(0.1, 1, dim) @ axes.T)  # they flee
    assert (prototypes.unit()[n:] @ axes[:, :used]).square().sum(1).mean() > 0.99       # in training
    images = prototypes.real.detach().repeat(2, 1) + torch.randn(2 * n, dim) * (1 - spread) @ axes.T
    f, labels = F.normalize(images), torch.arange(n).repeat(2)      # they differ where people do not
    people = model.person_moment(f, labels)
    some, who = torch.cat([f[:9], f[n:n + 9], f[9:11]]), torch.tensor([*range(9), *range(9), 0, 9])
    pairs = [[*itertools.permutations(some[who == i], 2)] for i in range(9)]        # the tenth has one image
    loop = sum(a.outer(b) / len(of_one) for of_one in pairs for a, b in of_one)
    assert torch.allclose(model.person_moment(some, who), loop / loop.trace(), atol=1e-3)
    assert torch.allclose(model.person_moment(f[:n], labels[:n]), f[:n].T @ f[:n] / n, atol=1e-4)
    assert (people @ axes[:, used:]).norm() < 0.3 * people.norm()
    prototypes.settle(torch.eye(dim) / dim)                                         # as if people were round
    real, virtual = prototypes.to_draw().tensor_split([n])
    drawn = torch.eye(dim) / dim / 3 + real.T @ real / n * 2 / 3
    assert torch.equal(real, F.normalize(prototypes.real))
    assert (virtual.T @ virtual / 2000 - drawn).norm() < 0.1 * drawn.norm()         # of unit length again
    prototypes.free = True                                                      # the paper's: left alone
    prototypes.settle(people)
    assert torch.equal(prototypes.unit()[n:], F.normalize(prototypes.virtual))
    assert torch.equal(prototypes.to_draw()[n:], F.normalize(prototypes.virtual))


@pytest.mark.parametrize("dim, cosine", [(64, 0.4), (64, 0.95), (512, 0.5), (512, 0.75)])
def test_virtual_embeddings_are_as_close_to_their_prototypes_as_real_ones(dim, cosine):
    prototypes = model.Prototypes(500, 1, dim)
    w = F.normalize(prototypes.real.detach())
    aside = F.normalize(torch.randn_like(w) * torch.linspace(0.5, 1.5, dim))
    f = F.normalize(w + aside * (1 / cosine ** 2 - 1) ** 0.5)
    for _ in range(80):                                                         # an average over many steps
        model.vigface_loss(f, torch.arange(500), prototypes, 1)
    assert torch.allclose(prototypes.sigma2, (f - w).square().mean(0), rtol=0.01)
    virtual = model.around(w, torch.randn_like(w), prototypes.sigma2)
    assert abs((virtual * w).sum(1).mean() - (f * w).sum(1).mean()) < 0.02
    assert torch.allclose(model.around(w, torch.randn_like(w), torch.zeros(dim)), w, atol=1e-6)


def test_virtual_batch_has_the_paper_s_size_on_average():
    for k, b_real, n in ((5, 4, 5), (7, 4, 5), (1, 3, 10), (120, 2, 11), (0, 4, 5)):
        sizes = [model.virtual_batch_size(step, k, b_real, n) for step in range(50)]
        assert sum(sizes) == 50 * k * b_real // n and all(abs(size - k * b_real / n) < 1 for size in sizes)


# --------------------------------------------------------------------------------------------- DiT, diffusion

def test_a_fresh_dit_draws_grey_and_its_parts_are_what_they_say():
    x = torch.randn(2, 16, 64)
    assert torch.equal(model.DiTBlock(64, 4)(x, torch.randn(2, 64)), x)         # adaLN-Zero
    dit = model.DiT(32, 64, 4, width=64, depth=2, heads=1)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 1.0])
    a, s = model.signal_noise(t)
    v = dit(x, t, torch.randn(2, 64), torch.rand(2, 5, 2))
    assert v.shape == (2, 3, 32, 32) and torch.allclose(a * x - s * v, torch.zeros(()), atol=1e-6)      # x0
    image = model.landmark_image(torch.tensor([[[.2, .2], [.8, .2], [.5, .5], [.2, .8], [.8, .8]]]), 50)[0]
    assert image[:, [10, 10, 25, 40, 40], [10, 40, 25, 10, 40]].argmax(0).tolist() == [0, 0, 1, 2, 2]
    assert image.mean() < 0.05                                              # eyes red, nose green, mouth blue


def test_losses_of_a_perfect_dit_and_of_one_that_draws_somebody_else():
    x, seen = torch.rand(2000, 3, 4, 4) * 2 - 1, []

    def oracle(x, x_t, t, w, landmarks):            # knows the only image there is, whoever is asked for
        seen.append(w)
        a, s = model.signal_noise(t)
        return (a * x_t - x) / s                                              # x0 = a x_t - s v, solved for v
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16, bias=False))
    w = F.normalize(torch.randn(2000, 16))
    v_loss, identity_loss = model.dit_loss(partial(oracle, x), backbone, x, w, None)
    assert v_loss < 1e-6 and identity_loss < 1e-6                   # whatever w is: towards the picture itself
    assert 0.07 < (seen[0] == 0).all(1).float().mean() < 0.13
    kept = (seen[0] != 0).any(1)
    assert torch.equal(seen[0][kept], w[kept])
    _, opposite = model.dit_loss(partial(oracle, -x), backbone, x, w, None)          # 4 times a^2
    assert 1.8 < opposite < 2.2                                     # t is symmetric about 1/2: mean a^2 = 1/2


def test_solver_recovers_gaussians():
    """For data N(m, d^2) the best x0 is known and so is the flow: noise e ends at m + d e."""
    m, noise = 0.7, torch.randn(2000, 1, dtype=torch.float64)

    def error(d, steps):
        def denoise(x, t):
            a, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
            return m + a * d ** 2 / (a ** 2 * d ** 2 + s ** 2) * (x - a * m)
        return ((model.dpm_solver(denoise, noise, steps) - m) / d - noise).abs().mean().item()
    assert max(error(d, 10) for d in (0.1, 0.4, 1, 3, 10)) < 0.06       # from fine detail to brightness
    assert error(1, 40) < error(1, 10) / 10                                # first order would give a quarter
    assert abs(error(1, 1) - noise.abs().mean()) < 1e-9                    # one step: x0 at t = 1 is the mean


def test_guidance_is_linear_and_runs_nobody_only_if_need_be():
    calls = []

    def dit(x, t, w, landmarks):
        calls.append(bool(w.any()))
        return 0.1 * w.mean() * torch.ones_like(x)
    x, w = torch.zeros(2, 3, 4, 4), torch.ones(2, 8)
    x0 = {g: model.guided(dit, w, None, g)(x, 1.0) for g in (1.0, 0.0, 3.0)}    # at t = 1, x0 = -v
    assert torch.allclose(x0[3.0], 3 * x0[1.0] - 2 * x0[0.0]) and torch.allclose(x0[1.0], torch.tensor(-0.1))
    assert calls == [True, True, False, True, False]


# ------------------------------------------------------------------------------------------------------ faces

def contents(root):
    """What lies below a folder: {name: bytes}."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def people(count, per_person, size=32):
    """Toy people, `per_person` pictures of each: images uint8, landmarks in [0, 1]."""
    who = (2 * torch.rand(count, toys.PERSON) - 1).repeat_interleave(per_person, 0)
    images, points = toys.draw_faces(who, 2 * torch.rand(len(who), toys.PICTURE) - 1, size)
    return model.to_uint8(2 * images - 1), points


def folder(root, count, per_person, size=32, landmarks=True):
    """A small image folder of drawn people; what it holds."""
    images, points = people(count, per_person, size)
    files = [f"person {i // per_person}/{i % per_person}.png" for i in range(len(images))]
    for name, image in zip(files, images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(root / name)
    if landmarks:
        data.write_landmarks(root / "landmarks.csv", zip(files, points * size))
    return images, points


def stored(image, kind="PNG", **options):
    """A PIL image encoded, as an open file."""
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer


def jpeg(image, **options):
    return stored(to_pil_image(image), "JPEG", **options).getvalue()


MAGIC = struct.pack("<I", 0xced7230a)


def write_records(root, images, labels):
    """train.rec and train.idx as InsightFace has them: a header, then images; some labels are vectors."""
    bodies = [struct.pack("<IfQQff", 2, 0.0, 0, 0, len(images) + 1.0, len(images) + 1.0)]
    for i, (image, label) in enumerate(zip(images, labels)):
        bodies += [struct.pack("<IfQQ", 0, label, i, 0) + image if i % 2 else
                   struct.pack("<IfQQff", 2, 0.0, i, 0, label, 0.0) + image]
    content, index = b"", ""
    for key, body in enumerate(bodies):
        index += f"{key}\t{len(content)}\n"
        parts = body.split(MAGIC)                       # RecordIO cuts a record where its bytes are the magic
        for flag, part in zip([0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3], parts):
            content += MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
    root.mkdir(exist_ok=True)
    (root / "train.rec").write_bytes(content)
    (root / "train.idx").write_text(index)


def test_folders_and_records_unite_by_identity_name(tmp_path):
    images, points = folder(tmp_path / "a", 3, 2)
    folder(tmp_path / "b", 4, 1, size=48, landmarks=False)
    files = [jpeg(image) for image in images]
    split = jpeg(images[0], comment=b"ab" + MAGIC + b"c" + MAGIC)               # is left out, and counted aloud
    write_records(tmp_path / "r", [*files, split], [7, 7, 0, 0, 4, 4, 9])
    faces = data.Faces([tmp_path / name for name in "abr"])
    assert list(faces.people) == [f"person {i}" for i in range(4)] + ["7", "0", "4"] and faces.size == 32
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6]
    assert torch.allclose(faces.landmarks[:6], points, atol=1e-3) and faces.landmarks[6:].isnan().all()
    assert faces.path(3) == f"{tmp_path}/a/person 1/1.png"
    images = torch.stack([*images, *(pil_to_tensor(data.open_image(io.BytesIO(file))) for file in files)])
    assert torch.equal(torch.from_numpy(faces.images)[[*range(6), *range(10, 16)]], images)


def test_for_an_unreadable_image_the_next_one_stands_in(tmp_path, monkeypatch, capsys):
    """With its own label and landmarks, in memory and read as large sets are; batches keep their size."""
    folder(tmp_path / "a", 2, 60)
    (tmp_path / "a/person 0/9.png").write_bytes(b"broken")                      # the last of person 0
    rows = (tmp_path / "a/landmarks.csv").read_text().splitlines()
    (tmp_path / "a/landmarks.csv").write_text("\n".join(row for row in rows if "0/9.png" not in row))
    monkeypatch.setattr(retinaface, "load_detector", lambda *_: None)
    monkeypatch.setattr(retinaface, "crop_landmarks", lambda _, images: torch.full((len(images), 5, 2), torch.nan))
    seen, sent, to = [], [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *given, **how: sent.append(how) or to(*given, **how))
    for memory in (3e9, 0):
        faces = data.Faces([tmp_path / "a"], memory=memory)
        retinaface.complete_landmarks(faces, tmp_path / "run", None)
        assert (faces.images is None) == (memory == 0) and not faces.landmarks.isnan().any()
        seen.append([torch.stack(part) for part in zip(*data.batches(faces, 40, 0, 0, 6))])     # two epochs
    assert all(torch.equal(in_memory, lazy) for in_memory, lazy in zip(*seen, strict=True))
    assert sum("non_blocking" in how for how in sent) == 2 * 6 * 3          # a step waits for no copy
    x, labels, landmarks = (part[:3].flatten(0, 1) for part in seen[0])         # one epoch
    assert x.shape == (120, 3, 32, 32) and labels.bincount().tolist() == [59, 61]
    assert (landmarks == faces.landmarks[faces.labels.tolist().index(1)]).all((1, 2)).sum() == 2
    with pytest.warns(UserWarning, match="person 0/9.png"):
        faces[59]                                                       # 9.png: names are sorted as text
    for path in (tmp_path / "a").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.warns(UserWarning):
        assert "any other" in stops(capsys, data.Faces, [tmp_path / "a"])


def test_an_image_is_opened_as_it_is_meant_to_be_seen(tmp_path, monkeypatch):
    """Upright, of any depth in 8 bits, on white where it is transparent, and without starting a program."""
    image = to_pil_image(people(1, 1)[0][0])
    exif, grey, clear = Image.Exif(), np.asarray(image.convert("L")), image.convert("RGBA")
    exif[0x112] = 6
    turned = data.open_image(stored(image.transpose(Image.Transpose.ROTATE_90), exif=exif))
    assert np.array_equal(np.asarray(turned), np.asarray(image))
    for deep, kind in ((grey.astype(np.uint16) * 257, "PNG"), (grey.astype(np.int32) * 257, "TIFF"),
                       (grey / np.float32(255), "TIFF")):
        assert np.array_equal(np.asarray(data.open_image(stored(Image.fromarray(deep), kind)))[..., 0], grey)
    clear.putalpha(0)
    assert (np.asarray(data.open_image(stored(clear))) == 255).all()
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Exception):
        data.open_image(stored(image, "EPS"))
    assert not (tmp_path / "started").exists()


def test_files_and_rows_that_are_not_used_are_said(tmp_path, capsys):
    folder(tmp_path / "a", 2, 2)
    (tmp_path / "a/person 0/2020").mkdir()
    (tmp_path / "a/person 0/0.png").rename(tmp_path / "a/person 0/2020/0.jfif")
    (tmp_path / "a/person 1/0.heic").touch()
    faces = data.Faces([tmp_path / "a"])
    said = capsys.readouterr().out
    assert faces.labels.tolist() == [0, 0, 1, 1] and "1 .heic" in said
    assert "1 of its 4 rows name no image" in said and faces.landmarks.isnan().sum() == 10
    rows = (tmp_path / "a/landmarks.csv").read_text().splitlines()
    exchanged = [[name, *numbers[6:], *numbers[4:6], *numbers[:4]] for name, *numbers in csv.reader(rows)]
    (tmp_path / "a/landmarks.csv").write_text("\n".join(map(",".join, exchanged)))
    assert data.read_landmarks(tmp_path / "a", ["person 1/0.png"], 32).isfinite().all()
    assert "WARNING" in capsys.readouterr().out


PNG = jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------- evaluation

@pytest.mark.parametrize("pairs", [100, 103, 11])                               # folds of unequal size, too
def test_verification_against_a_literal_protocol(monkeypatch, pairs):
    f = F.normalize(torch.randn(2 * pairs, 4))
    f[1::2] = F.normalize(f[0::2] + 0.8 * torch.randn(pairs, 4))
    f[2:16:2], f[3:16:2] = f[0], f[1]                                           # ties
    f[4] = f[5]                                                                 # and an image twice
    same = torch.rand(pairs) < 0.5
    monkeypatch.setattr(evaluate, "embed", lambda *_, exact: f)
    distance = evaluate.pair_distances(None, None)
    naive = [sum((a - b) ** 2 for a, b in zip(x, y)) for x, y in zip(f[0::2].tolist(), f[1::2].tolist())]
    assert distance.tolist() == pytest.approx(naive, abs=1e-6)
    right = lambda chosen, threshold: np.mean([(distance[i] < threshold) == bool(same[i]) for i in chosen])
    thresholds, accuracies = np.arange(0, 4, 0.01), []
    for test in np.array_split(np.arange(pairs), 10):
        train = [i for i in range(pairs) if i not in test]
        best = int(np.argmax([right(train, threshold) for threshold in thresholds]))
        accuracies.append(right(test, thresholds[best]))
    naive = [np.mean(accuracies), np.std(accuracies)]
    assert [*evaluate.verification(distance, same).values()] == pytest.approx(naive)


def test_consistency_separability_diversity_and_nearest_against_loops():
    f, labels = F.normalize(torch.randn(12, 6)), torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [3])
    C, S = evaluate.consistency_separability(f, labels)
    pairs = [[(f[i] @ f[j]).item() for i in range(12) for j in range(i) if labels[i] == labels[j] == c]
             for c in range(3)]
    centres = torch.stack([F.normalize(f[labels == c].mean(0), dim=0) for c in range(4)])
    apart = [1 - (centres[i] @ centres[j]).item() for i in range(4) for j in range(4) if i != j]
    assert (C, S) == pytest.approx((np.mean([np.mean(p) for p in pairs]), np.mean(apart)), abs=1e-5)
    for targets, own in ((centres, torch.arange(4)), (f, labels)):
        close, which = model.nearest(f, targets, labels, own)
        for i in range(12):
            naive = max(((f[i] @ targets[j]).item(), j) for j in range(len(own)) if own[j] != labels[i])
            assert (close[i].item(), which[i].item()) == pytest.approx(naive, abs=1e-5)
    quality = torch.rand(12)
    naive = np.mean([quality[labels == c].numpy().var(ddof=1) for c in range(3)])
    assert evaluate.diversity(quality, labels) == pytest.approx(naive, rel=1e-4)


@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_a_judge_names_copies_even_if_it_has_collapsed(spread):
    """All embeddings nearly one point: the line that 99 % of strangers keep would let copies by, alone."""
    def face_set(f, labels):
        people, thumbs = {f"p{i}": i for i in range(100)}, F.normalize(torch.randn(len(f), 256))
        faces = SimpleNamespace(people=people, path=lambda i: f"{i}.jpg")
        return evaluate.FaceSet(f, labels, thumbs, torch.zeros(len(f)), faces, torch.arange(len(f)))
    point, labels = F.normalize(torch.randn(64), dim=0), torch.arange(40).repeat_interleave(5)
    people = F.normalize(point * (spread < 1) + spread * F.normalize(torch.randn(40, 64)))
    real = face_set(F.normalize(people[labels] + 0.05 * torch.randn(200, 64)), labels)
    strangers = evaluate.resemblance(real, real, labels)
    thresholds, cap = evaluate.thresholds_of(real, strangers)
    others = [real.f[(labels == labels[i]) & (torch.arange(200) != i)].mean(0) for i in range(200)]
    own = F.cosine_similarity(torch.stack(others), real.f)
    assert cap == pytest.approx(own.quantile(0.5).item(), abs=1e-5)
    for test in ("centre", "image"):
        assert thresholds[test] == pytest.approx(min(cap, strangers[test][0].quantile(0.99).item()), abs=1e-5)
    assert (thresholds["image"] == cap) == (spread < 1)                         # the cap bites
    strange = F.normalize(point * (spread < 1) + 0.4 * torch.randn(98, 64))
    planted = face_set(torch.cat([strange, real.f[[17, 4]]]), torch.arange(100))
    planted.thumbs[98] = real.thumbs[17].view(16, 16).flip(1).flatten()         # mirrored
    found = evaluate.resemblance(planted, real)
    row = evaluate.report_row(planted, found, thresholds, model.Prototypes(40, 0, 64))
    assert row["leakage"]["verdict"] == "leaks" and row["leakage"]["copies"] == 1
    rows = [row for row in evaluate.offenders(planted, found, thresholds, real) if row[0] in ("98.jpg", "99.jpg")]
    assert ["98.jpg", "image", "1.0000", "p3", "17.jpg"] in rows and "4.jpg" in rows[-2]
    assert ["98.jpg", "copy", "1.0000", "p3", "17.jpg"] in rows


def test_one_real_person_in_a_hundred_identities_leaks():
    labels, person = torch.arange(100).repeat_interleave(20), torch.randint(50, (2000,))
    cosine = torch.zeros(2000)
    cosine[:11], person[:11] = 0.9, 7                                           # 11 of 20 of identity 0
    assert evaluate.identities_over(labels, (cosine, person), 0.5) == 1
    person[:11] = torch.arange(11)                                              # of as many people: chance
    assert evaluate.identities_over(labels, (cosine, person), 0.5) == 0


# --------------------------------------------------------------------------- the scripts, as a user runs them

FR = ("--data", "faces", "--batch", 8, "--epochs", 10, "--head", "adaface")  # 120 steps; saved at 108, 120
DIT = ("--arch", "Ti/8", "--steps", 3, "--batch", 8)
SAMPLE = ("--virtual", 5, "--per-id", 3, "--steps", 3, "--batch", 4, "--real", "twins")      # rejects nothing


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """All four scripts once, as a user runs them, on a small drawn set: (working folder, printed texts)."""
    cwd, printed = tmp_path_factory.mktemp("pipeline"), {}
    torch.manual_seed(0)
    folder(cwd / "faces", 24, 4)
    for name in ("one", "other"):                               # strangers who look the same: thresholds of 1
        (cwd / "twins" / name).mkdir(parents=True)
        (cwd / "twins" / name / "0.png").write_bytes(PNG)
    toys.write_bin(cwd / "faces/held.bin", people(20, 4)[0].view(20, 4, 3, 32, 32), 300, torch.Generator())
    alone = "--data runs/virtual --virtual 0 --batch 8 --epochs 1 --out runs/fr-virtual".split()
    for name, *arguments in (("fr_train.py", *FR), ("dit_train.py", *DIT), ("sample.py", *SAMPLE),
                             ("fr_train.py", *alone), ("evaluate.py",)):
        command = [sys.executable, HERE / name, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        printed[name] = done.stdout
    return cwd, printed


@pytest.fixture
def copied(pipeline, tmp_path):                                         # the pipeline's folder, to be changed
    return shutil.copytree(pipeline[0], tmp_path / "copied")


def edit(folder, change=lambda tensors: None, **meta):
    """Changes tensors and metadata of a checkpoint, which its folder is named after."""
    tensors, before = model.load_model(folder, folder.name)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"vigface": json.dumps(before | meta)})


def test_pipeline_leaves_what_the_readme_says(pipeline):
    cwd, printed = pipeline
    virtual, names = cwd / "runs/virtual", sorted(contents(cwd / "runs/virtual"))
    pictures = [f"v{i:06d}/{j:04d}.jpg" for i in range(5) for j in range(3)]
    assert {*names} >= {"grid.jpg", "landmarks.csv", "manifest.csv", "run.json"}
    assert [name for name in names if "/" in name and name.endswith("jpg")] == pictures
    tensors, meta = model.load_model(cwd / "runs/dit", "dit")           # nobody's embedding, thumbnail or name
    assert [name for name in tensors if not name.startswith("dit.")] == ["poses.landmarks"] and not meta["names"]
    rows = [row for row in csv.DictReader((virtual / "manifest.csv").open()) if row["verdict"] == "accepted"]
    assert [row["file"] for row in rows] == pictures
    poses, drawn = [int(row["landmarks_from"]) for row in rows], data.Faces([virtual])
    assert drawn.size == 32 and len({*poses}) > 10              # of any training faces
    assert torch.allclose(drawn.landmarks, data.Faces([cwd / "faces"]).landmarks[poses], atol=0.01 / 32)
    assert (cwd / "runs/dit/preview-000003.jpg").is_file() and "own cosine real" in printed["dit_train.py"]
    report = json.loads((cwd / "runs/report/report.json").read_text())
    assert set(report["models"]) == {"runs/fr", "runs/fr-virtual"}
    assert all(0 <= some["average"] == some["held"]["accuracy"] <= 1 for some in report["models"].values())
    row = report["datasets"]["runs/virtual"]
    assert set(row) >= {"consistency", "separability", "diversity"} and row["images"] == 15
    assert row["leakage"]["verdict"] in ("clean", "leaks") and "images_over" in row["leakage"]
    assert "closest.jpg" in {path.name for path in (cwd / "runs/report").rglob("*")}
    assert "CPLFW" in printed["evaluate.py"].split("bsent")[1]


def test_a_stage_refuses_what_is_not_its_own_or_unfinished_before_it_writes(copied):
    def refused(message, *command):
        before = contents(copied)
        assert message in here(*command, cwd=copied, code=2) and before == contents(copied)
    assert "already complete" in here("sample.py", *SAMPLE, cwd=copied)
    refused("virtual = 5, now 4", "sample.py", *SAMPLE, "--virtual", 4)
    refused("epochs = 10, now 3", "fr_train.py", *FR, "--epochs", 3)
    edit(copied / "runs/fr", lambda tensors: tensors["prototypes.virtual"].neg_())      # as if trained anew
    refused("started with fr", "dit_train.py", *DIT)
    refused("another recogniser", "sample.py", *SAMPLE, "--out", "new")
    edit(copied / "runs/dit", step=2)
    edit(copied / "runs/fr", step=108)
    refused("step 2 of 3", "sample.py", *SAMPLE, "--out", "new")
    refused("step 108 of 120", "dit_train.py", *DIT, "--out", "new")


def test_landmarks_are_found_on_the_way_and_kept_beside_the_run(tmp_path, monkeypatch):
    images, points = folder(tmp_path / "bare", 4, 4, landmarks=False)
    here("fr_train.py", "--data", "bare", "--epochs", 1, "--batch", 4, cwd=tmp_path)
    before = contents(tmp_path / "bare")
    known = {image.numpy().tobytes(): face for image, face in zip(images, points)}
    known[images[0].numpy().tobytes()] = torch.full((5, 2), torch.nan)          # the detector finds no face
    look = lambda _, crops: torch.stack([known[crop.numpy().tobytes()] for crop in crops])
    monkeypatch.setattr(retinaface, "load_detector", lambda *_: None)
    monkeypatch.setattr(retinaface, "crop_landmarks", look)
    learns = lambda path, dit, *_: [0.0, float(any(p.requires_grad for p in dit.parameters()))]
    monkeypatch.setattr(dit_train, "preview", learns)                         # of the average, which does not
    dit = ("dit_train.py", "--arch", "Ti/8", "--steps", 1, "--batch", 4)
    printed = here(*dit, cwd=tmp_path)
    assert "15 of 16" in printed and "virtual 0.000" in printed
    monkeypatch.delattr(retinaface, "crop_landmarks")
    (tmp_path / "runs/dit/state.pt").unlink()                                   # killed before it was written
    written = model.digest(tmp_path / "runs/dit")
    assert "15 of 16" in here(*dit, cwd=tmp_path) and written == model.digest(tmp_path / "runs/dit")
    poses = model.load_model(tmp_path / "runs/dit", "dit")[0]["poses.landmarks"]
    assert torch.allclose(poses[1:], points[1:]) and torch.allclose(poses[0], data.TEMPLATE)
    assert before == contents(tmp_path / "bare")


def test_one_planted_copy_in_a_hundred_images_is_caught(copied):
    """As it is, mirrored, with other colours, encoded anew: with the right person and file."""
    def audit(code):
        here("evaluate.py", "--datasets", "set", "--strict", "--out", "out", cwd=copied, code=code)
        return list(csv.DictReader((copied / "out/leaks.csv").open()))
    torch.manual_seed(9)
    folder(copied / "set", 50, 2)
    for row in audit(code=3):                           # a hundredth of strangers are over a line, or more:
        (copied / row["file"]).unlink(missing_ok=True)  # without them the set is clean
    assert not audit(code=0)
    original = sorted((copied / "faces").glob("*/*.png"))[5]
    image = pil_to_tensor(data.open_image(original))
    encoded = pil_to_tensor(data.open_image(io.BytesIO(jpeg(image, quality=80))))
    for copy in (image, image.flip(2), image[[2, 0, 1]], encoded):
        to_pil_image(copy).save(copied / "set/person 0/copy.png")
        row, = [row for row in audit(code=3) if row["test"] == "copy"]
        assert (row["file"], row["person"]) == ("set/person 0/copy.png", original.parent.name)
        assert copied / row["image"] == original
    assert '"verdict": "leaks"' in (copied / "out/report.json").read_text()


def test_the_sampler_judges_as_the_report_and_compares_nobody_with_themselves(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline[0])
    backbone, prototypes, _ = model.load_recogniser("runs/fr")
    faces = data.Faces(["faces"])
    real, W = evaluate.embed_faces(backbone, prototypes, faces), prototypes.to_draw()
    thresholds, _ = evaluate.thresholds_of(real, evaluate.resemblance(real, real, real.labels))
    people = model.person_moment(real.f, real.labels)
    prototypes.settle(people)                                           # stage 1 did so before its last save
    assert torch.allclose(W, prototypes.to_draw(), atol=1e-4)
    images = torch.from_numpy(faces.images[[0, 5, 9]])

    def verdicts(rows):
        jobs = [sample.Job(row, "somebody", 0, 0, 0) for row in rows]
        return sample.judge(backbone, prototypes, W, real, thresholds, jobs, images)
    for verdict in verdicts([24] * 3):                                                  # as of a virtual person
        assert verdict.verdict == "leak" and float(verdict.cos_nearest_image) > 0.999
    for verdict in verdicts(faces.labels[[0, 5, 9]].tolist()):
        assert float(verdict.cos_nearest_image) < 0.999


def sampled(pipeline, where, *arguments, line=2.0, **options):
    """Runs sample.py in folder `where` with a threshold (2: no rule); what it left in where/set."""
    where.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "thresholds_of", lambda *_: ({"centre": line, "image": line}, 1.0))
        here("sample.py", *SAMPLE, *arguments, "--dit", pipeline[0] / "runs/dit", "--fr", pipeline[0] / "runs/fr",
             "--real", pipeline[0] / "faces", "--out", "set", cwd=where, **options)
    return contents(where / "set")


@pytest.fixture(scope="module")
def rejecting(pipeline, tmp_path_factory):
    """A set of which about half was rejected at first: (the threshold, its files, jobs of each batch)."""
    files = sampled(pipeline, tmp_path_factory.mktemp("all"))
    rows = csv.DictReader(files["manifest.csv"].decode().splitlines())
    nearest = [max(row["cos_nearest_real"], row["cos_nearest_image"], key=float) for row in rows]
    line = np.sort([float(cosine) for cosine in nearest])[6:8].mean()                   # between two of all
    line, batches, draw = float(f"{line:.4f}5"), [], sample.draw                        # rows have 4 digits

    def spy(dit, W, poses, jobs, args):
        batches.append(list(jobs))
        return draw(dit, W, poses, jobs, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "draw", spy)
        return line, sampled(pipeline, tmp_path_factory.mktemp("whole"), line=line), batches


def test_pictures_too_near_to_real_people_are_drawn_again_and_left_out_at_last(rejecting):
    line, files, batches = rejecting
    rows, tries = list(csv.DictReader(io.StringIO(files["manifest.csv"].decode()))), {}
    for row in rows:
        tries.setdefault((row["identity"], row["index"]), []).append((int(row["attempt"]), row["verdict"]))
        close = [float(row[column]) > line for column in ("cos_nearest_real", "cos_nearest_image")]
        assert (row["verdict"] == "leak") == any(close)
    assert len(tries) == 15 < len(rows) == sum(map(len, batches)) == len({(*r.values(),)[6:] for r in rows})
    for attempts in tries.values():                             # each until one is accepted, five at most
        assert attempts[:-1] == [(i, "leak") for i in range(len(attempts) - 1)]
        assert attempts[-1] in ((len(attempts) - 1, "accepted"), (4, "leak"))
    accepted = [row["file"] for row in rows if row["verdict"] == "accepted"]
    assert accepted == sorted(name for name in files if name.endswith("jpg") and "/" in name)
    assert accepted == [line.split(",")[0] for line in files["landmarks.csv"].decode().splitlines()[1:]]
    # One queue: they share batches with other people's first attempts, which are full until there are none.
    attempts = [{job.attempt for job in jobs} for jobs in batches]
    last = max(i for i, some in enumerate(attempts) if 0 in some)
    assert {len(jobs) for jobs in batches[:last]} == {4} and any({0, 1} <= some for some in attempts)
    assert len(batches) - last <= 2 * 4 + 1                             # four more attempts, a batch behind


KILLER = """import contextlib, itertools, json, os, runpy, signal, sys, data, evaluate, model
if "LINE" in os.environ:
    evaluate.thresholds_of = lambda *_: (dict.fromkeys(["centre", "image"], float(os.environ["LINE"])), 1.0)
for script, function, last, *arguments in json.loads(sys.argv[1]):
    if child := os.fork():
        print(os.waitpid(child, 0)[1])
        continue
    def counted(*a, call=getattr(model, function), count=itertools.count(1), **b):
        return os.kill(os.getpid(), signal.SIGKILL) if next(count) == last else call(*a, **b)
    model.__dict__[function] = data.__dict__[function] = evaluate.__dict__[function] = counted
    sys.argv, sys.stdout = [script, *arguments], sys.stderr
    runpy.run_path(script, run_name="__main__")
    os._exit(0)
"""


def killed(*commands, cwd, **env):
    """Runs commands (script, function, count, arguments ...), each killed at its count-th call of it."""
    commands = json.dumps([[str(HERE / name), function, count, *map(str, arguments)]
                           for name, function, count, *arguments in commands])
    done = subprocess.run([sys.executable, "-c", KILLER, commands], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)} | env)
    assert {int(status) for status in done.stdout.split()} == {signal.SIGKILL}, done.stderr


def test_killed_or_shared_sampling_gives_the_same_bytes(pipeline, rejecting, tmp_path, monkeypatch):
    (line, whole, _), sizes = rejecting, set()                          # of the work: whether to compile
    monkeypatch.setattr(sample, "compiled", lambda net, images: sizes.add(images) or net)
    dit, fr = (pipeline[0] / "runs" / stage for stage in ("dit", "fr"))
    killed(*(["sample.py", "replacing", moment, *SAMPLE, "--dit", dit, "--fr", fr, "--out", "set", "--real",
              pipeline[0] / "faces"] for moment in (2, 4, 9, 3)), cwd=tmp_path, LINE=str(line))                         # files after each start
    for name, content in contents(tmp_path / "set").items():
        assert name.endswith(".tmp") or content == whole[name]                  # never half of a file
    assert sampled(pipeline, tmp_path, line=line) == whole
    first, both = (sampled(pipeline, tmp_path / "ranks", line=line, env={"WORLD_SIZE": "2"}, rank=rank)
                   for rank in (1, 0))
    assert "manifest.csv" not in first and first.items() < both.items() and both == whole and len(sizes) == 1


def test_real_people_are_filled_up(pipeline, tmp_path):
    sampled(pipeline, tmp_path, "--real-to", 6, "--batch", 16)
    united = data.Faces([pipeline[0] / "faces", tmp_path / "set"])
    assert len(united.people) == 24 and united.labels.bincount().tolist() == [6] * 24


def test_killed_training_continues_to_the_same_bytes(pipeline, tmp_path):
    """SIGKILL between the second model and its state, then the same command: as if never killed."""
    commands = {"fr": ("fr_train.py", *FR), "dit": ("dit_train.py", *DIT)}
    killed(*([name, "save_state", 2, *arguments, "--out", tmp_path / stage]
             for stage, (name, *arguments) in commands.items()), cwd=pipeline[0])
    for stage, command in commands.items():
        assert "continuing" in here(*command, "--out", tmp_path / stage, cwd=pipeline[0])
        assert model.digest(tmp_path / stage) == model.digest(pipeline[0] / "runs" / stage)


def test_a_checkpoint_with_absurd_metadata_or_cut_short_is_refused(copied, capsys):
    fr, state = copied / "runs/fr/model.safetensors", copied / "runs/fr/state.pt"
    tensors, meta = model.load_model(fr.parent, "fr")
    for absurd in ({"config": {"size": 10 ** 12}}, {"config": {"size": 32, "width": 4096, "units": [9] * 4}},
                   {"config": []}, {"names": ["../../outside"]}, {"names": [""]},
                   {"config": {"size": 32, "units": [10 ** 9]}}, {"names": 3}, {"stage": None}):
        save_file(tensors, fr, {"vigface": json.dumps(meta | absurd)})
        stops(capsys, model.load_recogniser, fr.parent)
    for path, read, *given in ((fr, model.load_recogniser, fr.parent), (state, model.resume, state, {}, {})):
        for tenth in (9, 5, 1, 0):
            os.truncate(path, path.stat().st_size * tenth // 10)
            stops(capsys, read, *given)


def damage(root, change, last=4):
    """Changes the last images of a folder."""
    for path in sorted(root.rglob("*.png"))[-last:]:
        change(Image.open(path)).save(path)


# What is in the folder `set`, as arguments of `folder` or a function; the command; what must be said.
BAD_INPUT = {
    "missing folder": (None, "fr_train.py --data nowhere", "nowhere: no such folder"),
    "one identity": ((1, 4), "fr_train.py --data set", "2 or more"),
    "batch of one": ((2, 2), "fr_train.py --data set --batch 1", "2 or more"),
    "records cut short": (lambda root: [write_records(root, [PNG], [0]), os.truncate(root / "train.rec", 99)],
                          "fr_train.py --data set", "train.idx: expected"),
    "two record files": (lambda root: [write_records(root / name, [PNG] * 4, [0, 1, 0, 1]) for name in "ab"],
                         "fr_train.py --data set/a set/b", "different people"),
    "records and folders": (lambda root: [folder(root, 1, 1), write_records(root, [PNG], [0])],
                            "fr_train.py --data set", "expected one"),
    "crops not square": (lambda root: [folder(root, 2, 2), damage(root, lambda image: image.resize((24, 32)))],
                         "fr_train.py --data set", "square"),
    "crops of two sizes": (lambda root: [folder(root, 2, 2), damage(root, lambda image: image.resize((48, 48)), 1)],
                           "fr_train.py --data set", "all of one size"),
    "photographs": ((2, 2, 40), "fr_train.py --data set", "tools/align.py"),
    "landmarks of nan": (lambda root: [folder(root, 2, 2), (root / "landmarks.csv").write_text("a,nan" + ",1" * 9)],
                         "fr_train.py --data set", "not ten numbers"),
    "two benchmarks of one name": (None, "evaluate.py --pairs faces/held.bin runs/held.bin", "of each name"),
    "one real person": ((1, 4), "evaluate.py --fr runs/fr --real set", "two people or more"),
    "two solver steps": (None, "sample.py --steps 2", "3 or more"),
    "minus one epoch": ((2, 2), "fr_train.py --data set --epochs -1", "1 or more"),
    "unfinished set": (lambda root: [folder(root, 2, 2), (root / "run.json").touch()],
                       "fr_train.py --data set", "set: sample.py has not finished it"),
    "no set to judge": (None, "evaluate.py --datasets --strict", "no set to judge"),
    "no recogniser": (None, "dit_train.py --fr set", "set/model.safetensors"),
    "wrong stage": (None, "dit_train.py --fr runs/dit", "runs/dit/model.safetensors"),
    "people nobody knows": ((30, 1), "dit_train.py --data set", "have no prototype"),
    "too many virtual people": (None, "sample.py --virtual 25", "expected 1 to 24"),
    "folder of something else": ((1, 1), "sample.py --virtual 2 --out set", "something else")}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_nothing_is_written(pipeline, tmp_path, case):
    prepare, command, named = BAD_INPUT[case]
    (tmp_path / "set").mkdir()
    for name in ("faces", "runs"):
        (tmp_path / name).symlink_to(pipeline[0] / name)
    if prepare:
        prepare(tmp_path / "set") if callable(prepare) else folder(tmp_path / "set", *prepare)
    before = sorted(tmp_path.rglob("*"))
    name, *arguments = command.split()
    printed = here(name, "--out", "out", *arguments, cwd=tmp_path, code=2)
    assert named in printed and printed.count("error:") == 1 and before == sorted(tmp_path.rglob("*"))
