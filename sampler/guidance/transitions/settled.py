"""A transition that compares the noise gap with that of ordinary prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ... import checks
from .base import Calibrated, Criterion, Transition


@dataclass(frozen=True)
class Settled(Transition):
    """The transition comes `wait` steps after the noise gap has fallen to that of ordinary prompts. A rule of this project.

    ordinary: the usual gap of each step under the weight before the transition: the median over prompts known not to be
              memorized, for this model, scheduler and number of steps (`basinescape analyze` measures it). Nothing says which
              these were, and only another number of steps is refused: on another model or scheduler the transition comes
              too early, or late, without a warning. `calibration.fitted(sampler, steps).settled()` fits the gaps to the
              steps, and warns of another model.
    factor:   a sample has settled at the first step whose gap is at most `factor` times the ordinary one.
    wait:     steps from there to the transition.
    latest:   a deadline: a sample without a transition before this step has it here. None: no deadline.

    Raises ValueError for anything else.
    """

    ordinary: tuple[float, ...]
    factor: float = 1.5
    wait: int = 0
    latest: int | None = None

    word = "settled"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordinary", tuple(checks.finite("ordinary", gap) for gap in self.ordinary))
        object.__setattr__(self, "factor", checks.finite("factor", self.factor))
        if self.factor <= 0:
            raise ValueError(f"factor must be above 0, got {self.factor:g}")
        object.__setattr__(self, "wait", checks.at_least("wait", self.wait, 0))
        if self.latest is not None:
            object.__setattr__(self, "latest", checks.at_least("latest", self.latest, self.wait))

    @classmethod
    def over(cls, ordinary: Sequence[float], factor: float = 1.5, wait: float = 0.16, latest: float = 0.48) -> Settled:
        """Make the rule with wait and latest as shares of the steps. Defaults: from a small pipeline, see bench/RESULTS.md."""
        steps = len(ordinary)
        return cls(tuple(ordinary), factor, round(wait * steps), max(round(latest * steps), round(wait * steps)))

    @classmethod
    def asked(cls, calibration: Calibrated | None = None, **given: Any) -> Transition:
        """Make the rule with the gaps that a calibration measured. Raises ValueError without a calibration, and for options."""
        if calibration is None:
            raise ValueError(
                "until 'settled' needs a calibration, which `basinescape calibrate --settled` makes, and the model has none"
            )
        unfit = [name for name, value in given.items() if value is not None]
        if unfit:
            raise ValueError(f"until 'settled' is as calibrated, and takes no {' or '.join(unfit)}")
        return calibration.settled()

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        """Raises ValueError if `ordinary` has another number of steps."""
        if len(self.ordinary) != len(levels):
            raise ValueError(f"ordinary has {len(self.ordinary)} gaps, but the sampler takes {len(levels)} steps")
        limits = [self.factor * gap for gap in self.ordinary]
        if self.latest is not None:
            limits[self.latest - self.wait :] = [math.inf] * len(limits[self.latest - self.wait :])
        return [Criterion(limit=limit, wait=self.wait) for limit in limits]
