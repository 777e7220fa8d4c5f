"""The denoising loop. Nothing in it is read back from the device: what a step needs is a table made before the first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from .guidance import FirstMinimum, Guidance, Settled
from .kernels.dispatch import backend
from .kernels.eager import Lockstep
from .kernels.state import NEVER, Rule, State
from .kernels.step import guide_step, step
from .schedulers import own_step, prepared
from .solver import Solver

Branch = Literal["both", "uncond", "cond"]
Step = Callable[[Branch], None]


class Network(Protocol):
    """latents (N, C, H, W), timesteps (N,) -> prediction (N, C, H, W).

    N is the batch for one branch, twice the batch for both, the unconditional half first.
    """

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """All that the steps of one run read.

    table:      (K, len(Column)) float32 on the device.
    branches:   which halves of the network each step needs.
    transition: the step of the transition, -1 for none; None where each sample finds its own by `rule`.
    multistep:  the solver keeps a history. scaled: some step scales the network's input.
    """

    table: Tensor
    branches: tuple[Branch, ...]
    transition: int | None
    rule: Rule | None
    multistep: bool
    scaled: bool

    @classmethod
    def make(cls, solver: Solver, guidance: Guidance, device: torch.device) -> Plan:
        """Lay `guidance` over the steps of `solver`. Raises ValueError if the guidance's own table has another length, or asks
        for timesteps where the scheduler's noise levels are not known."""
        weights = guidance.weights(solver)
        transition = guidance.fixed_transition(solver)
        rule = _rule(guidance.until) if transition is None else None
        calls = len(solver.timesteps)
        coefficients = torch.zeros(calls, 4) if solver.coefficients is None else solver.coefficients
        limits = torch.full((calls,), -torch.inf)
        if isinstance(guidance.until, Settled):
            limits = guidance.until.factor * torch.tensor(guidance.until.ordinary)
        columns = [weights, coefficients, solver.input_scale[:, None], solver.timesteps[:, None], limits[:, None]]
        return cls(
            table=torch.cat(columns, dim=1).to(device),
            branches=tuple(_branch(k, *pair, transition, rule) for k, pair in enumerate(weights.tolist())),
            transition=transition,
            rule=rule,
            multistep=bool(coefficients[:, 2:].any()),
            scaled=bool((solver.input_scale != 1).any()),
        )

    def state(self, noise: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> State:
        """The state of a run that starts from `noise` (B, C, H, W), in the network's dtype and on its device."""
        shape, steps = tuple(noise.shape), len(self.table)
        empty = State.empty(shape, steps, noise.dtype, noise.device, self.multistep, self.scaled, memory_format)
        return empty.start(noise, self.table, self.transition)


def _rule(until: FirstMinimum | Settled) -> Rule:
    latest = NEVER if until.latest is None else until.latest
    if isinstance(until, FirstMinimum):
        return Rule(until.earliest, latest, until.drop)
    return Rule(0, latest if latest == NEVER else latest - until.wait, math.inf, until.wait)


def _branch(k: int, before: float, after: float, transition: int | None, rule: Rule | None) -> Branch:
    """The one branch that step k needs, or both: a sample still looking for its transition needs its noise gap."""
    if rule is not None:
        if k < rule.latest + rule.wait:
            return "both"
        weight = after
    else:
        weight = after if 0 <= transition <= k else before
    return {0.0: "uncond", 1.0: "cond"}.get(weight, "both")


def fused_step(network: Network, plan: Plan, state: State) -> Step:
    """A step that is the network and one launch."""

    def take(branch: Branch) -> None:
        step(*_predict(network, state, branch), plan.table, state, plan.rule)

    return take


def lockstep(network: Network, plan: Plan, state: State) -> Step:
    """`fused_step` from a state just started; where no kernel runs, without the gathers that steps of its own would need."""
    if backend(state.step.device) != "eager":
        return fused_step(network, plan, state)
    move = Lockstep(state, plan.table, plan.rule, plan.transition)
    return lambda branch: move(*_predict(network, state, branch))


def scheduler_step(
    solver: Solver,
    scheduler: SchedulerMixin,
    generators: list[torch.Generator],
    guidance_rescale: float,
    network: Network,
    plan: Plan,
    state: State,
) -> Step:
    """A step by the scheduler's own `step`, for one that is not linear; its noise comes from the samples' own generators.

    guidance_rescale: how far the guided prediction is scaled back to the deviation of the conditional one (Lin et al.,
                      https://arxiv.org/abs/2305.08891, section 3.4), 0 to 1.
    """
    scheduler = prepared(scheduler, solver.schedule, state.step.device)
    timesteps = iter(scheduler.timesteps)

    def take(branch: Branch) -> None:
        uncond, cond = _predict(network, state, branch)
        guided = uncond if cond is None else guide_step(uncond, cond, plan.table, state, plan.rule)
        if cond is not None and guidance_rescale:
            guided = rescale_noise_cfg(guided, cond, guidance_rescale)
        latents = state.latents.clone()  # the scheduler may keep what it is given
        latents = own_step(scheduler, guided, next(timesteps), latents, generators, solver.schedule.eta)
        state.step += 1
        state.feed(latents, plan.table)

    return take


def _predict(network: Network, state: State, branch: Branch) -> tuple[Tensor, Tensor | None]:
    """(uncond, cond), or (the one branch that is needed, None)."""
    if branch == "both":
        return network(state.model_input, state.timestep, branch).chunk(2)
    batch = len(state.step)
    return network(state.model_input[:batch], state.timestep[:batch], branch), None


def denoise(take: Step, branches: Iterable[Branch], after: Callable[[int], None] | None = None) -> None:
    """Take every step of a plan; `branches` are the plan's, perhaps in a progress bar. `after` is told each one's index."""
    for k, branch in enumerate(branches):
        take(branch)
        if after is not None:
            after(k)
