"""One step after the network: has the sample left its basin, which weight, the guided prediction, the solver's update.

Samples of one batch may stand at different steps: everything is gathered by each sample's own step index, and nothing is
read back by the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .guide import guide, noise_gap


class Column(IntEnum):
    """The columns of a table of steps, (K, len(Column)) float32: all that varies from step to step.

    BEFORE, AFTER: guidance weight before and after the transition.
    A, B, P, Q: the solver, latents' = A latents + B guided + history, history' = P latents + Q guided.
    INPUT_SCALE: factor on the latents at the network's input. TIMESTEP: what the network is told.
    """

    BEFORE = 0
    AFTER = 1
    A = 2
    B = 3
    P = 4
    Q = 5
    INPUT_SCALE = 6
    TIMESTEP = 7


@dataclass
class State:
    """Where each of B samples stands, on the device; `guide_step` and `solve` update it in place.

    latents:    (B, ...) in the network's dtype.
    history:    (B, ...) float32, what a two-step solver keeps of the last step; None for a one-step solver.
    step:       (B,) int64, the step each sample is at.
    transition: (B,) int64, the step at which it left its basin, -1 while it has not.
    gaps:       (B, K) float32 noise gaps, NaN where not computed.
    peak:       (B,) float32, the largest gap so far.
    """

    latents: Tensor
    history: Tensor | None
    step: Tensor
    transition: Tensor
    gaps: Tensor
    peak: Tensor

    @classmethod
    def start(cls, latents: Tensor, steps: int, transition: int | None = None, multistep: bool = False) -> State:
        """All samples at step 0; `transition` where it is known beforehand (-1 for none), None where each finds its own."""
        batch, device = len(latents), latents.device
        return cls(
            latents=latents,
            history=torch.zeros_like(latents, dtype=torch.float32) if multistep else None,
            step=torch.zeros(batch, dtype=torch.int64, device=device),
            transition=torch.full((batch,), -1 if transition is None else transition, device=device),
            gaps=torch.full((batch, steps), torch.nan, device=device),
            peak=torch.full((batch,), -torch.inf, device=device),
        )


def guide_step(uncond: Tensor, cond: Tensor, rows: Tensor, state: State, rule: dict | None = None) -> Tensor:
    """The guided prediction of each sample's step, (B, ...) in the dtype of `uncond`, with the weight its transition asks for.

    rows: (B, len(Column)), the table's row of each sample's step.
    rule: earliest, latest and drop of the first-minimum rule (Jain et al., https://arxiv.org/abs/2411.16738, section 4.2),
          under which step k already uses the weight after the transition it shows; None where `state.transition` is given.
    """
    if rule is None:
        weight = _weight(rows, state)
        guided, gap = guide(uncond, cond, weight)
        _record(gap, state)
    else:
        gap = noise_gap(uncond, cond)
        _record(gap, state)
        _leave(gap, state, **rule)
        guided, _ = guide(uncond, cond, _weight(rows, state))
    return guided


def _record(gap: Tensor, state: State) -> None:
    state.gaps.scatter_(1, state.step[:, None], gap[:, None])


def _leave(gap: Tensor, state: State, earliest: int, latest: int | None, drop: float) -> None:
    """Mark the samples for which this step is the transition: d[k-2] > d[k-1] < d[k], deep enough, or the deadline."""
    recent = state.gaps.gather(1, (state.step[:, None] + torch.arange(-2, 0, device=gap.device)).clamp_(min=0))
    before, last = recent.unbind(1)
    leaves = (before > last) & (last < gap) & (last <= (1 - drop) * state.peak) & (state.step >= earliest)
    if latest is not None:
        leaves |= state.step >= latest
    state.transition = torch.where(leaves & (state.transition < 0), state.step, state.transition)
    state.peak = torch.maximum(state.peak, gap)


def _weight(rows: Tensor, state: State) -> Tensor:
    """(B,) the weight after the transition for samples that have left, the one before it for the others."""
    left = (state.transition >= 0) & (state.step >= state.transition)
    return torch.where(left, rows[:, Column.AFTER], rows[:, Column.BEFORE])


def solve(guided: Tensor, rows: Tensor, state: State) -> None:
    """The solver's linear update of `state.latents` and `state.history`, in float32 and cast at the store."""
    latents = state.latents.float()
    a, b, p, q = rows[:, Column.A : Column.Q + 1].reshape(-1, 4, *[1] * (latents.ndim - 1)).unbind(1)
    following = torch.addcmul(a * latents, b, guided.float())
    if state.history is not None:
        following += state.history
        state.history = torch.addcmul(p * latents, q, guided.float())
    state.latents = following.to(state.latents.dtype)
