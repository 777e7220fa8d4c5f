"""The steps of the denoising loop. None of them reads anything back from the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import backend, guide_step, step
from ..kernels.lockstep import Lockstep
from ..kernels.state import State
from ..models import PromptedNetwork
from ..schedulers.schedule import own_step, prepared
from ..schedulers.solver_coefficients import Solver
from ..types import Branch, Network, Pair, Scheduler, Step, draw
from .step_table import StepTable

Move = Callable[[Tensor, Tensor | None], None]  # advances the state by one row, from the predictions of a step


@dataclass
class DeviceBatch:
    """A batch on the device: its network, its state, and the step that advances all samples by one row.

    table: the memory from which a captured or scheduler's step reads rows; None where `take` reads the plan's table.
    """

    network: PromptedNetwork
    state: State
    take: Step
    table: Tensor | None = None

    def follow(self, plan: StepTable) -> None:
        """From now on the steps read the rows of `plan`, which begins with those so far."""
        if self.table is None:
            self.take = fused_step(self.network, plan, self.state)
        else:
            self.table[: len(plan.table)].copy_(plan.table)


def fused_step(network: Network, plan: StepTable, state: State) -> Step:
    """Return a step: the network and one kernel launch, or two launches if the plan has a `correction`."""
    return stepping(network, state, fused_move(plan, state))


def stepping(network: Network, state: State, move: Move) -> Step:
    """Return a step: the network predicts, and `move` advances the state."""

    def take(branch: Branch) -> Pair:
        pair = predicted(network, state, branch)
        move(*pair)
        return pair

    return take


def fused_move(plan: StepTable, state: State) -> Move:
    """Return a move that takes one kernel launch, or two if the plan has a `correction`."""

    def move(uncond: Tensor, cond: Tensor | None) -> None:
        if cond is not None and plan.correction is not None:
            uncond, cond = guided_prediction(uncond, cond, plan, state), None
        elif cond is not None:
            plan.statistics.ask(uncond, cond, plan.table, state.transition)
        step(uncond, cond, plan.table, state, plan.finds, plan.rule)

    return move


def lockstep_move(plan: StepTable, state: State) -> Move:
    """Return `fused_move` for a state that was just started; a `Lockstep`, which gathers no rows, where no kernel runs."""
    if backend(plan.table.device) != "eager" or plan.correction is not None or plan.statistics.rules:
        return fused_move(plan, state)
    return Lockstep(state, plan.table, rule=plan.rule)


def scheduler_move(
    solver: Solver, scheduler: Scheduler, generators: list[torch.Generator], plan: StepTable, state: State
) -> Move:
    """Return a move by the scheduler's own `step`, for a scheduler that is not linear. Its noise comes from `generators`."""
    scheduler = prepared(scheduler, solver.schedule, plan.table.device)
    timesteps = iter(scheduler.timesteps)

    def move(uncond: Tensor, cond: Tensor | None) -> None:
        guided = uncond if cond is None else guided_prediction(uncond, cond, plan, state)
        latents = state.latents.x.clone()  # the scheduler may keep what it is given
        latents = own_step(scheduler, guided, next(timesteps), latents, generators, solver.schedule.eta)
        state.transition.advance()
        state.put(latents, plan.table)

    return move


def guided_prediction(uncond: Tensor, cond: Tensor, plan: StepTable, state: State) -> Tensor:
    """The guided prediction of each sample, (B, ...), as the solver gets it. Gaps and transitions are recorded."""
    plan.statistics.ask(uncond, cond, plan.table, state.transition)
    guided = guide_step(uncond, cond, plan.table, state, plan.finds, plan.rule)
    if plan.correction is None:
        return guided
    return plan.correction(guided, cond, state.transition.weight(state.transition.rows(plan.table)))


def predicted(network: Network, state: State, branch: Branch) -> Pair:
    """What the network predicts for the step that the samples are at."""
    latents = state.latents
    if branch == "both":
        uncond, cond = network(latents.model_input, latents.timestep, branch).chunk(2)
        return uncond, cond
    batch = len(latents.x)
    if batch == 1 and latents.x.device.type == "cpu" and latents.x.dtype != torch.float32:
        # Half precision on a CPU rounds a single row differently from two rows together.
        uncond, cond = network(latents.model_input, latents.timestep, "both").chunk(2)
        return uncond if branch == "uncond" else cond, None
    return network(latents.model_input[:batch], latents.timestep[:batch], branch), None


def renoise(state: State, plan: StepTable, row: int, generators: Sequence[torch.Generator]) -> None:
    """Bring all samples, whose next row is `row`, back to a higher noise level if `row` is in `plan.jumps`."""
    if row in plan.jumps:
        x = state.latents.x
        state.put(plan.renoised(row, x, draw(x.shape[1:], generators)), plan.table)


def denoise(take: Step, branches: Iterable[Branch], after: Callable[[int], bool] | None = None) -> None:
    """Take a step for each branch. after: called with the step's index; the loop ends when it returns False."""
    for k, branch in enumerate(branches):
        take(branch)
        if after is not None and not after(k):
            return
