"""What a run over many prompts will cost, told before it starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..guidance.guidance import Guidance
from ..sampler import Sampler

TIMED = 2  # steps


def announce(
    what: str, sampler: Sampler, prompts: Sequence[str], samples: int, steps: int, of: int, scale: float, size: int
) -> None:
    """Write to stderr how many samples there are to make, of how many steps, and about how long that takes.

    The time is measured, on the first steps of one batch. what: names the samples. steps: taken of each, `of` a run of so many.
    size: samples a batch.
    """
    seconds = samples * steps * _a_step(sampler, [prompts[i % len(prompts)] for i in range(min(size, samples))], of, scale)
    taken = f"{steps} steps" if steps == of else f"the first {steps} of {of} steps"
    tqdm.write(f"{samples:,} {what}, {taken} each: about {_duration(seconds)} on {sampler.model.device.type}", file=sys.stderr)


def _a_step(sampler: Sampler, prompts: Sequence[str], of: int, scale: float) -> float:
    """Seconds a step and sample of a batch, of the first steps; the batch is run once before, to warm up."""
    taken = min(TIMED, of)
    for stop_after in (1, taken):
        start = _now(sampler)
        sampler(
            prompts, 0, of, Guidance.cfg(scale), output="latent", progress=False, batch_size=len(prompts), stop_after=stop_after
        )
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
