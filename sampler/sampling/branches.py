"""Which predictions the rows of a table need, so that a branch nobody needs is not run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.table import Column
from ..types import Branch


def looks_for_transition(columns: dict[Column, Tensor]) -> bool:
    """Whether the transition depends on noise gaps; False where the table alone says where it is."""
    keep, limit, fall = columns[Column.KEEP], columns[Column.LIMIT], columns[Column.FALL]
    return bool(((keep > -torch.inf) | (limit.abs() < torch.inf) | (fall > 0)).any())


def branches(columns: dict[Column, Tensor]) -> tuple[Branch, ...]:
    """The branch that each row needs, or both. Where the transition depends on noise gaps, both run until it."""
    transition, finds = math.inf, looks_for_transition(columns)
    needed: list[Branch] = []
    alone: dict[float, Branch] = {0.0: "uncond", 1.0: "cond"}
    names = (Column.STEP, Column.LIMIT, Column.WAIT, Column.BEFORE, Column.AFTER)
    for k, limit, wait, before, after in zip(*(columns[name].tolist() for name in names), strict=True):
        if limit == math.inf:  # by then every sample has left
            transition = min(transition, k + wait)
        left = k >= transition
        weight = after if left else before
        needed.append("both" if finds and not left else alone.get(weight, "both"))
    return tuple(needed)
