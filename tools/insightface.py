"""InsightFace's files as they lie on disk: train.rec with its train.idx, and .bin benchmarks.

data.py and tools/inputs.py read them through this module when they meet a train.rec or a .bin.
"""
import io
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import open_image, processors, to_tensor
from model import fail, reading
from tools.inputs import why

# ---------------------------------------------------------------------------------------------------- records

def read_record(faces, i):
    """The encoded image i of a `Faces`, an open file, from the record at its place."""
    content, offset = np.memmap(faces.roots[faces.source[i]] / "train.rec", mode="r"), faces.places[i]
    _, length, flag = struct.unpack_from("<III", content, offset)
    return io.BytesIO(content[offset + 32 + 4 * flag:offset + 8 + length])


def list_records(path):
    """Identity, key and offset of each image in an InsightFace .rec file, which its .idx lists."""
    # A record: magic, length, flag, label, two ids, `flag` more labels (which then count), image or none.
    found, split = [], 0
    index = path.with_suffix(".idx")
    with reading(index, f"a line of key and offset for every record of {path.name}"):
        content = np.memmap(path, mode="r")
        for key, offset in np.loadtxt(index, np.int64, ndmin=2).tolist():
            magic, length, flag = struct.unpack_from("<III", content, offset)
            part, length = length >> 29, length % (1 << 29)
            if magic != 0xced7230a or offset + 8 + length > len(content):
                raise ValueError(f"record {key} lacks the magic number or ends beyond {len(content)} bytes")
            if part:                                        # its image holds the magic number
                split += 1
            elif length > 24 + 4 * flag:
                label, = struct.unpack_from("<f", content, offset + (32 if flag else 12))
                found.append((str(int(label)), str(key), offset))
    if split:
        print(f"{path}: left out {split} records that are stored in parts")
    if len({identity for identity, _, _ in found}) == 1:
        print(f"{path}: WARNING all records have one label; if a list has identities, unpack into folders")
    if not found:
        fail(f"{path}: it has no images that can be read")
    return found


# ------------------------------------------------------------------------------------------------- benchmarks

class StoredType:
    """Stands in for numpy.dtype while a .bin is unpickled, and keeps its name."""

    def __init__(self, name, *_):
        self.name = name if isinstance(name, str) else name.decode()

    def __setstate__(self, state):
        """The byte order does not matter for bytes and truth values."""


class StoredArray:
    """Stands in for a numpy array or number while a .bin is unpickled, and keeps its bytes or list."""

    def __init__(self, content=b"", kind=None):
        self.content, self.kind = content, kind

    def __setstate__(self, state):
        _, _, self.kind, _, self.content = state

    def values(self):
        """What it stands for, as a flat array or a list."""
        return self.content if isinstance(self.content, list) else np.frombuffer(self.content, self.kind.name)


class BinUnpickler(pickle.Unpickler):
    """Reads InsightFace's .bin and nothing else.

    It calls nothing outside this file, not even numpy, whose unpickling was not made for hostile bytes.
    """

    STAND_INS = {
        "_codecs.encode": lambda text, _: text.encode("latin1"),
        "numpy.dtype": StoredType,
        "numpy.ndarray": StoredArray,
        "numpy.core.multiarray._reconstruct": lambda *_: StoredArray(),
        "numpy.core.multiarray.scalar": lambda kind, content: StoredArray(content, kind),
        "numpy.core.numeric._frombuffer": lambda content, kind, *_: StoredArray(content, kind)}

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if full not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no benchmark needs")
        return self.STAND_INS[full]


def plain(stored):
    """What a stand-in for numpy stands for; anything else as it is."""
    return stored.values() if isinstance(stored, StoredArray) else stored


def read_bin(path):
    """The 2P encoded images of a .bin, as buffers, and whether each pair shows one person, bool (P,).

    Pair p is images 2p and 2p + 1. Raises an error unless it holds ten pairs or more, of both kinds.
    """
    content = io.BytesIO(Path(path).read_bytes())
    images, same = BinUnpickler(content, encoding="bytes").load()
    images = [memoryview(plain(image)) for image in plain(images)]
    same = torch.tensor([bool(np.any(plain(label))) for label in plain(same)])
    if len(images) != 2 * len(same) or len(same) < 10 or same.all() or not same.any():
        raise ValueError(f"{len(images)} images, {same.sum()} of {len(same)} pairs of one person, where "
                         "ten pairs or more are needed, of both kinds")
    return images, same


def read_benchmark(path, size):
    """Images uint8 (2P, 3, S, S) of a .bin; whether images 2p and 2p + 1 are one person (P,)."""
    decode = lambda image: to_tensor(open_image(io.BytesIO(image)), size)
    with reading(path, "an InsightFace .bin benchmark"), ThreadPoolExecutor(processors()) as pool:
        encoded, same = read_bin(path)
        images = tqdm(pool.map(decode, encoded), f"reading {path}", len(encoded), leave=False, mininterval=1)
        return torch.stack([*images]), same


def benchmark_people(benchmarks, size):
    """The distinct images (M, 3, S, S) of benchmarks {name: path}, and labels (M,).

    Two images are one person's if a chain of pairs says so.
    """
    number, distinct, pairs = {}, [], []
    for path in benchmarks.values():
        images, same = read_benchmark(path, size)
        keys = [hash(image.numpy().tobytes()) for image in images]
        new = {key: i for i, key in enumerate(keys) if key not in number}
        number |= {key: len(number) + i for i, key in enumerate(new)}
        distinct.append(images[[*new.values()]])
        pairs += [(number[a], number[b]) for a, b, one in zip(keys[::2], keys[1::2], same) if one]

    distinct, pairs = torch.cat(distinct), torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    labels = torch.arange(len(distinct))
    while (labels[pairs[:, 0]] != labels[pairs[:, 1]]).any():           # the lowest label spreads
        lowest = labels[pairs].amin(1).repeat_interleave(2)
        labels.scatter_reduce_(0, pairs.flatten(), lowest, "amin")
    return distinct, labels.unique(return_inverse=True)[1]


def named_benchmarks(paths):
    """{name: path} of benchmarks, by the names of their files without .bin; a folder stands for all in it."""
    found = []
    for path in map(Path, paths):
        folder, pattern = (path, "*.bin") if path.is_dir() else (path.parent, path.name)
        some = [path] if path.is_file() else sorted(folder.glob(pattern))           # Windows leaves *.bin
        if not some:
            fail(f"{path}: no such file; --val and --pairs name benchmarks, .bin, or folders of them")
        if some[0].suffix != ".bin":
            fail(f"{path}: expected a .bin; tools/pairs.py makes one of pairs.txt and a folder of images")
        found += some
    named = {path.stem: str(path) for path in found}
    if len(named) < len(found):
        fail(f"{' '.join(map(str, found))}: expected one benchmark of each name; leave some out")
    return named


def choose_benchmarks(paths):
    """{name: path} of the benchmarks among .bin files, of each name the first; says what is left out."""
    named = {}
    for path in paths:
        try:
            if path.stem in named:
                raise ValueError(f"{named[path.stem]} has its name")
            read_bin(path)
            named[path.stem] = str(path)
        except Exception as error:                          # pickles break in every possible way
            print(f"{path}: left out of the benchmarks ({why(path, error)}); --val names others")
    return named
