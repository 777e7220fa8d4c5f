"""Peers timed round robin, what the profiler sees of a call, and rows of what came out. Needs torch alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from basinescape.runs.environment import environment
from torch.autograd import profiler

from ..tables import Row

Peer = TypeVar("Peer")


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """What one of `calls` calls takes from the first to the last kernel: CUDA events on a GPU, a clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def interleaved(
    peers: Mapping[Peer, Callable[[], object]], device: torch.device, rounds: int, least: float = 0.0
) -> dict[Peer, list[float]]:
    """Seconds of each peer in each round, one after another in every round; a peer is repeated for `least` seconds.

    Everything was called before, so that nothing is compiled here.
    """
    calls = {name: max(1, round(least / max(seconds(call, device), 1e-9))) for name, call in peers.items()}
    times: dict[Peer, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, call in peers.items():
            times[name].append(seconds(call, device, calls[name]))
    return times


def profiled(call: Callable[[], object], device: torch.device) -> Sequence[Any]:
    """What the profiler sees of a call: operators, functions of CUDA's and, on a GPU, what runs there."""
    cuda = device.type == "cuda"
    with profiler.profile(use_device="cuda" if cuda else None, use_kineto=cuda) as profile:
        call()
        if cuda:
            torch.cuda.synchronize()
    return profile.function_events


def summary(times: Sequence[float], baseline: Sequence[float] | None) -> Row:
    """median and spread (interquartile range) of `times`, and ratio: how many times as fast as `baseline`.

    The ratio is the median over the rounds, each against the baseline of its own round; None without a baseline.
    """
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    ratio = None if baseline is None else statistics.median(b / t for b, t in zip(baseline, times, strict=True))
    return {"median": middle, "spread": high - low, "ratio": ratio}


def taken(device: torch.device) -> Row:
    """Where and when figures were taken."""
    return {**environment(device), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
