"""The fused step, kernel and eager twin, against the definition in float64, sample by sample."""

import math
from dataclasses import replace

import pytest
import torch
from basinescape.kernels import definition, guide, guide_step, step
from basinescape.kernels.dispatch import INTERPRETED, backend
from basinescape.kernels.lockstep import Lockstep
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from basinescape.kernels.tiles import Tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiled import SMALL

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernel runs, compiled or interpreted
STEPS = 7
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def laid_out(x, layout):
    """`x` (B, C, H, W) with the same values in another layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "chunked":
        return torch.stack([x, x], dim=1)[:, 0]
    return x


LATENTS = ((1, 1, 1), (4, 8, 8), (3, 5, 7), (4, 40, 40), (4, 64, 64), (3, 80, 81))


@st.composite
def runs(draw, shapes=LATENTS):
    shape = draw(st.sampled_from(shapes))
    return {
        "shape": (draw(st.integers(1, 4)), *shape),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "chunked"])),
        "channels_last": draw(st.booleans()),
        "multistep": draw(st.booleans()),
        "scaled": draw(st.booleans()),
        "earliest": draw(st.sampled_from([2, 3, 4, STEPS])),
        "drop": draw(st.sampled_from([0.0, 0.3])),
        "limited": draw(st.booleans()),
        "fall": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "latest": draw(st.sampled_from([0, 2, 5, STEPS])),
        "wait": draw(st.sampled_from([0, 0, 2])),
        "calls": draw(st.sampled_from([1, 1, 2])),
        "begins": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


def table_of(
    rng, steps=STEPS, calls=1, multistep=True, scaled=True, earliest=2, drop=0.0, limits=None, fall=0, latest=None, wait=0
):
    """Random steps of `calls` calls each, in which samples find their first minimum, or come down to a limit or a share
    of their peak, or `latest`."""
    table = torch.rand((steps * calls, len(Column)), generator=rng) * 2 - 1
    call = torch.arange(len(table))
    table[:, Column.STEP], table[:, Column.FIRST] = call // calls, (call % calls == 0).float()
    first, k = table[:, Column.FIRST] > 0, table[:, Column.STEP]
    table[:, Column.KEEP] = (1 - drop) * torch.ones(len(table)).where(first & (k >= earliest), torch.inf * torch.tensor(-1.0))
    limits = torch.full((len(table),), -math.inf) if limits is None else limits[call // calls]
    limits = limits.where(k < (steps if latest is None else latest), torch.tensor(math.inf))
    table[:, Column.LIMIT] = limits.where(first, torch.tensor(-math.inf))
    table[:, Column.FALL], table[:, Column.WAIT] = fall * first, wait
    if not multistep:
        table[:, [Column.P, Column.Q]] = 0
    if not scaled:
        table[:, Column.INPUT_SCALE] = 1
    return table


def begin(run, device="cpu"):
    """(state at its first step on `device`, table, noise, generator) of a run."""
    rng = torch.Generator().manual_seed(run["seed"])
    shape, dtype = run["shape"], run["dtype"]
    usual = 0.5 * math.prod(shape[1:]) ** 0.5  # of the gaps below
    limits = usual * torch.rand(STEPS, generator=rng) if run["limited"] else None
    options = {name: run[name] for name in ("calls", "multistep", "scaled", "earliest", "drop", "fall", "latest", "wait")}
    table = table_of(rng, limits=limits, **options)
    layout = torch.channels_last if run["channels_last"] else torch.contiguous_format
    state = State.empty(shape, STEPS, dtype, device, run["multistep"], run["scaled"], layout)
    noise = torch.randn(shape, generator=rng).to(dtype)
    return state.start(noise.to(device), table.to(device)), table, noise, rng


def finds(table):
    """Whether any row asks for the gap."""
    keep, limit, fall = table[:, Column.KEEP : Column.WAIT].unbind(1)
    return bool(((keep > -math.inf) | (limit.abs() < math.inf) | (fall > 0)).any())


def predictions(run, rng):
    """uncond and cond of one step; the gaps of successive steps go up and down."""
    shape, dtype = run["shape"], run["dtype"]
    sizes = torch.rand((shape[0], 1, 1, 1), generator=rng) + 0.1
    uncond = laid_out(torch.randn(shape, generator=rng).to(dtype), run["layout"])
    return uncond, laid_out((uncond.float() + sizes * torch.randn(shape, generator=rng)).to(dtype), run["layout"])


def check_run(run, alone=(), device="cpu", take=step):
    """Take a state from the first to the last row and past it, and compare it with its samples after each call.

    alone: calls that need one prediction. take: what takes the step.
    """
    state, table, noise, rng = begin(run, device)
    rows = table.to(device)
    batch, tolerance = run["shape"][0], TOLERANCE[run["dtype"]]
    begins = torch.randint(0, run["begins"] + 1, (batch,), generator=rng)
    lasts = len(table) - 1 - torch.arange(batch) % 2  # each ends where its neighbours do not
    state.start(noise.to(device), rows, begins.to(device), lasts.to(device))
    unknown = (math.nan,) * STEPS
    samples = [definition.Sample(noise[i], unknown, int(begins[i]), int(lasts[i])) for i in range(batch)]
    for call in range(len(table)):
        uncond, cond = predictions(run, rng)
        cond = None if call in alone else cond
        take(uncond.to(device), None if cond is None else cond.to(device), rows, state, finds(table))
        for i, sample in enumerate(samples):
            after = definition.step(sample, uncond[i], None if cond is None else cond[i], table)
            x = state.latents.x[i].cpu()
            torch.testing.assert_close(x.double(), after.latents.double(), atol=tolerance, rtol=tolerance)
            samples[i] = replace(after, latents=x.clone())  # roundings do not add up
            scale = table[min(after.row, after.last), Column.INPUT_SCALE]
            for half in state.latents.model_input.unflatten(0, (2, batch)):
                torch.testing.assert_close(half[i].cpu().float(), x.float() * scale, atol=tolerance, rtol=tolerance)
            if run["multistep"]:
                history = torch.as_tensor(after.history).expand(x.shape).double()
                torch.testing.assert_close(state.latents.history[i].cpu().double(), history, atol=1e-4, rtol=1e-4)
            gaps = torch.tensor(after.gaps)
            torch.testing.assert_close(state.transition.gaps[i].cpu(), gaps, equal_nan=True, rtol=1e-5, atol=1e-6)
        assert state.transition.at.tolist() == [sample.transition for sample in samples]
        assert state.transition.row.tolist() == [sample.row for sample in samples]
        told = torch.stack([table[min(sample.row, sample.last), Column.TIMESTEP] for sample in samples])
        assert torch.equal(state.latents.timestep.cpu(), told.repeat(2))


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


def contents(state):
    """All that a step leaves for the next."""
    written = (*vars(state.transition).values(), *vars(state.latents).values())
    return [buffer.nan_to_num(-1).clone() for buffer in written if buffer is not None]


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


def started(shape, steps=STEPS, dtype=torch.float32, multistep=False):
    torch.manual_seed(0)
    table = table_of(torch.Generator().manual_seed(0), steps, multistep=multistep)
    return State.empty(shape, steps, dtype, "cpu", multistep).start(torch.randn(shape).to(dtype), table), table


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
