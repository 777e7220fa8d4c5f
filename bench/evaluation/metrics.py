"""Statistics of evaluations: intervals of shares, and how well a score separates two groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float], groups: Sequence[str], level: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`. Whole groups are drawn: a prompt's seeds are not independent.

    If all values are 0, or all are 1, the bootstrap has no width. Then the interval is the exact one (Clopper & Pearson) of as
    many trials as there are groups.
    """
    if set(values) in ({0.0}, {1.0}):
        bound = ((1 - level) / 2) ** (1 / len(set(groups)))
        return (bound, 1.0) if values[0] else (0.0, 1 - bound)
    names = sorted(set(groups))
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    index = {name: i for i, name in enumerate(names)}
    for value, group in zip(values, groups, strict=True):
        sums[index[group]] += value
        counts[index[group]] += 1
    drawn = np.random.default_rng(0).integers(0, len(names), (draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def roc(scores: Sequence[float], positive: Sequence[bool], fpr: float = 0.01) -> tuple[float, float]:
    """(area under the ROC curve, true positive rate at a false positive rate of at most `fpr`)."""
    from sklearn.metrics import roc_auc_score, roc_curve

    rates, hits, _ = roc_curve(positive, scores)
    return float(roc_auc_score(positive, scores)), float(hits[rates <= fpr].max())
