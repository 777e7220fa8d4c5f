"""The step table, which is made before the first step and holds all numbers that the steps read.

A table may be as long as a schedule is. In bulk runs, samples share a batch while their tables together have at most
`slots.ROWS` rows and each at most `slots.STEPS` steps; a longer table gets a batch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..guidance.guidance import Guidance, first_of_step
from ..guidance.transitions import Transition
from ..kernels.state import State
from ..kernels.table import Column
from ..schedulers.solver_coefficients import Solver
from ..types import Branch, Correction
from .gap_statistics import GapStatistics


@dataclass(frozen=True)
class StepTable:
    """A step table, and what the host knows of it.

    table:     (K, len(Column)) float32 on the device, a row for each call of the network.
    step:      the solver step each row belongs to.
    last:      the last row of a run that starts at the first row.
    branches:  the branch of the network that each row needs, or both.
    finds:     whether samples find their transition by their noise gaps; False where the table alone decides it.
    multistep: the solver keeps a history. scaled: some row scales the network's input. rule: the guidance rule.
    call:      the index of each row's call among the solver's network calls.
    jumps:     row -> (scale, sigma): before this row the latents become scale * latents + sigma * noise, a higher noise level.
    correction:    the model's change to a guided prediction before the solver reads it; None: no change.
    until:     the transition rule of each guidance in the table. rows: how many rows each guidance has.
    statistics: the rules in `until` that compute a statistic of the gaps.
    """

    table: Tensor
    step: tuple[int, ...]
    last: int
    branches: tuple[Branch, ...]
    finds: bool
    multistep: bool
    scaled: bool
    rule: str = "cfg"
    call: tuple[int, ...] = ()
    jumps: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    correction: Correction | None = None
    until: tuple[Transition | None, ...] = (None,)
    rows: tuple[int, ...] = ()
    statistics: GapStatistics = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", GapStatistics.of(self.until, self.rows, self.table.device))

    @classmethod
    def make(cls, solver: Solver, guidance: Guidance, device: torch.device, correction: Correction | None = None) -> StepTable:
        """Build the table of `guidance` over the steps of `solver`.

        Raises ValueError if the guidance has another number of steps, if it asks for timesteps and the scheduler's noise levels
        are not known, or if it restarts and the scheduler is not linear or has no step to go back over.
        """
        if solver.level is None and guidance.timed:
            raise ValueError(
                f"guidance {guidance!r} asks for timesteps in 0..1000, and the scheduler's are not known to be such: use "
                "FirstMinimum(), a factor for each step, or another scheduler"
            )
        guidance = guidance.over(solver.levels, solver.log_snrs)
        call, coefficients, jumps = _restarted(solver, guidance.restart)
        step = solver.step[call]
        columns = guidance.calls(solver.levels, step, first_of_step(solver.step)[call])
        columns |= dict(zip((Column.A, Column.B, Column.P, Column.Q), coefficients.unbind(1), strict=True))
        columns |= {Column.INPUT_SCALE: solver.input_scale[call], Column.TIMESTEP: solver.timesteps[call]}
        finds = looks_for_transition(columns)
        return cls(
            table=table_of(columns).to(device),
            step=tuple(step.tolist()),
            last=len(call) - 1,
            branches=branches(columns),
            finds=finds,
            multistep=bool(coefficients[:, 2:].any()),
            scaled=bool((solver.input_scale != 1).any()),
            rule=guidance.rule,
            call=tuple(call.tolist()),
            jumps=jumps,
            correction=correction,
            until=(guidance.until,),
            rows=(len(call),),
        )

    def renoised(self, row: int, latents: Tensor, noise: Tensor) -> Tensor:
        """Return latents (...) at the noise level of a row in `jumps`. noise: (...) float32 of standard deviation 1."""
        scale, sigma = self.jumps[row]
        return (scale * latents.float() + sigma * noise.to(latents.device)).to(latents.dtype)

    @property
    def steps(self) -> int:
        """The number of solver steps; where several guidances have rows, the largest."""
        return max(self.step) + 1

    def calls(self, steps: int) -> int:
        """How many rows the first `steps` solver steps have."""
        return sum(k < steps for k in self.step)

    @classmethod
    def joined(cls, plans: Sequence[StepTable]) -> StepTable:
        """The rows of several plans after each other."""
        starts = [0, *accumulate(len(plan.table) for plan in plans)]
        return replace(
            plans[0],
            table=torch.cat([plan.table for plan in plans]),
            step=tuple(step for plan in plans for step in plan.step),
            call=tuple(call for plan in plans for call in plan.call),
            branches=tuple(branch for plan in plans for branch in plan.branches),
            jumps={start + row: jump for start, plan in zip(starts, plans, strict=False) for row, jump in plan.jumps.items()},
            finds=any(plan.finds for plan in plans),
            until=tuple(rule for plan in plans for rule in plan.until),
            rows=tuple(count for plan in plans for count in plan.rows),
        )

    def roomy(self, rows: int, steps: int) -> StepTable:
        """Return the same table, padded to at least `rows` rows and `steps` steps."""
        room = self.table.new_zeros((max(0, rows - len(self.table)), len(Column)))
        return replace(
            self, table=torch.cat([self.table, room]), step=(*self.step, steps - 1), branches=("both", "uncond", "cond")
        )

    def state(self, noise: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> State:
        """The state of a batch that starts from `noise` (B, ...), in the network's dtype and on its device."""
        shape = tuple(noise.shape)
        empty = State.empty(shape, self.steps, noise.dtype, noise.device, self.multistep, self.scaled, memory_format)
        return empty.start(noise, self.table, last=self.last)


def table_of(columns: Mapping[Column, Tensor]) -> Tensor:
    """(K, len(Column)) float32 from (K,) each; 0 where a column is not given."""
    nothing = torch.zeros_like(next(iter(columns.values())))
    return torch.stack([columns.get(column, nothing) for column in Column], dim=1)


def looks_for_transition(columns: dict[Column, Tensor]) -> bool:
    """Whether the transition depends on noise gaps; False where the table alone decides it."""
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


def _restarted(
    solver: Solver, restart: tuple[float, float, int] | None
) -> tuple[Tensor, Tensor, dict[int, tuple[float, float]]]:
    """(the solver's call of each row, the coefficients of each row, `StepTable.jumps`)."""
    calls, coefficients = list(range(len(solver.step))), solver.coefficients
    if restart is None:
        return torch.tensor(calls), torch.zeros(len(calls), 4) if coefficients is None else coefficients, {}
    if coefficients is None:
        raise ValueError(f"restart={restart} needs a linear scheduler, and {type(solver.scheduler).__name__} is not")
    low, high = solver.call_at(restart[0]), solver.call_at(restart[1])
    if high >= low:
        raise ValueError(f"restart={restart} goes back over no step: both timesteps lead to step {solver.step[low]}")
    again = calls[high:low]
    jumps = dict.fromkeys(range(low, low + len(again) * restart[2], len(again)), solver.renoised(low, high))
    call = torch.tensor(calls[:low] + again * restart[2] + calls[low:])
    coefficients = coefficients[call].clone()
    for row in jumps:  # the steps after a jump are a new run, without a history
        coefficients[row - 1, 2:] = 0
        coefficients[row, :2] = torch.tensor(solver.first(high))
    return call, coefficients, jumps
