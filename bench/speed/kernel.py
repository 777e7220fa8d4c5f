"""Time the launch after the network beside the chain of operators that it replaces and a copy of the same bytes.

Imports only torch and basinescape.kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from basinescape.kernels import backend, guide, step
from basinescape.kernels.definition import is_minimum
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from torch import Tensor

from ..tables import Row
from .timing import fitting, interleaved, left_out, summary, within_memory

SIZES = {"SD": (4, 64, 64), "SDXL": (4, 128, 128), "SD3": (16, 128, 128), "video": (16, 21, 60, 104)}
STEPS = 100_000  # more than any peer takes
BEFORE, AFTER = -2.0, 7.5
A, B, P, Q = 0.5, 0.25, 0.125, 0.0625  # contracting, so that any number of steps stays finite
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
BASELINE = "eager chain"
REPEATS = 20


@dataclass(frozen=True)
class Cases:
    """What is timed: names in SIZES, batches, dtypes; each peer for `least` seconds in each of `rounds` rounds. compiled: the
    sizes at which the compiled chain is timed, too; compiling takes long."""

    sizes: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    rounds: int
    least: float
    compiled: tuple[str, ...] = tuple(SIZES)


CASES = {
    "cpu": Cases(("SD", "SDXL"), (1, 4, 16), ("float32", "bfloat16"), 9, 0.01),
    "cuda": Cases(tuple(SIZES), (1, 4, 16, 64), ("float32", "float16", "bfloat16"), 15, 0.003),
    "quick": Cases(("video", "SD", "SDXL", "SD3"), (16, 1), ("float16",), 9, 0.003, ("SD",)),
}


@dataclass
class Work:
    """Peers that do equal work and return its results, and the bytes that the work must move."""

    peers: dict[str, Callable[[], Any]]
    moved: int


def chain(
    prediction: Tensor, latents: Tensor, history: Tensor, recent: Tensor, k: Tensor, transition: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step as a chain of PyTorch operators. As in a usual loop, coefficients and weights are numbers on the host.

    Returns the network's next input, the history, the noise gap and the transition.
    """
    uncond, cond = prediction.chunk(2)
    difference = cond - uncond
    gap = torch.linalg.vector_norm(difference.flatten(1), dim=1, dtype=torch.float32)
    before, last = recent.unbind(1)
    transition = torch.where(is_minimum(before, last, gap) & (transition < 0), k, transition)
    weight = torch.where(transition >= 0, AFTER, BEFORE).to(difference.dtype)
    guided = uncond + weight.view(-1, *[1] * (latents.ndim - 1)) * difference
    following = A * latents + B * guided + history
    return torch.cat([following, following]), P * latents + Q * guided, gap, transition


def guide_chain(prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Guidance and noise gap as PyTorch operators."""
    uncond, cond = prediction.chunk(2)
    difference = cond - uncond
    gap = torch.linalg.vector_norm(difference.flatten(1), dim=1, dtype=torch.float32)
    return uncond + weight.view(-1, *[1] * (uncond.ndim - 1)) * difference, gap


def compiled(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`call`, compiled by torch.compile with the fastest options for one shape."""
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return torch.compile(call, fullgraph=True, dynamic=False, mode=mode)


def step_work(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, compiles: bool = True) -> Work:
    """A step of a two-step solver in which every sample tests for its first minimum. compiles: include the compiled chain."""
    batch = shape[0]
    prediction, noise = _predictions(shape, dtype, device)
    table = table_of(STEPS, device)
    state = State.empty(shape, STEPS, dtype, device, multistep=True, scaled=False).start(noise, table)
    uncond, cond = prediction.chunk(2)
    # Every second sample has a minimum at the step before, so that both weights are used.
    recent = torch.tensor([[2e9, 1e9], [2e9, 1.0]], device=device).repeat(batch, 1)[:batch]
    state.transition.row.fill_(2)
    state.transition.gaps[:, :2] = recent
    state.transition.peak.copy_(recent[:, 0])
    state.put(noise, table)
    history = torch.zeros(shape, dtype=dtype, device=device)
    k, transition = torch.full((batch,), 2, device=device), torch.full((batch,), -1, device=device)
    operands = (prediction, noise, history, recent, k, transition)

    def fused() -> tuple[Tensor | None, ...]:
        step(uncond, cond, table, state)
        return state.latents.model_input, state.latents.history, state.transition.gaps[:, 2], state.transition.at

    numbers = noise.numel()
    moved = numbers * (5 * dtype.itemsize + 2 * 4)
    return _beside({"fused step": fused}, chain, operands, moved, device, compiles)


def _beside(
    ours: Mapping[str, Callable[[], Any]],
    chain: Callable[..., Any],
    operands: tuple[Tensor, ...],
    moved: int,
    device: torch.device,
    compiles: bool,
) -> Work:
    """The work of `ours` with its other peers: the chain, the compiled chain if it `compiles`, and a copy."""
    peers: dict[str, Callable[[], Any]] = {**ours, BASELINE: partial(chain, *operands)}
    if compiles:
        peers["compiled chain"] = partial(compiled(chain, device), *operands)
    return Work({**peers, "copy": _copy(moved, device)}, moved)


def table_of(steps: int, device: torch.device) -> Tensor:
    """A step table of equal rows, each of which may show the first minimum."""
    columns = torch.zeros((len(Column), steps))
    columns[: Column.TIMESTEP + 1] = torch.tensor([BEFORE, AFTER, A, B, P, Q, 1.0, 500.0])[:, None]
    columns[Column.STEP] = torch.arange(steps)
    columns[[Column.FIRST, Column.KEEP]] = 1
    columns[Column.LIMIT] = -torch.inf
    return columns.T.contiguous().to(device)


def guide_work(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, compiles: bool = True) -> Work:
    """Guidance and noise gap alone."""
    prediction, _ = _predictions(shape, dtype, device)
    uncond, cond = prediction.chunk(2)
    weight = torch.linspace(BEFORE, AFTER, shape[0], device=device).to(dtype)
    out = torch.empty_like(uncond), torch.empty(shape[0], device=device)
    moved = 3 * uncond.numel() * dtype.itemsize
    ours = {"guide": partial(guide, uncond, cond, weight, out=out)}
    return _beside(ours, guide_chain, (prediction, weight), moved, device, compiles)


WORKS = {"step": step_work, "guide": guide_work}


def _predictions(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    rng = torch.Generator(device).manual_seed(0)
    prediction = torch.randn((2 * shape[0], *shape[1:]), generator=rng, device=device).to(dtype)
    return prediction, torch.randn(shape, generator=rng, device=device).to(dtype)


def _copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """A call that reads half of the bytes and writes the other half."""
    source, target = torch.zeros((2, moved // 2), dtype=torch.uint8, device=device)
    return lambda: target.copy_(source)


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative distance (in the L2 norm) between corresponding results of two peers."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """REPEATS calls as one CUDA graph, which shows the device's time without the host's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    return graph.replay


@torch.inference_mode()
def kernel(device: torch.device, preset: str) -> Iterator[Row]:
    """Rows in microseconds. GB/s counts the bytes that the work must move; share is of the copy's bandwidth in the same case.

    A peer whose results differ from the eager chain's gets no ratio. Raises RuntimeError if kernels run in the interpreter.
    """
    if backend(device) == "triton-interpreter":
        raise RuntimeError("kernels are interpreted here, which is no measure of speed: unset TRITON_INTERPRET")
    cases = CASES[preset]
    for name, make in WORKS.items():
        for size in cases.sizes:
            for dtype in cases.dtypes:
                for batch in cases.batches:
                    what = {"bench": "kernel", "what": f"{name}, {size} x {batch}, {dtype}"}
                    work = partial(make, (batch, *SIZES[size]), getattr(torch, dtype), device, size in cases.compiled)
                    yield from within_memory(what, partial(_rows, what, work, TOLERANCE[dtype], device, cases))


def _rows(what: Row, make: Callable[[], Work], tolerance: float, device: torch.device, cases: Cases) -> Iterator[Row]:
    work = make()
    results = fitting({peer: partial(_cloned, call) for peer, call in work.peers.items() if peer != "copy"})
    calls = {peer: call for peer, call in work.peers.items() if peer in results or peer == "copy"}
    expected = results.get(BASELINE)
    apart = {peer: difference(result, expected) for peer, result in results.items() if expected is not None}
    for way, repeats in ({"called": 1, "captured": REPEATS} if device.type == "cuda" else {"called": 1}).items():
        if way == "captured":
            calls = fitting({peer: partial(captured, call) for peer, call in calls.items()})
        times = interleaved(calls, device, cases.rounds, cases.least)
        times = {peer: [1e6 * t / repeats for t in found] for peer, found in times.items()}
        copy = summary(times["copy"], None)["median"] if "copy" in times else None
        for peer in work.peers:
            one = {**what, "way": way, "peer": peer}
            if peer not in times:
                yield left_out(one)
                continue
            agrees = apart.get(peer, math.inf) <= tolerance
            row = summary(times[peer], times.get(BASELINE) if agrees else None)
            share = None if copy is None else copy / row["median"]
            rate = {"GB/s": work.moved / row["median"] / 1e3, "share": share, "apart": apart.get(peer)}
            yield {**one, "unit": "us", **row, **rate}


def _cloned(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(result.clone() for result in call())
