"""What is usual at one sequence of noise levels, laid over another one.

A noise gap is that of two predictions for noisy latents of one noise level; a scheduler and its number of steps decide at which
levels it is looked at. So what is usual between two calibrated levels is interpolated, the logarithm over the timestep.
That holds as long as the sampler's steps are about as fine and span the same levels (`sound`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FINER, COARSER = 2.0, 0.5  # how many steps there may be to one calibrated


def sound(known: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether what was measured at the levels `known`, timesteps in 0..1000, says what is usual at those of `wanted`."""
    if len(known) < 2 or not all(map(math.isfinite, (*known, *wanted))):
        return False
    spacing = float(np.abs(np.diff(known)).max())
    inside = min(known) - spacing <= min(wanted) and max(wanted) <= max(known) + spacing
    return inside and COARSER <= len(wanted) / len(known) <= FINER


def curve(known: Sequence[float], values: Sequence[float], wanted: Sequence[float]) -> tuple[float, ...]:
    """Positive `values` at the levels `known`, interpolated at those of `wanted`; beyond the ends, those at the ends."""
    order = np.argsort(known)
    logs = np.interp(wanted, np.asarray(known)[order], np.log(np.asarray(values)[order]))
    return tuple(float(f"{value:.5g}") for value in np.exp(logs))
