"""A faster CPU step in PyTorch operators, for samples that are all at the same step, whose number the host knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager import SampleViews
from .operands import sample_size
from .rules import RULES, GuidanceRule, leaves_eager
from .state import State, fill_input
from .table import Column

GROUP = 131072  # elements a thread works on at a time, so that they stay in its cache from one operator to the next
Value = float | Tensor


class Lockstep:
    """`step` for a state that was just started. It needs no gathers and makes its views once. Each call advances by one row.

    The bits are those of `step`. rows: (calls, B) int64 on the host, the table row of each sample in each call; None: all rows
    in order. rule: the guidance rule of all samples. Rows of different samples may differ only in guidance weights, criteria
    and rule options; raises ValueError if they differ in the solver.
    """

    def __init__(self, state: State, table: Tensor, rows: Tensor | None = None, rule: str = "cfg"):
        self.state, self.shape, self.k = state, state.latents.x.shape, 0
        batch = self.shape[0]
        if rows is not None and (table[rows] != table[rows[:, :1]])[..., Column.A : Column.FIRST + 1].any():
            raise ValueError("rows lead to steps of different solvers; samples in lockstep may differ in their guidance alone")
        self.size = max(1, GROUP * torch.get_num_threads() // max(1, sample_size(state.latents.x)))
        slices = [slice(i, i + self.size) for i in range(0, max(1, batch), self.size)]
        self.groups = [Group.of(state, index, orders(table, rows, index), RULES[rule]) for index in slices]
        told = [order.timestep for order in self.groups[0].orders]
        self.timesteps = torch.tensor(told)[:, None].repeat(1, 2 * batch).unbind()
        self.rows = (state.transition.row + torch.arange(1, len(told) + 1)[:, None]).unbind()

    def __call__(self, uncond: Tensor, cond: Tensor | None) -> None:
        """Take the step, from predictions as for `step`; raises ValueError for another shape than the latents'."""
        if uncond.shape != self.shape:
            raise ValueError(f"uncond is {tuple(uncond.shape)}; it must be {tuple(self.shape)}, as the latents")
        if cond is not None and cond.shape != self.shape:
            raise ValueError(f"cond is {tuple(cond.shape)}; it must be {tuple(self.shape)}, as the latents")
        groups, k = self.groups, self.k
        if len(groups) == 1:
            groups[0].take(uncond, cond, groups[0].orders[k])
        else:
            conds = [None] * len(groups) if cond is None else cond.split(self.size)
            for group, u, c in zip(groups, uncond.split(self.size), conds, strict=True):
                group.take(u, c, group.orders[k])
        # Rebinding is cheaper than writing to the old buffers, which would take a tenth of a small step.
        self.state.transition.row, self.state.latents.timestep = self.rows[k], self.timesteps[k]
        self.k = k + 1


class Look(IntEnum):
    """Which samples may leave the basin in a call."""

    NOBODY = 0
    ALL = 1
    BY_GAP = 2


class Order(NamedTuple):
    """The table row of one call for a group of n samples: numbers, or (n,) tensors where the samples differ.

    scale, timestep: from the next row. a, p and scale are 0-dimensional tensors, which multiply faster than numbers.
    """

    k: int
    first: bool
    before: Value
    after: Value
    look: Look
    keep: Value
    limit: Value
    fall: Value
    wait: Value
    a: Tensor
    b: float
    p: Tensor
    q: float
    options: tuple[Value, ...]
    scale: Tensor
    timestep: float


def orders(table: Tensor, rows: Tensor | None, index: slice) -> list[Order]:
    """The order of every call, for the samples `index`. rows: as for `Lockstep`."""
    lines = table if rows is None else table[rows[:, index.start]]
    numbers: list[list[Any]] = lines.tolist()
    if rows is not None:
        own = table[rows[:, index]]
        for k, c in (own != own[:, :1]).any(dim=1).nonzero().tolist():
            numbers[k][c] = own[k, :, c]
    a, p, scale = (lines[:, column].unbind() for column in (Column.A, Column.P, Column.INPUT_SCALE))
    last, found = len(numbers) - 1, []
    for k, row in enumerate(numbers):
        before, after, _, b, _, q, _, _, step, first, keep, limit, fall, wait, *options = row
        following = min(k + 1, last)
        look = Look.BY_GAP
        if rows is None or not any(isinstance(value, Tensor) for value in row[Column.KEEP : Column.WAIT + 1]):
            if limit == math.inf:
                look = Look.ALL
            elif keep == limit == -math.inf and not fall:
                look = Look.NOBODY
        told = scale[following], numbers[following][Column.TIMESTEP]
        leaving = look, keep, limit, fall, wait
        found.append(Order(int(step), bool(first), before, after, *leaving, a[k], b, p[k], q, tuple(options), *told))
    return found


@dataclass
class Group:
    """n samples that take their steps together.

    at, peak: views of the state's; gaps: the columns of its gaps. peaks: some row needs the largest gap. waits: some WAIT is
    not 0. own: samples may have different transitions. latest: the step from which on all samples are past the transition.
    """

    part: SampleViews
    at: Tensor
    peak: Tensor
    gaps: Sequence[Tensor]
    orders: list[Order]
    rule: GuidanceRule | None
    peaks: bool
    waits: bool
    own: bool = False
    latest: float = math.inf

    @classmethod
    def of(cls, state: State, index: slice, orders: list[Order], rule: GuidanceRule | None) -> Group:
        way = state.transition
        peaks = any(_any(order.keep, 1, -math.inf) or _any(order.fall, 0) for order in orders)
        waits = any(_any(order.wait, 0) for order in orders)
        return cls(
            SampleViews.of(state, index), way.at[index], way.peak[index], way.gaps[index].unbind(1), orders, rule, peaks, waits
        )

    def take(self, uncond: Tensor, cond: Tensor | None, order: Order) -> None:
        part, gap, prediction = self.part, None, uncond
        if cond is not None:
            gap = part.differ(uncond, cond, self.gaps[order.k] if order.first else None)
        if order.look and self.latest == math.inf:
            self._look(gap, order)
        if gap is not None:
            if self.peaks and order.first:
                torch.fmax(self.peak, gap, out=self.peak)
            prediction = part.guide(uncond, self._weight(order), self.rule, gap, *order.options)
        part.solve(prediction, order.a, order.b, order.p, order.q)
        fill_input(part.x, part.first, part.second, order.scale)

    def _look(self, gap: Tensor | None, order: Order) -> None:
        """Record which samples leave the basin in this call."""
        k, wait, waiting = order.k, order.wait, self.at < 0
        if order.look == Look.ALL:
            if not (self.own and self.waits):  # else a sample may wait longer since an earlier step
                self.latest = k + float(wait)
        else:
            self.own = True
            gap = torch.full_like(self.peak, torch.nan) if gap is None else gap
            before, last, keep = self.gaps[max(k - 2, 0)], self.gaps[max(k - 1, 0)], order.keep if k >= 2 else -math.inf
            waiting &= leaves_eager(gap, before, last, self.peak, keep, order.limit, order.fall)
        if isinstance(wait, Tensor):
            torch.where(waiting, (k + wait).long(), self.at, out=self.at)
        else:
            self.at.masked_fill_(waiting, k + int(wait))

    def _weight(self, order: Order) -> Value:
        if order.k >= self.latest:
            return order.after
        if not self.own:
            return order.before
        left = self.at >= 0
        if self.waits:
            left &= self.at <= order.k
        return torch.where(left, order.after, order.before)


def _any(value: Value, *none: float) -> bool:
    """Whether `value` is a tensor, or a number other than those of `none`."""
    return isinstance(value, Tensor) or value not in none
