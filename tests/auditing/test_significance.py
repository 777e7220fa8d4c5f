"""What an audit claims: on simulated captions, and against what is computed by hand."""

import numpy as np
import pytest
from basinescape.auditing.significance import discoveries, fewest, interval, p_values
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

VALUES = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@given(VALUES, VALUES)
def test_a_p_value_counts_the_ordinary_ones_that_are_as_large(values, ordinary):
    expected = [(1 + sum(one >= value for one in ordinary)) / (1 + len(ordinary)) for value in values]
    assert p_values(values, ordinary) == expected


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([0.05, 0.1, 0.5]))
def test_discoveries_are_those_of_the_step_up_rule(fortieths, rate):
    p = [value / 40 for value in fortieths]
    ordered = sorted(p)
    most = max((k for k in range(1, len(p) + 1) if ordered[k - 1] <= rate * k / len(p) + 1e-12), default=0)
    assert discoveries(p, rate) == [most > 0 and value <= ordered[most - 1] for value in p]


def test_nothing_has_no_discoveries():
    assert discoveries([], 0.1) == []


def simulated(memorized, times, rate=0.1, captions=100, ordinary=200):
    """The shares of false ones among discoveries, and of the memorized ones that are found, over audits of simulated gaps."""
    draw, false, found = np.random.default_rng(0), [], []
    for _ in range(times):
        gaps = draw.lognormal(0, 0.25, captions)
        gaps[:memorized] *= 2.5
        marked = np.array(discoveries(p_values(gaps, draw.lognormal(0, 0.25, ordinary)), rate))
        false.append(marked[memorized:].sum() / max(1, marked.sum()))
        found.append(marked[:memorized].mean() if memorized else 0)
    return np.mean(false), np.mean(found), np.std(false) / times**0.5


@pytest.mark.parametrize("memorized", [0, 5, 20, 60])
def test_the_share_of_false_discoveries_is_the_rate_at_most(memorized):
    """Though all p-values lean on the same ordinary captions."""
    false, found, error = simulated(memorized, 500)
    assert false <= 0.1 + 3 * error
    assert found > 0.9 or memorized <= fewest(100, 200, 0.1)


def test_fewer_than_the_fewest_cannot_be_found():
    few = fewest(100, 50, 0.1)
    least = 1 / 51
    for standing, any_found in ((few - 1, False), (few, True)):
        p = [least] * standing + [1.0] * (100 - standing)
        assert any(discoveries(p, 0.1)) is any_found
    assert fewest(5, 1000, 0.1) == 1


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.5]))
def test_the_fewest_are_found_where_each_has_the_least_p_value_that_there_is(captions, ordinary, rate):
    least = p_values([1.0], [0.0] * ordinary)
    found = [k for k in range(1, captions + 1) if any(discoveries(least * k + [1.0] * (captions - k), rate))]
    if found:
        assert fewest(captions, ordinary, rate) == found[0]
    else:
        assert fewest(captions, ordinary, rate) > captions


@pytest.mark.parametrize(("hits", "of"), [(0, 4), (1, 4), (4, 4), (37, 100)])
def test_bounds_are_exact(hits, of):
    """At the lower bound so many hits or more have a probability of 2.5%, at the upper one so many or fewer."""
    low, high = interval(hits, of)
    assert low == 0 if hits == 0 else binom.sf(hits - 1, of, low) == pytest.approx(0.025)
    assert high == 1 if hits == of else binom.cdf(hits, of, high) == pytest.approx(0.025)
