"""What a run over many prompts will cost, told before it starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..guidance.guidance import Guidance
from ..sampler import Sampler

TIMED = 2  # steps that are timed, of one batch, after one to warm up
WORTH = 20  # times what timing costs: a shorter run is not timed


def announce(
    what: str, sampler: Sampler, prompts: Sequence[str], samples: int, steps: int, of: int, scale: float, size: int
) -> None:
    """Write to stderr how many samples there are to make, of how many steps, and about how long that takes.

    what: names the samples. prompts: theirs. steps: that are taken of each, in a run of `of`. size: samples a batch.
    """
    batch = min(size, samples)
    told = f"{samples:,} {what}, {f'{steps} steps' if steps == of else f'the first {steps} of {of} steps'} each"
    if samples * steps >= WORTH * (1 + TIMED) * batch:
        step = _a_step(sampler, [prompts[i % len(prompts)] for i in range(batch)], of, scale)
        told += f": about {_duration(samples * steps * step)} on {sampler.model.device.type}"
    tqdm.write(told, file=sys.stderr)


def _a_step(sampler: Sampler, prompts: Sequence[str], of: int, scale: float) -> float:
    """Seconds a step and sample of one batch."""
    taken = min(TIMED, of)
    for stop_after in (1, taken):
        start = _now(sampler)
        how: dict[str, Any] = {"output": "latent", "progress": False, "batch_size": len(prompts), "stop_after": stop_after}
        sampler(prompts, 0, of, Guidance.cfg(scale), **how)
    return (_now(sampler) - start) / (taken * len(prompts))


def _now(sampler: Sampler) -> float:
    if sampler.model.device.type == "cuda":
        torch.cuda.synchronize(sampler.model.device)
    return time.perf_counter()


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
