"""In-flight batching: a batch of slots in which each sample goes its own way, and a slot that is free is filled at once.

Samples of one batch stand at different rows of one step table, so they may have different guidance, different numbers of steps
and, under a guard, different attempts. A sample that is done leaves its slot, and the next one in line begins there; one that a
guard sends back begins its next attempt where it is. A finished picture is judged in its slot, by calls like any other.
Both branches of the network run while any slot needs both; where all need the same one, that one runs alone. Nothing is read
back from the device but a guard's verdicts between attempts.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..detection import basin_score
from ..guidance.guard import Guard
from ..models import PromptedNetwork
from ..types import Branch, Pair
from .attempt_table import AttemptTable
from .samples import Result, Results, Sample
from .slot_batch import Begin, SlotBatch
from .slots import Slot, Slots

log = logging.getLogger(__name__)
USUAL = 256  # of the last samples, as many tell how many attempts are usual


@dataclass
class Trial:
    """A finished attempt while it is judged.

    result: what came of it. guard, probe: who judges it, and by which question. noises: of the questions.
    target: what the network ought to answer next. scores: so far.
    """

    result: Result
    guard: Guard
    probe: basin_score.Probe
    noises: Iterator[Tensor]
    target: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)

    def ask(self) -> Tensor:
        """What the network is given next, (C, h, w)."""
        given, target = self.probe.question(self.result.latents[None], next(self.noises)[None])
        self.target = target
        return given[0]


class Engine:
    """Samples one after another, in `slots` slots.

    begin:  opens a batch.
    fixed:  the batch always has that many rows, those that nobody needs being padding. It costs a few rows at the end of the
            work; a compiler sees one shape, and images keep their bits whatever is beside them. Without it, the batch shrinks
            once there is nothing to fill it with.
    room:   samples may come that have other rows than the first; else the batch is made for that one.
    local:  a fault costs the sample that has it: those in flight begin again in fewer slots, down to one. Else it is raised.

    A guard's sample that is not finite in half precision makes no further attempts: float32 is to make it.
    """

    def __init__(self, begin: Begin, slots: int, fixed: bool = False, local: bool = False, room: bool = True):
        self._begin, self._fixed, self._local, self._room = begin, fixed, local, room
        self._slots: Slots = Slots(slots, room)
        self._batch: SlotBatch | None = None
        self._form: Any = None  # of the batch in flight
        self._trials: dict[Slot, Trial] = {}
        self._attempts: deque[int] = deque(maxlen=USUAL)  # of samples that are done
        self.calls: Counter[str] = Counter()  # network calls of samples by branch; "spared": those that were not needed

    def run(self, work: Iterable[Sample | Result], tick: Callable[[], Any] = lambda: None) -> Iterator[Result]:
        """The results in the order in which they are done; what is one already is passed on. `tick` is told of every step."""
        spoiled: list[Result] = []

        def samples() -> Iterator[Sample]:
            for one in work:
                if isinstance(one, Result):
                    spoiled.append(one)
                else:
                    yield one

        self._slots.begin(samples())
        while True:
            fresh = self._slots.admit()
            done = spoiled.copy()
            spoiled.clear()
            yield from done
            if not self._slots.live:
                if done:
                    continue
                return
            tick()
            try:
                done = self._step(fresh)
            except Exception as error:
                if not self._local:
                    raise
                done = self._retreat(error)
            self._attempts += (result.attempts or 1 for result in done)
            yield from done

    @property
    def under_way(self) -> float:
        """What the samples in the slots have done of their steps, in samples: each takes as many attempts as those before."""
        usual = fmean(self._attempts) if self._attempts else 1.0
        return sum(min(1.0, (slot.attempt + slot.progress) / usual) for slot in list(self._slots.live))

    def _step(self, fresh: Sequence[Slot]) -> list[Result]:
        """Begin the samples of slots that were free, take a step, and see what becomes of all."""
        slots = self._slots
        if self._batch is None or (fresh and self._form is not slots.form):
            self._batch = None  # gives its memory back first
            self._batch = SlotBatch(self._begin, fresh[0].sample, slots.size, self._room, slots.multistep)
            self._form = slots.form
        batch = self._batch
        if fresh:
            batch.begin(fresh)
        elif not self._fixed and slots.sparse:
            batch.shrink(slots.shrink())
        branch, pair = batch.step(slots.live)
        self.calls[branch] += len(slots.live) * (2 if branch == "both" else 1)
        self.calls["spared"] += len(slots.live) * (branch != "both")
        slots.move()
        batch.renoise(slots.live)
        return self._settle(batch, pair)

    def _settle(self, batch: SlotBatch, pair: Pair) -> list[Result]:
        """What becomes of slots after a step that made these predictions: they go on, are judged, begin again, or are free."""
        asked: list[Slot] = []
        done, again = self._looked(batch)
        ended = [slot for slot in self._slots.live if slot.row == slot.end and slot not in again]
        self._hear(batch, ended, pair)
        for slot in ended:
            trial = self._trials.get(slot)
            if trial is None:
                result = replace(batch.result(slot), calls=slot.calls)
            elif len(trial.scores) < trial.guard.attempts[slot.attempt].probes:
                asked.append(slot)
                continue
            else:
                result = _judged(slot, trial)
                del self._trials[slot]
                if result.suspect and slot.attempt + 1 < len(trial.guard.attempts) and not _lost(batch, result):
                    again.append(slot)
                    continue
            done.append(result)
            self._slots.retire(slot)
        self._go_on(batch, asked, again)
        return done

    def _looked(self, batch: SlotBatch) -> tuple[list[Result], list[Slot]]:
        """(what is given up for good, slots that are to make their next attempt) by the first gaps of plain attempts."""
        done, again = [], []
        looked = [slot for slot in self._slots.live if _looked_at(slot)]
        gaps = batch.gaps if looked else None
        for slot in looked:
            guard = slot.sample.attempt_table.guard
            if gaps is None or guard is None or guard.early is None or not guard.early.hopeless(gaps[slot.place]):
                continue
            result = batch.result(slot)
            if _lost(batch, result):
                done.append(replace(result, attempts=slot.attempt + 1, score=math.nan, suspect=True, calls=slot.calls))
                self._slots.retire(slot)
            else:
                again.append(slot)
        return done, again

    def _hear(self, batch: SlotBatch, ended: Sequence[Slot], pair: Pair) -> None:
        """Begin the trials of attempts that are done, and note the answers of those that are judged already."""
        begun = []
        for slot in ended:
            sample, trial, (uncond, cond) = slot.sample, self._trials.get(slot), pair
            guard, probe = sample.attempt_table.guard, sample.attempt_table.probe
            if trial is not None and trial.target is not None and cond is not None:
                answers = uncond[slot.place][None], cond[slot.place][None]
                trial.scores.append(basin_score.nearer(trial.target, *answers))
            elif guard is not None and probe is not None:
                noises = basin_score.noises(sample.seed, sample.shape)
                self._trials[slot] = Trial(batch.result(slot), guard, probe, noises)
                begun.append(slot)
        if begun and begun[0].sample.attempt_table.stepwise:
            self._judge_together(batch, begun)

    def _judge_together(self, batch: SlotBatch, ended: Sequence[Slot]) -> None:
        """The scores of slots whose scheduler takes its own steps."""
        trials = [self._trials[slot] for slot in ended]
        wanted = [trial.guard.attempts[slot.attempt].probes for slot, trial in zip(ended, trials, strict=True)]
        for probes in dict.fromkeys(wanted):
            found = batch.scores(ended, trials[0].probe, probes)
            for slot, trial, own in zip(ended, trials, wanted, strict=True):
                if own == probes:
                    trial.scores = [found[slot.place]] * probes
                    slot.calls += 2 * probes

    def _go_on(self, batch: SlotBatch, asked: Sequence[Slot], again: Sequence[Slot]) -> None:
        """Send slots to the calls that judge them, and to their next attempts."""
        if again and again[0].sample.attempt_table.stepwise:
            self._slots.requeue(again)
            return
        for slot in asked:
            slot.enter_judging()
        for slot in again:
            slot.enter(slot.attempt + 1)
        if asked or again:
            questions = [self._trials[slot].ask() for slot in asked]
            batch.enter([*asked, *again], questions + [slot.sample.draw() for slot in again])

    def _retreat(self, error: Exception) -> list[Result]:
        """After a fault of all slots together: those in flight begin again in half as many, one alone has failed."""
        together, short = len(self._slots.live), isinstance(error, torch.OutOfMemoryError)
        self._batch, self._trials = None, {}
        failed = self._slots.retreat(for_good=short)
        if failed:
            return [Result(sample, error=error) for sample in failed]
        if short:
            torch.cuda.empty_cache()
        log.warning("%d samples failed together (%s): they begin again, %d at a time", together, error, self._slots.size)
        return []


def _looked_at(slot: Slot) -> bool:
    """Whether a guard looks at the first gaps of a plain attempt here, and has another one left."""
    attempt_table = slot.sample.attempt_table
    if attempt_table.guard is None or attempt_table.check is None or slot.attempt or slot.judged:
        return False
    return slot.row == slot.offset + attempt_table.check and len(attempt_table.guard.attempts) > 1


def _lost(batch: SlotBatch, result: Result) -> bool:
    """Whether half precision has lost a sample that is suspect, so that another attempt is a waste: a read by the host."""
    scored = result.score is not None and math.isfinite(result.score)
    return batch.half and not scored and not bool(result.latents.isfinite().all())


def _judged(slot: Slot, trial: Trial) -> Result:
    """What came of a slot's attempt, with the verdict on it: a read by the host."""
    score = torch.stack(trial.scores).mean().item()
    suspect = basin_score.suspects(score, trial.guard.attempts[slot.attempt].threshold)
    return replace(trial.result, attempts=slot.attempt + 1, score=score, suspect=suspect, calls=slot.calls)


def guarded(
    begin: Begin,
    network: PromptedNetwork,
    attempt_table: AttemptTable,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    bar: Callable[[Sequence[Branch]], Iterable[Branch]],
    initial: Callable[[Sequence[torch.Generator]], Tensor],
) -> Results:
    """One batch under a guard, from its initial noise (B, ...). bar: of the plain attempt's steps; initial: see `Sample`."""
    turns = iter(bar(attempt_table.plan.branches[: attempt_table.starts[1]]))
    given = enumerate(zip(noise, generators, strict=True))
    work = [
        Sample(i, attempt_table, tuple(x.shape), network, i, own.initial_seed(), initial, generator=own, noise=x)
        for i, (x, own) in given
    ]
    engine = Engine(begin, len(work), fixed=network.version is not None, room=False)
    return Results.gathered(engine.run(work, tick=lambda: next(turns, None)))
