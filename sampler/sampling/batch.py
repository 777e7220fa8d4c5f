"""One batch from its noise to its latents, by the fastest way that there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .. import models
from ..runs.progress import Bar
from ..types import Network
from . import callbacks
from .engine import guarded
from .graphs import Graphs
from .ladder import Ladder
from .plan import Plan
from .steps import Lane, Run, denoise, fused_step, lockstep, renoise, scheduler_step

Wrap = Callable[[models.Guided], Network]


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


@dataclass(frozen=True)
class Runner:
    """How the batches of one model are denoised.

    graphs: where steps are captured; None: nowhere. wrap: what makes another network of the model's; None: nothing.
    """

    model: models.Model
    scheduler: SchedulerMixin
    graphs: Graphs | None = None
    wrap: Wrap | None = None

    def lane(
        self, ladder: Ladder, network: models.Guided, plan: Plan, noise: Tensor, generators: Sequence[torch.Generator]
    ) -> Lane:
        """A batch from `noise` (B, ...) for the engine: captured, or by the scheduler's own step, or fused."""
        noise, form = noise.to(self.model.dtype), self.model.memory_format
        if self._captures(ladder, network):
            return self.graphs.lane(network, plan, noise, form)
        state = plan.state(noise, form)
        if ladder.stepwise:
            take = scheduler_step(ladder.solver, self.scheduler, generators, network, plan, state)
            return Lane(network, state, take, plan.table)
        return Lane(network, state, fused_step(network, plan, state))

    def run(self, ladder: Ladder, batch: Batch, bar: Bar, callback: callbacks.Callback | None, scale: float) -> Run:
        """All steps of a batch. callback, scale: as the call has them, None for no callback."""
        model, plan, solver = self.model, ladder.whole, ladder.solver
        noise, generators = (batch.noise * solver.init_sigma).to(model.device, model.dtype), batch.generators
        network = model.network(batch.encoded, plain=self.wrap is not None)
        if ladder.guard is not None:
            return guarded(self.lane, network, ladder, noise, generators, bar, batch.initial)
        if self.wrap is None and self._captures(ladder, network):
            lane = self.graphs.lane(network, plan, noise, model.memory_format)
            take, state = lane.take, lane.state
        else:
            network, state = network if self.wrap is None else self.wrap(network), plan.state(noise, model.memory_format)
            own = partial(scheduler_step, solver, self.scheduler, generators)
            take = (own if ladder.stepwise else lockstep)(network, plan, state)

        def after(row: int) -> bool:
            renoise(state, plan, row + 1, generators)
            if callback is None:
                return True
            timestep, latents = solver.timesteps[plan.call[row]], state.latents.x.clone()
            state.put(callbacks.tell(callback, model.pipe, row, timestep, latents, scale), plan.table)
            return not model.pipe._interrupt

        seen = nullcontext() if callback is None else callbacks.found(model.pipe, len(plan.branches), scale)
        with seen:
            denoise(take, bar(plan.branches), after)
        return Run.of(state)

    def _captures(self, ladder: Ladder, network: models.Guided) -> bool:
        """Whether steps of this network are recorded."""
        return self.graphs is not None and network.version is not None and not ladder.stepwise
