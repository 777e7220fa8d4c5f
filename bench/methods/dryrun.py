"""Opposite guidance whose transition is found beforehand, in a dry run of all steps under opposite guidance.

The statistic of the scripts of Jain et al. (CVPR 2025): the first local minimum of 1 - cos(x_(k+1), x_k) over the latents.
A minimum at index 1 is passed over where there is a later one, and index 5 is taken where there is none. Costs a second run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from basinescape import At, Guidance, Output, Sampler
from basinescape.models import GuidedUNet
from torch import Tensor

FALLBACK = 5


def transition(distances: Sequence[float]) -> int:
    """The step of the transition, from 1 - cos of the latents of successive steps."""
    minima = [i for i in range(1, len(distances) - 1) if distances[i - 1] > distances[i] < distances[i + 1]]
    if not minima:
        return FALLBACK
    return minima[1] if minima[0] == 1 and len(minima) > 1 else minima[0]


def method(scale: float, opposite_scale: float):
    def sample(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output:
        seen: list[Tensor] = []

        def wrap(network: GuidedUNet):
            def predict(latents: Tensor, timesteps: Tensor, branch: str) -> Tensor:
                seen.append(latents[: len(seeds)].flatten(1).float().clone())  # the cosine does not see the input's scale
                return network(latents, timesteps, branch)

            return predict

        never = Guidance.opposite(opposite_scale, scale=scale, until=At(-1.0))
        dry = sampler(prompts, seeds, steps, never, output="latent", progress=False, wrap=wrap)
        seen.append(dry.latents.flatten(1).float())
        distances = torch.stack([1 - F.cosine_similarity(last, following) for last, following in pairwise(seen)], dim=1)
        at = defaultdict(list)
        for i, row in enumerate(distances.tolist()):
            at[min(transition(row), steps - 1)].append(i)
        images, latents = [None] * len(seeds), torch.empty_like(dry.latents)
        gaps, left = torch.full((len(seeds), steps), torch.nan), torch.empty(len(seeds), dtype=torch.int64)
        for k, members in at.items():
            until = At(dry.timesteps[k].item())
            guidance = Guidance.opposite(opposite_scale, scale=scale, until=until)
            chosen = [prompts[i] for i in members], [seeds[i] for i in members]
            out = sampler(*chosen, steps, guidance, progress=False)
            latents[members], gaps[members], left[members] = out.latents, out.noise_gap, out.transition_step
            for i, image in zip(members, out.images, strict=True):
                images[i] = image
        return Output(images, latents, left, gaps, dry.timesteps)

    return sample
