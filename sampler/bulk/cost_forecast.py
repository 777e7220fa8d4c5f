"""What a run will take, told once its pace is known: images, attempts, time and room on the disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from ..data.prompts import Kind
from ..guidance.guard import Guard
from ..runs.progress import Progress, duration
from .job_order import Placed
from .job_plans import Plans

LONG = 60.0  # seconds of a run that is worth a forecast


class Forecast:
    """Tells `shown` once, by the pace of the first steps, what the images that are left in `out` will take.

    They are taken to be what the jobs of all `kinds` are on average. latents: images are kept as latents.
    """

    def __init__(self, plans: Plans, kinds: Mapping[Kind, int], latents: bool, out: Path, shown: Progress):
        self.plans, self.kinds, self.latents, self.out, self.shown = plans, kinds, latents, out, shown
        self._first: Kind | None = None  # of the batch whose pace is known first
        self._told = False

    def first_of(self, jobs: Iterable[Placed]) -> Iterator[Placed]:
        """The same jobs; the first of them is of the batch whose pace is known first."""
        for position, job in jobs:
            self._first = self._first or job.kind
            yield position, job

    def step(self) -> None:
        """To be told after every step that `shown` was told of."""
        summary, count = self.shown.summary, sum(self.kinds.values())
        if self._told or not summary.pace or self._first is None:
            return
        self._told, left, first = True, summary.total - summary.before, self._work(self._first)
        mean = sum(n * self._work(kind) for kind, n in self.kinds.items()) / count
        took = (left * mean / first - summary.made) / summary.pace
        if took < LONG:
            return
        size = left / count * sum(n * self.plans.bytes(kind, self.latents) for kind, n in self.kinds.items())
        again = any(isinstance(self.plans.guidance(kind), Guard) for kind in self.kinds)
        attempts = f"{left:,} attempts" + (", and more for what looks like a copy" if again else "")
        free = shutil.disk_usage(self.out).free
        room = f"at most {tqdm.format_sizeof(size, 'B')} of {tqdm.format_sizeof(free, 'B')} free"
        self.shown.tell(
            "expected",
            f"{left:,} images to make: {attempts}; about {duration(took)}; {room}",
            {"images": left, "attempts": left, "seconds": round(took), "bytes": round(size), "free": free},
        )

    def _work(self, kind: Kind) -> int:
        """Of a picture, in pixels that the network predicts."""
        return self.plans.calls(kind) * math.prod(self.plans.size(kind))
