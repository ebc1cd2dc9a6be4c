"""Feeds damaged and hostile files to every reader: python docs/fuzz.py [CASES [SEED]]

A case ends well if the file is read, or refused with one line and exit code 2. A traceback, a payload or
program that ran or a case of more than 20 seconds does not. Prints how often each reader read and refused,
and the peak of memory. Files are valid ones with bits flipped, bytes replaced, cut short, repeated, or with a
number made absurd; or EPS, for which Pillow would start Ghostscript; or pickles that call what a .bin may
call with what it would not say. CASES is 20,000 by default.
"""
import codecs
import collections
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import model
from tools.align import align
from tools.published import read_published
from tools.retinaface import RetinaFace

cases, seed = int((sys.argv[1:] or [20_000])[0]), int((sys.argv[2:] or [0])[0])
rng, root = random.Random(seed), Path(tempfile.mkdtemp())
torch.manual_seed(seed)
torch.set_num_threads(1)
warnings.simplefilter("ignore")
ABSURD = [0, -1, 1, 255, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40, 2 ** 63, 10 ** 30]
WORDS = [b"", b"\0", b"/", b"../", b"-", b"nan", b"1e999", b"\n", b'"', b"\xff", *(b"%d" % x for x in ABSURD)]


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {root}/owned",)


class Call:
    """Pickles as a call of a function, and then of __setstate__ if a state is given."""

    def __init__(self, function, arguments, state=None):
        self.call = function, arguments, *([] if state is None else [state])

    def __reduce__(self):
        return self.call


def write(name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
    return root / name


def encoded(kind, side=32):
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(buffer, kind)
    return buffer.getvalue()


def record(key, labels, image):
    """An InsightFace record: magic, length, flag, label, two ids, `flag` labels, image, zeros."""
    flag = len(labels) if len(labels) > 1 else 0
    content = struct.pack("<IfQQ", flag, labels[0], key, 0)
    content += struct.pack(f"<{flag}f", *labels[:flag]) + image
    return struct.pack("<II", 0xced7230a, len(content)) + content + bytes(-len(content) % 4)


def picture(side=32):
    """A damaged picture of some format, or what promises too much, or EPS by another name."""
    content = damage(encoded(rng.choice(["PNG", "JPEG", *data.FORMATS]), side))
    if rng.random() < 0.1:                                              # a header that promises too much
        sides = struct.pack(">II", *rng.choices([20_000, 2 ** 20, 2 ** 31 - 1], k=2))
        content = encoded("PNG").replace(struct.pack(">II", 32, 32), sides, 1)
    if rng.random() < 0.1:
        content = encoded("EPS") if rng.random() < 0.5 else damage(encoded("EPS"))
    return content


def saved(content):
    torch.save(content, root / "saved")
    return (root / "saved").read_bytes()


def damage(content):
    """One to four changes of a valid file."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        absurd = rng.choice(ABSURD)
        content[at:at + 8] = rng.choice([
            bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:at + 8],              # a bit
            rng.randbytes(4) + content[at + 4:at + 8],
            content[at:at + 8] + content[at:at + rng.randint(1, 60)],                           # twice
            struct.pack("<I", absurd % 2 ** 32) + content[at + 4:at + 8],
            struct.pack("<Q", absurd % 2 ** 64),
            rng.choice(WORDS) + content[at + 1:at + 8]])
        content = content[:at] if rng.random() < 0.15 else content
        content = content or bytearray(b"x")
    return bytes(content)


for i in range(4):
    write(f"f/p/{i}.png", encoded("PNG"))
LANDMARKS = b"file,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n" + b"".join(
    b"p/%d.png,11,14.5,21,14.5,16,20,12,26,20,26\n" % i for i in range(4))
RECORDS, INDEX = b"", b""
for i in range(6):
    INDEX += b"%d\t%d\n" % (i + 1, len(RECORDS))
    RECORDS += record(i + 1, [i % 2] * (1 + i % 2), encoded("JPEG" if i % 2 else "PNG"))
BENCHMARKS = [pickle.dumps(([encoded("PNG")] * 20, [True, False] * 5), protocol) for protocol in (0, 2, 4)]
ARRAYS = [np.frombuffer(encoded("JPEG"), np.uint8)] * 20
BENCHMARKS += [pickle.dumps((ARRAYS, np.array([True, False] * 5)), protocol) for protocol in (2, 4, 5)]
TINY = dict(size=32, dim=8, width=16, units=(1, 1, 1, 1))
META = {"stage": "fr", "config": TINY, "data": ["x"], "val": [], "names": list("abc"),
        "prototypes": dict(n=3, k=2, dim=8)}
backbone = model.Recogniser(**TINY)
tensors = {f"backbone.{name}": t for name, t in backbone.state_dict().items()}
tensors |= {f"prototypes.{name}": t for name, t in model.Prototypes(3, 2, 8).state_dict().items()}
save_file(tensors, write("m/model.safetensors", b""), {"vigface": json.dumps(META)})
CHECKPOINT = (root / "m/model.safetensors").read_bytes()
DETECTOR = saved({f"module.{name}": t for name, t in RetinaFace().state_dict().items()})
RECOGNISER = saved({f"model.{name}": t for name, t in backbone.state_dict().items()})
STATE = saved({"step": 3, "net": torch.nn.Linear(3, 3).state_dict()})
SETTINGS = json.dumps({"stage": "fr", "lr": 0.1, "out": None, "data": ""}).encode()
HOSTILE = [*(pickle.dumps((Payload(), [True]), protocol) for protocol in (0, 2, 4)),
           b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 40) + b"abc.",              # a string of absurd length
           b"\x80\x02cnumpy\nndarray\n(I%d\ntR." % 2 ** 40,                 # an array, by calling the class
           b"(" * 500_000 + b"."]
CALLED = [codecs.encode, np.ndarray, np.dtype, np.zeros(1).__reduce__()[0],
          *(stored.__reduce_ex__(5)[0] for stored in (np.zeros(1), np.bool_(1)))]
KINDS = ["O", b"O", "O,O", "V8", "S0", "U1", "<M8", "uint8", "bool", "no", 1]
KINDS = [Call(np.dtype, (kind,)) for kind in KINDS]
SAID = [b"A" * 80, "O", (10,), (2 ** 40,), -1, 0, 2 ** 63, None, [], {}, [b"x"], True, False, *KINDS]

# Ghostscript, as Pillow would find it.
(root / "bin").mkdir()
(root / "bin/gs").write_text(f"#!/bin/sh\ntouch {root}/owned\n")
(root / "bin/gs").chmod(0o755)
os.environ["PATH"] = f"{root}/bin:{os.environ['PATH']}"


def hurt(*valid):
    """One of some valid files, damaged; now and then a hostile pickle instead."""
    return rng.choice(HOSTILE) if rng.random() < 0.1 else damage(rng.choice(valid))


def anything(depth=0):
    """What a hostile pickle says to what it calls: anything, or the result of another call."""
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(SAID)
    arguments = rng.choice([b"A" * 80, encoded("PNG")]), rng.choice(KINDS)      # an array's, but for the kind
    state = rng.choice([None, (1, (10,), arguments[1], False, arguments[0])])
    if rng.random() < 0.5:
        arguments = tuple(anything(depth + 1) for _ in range(rng.randint(0, 4)))
        state = rng.choice([None, tuple(anything(depth + 1) for _ in range(5))])
    return Call(rng.choice(CALLED), arguments[::rng.choice([1, -1])], state)


def stand_ins():
    """A benchmark whose images or labels are made by calls of what stands in for numpy."""
    whole = Call(np.ndarray, ((10,), "O", b"A" * 80)) if rng.random() < 0.1 else anything()
    images = rng.choice([[encoded("PNG")] * 20, [whole] * 20, whole, [encoded("EPS")] * 20])
    labels = rng.choice([[True, False] * 5, [whole, False] * 5, whole])
    data.read_benchmark(write("x.bin", pickle.dumps((images, labels), rng.choice([2, 4, 5]))), 32)


def rec():
    write("r/train.rec", damage(RECORDS) if rng.random() < 0.7 else RECORDS)
    write("r/train.idx", damage(INDEX) if rng.random() < 0.5 else INDEX)
    data.Faces([root / "r"])


def landmarks():
    write("f/landmarks.csv", damage(LANDMARKS))
    data.Faces([root / "f"])


def image():
    write("i/p/1.png", picture())
    data.Faces([root / "i"])


def everywhere(images):
    """Stands in for RetinaFace: one face, over all of an image, and as in an aligned crop."""
    count, _, high, wide = images.shape
    sides = torch.tensor([wide, high])
    points = data.TEMPLATE * 168 + 42 if high == wide == 252 else data.TEMPLATE * sides       # a crop
    boxes = F.pad(sides.float(), (2, 0))
    return torch.ones(count, 1), boxes.expand(count, 1, 4), points.expand(count, 1, 5, 2)


def photographs():
    shutil.rmtree(root / "aligned", ignore_errors=True)
    write("photos/p/1.png", picture(64))
    write("photos/p/2.jpg", encoded(rng.choice(["JPEG", *data.FORMATS]), rng.randint(20, 300)))
    tables = {"landmarks.csv": LANDMARKS, "rejected.csv": b"file,reason\np/3.gif,no face\np/4.jpg,none\n"}
    for name, table in tables.items():                                  # of an earlier run
        if rng.random() < 0.2:
            write(f"aligned/{name}", damage(table) if rng.random() < 0.5 else table)
    align(root / "photos", root / "aligned", everywhere)


def metadata():
    meta = META | {"config": dict(TINY)}
    where = rng.choice([meta, meta["config"]])
    wrong = [*ABSURD, "a", None, [], {}, -3.5, ["../x"], [1, 2], float("nan"), True]
    where[rng.choice([*where, "new"])] = rng.choice(wrong)
    save_file(tensors, root / "m/model.safetensors", {"vigface": json.dumps(meta)})
    model.load_recogniser(root / "m")


def safetensors():
    model.load_recogniser(write("m/model.safetensors", damage(CHECKPOINT)).parent)


def benchmark():
    data.read_benchmark(write("x.bin", hurt(*BENCHMARKS)), 32)


def detector():
    model.build(RetinaFace, read_published(write("w.pth", hurt(DETECTOR))), "net", "w.pth")


def recogniser():
    tensors = read_published(write("w.pth", hurt(RECOGNISER)))
    model.build(model.Recogniser, tensors, "net", "w.pth", TINY)


def state():
    model.resume(write("run/state.pt", hurt(STATE)).parent, {"net": torch.nn.Linear(3, 3)})


def settings():
    faces = types.SimpleNamespace(roots=[], digest=lambda: "")
    model.claim(write("run/run.json", hurt(SETTINGS)).parent, "fr", types.SimpleNamespace(lr=0.1), faces)


def too_slow(*_):
    raise KeyboardInterrupt("20 seconds")                               # which no reader takes for a broken file


def outcome(reader):
    """How a case ends, in a word, and what was said."""
    said = io.StringIO()
    signal.alarm(20)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            reader()
        return "read", ""
    except SystemExit as stop:
        lines = said.getvalue().replace("\r", "\n").splitlines()
        errors = sum(line.startswith("error:") for line in lines)
        return "refused" if stop.code == 2 and errors == 1 else "BAD", said.getvalue()
    except BaseException as error:
        return "BAD", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


signal.signal(signal.SIGALRM, too_slow)
readers = [rec, benchmark, stand_ins, landmarks, image, photographs, metadata, safetensors, detector,
           recogniser, state, settings]
counts, started = collections.Counter(), time.time()
for case in range(cases):
    reader = readers[case % len(readers)]
    word, said = outcome(reader)
    counts[reader.__name__, word] += 1
    if word == "BAD":
        print(f"case {case}, {reader.__name__}: {said[-300:]}", flush=True)
for (name, word), count in sorted(counts.items()):
    print(f"{name:12s} {count:6d} {word}")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
print(f"{cases} cases, seed {seed}, {time.time() - started:.0f} s; peak of memory {peak:.2f} GiB; "
      f"payload ran: {(root / 'owned').exists()}")
shutil.rmtree(root)
