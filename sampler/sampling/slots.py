"""Decides which sample goes into which slot, and when. Host only: no tensors, no torch.

slots.begin(work)             take samples from `work`, in this order
for slot in slots.admit():    the slots whose samples begin now
slots.move()                  all samples have taken a step
slots.retire(slot)            the slot's sample is done
slot.enter(attempt)           the slot's sample begins this attempt
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they hold tensors; what is used here of them are numbers
    from .attempt_table import AttemptTable
    from .samples import Sample

ROWS, STEPS = 1024, 128  # room of a batch: step table rows for all its samples together, and noise gaps for each sample
AHEAD = 16  # a sample begins at most AHEAD * slots after the oldest unfinished one, so that few results wait for that one


@dataclass(eq=False)
class Slot:
    """A place in the batch and the sample in it.

    number: the sample's index in the order of all samples. offset: where the sample's rows begin in the batch's table.
    attempt, row: the current ones. start, end: the attempt's first row, and the one after its last.
    calls: predictions that the sample needed so far. judged: the attempt is done, and is being judged.
    """

    place: int
    sample: Sample
    number: int
    offset: int
    calls: int
    attempt: int = 0
    row: int = 0
    start: int = 0
    end: int = 0
    judged: bool = False

    def enter(self, attempt: int) -> None:
        """Move to the first row of an attempt."""
        first, last = (self.offset + start for start in self.sample.attempt_table.starts[attempt : attempt + 2])
        self.attempt, self.judged = attempt, False
        self.row, self.start, self.end = first, first, last

    def enter_judging(self) -> None:
        """Move to the row of the judging calls, which is the last one of the attempt table."""
        self.row = self.offset + self.sample.attempt_table.starts[-1]
        self.end, self.judged = self.row + 1, True

    @property
    def progress(self) -> float:
        """The share of its attempt that is done, 0 to 1."""
        return 1.0 if self.judged else (self.row - self.start) / (self.end - self.start)


class Slots:
    """The slots of a batch that is kept full: `most` of them, fewer after an exception.

    room: rows of later samples may be added to the batch's table; if false, it has only those of the first sample.
    live: the slots in use. attempt_tables: the tables whose rows the batch's table holds, in this order.
    size: the number of slots now. form: (size, form of the samples) of the open batch; None where no batch is open.
    """

    def __init__(self, most: int, room: bool = True):
        self.most = self.size = most
        self.live: list[Slot] = []
        self.attempt_tables: list[AttemptTable] = []
        self.form: Hashable | None = None
        self.multistep = False  # whether batches have memory for a solver's history; it stays true once a sample needed it
        self._room = room
        self._begun = False
        self._lost = -1  # the number of the last sample that begins again after an exception
        self._waiting: deque[tuple[int, Sample]] = deque()
        self._source: Callable[[], tuple[int, Sample] | None] = lambda: None

    def begin(self, work: Iterable[Sample]) -> None:
        """Take samples from `work`, after those that wait already."""
        numbered = enumerate(work)
        self._source = lambda: next(numbered, None)

    def admit(self) -> list[Slot]:
        """Put the next samples into free slots; returns these slots. If no slot is in use, a new batch may be opened."""
        fresh: list[Slot] = []
        while len(self.live) < self.size and (following := self._peek()) is not None:
            number, sample = following
            if number > self._lost and self.size < self.most:  # all samples that began again are done
                if self.live:
                    break
                self.size = self.most
            if not self.live:
                if not self._suits(sample):
                    self._open(sample)
            elif not self._suits(sample) or number - min(slot.number for slot in self.live) >= AHEAD * self.size:
                break
            self._waiting.popleft()
            taken = {slot.place for slot in self.live}
            place = next(place for place in range(self.size) if place not in taken)
            slot = Slot(place, sample, number, self._offset(sample.attempt_table), sample.calls)
            slot.enter(sample.attempt)
            self.live.append(slot)
            fresh.append(slot)
        return fresh

    def move(self) -> None:
        """Advance all slots by a row, after a step. The caller counts the slots' calls."""
        self._begun = True
        for slot in self.live:
            slot.row += 1

    def retire(self, slot: Slot) -> None:
        """Free a slot whose sample is done."""
        self.live.remove(slot)

    def requeue(self, slots: Sequence[Slot]) -> None:
        """Free these slots, and put their samples first in the queue, each with its next attempt."""
        for slot in reversed(slots):
            slot.sample.attempt, slot.sample.calls = slot.attempt + 1, slot.calls
            self.live.remove(slot)
            self._waiting.appendleft((slot.number, slot.sample))

    @property
    def sparse(self) -> bool:
        """Whether half of the slots or more are free, and the batch may shrink: its samples need not step together."""
        return not self.attempt_tables[0].stepwise and 2 * len(self.live) <= self.size

    def shrink(self) -> list[int]:
        """Keep the slots that are in use alone; returns the places that they had. The batch takes no more samples."""
        places = [slot.place for slot in self.live]
        self.size, self.form = len(places), None
        for place, slot in enumerate(self.live):
            slot.place = place
        return places

    def retreat(self, for_good: bool) -> list[Sample]:
        """After an exception of a step, let its samples begin again in half as many slots; a single one is returned as failed.

        for_good: the number stays halved; if false, all slots are used again once those samples are done.
        """
        lost = sorted(self.live, key=lambda slot: slot.number)
        self.live, self.form = [], None
        for slot in lost:
            slot.sample.attempt = slot.sample.calls = 0
        if len(lost) == 1:
            return [lost[0].sample]
        self._waiting.extendleft((slot.number, slot.sample) for slot in reversed(lost))
        self._lost, self.size = max(self._lost, lost[-1].number), max(1, min(self.size, len(lost)) // 2)
        if for_good:
            self.most = self.size
        return []

    def _peek(self) -> tuple[int, Sample] | None:
        """The next sample in line, with its number."""
        if not self._waiting:
            following = self._source()
            if following is None:
                return None
            self._waiting.append(following)
        return self._waiting[0]

    def _suits(self, sample: Sample) -> bool:
        """Whether the batch that is open can take the sample beside those that are in it."""
        if self.form != (self.size, sample.form):
            return False
        attempt_table = sample.attempt_table
        if attempt_table.stepwise:
            return not self._begun and attempt_table is self.attempt_tables[0]
        rows = sum(known.rows for known in self.attempt_tables)
        room = (
            self._room
            and rows + attempt_table.rows <= ROWS
            and attempt_table.steps <= STEPS
            and attempt_table.multistep <= self.multistep
        )
        return room or any(attempt_table is known for known in self.attempt_tables)

    def _open(self, sample: Sample) -> None:
        """Open a batch for the sample."""
        self.form, self.attempt_tables, self._begun = (self.size, sample.form), [sample.attempt_table], False
        self.multistep |= sample.attempt_table.multistep

    def _offset(self, attempt_table: AttemptTable) -> int:
        """Where the rows of an attempt table begin in the batch's table. They are added where they are not there yet."""
        offset = 0
        for known in self.attempt_tables:
            if known is attempt_table:
                return offset
            offset += known.rows
        self.attempt_tables.append(attempt_table)
        return offset
