"""Time peers in turns, profile a call, and summarise times as rows. Needs torch only."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from basinescape.runs.environment import environment
from torch.autograd import profiler

from ..tables import Row

Peer = TypeVar("Peer")
Made = TypeVar("Made")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the GPU's memory ran out, as torch, CUDA and Triton say it, in `error` or in one that it came of."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def fitting(calls: dict[Peer, Callable[[], Made]]) -> dict[Peer, Made]:
    """What each call returns. One that runs out of the GPU's memory is taken out of `calls`, with what it holds."""
    made = {}
    for peer in list(calls):
        try:
            made[peer] = calls[peer]()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            del calls[peer]
        if peer not in calls:  # the error is gone, and with it the frames that it kept
            free()
    return made


def within_memory(what: Row, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows of one case; what it runs out of memory before is one row, `what` with the reason."""
    free()
    try:
        yield from rows()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        yield left_out(what)


def left_out(what: Row) -> Row:
    """The row of what does not fit into the GPU's memory."""
    return {**what, "left out": "not enough memory"}


def free() -> None:
    """Give back the memory that nobody uses."""
    gc.collect()
    torch.cuda.empty_cache()


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

    Everything was called before, so that nothing is compiled here. A peer that runs out of memory is left out.
    """
    once = fitting({name: partial(seconds, call, device) for name, call in peers.items()})
    calls = {name: max(1, round(least / max(took, 1e-9))) for name, took in once.items()}
    times: dict[Peer, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        found = fitting({name: partial(seconds, peers[name], device, calls[name]) for name in times})
        times = {name: [*times[name], took] for name, took in found.items()}
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


def rated(what: Row, peers: Iterable[str], count: int, times: Mapping[str, Sequence[float]], baseline: str) -> Iterator[Row]:
    """Rows in images a second of peers that make `count` each time; those without times are left out."""
    for peer in peers:
        one = {**what, "peer": peer}
        if peer not in times:
            yield left_out(one)
            continue
        rates = summary([count / t for t in times[peer]], None)
        yield {**one, "unit": "images/s", **rates, "ratio": summary(times[peer], times.get(baseline))["ratio"]}


def taken(device: torch.device) -> Row:
    """Where and when figures were taken: device, versions, number of threads, date."""
    return {**environment(device), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
