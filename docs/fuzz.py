"""Feeds damaged and hostile files to every reader: python docs/fuzz.py [CASES] [SEED]

A case ends well if the file is read, or refused with one line and exit code 2. A traceback, a payload that
ran, a case of more than 20 seconds or a peak of more than 2 GiB does not. Files are valid ones with bits
flipped, bytes replaced, cut short, repeated, or with a number made absurd.
"""
import collections
import contextlib
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import model

cases, seed = int((sys.argv[1:] or [20_000])[0]), int((sys.argv[2:] or [0])[0])
rng, root = random.Random(seed), Path(tempfile.mkdtemp())
torch.manual_seed(seed)
torch.set_num_threads(1)
warnings.simplefilter("ignore")


def encoded(kind, side=32):
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(buffer, kind)
    return buffer.getvalue()


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {root}/owned",)


def make_folder():
    (root / "f/p").mkdir(parents=True)
    for i in range(4):
        (root / f"f/p/{i}.png").write_bytes(encoded("PNG"))


make_folder()
landmarks = "file,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n" + "".join(
    f"p/{i}.png,11,14.5,21,14.5,16,20,12,26,20,26\n" for i in range(4))
records = [data.pack_record(i + 1, [i % 2] * (1 + i % 2), encoded("JPEG" if i % 2 else "PNG"))
           for i in range(6)]
offsets = [sum(map(len, records[:i])) for i in range(6)]
index = "".join(f"{i + 1}\t{offset}\n" for i, offset in enumerate(offsets))
benchmark = [pickle.dumps(([encoded("PNG")] * 20, [True, False] * 5), protocol) for protocol in (0, 2, 4)]
pairs = "5\t1\n" + "p\t1\t2\np\t1\tq\t2\n" * 5
for person in "pq":
    (root / f"lfw/{person}").mkdir(parents=True)
    for i in (1, 2):
        (root / f"lfw/{person}/{person}_{i:04d}.png").write_bytes(encoded("PNG"))
tiny = dict(size=32, dim=8, width=16, units=(1, 1, 1, 1))
backbone, prototypes = model.Recogniser(model.FRConfig(**tiny)), model.Prototypes(3, 2, 8)
tensors = {f"backbone.{name}": t for name, t in backbone.state_dict().items()}
tensors |= {f"prototypes.{name}": t for name, t in prototypes.state_dict().items()}
model.save_model(root / "m", "fr", backbone.cfg, tensors, data=["x"], val=[], names=["a", "b", "c"], step=1)
checkpoint = (root / "m/model.safetensors").read_bytes()
torch.save({f"module.{name}": t for name, t in model.RetinaFace().state_dict().items()}, root / "w.pth")
weights = (root / "w.pth").read_bytes()
torch.save({f"model.{name}": t for name, t in backbone.state_dict().items()}, root / "b.pth")
recogniser = (root / "b.pth").read_bytes()
torch.save({"settings": {"lr": 0.1}, "step": 3, "net": torch.nn.Linear(3, 3).state_dict()}, root / "s.pt")
state = (root / "s.pt").read_bytes()
ABSURD = [0, -1, 1, 255, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40, 2 ** 63, 10 ** 30]


def damage(content):
    """One to four changes of a valid file."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:at + 4] = rng.randbytes(4)
        elif kind == 2:
            content = content[:at]
        elif kind == 3:
            content[at:at] = content[at:at + rng.randint(1, 60)]
        elif kind == 4:
            content[at:at + 4] = struct.pack("<I", rng.choice(ABSURD) & 0xffffffff)
        elif kind == 5:
            content[at:at + 8] = struct.pack("<Q", rng.choice(ABSURD) & 2 ** 64 - 1)
        elif kind == 6:
            content[at:at + 1] = rng.choice([b"", b"\0", b"/", b"../", b"-", b"nan", b"1e999", b"\n", b'"',
                                             b"\xff", str(rng.choice(ABSURD)).encode()])
        if not content:
            content = bytearray(b"x")
    return bytes(content)


def write(name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
    return root / name


def rec():
    write("r/train.rec", damage(b"".join(records)) if rng.random() < 0.7 else b"".join(records))
    write("r/train.idx", damage(index.encode()) if rng.random() < 0.5 else index.encode())
    data.mapped.cache_clear()
    data.Faces([root / "r"])


def hostile_pickle():
    kind = rng.randrange(5)
    if kind == 0:
        return pickle.dumps((Payload(), [True]), rng.choice([0, 2, 4]))
    if kind == 1:                                           # an array of any size, by calling the class
        shape = rng.choice(ABSURD[4:])
        return b"\x80\x02cnumpy\nndarray\n" + f"(I{shape}\n".encode() + b"tR."
    if kind == 2:                                           # a memo entry far out
        return b"\x80\x02]r" + struct.pack("<I", rng.choice([2 ** 31, 2 ** 32 - 1, 2 ** 28])) + b"."
    if kind == 3:                                           # a string of absurd length
        return b"\x80\x04\x8e" + struct.pack("<Q", rng.choice(ABSURD[4:9])) + b"abc."
    return b"(" * rng.choice([10, 10_000, 500_000]) + b"."


def bin_():
    content = hostile_pickle() if rng.random() < 0.2 else damage(rng.choice(benchmark))
    data.read_benchmark(write("x.bin", content), 32)


def pairs_txt():
    data.read_benchmark(write("pairs.txt", damage(pairs.encode())), 32, root / "lfw")


def landmarks_csv():
    write("f/landmarks.csv", damage(landmarks.encode()))
    data.Faces([root / "f"])


def image():
    content = damage(encoded(rng.choice(["PNG", "JPEG"])))
    if rng.random() < 0.1:                                  # a bomb: a header that promises too much
        content = bytearray(encoded("PNG"))
        content[16:24] = struct.pack(">II", *rng.choices([20_000, 2 ** 20, 2 ** 31 - 1], k=2))
    write("i/p/1.png", bytes(content))
    data.Faces([root / "i"])


def safetensors():
    if rng.random() < 0.5:
        folder = write("m/model.safetensors", damage(checkpoint)).parent
    else:                                                   # sound tensors, absurd metadata
        meta = {"stage": "fr", "config": dict(tiny), "data": ["x"], "val": [], "names": list("abc")}
        wrong = rng.choice([*ABSURD, "a", None, [], {}, -3.5, ["../x"], [1, 2], float("nan"), True])
        where = rng.choice([meta, meta["config"]])
        where[rng.choice([*where, "new"])] = wrong
        save_file(tensors, root / "m/model.safetensors", {"vigface": json.dumps(meta)})
        folder = root / "m"
    model.load_recogniser(folder, torch.device("cpu"))


def pth():
    content = pickle.dumps(Payload()) if rng.random() < 0.05 else damage(weights)
    model.load_published(model.RetinaFace(), write("w.pth", content))


def published():
    model.load_published(backbone, write("w.pth", damage(recogniser)))


def resume():
    model.resume(write("s.pt", damage(state)), {"lr": 0.1}, {"net": torch.nn.Linear(3, 3)})


def too_slow(*_):
    raise TimeoutError("20 seconds")


signal.signal(signal.SIGALRM, too_slow)
counts, worst, started = collections.Counter(), 0, time.time()
readers = [rec, bin_, pairs_txt, landmarks_csv, image, safetensors, pth, published, resume]
for case in range(cases):
    reader, said, begun = readers[case % len(readers)], io.StringIO(), time.time()
    signal.alarm(20)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            reader()
        result = "read"
    except SystemExit as stop:
        errors = [line for line in said.getvalue().splitlines() if "error:" in line]
        result = "refused" if stop.code == 2 and len(errors) == 1 else f"BAD exit: {said.getvalue()[-300:]}"
    except BaseException as error:
        result = f"BAD {type(error).__name__}: {str(error)[:200]}"
    signal.alarm(0)
    worst = max(worst, time.time() - begun)
    counts[reader.__name__, result] += 1
    if result.startswith("BAD"):
        print(f"case {case}, {reader.__name__}: {result}", flush=True)
for (reader, result), count in sorted(counts.items()):
    print(f"{reader:16s} {count:6d} {result}")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
print(f"{cases} cases, seed {seed}: {sum(c for (_, r), c in counts.items() if r.startswith('BAD'))} bad; "
      f"payload ran: {(root / 'owned').exists()}; slowest {worst:.1f} s, peak {peak:.2f} GiB, "
      f"{time.time() - started:.0f} s in all")
