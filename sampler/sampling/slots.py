"""What stands in a batch's slots: samples on their way, attempts that are being judged, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models import Guided
from ..types import draw
from .ladder import Ladder


@dataclass(eq=False)
class Sample:
    """What is to be sampled, under the caller's `key`.

    ladder:  its attempts; a plain one has one that nobody judges. shape: of its latents (C, h, w).
    network, row: its encoded prompt is this row of that network's.
    seed:    of a generator of its own, from which all its noise comes.
    initial: what draws initial noise from generators, (1, C, h, w); None: normal noise of its shape. Some models pack it.
    generator, noise: where it is gone on with: that generator, and the noise (C, h, w) that it has drawn already.
    attempt, calls: the one it begins with, and the predictions that those before it needed.
    """

    key: Any
    ladder: Ladder
    shape: tuple[int, ...]
    network: Guided
    row: int
    seed: int = 0
    initial: Callable[[Sequence[torch.Generator]], Tensor] | None = None
    generator: torch.Generator | None = None
    noise: Tensor | None = None
    attempt: int = 0
    calls: int = 0

    @property
    def form(self) -> tuple:
        """What samples of one batch have in common."""
        plan = self.ladder.whole
        return self.shape, self.network.row_form, id(self.network.version), plan.rule, plan.scaled

    def begin(self) -> Tensor:
        """The initial noise (C, h, w)."""
        if self.attempt:
            return self.draw()
        if self.noise is not None:
            return self.noise
        self.generator = torch.Generator("cpu").manual_seed(self.seed)
        return self.draw()

    def draw(self) -> Tensor:
        drawn = draw(self.shape, [self.generator]) if self.initial is None else self.initial([self.generator])
        return drawn[0] * self.ladder.solver.init_sigma


@dataclass(eq=False)
class Result:
    """What came of a sample: latents (C, h, w), transition () int64 and gaps (steps,) float32, NaN where none was needed.

    attempts, score (the basin score), suspect: a guard's; None without one. calls: predictions that the sample needed, whatever
    the others of its batch did. error: why it failed; the rest is None then.
    """

    sample: Sample
    latents: Tensor | None = None
    transition: Tensor | None = None
    gaps: Tensor | None = None
    attempts: int | None = None
    score: float | None = None
    suspect: bool | None = None
    calls: int = 0
    error: Exception | None = None


@dataclass
class Trial:
    """A finished attempt while it is judged: what came of it, noises to judge it by, the answer to wait for, scores so far."""

    result: Result
    noises: Iterator[Tensor]
    target: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)


@dataclass
class Slot:
    """A place in the batch: its sample, the `number`th that came; where that one's rows begin, its attempt, its row."""

    place: int
    sample: Sample
    number: int
    offset: int
    attempt: int = 0
    row: int = 0
    end: int = 0  # the row after the last
    calls: int = 0
    trial: Trial | None = None

    def enter(self, attempt: int) -> None:
        first, last = (self.offset + start for start in self.sample.ladder.starts[attempt : attempt + 2])
        self.attempt, self.row, self.end, self.trial = attempt, first, last, None

    def ask(self) -> Tensor:
        """Stand at the row of the calls that judge, with the next noise; returns what the network is given, (C, h, w)."""
        ladder, trial = self.sample.ladder, self.trial
        self.row = self.offset + ladder.starts[-1]
        self.end = self.row + 1
        given, trial.target = ladder.probe.question(trial.result.latents[None], next(trial.noises)[None])
        return given[0]

    @property
    def looked_at(self) -> bool:
        """Whether a guard looks at the first gaps of a plain attempt here, and has another one left."""
        ladder = self.sample.ladder
        plain = ladder.check is not None and self.attempt == 0 and self.trial is None
        return plain and self.row == self.offset + ladder.check and len(ladder.guard.attempts) > 1
