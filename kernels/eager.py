"""The step in PyTorch operators, for devices without a kernel, and the parts of it that `lockstep` uses too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import in_memory_order
from .rules import RULES, GuidanceRule, combined_eager, guided_prediction_eager, leaves_eager
from .state import State, per_sample
from .sums import Folded, sample_sums
from .table import Column


def eager_step(
    uncond: Tensor, cond: Tensor | None, table: Tensor, guided: Tensor | None, state: State, rule: str = "cfg"
) -> None:
    """`step`, or `guide_step` if `guided` is given. The operators do not depend on values, and no value is read back."""
    way, part = state.transition, SampleViews.of(state, slice(None))
    rows, going = way.rows(table), way.row <= way.last
    here, k = rows.unbind(1), rows[:, Column.STEP].long()
    gap = torch.full_like(way.peak, torch.nan) if cond is None else part.differ(uncond, cond)
    before, last = way.gaps.gather(1, (k[:, None] + torch.arange(-2, 0, device=k.device)).clamp_(min=0)).unbind(1)
    leaves = leaves_eager(gap, before, last, way.peak, *here[Column.KEEP : Column.WAIT]) & (way.at < 0) & going
    torch.where(leaves, k + here[Column.WAIT].long(), way.at, out=way.at)
    prediction = uncond
    if cond is not None:
        counts = going & (here[Column.FIRST] > 0)
        way.gaps.scatter_(1, k[:, None], torch.where(counts, gap, way.gaps.gather(1, k[:, None])[:, 0])[:, None])
        torch.where(counts, torch.fmax(way.peak, gap), way.peak, out=way.peak)
        prediction = part.guide(uncond, way.weight(rows), RULES[rule], gap, *here[Column.FIRST_OPTION :])
    if guided is not None:
        guided.copy_(prediction)
        return
    kept = [(buffer, buffer.clone()) for buffer in (part.x, part.history) if buffer is not None]
    part.solve(prediction, *(per_sample(column, uncond) for column in here[Column.A : Column.Q + 1]))
    for buffer, value in kept:  # a sample that is done stays as it is
        torch.where(per_sample(going, buffer), buffer, value, out=buffer)
    state.advance(table)


@dataclass
class SampleViews:
    """Views of n samples of a state, and the arithmetic of a step on them.

    x, first, second, history: views of the state's latents, of both halves of the network's input, and of the history.
    difference, following: float32 scratch of the latents' shape. folded: computes the norms of `difference`.
    """

    x: Tensor
    first: Tensor | None
    second: Tensor
    history: Tensor | None
    difference: Tensor
    following: Tensor
    folded: Folded

    @classmethod
    def of(cls, state: State, index: slice) -> SampleViews:
        latents, scratch = state.latents, state.workspace.scratch
        assert scratch is not None  # not None on a device that uses the eager step
        first, second = latents.halves
        history = None if latents.history is None else latents.history[index]
        difference, following = scratch[:, index]
        return cls(
            x=latents.x[index],
            first=None if first is None else first[index],
            second=second[index],
            history=history,
            difference=difference,
            following=following,
            folded=Folded(in_memory_order(difference)),
        )

    def differ(self, uncond: Tensor, cond: Tensor, out: Tensor | None = None) -> Tensor:
        """Write cond - uncond to `difference`; return its norms, the gaps (n,)."""
        torch.sub(cond, _wide(uncond, self.following), out=self.difference)
        return self.folded(torch.linalg.vector_norm, out)

    def guide(
        self, uncond: Tensor, weight: float | Tensor, rule: GuidanceRule | None, gap: Tensor, *options: float | Tensor
    ) -> Tensor:
        """Overwrite `difference` with the guided prediction and return it. weight, options: numbers, or (n,) tensors."""
        wide, difference = _wide(uncond, self.following), self.difference
        if rule is None:
            weight = per_sample(weight, wide) if isinstance(weight, Tensor) else weight
            return guided_prediction_eager(wide, difference, weight, out=difference)
        given = (value if isinstance(value, Tensor) else torch.full_like(gap, value) for value in (weight, *options))
        own, first, second = given
        a, b = combined_eager(rule.eager, own, sample_sums(wide, difference), gap, wide[0].numel(), first, second)
        return difference.mul_(per_sample(b, wide)).addcmul_(wide, per_sample(a, wide))

    def solve(self, guided: Tensor, a: float | Tensor, b: float | Tensor, p: float | Tensor, q: float | Tensor) -> None:
        """Update x and history in place: x' = a x + b guided + history, history' = p x + q guided."""
        guided, x = _wide(guided, self.difference), _wide(self.x, self.following)
        if self.history is None:
            in_place = guided is self.difference  # any other prediction may share memory with the latents
            scaled = torch.mul(x, a, out=x if in_place else self.following)
        else:
            scaled = _add(self.history, x, a, self.following)
            torch.mul(_wide(self.x, self.history), p, out=self.history)
            _add(self.history, guided, q, self.history)
        _add(scaled, guided, b, self.x)


def _wide(x: Tensor, into: Tensor) -> Tensor:
    """`x` if it is float32, else its float32 copy in `into`."""
    return x if x.dtype == torch.float32 else into.copy_(x)


# _add(base, x, factor, out) = base + factor * x. A number and a tensor as the factor give the same bits.
_add = guided_prediction_eager
