"""The rules of `definition` on the device, each beside its eager twin."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import jit, tl


@jit
def guided_prediction(uncond, difference, weight):
    """uncond + w * (cond - uncond), float32."""
    return uncond + weight * difference


def guided_prediction_eager(uncond: Tensor, difference: Tensor, weight: float | Tensor, out: Tensor) -> Tensor:
    """The same; a number or a tensor as the weight gives the same bits."""
    if isinstance(weight, Tensor):
        return torch.addcmul(uncond, difference, weight, out=out)
    return torch.add(uncond, difference, alpha=weight, out=out)


@jit
def transition(step, left, gap, before, last, peak, keep, limit, wait):
    """The step of the transition: `left` where it is known, step + wait if the sample leaves its basin here, else -1."""
    minimum = (before > last) & (last < gap) & (last <= keep * peak)
    leaves = minimum | (gap <= limit) | (limit == float("inf"))
    return tl.where(leaves & (left < 0), step + wait.to(tl.int64), left)


def leaves_eager(
    gap: Tensor, before: Tensor, last: Tensor, peak: Tensor, keep: float | Tensor, limit: float | Tensor
) -> Tensor:
    """Whether each sample leaves its basin here; of thresholds that are numbers, only what they leave open is computed."""
    deep, near = keep != -torch.inf, limit != -torch.inf
    found = None
    if isinstance(keep, Tensor) or deep:
        found = last < torch.minimum(before, gap)
        found = found if not isinstance(keep, Tensor) and keep == 1 else found & (last <= keep * peak)
    if isinstance(limit, Tensor) or near:
        below = (gap <= limit) | (limit == torch.inf)
        found = below if found is None else found | below
    return torch.zeros_like(gap, dtype=torch.bool) if found is None else found
