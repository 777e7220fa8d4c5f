"""Types that several packages share: branches, pairs of predictions, the network; and noise from samples' generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

# Type checkers do not know the attributes of diffusers' classes, which depend on the class and on what was loaded.
Scheduler = Any  # a diffusers.SchedulerMixin
Pipeline = Any  # a diffusers.DiffusionPipeline

Branch = Literal["both", "uncond", "cond"]  # which predictions a call of the network makes
Pair = tuple[Tensor, Tensor | None]  # (uncond, cond), or (the prediction of one branch, None)
Step = Callable[[Branch], Pair]  # the next call may overwrite what it returned
Correction = Callable[[Tensor, Tensor, Tensor], Tensor]  # guided (B, ...), cond (B, ...), weight (B,) -> guided


class Network(Protocol):
    """latents (N, ...), timesteps (N,) -> prediction (N, ...).

    N is the batch for one branch, twice the batch for both, the unconditional half first.
    """

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor: ...


def draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw normal noise for each sample from its own generator: (B, *shape) float32 on the CPU."""
    return torch.cat([torch.randn((1, *shape), generator=generator, dtype=torch.float32) for generator in generators])
