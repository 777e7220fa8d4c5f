"""The definition against itself and against what is known by hand."""

import math

import torch
from basinescape.kernels import definition
from basinescape.kernels.table import Column
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.5, 4.0, width=32), min_size=5, max_size=9),
    st.sampled_from([0.0, 0.25]),
    st.sampled_from([0.0, 0.4]),
    st.integers(0, 2),
)
def test_the_definition_of_a_curve_is_that_of_its_steps(gaps, drop, fall, wait):
    table = torch.zeros((len(gaps), len(Column)))
    table[:, Column.STEP], table[:, Column.FIRST] = torch.arange(len(gaps)), 1
    table[:, Column.FALL], table[:, Column.WAIT] = fall, wait
    table[:, Column.KEEP], table[:, Column.LIMIT] = 1 - drop, 0.6
    sample = definition.Sample(torch.zeros(1), (math.nan,) * len(gaps), 0, len(gaps) - 1)
    for gap in gaps:
        sample = definition.step(sample, torch.zeros(1), torch.tensor([gap]), table)
    found = definition.transition(gaps, table[:, Column.KEEP : Column.WAIT + 1].tolist())
    assert found == (sample.transition if sample.transition < len(gaps) else -1)


def test_the_definition_finds_known_transitions():
    """By hand: strictly between two larger gaps, deep enough, at the limit, below half of the peak, at the deadline, later."""
    never, minimum, halved = (-math.inf, -math.inf, 0, 0), (1.0, -math.inf, 0, 0), (-math.inf, -math.inf, 0.5, 0)
    assert definition.transition([3, 2, 4, 1, 2], [never, never, *[minimum] * 3]) == 2
    assert definition.transition([3, 2, 2, 1, 2], [never, never, *[minimum] * 3]) == 4
    assert definition.transition([3, 2, 4, 1, 2], [never, never, *[(0.5, -math.inf, 0, 0)] * 3]) == 4
    assert definition.transition([3, 2, 1], [(-math.inf, 2.0, 0, 1)] * 3) == 2
    assert definition.transition([3, 2, 1], [(-math.inf, 1.0, 0, 1)] * 3) == -1
    assert definition.transition([3, 2, math.nan], [never, never, (-math.inf, math.inf, 0, 0)]) == 2
    assert definition.transition([3, 2, math.nan], [never, never, (1.0, 9.0, 0, 0)]) == -1
    assert definition.transition([3, 4, 2, 3, 1.9], [halved] * 5) == 4
    assert definition.transition([0, 0, 0], [never] * 3) == -1
