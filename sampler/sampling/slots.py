"""Which sample goes into which slot, and when: admit, retire, retry, and the order of both. Host only: no tensors, no torch.

slots.begin(work)             the samples, in the order in which they are to begin
for slot in slots.admit():    ...those that begin now, each in a free slot of the batch
slots.move()                  all have taken a step
slots.retire(slot)            its sample is done
slot.enter(attempt)           its sample makes this attempt
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they hold tensors; what is used here of them are numbers
    from .attempt_table import AttemptTable
    from .samples import Sample

ROWS, STEPS = 1024, 128  # room of a batch for the rows of all its samples' step tables, and for the noise gaps of one
AHEAD = 16  # a sample begins at most so many times the slots ahead of the oldest that is not done: what waits for it is bounded


@dataclass(eq=False)
class Slot:
    """A place in the batch and the sample in it.

    number: which of all samples it is, in the order in which they came. offset: where its rows begin in the batch's table.
    attempt, row: where it is. start, end: the attempt's first row, and the one after its last.
    calls: predictions that its sample needed so far. judged: its attempt is done, and is being judged.
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
        """Stand at the first row of an attempt."""
        first, last = (self.offset + start for start in self.sample.attempt_table.starts[attempt : attempt + 2])
        self.attempt, self.judged = attempt, False
        self.row, self.start, self.end = first, first, last

    def enter_judging(self) -> None:
        """Stand at the row of the calls that judge, which is the last one of the attempt table."""
        self.row = self.offset + self.sample.attempt_table.starts[-1]
        self.end, self.judged = self.row + 1, True

    @property
    def progress(self) -> float:
        """The share of its attempt that is done, 0 to 1."""
        return 1.0 if self.judged else (self.row - self.start) / (self.end - self.start)


class Slots:
    """The slots of a batch that stays full: `most` of them, fewer after a fault.

    room: samples may come whose rows are not in the table yet; else the batch is made for the first one's.
    live: those that are in use. attempt_tables: whose rows the batch's table has, after each other.
    size: how many there are now. form: of the samples that the batch is open for; None where no batch is open.
    """

    def __init__(self, most: int, room: bool = True):
        self.most = self.size = most
        self.live: list[Slot] = []
        self.attempt_tables: list[AttemptTable] = []
        self.form: Hashable | None = None
        self.multistep = False  # one step alone has no history: once others were there, there is room for it
        self._room = room
        self._begun = False
        self._lost = -1  # the last sample that a fault sent back
        self._waiting: deque[tuple[int, Sample]] = deque()
        self._source: Callable[[], tuple[int, Sample] | None] = lambda: None

    def begin(self, work: Iterable[Sample]) -> None:
        """Take samples from `work`, after those that wait already."""
        numbered = enumerate(work)
        self._source = lambda: next(numbered, None)

    def admit(self) -> list[Slot]:
        """Give free slots the next samples; returns those slots. Where none is in use, a batch is opened for the next one."""
        fresh: list[Slot] = []
        while len(self.live) < self.size and (following := self._peek()) is not None:
            number, sample = following
            if number > self._lost and self.size < self.most:  # those that a fault sent back are through
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
        """All have taken a step. The calls that they needed are the caller's to count."""
        self._begun = True
        for slot in self.live:
            slot.row += 1

    def retire(self, slot: Slot) -> None:
        """Its sample is done, and it is free."""
        self.live.remove(slot)

    def requeue(self, slots: Sequence[Slot]) -> None:
        """Their samples begin their next attempt with the next batch, before all others."""
        for slot in reversed(slots):
            slot.sample.attempt, slot.sample.calls = slot.attempt + 1, slot.calls
            self.live.remove(slot)
            self._waiting.appendleft((slot.number, slot.sample))

    @property
    def sparse(self) -> bool:
        """Half of the slots or more are free, where samples need not step together."""
        return not self.attempt_tables[0].stepwise and 2 * len(self.live) <= self.size

    def shrink(self) -> list[int]:
        """Keep the slots that are in use alone; returns the places that they had. The batch takes no more samples."""
        places = [slot.place for slot in self.live]
        self.size, self.form = len(places), None
        for place, slot in enumerate(self.live):
            slot.place = place
        return places

    def retreat(self, for_good: bool) -> list[Sample]:
        """After a fault of all slots together their samples begin again in half as many; one alone has failed, and is returned.

        for_good: there stay no more than that; else there are as many as before once those samples are through.
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
        """A batch of free slots that the sample can go into."""
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
