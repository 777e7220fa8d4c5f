"""What ordinary prompts look like on a model, beside the thresholds of a guard: for `Settled`, an audit, and other methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from .guidance import Guidance
from .transitions import Settled

LOOKED = 10  # first steps at most that an audit looks at
# The share of its largest value to which the unguided gap of ordinary prompts has risen where guidance may begin. One model's
# onset sweep fits it (bench/RESULTS.md): a first guess for another one, to be put right by a sweep of its own.
RISEN = 0.65


def unguided(steps: int) -> Guidance:
    """No guidance in any step, and yet the noise gap of each: a sample waits for a gap of 0, which never comes."""
    return Guidance.delayed(1.0, until=Settled((0.0,) * steps))


@dataclass(frozen=True)
class Ordinary:
    """Of ordinary prompts, on one model, over the steps of one scheduler.

    low, high:  the 5th and the 95th percentile of each step's gap under plain guidance; its median is the plain rung's `gap`.
    unguided:   the median gap of each step without guidance, for `Settled`.
    looks:      mean and standard deviation of the logarithm of `Rung.look` over the first 1, 2, ... steps of plain guidance.
    transition: the static transition, a timestep: where the unguided gap has risen to RISEN of its largest; 500, as in the
                paper, where it does not rise, as under flow matching.
    stable:     the stable region of plain guidance: name of a norm -> its (mean, standard deviation) in every step but the last
                (Huang et al., KDD 2026); None where it was not measured.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    unguided: tuple[float, ...]
    looks: tuple[tuple[float, float], ...]
    transition: float
    stable: Mapping[str, Sequence[Sequence[float]]] | None = None

    @classmethod
    def of(cls, plain: Tensor, free: Tensor, levels: Sequence[float]) -> Ordinary:
        """From the gaps of plain guidance and of none, both (n, steps), at these levels, timesteps in 0..1000."""
        low, high = plain.quantile(torch.tensor([0.05, 0.95]), dim=0).tolist()
        relative = plain / plain.median(dim=0).values
        means = [relative[:, :n].mean(dim=1).double().log() for n in range(1, min(LOOKED, plain.shape[1]) + 1)]
        usual = free.median(dim=0).values
        risen = int((usual >= RISEN * usual.max()).int().argmax())
        return cls(
            low=_short(low),
            high=_short(high),
            unguided=_short(usual.tolist()),
            looks=tuple(_short([logs.mean().item(), logs.std().item()]) for logs in means),
            transition=round(levels[risen], 1) if risen and math.isfinite(levels[risen]) else 500.0,
        )

    def threshold(self, steps: int, rate: float) -> float:
        """What a share `rate` of ordinary samples is above in the mean of its first `steps` relative gaps, were logs normal."""
        return math.exp(NormalDist(*self.looks[steps - 1]).inv_cdf(1 - rate))


def _short(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in values)
