"""What the checks on a GPU launch: ways, operands, and the samples followed in float64. Imports torch and kernels alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from basinescape.kernels import definition, step
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from torch import Tensor

STEPS = 7
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # and how far a step may be off
SD, SDXL, SD3, VIDEO = (4, 64, 64), (4, 128, 128), (16, 128, 128), (16, 21, 60, 104)
LAYOUTS = ("contiguous", "channels last", "halves", "spread")


@dataclass(frozen=True)
class Mode:
    """A way the step is launched: latents of `shape`, samples that look for their transition or not.

    alone: one prediction is all that is needed. launches: how many it takes.
    """

    shape: tuple[int, ...]
    finds: bool
    alone: bool = False
    launches: int = 1


MODES = {
    "one block": Mode(SD, finds=False),
    "one block, first minimum": Mode(SD, finds=True),
    "one prediction": Mode(SD, finds=False, alone=True),
    "tiles, weight known": Mode(SDXL, finds=False, launches=2),
    "tiles, first minimum, SDXL": Mode(SDXL, finds=True, launches=3),
    "tiles, first minimum, SD3": Mode(SD3, finds=True, launches=3),
    "tiles, first minimum, video": Mode(VIDEO, finds=True, launches=3),
    "tiles, one prediction": Mode(SDXL, finds=False, alone=True, launches=2),
}


def require(right: bool, message: str) -> None:
    if not right:
        raise AssertionError(message)


def laid_out(x: Tensor, layout: str) -> Tensor | None:
    """`x` (B, ...) with the same values in another layout; None where there is none."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else None
    if layout == "halves":
        return torch.cat([x, x]).chunk(2)[1]
    return torch.stack([x, x], dim=1)[:, 0] if layout == "spread" else x


class Exact:
    """The samples of a state, each followed in float64 by the definition."""

    def __init__(self, state: State, table: Tensor):
        way = state.transition
        self.table, unknown = table.cpu(), (math.nan,) * way.gaps.shape[1]
        self.samples = [
            definition.Sample(x, unknown, *where)
            for x, *where in zip(state.latents.x.double(), way.row.tolist(), way.last.tolist(), way.at.tolist(), strict=True)
        ]

    def take(self, uncond: Tensor, cond: Tensor | None, rule: str = "cfg") -> None:
        conds = [None] * len(uncond) if cond is None else cond
        together = zip(self.samples, uncond, conds, strict=True)
        self.samples = [definition.step(sample, u, c, self.table, rule) for sample, u, c in together]

    def compare(self, state: State, where: str) -> float:
        """How far the latents are off; raises where anything else is. Goes on from the state's own: roundings do not add up."""
        way, worst = state.transition, 0.0
        for name, found in (("row", way.row), ("transition", way.at)):
            right = [getattr(sample, name) for sample in self.samples]
            require(found.tolist() == right, f"{where}: {name}s {found.tolist()}, not {right}")
        for i, sample in enumerate(self.samples):
            gaps = torch.tensor(sample.gaps, dtype=torch.float64)
            found = way.gaps[i].double().cpu()
            require(torch.allclose(found, gaps, rtol=1e-5, atol=0, equal_nan=True), f"{where}: gaps {found}, not {gaps}")
            if state.latents.history is not None:
                kept = state.latents.history[i].double()
                same = torch.allclose(kept, torch.as_tensor(sample.history).to(kept), atol=1e-4, rtol=1e-4)
                require(same, f"{where}: history")
            x = state.latents.x[i].double()
            worst = max(worst, ((x - sample.latents).abs() / (1 + sample.latents.abs())).max().item())
            self.samples[i] = replace(sample, latents=x)
        return worst


def table_of(rng: torch.Generator, finds: bool, multistep: bool, scaled: bool, steps: int = STEPS) -> Tensor:
    """Random steps that neither grow nor vanish, with a first minimum to find or a transition at step 3."""
    table = torch.rand((steps, len(Column)), generator=rng) * 2 - 1
    table[:, Column.STEP] = torch.arange(steps)
    table[:, [Column.FIRST, Column.KEEP]] = 1
    table[:, Column.LIMIT] = -torch.inf
    table[:, [Column.FALL, Column.WAIT]] = 0
    table[:, Column.FIRST_OPTION :].abs_()  # as every rule allows them
    table[: 2 if finds else steps, Column.KEEP] = -torch.inf
    if not finds:
        table[3:, Column.LIMIT] = torch.inf
    if not multistep:
        table[:, [Column.P, Column.Q]] = 0
    if not scaled:
        table[:, Column.INPUT_SCALE] = 1
    return table


def started(
    mode: Mode, batch: int, dtype: torch.dtype, device: torch.device, wide: bool = True, layout: str = "contiguous"
) -> tuple[State, Tensor]:
    """A state at its first step; `wide`: with history and scaled input."""
    rng = torch.Generator().manual_seed(1)
    table = table_of(rng, mode.finds, wide, wide).to(device)
    form = torch.channels_last if layout == "channels last" else torch.contiguous_format
    state = State.empty((batch, *mode.shape), STEPS, dtype, device, wide, wide, form)
    noise = torch.randn((batch, *mode.shape), generator=rng).to(device, dtype)
    return state.start(noise, table), table


def predictions(mode: Mode, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(uncond, cond) of each step; the gaps of each sample go up and down, each its own way."""
    rng = torch.Generator(device).manual_seed(2)
    shape = (batch, *mode.shape)
    for _ in range(STEPS):
        sizes = torch.rand((batch, *[1] * len(mode.shape)), generator=rng, device=device) + 0.1
        uncond = torch.randn(shape, generator=rng, device=device).to(dtype)
        cond = uncond.float() + sizes * torch.randn(shape, generator=rng, device=device)
        yield uncond, None if mode.alone else cond.to(dtype)


@dataclass
class Run:
    """A loop over a network that is a product of elements: it can be taken again, and captured."""

    mode: Mode
    state: State
    table: Tensor
    noise: Tensor
    pattern: Tensor

    @classmethod
    def of(cls, mode: Mode, batch: int, dtype: torch.dtype, device: torch.device) -> Run:
        state, table = started(mode, batch, dtype, device)
        rng = torch.Generator(device).manual_seed(3)
        pattern = 0.3 * torch.randn(state.latents.model_input.shape, generator=rng, device=device)
        return cls(mode, state, table, state.latents.x.clone(), pattern.to(dtype))

    def restart(self) -> None:
        self.state.start(self.noise, self.table)

    def take(self) -> None:
        uncond, cond = (self.state.latents.model_input * self.pattern).chunk(2)
        step(uncond, None if self.mode.alone else cond, self.table, self.state, self.mode.finds)

    def result(self) -> list[Tensor]:
        self.restart()
        for _ in range(STEPS):
            self.take()
        return self.snapshot()

    def snapshot(self) -> list[Tensor]:
        """All that a step writes for others."""
        written = (*vars(self.state.transition).values(), *vars(self.state.latents).values())
        return [value.nan_to_num(-1) for value in written if value is not None]
