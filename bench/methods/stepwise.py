"""Sampling a step at a time, open to a method that changes it and to whoever looks.

The noise gap of a step is that of the model's own predictions, whatever a method makes of them: transitions are looked for in
it, and it is what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from basinescape import Guard, Guidance, Output, Sampler
from basinescape.kernels import guide, guide_step, step
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from basinescape.models import GuidedUNet
from basinescape.sampling.plan import Plan
from basinescape.sampling.steps import renoise
from basinescape.schedulers.schedule import own_step, prepared
from basinescape.schedulers.solver import Solver
from basinescape.types import Branch, Network
from torch import Tensor

Wrap = Callable[[GuidedUNet], Network]  # the network that is sampled from, of the model's
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]  # noise (B, ...) -> the first step's uncond and cond, float32
Noise = Callable[[Predict, Tensor], Tensor]  # the noise to begin from, of that drawn: (B, ...) float32 of deviation 1
Look = Callable[[State, Tensor, Tensor], None]  # sees the state and both predictions, (B, ...), before a step is taken
Push = Callable[[int, State, Tensor], None]  # sees the step, the state and the table, and may put other latents into the state


class MeasurementCache:
    """The model's network, which keeps a copy of the pair of predictions that it gave last; otherwise as it is."""

    def __init__(self, network: GuidedUNet):
        self._network = network
        self.pair: Tensor | None = None

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        predictions = self._network(latents, timesteps, branch)
        if branch == "both":
            self.pair = predictions.clone()  # a method may write over what it is given
        return predictions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def check(guidance: Guidance | Guard) -> None:
    """Raises ValueError for a guard, whose attempts are more than one way through the steps."""
    if isinstance(guidance, Guard):
        raise ValueError("a guard takes neither a wrapped network nor other noise: its attempts are not steps of one run")


@torch.inference_mode()
def sample(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: Guidance,
    wrap: Wrap | None = None,
    noise: Noise | None = None,
    look: Look | None = None,
    push: Push | None = None,
    output: str = "pil",
) -> Output:
    """An image for each prompt and its seed, as the sampler makes it where nothing is changed.

    Where there is somebody to look, both branches run in every step. Raises what `check` does, and what the sampler does.
    """
    check(guidance)
    model, solver = sampler.model, sampler.solver(steps)
    plan = Plan.make(solver, guidance, model.device, model.settle)
    height, width = sampler.size()
    encoded = model.encode(list(prompts), height, width, **sampler.options)
    network = MeasurementCache(model.network(encoded, plain=True))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    drawn = sampler.noise(generators, height, width).to(model.device)
    state = plan.state((drawn * solver.init_sigma).to(model.dtype), model.memory_format)
    if noise is not None:

        def begin(drawn: Tensor) -> None:
            state.put((drawn * solver.init_sigma).to(model.dtype), plan.table)

        def predict(drawn: Tensor) -> tuple[Tensor, Tensor]:
            begin(drawn)
            return network(state.latents.model_input, state.latents.timestep, "both").float().chunk(2)

        begin(noise(predict, drawn))
    changed = network if wrap is None else wrap(network)
    take = _linear if solver.coefficients is not None else _own_steps(sampler, solver, generators)
    for row, branch in enumerate(plan.branches):
        if push is not None:
            push(plan.step[row], state, plan.table)
        branch = "both" if look is not None else branch
        rows = slice(None) if branch == "both" else slice(len(seeds))
        network.pair = None
        predictions = changed(state.latents.model_input[rows], state.latents.timestep[rows], branch)
        if look is not None:
            look(state, *predictions.chunk(2))
        guided = None if branch == "both" else predictions
        if branch == "both" and network.pair is not None and not torch.equal(predictions, network.pair):
            guided = _guided(predictions, network.pair, guidance, plan, state)
        take(predictions, guided, plan, state)
        renoise(state, plan, row + 1, generators)
    return _output(sampler, solver, state, encoded.truncated, generators, output)


def _guided(changed: Tensor, own: Tensor, guidance: Guidance, plan: Plan, state: State) -> Tensor:
    """What guidance makes of `changed`, with gap and transition of the model's `own` predictions, (2B, ...) both."""
    way = state.transition
    rows, k = way.rows(plan.table), way.rows(plan.table)[:, Column.STEP]
    guide_step(*own.chunk(2), plan.table, state, plan.finds, plan.rule)
    weight = torch.where((way.at >= 0) & (way.at <= k), rows[:, Column.AFTER], rows[:, Column.BEFORE])
    return guide(*changed.chunk(2), weight, rule=plan.rule, **dict(guidance.options))[0]


def _linear(predictions: Tensor, guided: Tensor | None, plan: Plan, state: State) -> None:
    """A step of a linear solver; `guided` where it is known, else made of both predictions."""
    pair = predictions.chunk(2) if guided is None else (guided, None)
    step(*pair, plan.table, state, plan.finds, plan.rule)


def _own_steps(
    sampler: Sampler, solver: Solver, generators: list[torch.Generator]
) -> Callable[[Tensor, Tensor | None, Plan, State], None]:
    """`_linear` for a scheduler that takes its own steps."""
    scheduler = prepared(sampler.scheduler, solver.schedule, sampler.model.device)
    timesteps = iter(scheduler.timesteps)

    def take(predictions: Tensor, guided: Tensor | None, plan: Plan, state: State) -> None:
        if guided is None:
            guided = guide_step(*predictions.chunk(2), plan.table, state, plan.finds, plan.rule)
        moved = own_step(scheduler, guided, next(timesteps), state.latents.x.clone(), generators, solver.schedule.eta)
        state.transition.advance()
        state.put(moved, plan.table)

    return take


def _output(
    sampler: Sampler,
    solver: Solver,
    state: State,
    truncated: Sequence[str],
    generators: list[torch.Generator],
    output: str,
) -> Output:
    latents, transition = state.latents.x.clone(), state.transition.at.cpu()
    transition[transition >= solver.steps] = -1
    finite = latents.isfinite().flatten(1).all(dim=1).cpu()
    images, flagged = latents, None
    if output != "latent":
        decoded = sampler.model.decode(latents, output, generators, *sampler.size(), **sampler.options)
        images, flagged, finite = decoded.images, decoded.flagged, finite & decoded.finite
    gaps, timesteps = state.transition.gaps.cpu(), solver.timesteps[solver.first_calls]
    return Output(
        images, latents, transition, gaps, timesteps, finite=finite, nsfw_content_detected=flagged, truncated=truncated
    )
