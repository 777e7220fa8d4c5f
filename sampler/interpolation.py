"""A rung calibrated over one sequence of noise levels, laid over another one.

A noise gap is that of two predictions for noisy latents of one noise level; a scheduler and its number of steps decide at which
levels it is looked at. So what is usual between two calibrated levels is interpolated, the logarithm over the timestep.
That holds as long as the sampler's steps are about as fine and span the same levels (`sound`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .guidance import Rung
from .transitions import At

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


def interpolated(rung: Rung, levels: Sequence[float]) -> Rung:
    """The rung over other levels. Raises ValueError for one whose transition is found by its gaps: its steps may be any."""
    until = rung.guidance.until
    if not (until is None or isinstance(until, At)):
        raise ValueError(f"{rung.guidance!r} is calibrated for its own steps alone")
    known = [(level, gap) for level, gap in zip(rung.levels, rung.gap, strict=True) if gap > 0]
    usual = curve(*zip(*known, strict=True), levels)
    gap = tuple(g if until is None or t <= until.timestep else 0.0 for g, t in zip(usual, levels, strict=True))
    share = len(levels) / len(rung.gap)
    steps, first, later = (max(1, round(n * share)) if n else 0 for n in (rung.steps, rung.first, rung.later))
    return replace(rung, gap=gap, levels=tuple(levels), steps=steps, first=first, later=later)
