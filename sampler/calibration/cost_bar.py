"""A progress bar over many samples, after a line that estimates their cost."""

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

TIMED = 2  # the steps of one batch that are timed, after one step to warm up
WORTH = 20  # a run that takes less than so many times the timing is not timed


@dataclass(frozen=True)
class PlainRuns:
    """The settings of many samples that are made with plain guidance.

    steps, scale: the settings of a whole sample. size: samples in a batch. progress: whether to show progress.

    Raises ValueError for scale 0 or 1, at which a step makes only one prediction, so that there is no noise gap.
    """

    sampler: Sampler
    steps: int
    scale: float
    size: int
    progress: bool

    def __post_init__(self) -> None:
        if self.scale in (0, 1):
            raise ValueError(
                f"scale is {self.scale:g}, at which one prediction alone is made, so there are no noise gaps to measure"
            )

    def bar(self, what: str, unit: str, total: int, done: int, waiting: Sequence[str], steps: int | None = None) -> tqdm:
        """Return a bar named `what` over `total` units, of which `done` are finished. First writes the expected cost to stderr.

        waiting: the prompts of the samples to make. steps: how many first steps each sample takes; None: all.
        """
        if waiting and self.progress:
            tqdm.write(f"{what}: {self._cost(waiting, steps or self.steps)}", file=sys.stderr)
        return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", bar_format=FORMAT, disable=not self.progress)

    def _cost(self, prompts: Sequence[str], steps: int) -> str:
        taken = f"{steps} steps" if steps == self.steps else f"the first {steps} of {self.steps} steps"
        text, batch = f"{len(prompts):,} samples, {taken} each", prompts[: self.size]
        if len(prompts) * steps >= WORTH * (1 + TIMED) * len(batch):
            seconds = len(prompts) * steps * self._step(batch)
            text += f", about {duration(seconds)} on {self.sampler.model.device.type}"
        return text

    def _step(self, prompts: Sequence[str]) -> float:
        """Measure the seconds that one step of one sample takes in a batch."""
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
