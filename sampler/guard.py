"""Plain guidance, watched: samples whose first steps look memorized are started again under another guidance.

The noise gap of the first steps tells memorized prompts from others (Wen et al., ICLR 2024,
https://arxiv.org/abs/2407.21720), so all samples run plain classifier-free guidance for a few steps, the flagged ones go back
to their noise in the same batch, and the others go on undisturbed: their bits are those of plain guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .guidance import Guidance
from .kernels.state import State
from .loop import Plan, Run, Step, fused_step
from .models import GuidedUNet
from .solver import Solver

Begin = Callable[[GuidedUNet, Plan, Tensor], tuple[Step, State]]


def plans(solver: Solver, guidance: Guidance, device: torch.device) -> tuple[Plan, Plan]:
    """(the plain plan, the plan of flagged samples). Raises ValueError if the first steps give no noise gap to watch."""
    plain = replace(guidance, before=0.0, until=None, watch=None)
    first, second = (Plan.make(solver, g, device) for g in (plain, replace(guidance, watch=None)))
    steps = guidance.watch.steps
    watched = first.branches[: first.calls(steps)]
    if steps >= first.steps or set(watched) != {"both"}:
        raise ValueError(
            f"guard watches the first {steps} steps, which must be fewer than all {first.steps} and need both "
            f"predictions; they need {', '.join(watched)}"
        )
    return first, second


def denoise(
    network: GuidedUNet, plain: Plan, cautious: Plan, guidance: Guidance, noise: Tensor, begin: Begin, bar: Iterable
) -> Run:
    """Run from `noise` (B, C, H, W), which `begin` makes the state and the step for; `bar` has an item a row of a plan.

    One table holds the rows of both plans, the cautious ones after the plain ones: a sample's row says which it is under.
    """
    rows, steps = len(plain.table), guidance.watch.steps
    watched, table = plain.calls(steps), torch.cat([plain.table, cautious.table])
    both = replace(plain, table=table, step=plain.step + cautious.step, branches=("both",) * len(table), finds=cautious.finds)
    (take, state), turns = begin(network, both, noise), iter(bar)
    for _ in range(watched):
        next(turns)
        take("both")
    restarted = state.transition.gaps[:, :steps].mean(dim=1) > guidance.watch.threshold
    flagged = restarted.nonzero()[:, 0]  # the run's one read by the host, between two steps
    if len(flagged):
        state.restart(flagged, noise[flagged], table, row=rows, last=len(table) - 1)
    for _ in turns:
        take("both")
    run = Run(state.latents.x.clone(), state.transition.at.clone(), state.transition.gaps.clone(), restarted)
    if len(flagged):
        late = state.select(flagged)
        take = fused_step(network.select(flagged), both, late)
        for branch in cautious.branches[rows - watched :]:
            take(branch)
        run.latents[flagged] = late.latents.x
        run.transition[flagged] = late.transition.at
        run.gaps[flagged] = late.transition.gaps
    return run
