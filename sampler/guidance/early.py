"""The early look of a guard: it gives up a plain attempt whose first noise gaps are hopeless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks


@dataclass(frozen=True)
class EarlyLook:
    """A plain attempt is hopeless if its first noise gaps are much larger than those of ordinary prompts.

    gap:    the usual noise gap of each step under plain guidance. timesteps: the steps' timesteps, in 0..1000.
    steps:  the number of first gaps that are compared.
    limit:  the attempt is hopeless if the mean of gap / usual gap over these steps is above this.

    Memorized prompts have large first gaps (Wen et al., ICLR 2024, https://arxiv.org/abs/2407.21720).
    """

    gap: tuple[float, ...]
    timesteps: tuple[float, ...]
    steps: int
    limit: float

    def __post_init__(self) -> None:
        for name in ("gap", "timesteps"):
            object.__setattr__(self, name, tuple(checks.finite(name, value) for value in getattr(self, name)))
        object.__setattr__(self, "limit", checks.finite("limit", self.limit))
        if not 1 <= checks.at_least_one("steps", self.steps) <= len(self.gap) or min(self.gap) <= 0:
            raise ValueError(f"gap must be above 0 in each of {self.steps} steps or more, got {self.gap}")

    def hopeless(self, gaps: Tensor) -> bool:
        """Whether an attempt with these gaps (steps,) is hopeless. True if a compared gap is NaN."""
        return not bool((gaps[: self.steps] / torch.tensor(self.gap[: self.steps])).mean() <= self.limit)

    def suits(self, timesteps: Sequence[float]) -> bool:
        """Whether it was measured on as many steps, at these timesteps (within 1)."""
        return len(self.gap) == len(timesteps) and all(abs(a - b) <= 1 for a, b in zip(self.timesteps, timesteps, strict=True))
