"""What is sampled, and what comes of it."""

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
    """What is to be sampled, under the caller's `key`.

    attempt_table:  its attempts. shape: of its latents (C, h, w).
    network, row: its encoded prompt is this row of the network's inputs.
    seed:    of its own generator, from which all its noise comes.
    initial: draws initial noise (1, C, h, w) from generators; None: normal noise of its shape. Some models pack theirs.
    generator: the one with that seed. noise: (C, h, w), the initial noise where the generator has drawn it already.
    attempt: the one it begins with. calls: the predictions that the attempts before that needed.
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
        """What samples of one batch have in common. Rules that recorded steps do not know have batches of their own there."""
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
        """The next initial noise (C, h, w) of its generator."""
        drawn = draw(self.shape, [self.generator]) if self.initial is None else self.initial([self.generator])
        return drawn[0] * self.attempt_table.solver.init_sigma


@dataclass(eq=False)
class Result:
    """What came of a sample.

    latents (C, h, w); transition () int64, -1 for none; gaps (steps,) float32, NaN where none was needed.
    attempts, score (the basin score), suspect: a guard's; None without one. calls: predictions that the sample needed, whatever
    the others of its batch did. error: why it failed; the tensors are empty then.
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
    """What came of a batch of B samples over K solver steps.

    latents (B, ...), transition (B,) int64, -1 for none within the steps, gaps (B, K) float32. Under a guard those of each
    sample's last attempt, and on the CPU attempts (B,) int64, score (B,) float32 the basin score, suspect (B,) bool, calls (B,)
    int64 the predictions it needed; None without one.
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
        """Of a batch that has taken its steps, in the memory of its state."""
        return cls(state.latents.x, state.transition.within(steps), state.transition.gaps)

    @classmethod
    def gathered(cls, results: Iterable[Result]) -> Results:
        """Of a guard's samples whose keys are 0, 1, ...; in any order."""
        ordered = sorted(results, key=lambda result: result.sample.key)

        def column(name: str) -> list[Any]:
            return [getattr(result, name) for result in ordered]

        latents, transition, gaps = (torch.stack(column(name)) for name in ("latents", "transition", "gaps"))
        judged = (torch.tensor(column(name)) for name in ("attempts", "score", "suspect", "calls"))
        return cls(latents, transition, gaps, *judged)
