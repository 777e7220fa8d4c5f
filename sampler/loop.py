"""The denoising loop. Nothing in it is read back from the device: what a step needs is a table made before the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .guidance import Guidance
from .kernels.step import Column, State, guide_step, solve
from .solver import Solver, prepared, takes_generator

Branch = Literal["both", "uncond", "cond"]


class Network(Protocol):
    """latents (B, C, H, W), timesteps (B,) -> (uncond, cond), each (B, C, H, W); None for a branch not asked for."""

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> tuple[Tensor | None, Tensor | None]: ...


@dataclass(frozen=True)
class Plan:
    """All that the steps of one run read.

    table:      (K, len(Column)) float32 on the device.
    branches:   which halves of the network each step needs.
    transition: the step of the transition, -1 for none; None where each sample finds its own by `rule`.
    rule:       parameters of the first-minimum rule.
    """

    table: Tensor
    branches: tuple[Branch, ...]
    transition: int | None
    rule: dict | None
    multistep: bool
    scales_input: bool

    @classmethod
    def make(cls, solver: Solver, guidance: Guidance, device: torch.device, num_train_timesteps: int = 1000) -> Plan:
        """Lay `guidance` over the steps of `solver`. Raises ValueError if the guidance's own table has another length."""
        timesteps = solver.timesteps.tolist()
        weights = guidance.weights(timesteps, num_train_timesteps)
        transition = guidance.fixed_transition(timesteps)
        rule = asdict(guidance.until) if transition is None else None
        coefficients = torch.zeros(len(timesteps), 4) if solver.coefficients is None else solver.coefficients
        columns = [weights, coefficients, solver.input_scale[:, None], solver.timesteps[:, None]]
        return cls(
            table=torch.cat(columns, dim=1).to(device),
            branches=tuple(_branch(k, *pair, transition, rule) for k, pair in enumerate(weights.tolist())),
            transition=transition,
            rule=rule,
            multistep=bool(coefficients[:, 2:].any()),
            scales_input=bool((solver.input_scale != 1).any()),
        )


def _branch(k: int, before: float, after: float, transition: int | None, rule: dict | None) -> Branch:
    """The one branch that step k needs, or both: a sample still looking for its transition needs its noise gap."""
    if transition is None:
        if rule["latest"] is None or k < rule["latest"]:
            return "both"
        weight = after
    else:
        weight = after if 0 <= transition <= k else before
    return {0.0: "uncond", 1.0: "cond"}.get(weight, "both")


def denoise(
    network: Network,
    latents: Tensor,
    plan: Plan,
    advance: Callable[[Tensor, Tensor, State], None] = solve,
    progress: Iterable[Branch] | None = None,
) -> State:
    """Run all steps of `plan` on `latents` (B, C, H, W), the initial noise; returns the final state.

    advance:  updates the state's latents from the guided prediction; `own_step` for a scheduler that is not linear.
    progress: the plan's branches, wrapped in a progress bar.
    """
    state = State.start(latents, len(plan.table), plan.transition, plan.multistep)
    for branch in plan.branches if progress is None else progress:
        rows = plan.table[state.step]
        model_input = state.latents
        if plan.scales_input:
            scale = rows[:, Column.INPUT_SCALE].view(-1, *[1] * (latents.ndim - 1))
            model_input = (model_input * scale).to(latents.dtype)
        uncond, cond = network(model_input, rows[:, Column.TIMESTEP], branch)
        guided = (
            guide_step(uncond, cond, rows, state, plan.rule) if branch == "both" else {"uncond": uncond, "cond": cond}[branch]
        )
        advance(guided, rows, state)
        state.step += 1
    return state


def own_step(scheduler: SchedulerMixin, steps: int, generators: list[torch.Generator], device: torch.device):
    """An `advance` for `denoise` that asks the scheduler itself; its noise comes from the samples' own generators."""
    scheduler = prepared(scheduler, steps, device)
    noise = {"generator": generators} if takes_generator(scheduler) else {}
    timesteps = iter(scheduler.timesteps)

    def advance(guided: Tensor, rows: Tensor, state: State) -> None:
        state.latents = scheduler.step(guided, next(timesteps), state.latents, return_dict=False, **noise)[0]

    return advance
