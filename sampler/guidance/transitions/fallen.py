"""A transition at the step where the noise gap has fallen below a share of its largest value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ... import checks
from .base import Criterion, Transition, until_deadline


@dataclass(frozen=True)
class Fallen(Transition):
    """The transition is the first step whose noise gap is below `share` times the largest one before it, per sample.

    share:  above 0 and at most 1.
    latest: a deadline: a sample without a transition before this step has it here. None: no deadline.

    Raises ValueError for anything else.
    """

    share: float = 0.5
    latest: int | None = None

    word = "fallen"
    label = "noise gap has halved"
    earliest_step = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", checks.finite("share", self.share))
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share:g}")
        if self.latest is not None:
            object.__setattr__(self, "latest", checks.at_least("latest", self.latest, 1))

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        """The same criterion at each step. It cannot hold at the first, which has no gap before it."""
        return until_deadline(Criterion(fall=self.share), levels, self.latest)
