"""The step tables of all attempts of a guard, joined into one: another attempt is a jump to its first row.

Each sample of a batch has its own row. So a sample that passes at the first attempt keeps the bits of plain guidance. The host
reads from the device only for a guard's early look and its verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .. import checks
from ..detection.basin_score import Probe
from ..guidance.guard import Guard
from ..guidance.guidance import Guidance
from ..kernels.table import Column
from ..schedulers.solver_coefficients import Solver
from ..types import Branch, Correction
from .step_table import StepTable

BOTH: Branch = "both"


@dataclass(frozen=True)
class AttemptTable:
    """The rows of all attempts, joined in `plan`. Attempt i begins at row `starts[i]`.

    guidance: a Guidance, which is one attempt without a verdict, or a guard.
    check: the row after the steps whose gaps the guard's early look reads; None without an early look.
    probe: the question by which the network judges a picture. Its row is the last one. None without a guard.
    """

    guidance: Guidance | Guard
    plan: StepTable
    starts: tuple[int, ...]
    solver: Solver
    check: int | None = None
    probe: Probe | None = None

    @classmethod
    def make(
        cls, solver: Solver, guidance: Guidance | Guard, device: torch.device, correction: Correction | None = None
    ) -> AttemptTable:
        """Build the table of `guidance` over the steps of `solver`.

        Raises ValueError where the guidance does not fit these steps, and for a guard where pictures cannot be judged.
        """
        attempts = [one.guidance for one in guidance.attempts] if isinstance(guidance, Guard) else [guidance]
        plans = [StepTable.make(solver, one, device, correction) for one in attempts]
        starts = tuple(accumulate((len(plan.table) for plan in plans), initial=0))
        if not isinstance(guidance, Guard):
            return cls(guidance, plans[0], starts, solver)
        probe, check, early = Probe.of(solver.scheduler), None, guidance.early
        if early is not None:
            if not early.suits(solver.levels):
                raise ValueError(
                    f"the guard's early look is calibrated for {_steps(early.timesteps)}, but the sampler takes "
                    f"{_steps(solver.levels)}: calibrate for those, or give calibration.fitted(sampler, steps) to the guard"
                )
            check = plans[0].calls(early.steps)
            if set(plans[0].branches[:check]) != {BOTH}:
                raise ValueError(f"the guard's early look needs a noise gap in each of the first {early.steps} steps")
        return cls(guidance, StepTable.joined([*plans, _asking(plans[0], probe)]), starts, solver, check, probe)

    @property
    def guard(self) -> Guard | None:
        """The guard; None where the guidance is not a guard."""
        return self.guidance if isinstance(self.guidance, Guard) else None

    @property
    def rows(self) -> int:
        """The number of rows: those of all attempts, and under a guard one for the calls that judge."""
        return len(self.plan.table)

    @property
    def steps(self) -> int:
        """The number of solver steps. All attempts have the same."""
        return self.plan.steps

    @property
    def multistep(self) -> bool:
        """Whether the solver keeps a history."""
        return self.plan.multistep

    @property
    def stepwise(self) -> bool:
        """Whether the solver is the scheduler's own `step`, which all samples of a batch take together."""
        return self.solver.coefficients is None

    def stopped(self, after: int | None) -> AttemptTable:
        """Return the table cut to its first `after` solver steps; None: uncut. Raises ValueError unless it has as many."""
        if after is None:
            return self
        if not 1 <= checks.at_least_one("stop_after", after) <= self.solver.steps:
            raise ValueError(f"stop_after must be 1 to {self.solver.steps}, the steps; got {after}")
        return replace(self, plan=replace(self.plan, branches=self.plan.branches[: self.plan.calls(after)]))

    @property
    def idle(self) -> list[str]:
        """A line about each guidance whose transition changes nothing over these steps."""
        guidances = [self.guidance] if isinstance(self.guidance, Guidance) else [one.guidance for one in self.guidance.attempts]
        levels = self.solver.levels
        lines = [one.over(levels, self.solver.log_snrs).idle(levels) for one in dict.fromkeys(guidances)]
        return list(dict.fromkeys(line for line in lines if line is not None))

    def computed(self, attempt: int) -> Tensor:
        """(steps,) bool on the CPU: in which steps of an attempt there is a noise gap."""
        found = torch.zeros(self.plan.steps, dtype=torch.bool)
        rows = range(self.starts[attempt], self.starts[attempt + 1])
        found[[self.plan.step[row] for row in rows if self.plan.branches[row] == BOTH]] = True
        return found


def _asking(plain: StepTable, probe: Probe) -> StepTable:
    """Return the one row of the calls that judge. Its network reads the question; what the step makes of that is lost."""
    row = torch.zeros(1, len(Column))
    row[0, Column.INPUT_SCALE], row[0, Column.TIMESTEP] = 1.0, probe.timestep
    row[0, Column.KEEP] = row[0, Column.LIMIT] = -torch.inf
    table = row.to(plain.table.device)
    return StepTable(
        table, (0,), 0, (BOTH,), False, plain.multistep, plain.scaled, plain.rule, (0,), correction=plain.correction, rows=(1,)
    )


def _steps(timesteps: Sequence[float]) -> str:
    return f"{len(timesteps)} steps at timesteps {timesteps[0]:g} to {timesteps[-1]:g}"
