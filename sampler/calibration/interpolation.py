"""Noise gaps measured at one sequence of noise levels, interpolated at another one.

A noise gap compares two predictions for latents of one noise level. A scheduler and its number of steps decide at which levels.
Between two measured levels the logarithm of the gap is interpolated linearly over the timestep. This is valid while the
sampler's steps are about as fine as the measured ones and span the same levels (`sound`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FINER, COARSER = 2.0, 0.5  # bounds of the number of steps, relative to the measured number


def sound(known: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether gaps measured at the levels `known`, timesteps in 0..1000, may be interpolated at the levels `wanted`."""
    if len(known) < 2 or not all(map(math.isfinite, (*known, *wanted))):
        return False
    spacing = float(np.abs(np.diff(known)).max())
    inside = min(known) - spacing <= min(wanted) and max(wanted) <= max(known) + spacing
    return inside and COARSER <= len(wanted) / len(known) <= FINER


def curve(known: Sequence[float], values: Sequence[float], wanted: Sequence[float]) -> tuple[float, ...]:
    """Positive `values` at the levels `known`, interpolated at the levels `wanted`; constant beyond the ends."""
    order = np.argsort(known)
    logs = np.interp(wanted, np.asarray(known)[order], np.log(np.asarray(values)[order]))
    return five_digits(np.exp(logs).tolist())


def five_digits(values: Sequence[float]) -> tuple[float, ...]:
    """Each value rounded to five significant digits."""
    return tuple(float(f"{value:.5g}") for value in values)
