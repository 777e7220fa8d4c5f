"""The denoising loop. Nothing in it is read back from the device: what a step needs is a table made before the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .branches import Branch, branches, looks
from .guidance import Guidance
from .kernels import backend, guide_step, step
from .kernels.lockstep import Lockstep
from .kernels.state import State
from .kernels.table import Column
from .schedulers import own_step, prepared
from .solver import Solver

Pair = tuple[Tensor, Tensor | None]  # (uncond, cond), or (the one branch that was needed, None)
Step = Callable[[Branch], Pair]  # what it returns may be written over by the next one
Settle = Callable[[Tensor, Tensor, Tensor], Tensor]  # guided (B, ...), cond (B, ...), weight (B,) -> guided


class Network(Protocol):
    """latents (N, ...), timesteps (N,) -> prediction (N, ...).

    N is the batch for one branch, twice the batch for both, the unconditional half first.
    """

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """All that the steps of one run read.

    table:     (K, len(Column)) float32 on the device, a row for each call of the network.
    step:      the solver step each row belongs to.
    last:      the last row of a run that starts at the first.
    branches:  which halves of the network each row needs.
    finds:     samples look for their transition in their noise gaps; False where the table says beforehand where it is.
    multistep: the solver keeps a history. scaled: some row scales the network's input. rule: the guidance rule.
    call:      the solver's call of each row.
    jumps:     before which rows the latents go back to a higher noise level, scale * latents + sigma * noise.
    settle:    what the model's pipeline makes of a prediction that was guided, before the solver has it; None for nothing.
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
    settle: Settle | None = None

    @classmethod
    def make(cls, solver: Solver, guidance: Guidance, device: torch.device, settle: Settle | None = None) -> Plan:
        """Lay `guidance` over the steps of `solver`.

        Raises ValueError if the guidance has another number of steps, or asks for timesteps where the scheduler's are not known
        to be noise levels.
        """
        if solver.level is None and guidance.timed:
            raise ValueError(
                f"guidance {guidance!r} asks for timesteps in 0..1000, and the scheduler's are not known to be such: use "
                "FirstMinimum(), a factor for each step, or another scheduler"
            )
        guidance = guidance.over(solver.levels, solver.log_snrs)
        call, coefficients, jumps = _restarted(solver, guidance.restart)
        step = solver.step[call]
        first = torch.cat([torch.ones(1), solver.step.diff().clamp(max=1).float()])[call]
        columns = guidance.calls(solver.levels, step, first)
        columns |= dict(zip((Column.A, Column.B, Column.P, Column.Q), coefficients.unbind(1), strict=True))
        columns |= {Column.INPUT_SCALE: solver.input_scale[call], Column.TIMESTEP: solver.timesteps[call]}
        finds = looks(columns)
        return cls(
            table=torch.stack([columns[column] for column in Column], dim=1).to(device),
            step=tuple(step.tolist()),
            last=len(call) - 1,
            branches=branches(columns, finds),
            finds=finds,
            multistep=bool(coefficients[:, 2:].any()),
            scaled=bool((solver.input_scale != 1).any()),
            rule=guidance.rule,
            call=tuple(call.tolist()),
            jumps=jumps,
            settle=settle,
        )

    @property
    def steps(self) -> int:
        """The number of solver steps; of several runs' rows, the most of one."""
        return max(self.step) + 1

    def calls(self, steps: int) -> int:
        """How many rows the first `steps` solver steps have."""
        return sum(k < steps for k in self.step)

    @classmethod
    def joined(cls, plans: Sequence[Plan]) -> Plan:
        """The rows of several plans after each other, for samples that each go their own way."""
        starts = [0, *accumulate(len(plan.table) for plan in plans)]
        return replace(
            plans[0],
            table=torch.cat([plan.table for plan in plans]),
            step=tuple(step for plan in plans for step in plan.step),
            call=tuple(call for plan in plans for call in plan.call),
            branches=tuple(branch for plan in plans for branch in plan.branches),
            jumps={start + row: jump for start, plan in zip(starts, plans, strict=False) for row, jump in plan.jumps.items()},
            finds=any(plan.finds for plan in plans),
        )

    def roomy(self, rows: int, steps: int) -> Plan:
        """The same with room for `rows` rows and `steps` steps, if those are more."""
        room = self.table.new_zeros((max(0, rows - len(self.table)), len(Column)))
        return replace(
            self, table=torch.cat([self.table, room]), step=(*self.step, steps - 1), branches=("both", "uncond", "cond")
        )

    def state(self, noise: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> State:
        """The state of a run that starts from `noise` (B, ...), in the network's dtype and on its device."""
        shape = tuple(noise.shape)
        empty = State.empty(shape, self.steps, noise.dtype, noise.device, self.multistep, self.scaled, memory_format)
        return empty.start(noise, self.table, last=self.last)


def _restarted(
    solver: Solver, restart: tuple[float, float, int] | None
) -> tuple[Tensor, Tensor, dict[int, tuple[float, float]]]:
    """(the solver's call of each row, the coefficients of each row, `Plan.jumps`)."""
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
    for row in jumps:  # a run of its own: nothing is kept of the one before
        coefficients[row - 1, 2:] = 0
        coefficients[row, :2] = torch.tensor(solver.first(high))
    return call, coefficients, jumps


@dataclass(frozen=True)
class Run:
    """What a run returns, for B samples over K solver steps.

    latents (B, ...), transition (B,) int64, gaps (B, K) float32. Under a guard those of each sample's last attempt, and on the
    CPU attempts (B,) int64, score (B,) float32 the basin score, suspect (B,) bool, calls (B,) int64 the predictions it needed.
    """

    latents: Tensor
    transition: Tensor
    gaps: Tensor
    attempts: Tensor | None = None
    score: Tensor | None = None
    suspect: Tensor | None = None
    calls: Tensor | None = None

    @classmethod
    def of(cls, state: State) -> Run:
        return cls(state.latents.x, state.transition.at, state.transition.gaps)


@dataclass
class Lane:
    """A batch in which each sample goes its own way: what its steps read and update.

    table: of steps that read one of their own, which rows are copied into; None where `take` reads the plan's.
    """

    network: Network
    state: State
    take: Step
    table: Tensor | None = None

    def follow(self, plan: Plan) -> None:
        """Go on under a plan with more rows."""
        if self.table is None:
            self.take = fused_step(self.network, plan, self.state)
        else:
            self.table[: len(plan.table)].copy_(plan.table)


def fused_step(network: Network, plan: Plan, state: State) -> Step:
    """A step that is the network and one launch; two where a guided prediction is to settle in between."""

    def take(branch: Branch) -> Pair:
        pair = uncond, cond = _predict(network, state, branch)
        if plan.settle is not None and cond is not None:
            uncond, cond = guided_prediction(uncond, cond, plan, state), None
        step(uncond, cond, plan.table, state, plan.finds, plan.rule)
        return pair

    return take


def lockstep(network: Network, plan: Plan, state: State) -> Step:
    """`fused_step` from a state just started; where no kernel runs, without the gathers that steps of its own would need."""
    if backend(plan.table.device) != "eager" or plan.settle is not None:
        return fused_step(network, plan, state)
    move = Lockstep(state, plan.table, rule=plan.rule)

    def take(branch: Branch) -> Pair:
        pair = _predict(network, state, branch)
        move(*pair)
        return pair

    return take


def scheduler_step(
    solver: Solver,
    scheduler: SchedulerMixin,
    generators: list[torch.Generator],
    network: Network,
    plan: Plan,
    state: State,
) -> Step:
    """A step by the scheduler's own `step`, for one that is not linear; its noise comes from the samples' own generators."""
    scheduler = prepared(scheduler, solver.schedule, plan.table.device)
    timesteps = iter(scheduler.timesteps)

    def take(branch: Branch) -> Pair:
        uncond, cond = _predict(network, state, branch)
        guided = uncond if cond is None else guided_prediction(uncond, cond, plan, state)
        latents = state.latents.x.clone()  # the scheduler may keep what it is given
        latents = own_step(scheduler, guided, next(timesteps), latents, generators, solver.schedule.eta)
        state.transition.advance()
        state.put(latents, plan.table)
        return uncond, cond

    return take


def guided_prediction(uncond: Tensor, cond: Tensor, plan: Plan, state: State) -> Tensor:
    """The guided prediction of every sample's step, (B, ...), settled; gaps and transitions are recorded."""
    guided = guide_step(uncond, cond, plan.table, state, plan.finds, plan.rule)
    if plan.settle is None:
        return guided
    rows, at = state.transition.rows(plan.table), state.transition.at
    left = (at >= 0) & (at <= rows[:, Column.STEP])
    return plan.settle(guided, cond, torch.where(left, rows[:, Column.AFTER], rows[:, Column.BEFORE]))


def _predict(network: Network, state: State, branch: Branch) -> Pair:
    latents = state.latents
    if branch == "both":
        uncond, cond = network(latents.model_input, latents.timestep, branch).chunk(2)
        return uncond, cond
    batch = len(latents.x)
    return network(latents.model_input[:batch], latents.timestep[:batch], branch), None


def renoise(state: State, plan: Plan, row: int, generators: Sequence[torch.Generator]) -> None:
    """Bring all samples, which stand before `row`, back to a higher noise level, if the plan says so there."""
    if row in plan.jumps:
        scale, sigma = plan.jumps[row]
        x = state.latents.x
        noise = draw(x.shape[1:], generators).to(x.device)
        state.put((scale * x.float() + sigma * noise).to(x.dtype), plan.table)


def draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise, each sample's from its own generator: (B, *shape) float32 on the CPU."""
    return torch.cat([torch.randn((1, *shape), generator=generator, dtype=torch.float32) for generator in generators])


def denoise(take: Step, branches: Iterable[Branch], after: Callable[[int], bool] | None = None) -> None:
    """Take the steps of a plan. branches: the plan's, perhaps in a bar. after: told each one's index, whether to go on."""
    for k, branch in enumerate(branches):
        take(branch)
        if after is not None and not after(k):
            return
