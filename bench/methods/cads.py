"""CADS, condition-annealed sampling: noise is added to the prompt's embedding, and the amount falls during sampling.

Sadat et al., ICLR 2024, https://arxiv.org/abs/2310.17347, equations 3 to 5 and algorithm 1:

    y' = sqrt(gamma(t)) * y + s * sqrt(1 - gamma(t)) * n,   gamma = 1 up to TAU_1, 0 from TAU_2 on, linear between

Then y' is rescaled to the mean and standard deviation of y.
"""

from __future__ import annotations

import torch
from basinescape import Guidance
from basinescape.models import PromptedUNet
from basinescape.types import Branch, Network
from torch import Tensor

from .method import Batch, Method

TAU_1, TAU_2, SCALE = 0.6, 0.9, 0.25  # of the noise time 0..1


def gamma(time: float) -> float:
    return min(max((TAU_2 - time) / (TAU_2 - TAU_1), 0.0), 1.0)


def annealed(states: Tensor, noise: Tensor, share: float) -> Tensor:
    """`states` (B, T, D) mixed with `noise`, at gamma = `share`, and rescaled to the mean and deviation of `states`."""
    mixed = share**0.5 * states + SCALE * (1 - share) ** 0.5 * noise
    dims = (1, 2)
    mean, std = mixed.mean(dims, keepdim=True), mixed.std(dims, keepdim=True)
    return (mixed - mean) / std * states.std(dims, keepdim=True) + states.mean(dims, keepdim=True)


def annealing(network: PromptedUNet, batch: Batch) -> Network:
    """Wrap `network`: before every call its conditional embedding is annealed, with new noise."""
    following = iter(batch.sampler.solver(batch.steps).timesteps.tolist())
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    train_steps = batch.sampler.scheduler.config.num_train_timesteps
    states = network.inputs["cond"]["encoder_hidden_states"]  # "both" has a view of the same memory
    clean = states.clone()

    def predict(latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        share = gamma(next(following) / train_steps)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
        states.copy_(annealed(clean, noise.to(clean), share) if share < 1 else clean)
        return network(latents, timesteps, branch)

    return predict


def method(guidance: Guidance) -> Method:
    return Method(guidance, wrap=annealing)
