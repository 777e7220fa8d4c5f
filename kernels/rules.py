"""The rules of `definition` on the device, each beside its eager twin."""

from __future__ import annotations

from functools import reduce

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
def transition(step, left, gap, before, last, peak, keep, limit, fall, wait):
    """The step of the transition: `left` where it is known, step + wait if the sample leaves its basin here, else -1."""
    minimum = (before > last) & (last < gap) & (last <= keep * peak)
    leaves = minimum | (gap < fall * peak) | (gap <= limit) | (limit == float("inf"))
    return tl.where(leaves & (left < 0), step + wait.to(tl.int64), left)


def leaves_eager(
    gap: Tensor,
    before: Tensor,
    last: Tensor,
    peak: Tensor,
    keep: float | Tensor,
    limit: float | Tensor,
    fall: float | Tensor,
) -> Tensor:
    """Whether each sample leaves its basin here; of thresholds that are numbers, only what they leave open is computed."""
    found = []
    if isinstance(keep, Tensor) or keep != -torch.inf:
        minimum = last < torch.minimum(before, gap)
        found.append(minimum if not isinstance(keep, Tensor) and keep == 1 else minimum & (last <= keep * peak))
    if isinstance(fall, Tensor) or fall:
        found.append(gap < fall * peak)
    if isinstance(limit, Tensor) or limit != -torch.inf:
        found.append((gap <= limit) | (limit == torch.inf))
    return reduce(torch.logical_or, found) if found else torch.zeros_like(gap, dtype=torch.bool)
