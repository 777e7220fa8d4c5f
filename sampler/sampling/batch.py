"""One batch from its noise to its latents, by the fastest way that there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import models
from ..guidance.guidance import never_came
from ..kernels.state import State
from ..models import memory
from ..runs.batch_retry import parts
from ..runs.progress import Bar, bar
from ..schedulers.solver_coefficients import Solver
from ..types import Network, Scheduler
from . import callbacks
from .attempt_table import AttemptTable
from .call import Call
from .cuda_graphs import Graphs
from .engine import guarded
from .output import Output
from .samples import Results
from .step_table import StepTable
from .steps import DeviceBatch, Move, denoise, fused_move, lockstep_move, renoise, scheduler_move, stepping

log = logging.getLogger(__name__)
Wrap = Callable[[models.PromptedNetwork], Network]


@dataclass(frozen=True)
class Runner:
    """How the batches of one model are denoised.

    graphs: captures the steps; None: they are not captured. wrap: makes another network from the model's; None: no other.
    """

    model: models.Model
    scheduler: Scheduler
    graphs: Graphs | None = None
    wrap: Wrap | None = None

    def sampled(self, call: Call, solver: Solver, progress: bool | Callable[[float], None]) -> list[Output]:
        """Return the outputs of a call, one a batch. solver: the solver of the call's schedule. Runs in inference mode.

        Raises ValueError, before any work, for guidance that does not fit the steps.
        """
        model, prompts, total = self.model, call.prompts, call.total
        options = {"height": call.size[0], "width": call.size[1], **prompts.options}
        attempt_table = AttemptTable.make(solver, call.guidance, model.device, model.correction).stopped(call.stop_after)
        for line in attempt_table.idle:
            log.warning(line)
        generators = call.generators()
        encoded = model.encode(prompts.texts, count=prompts.count, negative_prompt=prompts.negative, **options)

        def initial(own: Sequence[torch.Generator]) -> Tensor:
            return model.noise(own, **options)

        def batch(part: range, shown: Bar) -> Output:
            own = [generators[i] for i in part]
            noise = initial(own) if call.latents is None else call.latents[list(part)].cpu().float()
            texts = encoded if len(part) == total else encoded.select(part)
            results = self.run(attempt_table, call, texts, noise, own, initial, shown)
            decode = partial(model.decode, generators=own, **options)
            return Output.of(results, texts, solver, call.output, decode)

        some = parts(total, call.batch_size or (total if call.seen else memory.batch_size(model, *call.size)))
        made = [batch(part, bar(progress, i, len(some))) for i, part in enumerate(some)]
        whole = attempt_table.guard is None and call.callback is None and call.stop_after is None
        warning = never_came(torch.cat([one.transition_step for one in made]), solver.steps)
        if warning is not None and whole and not attempt_table.idle:
            log.warning(warning)
        return made

    def open_batch(
        self,
        attempt_table: AttemptTable,
        network: models.PromptedNetwork,
        plan: StepTable,
        noise: Tensor,
        generators: list[torch.Generator],
        together: bool = False,
    ) -> DeviceBatch:
        """Return a batch that starts from `noise` (B, ...). Its step is captured, or the scheduler's own, or fused.

        together: all samples take the same rows, from the first one on. Only such a batch may have a wrapped network.
        """
        if self.wrap is not None and not together:
            raise ValueError("a wrapped network is sampled from by calls of the sampler alone, which take no guard")
        noise, form = noise.to(self.model.dtype), self.model.memory_format
        recorded = network.version is not None and not attempt_table.stepwise and not plan.statistics.rules
        if self.graphs is not None and self.wrap is None and recorded:
            return self.graphs.open_batch(network, plan, noise, form)
        state = plan.state(noise, form)
        changed = network if self.wrap is None else self.wrap(network)
        together = together or attempt_table.stepwise
        move = mover(attempt_table, self.scheduler, generators, plan, state) if together else fused_move(plan, state)
        return DeviceBatch(network, state, stepping(changed, state, move), plan.table if attempt_table.stepwise else None)

    def run(
        self,
        attempt_table: AttemptTable,
        call: Call,
        encoded: models.Encoded,
        noise: Tensor,
        generators: list[torch.Generator],
        initial: Callable[[Sequence[torch.Generator]], Tensor],
        shown: Bar,
    ) -> Results:
        """Take all steps of one batch of a call, and return what came of it. shown: the bar that the rows pass through.

        encoded: the samples' prompts. noise: (B, ...) float32 of standard deviation 1. generators: one a sample, for all of its
            noise. initial: draws initial noise from generators.
        """
        model, plan, solver = self.model, attempt_table.plan, attempt_table.solver
        noise = (noise * solver.init_sigma).to(model.device, model.dtype)
        callback, scale = call.callback, call.guidance.scale
        network = model.network(encoded, plain=self.wrap is not None)
        if attempt_table.guard is not None:
            return guarded(self.open_batch, network, attempt_table, noise, generators, shown, initial)
        opened = self.open_batch(attempt_table, network, plan, noise, generators, together=True)
        state = opened.state

        def after(row: int) -> bool:
            renoise(state, plan, row + 1, generators)
            if callback is None:
                return True
            timestep, latents = solver.timesteps[plan.call[row]], state.latents.x.clone()
            state.put(callbacks.tell(callback, model.pipe, row, timestep, latents, scale), plan.table)
            return not vars(model.pipe)["_interrupt"]

        seen = nullcontext() if callback is None else callbacks.found(model.pipe, len(plan.branches), scale)
        with seen:
            denoise(opened.take, shown(plan.branches), after)
        return Results.of(state, solver.steps)


def mover(
    attempt_table: AttemptTable, scheduler: Scheduler, generators: list[torch.Generator], plan: StepTable, state: State
) -> Move:
    """Return the move of a batch that was just started and whose samples are all at the same row of `plan`."""
    if attempt_table.stepwise:
        return scheduler_move(attempt_table.solver, scheduler, generators, plan, state)
    return lockstep_move(plan, state)
