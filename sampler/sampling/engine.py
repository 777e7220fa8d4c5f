"""In-flight batching: each slot of a batch runs its own sample, and a free slot is filled at once.

The samples of a batch are at different rows of one step table, so they may have different guidance, different numbers of steps
and, under a guard, different attempts. When a sample is done, the next one in line begins in its slot. When a guard rejects an
attempt, the next attempt begins in the same slot. A finished picture is judged in its slot too, by further network calls.
Both branches of the network run, unless all slots need the same one (see `fixed`). The host reads from the device only for a
guard's early look and its verdicts.
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
USUAL = 256  # the number of last finished samples whose attempts are averaged


@dataclass
class Trial:
    """A finished attempt while it is judged.

    result: what came of it. guard, probe: the guard that judges it, and its question. noises: one for each question.
    target: the ideal answer to the last question. scores: one for each answer so far.
    """

    result: Result
    guard: Guard
    probe: basin_score.Probe
    noises: Iterator[Tensor]
    target: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)

    def ask(self) -> Tensor:
        """Return the latents of the next question, (C, h, w), and set `target`."""
        given, target = self.probe.question(self.result.latents[None], next(self.noises)[None])
        self.target = target
        return given[0]


class Engine:
    """Samples one after another, in `slots` slots.

    begin:  opens a batch.
    fixed:  the batch keeps all of its slots, and free ones are computed as padding. Beside a guarded sample both branches
            always run. This wastes some work, but a compiler sees one shape, and an image has the same bits whatever samples
            are beside it; but not with delayed guidance and no guard, whose steps with a single branch round differently.
            If false, the batch shrinks when no samples are left to fill it.
    room:   the batch has room for the table rows of later samples. If false, all samples have the first sample's rows.
    local:  an exception fails only the sample that causes it: all in flight begin again in fewer slots, down to one. If false,
            the exception is raised. So is one of the GPU itself (torch.AcceleratorError), after which nothing works on it.
    A guard's sample that is not finite in half precision makes no further attempt, because it needs float32.
    """

    def __init__(self, begin: Begin, slots: int, fixed: bool = False, local: bool = False, room: bool = True):
        self._begin, self._fixed, self._local, self._room = begin, fixed, local, room
        self._slots: Slots = Slots(slots, room)
        self._batch: SlotBatch | None = None
        self._form: Any = None  # of the batch in flight
        self._trials: dict[Slot, Trial] = {}
        self._attempts: deque[int] = deque(maxlen=USUAL)  # of samples that are done
        self.calls: Counter[str] = Counter()  # predictions by branch; "spared": those that steps with a single branch saved

    def run(self, work: Iterable[Sample | Result], tick: Callable[[], Any] = lambda: None) -> Iterator[Result]:
        """Yield results as they are done; a Result in `work` is passed on unchanged. `tick` is called before each step."""
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
                if not self._local or isinstance(error, torch.AcceleratorError):
                    raise
                done = self._retreat(error)
            self._attempts += (result.attempts or 1 for result in done)
            yield from done

    @property
    def under_way(self) -> float:
        """The finished shares of the samples in the slots, summed. Each is expected to need the usual number of attempts."""
        usual = fmean(self._attempts) if self._attempts else 1.0
        return sum(min(1.0, (slot.attempt + slot.progress) / usual) for slot in list(self._slots.live))

    def _step(self, fresh: Sequence[Slot]) -> list[Result]:
        """Begin the samples of `fresh` slots, take a step, and return the results that are done."""
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
        guarded = any(slot.sample.attempt_table.guard is not None for slot in slots.live)
        branch, pair = batch.step(slots.live, both=self._fixed and guarded)
        self.calls[branch] += len(slots.live) * (2 if branch == "both" else 1)
        self.calls["spared"] += len(slots.live) * (branch != "both")
        slots.move()
        batch.renoise(slots.live)
        return self._finish_step(batch, pair)

    def _finish_step(self, batch: SlotBatch, pair: Pair) -> list[Result]:
        """Judge, restart or free slots after a step that made the predictions `pair`; returns the results that are done."""
        asked: list[Slot] = []
        done, again = self._look_early(batch)
        ended = [slot for slot in self._slots.live if slot.row == slot.end and slot not in again]
        self._score_trials(batch, ended, pair)
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
        self._enter_next(batch, asked, again)
        return done

    def _look_early(self, batch: SlotBatch) -> tuple[list[Result], list[Slot]]:
        """(final results of lost samples, slots that begin their next attempt), from the early look at plain attempts."""
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

    def _score_trials(self, batch: SlotBatch, ended: Sequence[Slot], pair: Pair) -> None:
        """Begin the trial of each attempt that has just ended, and score the answers in the trials that have begun before."""
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
        """Score the trials of slots whose solver is the scheduler's own `step`."""
        trials = [self._trials[slot] for slot in ended]
        wanted = [trial.guard.attempts[slot.attempt].probes for slot, trial in zip(ended, trials, strict=True)]
        for probes in dict.fromkeys(wanted):
            found = batch.scores(ended, trials[0].probe, probes)
            for slot, trial, own in zip(ended, trials, wanted, strict=True):
                if own == probes:
                    trial.scores = [found[slot.place]] * probes
                    slot.calls += 2 * probes

    def _enter_next(self, batch: SlotBatch, asked: Sequence[Slot], again: Sequence[Slot]) -> None:
        """Move the slots `asked` to the judging row, and `again` to their next attempts, or to the queue where stepwise."""
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
        """Handle an exception of a step: its samples begin again in half as many slots; a single one is returned as failed."""
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
    """Whether the slot is at the row of the guard's early look in its plain attempt, and another attempt is left."""
    attempt_table = slot.sample.attempt_table
    if attempt_table.guard is None or attempt_table.check is None or slot.attempt or slot.judged:
        return False
    return slot.row == slot.offset + attempt_table.check and len(attempt_table.guard.attempts) > 1


def _lost(batch: SlotBatch, result: Result) -> bool:
    """Whether a suspect sample is not finite in half precision, so that another attempt is useless. The host reads latents."""
    scored = result.score is not None and math.isfinite(result.score)
    return batch.half and not scored and not bool(result.latents.isfinite().all())


def _judged(slot: Slot, trial: Trial) -> Result:
    """Return the result of a slot's attempt with its verdict. The host reads the score from the device."""
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
    """Sample a batch under a guard from initial noise (B, ...). bar: for the plain attempt's steps. initial: see `Sample`."""
    turns = iter(bar(attempt_table.plan.branches[: attempt_table.starts[1]]))
    given = enumerate(zip(noise, generators, strict=True))
    work = [
        Sample(i, attempt_table, tuple(x.shape), network, i, own.initial_seed(), initial, generator=own, noise=x)
        for i, (x, own) in given
    ]
    engine = Engine(begin, len(work), fixed=network.version is not None, room=False)
    return Results.gathered(engine.run(work, tick=lambda: next(turns, None)))
