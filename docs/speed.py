"""Measures the speeds that docs/measurements.md quotes: python docs/speed.py

On a GPU at batch 256 and compiled; on a CPU at batch 8, not compiled. Rates are medians of several runs after
warming up, on random images already on the device. Share of peak: the FLOPs PyTorch counts in one step, over
the rate of a large bf16 matrix product measured in the same run. Graphs: how many torch.compile made before
the measurement, and during it (none, if nothing recompiles in steady state).
"""
import statistics
import sys
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import (DIT_SIZES, DiT, DiTConfig, FRConfig, Prototypes, Recogniser, dit_loss, dpm_solver, embed,
                   guided, to_uint8, vigface_loss)

gpu = torch.cuda.is_available()
device = torch.device("cuda" if gpu else "cpu")
sync = torch.cuda.synchronize if gpu else lambda: None
torch.manual_seed(0)
print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}")


def seconds(step, warm=3, steps=8 if gpu else 2, runs=5 if gpu else 3):
    for _ in range(warm if gpu else 1):
        step()
    times, before = [], counters["stats"]["unique_graphs"]
    for _ in range(runs):
        sync()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        sync()
        times.append((time.perf_counter() - start) / steps)
    global graphs
    graphs = f"{before} + {counters['stats']['unique_graphs'] - before} graphs"
    return statistics.median(times)


side = 8192 if gpu else 2048
a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
peak = 2 * side ** 3 / seconds(lambda: a @ b)
big = torch.randn(2 ** 30 if gpu else 2 ** 26, device=device)
copy = 8 * big.numel() / seconds(lambda: big.clone())
print(f"matrix product {peak / 1e12:.1f} TFLOP/s bf16, copy {copy / 1e9:.0f} GB/s read + written")
del a, b, big


def line(name, images, step, flops=0.0):
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    one = seconds(step)
    memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:5.1f} GiB" if gpu else ""
    share = f"{flops / one / peak:6.1%} of the matrix product" if flops else ""
    print(f"{name:64s} {images / one:8.1f} img/s  {one * 1000:8.1f} ms  {memory}  {share}  {graphs}",
          flush=True)


def flops_of(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def stage1(name, batch, kind, layout, fast, virtual):
    backbone = Recogniser(FRConfig()).to(device, memory_format=layout).train()
    prototypes = Prototypes(10_572, virtual, 512).to(device)
    parameters = [*backbone.parameters(), *prototypes.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True)
    x = torch.randn(batch, 3, 112, 112, device=device)
    labels = torch.randint(10_572, (batch,), device=device)
    handle = torch.compile(backbone) if fast else backbone

    def step(handle=handle):
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            f = handle(x)
        sum(vigface_loss(f, labels, prototypes, virtual * batch // 10_572)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    line(name, batch, step, flops_of(lambda: step(backbone)) if kind != torch.float32 else 0)


def stage2(arch, batch):
    size, patch = arch.split("/")
    dit = DiT(DiTConfig(patch=int(patch), **DIT_SIZES[size])).to(device)
    backbone = Recogniser(FRConfig()).eval().requires_grad_(False)
    backbone.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(dit.parameters(), fused=True)
    x, landmarks = torch.randn(batch, 3, 112, 112, device=device), torch.rand(batch, 5, 2, device=device)
    w = torch.nn.functional.normalize(torch.randn(batch, 512, device=device))
    sigma2 = torch.full((512,), 1e-3, device=device)
    fast, fast_backbone = (torch.compile(dit), torch.compile(backbone)) if gpu else (dit, backbone)

    def step(fast=fast, fast_backbone=fast_backbone):
        with torch.autocast(device.type, torch.bfloat16):
            v_loss, identity_loss = dit_loss(fast, fast_backbone, x, w, landmarks, sigma2)
        (v_loss + 0.05 * identity_loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    name = f"stage 2, DiT-{arch} + identity loss, batch {batch}"
    line(name, batch, step, flops_of(lambda: step(dit, backbone)))

    def draw(steps, fast=fast, audit=False, interval=(0.0, 1.0)):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            images = to_uint8(dpm_solver(guided(fast, w, landmarks, 1.5, interval), x, steps))
        return embed(backbone, images, batch) if audit else images
    dit.eval().requires_grad_(False)
    all_the_time = (0.0, 1.0)
    runs = ((12, False, all_the_time), (20, False, all_the_time), (20, True, all_the_time),
            (20, True, (0.2, 0.8)), (50, False, all_the_time)) if gpu else ((1, True, all_the_time),)
    for steps, audit, interval in runs:
        one = seconds(lambda: draw(steps, audit=audit, interval=interval), warm=1, steps=1, runs=3)
        flops = flops_of(lambda: draw(steps, dit, audit, interval))
        name = f"sampling, DiT-{arch}, {steps} steps, guided in {interval}" + ", cosines" * audit
        print(f"{name:64s} {batch / one:8.1f} img/s  {one * 1000:8.1f} ms              "
              f"{flops / one / peak:6.1%} of the matrix product  {graphs}", flush=True)


if gpu:
    cl, nchw = torch.channels_last, torch.contiguous_format
    stage1("stage 1, eager fp32 NCHW, batch 256", 256, torch.float32, nchw, False, 0)
    stage1("stage 1, eager fp16 autocast NCHW, batch 256", 256, torch.float16, nchw, False, 0)
    stage1("stage 1, ours: bf16, channels_last, compile, batch 256", 256, torch.bfloat16, cl, True, 0)
    stage1("stage 1, ours, 120K virtual prototypes, batch 256", 256, torch.bfloat16, cl, True, 120_000)
    for arch in ("S/8", "B/8", "B/4"):
        stage2(arch, 256 if arch != "B/4" else 64)
else:
    cl, nchw = torch.channels_last, torch.contiguous_format
    stage1("stage 1, eager fp32 NCHW, batch 8", 8, torch.float32, nchw, False, 0)
    stage1("stage 1, ours but eager: bf16, channels_last, batch 8", 8, torch.bfloat16, cl, False, 0)
    stage1("stage 1, ours: bf16, channels_last, compile, batch 8", 8, torch.bfloat16, cl, True, 0)
    stage2("B/8", 8)
