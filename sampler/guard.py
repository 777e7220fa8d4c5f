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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .guidance import Guidance, Rung
from .kernels.state import State
from .loop import Branch, Plan, Run, Settle, Step, draw, fused_step
from .models import Guided
from .solver import Solver

Begin = Callable[[Guided, Plan, Tensor], tuple[Step, State]]
BOTH: Branch = "both"


@dataclass(frozen=True)
class Ladder:
    """The plans of all rungs in one: `whole` has their rows after each other, those of rung i from `starts[i]` on.

    checks: the row of each rung at which its first gaps are known.
    """

    rungs: tuple[Rung, ...]
    whole: Plan
    starts: tuple[int, ...]
    checks: tuple[int, ...]

    @classmethod
    def make(cls, solver: Solver, guidance: Guidance, device: torch.device, settle: Settle | None = None) -> Ladder:
        """Lay the rungs of a guard over the steps of `solver`. Raises ValueError for steps that they are not made for."""
        plans = [Plan.make(solver, rung.guidance, device, settle) for rung in guidance.rungs]
        starts = [0]
        for plan in plans:
            starts.append(starts[-1] + len(plan.table))
        checks = []
        for i, (rung, plan) in enumerate(zip(guidance.rungs, plans, strict=True)):
            rung.check(solver.levels)
            last = rung.computed[rung.steps - 1]
            checks.append(next((row for row, step in enumerate(plan.step) if step > last), len(plan.step)))
            needed = [plan.branches[row] for row, step in enumerate(plan.step) if step in rung.computed]
            if set(needed) != {BOTH}:
                raise ValueError(f"guard needs a noise gap in steps {rung.computed} of rung {i}, {rung.guidance!r}")
        whole = replace(
            plans[0],
            table=torch.cat([plan.table for plan in plans]),
            step=tuple(step for plan in plans for step in plan.step),
            call=tuple(call for plan in plans for call in plan.call),
            branches=tuple(branch for plan in plans for branch in plan.branches),
            jumps={
                start + row: jump for start, plan in zip(starts[:-1], plans, strict=True) for row, jump in plan.jumps.items()
            },
            finds=any(plan.finds for plan in plans),
        )
        return cls(guidance.rungs, whole, tuple(starts), tuple(s + check for s, check in zip(starts[:-1], checks, strict=True)))


def planned(solver: Solver, guidance: Guidance, device: torch.device, settle: Settle | None = None) -> Plan | Ladder:
    """`guidance` laid over the steps of `solver`. Raises ValueError where it does not fit them."""
    if guidance.rungs and solver.coefficients is None:
        raise ValueError(f"a guard needs a linear scheduler, and {type(solver.scheduler).__name__} is not")
    return (Ladder if guidance.rungs else Plan).make(solver, guidance, device, settle)


@dataclass
class Slot:
    """A place in the batch: its sample, the rung it is on, the row it stands before."""

    sample: int
    rung: int = 0
    row: int = 0


@dataclass
class Results:
    """What is kept of samples that are done, by their place in the call."""

    latents: Tensor
    transition: Tensor
    gaps: Tensor
    attempts: Tensor = field(init=False)
    score: Tensor = field(init=False)
    suspect: Tensor = field(init=False)

    def __post_init__(self) -> None:
        batch = len(self.latents)
        self.attempts, self.score = torch.ones(batch, dtype=torch.int64), torch.full((batch,), torch.nan)
        self.suspect = torch.zeros(batch, dtype=torch.bool)


def denoise(
    network: Guided,
    ladder: Ladder,
    noise: Tensor,
    scale: float,
    generators: Sequence[torch.Generator],
    begin: Begin,
    bar: Iterable,
) -> Run:
    """Run from `noise` (B, ...), which `begin` makes the state and the step for; later noise is drawn, times `scale`.

    `bar` has an item a row of the first rung.
    """
    plan, turns = ladder.whole, iter(bar)
    take, state = begin(network, plan, noise)
    slots = [Slot(sample) for sample in range(len(noise))]
    kept = Results(torch.empty_like(noise), *(torch.empty_like(v) for v in (state.transition.at, state.transition.gaps)))
    while live := [i for i, slot in enumerate(slots) if slot.rung < len(ladder.rungs)]:
        if 2 * len(live) <= len(slots) and all(slots[i].rung for i in live):  # nobody is left whose bits are plain guidance's
            index = torch.tensor(live, device=noise.device)
            network, state, slots = network.select(index), state.select(index), [slots[i] for i in live]
            take, live = fused_step(network, plan, state), list(range(len(live)))
        needed = {plan.branches[slots[i].row] for i in live}
        next(turns, None)
        take(needed.pop() if len(needed) == 1 else BOTH)
        for i in live:
            slots[i].row += 1
        _renoise(state, plan, slots, live, generators)
        ends = [i for i in live if slots[i].row in (ladder.checks[slots[i].rung], ladder.starts[slots[i].rung + 1])]
        if ends:
            _judge(ladder, state, slots, ends, kept, noise.shape[1:], scale, generators)
    return Run(kept.latents, kept.transition, kept.gaps, kept.attempts, kept.score, kept.suspect)


def _renoise(state: State, plan: Plan, slots: list[Slot], live: list[int], generators: Sequence[torch.Generator]) -> None:
    """Bring the slots back to a higher noise level that stand before such a row."""
    back = [i for i in live if slots[i].row in plan.jumps]
    if not back:
        return
    latents = state.latents.x.clone()
    for i in back:
        factor, sigma = plan.jumps[slots[i].row]
        fresh = draw(latents.shape[1:], [generators[slots[i].sample]]).to(latents.device)
        latents[i] = (factor * latents[i].float() + sigma * fresh[0]).to(latents.dtype)
    state.put(latents, plan.table)


def _judge(
    ladder: Ladder,
    state: State,
    slots: list[Slot],
    ends: list[int],
    kept: Results,
    shape: Sequence[int],
    scale: float,
    generators: Sequence[torch.Generator],
) -> None:
    """What becomes of slots whose first gaps are known, or that are done: they go on, are kept, or begin the next rung."""
    index = torch.tensor(ends, device=state.latents.x.device)
    gaps = state.transition.gaps[index].cpu()  # a read by the host
    again = []
    for i, gap in zip(ends, gaps, strict=True):
        slot, rung, final = slots[i], ladder.rungs[slots[i].rung], slots[i].rung + 1 == len(ladder.rungs)
        done = slot.row == ladder.starts[slot.rung + 1]
        suspect = rung.score(gap) > rung.verdict if done else rung.look(gap) > rung.early
        if not final and (suspect or (done and rung.score(gap) < rung.lost)):
            again.append(i)
        elif done:
            kept.latents[slot.sample] = state.latents.x[i]
            kept.transition[slot.sample] = state.transition.at[i]
            own = torch.tensor(rung.gap) > 0  # a step may have run both branches for another's sake
            kept.gaps[slot.sample] = gap.where(own, torch.tensor(torch.nan))
            kept.attempts[slot.sample] = slot.rung + 1
            kept.score[slot.sample], kept.suspect[slot.sample] = rung.score(gap), suspect
            slot.rung = len(ladder.rungs)
    if again:
        for i in again:
            slots[i].rung += 1
            slots[i].row = ladder.starts[slots[i].rung]
        rows = torch.tensor([slots[i].row for i in again], device=index.device)
        lasts = torch.tensor([ladder.starts[slots[i].rung + 1] - 1 for i in again], device=index.device)
        noise = draw(shape, [generators[slots[i].sample] for i in again]) * scale
        where = torch.tensor(again, device=index.device)
        state.restart(where, noise.to(state.latents.x), ladder.whole.table, rows, lasts)
