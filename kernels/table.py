"""The step table: one row for each call of the network, with all numbers that vary from step to step."""

from __future__ import annotations

from enum import IntEnum

from .dispatch import tl


class Column(IntEnum):
    """The columns of a table, (K, len(Column)) float32. A table may hold the rows of several runs, one after another.

    BEFORE, AFTER: guidance weight before and after the transition.
    A, B, P, Q: the solver, latents' = A latents + B guided + history, history' = P latents + Q guided.
    INPUT_SCALE: factor on the latents at the network's input. TIMESTEP: the timestep passed to the network.
    STEP: the solver step the row belongs to, a whole number. FIRST: 1 for the first row of its step, whose noise gap is
    recorded; 0 for the others.
    A sample leaves its basin here if KEEP, LIMIT or FALL holds (`definition.leaves`). KEEP: the step before had a local minimum
    of the gap, at most KEEP times the largest earlier gap (minus infinity: off). LIMIT: the gap is at most LIMIT (minus
    infinity: off; infinity: every sample leaves). FALL: the gap is below FALL times the largest earlier gap (0: off).
    WAIT: steps from there to the transition.
    FIRST_OPTION, SECOND_OPTION: options of the guidance rule (`rules.RULES`), in its own order.
    """

    BEFORE = 0
    AFTER = 1
    A = 2
    B = 3
    P = 4
    Q = 5
    INPUT_SCALE = 6
    TIMESTEP = 7
    STEP = 8
    FIRST = 9
    KEEP = 10
    LIMIT = 11
    FALL = 12
    WAIT = 13
    FIRST_OPTION = 14
    SECOND_OPTION = 15


# The same numbers as constants for device code.
_constant = tl.constexpr if tl else int
BEFORE, AFTER, A, B, P, Q, INPUT_SCALE, TIMESTEP, STEP, FIRST, KEEP, LIMIT, FALL, WAIT, FIRST_OPTION, SECOND_OPTION = (
    _constant(int(column)) for column in Column
)
COLUMNS = _constant(len(Column))
