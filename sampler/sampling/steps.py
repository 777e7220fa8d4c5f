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

Move = Callable[[Tensor, Tensor | None], None]  # takes the state one row on, from the predictions of a step


@dataclass
class DeviceBatch:
    """A batch of the engine: its network, its state, and the step that moves all samples one row on.

    table: the memory that recorded steps read rows from; None where `take` reads the plan's table.
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
    """The network and one launch; two launches where the pipeline changes the guided prediction (`StepTable.correction`)."""
    return stepping(network, state, fused_move(plan, state))


def stepping(network: Network, state: State, move: Move) -> Step:
    """A step: the network predicts, and the state moves."""

    def take(branch: Branch) -> Pair:
        pair = predicted(network, state, branch)
        move(*pair)
        return pair

    return take


def fused_move(plan: StepTable, state: State) -> Move:
    """By one launch; two where the pipeline changes the guided prediction (`StepTable.correction`)."""

    def move(uncond: Tensor, cond: Tensor | None) -> None:
        if cond is not None and plan.correction is not None:
            uncond, cond = guided_prediction(uncond, cond, plan, state), None
        elif cond is not None:
            plan.statistics.ask(uncond, cond, plan.table, state.transition)
        step(uncond, cond, plan.table, state, plan.finds, plan.rule)

    return move


def lockstep_move(plan: StepTable, state: State) -> Move:
    """`fused_move` of a state that was just started. Where no kernel runs, the host knows each row, and nothing is gathered."""
    if backend(plan.table.device) != "eager" or plan.correction is not None or plan.statistics.rules:
        return fused_move(plan, state)
    return Lockstep(state, plan.table, rule=plan.rule)


def scheduler_move(
    solver: Solver, scheduler: Scheduler, generators: list[torch.Generator], plan: StepTable, state: State
) -> Move:
    """By the scheduler's own `step`, for one that is not linear; its noise comes from the samples' own generators."""
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
        # There a row alone is rounded otherwise than beside another one.
        uncond, cond = network(latents.model_input, latents.timestep, "both").chunk(2)
        return uncond if branch == "uncond" else cond, None
    return network(latents.model_input[:batch], latents.timestep[:batch], branch), None


def renoise(state: State, plan: StepTable, row: int, generators: Sequence[torch.Generator]) -> None:
    """Bring all samples, which stand before `row`, back to a higher noise level, if the plan says so there."""
    if row in plan.jumps:
        x = state.latents.x
        state.put(plan.renoised(row, x, draw(x.shape[1:], generators)), plan.table)


def denoise(take: Step, branches: Iterable[Branch], after: Callable[[int], bool] | None = None) -> None:
    """Take a step for each branch. after: is told the step's index, and answers whether to go on."""
    for k, branch in enumerate(branches):
        take(branch)
        if after is not None and not after(k):
            return
