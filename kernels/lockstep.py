"""The step in PyTorch operators for samples that all stand at one step, which the host knows: fast on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .eager import Part
from .operands import sample_size
from .rules import RULES, GuidanceRule, leaves_eager
from .state import State, fill_input
from .table import Column

GROUP = 131072  # elements a thread works on at a time, so that they stay in its cache from one operator to the next
Row = list[float | Tensor]  # a number a column, or (n,) numbers where samples differ


class Lockstep:
    """`step` for a state that was just started: no gathers, and views made once. Every call takes it one row on.

    The bits are those of `step`. rows: (calls, B) int64 on the host, which row of the table each sample is at in each call;
    None for the whole table. rule: the guidance rule of all. Samples may differ in the rest of their guidance; raises
    ValueError where they differ in anything else.
    """

    def __init__(self, state: State, table: Tensor, rows: Tensor | None = None, rule: str = "cfg"):
        self.state, self.shape, self.k = state, state.latents.x.shape, 0
        batch = self.shape[0]
        self.size = max(1, GROUP * torch.get_num_threads() // max(1, sample_size(state.latents.x)))
        slices = [slice(i, i + self.size) for i in range(0, max(1, batch), self.size)]
        self.groups = [Group.of(state, index, _rows(table, rows, index), RULES[rule]) for index in slices]
        self.rows: list[list[float]] = (table if rows is None else table[rows[:, 0]]).tolist()
        if rows is not None and (table[rows] != table[rows[:, :1]])[..., Column.A : Column.FIRST + 1].any():
            raise ValueError("rows lead to steps of different solvers; samples in lockstep may differ in their guidance alone")

    def __call__(self, uncond: Tensor, cond: Tensor | None) -> None:
        """Take the step, from predictions as for `step`; raises ValueError for another shape than the latents'."""
        for name, prediction in (("uncond", uncond), ("cond", cond)):
            if prediction is not None and prediction.shape != self.shape:
                raise ValueError(f"{name} is {tuple(prediction.shape)}; it must be {tuple(self.shape)}, as the latents")
        following = self.rows[min(self.k + 1, len(self.rows) - 1)]
        for group, u, c in zip(self.groups, self._split(uncond), self._split(cond), strict=True):
            group.take(u, c, group.rows[self.k], following[Column.INPUT_SCALE])
        self.state.transition.row.add_(1)
        self.state.latents.timestep.fill_(following[Column.TIMESTEP])
        self.k += 1

    def _split(self, prediction: Tensor | None) -> Sequence[Tensor | None]:
        if prediction is None or len(self.groups) == 1:
            return [prediction] * len(self.groups)
        return prediction.split(self.size)


def _rows(table: Tensor, rows: Tensor | None, index: slice) -> list[Row]:
    if rows is None:
        return table.tolist()
    lines = table[rows[:, index]]
    alike = (lines == lines[:, :1]).all(dim=1).tolist()
    return [
        [number if same else lines[k, :, c] for c, (number, same) in enumerate(zip(numbers, alike[k], strict=True))]
        for k, numbers in enumerate(lines[:, 0].tolist())
    ]


@dataclass
class Group:
    """Samples that take their steps together, n of them.

    at, peak: the state's; gaps: its columns. peaks, waits: some row asks for the largest gap, for a wait. own: a sample may
    have found a transition of its own. latest: the step from which on all have left.
    """

    part: Part
    at: Tensor
    peak: Tensor
    gaps: Sequence[Tensor]
    rows: list[Row]
    rule: GuidanceRule | None
    peaks: bool
    waits: bool
    own: bool = False
    latest: float = math.inf

    @classmethod
    def of(cls, state: State, index: slice, rows: list[Row], rule: GuidanceRule | None) -> Group:
        way = state.transition
        peaks = any(_any(row[Column.KEEP], 1, -math.inf) or _any(row[Column.FALL], 0) for row in rows)
        waits = any(_any(row[Column.WAIT], 0) for row in rows)
        return cls(Part.of(state, index), way.at[index], way.peak[index], way.gaps[index].unbind(1), rows, rule, peaks, waits)

    def take(self, uncond: Tensor, cond: Tensor | None, row: Row, next_scale: float) -> None:
        k, part, gap = int(row[Column.STEP]), self.part, None
        if cond is not None:
            gap = part.differ(uncond, cond, self.gaps[k] if row[Column.FIRST] else None)
        self._look(k, gap, row)
        prediction = uncond
        if cond is not None:
            if self.peaks and row[Column.FIRST]:
                torch.fmax(self.peak, gap, out=self.peak)
            prediction = part.guide(uncond, self._weight(k, row), self.rule, gap, *row[Column.FIRST_OPTION :])
        part.solve(prediction, *row[Column.A : Column.Q + 1])
        fill_input(part.x, part.first, part.second, next_scale)

    def _look(self, k: int, gap: Tensor | None, row: Row) -> None:
        """Note who leaves the basin at step k."""
        if self.latest < math.inf:
            return
        keep, limit, fall, wait = row[Column.KEEP : Column.WAIT + 1]
        one = not any(isinstance(value, Tensor) for value in (keep, limit, fall, wait))
        if one and keep == limit == -math.inf and not fall:
            return
        waiting = self.at < 0
        if one and limit == math.inf:
            self.latest = k + wait
        else:
            self.own = True
            gap = torch.full_like(self.peak, torch.nan) if gap is None else gap
            before, last = self.gaps[max(k - 2, 0)], self.gaps[max(k - 1, 0)]
            waiting &= leaves_eager(gap, before, last, self.peak, keep if k >= 2 else -math.inf, limit, fall)
        if isinstance(wait, Tensor):
            torch.where(waiting, (k + wait).long(), self.at, out=self.at)
        else:
            self.at.masked_fill_(waiting, k + int(wait))

    def _weight(self, k: int, row: Row) -> float | Tensor:
        before, after = row[Column.BEFORE], row[Column.AFTER]
        if k >= self.latest:
            return after
        if not self.own:
            return before
        left = self.at >= 0
        if self.waits:
            left &= self.at <= k
        return torch.where(left, after, before)


def _any(value: float | Tensor, *none: float) -> bool:
    """Whether a row asks for something: another number than these, or one a sample."""
    return isinstance(value, Tensor) or value not in none
