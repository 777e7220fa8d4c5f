"""The buffers that a step updates in place: each sample's position in the step table, its latents, and scratch memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .dispatch import backend
from .operands import sample_size
from .sums import SUMS
from .table import Column
from .tiles import TILES

Index = Tensor | slice  # which samples of a batch: (N,) int64, or a slice


@dataclass
class TransitionState:
    """Where each of B samples is in the table, and whether it has left its basin.

    row, last: (B,) int64, its current row and its last row. With row > last it is done, and no step changes it.
    at:        (B,) int64, the solver step of the transition, the first with the weight AFTER; -1 while not known.
    gaps:      (B, steps) float32, the noise gap of each solver step, NaN where not computed. Its rows need not be adjacent.
    peak:      (B,) float32, the largest gap so far; valid only if the table needs it (a finite KEEP other than 1, or a FALL).
    """

    row: Tensor
    last: Tensor
    at: Tensor
    gaps: Tensor
    peak: Tensor

    @classmethod
    def empty(cls, batch: int, steps: int, device: torch.device | str) -> TransitionState:
        """Buffers to be filled by `restart`."""
        row, last, at = torch.zeros((3, batch), dtype=torch.int64, device=device).unbind()
        return cls(row, last, at, torch.empty((batch, steps), device=device), torch.empty(batch, device=device))

    def restart(self, index: Index, row: int | Tensor, last: int | Tensor) -> None:
        """Put samples at a row and forget their gaps and transitions. row, last: numbers, or one for each sample."""
        for buffer, value in zip(vars(self).values(), (row, last, -1, torch.nan, -torch.inf), strict=True):
            buffer[index] = value

    def advance(self) -> None:
        """Move every sample that is not done to its next row."""
        self.row += self.row <= self.last

    def rows(self, table: Tensor) -> Tensor:
        """(B, len(Column)) float32, the current row of each sample; its last row if it is done."""
        return table[torch.minimum(self.row, self.last)]

    def weight(self, rows: Tensor) -> Tensor:
        """(B,) float32, each sample's guidance weight. rows: (B, len(Column)), as from `rows`."""
        left = (self.at >= 0) & (self.at <= rows[:, Column.STEP])
        return torch.where(left, rows[:, Column.AFTER], rows[:, Column.BEFORE])

    def within(self, steps: int) -> Tensor:
        """(B,) int64, the step of each transition; -1 if there is none in the first `steps` steps."""
        return self.at.where(self.at < steps, -1)

    def select(self, index: Tensor) -> TransitionState:
        """A copy of the samples `index` (N,) int64."""
        return TransitionState(*(buffer[index] for buffer in vars(self).values()))


@dataclass
class Latents:
    """The latents of B samples, as the network reads them and as the solver keeps them.

    model_input: (2B, ...) in the network's dtype, the network's next input: the same B samples twice, for uncond and cond.
    timestep:    (2B,) float32, the network's next timesteps.
    unscaled:    (B, ...) in the network's dtype, the latents. None if no row scales the network's input: the latents are then
                 the first half of `model_input`.
    history:     (B, ...) float32, what a two-step solver keeps of the last step; None for a one-step solver.
    """

    model_input: Tensor
    timestep: Tensor
    unscaled: Tensor | None
    history: Tensor | None

    @property
    def x(self) -> Tensor:
        """(B, ...), the latents themselves."""
        return self.model_input[: len(self.timestep) // 2] if self.unscaled is None else self.unscaled

    @property
    def halves(self) -> tuple[Tensor | None, Tensor]:
        """The halves of `model_input`; None in place of the first if it is the latents themselves."""
        first, second = self.model_input.chunk(2)
        return None if self.unscaled is None else first, second

    def tell(self, rows: Tensor) -> None:
        """Write the network's next input and timesteps. rows: (B, len(Column)), the current row of each sample."""
        self.timestep.view(2, len(rows)).copy_(rows[:, Column.TIMESTEP])
        fill_input(self.x, *self.halves, per_sample(rows[:, Column.INPUT_SCALE], self.x))

    def select(self, index: Tensor) -> Latents:
        """A copy of the samples `index` (N,) int64."""
        doubled = torch.cat([index, index + len(self.timestep) // 2])
        own = (None if buffer is None else buffer[index] for buffer in (self.unscaled, self.history))
        return Latents(self.model_input[doubled], self.timestep[doubled], *own)


@dataclass
class Workspace:
    """partials (SUMS, B, tiles) float32, the sums of the tiles of large samples; scratch (2, B, ...) float32, for the eager
    step. None where the device does not need them."""

    partials: Tensor | None
    scratch: Tensor | None

    @classmethod
    def beside(cls, latents: Latents) -> Workspace:
        x = latents.x
        eager = backend(x.device) == "eager"
        tiles = 1 if eager else TILES.of(sample_size(x))[2]
        return cls(
            partials=torch.empty((SUMS, len(x), tiles), device=x.device) if tiles > 1 else None,
            scratch=torch.empty_like(latents.model_input, dtype=torch.float32).unflatten(0, (2, len(x))) if eager else None,
        )


@dataclass
class State:
    """All buffers of B samples, on the device. They are allocated once."""

    transition: TransitionState
    latents: Latents
    workspace: Workspace

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
        """Buffers for latents of `shape` (B, ...) and `steps` solver steps, to be filled by `start`.

        multistep: the solver keeps a history. scaled: some row scales the network's input.
        """
        batch = shape[0]

        def buffer(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((count, *shape[1:]), dtype=dtype, device=device, memory_format=memory_format)

        latents = Latents(
            model_input=buffer(2 * batch, dtype),
            timestep=torch.empty(2 * batch, device=device),
            unscaled=buffer(batch, dtype) if scaled else None,
            history=buffer(batch, torch.float32) if multistep else None,
        )
        return cls(TransitionState.empty(batch, steps, device), latents, Workspace.beside(latents))

    def start(self, noise: Tensor, table: Tensor, row: int | Tensor = 0, last: int | Tensor | None = None) -> State:
        """Put all samples at `row` with the initial noise (B, ...) as latents; return self. last None: the table's last row."""
        self.restart(slice(None), noise, table, row, len(table) - 1 if last is None else last)
        return self

    def restart(self, index: Index, latents: Tensor, table: Tensor, row: int | Tensor, last: int | Tensor) -> None:
        """Put samples at a row with new latents (N, ...), and forget their gaps, transitions and history."""
        self.transition.restart(index, row, last)
        if self.latents.history is not None:
            self.latents.history[index] = 0
        self.latents.x[index] = latents
        self.latents.tell(self.transition.rows(table))

    def put(self, latents: Tensor, table: Tensor) -> None:
        """Replace the latents of all samples by (B, ...); their rows do not change."""
        self.latents.x.copy_(latents)
        self.latents.tell(self.transition.rows(table))

    def advance(self, table: Tensor) -> None:
        """Move every sample that is not done to its next row, and write the network's next input and timesteps."""
        self.transition.advance()
        self.latents.tell(self.transition.rows(table))

    def select(self, index: Tensor) -> State:
        """A copy of the samples `index` (N,) int64."""
        latents = self.latents.select(index)
        return State(self.transition.select(index), latents, Workspace.beside(latents))


def fill_input(x: Tensor, first: Tensor | None, second: Tensor, scale: float | Tensor) -> None:
    """Write `scale` times the latents x to both halves of the network's input. first None: x is the first half; no scaling."""
    if first is not None:
        x = torch.mul(x, scale, out=first)
    second.copy_(x)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View (B,) values as (B, 1, ...), so that they broadcast over `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


# A registered operator takes the buffers of a state one after another, as separate arguments.
_FORMS = (TransitionState, Latents, Workspace)
BUFFERS = [field.name for form in _FORMS for field in fields(form)]


def buffers_of(state: State) -> list[Tensor | None]:
    return [buffer for part in (state.transition, state.latents, state.workspace) for buffer in vars(part).values()]


def state_of(buffers: tuple[Tensor | None, ...]) -> State:
    rest: Iterator[Any] = iter(buffers)
    parts: list[Any] = [form(*(next(rest) for _ in fields(form))) for form in _FORMS]
    return State(*parts)
