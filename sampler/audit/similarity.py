"""How alike two pictures are: the weight-free measure for the small pipeline, fixed before any mitigation was looked at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 2  # pixels at half size: a copy may sit a little off


def similarity(images: Tensor, references: Tensor) -> Tensor:
    """Pearson correlation over colours and pixels at half size, the largest over small shifts: (N, M) float32 in -1..1.

    images: (N, 3, H, W), references: (M, 3, H, W), both float32.
    """
    return (shifted(images) @ cores(references).T).amax(dim=0)


def cores(references: Tensor) -> Tensor:
    """The middles of pictures at half size, as vectors of mean 0 and length 1: (M, D)."""
    return _standard(F.avg_pool2d(references, 2)[..., SHIFT:-SHIFT, SHIFT:-SHIFT])


def shifted(images: Tensor) -> Tensor:
    """What may lie where a reference has its middle, for every small shift, as the same kind of vectors: (shifts, N, D)."""
    small = F.avg_pool2d(images, 2)
    height, width = (side - 2 * SHIFT for side in small.shape[-2:])
    shifts = [(y, x) for y in range(2 * SHIFT + 1) for x in range(2 * SHIFT + 1)]
    return torch.stack([_standard(small[..., y : y + height, x : x + width]) for y, x in shifts])


def _standard(images: Tensor) -> Tensor:
    """Each picture as a vector of mean 0 and length 1."""
    flat = images.flatten(1)
    return F.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)
