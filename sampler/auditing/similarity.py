"""The similarity of two pictures by their pixels: a measure without weights, fixed before any method was evaluated with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 2  # pixels at half size: a copy may sit a little off


def similarity(images: Tensor, references: Tensor) -> Tensor:
    """The largest Pearson correlation over small shifts, of colours and pixels at half size: (N, M) float32 in -1..1.

    images: (N, 3, H, W), references: (M, 3, H, W), both float32.
    """
    return (shifted(images) @ cores(references).T).amax(dim=0)


def cores(references: Tensor) -> Tensor:
    """The middle of each picture at half size, as a vector of mean 0 and length 1: (M, D)."""
    return _standard(F.avg_pool2d(references, 2)[..., SHIFT:-SHIFT, SHIFT:-SHIFT])


def shifted(images: Tensor) -> Tensor:
    """The part of each picture that lies where a reference has its middle, for each small shift, as `cores`: (shifts, N, D)."""
    small = F.avg_pool2d(images, 2)
    height, width = (side - 2 * SHIFT for side in small.shape[-2:])
    shifts = [(y, x) for y in range(2 * SHIFT + 1) for x in range(2 * SHIFT + 1)]
    return torch.stack([_standard(small[..., y : y + height, x : x + width]) for y, x in shifts])


def _standard(images: Tensor) -> Tensor:
    """Each picture as a vector of mean 0 and length 1."""
    flat = images.flatten(1)
    return F.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)
