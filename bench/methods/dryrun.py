"""Opposite guidance with the transition found in a dry run beforehand, of all steps under opposite guidance.

The statistic is that of the scripts of Jain et al. (CVPR 2025): the first local minimum of 1 - cos(x_(k+1), x_k) of the
latents. A minimum at index 1 is skipped if there is a later one; without any minimum, index 5 is taken. It costs a second run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from basinescape import At, Guidance, Output, Sampler
from basinescape.models import PromptedUNet
from basinescape.types import Branch, Network
from torch import Tensor

from .method import Batch, Method

FALLBACK = 5


def transition(distances: Sequence[float]) -> int:
    """The step of the transition. distances: 1 - cos of the latents of successive steps."""
    minima = [i for i in range(1, len(distances) - 1) if distances[i - 1] > distances[i] < distances[i + 1]]
    if not minima:
        return FALLBACK
    return minima[1] if minima[0] == 1 and len(minima) > 1 else minima[0]


@dataclass(frozen=True)
class DryRun:
    """A method of two runs. In the second, the weight is -opposite_scale up to each sample's transition, `scale` after it."""

    scale: float
    opposite_scale: float

    def sample(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output:
        """An image for each prompt and its seed."""
        dry, transitions = self._dry(sampler, prompts, seeds, steps)
        images, latents = [None] * len(seeds), torch.empty_like(dry.latents)
        gaps, found = torch.full((len(seeds), steps), torch.nan), torch.empty(len(seeds), dtype=torch.int64)
        for k in dict.fromkeys(transitions):
            members = [i for i, own in enumerate(transitions) if own == k]
            chosen = [prompts[i] for i in members], [seeds[i] for i in members]
            out = self._until(dry.timesteps[k].item()).sample(sampler, *chosen, steps)
            latents[members], gaps[members], found[members] = out.latents, out.noise_gap, out.transition_step
            for i, image in zip(members, out.images, strict=True):
                images[i] = image
        return Output(images, latents, found, gaps, dry.timesteps)

    def _until(self, timestep: float, wrap: Callable[[PromptedUNet, Batch], Network] | None = None) -> Method:
        return Method(Guidance.opposite(self.opposite_scale, scale=self.scale, until=At(timestep)), wrap=wrap)

    def _dry(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> tuple[Output, list[int]]:
        """(output of the dry run, in which no transition occurs; the step of each sample's transition)."""
        seen: list[Tensor] = []

        def watched(network: PromptedUNet, batch: Batch) -> Network:
            def predict(latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
                seen.append(latents[: len(seeds)].flatten(1).float().clone())  # the cosine does not see the input's scale
                return network(latents, timesteps, branch)

            return predict

        dry = self._until(-1.0, watched).sample(sampler, prompts, seeds, steps, output="latent")
        seen.append(dry.latents.flatten(1).float())
        distances = torch.stack([1 - F.cosine_similarity(last, following) for last, following in pairwise(seen)], dim=1)
        return dry, [min(transition(row), steps - 1) for row in distances.tolist()]
