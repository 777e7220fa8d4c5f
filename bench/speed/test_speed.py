"""Time the launch and the loop with pytest-benchmark: python -m pytest bench/speed/test_speed.py. Not part of the tests."""

import pytest
import torch
from basinescape.kernels import backend

from . import kernel, step
from .shapes import pipeline

CPU = torch.device("cpu")
PEERS = {"step": ("fused step", "eager chain", "compiled chain", "copy"), "guide": ("guide", "eager chain", "compiled chain")}


@pytest.fixture(scope="module", autouse=True)
def not_interpreted():
    if backend(CPU) == "triton-interpreter":
        pytest.skip("TRITON_INTERPRET is set")


@pytest.mark.parametrize("dtype", kernel.CASES["cpu"].dtypes)
@pytest.mark.parametrize("size", kernel.CASES["cpu"].sizes)
@pytest.mark.parametrize(("work", "peer"), [(work, peer) for work, peers in PEERS.items() for peer in peers])
def test_kernel(benchmark, work, peer, size, dtype):
    benchmark.group = f"{work}, {size} x 4, {dtype}"
    with torch.inference_mode():
        call = kernel.WORKS[work]((4, *kernel.SIZES[size]), getattr(torch, dtype), CPU).peers[peer]
        call()
        benchmark(call)


@pytest.fixture(scope="module")
def stubbed():
    pipe = pipeline("tiny", torch.float32, CPU)
    with step.stubbed(pipe):
        yield pipe


@pytest.mark.parametrize("peer", ["ours", "ours, first minimum", "diffusers", "published style"])
@pytest.mark.parametrize("scheduler", step.CASES["cpu"].schedulers)
def test_step(benchmark, stubbed, scheduler, peer):
    benchmark.group = f"{step.LONG} steps of {scheduler}, batch 4"
    call, _ = step.peers(stubbed, scheduler, 64, 4)[peer]
    call(step.LONG)
    benchmark(call, step.LONG)
