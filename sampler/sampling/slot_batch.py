"""The tensors of the engine's slots. The module `slots` decides which sample is in which slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..detection import basin_score
from ..models import PromptedNetwork
from ..types import Branch, Pair, draw
from .attempt_table import AttemptTable
from .samples import Result, Sample
from .slots import ROWS, STEPS, Slot
from .step_table import StepTable
from .steps import DeviceBatch, fused_step

Begin = Callable[[AttemptTable, PromptedNetwork, StepTable, Tensor, list[torch.Generator]], DeviceBatch]


class SlotBatch:
    """A batch of `size` slots, opened for the sample `first`; more samples of its form may follow.

    begin: opens a batch. room: reserve table rows for later samples. multistep: reserve memory for a solver's history.
    """

    def __init__(self, begin: Begin, first: Sample, size: int, room: bool, multistep: bool):
        self.plan = first.attempt_table.plan
        self.generators = [torch.Generator() for _ in range(size)]
        self.network = first.network.blank(size)
        nothing = torch.zeros((size, *first.shape), device=self.plan.table.device)
        plan = replace(self.plan.roomy(ROWS, STEPS) if room else self.plan, multistep=multistep)
        self.device_batch = begin(first.attempt_table, self.network, plan, nothing, self.generators)
        self.network = self.device_batch.network  # a captured step has its own
        self.device_batch.state.transition.row.fill_(1)  # past the last: no step changes them
        self.device_batch.state.transition.last.fill_(0)

    @property
    def half(self) -> bool:
        """Whether the latents are in half precision."""
        return self.device_batch.state.latents.x.dtype != torch.float32

    def begin(self, fresh: Sequence[Slot]) -> None:
        """Begin the samples of slots that were free."""
        for slot in fresh:
            if slot.offset == len(self.plan.table):
                self.plan = StepTable.joined([self.plan, slot.sample.attempt_table.plan])
        self.device_batch.follow(self.plan)
        for slot in fresh:
            self.network.put(slot.place, slot.sample.network, slot.sample.row)
        self.enter(fresh, [slot.sample.begin() for slot in fresh])

    def enter(self, slots: Sequence[Slot], latents: Sequence[Tensor]) -> None:
        """Set the device's row of each slot to `slot.row`, and its latents to those given, (C, h, w)."""
        state = self.device_batch.state
        rows = torch.tensor([(slot.place, slot.row, slot.end - 1) for slot in slots])
        place, row, last = rows.to(state.latents.x.device).unbind(1)
        for slot in slots:
            self.generators[slot.place] = slot.sample.generator
        state.restart(place, torch.stack(list(latents)).to(state.latents.x), self.plan.table, row, last)

    def step(self, live: Sequence[Slot], both: bool) -> tuple[Branch, Pair]:
        """Take a step; returns (the branch that ran, the predictions). A slot's `calls` count only what its own row needs.

        both: run both branches, also where all slots need the same one.
        """
        each = [self.plan.branches[slot.row] for slot in live]
        branch: Branch = each[0] if len(set(each)) == 1 and not both else "both"
        pair = self.device_batch.take(branch)
        for slot, own in zip(live, each, strict=True):
            slot.calls += 2 if own == "both" else 1
        return branch, pair

    def renoise(self, live: Sequence[Slot]) -> None:
        """Bring the slots whose next row is in `plan.jumps` back to that row's higher noise level."""
        back = [slot for slot in live if slot.row in self.plan.jumps and slot.row < slot.end]
        if not back:
            return
        latents = self.device_batch.state.latents.x.clone()
        for slot in back:
            fresh = draw(slot.sample.shape, [slot.sample.generator])[0]
            latents[slot.place] = self.plan.renoised(slot.row, latents[slot.place], fresh)
        self.device_batch.state.put(latents, self.plan.table)

    @property
    def gaps(self) -> Tensor:
        """(B, steps) on the CPU, the noise gaps. The host waits for the device."""
        return self.device_batch.state.transition.gaps.cpu()

    def result(self, slot: Slot) -> Result:
        """Return the result of a slot's attempt, in memory of its own."""
        state, attempt_table = self.device_batch.state, slot.sample.attempt_table
        gaps = state.transition.gaps[slot.place, : attempt_table.steps]
        own = attempt_table.computed(slot.attempt).to(gaps.device)  # another slot may have needed both branches
        gaps = gaps.where(own, torch.full_like(gaps, torch.nan))
        at = state.transition.within(attempt_table.solver.steps)[slot.place]
        return Result(slot.sample, state.latents.x[slot.place].clone(), at, gaps)

    def scores(self, ended: Sequence[Slot], probe: basin_score.Probe, probes: int) -> Tensor:
        """(B,) the basin scores of the latents in all slots, over `probes` noises. Only those of `ended` slots are valid.

        For a scheduler's own `step`, which moves all slots together, so that single slots cannot make judging calls.
        """
        x = self.device_batch.state.latents.x
        seeds = [0] * len(x)
        for slot in ended:
            seeds[slot.place] = slot.sample.seed
        return basin_score.scores(partial(basin_score.both, self.network), probe, x, seeds, probes)

    def shrink(self, places: Sequence[int]) -> None:
        """Keep these places alone, in this order."""
        index = torch.tensor(places, device=self.plan.table.device)
        self.network, state = self.network.select(index), self.device_batch.state.select(index)
        self.generators = [self.generators[place] for place in places]
        self.device_batch = DeviceBatch(self.network, state, fused_step(self.network, self.plan, state))
