"""What each job of a run comes to: its size, its steps and the guidance over them; and how many calls of the network."""

from __future__ import annotations

import math
from dataclasses import replace

from ..data.prompts import Job, Kind
from ..guidance.guard import Guard
from ..sampler import Sampler
from ..sampling.ladder import Ladder
from .settings import Recipe

Size = tuple[int, int]


class Plans:
    """The guidance over the sampler's steps, for jobs of every kind.

    A guard's early look is calibrated for the run's steps, scale and size: jobs that have others go without it.
    """

    def __init__(self, sampler: Sampler, recipe: Recipe):
        self.sampler, self.recipe = sampler, recipe
        self._made: dict[Kind, Ladder] = {}

    def size(self, kind: Kind) -> Size:
        """(height, width) in pixels. Raises ValueError for a size that the model cannot make."""
        return self.sampler.size(kind.height, kind.width)

    def of(self, kind: Kind) -> Ladder:
        """Raises ValueError for steps, a scale, a size or a guidance that do not fit."""
        if kind not in self._made:
            self._made[kind] = self._of(kind)
        return self._made[kind]

    def _of(self, kind: Kind) -> Ladder:
        guidance, own = self.recipe.guidance_of(kind.guidance), self.recipe.steps
        if kind.scale is not None and kind.scale != guidance.scale:
            guidance = guidance.scaled(kind.scale)
        steps, size = kind.steps or own, self.size(kind)
        if isinstance(guidance, Guard) and (steps, size) != (own, self.sampler.size()):
            guidance = replace(guidance, early=None)
        solver, model = self.sampler.solver(steps, *size), self.sampler.model
        return Ladder.make(solver, guidance, model.device, model.settle)

    def size_of(self, job: Job) -> Size:
        return self.size(job.kind)

    def ladder_of(self, job: Job) -> Ladder:
        return self.of(job.kind)

    def calls(self, kind: Kind) -> int:
        """The network's calls that a first attempt takes, the judging of its picture included."""
        ladder = self.of(kind)
        needed = sum(2 if branch == "both" else 1 for branch in ladder.whole.branches[: ladder.starts[1]])
        return needed + (2 * ladder.guard.attempts[0].probes if ladder.guard else 0)

    def bytes(self, kind: Kind, latents: bool) -> int:
        """At most what the file of a picture takes: 3 bytes a pixel of each frame, or 4 a number of its latents."""
        (height, width), options = self.size(kind), self.sampler.options
        if latents:
            return 4 * math.prod(self.sampler.model.shape(height, width, **options))
        frames = options.get("num_frames", getattr(self.sampler.model, "frames", 1))
        return 3 * height * width * frames
