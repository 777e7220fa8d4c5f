"""The statistics of an audit: p-values of captions, which of them are discoveries, and bounds of a share."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from scipy.stats import binomtest, false_discovery_control

LEVEL = 0.95  # of confidence


def p_values(values: Sequence[float], ordinary: Sequence[float]) -> list[float]:
    """Return the conformal p-value of each value: the share of the ordinary values and itself that are at least as large.

    It is valid for a value that is exchangeable with the ordinary ones: it is at most t with a probability of at most t (Vovk
    et al.; Bates et al., https://arxiv.org/abs/2104.08279).
    """
    known = sorted(ordinary)
    return [(1 + len(known) - bisect_left(known, value)) / (len(known) + 1) for value in values]


def discoveries(values: Sequence[float], rate: float) -> list[bool]:
    """Return which p-values are discoveries by Benjamini and Hochberg: at most a share `rate` of these is expected to be false.

    Conformal p-values from one set of ordinary values depend on each other positively, so the bound holds (Bates et al.).
    """
    if not values:
        return []
    return [bool(adjusted <= rate + 1e-12) for adjusted in false_discovery_control(values, method="bh")]


def fewest(values: int, ordinary: int, rate: float) -> int:
    """Return how many of `values` captions must stand out together to be found: no p-value is below 1 / (ordinary + 1)."""
    return max(1, math.ceil(values / (rate * (ordinary + 1)) - 1e-9))


def interval(hits: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """Return exact bounds of a share, from `hits` in `of` observations, at a level of confidence (Clopper and Pearson)."""
    bounds = binomtest(hits, of).proportion_ci(level, method="exact")
    return float(bounds.low), float(bounds.high)
