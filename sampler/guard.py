"""A guard: plain guidance that checks its own work.

All samples run plain classifier-free guidance. The noise gap of its first steps tells memorized prompts from others (Wen et
al., ICLR 2024, https://arxiv.org/abs/2407.21720), and so does that of the last, least noisy one (Asthana & Belagiannis, ICLR
2026, https://arxiv.org/abs/2601.20642). A sample whose gaps are larger than is usual begins again, from the next noise of its
own and under more careful guidance, until its gaps are usual or no rung of the ladder is left. A later attempt whose gaps are
far smaller than is usual begins again, too: its prompt hardly changes its prediction, so the picture shows something else. Each
sample goes its own way in one batch, by its own rows of one table; the others keep the bits of plain guidance. The host reads
between attempts alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .guidance import Guidance, Rung
from .loop import Branch, Plan, Settle
from .solver import Solver

BOTH: Branch = "both"


@dataclass(frozen=True)
class Ladder:
    """The plans of all rungs in one: `whole` has their rows after each other, those of rung i from `starts[i]` on.

    rungs: none for guidance that is no guard, whose one attempt nobody judges.
    checks: the row of each rung at which its first gaps are known.
    """

    rungs: tuple[Rung, ...]
    whole: Plan
    starts: tuple[int, ...]
    checks: tuple[int, ...]
    solver: Solver

    @classmethod
    def make(cls, solver: Solver, guidance: Guidance, device: torch.device, settle: Settle | None = None) -> Ladder:
        """Lay the rungs of a guard over the steps of `solver`. Raises ValueError for steps that they are not made for."""
        if guidance.rungs and solver.coefficients is None:
            raise ValueError(f"a guard needs a linear scheduler, and {type(solver.scheduler).__name__} is not")
        attempts = [rung.guidance for rung in guidance.rungs] or [guidance]
        plans = [Plan.make(solver, one, device, settle) for one in attempts]
        starts = [0, *accumulate(len(plan.table) for plan in plans)]
        checks = []
        for i, (rung, plan) in enumerate(zip(guidance.rungs, plans, strict=False)):
            rung.check(solver.levels)
            last = rung.computed[rung.steps - 1]
            checks.append(next((row for row, step in enumerate(plan.step) if step > last), len(plan.step)))
            needed = [plan.branches[row] for row, step in enumerate(plan.step) if step in rung.computed]
            if set(needed) != {BOTH}:
                raise ValueError(f"guard needs a noise gap in steps {rung.computed} of rung {i}, {rung.guidance!r}")
        checks = tuple(start + check for start, check in zip(starts, checks, strict=False))
        return cls(guidance.rungs, Plan.joined(plans), tuple(starts), checks, solver)

    @property
    def stepwise(self) -> bool:
        """Its solver is the scheduler's own `step`, which all samples of a batch take together."""
        return self.solver.coefficients is None

    def computed(self, rung: int) -> Tensor:
        """(steps,) bool on the CPU, whether an attempt has a noise gap in a step."""
        found = torch.zeros(self.whole.steps, dtype=torch.bool)
        rows = range(self.starts[rung], self.starts[rung + 1])
        found[[self.whole.step[row] for row in rows if self.whole.branches[row] == BOTH]] = True
        return found

    def suspects(self, rung: int, gaps: Tensor, done: bool) -> bool:
        """Whether an attempt looks memorized by its gaps (steps,): all of them once it is done, else the first."""
        one = self.rungs[rung]
        return bool(one.suspect(gaps) if done else one.look(gaps) > one.early)

    def loses(self, rung: int, gaps: Tensor, done: bool) -> bool:
        """Whether an attempt that is done says too little of its prompt, by its gaps (steps,)."""
        one = self.rungs[rung]
        return done and bool(one.score(gaps) < one.lost)
