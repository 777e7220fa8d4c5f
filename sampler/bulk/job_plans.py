"""Turns each job of a run into its size, its step table and the number of network calls."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.prompts import Job, Kind
from ..guidance.guard import Guard
from ..guidance.guidance import Guidance
from ..models import memory
from ..models.fingerprint import digest, fingerprint
from ..sampler import Sampler
from ..sampling.attempt_table import AttemptTable
from ..sampling.cuda_graphs import no_capture
from .settings import Recipe

Size = tuple[int, int]


class Plans:
    """Makes the attempt table, the size and the cost of each kind of job.

    A guard's early look is calibrated for the run's steps, scale and size. Jobs with others have no early look.
    """

    def __init__(self, sampler: Sampler, recipe: Recipe, model: str):
        """model: how a picture's file and manifest line name the sampler's model; a folder is named without its path."""
        self.sampler, self.recipe, self.model = sampler, recipe, model
        self._made: dict[Kind, AttemptTable] = {}
        self._facts = {
            "scheduler": type(sampler.scheduler).__name__,
            "model": Path(model).resolve().name if Path(model).is_dir() else model,
            "fingerprint": digest(fingerprint(sampler.pipe)),
            "versions": sampler.provenance["versions"],
        }

    def facts(self, job: Job) -> dict[str, Any]:
        """Return the fields of a manifest line that say how the job's picture is made."""
        kind, (height, width), guidance = job.kind, self.size(job.kind), self.guidance(job.kind)
        own = {"steps": kind.steps or self.recipe.steps, "scale": guidance.scale, "guidance": _name(guidance)}
        return own | {"height": height, "width": width} | self._facts

    def guidance(self, kind: Kind) -> Guidance | Guard:
        """Return the guidance of a kind, at its own scale. Raises ValueError for a name that the run has no guidance of."""
        guidance = self.recipe.guidance_of(kind.guidance)
        return guidance if kind.scale in (None, guidance.scale) else guidance.scaled(kind.scale)

    def size(self, kind: Kind) -> Size:
        """(height, width) in pixels. Raises ValueError for a size that the model cannot make."""
        return self.sampler.size(kind.height, kind.width)

    def of(self, kind: Kind) -> AttemptTable:
        """Return the attempt table of a kind. Raises ValueError for steps, a scale, a size or a guidance that do not fit.

        A size also does not fit if no memory holds its picture; see `memory.check`.
        """
        if kind not in self._made:
            self._made[kind] = self._of(kind)
        return self._made[kind]

    def _of(self, kind: Kind) -> AttemptTable:
        guidance, own = self.guidance(kind), self.recipe.steps
        steps, size = kind.steps or own, self.size(kind)
        memory.check(self.sampler.model, *size, **self.sampler.options)
        if isinstance(guidance, Guard) and (steps, size) != (own, self.sampler.size()):
            guidance = replace(guidance, early=None)
        solver, model = self.sampler.solver(steps, *size), self.sampler.model
        with no_capture():
            return AttemptTable.make(solver, guidance, model.device, model.correction)

    def calls(self, kind: Kind) -> int:
        """Return the network predictions that a first attempt takes, including those that judge its picture."""
        attempt_table = self.of(kind)
        needed = sum(2 if branch == "both" else 1 for branch in attempt_table.plan.branches[: attempt_table.starts[1]])
        return needed + (2 * attempt_table.guard.attempts[0].probes if attempt_table.guard else 0)

    def bytes(self, kind: Kind, latents: bool) -> int:
        """Return an upper bound of a picture file's bytes: 3 per pixel of each frame, or 4 per value of its latents."""
        (height, width), options = self.size(kind), self.sampler.options
        if latents:
            return 4 * math.prod(self.sampler.model.shape(height, width, **options))
        return memory.values(self.sampler.model, height, width, **options)


def _name(guidance: Guidance | Guard) -> str:
    """Return the name by which a job asks for such guidance; see `data.prompts.GUIDANCES`."""
    if isinstance(guidance, Guard):
        return "guard"
    if guidance.until is None:
        return "cfg"
    return "opposite" if guidance.before < 0 else "delayed"
