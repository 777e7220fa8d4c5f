"""The step in PyTorch, where no kernel runs: the definition, and the same for samples that all stand at one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .guide import norms
from .operands import in_memory_order, sample_size
from .state import Column, Rule, State, fill_input, per_sample

GROUP = 131072  # elements a thread works on at a time, so that they stay in its cache from one operator to the next


def eager_step(
    uncond: Tensor, cond: Tensor | None, table: Tensor, rule: Rule | None, guided: Tensor | None, state: State
) -> None:
    """`step`, or, where `guided` is given, `guide_step`. The same operators whatever the values, and none of them read."""
    state.step.clamp_(max=len(table) - 1)  # a sample that is done repeats its last step, as in the kernel
    rows, part = state.rows(table), Part.of(state, slice(None))
    prediction = uncond
    if cond is not None:
        gap = part.differ(uncond, cond)
        if rule is not None:
            recent = state.gaps.gather(1, (state.step[:, None] + torch.arange(-2, 0, device=gap.device)).clamp_(min=0))
            leaves = _is_minimum(*recent.unbind(1), gap, state.peak, rule.drop) & (state.step >= rule.earliest)
            leaves |= (gap <= rows[:, Column.LIMIT]) | (state.step >= rule.latest)
            part.leave(leaves, gap, rule)
        state.gaps.scatter_(1, state.step[:, None], gap[:, None])
        left = (state.transition >= 0) & (state.step >= state.transition)
        weight = torch.where(left, rows[:, Column.AFTER], rows[:, Column.BEFORE])
        prediction = part.guide(uncond, per_sample(weight, uncond))
    if guided is not None:
        guided.copy_(prediction)
        return
    part.solve(prediction, *(per_sample(column, uncond) for column in rows[:, Column.A : Column.Q + 1].unbind(1)))
    state.step += 1
    state.tell(table)


class Lockstep:
    """`step` for a state whose samples all stand at one step, which the host knows: no gathers, and views made once.

    Every call takes the state one step on, from the first. The bits are those of `step`.

    table, rule: as for `step`. transition: as for `State.start`, where there is no rule.
    """

    def __init__(self, state: State, table: Tensor, rule: Rule | None = None, transition: int | None = None):
        self.state, self.rule, self.shape = state, rule, state.latents.shape
        self.rows, self.k = table.tolist(), 0
        self.left = math.inf if transition is None or transition < 0 else transition
        self.size = max(1, GROUP * torch.get_num_threads() // max(1, sample_size(state.latents)))
        parts = [slice(i, i + self.size) for i in range(0, max(1, len(state.step)), self.size)]
        self.parts = [(Part.of(state, rows), state.gaps[rows].unbind(1)) for rows in parts]

    def __call__(self, uncond: Tensor, cond: Tensor | None) -> None:
        """Take the step, from predictions as for `step`; raises ValueError for another shape than the latents'."""
        for name, prediction in (("uncond", uncond), ("cond", cond)):
            if prediction is not None and prediction.shape != self.shape:
                raise ValueError(f"{name} is {tuple(prediction.shape)}; it must be {tuple(self.shape)}, as the latents")
        row, following = self.rows[self.k], self.rows[min(self.k + 1, len(self.rows) - 1)]
        known = row[Column.AFTER if self.k >= self.left else Column.BEFORE]
        for (part, gaps), u, c in zip(self.parts, self._split(uncond), self._split(cond), strict=True):
            prediction = u
            if c is not None:
                part.differ(u, c, out=gaps[self.k])
                prediction = part.guide(u, known if self.rule is None else self._found(part, gaps, row, self.rule))
            part.solve(prediction, *row[Column.A : Column.Q + 1])
            fill_input(part.latents, part.first, part.second, following[Column.INPUT_SCALE])
        self.state.step.add_(1)
        self.state.timestep.fill_(following[Column.TIMESTEP])
        self.k += 1

    def _split(self, prediction: Tensor | None) -> Sequence[Tensor | None]:
        if prediction is None or len(self.parts) == 1:
            return [prediction] * len(self.parts)
        return prediction.split(self.size)

    def _found(self, part: Part, gaps: Sequence[Tensor], row: list[float], rule: Rule) -> Tensor:
        """The weights of samples that look for their transition."""
        k, gap, leaves = self.k, gaps[self.k], None
        if k >= rule.latest:
            leaves = torch.ones_like(gap, dtype=torch.bool)
        else:
            if k >= max(rule.earliest, 2) and rule.drop < math.inf:
                leaves = _is_minimum(gaps[k - 2], gaps[k - 1], gap, part.peak, rule.drop)
            if row[Column.LIMIT] > -math.inf:
                settled = gap <= row[Column.LIMIT]
                leaves = settled if leaves is None else leaves | settled
        part.leave(leaves, gap, rule)
        left = part.transition >= 0
        if rule.wait:
            left &= part.transition <= k
        return per_sample(torch.where(left, row[Column.AFTER], row[Column.BEFORE]), part.latents)


def _is_minimum(before: Tensor, last: Tensor, gap: Tensor, peak: Tensor, drop: float) -> Tensor:
    """Whether the last of three successive gaps shows the one before it to be a minimum, `drop` below the peak."""
    found = last < torch.minimum(before, gap)
    return found & (last <= (1 - drop) * peak) if drop else found


@dataclass
class Part:
    """Some samples of a state, n of them: views, and what a step does with them.

    latents, first and second half of the network's input, history, step, transition, peak: the state's. difference,
    following: float32 like the latents, for values on their way. flat: the difference, (n, size), as it lies in memory.
    """

    latents: Tensor
    first: Tensor | None
    second: Tensor
    history: Tensor | None
    step: Tensor
    transition: Tensor
    peak: Tensor
    difference: Tensor
    following: Tensor
    flat: Tensor

    @classmethod
    def of(cls, state: State, rows: slice) -> Part:
        first, second = state.halves
        difference, following = (buffer[rows] for buffer in state.scratch)
        return cls(
            latents=state.latents[rows],
            first=None if first is None else first[rows],
            second=second[rows],
            history=None if state.history is None else state.history[rows],
            step=state.step[rows],
            transition=state.transition[rows],
            peak=state.peak[rows],
            difference=difference,
            following=following,
            flat=in_memory_order(difference),
        )

    def differ(self, uncond: Tensor, cond: Tensor, out: Tensor | None = None) -> Tensor:
        """Keep cond - uncond; returns the gaps (n,)."""
        torch.sub(cond, _wide(uncond, self.following), out=self.difference)
        return norms(self.flat, out)

    def leave(self, leaves: Tensor | None, gap: Tensor, rule: Rule) -> None:
        """Note the transition of the samples that leave their basin at this step and have not left it before."""
        if leaves is not None:
            leaves &= self.transition < 0
            torch.where(leaves, self.step + rule.wait if rule.wait else self.step, self.transition, out=self.transition)
        if rule.drop:
            torch.fmax(self.peak, gap, out=self.peak)

    def guide(self, uncond: Tensor, weight: float | Tensor) -> Tensor:
        """uncond + weight * the difference that was kept, in its place."""
        return _add(_wide(uncond, self.following), self.difference, weight, self.difference)

    def solve(self, guided: Tensor, a: float | Tensor, b: float | Tensor, p: float | Tensor, q: float | Tensor) -> None:
        """The solver: latents' = a latents + b guided + history, history' = p latents + q guided."""
        guided, latents = _wide(guided, self.difference), _wide(self.latents, self.following)
        if self.history is None:
            in_place = guided is self.difference  # any other prediction may share memory with the latents
            scaled = torch.mul(latents, a, out=latents if in_place else self.following)
        else:
            scaled = _add(self.history, latents, a, self.following)
            torch.mul(_wide(self.latents, self.history), p, out=self.history)
            _add(self.history, guided, q, self.history)
        _add(scaled, guided, b, self.latents)


def _wide(x: Tensor, into: Tensor) -> Tensor:
    """`x` in float32: itself, or a copy."""
    return x if x.dtype == torch.float32 else into.copy_(x)


def _add(base: Tensor, x: Tensor, factor: float | Tensor, out: Tensor) -> Tensor:
    """base + factor * x; a number or a tensor as the factor gives the same bits."""
    if isinstance(factor, Tensor):
        return torch.addcmul(base, x, factor, out=out)
    return torch.add(base, x, alpha=factor, out=out)
