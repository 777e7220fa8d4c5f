"""In-flight batching: a batch of slots in which each sample goes its own way, and a slot that is free is filled at once.

Samples of one batch stand at different rows of one table of steps, so they may have different guidance, different numbers of
steps and, under a guard, different attempts. A sample that is done leaves its slot, and the next one in line begins there; one
that a guard sends back begins its next attempt where it is. A finished picture is judged in its slot, by calls like any other.
Both branches of the network run while any slot needs both; where all need the same one, that one runs alone. Nothing is read
back from the device but a guard's verdicts between attempts.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..detection import basin
from ..models import Guided
from ..types import Branch, Pair, draw
from .ladder import Ladder
from .plan import Plan
from .slots import Result, Sample, Slot, Trial
from .steps import Lane, Run, fused_step

log = logging.getLogger(__name__)
ROWS, STEPS = 1024, 128  # room of a batch for the rows of all its samples' plans, and for the noise gaps of one
AHEAD = 16  # a sample begins at most so many times the slots ahead of the oldest that is not done: what waits for it is bounded

Begin = Callable[[Ladder, Guided, Plan, Tensor, Sequence[torch.Generator]], Lane]


class Engine:
    """Samples one after another, in `slots` slots.

    begin:  opens a batch.
    fixed:  the batch always has that many rows, those that nobody needs being padding. It costs a few rows at the end of the
            work; a compiler sees one shape, and images keep their bits whatever is beside them. Without it, the batch shrinks
            once there is nothing to fill it with.
    room:   samples may come that have other plans than the first; else the batch is made for that one.
    local:  a fault costs the sample that has it: those in flight begin again in fewer slots, down to one. Else it is raised.
    """

    def __init__(self, begin: Begin, slots: int, fixed: bool = False, local: bool = False, room: bool = True):
        self._begin, self._fixed, self._local, self._room = begin, fixed, local, room
        self._most = self._size = slots
        self._lane: Lane | None = None
        self._form: tuple | None = None  # of the batch that is open; None where none is
        self._multistep, self._lost = False, -1
        self._live: list[Slot] = []
        self._waiting: deque[tuple[int, Sample]] = deque()
        self.calls: Counter[str] = Counter()  # network calls of samples by branch; "spared": those that were not needed

    def run(self, work: Iterable[Sample | Result], tick: Callable[[], Any] = lambda: None) -> Iterator[Result]:
        """The results in the order in which they are done; what is one already is passed on. `tick` is told of every step."""
        self._work, self._spoiled = enumerate(work), []
        while True:
            fresh = self._admit()
            done, self._spoiled = self._spoiled, []
            yield from done
            if not self._live:
                if done:
                    continue
                return
            tick()
            try:
                self._begin_in(fresh)
                done = self._settle(self._step())
            except Exception as error:
                if not self._local:
                    raise
                done = self._retreat(error)
            yield from done

    @property
    def under_way(self) -> float:
        """The steps that samples in the slots have taken of their attempts, as so many samples' worth."""
        attempts = [slot for slot in list(self._live) if slot.trial is None]
        starts = ((slot, slot.offset + slot.sample.ladder.starts[slot.attempt]) for slot in attempts)
        return len(self._live) - len(attempts) + sum((slot.row - start) / (slot.end - start) for slot, start in starts)

    def _admit(self) -> list[Slot]:
        """Give free slots the next samples; returns those slots."""
        fresh: list[Slot] = []
        while len(self._live) < self._size and (following := self._peek()) is not None:
            number, sample = following
            if number > self._lost and self._size < self._most:  # those that a fault sent back are through
                if self._live:
                    break
                self._size = self._most
            if not self._live:
                if not self._suits(sample):
                    self._open(sample)
            elif not self._suits(sample) or number - min(slot.number for slot in self._live) >= AHEAD * self._size:
                break
            self._waiting.popleft()
            taken = {slot.place for slot in self._live}
            place = next(place for place in range(self._size) if place not in taken)
            slot = Slot(place, sample, number, self._offset(sample.ladder), calls=sample.calls)
            slot.enter(sample.attempt)
            self._live.append(slot)
            fresh.append(slot)
        return fresh

    def _begin_in(self, fresh: Sequence[Slot]) -> None:
        """Begin the samples of slots that were free; where there are none, leave out those that will stay so."""
        if self._lane is None:
            self._make_lane(fresh[0].sample)
        if fresh:
            self._lane.follow(self._plan)
            for slot in fresh:
                self._lane.network.put(slot.place, slot.sample.network, slot.sample.row)
            self._send(fresh, [slot.sample.begin() for slot in fresh])
        elif not self._fixed and not self._ladders[0].stepwise and 2 * len(self._live) <= self._size:
            self._shrink()

    def _peek(self) -> tuple[int, Sample] | None:
        """The next sample in line, with its number."""
        while not self._waiting:
            following = next(self._work, None)
            if following is None:
                return None
            if isinstance(following[1], Result):
                self._spoiled.append(following[1])
            else:
                self._waiting.append(following)
        return self._waiting[0]

    def _suits(self, sample: Sample) -> bool:
        """Whether the batch that is open can take the sample beside those that are in it."""
        if self._form != (self._size, *sample.form):
            return False
        if sample.ladder.stepwise:  # its scheduler knows one step for all: they begin together
            return not self._begun and sample.ladder is self._ladders[0]
        plan, rows = sample.ladder.whole, len(self._plan.table)
        room = rows + len(plan.table) <= ROWS and plan.steps <= STEPS and plan.multistep <= self._multistep
        return room or any(sample.ladder is ladder for ladder in self._ladders)

    def _open(self, sample: Sample) -> None:
        """A batch of free slots that the sample can go into; `_make_lane` gives it its memory."""
        self._form, self._lane, self._begun = (self._size, *sample.form), None, False
        self._ladders, self._plan = [sample.ladder], sample.ladder.whole
        self._multistep |= self._plan.multistep  # one step alone has no history: once others were there, there is room for it

    def _make_lane(self, sample: Sample) -> None:
        self._generators = [torch.Generator() for _ in range(self._size)]
        device, network = self._plan.table.device, sample.network.blank(self._size)
        nothing = torch.zeros((self._size, *sample.shape), device=device)
        plan = replace(self._plan.roomy(ROWS, STEPS) if self._room else self._plan, multistep=self._multistep)
        self._lane = self._begin(sample.ladder, network, plan, nothing, self._generators)
        self._lane.state.transition.row.fill_(1)  # past the last: no step changes them
        self._lane.state.transition.last.fill_(0)

    def _offset(self, ladder: Ladder) -> int:
        """Where the ladder's rows begin in the batch's table, which they are added to where they are not there yet."""
        for i, known in enumerate(self._ladders):
            if known is ladder:
                return sum(len(earlier.whole.table) for earlier in self._ladders[:i])
        offset = len(self._plan.table)
        self._ladders.append(ladder)
        self._plan = Plan.joined([self._plan, ladder.whole])
        return offset

    def _send(self, slots: Sequence[Slot], noise: Sequence[Tensor]) -> None:
        """Begin the attempts that the slots are to make, each from its noise (C, h, w)."""
        state = self._lane.state
        place, row, last = torch.tensor([(s.place, s.row, s.end - 1) for s in slots]).to(state.latents.x.device).unbind(1)
        for slot in slots:
            self._generators[slot.place] = slot.sample.generator
        state.restart(place, torch.stack(list(noise)).to(state.latents.x), self._plan.table, row, last)

    def _step(self) -> Pair:
        needed = {self._plan.branches[slot.row] for slot in self._live}
        branch = needed.pop() if len(needed) == 1 else "both"
        pair = self._lane.take(branch)
        self._begun = True
        self.calls[branch] += len(self._live) * (2 if branch == "both" else 1)
        self.calls["spared"] += len(self._live) * (branch != "both")
        for slot in self._live:
            slot.calls += 2 if self._plan.branches[slot.row] == "both" else 1
            slot.row += 1
        self._renoise()
        return pair

    def _renoise(self) -> None:
        """Bring the slots back to a higher noise level that stand before such a row."""
        back = [slot for slot in self._live if slot.row in self._plan.jumps and slot.row < slot.end]
        if not back:
            return
        latents = self._lane.state.latents.x.clone()
        for slot in back:
            factor, sigma = self._plan.jumps[slot.row]
            fresh = draw(slot.sample.shape, [slot.sample.generator])[0].to(latents.device)
            latents[slot.place] = (factor * latents[slot.place].float() + sigma * fresh).to(latents.dtype)
        self._lane.state.put(latents, self._plan.table)

    def _settle(self, pair: Pair) -> list[Result]:
        """What becomes of slots after a step that made these predictions: they go on, are judged, begin again, or are free."""
        looked, ended = ([s for s in self._live if s.looked_at], [s for s in self._live if s.row == s.end])
        asked, again, done = [], [], []
        if looked:
            gaps = self._lane.state.transition.gaps.cpu()  # a read by the host
            again += [slot for slot in looked if slot.sample.ladder.guard.early.hopeless(gaps[slot.place])]
        for slot in ended:
            guard = slot.sample.ladder.guard
            if slot.trial is not None:
                answers = (prediction[slot.place][None] for prediction in pair)
                slot.trial.scores.append(basin.nearer(slot.trial.target, *answers))
            elif guard is not None:
                slot.trial = Trial(self._result(slot), basin.noises(slot.sample.seed, slot.sample.shape))
        if any(slot.sample.ladder.stepwise and slot.trial for slot in ended):
            self._judge_together(ended)
        for slot in ended:
            guard = slot.sample.ladder.guard
            if guard is None:
                done.append(replace(self._result(slot), calls=slot.calls))
            elif len(slot.trial.scores) < guard.attempts[slot.attempt].probes:
                asked.append(slot)
                continue
            elif (judged := self._judged(slot)).suspect and slot.attempt + 1 < len(guard.attempts):
                again.append(slot)
                continue
            else:
                done.append(judged)
            self._live.remove(slot)
        self._go_on(asked, again)
        return done

    def _go_on(self, asked: Sequence[Slot], again: Sequence[Slot]) -> None:
        """Send slots to the calls that judge them, and to their next attempts."""
        if again and again[0].sample.ladder.stepwise:  # with the next batch: their scheduler knows one step for all
            for slot in reversed(again):
                slot.sample.attempt, slot.sample.calls = slot.attempt + 1, slot.calls
                self._live.remove(slot)
                self._waiting.appendleft((slot.number, slot.sample))
            return
        for slot in again:
            slot.enter(slot.attempt + 1)
        if asked or again:
            self._send([*asked, *again], [slot.ask() for slot in asked] + [slot.sample.draw() for slot in again])

    def _judge_together(self, ended: Sequence[Slot]) -> None:
        """The scores of slots whose scheduler takes its own steps, in which there is no room for calls that judge."""
        x, ladder = self._lane.state.latents.x, ended[0].sample.ladder
        seeds = [0] * len(x)
        for slot in ended:
            seeds[slot.place] = slot.sample.seed
        predict, attempts = partial(basin.both, self._lane.network), ladder.guard.attempts
        for probes in {attempts[slot.attempt].probes for slot in ended}:
            found = basin.scores(predict, ladder.probe, x, seeds, probes)
            for slot in ended:
                if attempts[slot.attempt].probes == probes:
                    slot.trial.scores = [found[slot.place]] * probes
                    slot.calls += 2 * probes

    def _result(self, slot: Slot) -> Result:
        state, ladder = self._lane.state, slot.sample.ladder
        gap = state.transition.gaps[slot.place, : ladder.whole.steps]
        own = ladder.computed(slot.attempt).to(gap.device)  # a step may have run both branches for another's sake
        gap = gap.where(own, torch.full_like(gap, torch.nan))
        return Result(slot.sample, state.latents.x[slot.place].clone(), state.transition.at[slot.place].clone(), gap)

    def _judged(self, slot: Slot) -> Result:
        """What came of a slot's attempt, with the verdict on it: a read by the host."""
        score = torch.stack(slot.trial.scores).mean().item()
        suspect = basin.suspects(score, slot.sample.ladder.guard.attempts[slot.attempt].threshold)
        said = {"attempts": slot.attempt + 1, "score": score, "suspect": suspect}
        return replace(slot.trial.result, **said, calls=slot.calls)

    def _shrink(self) -> None:
        """The slots that are in use alone, once nothing is left to fill the others with."""
        index = torch.tensor([slot.place for slot in self._live], device=self._plan.table.device)
        lane = self._lane
        network, state = lane.network.select(index), lane.state.select(index)
        self._lane = Lane(network, state, fused_step(network, self._plan, state))
        self._size, self._form = len(index), None
        for place, slot in enumerate(self._live):
            slot.place = place

    def _retreat(self, error: Exception) -> list[Result]:
        """After a fault of all slots together: those in flight begin again in half as many, one alone has failed."""
        lost = sorted(self._live, key=lambda slot: slot.number)
        self._live, self._lane, self._form, short = [], None, None, isinstance(error, torch.OutOfMemoryError)
        for slot in lost:
            slot.sample.attempt = slot.sample.calls = 0
        if len(lost) == 1:
            return [Result(lost[0].sample, error=error)]
        self._waiting.extendleft((slot.number, slot.sample) for slot in reversed(lost))
        self._lost, self._size = max(self._lost, lost[-1].number), max(1, min(self._size, len(lost)) // 2)
        if short:
            self._most = self._size
            torch.cuda.empty_cache()
        log.warning("%d samples failed together (%s): they begin again, %d at a time", len(lost), error, self._size)
        return []


def guarded(
    begin: Begin,
    network: Guided,
    ladder: Ladder,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    bar: Callable[[Sequence[Branch]], Iterable[Branch]],
    initial: Callable[[Sequence[torch.Generator]], Tensor],
) -> Run:
    """One batch under a guard, from its initial noise (B, ...). bar: of the plain attempt's steps; initial: see `Sample`."""
    turns = iter(bar(ladder.whole.branches[: ladder.starts[1]]))
    given = enumerate(zip(noise, generators, strict=True))
    work = [
        Sample(i, ladder, tuple(x.shape), network, i, own.initial_seed(), initial, generator=own, noise=x)
        for i, (x, own) in given
    ]
    engine = Engine(begin, len(work), fixed=network.version is not None, room=False)
    return _gathered(engine.run(work, tick=lambda: next(turns, None)))


def _gathered(results: Iterable[Result]) -> Run:
    """The results of samples whose keys are 0, 1, ... as those of one call."""
    ordered = sorted(results, key=lambda result: result.sample.key)
    latents, transition, gaps = (torch.stack([getattr(r, name) for r in ordered]) for name in ("latents", "transition", "gaps"))
    names = ("attempts", "score", "suspect", "calls")
    return Run(latents, transition, gaps, *(torch.tensor([getattr(result, name) for result in ordered]) for name in names))
