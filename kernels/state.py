"""What a step reads and updates: the table of steps, and where each sample stands."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import backend
from .operands import sample_size
from .tiles import TILES

NEVER = 2**31 - 1


class Column(IntEnum):
    """The columns of a table of steps, (K, len(Column)) float32: all that varies from step to step.

    BEFORE, AFTER: guidance weight before and after the transition.
    A, B, P, Q: the solver, latents' = A latents + B guided + history, history' = P latents + Q guided.
    INPUT_SCALE: factor on the latents at the network's input. TIMESTEP: what the network is told.
    LIMIT: the noise gap at or below which a sample has settled; minus infinity where that is not looked at.
    """

    BEFORE = 0
    AFTER = 1
    A = 2
    B = 3
    P = 4
    Q = 5
    INPUT_SCALE = 6
    TIMESTEP = 7
    LIMIT = 8


class Rule(NamedTuple):
    """How a sample finds its transition: what shows at step k makes step k + wait the transition.

    The first minimum (Jain et al., https://arxiv.org/abs/2411.16738, section 4.2): d[k-2] > d[k-1] < d[k], k >= earliest and
    d[k-1] <= (1 - drop) * max(d[0..k-1]); an infinite drop looks for none. Or the gap has come down to the table's LIMIT. Or
    k >= latest. With no wait, step k itself already uses the weight after the transition.
    """

    earliest: int = 2
    latest: int = NEVER
    drop: float = 0.0
    wait: int = 0


@dataclass
class State:
    """Where each of B samples stands: buffers on the device, made once, that a step updates in place.

    model_input: (2B, ...) in the network's dtype, what the network reads next: the unconditional half, then the same again.
    timestep:    (2B,) float32, what the network is told next.
    apart:       (B, ...) in the network's dtype, the latents; None where no step scales the network's input, and the
                 latents are the first half of `model_input`.
    history:     (B, ...) float32, what a two-step solver keeps of the last step; None for a one-step solver.
    step:        (B,) int64, the step each sample is at.
    transition:  (B,) int64, the step at which its weight changes, -1 while that is not known.
    gaps:        (B, K) float32 noise gaps, NaN where not computed.
    peak:        (B,) float32, the largest gap so far; kept where a rule's `drop` asks for it.
    partials:    (B, tiles) float32 and arrivals (B,) int32, where the programs of one large sample meet, and scratch
                 (2, B, ...) float32, for the eager definition; None where the device does not need them.
    """

    model_input: Tensor
    timestep: Tensor
    apart: Tensor | None
    history: Tensor | None
    step: Tensor
    transition: Tensor
    gaps: Tensor
    peak: Tensor
    partials: Tensor | None
    arrivals: Tensor | None
    scratch: Tensor | None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        steps: int,
        dtype: torch.dtype,
        device: torch.device | str,
        multistep: bool = False,
        scaled: bool = True,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> State:
        """Buffers for latents of `shape` (B, ...) and `steps` steps, to be filled by `start`.

        multistep: the solver keeps a history. scaled: some step scales the network's input.
        """
        batch = shape[0]

        def buffer(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((rows, *shape[1:]), dtype=dtype, device=device, memory_format=memory_format)

        model_input = buffer(2 * batch, dtype)
        eager = backend(device) == "eager"
        tiles = 1 if eager else TILES.of(sample_size(model_input))[2]
        return cls(
            model_input=model_input,
            timestep=torch.empty(2 * batch, device=device),
            apart=buffer(batch, dtype) if scaled else None,
            history=buffer(batch, torch.float32) if multistep else None,
            step=torch.empty(batch, dtype=torch.int64, device=device),
            transition=torch.empty(batch, dtype=torch.int64, device=device),
            gaps=torch.empty((batch, steps), device=device),
            peak=torch.empty(batch, device=device),
            partials=torch.empty((batch, tiles), device=device) if tiles > 1 else None,
            arrivals=torch.zeros(batch, dtype=torch.int32, device=device) if tiles > 1 else None,
            scratch=buffer(2 * batch, torch.float32).unflatten(0, (2, batch)) if eager else None,
        )

    @property
    def latents(self) -> Tensor:
        """(B, ...) in the network's dtype."""
        return self.model_input[: len(self.step)] if self.apart is None else self.apart

    @property
    def halves(self) -> tuple[Tensor | None, Tensor]:
        """The halves of `model_input`; None for the first where that is the latents themselves."""
        first, second = self.model_input.chunk(2)
        return None if self.apart is None else first, second

    def start(self, noise: Tensor, table: Tensor, transition: int | None = None) -> State:
        """All samples at step 0 with the initial noise (B, ...); returns itself.

        transition: the step of it where it is known beforehand (-1 for none), None where each sample finds its own.
        """
        self.step.zero_()
        self.transition.fill_(-1 if transition is None else transition)
        self.gaps.fill_(torch.nan)
        self.peak.fill_(-torch.inf)
        for tensor in (self.history, self.arrivals):
            if tensor is not None:
                tensor.zero_()
        self.feed(noise, table)
        return self

    def feed(self, latents: Tensor, table: Tensor) -> None:
        """Set the latents (B, ...), and from them what the network reads at each sample's step."""
        self.latents.copy_(latents)
        self.tell(table)

    def tell(self, table: Tensor) -> None:
        """Set what the network reads at each sample's step, from its latents."""
        rows, batch = self.rows(table), len(self.step)
        self.timestep.view(2, batch).copy_(rows[:, Column.TIMESTEP])
        fill_input(self.latents, *self.halves, per_sample(rows[:, Column.INPUT_SCALE], self.latents))

    def select(self, index: Tensor) -> State:
        """The state of some samples alone, `index` (N,) int64, in memory of its own."""
        batch = len(self.step)
        chosen = {name: value if value is None else value[index] for name, value in vars(self).items() if name in ROWWISE}
        doubled = torch.cat([index, index + batch])
        return State(
            model_input=self.model_input[doubled],
            timestep=self.timestep[doubled],
            scratch=None if self.scratch is None else self.scratch[:, index],
            **chosen,
        )

    def rows(self, table: Tensor) -> Tensor:
        """(B, len(Column)) float32, the table's row of each sample's step; the last one for samples that are done."""
        return table[self.step.clamp(max=len(table) - 1)]


ROWWISE = ("apart", "history", "step", "transition", "gaps", "peak", "partials", "arrivals")


def fill_input(latents: Tensor, first: Tensor | None, second: Tensor, scale: float | Tensor) -> None:
    """Write `scale` times the latents to both halves of the network's input; unscaled latents are the first half (None)."""
    if first is not None:
        latents = torch.mul(latents, scale, out=first)
    second.copy_(latents)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to be multiplied with `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
