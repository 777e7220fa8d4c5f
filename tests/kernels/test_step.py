"""The fused step, kernel and eager twin, against the definition in float64, sample by sample."""

import math

import pytest
import torch
from basinescape.kernels import guide, guide_step, step
from basinescape.kernels.dispatch import INTERPRETED, backend
from basinescape.kernels.lockstep import Lockstep
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from basinescape.kernels.tiles import Tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernelruns import DEVICE, STEPS, begin, check_run, contents, predictions, runs, started, table_of
from tiled import SMALL

pytestmark = pytest.mark.interpreter


@settings(max_examples=30, deadline=None)
@given(runs(), st.sets(st.integers(0, STEPS - 1), max_size=2))
def test_the_kernel_is_the_definition(run, alone):
    assert backend(DEVICE) != "eager"
    check_run(run, alone, DEVICE)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs(), st.sets(st.integers(0, STEPS - 1), max_size=2))
def test_the_eager_step_is_the_definition(eager, run, alone):
    check_run(run, alone)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs([(3, 10, 11), (4, 8, 9)]), st.sets(st.integers(0, STEPS - 1), max_size=2))
def test_tiles_are_the_definition(monkeypatch, run, alone):
    monkeypatch.setattr(Tiles, "of", SMALL.of)
    check_run(run, alone, DEVICE)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs(), st.sets(st.integers(0, STEPS - 1), max_size=2), st.sampled_from([1, 300, 65536]))
def test_lockstep_has_the_bits_of_the_eager_step(eager, monkeypatch, run, alone, group):
    """Whatever it knows beforehand and however it groups the samples; `alone`: calls that need one prediction."""
    monkeypatch.setattr("basinescape.kernels.lockstep.GROUP", group)
    (state, table, _, rng), (other, *_) = begin(run), begin(run)
    move = Lockstep(other, table)
    for call in range(len(table)):
        uncond, cond = predictions(run, rng)
        step(uncond, None if call in alone else cond, table, state)
        move(uncond, None if call in alone else cond)
        keep, fall = table[:, Column.KEEP], table[:, Column.FALL]
        if not (((keep > -math.inf) & (keep != 1)) | (fall > 0)).any():  # nobody asks for the peak, so it is not kept
            other.transition.peak.copy_(state.transition.peak)
        assert all(map(torch.equal, contents(other), contents(state)))


def test_lockstep_takes_no_samples_and_refuses_others(eager):
    state, table = started((0, 4, 8, 8))
    Lockstep(state, table)(*torch.randn(2, 0, 4, 8, 8))
    state, table = started((2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"cond is \(1, 4, 8, 8\)"):
        Lockstep(state, table)(torch.randn(2, 4, 8, 8), torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="differ in their guidance alone"):
        Lockstep(state, table, torch.tensor([[0, 1]]))


@pytest.fixture(params=["kernel", "eager"])
def way(request):
    """Both ways to take a step on a CPU."""
    if request.param == "eager":
        request.getfixturevalue("eager")


def test_samples_of_one_batch_leave_at_their_own_steps_and_one_never(way):
    state, table = started((3, 4, 8, 8), multistep=True)
    gaps = torch.tensor([[3, 2, 4, 1, 2, 3, 4], [5, 4, 3, 2, 1, 2, 3], [7, 6, 5, 4, 3, 2, 1]]).float()
    for k in range(STEPS):
        uncond = torch.zeros(3, 4, 8, 8)
        step(uncond, uncond + gaps[:, k, None, None, None] / 16, table, state)
    assert state.transition.at.tolist() == [2, 5, -1]
    torch.testing.assert_close(state.transition.gaps, gaps)


def test_a_step_of_two_calls_is_looked_at_in_its_first(way):
    """What the second calls show, a minimum each, moves nobody; their weight is that of the sample's state."""
    table = table_of(torch.Generator().manual_seed(0), steps=4, calls=2)
    state = State.empty((1, 4, 8, 8), 4, torch.float32, "cpu", True).start(torch.zeros(1, 4, 8, 8), table)
    for call, gap in enumerate([4, 1, 3, 9, 2, 1, 3, 9]):
        uncond = torch.zeros(1, 4, 8, 8)
        step(uncond, uncond + gap / 16, table, state)
        assert state.transition.at.tolist() == [3 if call >= 6 else -1]
    torch.testing.assert_close(state.transition.gaps, torch.tensor([[4.0, 3.0, 2.0, 3.0]]))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 72, 72)])
def test_a_sample_has_the_same_bits_in_any_batch(shape):
    def after(samples):
        state, table = started((len(samples), *shape), multistep=True)
        noise, uncond, cond = torch.randn((3, 5, *shape), generator=torch.Generator().manual_seed(1)).unbind()
        state.start(noise[samples], table)
        for _ in range(3):
            step(uncond[samples], cond[samples], table, state)
        return state.latents.x, state.transition.gaps

    whole, alone = after([0, 1, 2, 3, 4]), after([3])
    assert torch.equal(whole[0][3:4], alone[0]) and torch.equal(whole[1][3, :3], alone[1][0, :3])


def test_a_sample_that_is_done_stays_as_it_is(way):
    state, table = started((2, 4, 8, 8), multistep=True)
    state.start(torch.randn(2, 4, 8, 8), table, last=torch.tensor([STEPS - 1, 1]))
    for call in range(4):
        if call == 2:
            before = contents(state.select(torch.tensor([1])))
        prediction = torch.full((2, 4, 8, 8), math.nan) if call > 1 else torch.randn(2, 4, 8, 8)
        step(prediction, torch.randn(2, 4, 8, 8), table, state)
    assert state.transition.row.tolist() == [4, 2]
    assert all(map(torch.equal, contents(state.select(torch.tensor([1]))), before))


def test_a_restarted_sample_goes_on_as_from_the_start(way):
    """And the other one as if nothing had happened."""
    noise, drawn = torch.randn(2, 4, 8, 8), torch.randn((3 + STEPS, 2, 2, 4, 8, 8), generator=torch.Generator().manual_seed(2))

    def after(restarts):
        state, table = started((2, 4, 8, 8), multistep=True)
        state.start(noise, table)
        for call, (uncond, cond) in enumerate(drawn if restarts else drawn[3:]):
            if restarts and call == 3:
                state.restart(torch.tensor([1]), noise[1:], table, row=0, last=STEPS - 1)
            step(uncond, cond, table, state)
            if call == STEPS - 1:
                undisturbed = [contents(state.select(torch.tensor([i]))) for i in (0, 1)]
        return contents(state.select(torch.tensor([1]))), undisturbed

    (restarted, (other, _)), (expected, _) = after(True), after(False)
    assert all(map(torch.equal, restarted, expected))
    state, table = started((2, 4, 8, 8), multistep=True)
    state.start(noise, table)
    for uncond, cond in drawn[:STEPS]:
        step(uncond, cond, table, state)
    assert all(map(torch.equal, contents(state.select(torch.tensor([0]))), other))


def test_one_branch_alone_is_the_guided_prediction(way):
    state, table = started((2, 4, 8, 8))
    before = state.latents.x.clone()
    prediction = torch.randn(2, 4, 8, 8)
    step(prediction, None, table, state)
    torch.testing.assert_close(state.latents.x, table[0, Column.A] * before + table[0, Column.B] * prediction)
    assert state.transition.gaps.isnan().all() and state.transition.row.tolist() == [1, 1]


def test_a_broken_sample_spoils_no_other_and_leaves_at_its_deadline(way):
    state, table = started((3, 4, 8, 8))
    table[2, Column.LIMIT] = math.inf
    uncond, cond = torch.randn(2, 3, 4, 8, 8)
    cond[1, 0, 0, 0] = math.nan
    for _ in range(3):
        assert state.transition.at[1] == -1
        step(uncond, cond, table, state)
    assert state.latents.x[[0, 2]].isfinite().all() and state.transition.gaps[[0, 2], :3].isfinite().all()
    assert state.transition.gaps[1, :3].isnan().all() and state.transition.at.tolist() == [2, 2, 2]


def test_the_guided_prediction_alone_leaves_the_latents():
    state, table = started((2, 4, 8, 8))
    before = state.latents.x.clone()
    uncond, cond = torch.randn(2, 2, 4, 8, 8)
    guided = guide_step(uncond, cond, table, state)
    expected, gap = guide(uncond, cond, table[0, Column.BEFORE].repeat(2))
    assert torch.equal(guided, expected) and torch.equal(state.transition.gaps[:, 0], gap)
    assert torch.equal(state.latents.x, before) and state.transition.row.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"uncond": torch.zeros(2, 4, 8, 9), "cond": torch.zeros(2, 4, 8, 9)}, "uncond"),
        ({"cond": torch.zeros(2, 4, 8, 8, dtype=torch.float16)}, "cond"),
        ({"table": torch.zeros(STEPS, len(Column) - 1)}, "table"),
        ({"table": torch.zeros(STEPS, len(Column), dtype=torch.float64)}, "table"),
    ],
)
def test_operands_that_do_not_match_are_named(change, says):
    state, table = started((2, 4, 8, 8))
    operands = {"uncond": torch.zeros(2, 4, 8, 8), "cond": torch.zeros(2, 4, 8, 8), "table": table} | change
    with pytest.raises(ValueError, match=says):
        step(**operands, state=state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
def test_the_kernels_are_interpreted_here():
    assert INTERPRETED and backend("cpu") == "triton-interpreter"
