"""Sample one step at a time, with hooks that change or record a step.

The noise gap of a step, which is recorded and in which transitions are found, is that of the model's own predictions, even if
a method changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from basinescape import Guard, Guidance, Output, Sampler
from basinescape.kernels import guide
from basinescape.kernels.state import State
from basinescape.models import PromptedNetwork
from basinescape.sampling.attempt_table import AttemptTable
from basinescape.sampling.batch import mover
from basinescape.sampling.samples import Results
from basinescape.sampling.step_table import StepTable
from basinescape.sampling.steps import denoise, guided_prediction, predicted, renoise
from basinescape.types import Branch, Network, Pair
from torch import Tensor

Wrap = Callable[[Any], Network]  # the model's network -> the network to sample from
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]  # noise (B, ...) -> the first step's uncond and cond, float32
Noise = Callable[[Predict, Tensor], Tensor]  # (predict, drawn noise) -> initial noise, both (B, ...) float32 of deviation 1
Look = Callable[[State, Tensor, Tensor], None]  # (state, uncond, cond), predictions (B, ...); called before a step is taken
Push = Callable[[int, State, Tensor], None]  # (step, state, table), called before the network; may replace the state's latents


class PairKeeper:
    """The model's network, unchanged, with `pair`: a copy of the last predictions of both branches."""

    def __init__(self, network: PromptedNetwork):
        self._network = network
        self.pair: Tensor | None = None

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        predictions = self._network(latents, timesteps, branch)
        if branch == "both":
            self.pair = predictions.clone()  # a method may overwrite the predictions
        return predictions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def no_guard(guidance: Guidance | Guard) -> Guidance:
    """Return the guidance. Raises ValueError for a guard, because its attempts are several passes through the steps."""
    if isinstance(guidance, Guard):
        raise ValueError("a guard takes neither a wrapped network nor other noise: its attempts are not steps of one run")
    return guidance


@torch.inference_mode()
def sample(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: Guidance | Guard,
    wrap: Wrap | None = None,
    noise: Noise | None = None,
    look: Look | None = None,
    push: Push | None = None,
    output: str = "pil",
) -> Output:
    """An image for each prompt and its seed; without wrap, noise and push, the image that the sampler makes.

    With `look`, both branches run in every step. Raises what `no_guard` raises, and what the sampler raises.
    """
    guidance = no_guard(guidance)
    model, solver = sampler.model, sampler.solver(steps)
    attempt_table = AttemptTable.make(solver, guidance, model.device, model.correction)
    plan, options = attempt_table.plan, dict(zip(("height", "width"), sampler.size(), strict=True)) | sampler.options
    encoded = model.encode(list(prompts), **options)
    network = PairKeeper(model.network(encoded, plain=True))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    drawn = model.noise(generators, **options).to(model.device)
    state = plan.state((drawn * solver.init_sigma).to(model.dtype), model.memory_format)
    if noise is not None:

        def begin(drawn: Tensor) -> None:
            state.put((drawn * solver.init_sigma).to(model.dtype), plan.table)

        def predict(drawn: Tensor) -> tuple[Tensor, Tensor]:
            begin(drawn)
            uncond, cond = network(state.latents.model_input, state.latents.timestep, "both").float().chunk(2)
            return uncond, cond

        begin(noise(predict, drawn))
    changed = network if wrap is None else wrap(network)
    move, rows = mover(attempt_table, sampler.scheduler, generators, plan, state), iter(plan.step)

    def take(branch: Branch) -> Pair:
        if push is not None:
            push(next(rows), state, plan.table)
        network.pair = None
        uncond, cond = predicted(changed, state, branch if look is None else "both")
        if look is not None and cond is not None:
            look(state, uncond, cond)
        if cond is not None and network.pair is not None:
            own, other = network.pair.chunk(2)
            if not (torch.equal(uncond, own) and torch.equal(cond, other)):
                uncond, cond = _guided((uncond, cond), (own, other), guidance, plan, state), None
        move(uncond, cond)
        return uncond, cond

    def after(row: int) -> bool:
        renoise(state, plan, row + 1, generators)
        return True

    denoise(take, plan.branches, after)
    decode = partial(model.decode, generators=generators, **options)
    return Output.of(Results.of(state, solver.steps), encoded, solver, output, decode)


def _guided(
    changed: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], guidance: Guidance, plan: StepTable, state: State
) -> Tensor:
    """The guided prediction of `changed`, with gap and transition from the model's `own` predictions; all (B, ...)."""
    guided_prediction(*own, plan, state)
    weight = state.transition.weight(state.transition.rows(plan.table))
    options: dict[str, Any] = dict(guidance.options)
    guided, _ = guide(changed[0], changed[1], weight, rule=plan.rule, **options)
    return guided if plan.correction is None else plan.correction(guided, changed[1], weight)
