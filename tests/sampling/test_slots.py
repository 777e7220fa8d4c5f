"""Which sample goes into which slot: the host's part of the engine alone, without tensors."""

import subprocess
import sys
from dataclasses import dataclass, field

from basinescape.sampling.slots import AHEAD, ROWS, STEPS, Slots
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass(eq=False)
class AttemptTable:
    """Attempts of so many rows each, and a row for the calls that judge."""

    attempts: tuple[int, ...]
    steps: int = 5
    multistep: bool = False
    stepwise: bool = False

    @property
    def starts(self):
        return [sum(self.attempts[:i]) for i in range(len(self.attempts) + 1)]

    @property
    def rows(self):
        return sum(self.attempts) + 1


@dataclass(eq=False)
class Work:
    key: int
    attempt_table: AttemptTable
    form: str = "one"
    attempt: int = 0
    calls: int = 0
    seen: list[int] = field(default_factory=list)  # the attempts that it began


def run(slots, again=lambda slot: False, fault=lambda k: False, for_good=False):
    """Steps until all are done: (keys in the order in which they are done, the most in use at once, failed)."""
    order, most, failed, k = [], 0, [], 0
    while True:
        for slot in slots.admit():
            slot.sample.seen.append(slot.attempt)
        if not slots.live:
            return order, most, failed
        assert len({slot.place for slot in slots.live}) == len(slots.live) <= slots.size
        assert all(0 <= slot.place < slots.size and 0 <= slot.progress < 1 for slot in slots.live)
        most, k = max(most, len(slots.live)), k + 1
        if fault(slots.live):
            failed += [sample.key for sample in slots.retreat(for_good)]
            continue
        slots.move()
        for slot in [slot for slot in slots.live if slot.row == slot.end]:
            if again(slot):
                slot.enter(slot.attempt + 1)
                slot.sample.seen.append(slot.attempt)
            else:
                order.append(slot.sample.key)
                slots.retire(slot)


def begun(most, work, **options):
    slots = Slots(most, **options)
    slots.begin(iter(work))
    return slots


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 6))
@settings(deadline=None)
def test_a_free_slot_is_filled_at_once(rows, most):
    """So samples end when they would if each slot took the next in line as soon as it is free."""
    kinds = {count: AttemptTable((count,)) for count in rows}
    order, used, failed = run(begun(most, [Work(i, kinds[count]) for i, count in enumerate(rows)]))
    free, ends = [0] * most, []
    for i, count in enumerate(rows):
        place = free.index(min(free))
        free[place] += count
        ends.append((free[place], i))
    at = {key: end for end, key in ends}
    assert sorted(order) == list(range(len(rows))) and not failed and used == min(most, len(rows))
    assert [at[key] for key in order] == sorted(at.values())


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_a_sample_that_is_sent_back_makes_each_attempt_once(retries, most, stepwise):
    """In its slot, or, where all samples step together, with the next batch."""
    attempt_table = AttemptTable((3, 2, 4), stepwise=stepwise)
    work = [Work(i, attempt_table) for i in range(len(retries))]
    slots = begun(most, work)
    if stepwise:
        while fresh := slots.admit():
            assert not slots.admit()  # they begin together
            for slot in fresh:
                slot.sample.seen.append(slot.attempt)
            for _ in range(max(slot.end - slot.row for slot in fresh)):
                slots.move()
            back = [slot for slot in slots.live if slot.attempt < retries[slot.sample.key]]
            for slot in [slot for slot in slots.live if slot not in back]:
                slots.retire(slot)
            slots.requeue(back)
    else:
        run(slots, again=lambda slot: slot.attempt < retries[slot.sample.key])
    assert [sample.seen for sample in work] == [list(range(count + 1)) for count in retries]


def test_samples_of_another_form_wait_until_the_batch_is_free():
    attempt_table = AttemptTable((4,))
    slots = begun(3, [Work(0, attempt_table), Work(1, attempt_table, "other"), Work(2, attempt_table)])
    assert [slot.sample.key for slot in slots.admit()] == [0] and not slots.admit()
    slots.retire(slots.live[0])
    form = slots.form
    assert [slot.sample.key for slot in slots.admit()] == [1] and slots.form is not form


def test_a_batch_that_ran_empty_stays_open_for_samples_of_its_form():
    attempt_table = AttemptTable((4,))
    slots = begun(2, [Work(i, attempt_table) for i in range(3)])
    for slot in slots.admit():
        slots.retire(slot)
    form = slots.form
    assert [slot.sample.key for slot in slots.admit()] == [2] and slots.form is form


def test_rows_that_are_there_are_used_again_and_no_table_overflows():
    one, other = AttemptTable((4,)), AttemptTable((6,))
    large, full = (AttemptTable((ROWS - one.rows - other.rows - judging,)) for judging in (0, 1))
    slots = begun(9, [Work(0, one), Work(1, other), Work(2, one), Work(3, large)])
    fresh = slots.admit()
    assert [slot.offset for slot in fresh] == [0, one.rows, 0] and slots.attempt_tables == [one, other]
    assert [(slot.start, slot.end) for slot in fresh] == [(0, 4), (5, 11), (0, 4)]
    slots = begun(9, [Work(0, one), Work(1, other), Work(3, full)])
    assert len(slots.admit()) == 3 and sum(table.rows for table in slots.attempt_tables) == ROWS


def test_what_a_batch_has_no_room_for_begins_another():
    for first, second in (
        (AttemptTable((4,)), AttemptTable((4,), steps=STEPS + 1)),
        (AttemptTable((4,)), AttemptTable((4,), multistep=True)),
    ):
        slots = begun(2, [Work(0, first), Work(1, second)])
        assert [slot.sample.key for slot in slots.admit()] == [0]
    slots = begun(2, [Work(0, AttemptTable((4,))), Work(1, AttemptTable((4,)))], room=False)
    assert len(slots.admit()) == 1


def test_nobody_gets_far_ahead_of_the_slowest():
    slow, quick = AttemptTable((1000,)), AttemptTable((1,))
    order, *_ = run(begun(2, [Work(0, slow), *(Work(i, quick) for i in range(1, 100))]))
    assert order.index(0) == 2 * AHEAD - 1


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 11), st.booleans())
@settings(deadline=None)
def test_a_fault_costs_one_sample(count, most, bad, for_good):
    """Those beside it begin again in fewer slots; there are as many as before afterwards, unless it is for good."""
    work = [Work(i, AttemptTable((2,))) for i in range(count)]
    slots = begun(most, work)
    order, _, failed = run(slots, fault=lambda live: any(slot.sample.key == bad for slot in live), for_good=for_good)
    assert failed == ([bad] if bad < count else []) and sorted([*order, *failed]) == list(range(count))
    assert slots.most == most or for_good


def test_slots_that_stay_free_are_left_out():
    slots = begun(
        4, [Work(0, AttemptTable((5,))), Work(1, AttemptTable((1,))), Work(2, AttemptTable((1,))), Work(3, AttemptTable((5,)))]
    )
    slots.admit()
    assert not slots.sparse
    for slot in slots.live[1:3]:
        slots.retire(slot)
    assert slots.sparse and slots.shrink() == [0, 3]
    assert [slot.place for slot in slots.live] == [0, 1] and slots.size == 2 and not slots.admit()


def test_it_needs_no_torch():
    code = "import sys, basinescape.sampling.slots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
