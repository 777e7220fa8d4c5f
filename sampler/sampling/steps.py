"""The steps of the denoising loop. None of them reads anything back from the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..kernels import backend, guide_step, step
from ..kernels.lockstep import Lockstep
from ..kernels.state import State
from ..kernels.table import Column
from ..schedulers.schedule import own_step, prepared
from ..schedulers.solver import Solver
from ..types import Branch, Network, Pair, Step, draw
from .plan import Plan


@dataclass(frozen=True)
class Run:
    """What a run returns, for B samples over K solver steps.

    latents (B, ...), transition (B,) int64, gaps (B, K) float32. Under a guard those of each sample's last attempt, and on the
    CPU attempts (B,) int64, score (B,) float32 the basin score, suspect (B,) bool, calls (B,) int64 the predictions it needed.
    """

    latents: Tensor
    transition: Tensor
    gaps: Tensor
    attempts: Tensor | None = None
    score: Tensor | None = None
    suspect: Tensor | None = None
    calls: Tensor | None = None

    @classmethod
    def of(cls, state: State) -> Run:
        return cls(state.latents.x, state.transition.at, state.transition.gaps)


@dataclass
class Lane:
    """A batch in which each sample goes its own way: what its steps read and update.

    table: of steps that read one of their own, which rows are copied into; None where `take` reads the plan's.
    """

    network: Network
    state: State
    take: Step
    table: Tensor | None = None

    def follow(self, plan: Plan) -> None:
        """Go on under a plan with more rows."""
        if self.table is None:
            self.take = fused_step(self.network, plan, self.state)
        else:
            self.table[: len(plan.table)].copy_(plan.table)


def fused_step(network: Network, plan: Plan, state: State) -> Step:
    """A step that is the network and one launch; two where a guided prediction is to settle in between."""

    def take(branch: Branch) -> Pair:
        pair = uncond, cond = _predict(network, state, branch)
        if plan.settle is not None and cond is not None:
            uncond, cond = guided_prediction(uncond, cond, plan, state), None
        step(uncond, cond, plan.table, state, plan.finds, plan.rule)
        return pair

    return take


def lockstep(network: Network, plan: Plan, state: State) -> Step:
    """`fused_step` from a state just started; where no kernel runs, without the gathers that steps of its own would need."""
    if backend(plan.table.device) != "eager" or plan.settle is not None:
        return fused_step(network, plan, state)
    move = Lockstep(state, plan.table, rule=plan.rule)

    def take(branch: Branch) -> Pair:
        pair = _predict(network, state, branch)
        move(*pair)
        return pair

    return take


def scheduler_step(
    solver: Solver,
    scheduler: SchedulerMixin,
    generators: list[torch.Generator],
    network: Network,
    plan: Plan,
    state: State,
) -> Step:
    """A step by the scheduler's own `step`, for one that is not linear; its noise comes from the samples' own generators."""
    scheduler = prepared(scheduler, solver.schedule, plan.table.device)
    timesteps = iter(scheduler.timesteps)

    def take(branch: Branch) -> Pair:
        uncond, cond = _predict(network, state, branch)
        guided = uncond if cond is None else guided_prediction(uncond, cond, plan, state)
        latents = state.latents.x.clone()  # the scheduler may keep what it is given
        latents = own_step(scheduler, guided, next(timesteps), latents, generators, solver.schedule.eta)
        state.transition.advance()
        state.put(latents, plan.table)
        return uncond, cond

    return take


def guided_prediction(uncond: Tensor, cond: Tensor, plan: Plan, state: State) -> Tensor:
    """The guided prediction of every sample's step, (B, ...), settled; gaps and transitions are recorded."""
    guided = guide_step(uncond, cond, plan.table, state, plan.finds, plan.rule)
    if plan.settle is None:
        return guided
    rows, at = state.transition.rows(plan.table), state.transition.at
    left = (at >= 0) & (at <= rows[:, Column.STEP])
    return plan.settle(guided, cond, torch.where(left, rows[:, Column.AFTER], rows[:, Column.BEFORE]))


def _predict(network: Network, state: State, branch: Branch) -> Pair:
    latents = state.latents
    if branch == "both":
        uncond, cond = network(latents.model_input, latents.timestep, branch).chunk(2)
        return uncond, cond
    batch = len(latents.x)
    return network(latents.model_input[:batch], latents.timestep[:batch], branch), None


def renoise(state: State, plan: Plan, row: int, generators: Sequence[torch.Generator]) -> None:
    """Bring all samples, which stand before `row`, back to a higher noise level, if the plan says so there."""
    if row in plan.jumps:
        scale, sigma = plan.jumps[row]
        x = state.latents.x
        noise = draw(x.shape[1:], generators).to(x.device)
        state.put((scale * x.float() + sigma * noise).to(x.dtype), plan.table)


def denoise(take: Step, branches: Iterable[Branch], after: Callable[[int], bool] | None = None) -> None:
    """Take the steps of a plan. branches: the plan's, perhaps in a bar. after: told each one's index, whether to go on."""
    for k, branch in enumerate(branches):
        take(branch)
        if after is not None and not after(k):
            return
