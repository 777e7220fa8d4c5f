"""The table of steps: everything that varies from step to step, a row for each call of the network."""

from __future__ import annotations

from enum import IntEnum

from .dispatch import tl


class Column(IntEnum):
    """The columns of a table, (K, len(Column)) float32. A table may hold the rows of several runs, one after another.

    BEFORE, AFTER: guidance weight before and after the transition.
    A, B, P, Q: the solver, latents' = A latents + B guided + history, history' = P latents + Q guided.
    INPUT_SCALE: factor on the latents at the network's input. TIMESTEP: what the network is told.
    STEP: the solver step the row belongs to, a whole number. FIRST: 1 for the first row of its step, whose noise gap counts;
    0 for the others, which show nothing.
    What makes a sample leave its basin here (`definition.leaves`). KEEP: the step before had a local minimum of the gap, at
    most KEEP times the largest gap so far; minus infinity asks for none. LIMIT: the gap is at most LIMIT; minus infinity asks
    for none, and infinity lets every sample leave. FALL: the gap is below FALL times the largest one; 0 asks for none. WAIT:
    steps from there to the transition.
    FIRST_OPTION, SECOND_OPTION: numbers of the guidance rule (`rules.RULES`), in its own order.
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


# The same numbers as device code knows them.
_constant = tl.constexpr if tl else int
BEFORE, AFTER, A, B, P, Q, INPUT_SCALE, TIMESTEP, STEP, FIRST, KEEP, LIMIT, FALL, WAIT, FIRST_OPTION, SECOND_OPTION = (
    _constant(int(column)) for column in Column
)
COLUMNS = _constant(len(Column))
