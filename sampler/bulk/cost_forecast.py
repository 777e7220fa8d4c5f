"""A forecast of what a run will take, shown once its pace is known: images, attempts, time and disk space."""

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

LONG = 60.0  # seconds: if less is left to do, no forecast is shown


class Forecast:
    """Shows once, from the pace of the first steps, what the images that are left to make in `out` will take.

    Each is assumed to cost what the average job costs. kinds: number of jobs by kind. latents: whether images stay latents.
    """

    def __init__(self, plans: Plans, kinds: Mapping[Kind, int], latents: bool, out: Path, shown: Progress):
        self.plans, self.kinds, self.latents, self.out, self.shown = plans, kinds, latents, out, shown
        self._first: Kind | None = None  # of the first job, whose batch gives the first pace
        self._told = False

    def first_of(self, jobs: Iterable[Placed]) -> Iterator[Placed]:
        """Yield the jobs unchanged, and remember the kind of the first one, because the first pace is that of its batch."""
        for position, job in jobs:
            self._first = self._first or job.kind
            yield position, job

    def step(self) -> None:
        """Show the forecast as soon as the pace is known. Call this after every step, after `shown.moved`."""
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
        """Return the cost of a picture of this kind: network predictions times pixels."""
        return self.plans.calls(kind) * math.prod(self.plans.size(kind))
