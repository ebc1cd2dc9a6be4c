"""Tests of the supplies in tools/. `python -m pytest -q` at the root runs them beside test_vigface.py."""
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""                                 # before the scripts look for a GPU

import contextlib
import csv
import errno
import io
import itertools
import math
import pickle
import shutil
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

import data
import model
from test_vigface import (contents, face_set, folder, forked, here, jpeg, people, same, start, stops,
                          units)
from tools import align, insightface, published, report, retinaface, toys

ROOT = Path(__file__).parent.parent
SCRIPTS = [f"{name}.py" for name in ("model", "data", "fr_train", "dit_train", "sample", "evaluate")]
BLACK = jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """Each test starts from one seed."""
    torch.manual_seed(0)


def start_aside(script, arguments, cwd):
    """Runs a script in this process as in a new one, and keeps what it prints in a file."""
    with open(cwd / "printed.txt", "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            start(script, arguments, cwd)


def command(script, *arguments, cwd, code=0):
    """Runs a script of some folder as a user does, but in a copy of this process; what it prints."""
    codes = forked(start_aside, (script, arguments, cwd))
    printed = (cwd / "printed.txt").read_text()
    assert codes == [code], printed
    return printed


# ------------------------------------------------------------------------------------------------- toys.py

def test_landmarks_of_toy_faces_lie_near_the_template():
    """Toy faces are aligned, but for their poses."""
    _, landmarks = people(6, 5)
    assert (landmarks - data.TEMPLATE).abs().mean() < 0.08


def test_eyes_are_painted_where_the_landmarks_say():
    """Numbers that colour the eyes change pixels near the landmarks of the eyes alone."""
    brightness = [spot[4] for spot in toys.SPOTS]
    eyes = brightness.index(max(brightness))                            # the whites, brighter than skin
    first = toys.PERSON - 7 * len(toys.SPOTS) + 7 * eyes                # of the seven numbers of the eyes
    who = torch.zeros(2, toys.PERSON)
    who[1, first + 4:first + 7] = 1                                     # their colour
    how = torch.zeros(2, toys.PICTURE)
    how[:, 1] = 0.5                                                     # turned aside
    images, landmarks = toys.draw_faces(who, how, 112)

    changed = (images[1] - images[0]).abs().sum(0)
    shares = []
    for x, y in (112 * landmarks[0, :2]).round().int().tolist():
        near = changed[y - 9:y + 10, x - 12:x + 13]
        shares.append(near.sum() / changed.sum())
    assert min(shares) > 0.2 and sum(shares) > 0.95                     # both eyes, and nothing else


def test_toy_heads_turn():
    """The second number of a picture turns the head: the nose moves from between the eyes."""
    how = torch.zeros(2, toys.PICTURE)
    how[1, 1] = 1
    _, landmarks = toys.draw_faces(torch.zeros(2, toys.PERSON), how, 112)
    between_eyes = landmarks[:, :2, 0].mean(1)
    nose = landmarks[:, 2, 0] - between_eyes
    assert (nose[1] - nose[0]).abs() > 0.03


def test_each_number_of_a_person_and_of_a_picture_is_seen():
    """Each changes pixels, and no two of them change the same pixels alike."""
    numbers = toys.PERSON + toys.PICTURE
    base = torch.rand(numbers) - 0.5
    changed = torch.cat([base[None], base + 0.5 * torch.eye(numbers)])
    images, _ = toys.draw_faces(*changed.split([toys.PERSON, toys.PICTURE], 1), 64)
    changes = (images[1:] - images[0]).flatten(1)
    assert changes.abs().amax(1).min() > 0.01
    alike = F.normalize(changes) @ F.normalize(changes).T
    assert alike.fill_diagonal_(0).max() < 0.999


def test_toy_faces_stay_what_the_measurements_were_made_on():
    """The mean colours of the four quarters of one face: docs/measurements.md rests on these very faces."""
    who = 2 * torch.rand(1, toys.PERSON) - 1
    how = 2 * torch.rand(1, toys.PICTURE) - 1
    images, _ = toys.draw_faces(who, how, 64)
    red, green, blue = F.adaptive_avg_pool2d(images, 2)[0].flatten(1)
    assert red.tolist() == pytest.approx([0.2949, 0.2805, 0.3861, 0.3808], abs=5e-4)
    assert green.tolist() == pytest.approx([0.2535, 0.2467, 0.3208, 0.3259], abs=5e-4)
    assert blue.tolist() == pytest.approx([0.2386, 0.2064, 0.2449, 0.2362], abs=5e-4)


def test_toy_images_are_colours_between_black_and_white():
    """Extreme numbers do not leave [0, 1], and each person of a batch is drawn as if alone."""
    who = torch.randint(2, (4, toys.PERSON)) * 2. - 1
    how = torch.randint(2, (4, toys.PICTURE)) * 2. - 1
    images, landmarks = toys.draw_faces(who, how, 40)
    assert images.shape == (4, 3, 40, 40)
    assert images.min() >= 0 and images.max() <= 1
    for i in range(4):
        alone, points = toys.draw_faces(who[i:i + 1], how[i:i + 1], 40)
        assert torch.allclose(alone[0], images[i], atol=1e-3)
        assert torch.allclose(points[0], landmarks[i], atol=1e-5)


def test_the_demo_is_a_folder_like_any_other(tmp_path, monkeypatch):
    """It is the same each time, with a camera's noise; its benchmark shows nobody of the folder."""
    asked, write_bin = [], toys.write_bin

    def write_fewer(path, images, pairs, generator):                    # a tenth of the time
        asked.append(pairs)
        write_bin(path, images, pairs // 10, generator)
    monkeypatch.setattr(toys, "write_bin", write_fewer)
    toys.draw_demo(tmp_path / "demo", people=3, held_out=20, per_person=2)
    assert os.listdir(tmp_path) == ["demo"]                             # no temporary folder is left

    faces = data.Faces([tmp_path / "demo"])
    assert list(faces.people) == ["p0000", "p0001", "p0002"]
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2]
    generator = torch.Generator().manual_seed(0)
    who = 2 * torch.rand(23, toys.PERSON, generator=generator) - 1
    how = 2 * torch.rand(46, toys.PICTURE, generator=generator) - 1
    images, landmarks = toys.draw_faces(who.repeat_interleave(2, 0), how, 32)
    assert torch.allclose(faces.landmarks, landmarks[:6], atol=1e-3)
    noise = 2.5 * torch.randn(images.shape, generator=generator)
    expected = (255 * images + noise).clamp(0, 255).byte()
    assert all(np.array_equal(faces[i][0], expected[i]) for i in range(6))

    benchmark, same = data.read_benchmark(tmp_path / "demo/heldout.bin", 32)
    assert asked == [3000] and len(same) == 300
    trained = {image.tobytes() for image, _ in faces}
    held_out = {image.tobytes() for image in benchmark.numpy()}
    assert len(held_out) == 40 and not trained & held_out


def test_without_data_the_demo_is_painted_on_first_use(tmp_path, monkeypatch):
    """fr_train.py trains on runs/demo, paints it once, and takes `demo` for a folder like any other."""
    painted = []

    def paint_few(root):
        painted.append(root)
        folder(root, 4, 4)
    monkeypatch.setattr(toys, "draw_demo", paint_few)
    for out in ("runs/fr", "runs/again"):
        here("fr_train.py", "--epochs", 1, "--batch", 8, "--out", out, cwd=tmp_path)
    assert painted == [Path("runs/demo")]
    _, meta = model.load_model(tmp_path / "runs/again", "fr")
    assert meta["data"] == [f"{tmp_path}/runs/demo"]
    assert "demo: no such folder" in here("fr_train.py", "--data", "demo", cwd=tmp_path, code=2)


# ------------------------------------------------------------------------------------------ insightface.py

MAGIC = struct.pack("<I", 0xced7230a)


def record(key, labels, image=b""):
    """The content of a record: one label as a number, or several as a vector, two ids, and an image."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], key, 0) + image
    vector = struct.pack(f"<{len(labels)}f", *labels)
    return struct.pack("<IfQQ", len(labels), 0, key, 0) + vector + image


def framed(content):
    """A record as RecordIO stores it: cut into parts where its own bytes are the magic number."""
    parts = content.split(MAGIC)
    flags = [0]
    if len(parts) > 1:
        flags = [1, *[2] * (len(parts) - 2), 3]                         # first, middle, last
    whole = b""
    for flag, part in zip(flags, parts):
        length = struct.pack("<I", flag << 29 | len(part))
        padding = bytes(-len(part) % 4)
        whole += MAGIC + length + part + padding
    return whole


def write_records(root, images, labels):
    """train.rec and train.idx as InsightFace has them: a header, then images, half with vectors as labels."""
    last = len(images) + 1.0
    records = [record(0, [last, last])]
    for i, (image, label) in enumerate(zip(images, labels)):
        records.append(record(i, [label] if i % 2 else [label, 0.0], image))
    content, index = b"", ""
    for key, body in enumerate(records):
        index += f"{key}\t{len(content)}\n"
        content += framed(body)
    root.mkdir(exist_ok=True)
    (root / "train.rec").write_bytes(content)
    (root / "train.idx").write_text(index)


def test_records_are_listed_and_read_as_they_were_written(tmp_path, capsys):
    """Labels become identities; the header is no image; a record in parts is left out, and counted aloud."""
    images = [jpeg(image) for image in people(5, 1)[0]]
    in_parts = jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8), comment=b"ab" + MAGIC + b"c" + MAGIC)
    write_records(tmp_path / "r", [*images, in_parts], [7, 7, 0, 0, 4, 9])
    identities, keys, offsets = zip(*insightface.list_records(tmp_path / "r/train.rec"))
    assert identities == ("7", "7", "0", "0", "4")
    assert keys == ("1", "2", "3", "4", "5")
    assert "left out 1 records" in capsys.readouterr().out
    faces = data.Faces([tmp_path / "r"])
    assert faces.places.tolist() == [*offsets]
    for i, image in enumerate(images):
        assert insightface.read_record(faces, i).read() == image


def test_records_are_a_training_set_as_they_lie(tmp_path):
    """`Faces` decodes them in memory or when needed; a key takes the place of a file's name."""
    images = [jpeg(image) for image in people(4, 1)[0]]
    write_records(tmp_path / "r", images, [5, 3, 3, 5])
    decoded = [pil_to_tensor(data.open_image(io.BytesIO(image))) for image in images]
    for memory in (3e9, 0):
        faces = data.Faces([tmp_path / "r"], memory=memory)
        assert list(faces.people) == ["5", "3"]
        assert faces.labels.tolist() == [0, 1, 1, 0]
        assert faces.path(2) == f"{tmp_path}/r/3"
        assert faces.landmarks.isnan().all()
        for i, image in enumerate(decoded):
            assert np.array_equal(faces[i][0], image)


def test_records_of_one_label_are_warned_about(tmp_path, capsys):
    """Where all labels are equal, identities are likely in some other list."""
    write_records(tmp_path / "r", [BLACK] * 3, [0, 0, 0])
    insightface.list_records(tmp_path / "r/train.rec")
    assert "WARNING all records have one label" in capsys.readouterr().out
    write_records(tmp_path / "r", [BLACK] * 3, [0, 0, 1])
    insightface.list_records(tmp_path / "r/train.rec")
    assert "WARNING" not in capsys.readouterr().out


def no_index(root):
    (root / "train.idx").unlink()


def cut_short(root):
    os.truncate(root / "train.rec", (root / "train.rec").stat().st_size - 8)


def beside_a_record(root):
    (root / "train.idx").write_text("1\t4\n")


def header_alone(root):
    (root / "train.idx").write_text("0\t0\n")


@pytest.mark.parametrize("damage, said", [
    (no_index, "train.idx: no such file"), (cut_short, "record 3 lacks the magic number or ends beyond"),
    (beside_a_record, "record 1 lacks the magic number"), (header_alone, "no images that can be read")])
def test_damaged_records_are_one_clear_line(tmp_path, capsys, damage, said):
    """An index that is missing, wrong or empty, and a file that was not copied to its end."""
    write_records(tmp_path / "r", [BLACK] * 3, [0, 1, 0])
    damage(tmp_path / "r")
    assert said in stops(capsys, insightface.list_records, tmp_path / "r/train.rec")


def write_benchmark(path):
    """A benchmark of twenty people, each of one grey; its images (2P, 3, 8, 8), and which pairs are same."""
    greys = 10 * torch.arange(20, dtype=torch.uint8)
    images = greys.view(20, 1, 1, 1, 1).expand(20, 4, 3, 8, 8)
    toys.write_bin(path, images, 60, torch.Generator().manual_seed(0))
    return data.read_benchmark(path, 8)


def test_a_benchmark_is_read_as_it_was_written(tmp_path):
    """Half of the pairs show one person, in turn, and ten folds share no person."""
    images, same = write_benchmark(tmp_path / "t.bin")
    first, second = images[0::2, 0, 0, 0], images[1::2, 0, 0, 0]
    assert torch.equal(first == second, same)
    assert same.tolist() == [False, True] * 30
    for fold in zip(first.chunk(10), second.chunk(10)):
        assert len({*torch.cat(fold).tolist()}) == 2                    # of twenty people
    larger, _ = data.read_benchmark(tmp_path / "t.bin", 16)
    assert larger.shape == (120, 3, 16, 16)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_benchmark_may_be_made_of_numpy_s_arrays(tmp_path, protocol):
    """Images as arrays of bytes; labels as arrays of truth values or numbers, flat or not, or as a list."""
    expected = write_benchmark(tmp_path / "t.bin")
    encoded, truth = pickle.loads((tmp_path / "t.bin").read_bytes())
    arrays = [np.frombuffer(image, np.uint8) for image in encoded]
    labels = np.array(truth)
    for same in (truth, labels, labels[:, None], [*labels], labels.astype(np.int64)):
        content = pickle.dumps((arrays, same), protocol)
        if protocol < 4:                                                # older numpy has another name for it
            content = content.replace(b"cnumpy._core.", b"cnumpy.core.")
        (tmp_path / "n.bin").write_bytes(content)
        images, found = data.read_benchmark(tmp_path / "n.bin", 8)
        assert torch.equal(images, expected[0])
        assert torch.equal(found, expected[1])


def people_of_pairs(monkeypatch, *benchmarks):
    """The images and labels of benchmarks, each of which is images and whether pairs are one person's."""
    monkeypatch.setattr(insightface, "read_benchmark", lambda benchmark, _: benchmark)
    return insightface.benchmark_people(dict(enumerate(benchmarks)), 8)


def test_people_of_benchmarks_are_known_by_chains_of_pairs(monkeypatch):
    """Each image once, also if two benchmarks show it; nobody who is in two pairs is two people."""
    grey = lambda *levels: torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    first = grey(1, 2, 3, 4, 2, 3, 5, 1), torch.tensor([True, True, True, False])   # 1 2, 3 4, 2 3
    second = grey(6, 5, 7, 8, 9, 9), torch.tensor([True, False, True])              # 6 5
    images, labels = people_of_pairs(monkeypatch, first, second)
    assert images.shape[1:] == (3, 8, 8)
    levels = images[:, 0, 0, 0].tolist()
    assert sorted(levels) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    people = {}
    for level, label in zip(levels, labels.tolist()):
        people.setdefault(label, set()).add(level)
    assert sorted(people) == [*range(5)]
    assert sorted(map(sorted, people.values())) == [[1, 2, 3, 4], [5, 6], [7], [8], [9]]

    different = grey(1, 2, 3, 4), torch.tensor([False, False])
    assert len({*people_of_pairs(monkeypatch, different)[1].tolist()}) == 4


def test_a_long_chain_of_pairs_is_one_person(monkeypatch):
    levels = torch.arange(200, dtype=torch.uint8)[torch.randperm(200)]
    chain = torch.stack([levels[:-1], levels[1:]], 1).flatten()
    images = chain.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    found, labels = people_of_pairs(monkeypatch, (images, torch.ones(199, dtype=torch.bool)))
    assert len(found) == 200 and not labels.any()


def test_the_people_of_benchmarks_are_read_from_their_files(tmp_path):
    """Of twenty people with four equal images each, everybody has one."""
    write_benchmark(tmp_path / "t.bin")
    benchmarks = {"t": tmp_path / "t.bin", "again": tmp_path / "t.bin"}
    images, labels = insightface.benchmark_people(benchmarks, 16)
    assert images.shape == (20, 3, 16, 16)
    assert sorted(labels.tolist()) == [*range(20)]


def test_a_benchmark_may_be_python_2_s(tmp_path):
    """Python 2 wrote texts where Python 3 writes bytes, also for the name of an array's type."""
    text = lambda content: b"T" + struct.pack("<I", len(content)) + content
    images = b"(" + text(BLACK) * 20 + b"l"
    kind = b"cnumpy\ndtype\n(" + text(b"b1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNNK\0K\0K\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
    labels = array + b"(K\1(K\x0at" + kind + b"I00\n" + text(b"\1\0" * 5) + b"tb"
    (tmp_path / "old.bin").write_bytes(b"\x80\2(" + images + labels + b"t.")
    encoded, same = insightface.read_bin(tmp_path / "old.bin")
    assert [bytes(image) for image in encoded] == [BLACK] * 20
    assert same.tolist() == [True, False] * 5


class Pointers:
    """Unpickled, an array of objects at addresses of somebody's choice."""

    def __reduce__(self):
        return np.ndarray, ((10,), "O", b"A" * 80)


class Payload:
    """Unpickled, a program that leaves a file."""

    def __reduce__(self):
        return os.system, ("touch owned",)


IMAGES, LABELS = [BLACK] * 20, [True, False] * 5
MALFORMED = {
    "labels of pointers": pickle.dumps((IMAGES, Pointers())),
    "images of pointers": pickle.dumps(([Pointers()] * 20, LABELS)),
    "an odd image": pickle.dumps((IMAGES + [BLACK], LABELS)),
    "nine pairs": pickle.dumps((IMAGES[:18], LABELS[:9])),
    "pairs of one kind": pickle.dumps((IMAGES, [True] * 10)),
    "pairs of the other kind": pickle.dumps((IMAGES, [False] * 10)),
    "images cut short": pickle.dumps(([BLACK[:30]] * 20, LABELS)),
    "texts": pickle.dumps((["text"] * 20, LABELS)),
    "cut short": pickle.dumps((IMAGES, LABELS))[:-40],
    "nothing in it": pickle.dumps(([], [])),
    "a number": pickle.dumps(7),
    "an empty file": b"",
    "a program": pickle.dumps((IMAGES, Payload()))}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_benchmark_is_one_clear_line_and_runs_nothing(tmp_path, monkeypatch, capsys, case):
    """Whatever a .bin asks for that no benchmark needs, is refused."""
    monkeypatch.chdir(tmp_path)
    Path("x.bin").write_bytes(MALFORMED[case])
    assert "x.bin: expected" in stops(capsys, data.read_benchmark, "x.bin", 8)
    assert os.listdir() == ["x.bin"]


# ------------------------------------------------------------------------------------------- retinaface.py

def test_benchmarks_are_files_or_folders_or_patterns(tmp_path, capsys, monkeypatch):
    """Of a name there is one; a list of pairs is none."""
    monkeypatch.chdir(tmp_path)
    for name in ("val/lfw.bin", "val/cfp.bin", "other/lfw.bin"):
        Path(name).parent.mkdir(exist_ok=True)
        write_benchmark(Path(name))
    Path("pairs.txt").touch()
    Path("empty").mkdir()
    both = {"cfp": "val/cfp.bin", "lfw": "val/lfw.bin"}
    assert data.find_benchmarks(["val"]) == data.find_benchmarks(["val/*.bin"]) == both
    assert data.find_benchmarks(["other/lfw.bin"], ["val"]) == {"lfw": "other/lfw.bin"}
    assert data.find_benchmarks(None, ["empty"]) == data.find_benchmarks([]) == {}
    assert "tools/pairs.py" in stops(capsys, data.find_benchmarks, ["pairs.txt"])
    assert "no such file" in stops(capsys, data.find_benchmarks, ["empty"])
    assert "of each name" in stops(capsys, data.find_benchmarks, ["val", "other/lfw.bin"])


def test_what_lies_beside_the_data_and_is_no_benchmark_is_left_out_aloud(tmp_path, capsys):
    """And the second of two with one name."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_benchmark(tmp_path / name / "lfw.bin")
    (tmp_path / "a/model.bin").write_bytes(b"weights")
    found = data.find_benchmarks([], [tmp_path / "a", tmp_path / "b"])
    assert found == {"lfw": f"{tmp_path}/a/lfw.bin"}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("left out" in line and "--val" in line for line in said)
    assert "a/model.bin" in said[0] and "b/lfw.bin" in said[1] and "a/lfw.bin has its name" in said[1]


def places(height, width):
    """Yields the centre x and y, the number and the side of each anchor, in the detector's order."""
    for step, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        rows, columns = math.ceil(height / step), math.ceil(width / step)
        for row, column, anchor in itertools.product(range(rows), range(columns), (0, 1)):
            yield (column + .5) * step, (row + .5) * step, anchor, sides[anchor]


def test_the_detector_decodes_its_anchors_as_a_loop_does():
    """Its heads say the same everywhere, so scores, boxes and landmarks follow from their biases."""
    net = retinaface.RetinaFace().eval()
    biases = {net.ClassHead: [0, 1, 0, 2],
              net.BboxHead: [.5, -1, .2, .4] * 2,
              net.LandmarkHead: [0.1 * i for i in range(20)]}
    for head, bias in biases.items():
        for level in head:
            torch.nn.init.zeros_(level["conv1x1"].weight)
            level["conv1x1"].bias.data = torch.tensor(bias, dtype=torch.float)
    with torch.no_grad():
        scores, boxes, landmarks = net(torch.zeros(1, 3, 70, 100, dtype=torch.uint8))

    found = zip(scores[0], boxes[0], landmarks[0], places(70, 100), strict=True)
    for score, box, points, (x, y, anchor, side) in found:
        assert score == pytest.approx(1 / (1 + math.exp(-1 - anchor)))
        width, height = side * math.exp(.2 * .2), side * math.exp(.2 * .4)
        left, top = x + .1 * side * .5 - width / 2, y - .1 * side - height / 2
        assert box.tolist() == pytest.approx([left, top, left + width, top + height], abs=1e-3)
        shifts = [.1 * side * .1 * (10 * anchor + i) for i in range(10)]
        expected = [at + shift for at, shift in zip([x, y] * 5, shifts)]
        assert points.flatten().tolist() == pytest.approx(expected, abs=1e-3)


def test_the_detector_has_the_published_layout_and_reads_bgr():
    """Names, shapes and number of parameters are those of Pytorch_Retinaface's MobileNet-0.25."""
    net = retinaface.RetinaFace().eval()
    state = net.state_dict()
    assert state["body.stage1.0.0.weight"].shape == (8, 3, 3, 3)
    assert state["body.stage3.1.3.weight"].shape == (256, 256, 1, 1)
    assert state["fpn.output1.0.weight"].shape == (64, 64, 1, 1)
    assert state["ssh3.conv7x7_3.0.weight"].shape == (16, 16, 3, 3)
    assert state["LandmarkHead.2.conv1x1.bias"].shape == (20,)
    assert sum(parameter.numel() for parameter in net.parameters()) == 426_608

    seen = []
    net.body["stage1"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    net(red)
    assert seen[0][0, :, 0, 0].tolist() == [0 - 104, 0 - 117, 255 - 123]


def test_overlapping_and_unsure_detections_are_dropped():
    """Of two boxes that overlap the surer one stays, image by image, with its own landmarks."""
    boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [40, 40, 50, 50]])
    scores = torch.tensor([[0.6, 0.9, 0.7, 0.4], [0.8, 0.6, 0.1, 0.1]])
    landmarks = torch.arange(8.).view(2, 4, 1, 1).expand(2, 4, 5, 2)
    detector = lambda images: (scores, boxes.expand(2, 4, 4), landmarks)
    first, second = retinaface.detect_faces(detector, torch.zeros(2, 3, 60, 60, dtype=torch.uint8))
    assert first[0].tolist() == pytest.approx([0.9, 0.7])
    assert torch.equal(first[1], boxes[1:3])
    assert first[2][:, 0, 0].tolist() == [1, 2]
    assert second[0].tolist() == pytest.approx([0.8])
    assert second[2][:, 0, 0].tolist() == [4]


def test_landmarks_of_a_crop_are_those_of_the_face_nearest_to_the_template(monkeypatch):
    """The detector sees a crop at 168 pixels in 42 of grey; far faces do not count, however sure it is."""
    at = lambda shift: 42 + 168 * (data.TEMPLATE[None] + shift)         # as the detector gives them
    answers = [[at(.08), at(-.02), at(.5)], [at(.3)], []]
    seen = []

    def detect(detector, images, confidence):
        seen.append(images)
        assert detector == "the detector" and confidence < 0.1
        for points in answers:
            count = len(points)
            yield torch.ones(count), torch.ones(count, 4), torch.cat([torch.zeros(0, 5, 2), *points])
    monkeypatch.setattr(retinaface, "detect_faces", detect)
    crops = torch.full((3, 3, 32, 32), 250, dtype=torch.uint8)
    found = retinaface.crop_landmarks("the detector", crops)
    assert torch.allclose(found[0], data.TEMPLATE - .02, atol=1e-5)
    assert found[1:].isnan().all()

    inside = seen[0][:, :, 42:-42, 42:-42]
    assert seen[0].shape == (3, 3, 252, 252) and inside.shape == (3, 3, 168, 168)
    assert (inside == 250).all()
    assert seen[0].sum() == inside.sum() + 114 * (seen[0].numel() - inside.numel())


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Six images, four without landmarks, of which a detector knows three: (its calls, all landmarks)."""
    images, points = folder(tmp_path / "faces", 3, 2)
    table = (tmp_path / "faces/landmarks.csv").read_text().splitlines()
    (tmp_path / "faces/landmarks.csv").write_text("\n".join(table[:3]))
    known = {image.numpy().tobytes(): face for image, face in zip(images, points)}
    known[images[4].numpy().tobytes()] = torch.full((5, 2), torch.nan)
    calls = []

    def look(detector, crops):
        calls.append(len(crops))
        return torch.stack([known.get(crop.numpy().tobytes(), data.TEMPLATE) for crop in crops])
    monkeypatch.setattr(retinaface, "load_detector", lambda *_: None)
    monkeypatch.setattr(retinaface, "crop_landmarks", look)
    expected = points.clone()
    expected[4] = data.TEMPLATE
    return calls, expected


def test_missing_landmarks_are_found_once_and_kept(bare, tmp_path, capsys):
    """Those of landmarks.csv stay; where none is found, the template counts; a second run looks at none."""
    calls, expected = bare
    before = contents(tmp_path / "faces")
    for _ in range(2):
        faces = data.Faces([tmp_path / "faces"])
        retinaface.complete_landmarks(faces, tmp_path / "run", None)
        assert torch.allclose(faces.landmarks, expected, atol=1e-3)
        assert "found in 3 of 4 images" in capsys.readouterr().out
    assert calls == [4]
    assert list(contents(tmp_path / "run")) == ["landmarks.pt"]
    assert before == contents(tmp_path / "faces")


def test_landmarks_are_found_again_for_other_files(bare, tmp_path, capsys):
    """What was kept belongs to the very files that lacked landmarks; a damaged file is reported."""
    calls, _ = bare
    retinaface.complete_landmarks(data.Faces([tmp_path / "faces"]), tmp_path / "run", None)
    shutil.copy(tmp_path / "faces/person 2/1.png", tmp_path / "faces/person 2/2.png")
    faces = data.Faces([tmp_path / "faces"])
    retinaface.complete_landmarks(faces, tmp_path / "run", None)
    assert calls == [4, 5]
    assert torch.equal(faces.landmarks[6], faces.landmarks[5])
    (tmp_path / "faces/landmarks.csv").unlink()                 # the same files, of which more lack them
    retinaface.complete_landmarks(data.Faces([tmp_path / "faces"]), tmp_path / "run", None)
    assert calls == [4, 5, 7]

    (tmp_path / "run/landmarks.pt").write_bytes(b"damaged")
    again = data.Faces([tmp_path / "faces"])
    line = stops(capsys, retinaface.complete_landmarks, again, tmp_path / "run", None)
    assert "landmarks.pt: expected landmarks that this script found (delete it)" in line


def write_detector(path):
    """Weights in the published layout, of a detector that sees no face anywhere."""
    net = retinaface.RetinaFace()
    for level in net.ClassHead:
        torch.nn.init.zeros_(level["conv1x1"].weight)
        level["conv1x1"].bias.data = torch.tensor([9., 0, 9, 0])        # of no face, of a face
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)       # as the published file is
    return net.eval()


def test_the_detector_s_weights_are_read_where_they_are_named(tmp_path, monkeypatch, capsys):
    """They are frozen and ready to use, and nothing is fetched."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    net = write_detector(tmp_path / "w.pth")
    detector = retinaface.load_detector(tmp_path / "w.pth", tmp_path / "run")
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        for ours, theirs in zip(detector(images), net(images)):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert not detector.training
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    line = stops(capsys, retinaface.load_detector, tmp_path / "nowhere.pth", tmp_path / "run")
    assert "nowhere.pth: no such file" in line
    assert not (tmp_path / "run").exists()


def test_the_detector_s_weights_are_fetched_once(tmp_path, monkeypatch):
    """Into the run folder, and checked by their sha256."""
    fetched = []

    def fetch(url, path, sha256):
        fetched.append((url, sha256))
        write_detector(Path(path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        retinaface.load_detector(None, tmp_path / "run")
    assert fetched == [(retinaface.WEIGHTS_URL, retinaface.WEIGHTS_SHA256)]
    assert list(contents(tmp_path / "run")) == [retinaface.WEIGHTS_URL.split("/")[-1]]


def test_a_network_that_never_answers_is_waited_for_aloud_and_not_for_ever(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda given, call=socket.setdefaulttimeout: call(
        given and given / 300))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = "http://127.0.0.1:{}/weights.pth".format(silent.getsockname()[1])
        monkeypatch.setattr(retinaface, "WEIGHTS_URL", address)
        with pytest.raises(SystemExit):
            retinaface.load_detector(None, tmp_path / "run")
    said = capsys.readouterr()
    assert f"fetching {address}" in said.out
    assert "timed out" in said.err and "--weights" in said.err
    assert socket.getdefaulttimeout() is None


def test_without_a_network_one_line_says_where_the_weights_belong(tmp_path, monkeypatch, capsys):
    """A user who cannot fetch them reads the address, the place and the flag."""
    def fetch(*_):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    line = stops(capsys, retinaface.load_detector, None, tmp_path / "run")
    assert "no network" in line and "--weights" in line
    assert retinaface.WEIGHTS_URL in line and str(tmp_path / "run") in line


def test_the_similarity_of_two_sets_of_points_is_the_best_one():
    """Exact where there is one; else no other scale, turn or shift comes nearer."""
    points = torch.rand(3, 5, 2)
    scale, shift = torch.randn(2, 3, 1, dtype=torch.complex64)
    exact = retinaface.similarity(points, align.move(points, scale, shift))
    assert torch.allclose(exact[0], scale, atol=1e-4) and torch.allclose(exact[1], shift, atol=1e-4)

    others = torch.rand(3, 5, 2)
    error = lambda scale, shift: (align.move(points, scale, shift) - others).square().sum((1, 2))
    scale, shift = retinaface.similarity(points, others)
    for nudge in (0.01, -0.01, 0.01j, -0.01j):
        assert (error(scale + nudge, shift) > error(scale, shift)).all()
        assert (error(scale, shift + nudge) > error(scale, shift)).all()


def test_weights_at_hand_are_those_that_a_run_has_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert retinaface.weights_at_hand() is None
    fetched = Path("runs/dit-big", retinaface.WEIGHTS_URL.split("/")[-1])
    write_detector(tmp_path / "runs/dit-big.pth")
    assert retinaface.weights_at_hand() is None
    fetched.parent.mkdir()
    fetched.touch()
    assert retinaface.weights_at_hand() == fetched


def share_of_misaligned(monkeypatch, faces, points):
    """What `misaligned` says of a set whose landmarks (M, 5, 2) a detector finds."""
    found = iter(points.split(64))

    def look(detector, crops):
        assert detector == "the detector"
        return next(found)
    monkeypatch.setattr(retinaface, "load_detector", lambda weights, folder: "the detector")
    monkeypatch.setattr(retinaface, "crop_landmarks", look)
    return retinaface.misaligned(faces, "weights")


def as_detected(angle=0.0, zoom=1.0, shift=0.0):
    """Landmarks of an aligned face whose crop was turned (degrees), zoomed, and shifted to the right."""
    turned = math.radians(angle)
    turn = torch.tensor([[math.cos(turned), math.sin(turned)], [-math.sin(turned), math.cos(turned)]])
    points = zoom * (data.TEMPLATE - 0.5) @ turn + 0.5
    return points + torch.tensor([shift, 0.0])


@pytest.mark.parametrize("change, expected", [
    ({}, 0), (dict(zoom=1.1), 0), (dict(angle=5), 0), (dict(shift=0.05), 0),
    (dict(zoom=1.3), 1), (dict(zoom=0.75), 1), (dict(angle=20), 1), (dict(angle=-20), 1),
    (dict(shift=0.07), 1)])
def test_an_aligned_face_has_its_landmarks_where_they_belong(monkeypatch, tmp_path, change, expected):
    folder(tmp_path / "faces", 2, 2)
    points = as_detected(**change).repeat(4, 1, 1)
    assert share_of_misaligned(monkeypatch, data.Faces([tmp_path / "faces"]), points) == expected


def test_a_head_may_turn_and_a_crop_without_a_face_is_not_aligned(monkeypatch, tmp_path):
    folder(tmp_path / "faces", 2, 2)
    nod = data.TEMPLATE.clone()
    nod[2] += 0.04                                                      # the nose alone
    points = torch.stack([nod, data.TEMPLATE, torch.full((5, 2), torch.nan), as_detected(angle=90)])
    assert share_of_misaligned(monkeypatch, data.Faces([tmp_path / "faces"]), points) == 0.5


def test_three_hundred_images_of_all_parts_of_a_set_are_looked_at(monkeypatch):
    class Many:
        def __len__(self):
            return 10_000

        def scan(self, some, what):
            asked.extend(some.tolist())
            yield torch.zeros(len(some), 3, 8, 8, dtype=torch.uint8), some
    asked = []
    monkeypatch.setattr(retinaface, "load_detector", lambda *_: None)
    monkeypatch.setattr(retinaface, "crop_landmarks", lambda _, crops: data.TEMPLATE.repeat(len(crops), 1, 1))
    assert retinaface.misaligned(Many(), "weights") == 0
    assert len({*asked}) == 300 and asked[0] == 0 and asked[-1] == 9999
    assert np.histogram(asked, 10)[0].tolist() == [30] * 10


SHARED = ROOT.parent / "shared/data"


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="no photographs and no detector's weights here")
def test_the_detector_tells_aligned_photographs_from_other_crops_of_them(tmp_path):
    photos = sorted((SHARED / "train112").glob("*/*"))[::500][:20]
    weights = SHARED / "weights/mobilenet0.25_Final.pth"

    def cut(name, change):
        for i, path in enumerate(photos):
            (tmp_path / name / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            change(Image.open(path).convert("RGB")).save(tmp_path / name / f"{i % 2}/{i}.png")
        return retinaface.misaligned(data.Faces([tmp_path / name]), weights)
    assert cut("as they are", lambda image: image) <= 0.1
    assert cut("turned", lambda image: image.rotate(20, Image.BICUBIC)) >= 0.7
    assert cut("zoomed", lambda image: image.crop((14, 14, 98, 98)).resize((112, 112))) >= 0.7
    assert cut("far", lambda image: image.crop((-18, -18, 130, 130)).resize((112, 112))) >= 0.7


# -------------------------------------------------------------------------------------------- published.py

@pytest.mark.parametrize("units, se, count",             # IR-SE50, and R18, which AdaFace published
                         [((3, 4, 14, 3), True, 43_808_320), ((2, 2, 2, 2), False, 24_020_352)])
def test_adaface_s_checkpoint_is_loaded_key_by_key(tmp_path, units, se, count):
    """Without its margin head and its trainer's objects; the architecture follows from names and shapes."""
    with torch.device("meta"):                                          # fresh weights would take a second
        net = model.Recogniser(units=units, se=se).eval().to_empty(device="cpu")
    state = net.state_dict()
    for tensor in state.values():
        tensor.random_(1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert state[f"body.{units[0]}.shortcut_layer.0.weight"].shape == (128, 64, 1, 1)
    if se:
        gate = state[f"body.{sum(units) - 1}.res_layer.se_block.fc1.weight"]
        assert gate.shape == (32, 512, 1, 1)

    saved = {f"model.{name}": tensor for name, tensor in state.items()}
    saved["head.kernel"] = torch.zeros(512, 9)
    torch.save({"state_dict": saved, "callbacks": {Path: Path("the trainer's")}}, tmp_path / "a.ckpt")
    backbone, prototypes, meta = model.load_recogniser(tmp_path / "a.ckpt")
    loaded = backbone.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
    assert meta["config"]["units"] == list(units) and meta["config"]["se"] == se
    assert len(prototypes.to_draw()) == 0 and meta["names"] == []
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.fixture(scope="module")
def small():
    """A recogniser of four units, in the layout of the published ones."""
    torch.manual_seed(0)
    return model.Recogniser(width=16, units=(1, 1, 1, 1), se=False).eval()


def prefixed(prefix, net):
    """The state of a network, its names behind a prefix."""
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def test_colours_are_in_the_order_that_the_checkpoint_was_trained_on(tmp_path, small, capsys, monkeypatch):
    """AdaFace's checkpoints read BGR, all others RGB, and `bgr` overrules that."""
    monkeypatch.setattr(model, "autocast", contextlib.nullcontext)      # bf16 rounds too coarsely
    torch.save({"state_dict": prefixed("model.", small)}, tmp_path / "ada.ckpt")
    torch.save(prefixed("net.", small), tmp_path / "cvl.pt")
    images = torch.randint(256, (1, 3, 112, 112), dtype=torch.uint8)
    rgb, bgr = model.embed(small, images), model.embed(small, images.flip(1))
    assert not torch.allclose(rgb, bgr, atol=1e-3)
    for name, asked, expected in (("ada.ckpt", None, bgr), ("ada.ckpt", False, rgb), ("ada.ckpt", True, bgr),
                                  ("cvl.pt", None, rgb), ("cvl.pt", True, bgr)):
        backbone, _, _ = model.load_recogniser(tmp_path / name, asked)
        assert torch.allclose(model.embed(backbone, images), expected, atol=1e-5)
        order = "BGR" if expected is bgr else "RGB"
        assert f"4 residual units, reads {order} images" in capsys.readouterr().out


def test_published_embeddings_are_unit_vectors_that_ignore_mirroring(small):
    """As the field embeds: the sum of an image's and its mirror image's."""
    images = torch.randint(256, (2, 3, 112, 112), dtype=torch.uint8)
    f = model.embed(small, images)
    assert torch.allclose(f.norm(dim=1), torch.ones(2))
    assert torch.equal(f, model.embed(small, images.flip(3)))


def test_a_checkpoint_may_be_double_old_or_of_safetensors(tmp_path, small):
    """Whatever the format, type and wrappers, the same tensors arrive in fp32; whole numbers stay whole."""
    torch.save({name: tensor.double() for name, tensor in prefixed("net.", small).items()}, tmp_path / "a.pt")
    torch.save(prefixed("module.backbone.", small), tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    save_file(prefixed("model.net.", small), tmp_path / "c.safetensors")
    counts = {"net.body.0.count": torch.tensor(3), "step": 7}
    torch.save(prefixed("", small) | counts, tmp_path / "d.ckpt")
    expected = prefixed("us.", small)
    for name in ("a.pt", "b.pth", "c.safetensors", "d.ckpt"):
        tensors = published.read_published(tmp_path / name, "us")
        for key, tensor in expected.items():
            if tensor.is_floating_point():
                assert torch.equal(tensors[key], tensor)
                assert tensors[key].dtype == torch.float32
    assert tensors["us.body.0.count"].dtype == torch.int64
    assert "us.step" not in tensors


def test_a_folder_of_published_weights_stands_for_them(tmp_path, small, capsys):
    """As CVLface's are downloaded: config.json, model.safetensors, and a copy deeper down."""
    save_file(prefixed("model.net.", small), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        backbone, _, meta = model.load_recogniser(path)
        assert meta["names"] == [] and backbone.config["units"] == [*small.config["units"]]
    (tmp_path / "model.onnx").write_bytes(b"\b\7")
    assert "ONNX" in stops(capsys, model.load_recogniser, tmp_path / "model.onnx")


@pytest.mark.parametrize("content, said", [
    ({"model.extra": torch.zeros(1)}, "expected the layout of AdaFace, CVLface or TFace"),
    ({"layer1.0.bn1.weight": torch.zeros(1)}, "found backbone.layer1.0.bn1.weight"),
    ({"input_layer.0.weight": torch.zeros(1)}, "expected the layout of AdaFace"),
    ({"body.0.res_layer.4.weight": torch.zeros(1)}, "expected the layout of AdaFace"),
    (Path("of a class that weights never are"), "expected published weights")])
def test_what_is_no_published_recogniser_is_one_clear_line(tmp_path, capsys, content, said):
    """Other layouts, InsightFace's own among them, and files that hold no weights."""
    torch.save(content, tmp_path / "b.pth")
    line = stops(capsys, model.load_recogniser, tmp_path / "b.pth")
    assert "b.pth: expected" in line and said in line


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_nothing(tmp_path, monkeypatch, small, zipped):
    """Classes that it names are replaced by empty ones, or refused."""
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": prefixed("net.", small), "hook": Payload()}
    torch.save(content, "p.pth", _use_new_zipfile_serialization=zipped)
    try:
        model.load_recogniser("p.pth")
    except SystemExit as stop:
        assert stop.code == 2
    assert os.listdir() == ["p.pth"]


# ------------------------------------------------------------------------------------------------ align.py

def distance_to(x, y, side):
    """The distance of each pixel of a square image (side, side) to a point."""
    middles = np.arange(side) + 0.5
    return np.hypot(middles - x, middles[:, None] - y)


@pytest.mark.parametrize("zoom, angle", [(1.0, 0.0), (0.6, 0.4), (6.0, -0.7)])
def test_crops_put_the_landmarks_where_they_say(zoom, angle):
    """White dots at the landmarks of a photograph are found at the landmarks of its crop."""
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = 112 * zoom * (data.TEMPLATE - 0.5) @ turn + 500
    points[2] += 3 * zoom                                               # a nose off the template
    nearest = np.min([distance_to(x, y, 1000) for x, y in points.tolist()], 0)
    dots = 255 * (3 * zoom + 0.5 - nearest).clip(0, 1)
    photo = Image.fromarray(np.uint8(dots)).convert("RGB")
    crop, landmarks = align.crop_face(photo, points, 112)

    grey = np.asarray(crop.convert("L"), float)
    for x, y in landmarks.tolist():
        light = grey * (distance_to(x, y, 112) < 7)
        middles = np.arange(112) + 0.5
        found_x, found_y = light.sum(0) @ middles / light.sum(), light.sum(1) @ middles / light.sum()
        assert np.hypot(found_x - x, found_y - y) < 0.5
    assert (landmarks - 112 * data.TEMPLATE).norm(dim=1).max() < 4


def test_large_photographs_are_averaged_down():
    """Black and white specks, finer than a pixel of the crop, become grey, as a camera would see them."""
    specks = 255 * np.random.default_rng(0).integers(2, size=(1400, 1400))
    image = Image.fromarray(np.uint8(specks)).convert("RGB")
    crop, _ = align.crop_face(image, 1120 * data.TEMPLATE + 140, 112)
    grey = np.asarray(crop, float)
    assert 120 < grey.mean() < 135 and grey.std() < 20


def test_the_largest_face_counts_by_size_and_score(monkeypatch):
    """Found at 640 pixels at most, given in pixels of the photograph; faces under 40 pixels do not count."""
    large, surest, best, thin = [0, 0, 200, 200], [0, 0, 100, 100], [300, 0, 450, 150], [500, 0, 515, 9000]
    boxes = torch.tensor([large, best, surest, thin], dtype=torch.float)
    scores = torch.tensor([0.5, 0.95, 1.0, 1.0])                # times area: 20,000; 21,375; 10,000; too thin
    landmarks = torch.arange(4.).view(4, 1, 1).expand(4, 5, 2)
    seen = []

    def detect(detector, images):
        seen.append(images.shape)
        yield scores, boxes, landmarks
    monkeypatch.setattr(align, "detect_faces", detect)
    found = align.largest_face(None, Image.new("RGB", (1280, 960)))
    assert seen == [(1, 3, 480, 640)]
    assert torch.equal(found, 2 * landmarks[1])
    align.largest_face(None, Image.new("RGB", (300, 200)))
    assert seen[1] == (1, 3, 200, 300)                                  # never enlarged
    boxes[:] = torch.tensor([0, 0, 30, 30])
    align.largest_face(None, Image.new("RGB", (1280, 960)))             # of 60 pixels in the photograph
    with pytest.raises(ValueError, match="no face of 40 pixels"):
        align.largest_face(None, Image.new("RGB", (640, 640)))


@pytest.mark.parametrize("angle, expected", [(0, True), (4, True), (20, False), (90, False), (None, False)])
def test_a_crop_whose_face_does_not_stand_upright_is_refused(monkeypatch, angle, expected):
    """By a second look at the crop, which may also find no face at all."""
    found = torch.full((1, 5, 2), torch.nan)
    if angle is not None:
        turn = torch.polar(torch.tensor([1.]), torch.tensor([math.radians(angle)]))
        found = align.move(data.TEMPLATE[None] - 0.5, turn, torch.tensor([0j])) + 0.5
    monkeypatch.setattr(align, "crop_landmarks", lambda detector, crops: found)
    assert bool(align.upright(None, Image.new("RGB", (112, 112)))) == expected


def see_red_squares(_, images):
    """A detector for `align` that takes a red square for a face, in each half of a photograph."""
    for image in images:
        red = (image[0] > 200) & (image[2] < 60)
        width = image.shape[2]
        boxes = []
        for first, last in ((0, width // 2), (width // 2, width)):
            ys, xs = red[:, first:last].nonzero(as_tuple=True)
            if len(xs):
                boxes.append([first + xs.min(), ys.min(), first + xs.max() + 1, ys.max() + 1])
        boxes = torch.tensor(boxes, dtype=torch.float).view(-1, 4)
        corner, sides = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
        yield torch.ones(len(boxes)), boxes, corner + sides * data.TEMPLATE


def photo(path, *squares, size=(900, 600), mode="RGB", **options):
    """Saves a white photograph with squares (x, y, side), red, with more green on their left and if large."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for x, y, side in squares:
        draw.rectangle((x, y, x + side - 1, y + side - 1), (255, side // 4, 0))
        draw.rectangle((x, y, x + side // 2, y + side - 1), (255, side // 4 + 90, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, **options)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """An empty folder of photographs, in which `align` takes red squares for faces."""
    monkeypatch.setattr(align, "load_detector", lambda *_: None)
    monkeypatch.setattr(align, "detect_faces", see_red_squares)
    monkeypatch.setattr(align, "upright", lambda _, crop: crop.getpixel((20, 20))[2] < 60)
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def rejected(out):
    """{file: reason} of rejected.csv."""
    header, *rows = csv.reader((out / "rejected.csv").open())
    assert header == ["file", "reason"]
    return dict(rows)


def test_photographs_become_aligned_crops(photos, tmp_path):
    """Large or turned, with two faces: a crop shows the largest face, upright, on the template."""
    turned = Image.Exif()
    turned[0x112] = 6                                                   # seen after a quarter turn
    photo(photos / "ann/huge.png", (1000, 1000, 900), size=(5000, 4000))
    photo(photos / "ann/turned.jpg", (10, 350, 200), exif=turned)
    photo(photos / "ann/two.png", (40, 40, 300), (500, 250, 100), mode="RGBA")
    printed = here("tools.align", "photos", "--out", "out", cwd=tmp_path)
    assert "3 faces in out; 0 files of photos in rejected.csv" in printed

    out = tmp_path / "out"
    names = ["huge.png.jpg", "turned.jpg", "two.png.jpg"]
    assert sorted(path.name for path in (out / "ann").iterdir()) == names
    crops = {name: pil_to_tensor(data.open_image(out / "ann" / name)).float() for name in names}
    for crop in crops.values():
        red, _, blue = crop
        assert crop.shape == (3, 112, 112)
        assert red.mean() > 225 and blue[8:-8, 8:-8].mean() < 40        # the square fills the crop
    upper, lower = crops["turned.jpg"][1, :56], crops["turned.jpg"][1, 56:]
    assert upper.mean() > lower.mean() + 50                             # what was left is up
    assert 150 < crops["two.png.jpg"][1, :, :50].mean() < 180           # the larger one: 300 // 4 + 90
    landmarks = data.Faces([out]).landmarks
    assert torch.allclose(landmarks, data.TEMPLATE.expand(3, 5, 2), atol=1e-3)
    two = data.open_image(photos / "ann/two.png")
    exact, _ = align.crop_face(two, 40 + 300 * data.TEMPLATE, 112)
    assert (pil_to_tensor(exact) - crops["two.png.jpg"]).abs().mean() < 1           # little is lost as a JPEG


def test_every_file_that_is_not_cut_has_a_row_with_the_reason(photos, tmp_path):
    """No face, a small one, one that is not upright, no photograph, nobody's photograph."""
    photo(photos / "ann/good.png", (40, 40, 300))
    photo(photos / "ann/none.png")
    photo(photos / "ann/small.png", (100, 100, 30))
    photo(photos / "nobody.png", (40, 40, 300))
    lying = Image.open(photos / "ann/good.png")
    ImageDraw.Draw(lying).rectangle((60, 60, 140, 140), "white")        # where the fixture's `upright` looks
    lying.save(photos / "ann/lying.png")
    (photos / "ann/broken.jpg").write_bytes(b"no picture")
    (photos / "ann/notes.txt").write_bytes(b"no picture")
    os.mkfifo(photos / "ann/pipe.jpg")                                  # would never end
    count, refused = align.align(photos, tmp_path / "out", None)
    reasons = rejected(tmp_path / "out")
    assert (count, refused) == (1, 7)
    assert reasons.pop("ann/broken.jpg").startswith("unreadable: ")
    assert reasons == {
        "ann/lying.png": "the face is not upright, or hardly seen", "ann/none.png": "no face",
        "ann/notes.txt": "its suffix is not that of an image", "ann/small.png": "no face of 40 pixels",
        "ann/pipe.jpg": "no file, or a link to none", "nobody.png": "not in the folder of an identity"}


def test_crops_that_are_there_are_not_cut_again(photos, tmp_path, monkeypatch):
    """But those that a killed run did not leave whole are, to the same bytes."""
    photo(photos / "ann/1.png", (40, 40, 300))
    photo(photos / "ann/2.jpg", (40, 40, 200))
    out = tmp_path / "out"
    align.align(photos, out, None)
    before = contents(out)
    opened = []

    def spy(path):
        opened.append(path.name)
        return data.open_image(path)
    monkeypatch.setattr(align, "open_image", spy)
    align.align(photos, out, None)
    assert opened == [] and before == contents(out)
    (out / "ann/1.png.jpg").unlink()
    align.align(photos, out, None)
    assert opened == ["1.png"] and before == contents(out)
    table = (out / "landmarks.csv").read_text().splitlines()
    (out / "landmarks.csv").write_text("\n".join([*table[:2], "ann/2.jpg,1"]))      # cut short
    align.align(photos, out, None)
    assert opened == ["1.png", "2.jpg"] and before == contents(out)
    (out / "landmarks.csv").unlink()
    align.align(photos, out, None)
    assert sorted(opened) == ["1.png", "1.png", "2.jpg", "2.jpg"] and before == contents(out)


def test_photographs_that_came_later_are_added(photos, tmp_path):
    """Rows of photographs that are no longer there stay in both tables."""
    photo(photos / "ann/1.png", (40, 40, 300))
    photo(photos / "ann/none.png")
    align.align(photos, tmp_path / "out", None)
    shutil.rmtree(photos)
    photo(photos / "bob/1.png", (40, 40, 300))
    photo(photos / "bob/none.png")
    count, refused = align.align(photos, tmp_path / "out", None)
    assert (count, refused) == (2, 1)
    assert list(data.Faces([tmp_path / "out"]).people) == ["ann", "bob"]
    assert data.Faces([tmp_path / "out"]).landmarks.isfinite().all()
    assert list(rejected(tmp_path / "out")) == ["ann/none.png", "bob/none.png"]
    photo(photos / "bob/none.png", (40, 40, 300))                       # a better one took its place
    assert align.align(photos, tmp_path / "out", None) == (3, 0)
    assert list(rejected(tmp_path / "out")) == ["ann/none.png"]


def test_photographs_of_one_name_do_not_overwrite_each_other(photos, tmp_path):
    """a.png becomes a.png.jpg; a.png.jpg, where both are there, a.png.jpg.jpg."""
    photo(photos / "ann/a.png", (40, 40, 300))
    photo(photos / "ann/a.png.jpg", (40, 40, 200))
    photo(photos / "ann/b.jpg", (40, 40, 200))
    align.align(photos, tmp_path / "out", None)
    crops = sorted(path.name for path in (tmp_path / "out/ann").iterdir())
    assert crops == ["a.png.jpg", "a.png.jpg.jpg", "b.jpg"]


def test_hidden_folders_and_files_are_passed_by(photos, tmp_path):
    """They are a system's thumbnails and the like, and no rows tell of them."""
    photo(photos / "ann/1.png", (40, 40, 300))
    photo(photos / ".thumbnails/ann.png", (40, 40, 300))
    photo(photos / "ann/.trash/2.png", (40, 40, 300))
    photo(photos / "ann/.3.png", (40, 40, 300))
    assert align.align(photos, tmp_path / "out", None) == (1, 0)
    assert [*contents(tmp_path / "out/ann")] == ["1.png.jpg"]
    assert rejected(tmp_path / "out") == {}


@pytest.mark.parametrize("out", [".", "ann", "new/faces", "../photos/faces"])
def test_crops_never_go_into_the_photographs(photos, tmp_path, capsys, out):
    """There they would be photographs the next time."""
    photo(photos / "ann/1.png", (40, 40, 300))
    before = contents(photos)
    line = stops(capsys, align.align, photos, photos / out, None)
    assert f"lies in {photos}" in line
    assert before == contents(photos)


def test_photographs_without_any_face_end_in_one_line(photos, tmp_path, capsys):
    """It names the table that says why; an empty folder, or none, is told as such."""
    assert "no files in it" in stops(capsys, align.align, photos, tmp_path / "out", None)
    assert "no such folder" in stops(capsys, align.align, tmp_path / "nowhere", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    photo(photos / "ann/none.png")
    line = stops(capsys, align.align, photos, tmp_path / "out", None)
    assert "no face found in any of 1 files" in line and "rejected.csv" in line
    assert rejected(tmp_path / "out") == {"ann/none.png": "no face"}


def test_a_full_disk_stops_the_run_which_keeps_what_it_did(photos, tmp_path, monkeypatch):
    """The system's failures are no photograph's fault: they end the run, and the tables are written."""
    photo(photos / "ann/1.png", (40, 40, 300))
    photo(photos / "ann/2.png", (40, 40, 300))

    def fails_at_2(path):
        if path.name == "2.png":
            raise OSError(errno.ENOSPC, "no space left")
        return data.open_image(path)
    monkeypatch.setattr(align, "open_image", fails_at_2)
    monkeypatch.setattr(align, "processors", lambda: 1)
    with pytest.raises(OSError, match="no space left"):
        align.align(photos, tmp_path / "out", None)
    assert data.Faces([tmp_path / "out"]).landmarks.isfinite().all()
    assert rejected(tmp_path / "out") == {}


# --------------------------------------------------------------------------------- with tools/ and without

def test_align_is_a_command_of_any_folder(tmp_path):
    """It says what it takes, and ends in one line where its detector sees no face."""
    photo(tmp_path / "photos/ann/1.png", (40, 40, 300))
    write_detector(tmp_path / "w.pth")
    assert "python tools/align.py photos/ --out faces/" in here("tools.align", "--help", cwd=tmp_path)
    arguments = ("photos", "--out", "faces", "--weights", "w.pth")
    printed = command(ROOT / "tools/align.py", *arguments, cwd=tmp_path, code=2)
    assert "error: photos: no face found in any of 1 files" in printed
    assert rejected(tmp_path / "faces") == {"ann/1.png": "no face"}


# ------------------------------------------------------------------------------------------------ pairs.py

LFW = """2 3
Ann_Lee 1 2
Ann_Lee 1 3
Bo 2 3
Ann_Lee 1 Bo 1
Ann_Lee 3 Bo 2
Bo 3 7 1
Bo 1 2
7 1 2
7 2 3
7 1 Bo 2
Bo 3 Ann_Lee 2
7 3 Ann_Lee 2
"""


@pytest.fixture
def lfw(tmp_path):
    """A folder with three images each of three people, as LFW names them; one of them is a PNG."""
    for i, name in enumerate(("Ann_Lee", "Bo", "7")):
        for j in (1, 2, 3):
            image = torch.full((3, 8, 8), 30 * i + 10 * j, dtype=torch.uint8)
            path = tmp_path / f"lfw/{name}/{name}_000{j}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(image))
    Image.new("RGB", (8, 8), "white").save(path.with_suffix(".png"))
    path.unlink()
    return tmp_path


def as_files(line, separator):
    """A line of LFW's list as a line of files, without suffix if it is that of the PNG."""
    name, i, *other, j = line.split()
    other = other or [name]
    two = (f"{person}/{person}_000{k}" for person, k in ((name, i), (other[0], j)))
    two = (file if file == "7/7_0003" else f"{file}.jpg" for file in two)
    return separator.join([*two, str(int(other == [name]))])


def list_of(kind):
    """LFW's list in another form; all have the same twelve pairs."""
    lines = LFW.splitlines()[1:]
    return {
        "LFW": LFW,
        "LFW, tabs": LFW.replace(" ", "\t"),
        "one fold": "6\n" + "\n".join(lines),
        "LFW, commas": "name,i,j,\n" + "".join(f"{line.replace(' ', ',')},\r\n" for line in lines),
        "files": "\n\n".join(as_files(line, "  ") for line in lines),
        "files, commas": "\ufefffile1,file2,same\n" + "\n".join(as_files(line, ", ") for line in lines)}[kind]


@pytest.mark.parametrize("kind", ["LFW", "LFW, tabs", "one fold", "LFW, commas", "files", "files, commas"])
def test_a_list_of_pairs_becomes_a_benchmark(lfw, kind):
    """Its pairs in their order; the images as they lie on disk, to the byte."""
    (lfw / "pairs.txt").write_text(list_of(kind))
    printed = here("tools.pairs", "lfw", "pairs.txt", "--out", "own/lfw.bin", cwd=lfw)
    assert "own/lfw.bin: 12 pairs of 9 images, 6 pairs of one person\n" in printed

    encoded, same = insightface.read_bin(lfw / "own/lfw.bin")
    expected = []
    for line in LFW.splitlines()[1:]:
        name, i, *other, j = line.split()
        for person, k in ((name, i), ((other or [name])[0], j)):
            path, = (lfw / "lfw" / person).glob(f"{person}_000{k}.*")
            expected.append(path.read_bytes())
    assert [bytes(image) for image in encoded] == expected
    assert same.tolist() == [True, True, True, False, False, False] * 2
    images, _ = data.read_benchmark(lfw / "own/lfw.bin", 8)
    assert images[[0, 1, 17]].amax((1, 2, 3)).tolist() == [10, 20, 255]


def wide_image(root):
    Image.new("RGB", (8, 9)).save(root / "lfw/Bo/Bo_0002.jpg")


def broken_image(root):
    (root / "lfw/Bo/Bo_0002.jpg").write_bytes(b"\xff\xd8\xff")


def no_image(root):
    (root / "lfw/Bo/Bo_0002.jpg").unlink()


def no_list(root):
    (root / "pairs.txt").unlink()


def there_already(root):
    (root / "lfw.bin").write_bytes(b"")


def lines(change):
    """What changes the lines of the list."""
    def act(root):
        path = root / "pairs.txt"
        path.write_text("\n".join(change(path.read_text().splitlines())))
    return act


@pytest.mark.parametrize("damage, said", [
    (wide_image, "lfw/Bo/Bo_0002.jpg: expected a square image, cropped by tools/align.py; ValueError: it has"),
    (broken_image, "lfw/Bo/Bo_0002.jpg: expected a square image"),
    (no_image, "lfw: 1 of 9 images are not there, such as Bo/Bo_0002"),
    (no_list, "pairs.txt: no such file"),
    (there_already, "--out lfw.bin: expected a new file"),
    (lines(lambda text: text[:-1]), "pairs.txt: its first line promises 12 pairs, but it has 11"),
    (lines(lambda text: text[1:8]), "pairs.txt: 7 pairs; expected ten or more"),
    (lines(lambda text: text[1:4] * 4), "12 pairs; expected ten or more, of one person and of two"),
    (lines(lambda text: []), "pairs.txt: 0 pairs"),
    (lines(lambda text: ["a.jpg 5"] + text), "line 1: expected `name i j`"),
    (lines(lambda text: ["9" * 5000] + text), "pairs.txt: expected a list of pairs, as text; ValueError"),
    (lines(lambda text: text[:5] + ["Bo 1 Ann_Lee"]), "line 6: expected `name i j`"),
    (lines(lambda text: text + ["Bo/1.jpg Bo/2.jpg 2"]), "line 14: expected `name i j`"),
    (lines(lambda text: text + ["a, b, c, d, 1"]), "found a b c d 1")])
def test_a_list_that_does_not_serve_is_one_line_and_writes_nothing(lfw, damage, said):
    (lfw / "pairs.txt").write_text(LFW)
    damage(lfw)
    before = contents(lfw)
    printed = here("tools.pairs", "lfw", "pairs.txt", "--out", "lfw.bin", cwd=lfw, code=2)
    assert said in printed and printed.count("\n") == 1
    assert contents(lfw) == before


def test_no_image_or_list_is_overwritten_with_a_benchmark(lfw):
    (lfw / "pairs.txt").write_text(LFW)
    before = contents(lfw)
    printed = here("tools.pairs", "lfw", "pairs.txt", "--out", "pairs.txt", cwd=lfw, code=2)
    assert "--out pairs.txt: expected a new file that ends with .bin" in printed
    assert contents(lfw) == before


# ----------------------------------------------------------------------------------------------- report.py

def test_the_average_is_of_the_field_s_five_and_others_are_shown():
    accuracy = {"toys": 0.1, "agedb_30": 0.7, "lfw": 0.9}
    scores = {name: dict(accuracy=value, std=0.01) for name, value in accuracy.items()}
    row = report.with_average(scores)
    assert [*row] == ["lfw", "agedb_30", "toys", "average"] and row["toys"] == scores["toys"]
    assert row["average"] == pytest.approx(0.8)
    text = report.describe({"models": {"one": row}, "datasets": {}})
    assert text.index("LFW ") < text.index("AgeDB ") < text.index("toys ")
    absent = text.split("absent: ")[1].split("\n")[0]
    assert absent == "CFP-FP, CPLFW, CALFW"
    assert report.with_average({"toys": scores["toys"]})["average"] == 0.1          # of all, if none is there


def test_the_picture_of_the_nearest_shows_each_above_its_real_image():
    levels = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).numpy()
    drawn, real = torch.randperm(10), 20 + torch.randperm(10)
    faces = [(level, None) for level in levels]
    data_set = face_set(units(10, 6), torch.arange(10), faces=faces, index=drawn)
    real_set = face_set(units(10, 6), torch.arange(10), faces=faces, index=real)
    which = torch.arange(10) * 3 % 10
    found = {"image": (torch.arange(10) / 10, which), "centre": (torch.rand(10), which * 0)}
    images = report.closest(data_set, found, real_set)
    top = [9, 8, 7, 6, 5, 4, 3, 2]                          # the nearest first
    assert same(images[:8, 0, 0, 0], drawn[top] / 255)
    assert same(images[8:, 0, 0, 0], real[which[top]] / 255)


def test_offenders_are_told_with_their_files():
    """Of a person its name and the real person's; of an image its file and the real image's."""
    drawn = face_set(units(3, 6), torch.tensor([0, 1, 1]), index=torch.tensor([5, 3, 4]))
    real = face_set(units(4, 6), torch.tensor([1, 0, 1, 2]), index=torch.tensor([7, 9, 8, 6]))
    found = {"person": (torch.tensor([0.5, 0.75]), torch.tensor([0, 2])),
             "centre": (torch.tensor([0.5, 0.75, 0]), torch.tensor([0, 2, 0])),
             "image": (torch.tensor([0.75, 0.5, 0]), torch.tensor([2, 0, 0])),
             "copy": (torch.tensor([0, 0, 0.75]), torch.tensor([0, 0, 3])),
             "somebody": (torch.tensor([0.5, 0.75]), torch.tensor([0, 2]))}
    tests = {test: dict(line=0.5) for test in found}        # at the line is below it
    rows = [*report.offenders(drawn, found, tests, real)]
    assert rows == [["p1", "person", "0.7500", "p2", ""],
                    ["3.jpg", "centre", "0.7500", "p2", ""],
                    ["5.jpg", "image", "0.7500", "p1", "8.jpg"],
                    ["4.jpg", "copy", "0.7500", "p2", "6.jpg"],
                    ["p1", "somebody", "0.7500", "p2", ""]]


def test_a_table_leaves_out_what_is_nested_and_marks_what_is_unknown():
    rows = {"set": dict(images=12, S=0.12345, D=None, leakage={})}
    rows["real"] = dict(images=3, S=2.0, D=0.5, leakage={})
    lines = report.table("Title", rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert lines[0] == "Title"
    assert cells[:2] == [["", "images", "S", "D"], ["---"] * 4]
    assert cells[2:] == [["set", "12", "0.123", "-"], ["real", "3", "2", "0.5"]]


# -------------------------------------------------------------------------------- tools and scripts

def test_each_tool_and_each_script_can_be_imported_first(tmp_path):
    """Whatever is imported first, no import is circular, and no script imports a tool before it needs it."""
    tools = "toys inputs insightface retinaface published report align pairs".split()
    tools = [f"tools.{name}" for name in tools]
    scripts = [name.removesuffix(".py") for name in SCRIPTS]
    (tmp_path / "first.py").write_text(f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
ours = {tools + scripts}
for name in ours:
    for other in [*ours, "tools"]:
        sys.modules.pop(other, None)
    importlib.import_module(name)
    imported = [other for other in sys.modules if other.startswith("tools")]
    print(name, "imports a tool" if imported and name in {scripts} else "ok")
""")
    lines = command(tmp_path / "first.py", cwd=tmp_path).splitlines()
    assert lines == [f"{name} ok" for name in tools + scripts]


def test_the_six_scripts_do_without_tools_until_they_need_one(tmp_path):
    """On a folder with landmarks.csv they train; where a tool is missing, one line says so."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    folder(tmp_path / "faces", 4, 4)
    (tmp_path / "all.py").write_text("""
import os, sys, dit_train, fr_train, model
model.DIT_SIZES["Ti"] = dict(width=64, depth=1, heads=1)
for script, arguments in ((fr_train, "--data faces --epochs 1 --batch 8"),
                          (dit_train, "--arch Ti/8 --steps 1 --batch 4"), (dit_train, "--out runs/other")):
    sys.argv[1:] = arguments.split()
    model.run(script.main)
    if os.path.exists("runs/dit/model.safetensors"):
        os.remove("faces/landmarks.csv")
""")
    printed = command(tmp_path / "all.py", cwd=tmp_path, code=2)
    assert "step      1/1" in printed
    assert printed.count("error: ") == 1 and "copy the folder tools/ beside the scripts" in printed
    assert os.listdir(tmp_path / "runs/other") == ["run.json"]


@pytest.mark.parametrize("missing, caught", [("tools", True), ("tools.toys", True), ("toolsmith", False),
                                             ("numpy", False), (None, False)])
def test_only_a_missing_tool_is_told_to_be_copied(capsys, missing, caught):
    """Any other module that is missing keeps its traceback."""
    def main():
        raise ModuleNotFoundError("not found", name=missing)
    if caught:
        assert "copy the folder tools/" in stops(capsys, model.run, main)
    else:
        with pytest.raises(ModuleNotFoundError):
            model.run(main)
