"""Near-duplicates in a set of pictures, for its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data.pictures import opened
from .training_images import Comparison

BLOCK = 64  # pictures of a set that are compared together


class Duplicates:
    """For each picture of a set: the other picture that is most like it, and which earlier one it nearly duplicates.

    It finds a model that makes one picture again and again.

    nearest_in_set, similarity_in_set, measure_in_set: the id of the other picture that is most like it, and how like it is.
    duplicate_of: the id of the first picture before it, in the order of the prompts, that it is a near-duplicate of and that is
        itself none; only where there is one. So those without it are a set without near-duplicates.

    A picture takes about 10 KB of memory by its pixels and 2 KB by sscd, and is compared with every other. The rest is
    `Comparison`'s.
    """

    names = ("nearest_in_set", "similarity_in_set", "measure_in_set", "duplicate_of")

    def __init__(self, measures: Sequence[str] | None = None, threshold: float | None = None):
        self._given = measures, threshold
        self.settings = {"thresholds": Comparison(measures, threshold).thresholds}

    def __call__(self, pictures: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, Any]]:
        """What is said of each picture, by id. pictures: ids and files, in the order of the prompts, read one after another."""
        compared, ids, kept = Comparison(*self._given), list[str](), torch.empty(0, dtype=torch.bool)
        nearest, notes, pictures = torch.empty(4, 0, dtype=torch.float64), dict[str, dict[str, Any]](), iter(pictures)
        while some := list(islice(pictures, BLOCK)):
            start = len(ids)
            ids += [id for id, _ in some]
            images = [opened(data, f"image {id}") for id, data in some]
            compared.add(images)
            margins, values, measures = compared.clearest(images)
            for k, id in enumerate(ids[start:]):
                margins[k, start + k] = -torch.inf
                earlier = torch.nonzero((margins[k, : start + k] > 0) & kept).flatten()
                kept = torch.cat([kept, torch.tensor([not len(earlier)])])
                notes[id] = {"duplicate_of": ids[int(earlier[0])]} if len(earlier) else {}
            if start:
                of_earlier = _nearest(margins[:, :start], values[:, :start], measures[:, :start], 0)
                of_earlier[3] += start
                nearest = torch.where(of_earlier[0] > nearest[0], of_earlier, nearest)
            nearest = torch.cat([nearest, _nearest(margins, values, measures, 1)], dim=1)
        for id, (margin, value, measure, where) in zip(ids, nearest.T.tolist(), strict=True):
            if margin > -torch.inf:  # it is not the only one
                name = compared.measures[int(measure)]
                notes[id] |= {"nearest_in_set": ids[int(where)], "similarity_in_set": round(value, 4), "measure_in_set": name}
        return notes


def _nearest(margins: Tensor, values: Tensor, measures: Tensor, dim: int) -> Tensor:
    """Of what `Comparison.clearest` returns, the largest margins over a dimension, with value, measure and place: (4, n)."""
    top, where = margins.max(dim)
    chosen = where.unsqueeze(dim)
    return torch.stack([top.double(), *(one.gather(dim, chosen).squeeze(dim) for one in (values, measures)), where])
