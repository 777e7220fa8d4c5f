"""Samples, and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.state import State
from ..models import PromptedNetwork
from ..types import draw
from .attempt_table import AttemptTable


@dataclass(eq=False)
class Sample:
    """One sample to make, which the caller knows by `key`.

    attempt_table:  its attempts. shape: the shape of its latents, (C, h, w).
    network, row: the network whose inputs hold the encoded prompt, and the row there.
    seed:    the seed of `generator`, from which all its noise comes.
    initial: draws initial noise (1, C, h, w) from generators; some models pack it. None: normal noise of `shape`.
    generator: the sample's own. noise: (C, h, w), the initial noise, if the generator has drawn it already; else None.
    attempt: the attempt it begins with. calls: the predictions that its earlier attempts needed.
    """

    key: Any
    attempt_table: AttemptTable
    shape: tuple[int, ...]
    network: PromptedNetwork
    row: int
    seed: int = 0
    initial: Callable[[Sequence[torch.Generator]], Tensor] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    noise: Tensor | None = None
    attempt: int = 0
    calls: int = 0

    @property
    def form(self) -> tuple:
        """What all samples of a batch share. If steps can be captured, samples of different statistic rules share no batch."""
        plan, version = self.attempt_table.plan, self.network.version
        own = version is not None and plan.statistics.rules
        return self.shape, self.network.row_form, id(version), plan.rule, plan.scaled, own

    def begin(self) -> Tensor:
        """The initial noise (C, h, w)."""
        if self.attempt:
            return self.draw()
        if self.noise is not None:
            return self.noise
        self.generator.manual_seed(self.seed)
        return self.draw()

    def draw(self) -> Tensor:
        """Draw the next initial noise (C, h, w) from the generator."""
        drawn = draw(self.shape, [self.generator]) if self.initial is None else self.initial([self.generator])
        return drawn[0] * self.attempt_table.solver.init_sigma


@dataclass(eq=False)
class Result:
    """The result of one sample.

    latents: (C, h, w). transition: () int64, -1 for none. gaps: (steps,) float32, NaN where none was needed.
    attempts, score, suspect: a guard's attempts, basin score and verdict; None without a guard. calls: predictions that the
        sample itself needed. error: why it failed, else None. If it failed, latents and gaps are empty.
    """

    sample: Sample
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    transition: Tensor = field(default_factory=lambda: torch.tensor(-1))
    gaps: Tensor = field(default_factory=lambda: torch.empty(0))
    attempts: int | None = None
    score: float | None = None
    suspect: bool | None = None
    calls: int = 0
    error: Exception | None = None


@dataclass(frozen=True)
class Results:
    """The results of a batch of B samples over K solver steps.

    latents: (B, ...). transition: (B,) int64, -1 for none within the steps. gaps: (B, K) float32. Under a guard, they are
        those of each sample's last attempt. attempts, calls: (B,) int64, score: (B,) float32, suspect: (B,) bool, all on the
        CPU, as in `Output`; None without a guard.
    """

    latents: Tensor
    transition: Tensor
    gaps: Tensor
    attempts: Tensor | None = None
    score: Tensor | None = None
    suspect: Tensor | None = None
    calls: Tensor | None = None

    @classmethod
    def of(cls, state: State, steps: int) -> Results:
        """Return the results of a batch that has taken its steps. They share the memory of `state`."""
        return cls(state.latents.x, state.transition.within(steps), state.transition.gaps)

    @classmethod
    def gathered(cls, results: Iterable[Result]) -> Results:
        """Join a guard's results, given in any order, in the order of their keys 0, 1, ..."""
        ordered = sorted(results, key=lambda result: result.sample.key)

        def column(name: str) -> list[Any]:
            return [getattr(result, name) for result in ordered]

        latents, transition, gaps = (torch.stack(column(name)) for name in ("latents", "transition", "gaps"))
        judged = (torch.tensor(column(name)) for name in ("attempts", "score", "suspect", "calls"))
        return cls(latents, transition, gaps, *judged)
