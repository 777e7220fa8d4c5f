"""The dynamic transition of the paper: the first local minimum of the noise gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ... import checks
from .base import NEVER, Criterion, Transition, until_deadline


@dataclass(frozen=True)
class FirstMinimum(Transition):
    """The transition is the first local minimum of the noise gap d, per sample (the paper's dynamic transition point).

    Step k is the transition if d[k-2] > d[k-1] < d[k], strictly. Step k itself already has the weight after the transition.
    The defaults are the paper's rule.

    earliest: the first step that may be the transition, at least 2.
    latest:   a deadline: a sample without a transition before this step has it here. None: no deadline.
    drop:     required depth of the minimum, against noise: d[k-1] <= (1 - drop) * max(d[0..k-1]), with 0 <= drop < 1.

    Raises ValueError for anything else.
    """

    earliest: int = 2
    latest: int | None = None
    drop: float = 0.0

    word = "auto"
    label = "first minimum of the noise gap"
    earliest_step = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "earliest", checks.at_least("earliest", self.earliest, 2))
        if self.latest is not None:
            object.__setattr__(self, "latest", checks.at_least("latest", self.latest, self.earliest))
        object.__setattr__(self, "drop", checks.finite("drop", self.drop))
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be at least 0 and below 1, got {self.drop:g}")

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        """No transition before `earliest`."""
        steps = until_deadline(Criterion(keep=1 - self.drop), levels, self.latest)
        return [NEVER if k < self.earliest else step for k, step in enumerate(steps)]

    def __repr__(self) -> str:
        given = {"earliest": self.earliest, "latest": self.latest, "drop": self.drop}
        shown = (f"{name}={value:g}" for name, value in given.items() if value != getattr(FirstMinimum, name))
        return f"FirstMinimum({', '.join(shown)})"
