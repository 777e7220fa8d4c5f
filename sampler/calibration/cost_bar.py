"""A bar of progress over many samples, after a line that says what they will cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..guidance.guidance import Guidance
from ..runs.progress import FORMAT, duration
from ..sampler import Sampler

TIMED = 2  # steps that are timed, of one batch, after one to warm up
WORTH = 20  # times what timing costs: a shorter run is not timed


@dataclass(frozen=True)
class PlainRuns:
    """How many samples are made with plain guidance.

    steps, scale: of a whole run. size: samples a batch. progress: whether to show it.
    """

    sampler: Sampler
    steps: int
    scale: float
    size: int
    progress: bool

    def bar(self, what: str, unit: str, total: int, done: int, waiting: Sequence[str], steps: int | None = None) -> tqdm:
        """A bar of `what`, over `total` units of which so many are done, after a line on stderr with the samples to make.

        waiting: the prompts of these. steps: that are taken of each, from the first on; None: all.
        """
        if waiting and self.progress:
            tqdm.write(f"{what}: {self._cost(waiting, steps or self.steps)}", file=sys.stderr)
        return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", bar_format=FORMAT, disable=not self.progress)

    def _cost(self, prompts: Sequence[str], steps: int) -> str:
        taken = f"{steps} steps" if steps == self.steps else f"the first {steps} of {self.steps} steps"
        told, batch = f"{len(prompts):,} samples, {taken} each", prompts[: self.size]
        if len(prompts) * steps >= WORTH * (1 + TIMED) * len(batch):
            seconds = len(prompts) * steps * self._step(batch)
            told += f", about {duration(seconds)} on {self.sampler.model.device.type}"
        return told

    def _step(self, prompts: Sequence[str]) -> float:
        """Seconds a step and sample of one batch."""
        taken = min(TIMED, self.steps)
        for stop_after in (1, taken):
            start = self._now()
            how: dict[str, Any] = {"output": "latent", "progress": False, "batch_size": len(prompts), "stop_after": stop_after}
            self.sampler(prompts, 0, self.steps, Guidance.cfg(self.scale), **how)
        return (self._now() - start) / (taken * len(prompts))

    def _now(self) -> float:
        if self.sampler.model.device.type == "cuda":
            torch.cuda.synchronize(self.sampler.model.device)
        return time.perf_counter()
