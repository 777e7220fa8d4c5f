"""Plain guidance, watched: samples whose first steps look memorized are started again under another guidance.

The noise gap of the first steps tells memorized prompts from others (Wen et al., ICLR 2024,
https://arxiv.org/abs/2407.21720), so all samples run plain classifier-free guidance for a few steps, the flagged ones go back
to their noise in the same batch, and the others go on undisturbed: their bits are those of plain guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .guidance import Guidance
from .kernels.state import NEVER, State
from .loop import Plan, Step, fused_step
from .models import GuidedUNet
from .solver import Solver

Begin = Callable[[GuidedUNet, Plan, Tensor], tuple[Step, State]]


@dataclass(frozen=True)
class Guarded:
    """What a guarded run returns, for B samples over K steps.

    latents (B, ...), transition (B,) int64, gaps (B, K) float32, restarted (B,) bool; those of restarted samples are of their
    second run.
    """

    latents: Tensor
    transition: Tensor
    gaps: Tensor
    restarted: Tensor


def plans(solver: Solver, guidance: Guidance, device: torch.device) -> tuple[Plan, Plan]:
    """(the plain plan, the plan of flagged samples). Raises ValueError if the first steps give no noise gap to watch."""
    plain = replace(guidance, before=0.0, until=None, watch=None)
    first, second = (Plan.make(solver, g, device) for g in (plain, replace(guidance, watch=None)))
    steps = guidance.watch.steps
    if steps >= len(first.branches) or set(first.branches[:steps]) != {"both"}:
        raise ValueError(
            f"guard watches the first {steps} steps, which must be fewer than all {len(first.branches)} and need both "
            f"predictions; they need {', '.join(first.branches[:steps])}"
        )
    return first, second


def denoise(
    network: GuidedUNet, plain: Plan, cautious: Plan, guidance: Guidance, noise: Tensor, begin: Begin, bar: Iterable
) -> Guarded:
    """Run from `noise` (B, C, H, W), which `begin` makes the state and the step for; `bar` has K items.

    One table holds the steps of both plans, the cautious ones after the plain ones: a sample's step says which it is under.
    """
    steps, watched = len(plain.table), guidance.watch.steps
    table = torch.cat([plain.table, cautious.table])
    rule = cautious.rule
    if rule is not None:
        rule = rule._replace(
            earliest=rule.earliest + steps, latest=rule.latest if rule.latest == NEVER else rule.latest + steps
        )
    both = replace(plain, table=table, branches=("both",) * (2 * steps), rule=rule)
    (take, state), turns = begin(network, both, noise), iter(bar)
    for _ in range(watched):
        next(turns)
        take("both")
    restarted = state.gaps[:, :watched].mean(dim=1) > guidance.watch.threshold
    flagged = restarted.nonzero()[:, 0]  # the run's one read by the host, between two steps
    if len(flagged):
        _restart(state, flagged, noise, table, cautious.transition)
    for _ in turns:
        take("both")
    latents, transition, gaps = state.latents.clone(), state.transition.clone(), state.gaps[:, :steps].clone()
    if len(flagged):
        late = state.select(flagged)
        take = fused_step(network.select(flagged), both, late)
        for branch in cautious.branches[steps - watched :]:
            take(branch)
        latents[flagged] = late.latents
        transition[flagged] = torch.where(late.transition < 0, -1, late.transition - steps)
        gaps[flagged] = late.gaps[:, steps:]
    return Guarded(latents, transition, gaps, restarted)


def _restart(state: State, flagged: Tensor, noise: Tensor, table: Tensor, transition: int | None) -> None:
    """Put samples back to their noise, at the first of the table's second half."""
    steps = len(table) // 2
    state.step[flagged] = steps
    state.transition[flagged] = -1 if transition is None or transition < 0 else transition + steps
    state.peak[flagged] = -torch.inf
    if state.history is not None:
        state.history[flagged] = 0
    latents = state.latents.clone()
    latents[flagged] = noise[flagged]
    state.feed(latents, table)
