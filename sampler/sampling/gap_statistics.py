"""Evaluates, in every step and on the device, the transition rules that compute a statistic of the noise gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance.transitions import Statistic
from ..guidance.transitions import Transition as Rule
from ..kernels import noise_gap
from ..kernels.state import TransitionState
from ..kernels.table import Column

ROOM = 128  # gaps are padded to a multiple of so many steps: sums have the same bits beside samples with more steps


@dataclass(frozen=True)
class GapStatistics:
    """The statistic rules of a step table.

    rules:  the distinct rules. of_row: (K,) int64 on the device, the index in `rules` of each row's rule, -1 for none. It is
            empty where there are no rules.
    """

    rules: tuple[Statistic, ...]
    of_row: Tensor

    @classmethod
    def of(cls, until: Sequence[Rule | None], rows: Sequence[int], device: torch.device | str) -> GapStatistics:
        """Collect the rules of guidances whose rows follow each other in a table. rows: the number of rows of each guidance."""
        rules = tuple(dict.fromkeys(rule for rule in until if isinstance(rule, Statistic)))
        index = [rules.index(rule) if isinstance(rule, Statistic) else -1 for rule in until]
        each = torch.tensor(index).repeat_interleave(torch.tensor(rows)) if rules else torch.empty(0, dtype=torch.int64)
        return cls(rules, each.to(device))

    def ask(self, uncond: Tensor, cond: Tensor, table: Tensor, state: TransitionState) -> None:
        """Before a step, write the gaps, and the transitions of samples that leave, to `state`. uncond, cond: (B, ...)."""
        if not self.rules:
            return
        rows, own = state.rows(table), self.of_row[torch.minimum(state.row, state.last)]
        step = rows[:, Column.STEP].long()
        asked = (state.row <= state.last) & (rows[:, Column.FIRST] > 0)
        place = step[:, None]
        known = state.gaps.gather(1, place)[:, 0]
        state.gaps.scatter_(1, place, torch.where(asked, noise_gap(uncond, cond), known)[:, None])
        steps = state.gaps.shape[1]
        gaps = torch.nn.functional.pad(state.gaps, (0, -steps % ROOM), value=torch.nan)
        for i, rule in enumerate(self.rules):
            leaves = rule.leaves(gaps, step)
            if leaves.shape != step.shape or leaves.dtype != torch.bool:
                raise ValueError(f"{rule!r} must say of each of {len(step)} samples whether it leaves, as bool, got {leaves!r}")
            state.at.copy_(torch.where(leaves & asked & (own == i) & (state.at < 0), step, state.at))
