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
    """Finds, for each picture of a set, the other picture that is most like it, and the earlier one that it nearly duplicates.

    This reveals a model that makes one picture again and again.

    nearest_in_set, similarity_in_set, measure_in_set: the id of the other picture that is most like it, and how like it is.
    duplicate_of: the id of the first earlier picture, in the order of the prompts, of which it is a near-duplicate and which is
        itself none; only if there is one. So the pictures without this field are a set without near-duplicates.

    Each picture is compared with every other. It takes about 10 KB of memory for the measure pixels and 2 KB for sscd.
    Arguments and errors are those of `Comparison`.
    """

    names = ("nearest_in_set", "similarity_in_set", "measure_in_set", "duplicate_of")

    def __init__(self, measures: Sequence[str] | None = None, threshold: float | None = None):
        self._given = measures, threshold
        self.settings = {"thresholds": Comparison(measures, threshold).thresholds}

    def __call__(self, pictures: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, Any]]:
        """Return each picture's fields, by id. pictures: (id, bytes of its file), in the prompts' order, read one by one."""
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
            if margin > -torch.inf:  # there is another picture
                name = compared.measures[int(measure)]
                notes[id] |= {"nearest_in_set": ids[int(where)], "similarity_in_set": round(value, 4), "measure_in_set": name}
        return notes


def _nearest(margins: Tensor, values: Tensor, measures: Tensor, dim: int) -> Tensor:
    """Return (4, n): the largest margins of `Comparison.clearest` over a dimension, with their value, measure and place."""
    top, where = margins.max(dim)
    chosen = where.unsqueeze(dim)
    return torch.stack([top.double(), *(one.gather(dim, chosen).squeeze(dim) for one in (values, measures)), where])
