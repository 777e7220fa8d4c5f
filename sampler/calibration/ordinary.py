"""What ordinary prompts look like on a model, beside their basin scores: for `Settled`, plots, and other methods."""

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

# The share of its largest value to which the unguided gap of ordinary prompts has risen where guidance may begin. One model's
# onset sweep fits it (bench/RESULTS.md): a first guess for another one, to be put right by a sweep of its own.
RISEN = 0.65
STATIC = 500.0  # the paper's static transition
LIST = "ordinary.jsonl"  # beside a model whose ordinary prompts are not photographic captions
CAPTIONS = ASSETS / "captions.jsonl"  # those, about 200


def prompts_for(model: str) -> Path:
    """The prompts that are ordinary on a model: its own list of them where its folder has one, else CAPTIONS."""
    own = Path(located(model)) / LIST
    return own if own.is_file() else CAPTIONS


def unguided(steps: int) -> Guidance:
    """No guidance in any step, and yet the noise gap of each: a sample waits for a gap of 0, which never comes."""
    return Guidance.delayed(1.0, until=Settled((0.0,) * steps))


@dataclass(frozen=True)
class Ordinary:
    """Of ordinary prompts, on one model, over the steps of one scheduler.

    low, high:  the 5th and the 95th percentile of each step's gap under plain guidance.
    unguided:   the median gap of each step without guidance, for `Settled`; empty where it was not measured.
    transition: the static transition, a timestep: where the unguided gap has risen to RISEN of its largest; STATIC where it was
                not measured, or does not rise, as under flow matching.
    stable:     the stable region of plain guidance: name of a norm -> its (mean, standard deviation) in every step but the last
                (Huang et al., KDD 2026); None where it was not measured.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    unguided: tuple[float, ...] = ()
    transition: float = STATIC
    stable: Mapping[str, Sequence[Sequence[float]]] | None = None

    @classmethod
    def of(cls, plain: Tensor, free: Tensor | None, levels: Sequence[float]) -> Ordinary:
        """From the gaps of plain guidance and of none, both (n, steps), at these levels, timesteps in 0..1000."""
        low, high = map(short, plain.quantile(torch.tensor([0.05, 0.95]), dim=0).tolist())
        if free is None:
            return cls(low, high)
        usual = free.median(dim=0).values
        risen = int((usual >= RISEN * usual.max()).int().argmax())
        transition = round(levels[risen], 1) if risen and math.isfinite(levels[risen]) else STATIC
        return cls(low, high, short(usual.tolist()), transition)


def short(values: Sequence[float]) -> tuple[float, ...]:
    """Five digits of each."""
    return tuple(float(f"{value:.5g}") for value in values)
