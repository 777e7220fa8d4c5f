"""Types that several rooms share: branches, pairs of predictions, the network, noise from samples' generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

# diffusers' classes have attributes that depend on the class and on what was loaded: type checkers know none of them.
Scheduler = Any  # a diffusers.SchedulerMixin
Pipeline = Any  # a diffusers.DiffusionPipeline

Branch = Literal["both", "uncond", "cond"]  # which predictions a call of the network makes
Pair = tuple[Tensor, Tensor | None]  # (uncond, cond), or (the one branch that was needed, None)
Step = Callable[[Branch], Pair]  # what it returns may be written over by the next one
Correction = Callable[[Tensor, Tensor, Tensor], Tensor]  # guided (B, ...), cond (B, ...), weight (B,) -> guided


class Network(Protocol):
    """latents (N, ...), timesteps (N,) -> prediction (N, ...).

    N is the batch for one branch, twice the batch for both, the unconditional half first.
    """

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor: ...


def draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise, each sample's from its own generator: (B, *shape) float32 on the CPU."""
    return torch.cat([torch.randn((1, *shape), generator=generator, dtype=torch.float32) for generator in generators])
