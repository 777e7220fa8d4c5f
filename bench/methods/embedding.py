"""Change the prompt's embedding, before sampling, until the noise gap of the first step is ordinary.

Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024,
https://arxiv.org/abs/2407.21720, section 5.1: Adam on the embedding, at the first timestep, down to a target gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from basinescape import Guidance
from basinescape.models import PromptedUNet
from basinescape.types import Branch, Network
from torch import Tensor, nn

from .method import Batch, Method

RATE, ITERATIONS = 0.05, 10
SHARE = 0.5  # of the prompt's initial gap: the target if no ordinary gap is known


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """In this context, no parameter of `module` requires a gradient."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def optimised(network: PromptedUNet, latents: Tensor, timesteps: Tensor, target: float | None) -> Tensor:
    """The conditional embedding (B, T, D) after at most ITERATIONS steps. A sample stops when its gap is at most `target`."""
    inputs = {**network.inputs["cond"], **network.shared}
    with torch.inference_mode(False), torch.enable_grad():
        states = inputs["encoder_hidden_states"].clone().requires_grad_()
        latents, timesteps = latents.clone(), timesteps.clone()
        uncond = network(latents, timesteps, "uncond").detach().clone()
        optimiser = torch.optim.Adam([states], lr=RATE)
        for _ in range(ITERATIONS):
            cond = network.predict(network.net, latents, timesteps, {**inputs, "encoder_hidden_states": states})
            gaps = (cond - uncond).flatten(1).norm(dim=1)
            target = SHARE * gaps.detach() if target is None else target
            waiting = gaps > target
            if not waiting.any():
                break
            optimiser.zero_grad()
            gaps[waiting].sum().backward()
            before = states.detach().clone()
            optimiser.step()
            with torch.no_grad():
                states[~waiting] = before[~waiting]
        return states.detach()


def method(guidance: Guidance, target: float | None) -> Method:
    """target: the noise gap of an ordinary prompt at the first step; None: SHARE of each prompt's own gap."""

    def wrap(network: PromptedUNet, batch: Batch) -> Network:
        count, waiting = len(batch.seeds), True

        def predict(latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
            nonlocal waiting
            if waiting:
                with constant(batch.sampler.model.net):
                    found = optimised(network, latents[:count], timesteps[:count], target)
                network.inputs["cond"]["encoder_hidden_states"].copy_(found)
                waiting = False
            return network(latents, timesteps, branch)

        return predict

    return Method(guidance, wrap=wrap)
