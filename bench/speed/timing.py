"""Time peers in turns, profile a call, and summarise times as rows. Needs torch only."""

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
    """The mean time of `calls` calls: from the first to the last kernel by CUDA events on a GPU, by a clock elsewhere."""
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
    """{peer: seconds of a call in each round}. A round times the peers one after another, each for about `least` seconds.

    Call every peer once before, so that no compilation is timed.
    """
    calls = {name: max(1, round(least / max(seconds(call, device), 1e-9))) for name, call in peers.items()}
    times: dict[Peer, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, call in peers.items():
            times[name].append(seconds(call, device, calls[name]))
    return times


def profiled(call: Callable[[], object], device: torch.device) -> Sequence[Any]:
    """The profiler's events of a call: operators and, on a GPU, functions of CUDA and kernels."""
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
    """Where and when figures were taken: device, versions, number of threads, date."""
    return {**environment(device), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
