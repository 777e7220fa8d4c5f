"""The usual noise gap of each step for prompts that are not memorized, with and without guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..guidance.guidance import Guidance
from ..guidance.transitions import Settled
from ..models.loading import ASSETS, located
from .interpolation import curve, five_digits

# Guidance may begin at the step where the unguided gap of ordinary prompts reaches this share of its maximum. The share fits
# the onset sweep of one model (bench/RESULTS.md). For another model it is a first guess, which its own sweep can correct.
RISEN = 0.65
STATIC = 500.0  # the paper's static transition
LIST = "ordinary.jsonl"  # in a model's folder: its own ordinary prompts, if photographic captions do not suit it
CAPTIONS = ASSETS / "captions.jsonl"  # about 200 photographic captions


def ordinary_prompts(model: str) -> Path:
    """The file of prompts that are ordinary on a model: LIST in its folder where there is one, else CAPTIONS."""
    own = Path(located(model)) / LIST
    return own if own.is_file() else CAPTIONS


def unguided(steps: int) -> Guidance:
    """Return guidance of weight 0 that measures the noise gap of every step, because its transition needs a gap of 0."""
    return Guidance.delayed(1.0, until=Settled((0.0,) * steps))


@dataclass(frozen=True)
class Baseline:
    """The noise gaps of ordinary prompts on one model, over the steps of one scheduler.

    low, high:  the 5th and the 95th percentile of each step's gap under plain guidance.
    unguided:   the median gap of each step without guidance, for `Settled`; empty where it was not measured.
    transition: the static transition, a timestep: the first where the unguided gap is RISEN times its largest or more; STATIC
                where that gap was not measured or does not rise, as under flow matching.
    stable:     the stable region of plain guidance: name of a norm -> its (mean, standard deviation) in every step except the
                last (Huang et al., KDD 2026); None where it was not measured.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    unguided: tuple[float, ...] = ()
    transition: float = STATIC
    stable: Mapping[str, Sequence[Sequence[float]]] | None = None

    @classmethod
    def of(cls, plain: Tensor, free: Tensor | None, levels: Sequence[float]) -> Baseline:
        """Compute it from gaps (n, steps) under plain guidance and, unless None, without any. levels: timesteps in 0..1000."""
        low, high = map(five_digits, plain.quantile(torch.tensor([0.05, 0.95]), dim=0).tolist())
        if free is None:
            return cls(low, high)
        usual = free.median(dim=0).values
        risen = int((usual >= RISEN * usual.max()).int().argmax())
        transition = round(levels[risen], 1) if risen and math.isfinite(levels[risen]) else STATIC
        return cls(low, high, five_digits(usual.tolist()), transition)

    def fitted(self, known: Sequence[float], wanted: Sequence[float]) -> Baseline:
        """Interpolate from the levels `known` to `wanted`. Drops the stable region, which holds only for its own steps."""
        low, high, free = (curve(known, gaps, wanted) if gaps else () for gaps in (self.low, self.high, self.unguided))
        return Baseline(low, high, free, self.transition)
