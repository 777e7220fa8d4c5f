"""What a run will take, told after its first measured step: images, attempts, time and room on the disk."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..data.prompts import Kind
from ..guidance.guard import Guard
from ..runs.progress import Progress, duration
from .part import Placed
from .plans import Plans

LONG = 60.0  # seconds of a run that is worth a forecast
WARM = 1  # steps that are not measured: the first one sets things up


class Forecast:
    """Tells `shown` once, after the first measured step, what `left` images in `out` will take.

    They are taken to be what the jobs of all `kinds` are on average. latents: images are kept as latents.
    """

    def __init__(self, plans: Plans, kinds: Mapping[Kind, int], latents: bool, out: Path, shown: Progress):
        self.plans, self.kinds, self.latents, self.out, self.shown = plans, kinds, latents, out, shown
        self.left = 0
        self._pixels = 0  # of a picture of the batch that is measured
        self._steps, self._calls, self._time = 0, 0, 0.0

    def first_of(self, jobs: Iterable[Placed]) -> Iterator[Placed]:
        """The same jobs; the first of them is of the batch that is measured."""
        for position, job in jobs:
            self._pixels = self._pixels or math.prod(self.plans.size_of(job))
            yield position, job

    def step(self, calls: Counter[str]) -> None:
        """To be told before every step, with the network's calls so far."""
        if self._steps > WARM + 1:
            return
        now, made = time.monotonic(), sum(count for kind, count in calls.items() if kind != "spared")
        if self._steps == WARM + 1 and made > self._calls:
            self._tell((now - self._time) / (made - self._calls) / self._pixels)
        self._steps, self._time, self._calls = self._steps + 1, now, made

    def _tell(self, seconds: float) -> None:
        """seconds: of a call of the network for a pixel."""
        share = self.left / sum(self.kinds.values())
        pixels = {kind: math.prod(self.plans.size(kind)) for kind in self.kinds}
        work = sum(count * pixels[kind] * self.plans.calls(kind) for kind, count in self.kinds.items())
        if (took := seconds * work * share) < LONG:
            return
        size = share * sum(count * self.plans.bytes(kind, self.latents) for kind, count in self.kinds.items())
        again = any(isinstance(self.plans.recipe.guidance_of(kind.guidance), Guard) for kind in self.kinds)
        attempts = f"{self.left:,} attempts" + (", and more for what looks like a copy" if again else "")
        free = shutil.disk_usage(self.out).free
        self.shown.tell(
            f"{self.left:,} images to make: {attempts}; about {duration(took)}; at most {_human(size)} of {_human(free)} free",
            {"images": self.left, "attempts": self.left, "seconds": round(took), "bytes": round(size), "free": free},
        )


def _human(size: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
