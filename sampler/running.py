"""One batch from its noise to its latents, by the fastest way that there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import batches, callbacks, models
from .engine import guarded
from .guard import Ladder
from .loop import Run, denoise, lockstep, renoise, scheduler_step

if TYPE_CHECKING:
    from .sampler import Sampler


@dataclass(frozen=True)
class Batch:
    """Samples of one call that are denoised together.

    encoded: their prompts. noise: (B, ...) float32 of standard deviation 1. generators: of all their noise.
    initial: what draws initial noise from generators.
    """

    encoded: models.Encoded
    noise: Tensor
    generators: list[torch.Generator]
    initial: Callable[[Sequence[torch.Generator]], Tensor]


def run(
    sampler: Sampler, ladder: Ladder, batch: Batch, bar: batches.Bar, callback: callbacks.Callback | None, scale: float
) -> Run:
    """All steps of a batch. callback, scale: as the call has them, None for no callback."""
    model, plan, solver, form = sampler.model, ladder.whole, ladder.solver, sampler.model.memory_format
    noise, generators = (batch.noise * solver.init_sigma).to(model.device, model.dtype), batch.generators
    network = model.network(batch.encoded, plain=sampler.wrap is not None)
    if ladder.guard is not None:
        return guarded(sampler.lane, network, ladder, noise, generators, bar, batch.initial)
    if sampler.wrap is None and not ladder.stepwise and sampler.captures(network):
        lane = sampler.graphs.lane(network, plan, noise, form)
        take, state = lane.take, lane.state
    else:
        network, state = network if sampler.wrap is None else sampler.wrap(network), plan.state(noise, form)
        own = partial(scheduler_step, solver, sampler.scheduler, generators)
        take = (own if ladder.stepwise else lockstep)(network, plan, state)

    def after(row: int) -> bool:
        renoise(state, plan, row + 1, generators)
        if callback is None:
            return True
        timestep, latents = solver.timesteps[plan.call[row]], state.latents.x.clone()
        state.put(callbacks.tell(callback, sampler.pipe, row, timestep, latents, scale), plan.table)
        return not sampler.pipe._interrupt

    seen = nullcontext() if callback is None else callbacks.found(sampler.pipe, len(plan.branches), scale)
    with seen:
        denoise(take, bar(plan.branches), after)
    return Run.of(state)
