"""Measures the speeds that docs/measurements.md quotes: python docs/speed.py

A line each: images a second, milliseconds a step, share of a large matrix product measured in the same run
(by the FLOPs that PyTorch counts in one eager step; in bf16, or fp32 on a CPU without it), peak memory, and
how many graphs torch.compile made before the measurement + during it (none, if nothing recompiles in steady
state). On random images that are on the device already, but for the sampling, which is sample.py's own loop
with its verdicts and JPEG files, and the loading. On a CPU the same with small batches, not compiled.
"""
import copy
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample
from data import Faces, processors
from dit_train import mirror
from evaluate import FaceSet
from fr_train import augment, make_optimizer
from model import (DEVICE, DIT_SIZES, DiT, Prototypes, Recogniser, autocast, compiled, dit_loss, vigface_loss,
                   virtual_batch_size)
from tools.toys import PERSON, PICTURE, draw_faces

GPU = DEVICE.type == "cuda"
PEOPLE = 10_572                                                         # of CASIA-WebFace


def seconds(step, warm, steps, runs):
    """Seconds of one step: the median of `runs` runs of `steps` steps, after `warm` of them."""
    wait = torch.cuda.synchronize if GPU else lambda: None
    for _ in range(warm):
        step()
    times = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def matrix_product():
    """FLOP/s of a large matrix product, in the type that autocast takes here."""
    side = 8192 if GPU else 1024
    a, b = torch.randn(2, side, side, device=DEVICE)
    with autocast():
        kind = (a @ b).dtype
    a, b = a.to(kind), b.to(kind)
    return 2 * side ** 3 / seconds(lambda: a @ b, warm=3, steps=10, runs=5)


def flops_of(step):
    """The FLOPs PyTorch counts in one step, which must not be compiled."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure(name, images, step, flops, warm=4 if GPU else 0, steps=8 if GPU else 1, runs=3 if GPU else 2):
    """Prints the line of a network whose step takes so many images and FLOPs."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    graphs = lambda: counters["stats"]["unique_graphs"]
    before = graphs()
    for _ in range(warm):
        step()
    ready = graphs()
    one = seconds(step, 0, steps, runs)
    memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:6.1f} GiB" if GPU else ""
    print(f"{name:60s} {images / one:9.1f} img/s {1000 * one:9.1f} ms "
          f"{flops / one / PEAK:7.1%} of the product{memory}, {ready - before} + {graphs() - ready} graphs",
          flush=True)


def fast(net):
    """The network as the trainers run it: compiled on a GPU."""
    return compiled(net, 10 ** 9 if GPU else 0)


def recogniser(batch, virtual, eager=None):
    """A training step of IR-SE50, as fr_train.py does it; or NCHW, not compiled, autocast to `eager`."""
    layout = torch.contiguous_format if eager else torch.channels_last
    backbone = Recogniser().to(DEVICE, memory_format=layout)
    prototypes = Prototypes(PEOPLE, virtual, 512).to(DEVICE)
    optimizer = make_optimizer([*backbone.parameters(), *prototypes.parameters()])
    x = torch.randn(batch, 3, 112, 112, device=DEVICE).clamp(-1, 1)
    labels = torch.randint(PEOPLE, (batch,), device=DEVICE)
    b_virtual = virtual_batch_size(0, virtual, batch, PEOPLE)
    plain = lambda: torch.autocast(DEVICE.type, eager, enabled=eager != torch.float32)

    def step(net):
        with plain() if eager else autocast():
            f = net(augment(x))
        sum(vigface_loss(f, labels, prototypes, b_virtual)).backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    net = backbone if eager else fast(backbone)
    how = f"eager {str(eager).removeprefix('torch.')} NCHW" if eager else "ours"
    measure(f"IR-SE50 training, {virtual:,} virtual, {how}, batch {batch}", batch,
            lambda: step(net), flops_of(lambda: step(backbone)))


def transformer(arch, batch):
    """A training step of a DiT with the identity loss, as dit_train.py does it."""
    size, patch = arch.split("/")
    dit = DiT(patch=int(patch), **DIT_SIZES[size]).to(DEVICE)
    average = copy.deepcopy(dit).requires_grad_(False)
    backbone = Recogniser().eval().requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(dit.parameters(), fused=True)
    x = torch.randn(batch, 3, 112, 112, device=DEVICE).clamp(-1, 1)
    landmarks = torch.rand(batch, 5, 2, device=DEVICE)
    w = F.normalize(torch.randn(batch, 512, device=DEVICE))

    def step(dit_handle, backbone_handle):
        images, points = mirror(x, landmarks)
        with autocast():
            v_loss, identity_loss = dit_loss(dit_handle, backbone_handle, images, w, points)
        (v_loss + 0.1 * identity_loss).backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_([*average.parameters()], [p.detach() for p in dit.parameters()], 1e-4)
    handles = fast(dit), fast(backbone)
    measure(f"DiT-{arch} training, identity loss, batch {batch}", batch,
            lambda: step(*handles), flops_of(lambda: step(dit, backbone)))


def sampling(arch, batch, batches, virtual, steps, guidance):
    """sample.py's own loop, noise to JPEG files, each compared with 100,000 real faces; none is rejected."""
    size, patch = arch.split("/")
    backbone = Recogniser().eval().requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
    prototypes = Prototypes(PEOPLE, virtual, 512).requires_grad_(False).to(DEVICE)
    prototypes.settle(torch.eye(512, device=DEVICE) / 512)
    dit = DiT(patch=int(patch), **DIT_SIZES[size]).requires_grad_(False).to(DEVICE)
    f = F.normalize(torch.randn(100_000, 512, device=DEVICE)).to(torch.half if GPU else torch.float)
    real = FaceSet(f, torch.arange(100_000, device=DEVICE) % PEOPLE)
    poses = torch.rand(1000, 5, 2)
    fr = {"names": [f"p{i}" for i in range(PEOPLE)], "data": [], "sha256": "0" * 64}
    nobody = SimpleNamespace(people={}, labels=torch.zeros(0, dtype=torch.long))
    net, thresholds = fast(dit), {"centre": 2, "image": 2}              # compiled once, not in every run

    # What comes before and after the loop: nothing is loaded, embedded or joined.
    sample.load, sample.digest = lambda args: (dit, poses, backbone, prototypes, fr), lambda folder: ""
    sample.embed_real, sample.compiled = lambda *_: (real, thresholds), lambda *_: net
    sample.Faces, sample.finish = lambda *_: nobody, lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--steps {steps} --guidance {guidance} --batch {batch} --per-id {batch}".split()

        def step(count=batches):
            out = tempfile.mkdtemp(dir=folder)
            sys.argv[1:] = [*flags, "--virtual", str(count), "--out", out]
            sample.main()
            assert len([*Path(out).glob("*/*.jpg")]) == count * batch

        def one_batch():
            args, W = sample.parser.parse_args(flags), prototypes.to_draw()
            jobs = [sample.Job(PEOPLE, "somebody", index, 0, index) for index in range(batch)]
            images = sample.draw(dit, W, poses, jobs, args)
            sample.judge(backbone, W, real, thresholds, jobs, images)
        flops = batches * flops_of(one_batch)
        if GPU:
            step(1)                                                     # compiles; later runs do not
        measure(f"DiT-{arch} sampling, {steps} steps, guidance {guidance}, {batches} x {batch} files",
                batch * batches, step, flops, warm=0, steps=1, runs=3 if GPU else 1)


def loading(batch, count=4000):
    """Decoding JPEG files of 112 pixels by the loader's workers, images a second after the first batch."""
    with tempfile.TemporaryDirectory() as folder:
        who, how = (2 * torch.rand(20, numbers) - 1 for numbers in (PERSON, PICTURE))
        drawn, _ = draw_faces(who, how, 112)
        for i in range(count):
            path = Path(folder) / f"p{i // 20}/{i % 20}.jpg"
            path.parent.mkdir(exist_ok=True)
            to_pil_image(drawn[i % 20]).save(path, quality=95)
        faces = Faces([folder], memory=0)
        batches = faces.loader(torch.randperm(count).repeat(5 if GPU else 1).split(batch))
        next(batches)
        start = time.perf_counter()
        rate = sum(len(images) for images, _ in batches) / (time.perf_counter() - start)
        name = f"loading JPEG files, {processors()} workers, batch {batch}"
        print(f"{name:60s} {rate:9.1f} img/s", flush=True)


def clean(function, *arguments):
    """Runs one of the above with a compiler and a memory that know nothing of the one before."""
    torch.manual_seed(0)
    function(*arguments)
    torch._dynamo.reset()
    gc.collect()


if __name__ == "__main__":
    PEAK = matrix_product()
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}, {processors()} processors, torch "
          f"{torch.__version__}; the matrix product: {PEAK / 1e12:.2f} TFLOP/s")
    for virtual in (0, PEOPLE, 120_000) if GPU else (0, PEOPLE):
        clean(recogniser, 512 if GPU else 4, virtual)
    for eager in (torch.float16, torch.bfloat16) if GPU else (torch.float32,):
        clean(recogniser, 512 if GPU else 4, PEOPLE, eager)
    clean(transformer, "B/8", 256 if GPU else 2)
    for steps, guidance in ((10, 1.0), (20, 2.0)) if GPU else ((3, 1.0), (3, 2.0)):
        if GPU:
            clean(sampling, "B/8", 256, 6, 120_000, steps, guidance)
        else:
            clean(sampling, "B/8", 4, 2, PEOPLE, steps, guidance)
    clean(loading, 512 if GPU else 128)
