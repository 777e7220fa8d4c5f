"""A transition rule with a statistic of its own: the running mean of the noise gaps."""

from dataclasses import dataclass

import torch
from basinescape.guidance.transitions import Statistic, register


@register
@dataclass(frozen=True)
class MeanFallen(Statistic):
    """The transition is the first step whose noise gap is below `share` times the mean of those before it."""

    share: float = 0.9

    word = "mean-fallen"
    label = "noise gap is below its running mean"
    earliest_step = 1

    def leaves(self, gaps, step):
        known = torch.arange(gaps.shape[1], device=gaps.device) < step[:, None]
        mean = torch.where(known, gaps, 0.0).sum(dim=1) / step  # NaN at step 0, and no gap is below that
        return gaps.gather(1, step[:, None])[:, 0] < self.share * mean
