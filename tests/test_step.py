"""The fused step, kernel and eager definition, against the method's definitions in float64, sample by sample."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from basinescape.kernels import guide
from basinescape.kernels.dispatch import INTERPRETED, backend
from basinescape.kernels.eager import Lockstep
from basinescape.kernels.state import NEVER, Column, Rule, State
from basinescape.kernels.step import _buffers, guide_step, step
from basinescape.kernels.tiles import Tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interleaving import SMALL, interleaved

STEPS = 7


@dataclass
class Sample:
    """One sample, followed with plain numbers."""

    latents: torch.Tensor
    k: int
    left: int
    gaps: list[float] = field(default_factory=lambda: [math.nan] * STEPS)
    history: torch.Tensor | float = 0.0

    def step(self, uncond, cond, table, rule, dtype, solves=True):
        row = table[self.k].double()
        u, c = uncond.double(), None if cond is None else cond.double()
        guided = u
        if c is not None:
            earlier = list(self.gaps)
            self.gaps[self.k] = gap = (c - u).norm().item()
            if rule and self.left < 0:
                peak = max((d for d in earlier if d == d), default=-math.inf)
                minimum = self.k >= max(rule.earliest, 2) and earlier[self.k - 2] > earlier[self.k - 1] < gap
                deep = minimum and earlier[self.k - 1] <= (1 - rule.drop) * peak
                if deep or gap <= row[Column.LIMIT] or self.k >= rule.latest:
                    self.left = self.k + rule.wait
            guided = u + row[Column.AFTER if 0 <= self.left <= self.k else Column.BEFORE] * (c - u)
        if solves:
            a, b, p, q = row[Column.A : Column.Q + 1]
            x = self.latents.double()
            self.latents = (a * x + b * guided + self.history).to(dtype)
            self.history = p * x + q * guided
            self.k += 1
        return guided


def laid_out(x, layout):
    """`x` (B, C, H, W) with the same values in another layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "chunked":
        return torch.stack([x, x], dim=1)[:, 0]
    return x


rules = st.builds(
    Rule,
    earliest=st.integers(2, 4),
    latest=st.sampled_from([NEVER, 5, 6]),
    drop=st.sampled_from([0.0, 0.3, math.inf]),
    wait=st.sampled_from([0, 0, 2]),
)


SHAPES = ((1, 1, 1), (4, 8, 8), (3, 5, 7), (4, 40, 40), (4, 64, 64), (3, 80, 81))


@st.composite
def runs(draw, shapes=SHAPES):
    shape = draw(st.sampled_from(shapes))
    return {
        "shape": (draw(st.integers(1, 4)), *shape),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "chunked"])),
        "channels_last": draw(st.booleans()),
        "multistep": draw(st.booleans()),
        "scaled": draw(st.booleans()),
        "rule": draw(st.none() | rules),
        "limited": draw(st.booleans()),
        "begins": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


def begin(run):
    """(state at its first step, table, rule, transition, noise, generator) of a run."""
    rng = torch.Generator().manual_seed(run["seed"])
    shape, dtype, rule = run["shape"], run["dtype"], run["rule"]
    table = torch.rand((STEPS, len(Column)), generator=rng) * 2 - 1
    if not run["multistep"]:
        table[:, [Column.P, Column.Q]] = 0
    usual = 0.5 * math.prod(shape[1:]) ** 0.5  # of the gaps below
    table[:, Column.LIMIT] = usual * table[:, Column.LIMIT].abs() if run["limited"] else -math.inf
    if not run["scaled"]:
        table[:, Column.INPUT_SCALE] = 1
    layout = torch.channels_last if run["channels_last"] else torch.contiguous_format
    state = State.empty(shape, STEPS, dtype, "cpu", run["multistep"], run["scaled"], layout)
    transition = None if rule else int(torch.randint(-1, STEPS, (), generator=rng))
    noise = torch.randn(shape, generator=rng)
    return state.start(noise.to(dtype), table, transition), table, rule, transition, noise, rng


def predictions(run, rng):
    """uncond and cond of one step; the gaps of successive steps go up and down."""
    shape, dtype = run["shape"], run["dtype"]
    sizes = torch.rand((shape[0], 1, 1, 1), generator=rng) + 0.1
    uncond = laid_out(torch.randn(shape, generator=rng).to(dtype), run["layout"])
    return uncond, laid_out((uncond.float() + sizes * torch.randn(shape, generator=rng)).to(dtype), run["layout"])


def check_run(run):
    """Take a state from the first to the last step and compare it with its samples after each."""
    state, table, rule, transition, noise, rng = begin(run)
    dtype, batch = run["dtype"], run["shape"][0]
    begins = torch.randint(0, run["begins"] + 1, (batch,), generator=rng)
    state.step.copy_(begins)
    state.feed(noise, table)
    samples = [Sample(noise[i].to(dtype), int(begins[i]), -1 if rule else transition) for i in range(batch)]
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for _ in range(STEPS - run["begins"]):
        uncond, cond = predictions(run, rng)
        step(uncond, cond, table, state, rule)
        for i, sample in enumerate(samples):
            sample.step(uncond[i], cond[i], table, rule, dtype)
            torch.testing.assert_close(state.latents[i], sample.latents, atol=tolerance, rtol=tolerance)
            sample.latents = state.latents[i].clone()  # roundings do not add up
            scale = table[min(sample.k, STEPS - 1), Column.INPUT_SCALE]
            for half in state.model_input.unflatten(0, (2, batch)):
                torch.testing.assert_close(half[i].float(), sample.latents.float() * scale, atol=tolerance, rtol=tolerance)
            if run["multistep"]:
                torch.testing.assert_close(state.history[i].double(), sample.history, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(state.gaps[i], torch.tensor(sample.gaps), equal_nan=True, rtol=1e-5, atol=1e-6)
        assert state.transition.tolist() == [sample.left for sample in samples]
        assert state.step.tolist() == [sample.k for sample in samples]
        told = table[state.step.clamp(max=STEPS - 1), Column.TIMESTEP]
        assert torch.equal(state.timestep, told.repeat(2))


@settings(max_examples=60, deadline=None)
@given(runs())
def test_the_kernel_is_the_definition(run):
    check_run(run)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs())
def test_the_eager_step_is_the_definition(eager, run):
    check_run(run)


@pytest.mark.skipif(not INTERPRETED, reason="programs are interleaved in the interpreter")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs([(3, 10, 11), (4, 8, 9)]), st.sampled_from([0, 6, 1000]), st.integers(0, 2**16))
def test_the_programs_of_a_sample_may_run_in_any_order(monkeypatch, run, resident, seed):
    """Tiles that meet, and that do not: `resident` programs may wait for each other. On a GPU bench/checks.py has them meet."""
    monkeypatch.setattr(Tiles, "of", SMALL.of)
    monkeypatch.setattr("basinescape.kernels.step.resident_programs", lambda device: resident)
    with interleaved(seed):
        check_run(run)


@pytest.mark.skipif(not INTERPRETED, reason="programs are interleaved in the interpreter")
def test_tiles_that_meet_have_the_bits_of_those_that_do_not(monkeypatch):
    monkeypatch.setattr(Tiles, "of", SMALL.of)

    def after(resident, seed):
        monkeypatch.setattr("basinescape.kernels.step.resident_programs", lambda device: resident)
        state, table = started((3, 4, 8, 9), multistep=True)
        with interleaved(seed):
            for uncond, cond in torch.randn((4, 2, 3, 4, 8, 9), generator=torch.Generator().manual_seed(1)):
                step(uncond, cond, table, state, Rule())
        return state.model_input, state.history, state.gaps.nan_to_num(-1), state.transition

    apart = after(0, 0)
    for resident, seed in ((6, 1), (1000, 2), (1000, 3)):
        assert all(map(torch.equal, after(resident, seed), apart))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs(), st.sets(st.integers(0, STEPS - 1), max_size=2), st.sampled_from([1, 300, 65536]))
def test_lockstep_has_the_bits_of_the_eager_step(eager, monkeypatch, run, alone, group):
    """Whatever it knows beforehand and however it groups the samples; `alone`: steps that need one prediction."""
    monkeypatch.setattr("basinescape.kernels.eager.GROUP", group)
    (state, table, rule, transition, _, rng), (other, *_) = begin(run), begin(run)
    move = Lockstep(other, table, rule, transition)
    for k in range(STEPS):
        uncond, cond = predictions(run, rng)
        step(uncond, None if k in alone else cond, table, state, rule)
        move(uncond, None if k in alone else cond)
        for name in set(vars(state)) - {"scratch"}:
            torch.testing.assert_close(getattr(other, name), getattr(state, name), atol=0, rtol=0, equal_nan=True)


def test_lockstep_takes_no_samples_and_refuses_others(eager):
    state, table = started((0, 4, 8, 8))
    Lockstep(state, table, None, 0)(*torch.randn(2, 0, 4, 8, 8))
    state, table = started((2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"cond is \(1, 4, 8, 8\)"):
        Lockstep(state, table, None, 0)(torch.randn(2, 4, 8, 8), torch.randn(1, 4, 8, 8))


def started(shape, steps=STEPS, dtype=torch.float32, **options):
    torch.manual_seed(0)
    table = torch.rand(steps, len(Column))
    table[:, Column.LIMIT] = -torch.inf
    return State.empty(shape, steps, dtype, "cpu", **options).start(torch.randn(shape).to(dtype), table), table


def test_samples_of_one_batch_leave_at_their_own_steps_and_one_never():
    state, table = started((3, 4, 8, 8), multistep=True)
    gaps = torch.tensor([[3, 2, 4, 1, 2, 3, 4], [5, 4, 3, 2, 1, 2, 3], [7, 6, 5, 4, 3, 2, 1]]).float()
    for k in range(STEPS):
        uncond = torch.zeros(3, 4, 8, 8)
        step(uncond, uncond + gaps[:, k, None, None, None] / 16, table, state, Rule())
    assert state.transition.tolist() == [2, 5, -1]
    torch.testing.assert_close(state.gaps, gaps)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 72, 72)])
def test_a_sample_has_the_same_bits_in_any_batch(shape):
    def after(samples):
        state, table = started((len(samples), *shape), multistep=True)
        noise, uncond, cond = torch.randn((3, 5, *shape), generator=torch.Generator().manual_seed(1)).unbind()
        state.start(noise[samples], table)
        for _ in range(3):
            step(uncond[samples], cond[samples], table, state, Rule())
        return state.latents, state.gaps

    whole, alone = after([0, 1, 2, 3, 4]), after([3])
    assert torch.equal(whole[0][3:4], alone[0]) and torch.equal(whole[1][3, :3], alone[1][0, :3])


@pytest.mark.parametrize("definition", ["kernel", "eager"])
def test_a_sample_that_is_done_stays_at_its_last_step(definition, request):
    if definition == "eager":
        request.getfixturevalue("eager")
    state, table = started((2, 4, 8, 8))
    state.step[1] = STEPS - 1
    for _ in range(2):
        step(*torch.randn(2, 2, 4, 8, 8), table, state, Rule())
    assert state.step.tolist() == [2, STEPS] and state.gaps.isfinite().sum(dim=1).tolist() == [2, 1]


def test_one_branch_alone_is_the_guided_prediction():
    state, table = started((2, 4, 8, 8))
    before = state.latents.clone()
    prediction = torch.randn(2, 4, 8, 8)
    step(prediction, None, table, state)
    torch.testing.assert_close(state.latents, table[0, Column.A] * before + table[0, Column.B] * prediction)
    assert state.gaps.isnan().all() and state.step.tolist() == [1, 1]


def test_a_broken_sample_spoils_no_other():
    state, table = started((3, 4, 8, 8))
    uncond, cond = torch.randn(2, 3, 4, 8, 8)
    cond[1, 0, 0, 0] = torch.nan
    for _ in range(3):
        step(uncond, cond, table, state, Rule())
    assert state.latents[[0, 2]].isfinite().all() and state.gaps[[0, 2], :3].isfinite().all()
    assert state.gaps[1, :3].isnan().all() and state.transition[1] == -1


def test_the_guided_prediction_alone_leaves_the_latents():
    state, table = started((2, 4, 8, 8))
    before = state.latents.clone()
    uncond, cond = torch.randn(2, 2, 4, 8, 8)
    guided = guide_step(uncond, cond, table, state, Rule())
    expected, gap = guide(uncond, cond, table[0, Column.BEFORE].repeat(2))
    assert torch.equal(guided, expected) and torch.equal(state.gaps[:, 0], gap)
    assert torch.equal(state.latents, before) and state.step.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"uncond": torch.zeros(2, 4, 8, 9), "cond": torch.zeros(2, 4, 8, 9)}, "uncond"),
        ({"cond": torch.zeros(2, 4, 8, 8, dtype=torch.float16)}, "cond"),
        ({"table": torch.zeros(STEPS - 1, len(Column))}, "table"),
        ({"table": torch.zeros(STEPS, len(Column), dtype=torch.float64)}, "table"),
    ],
)
def test_operands_that_do_not_match_are_named(change, says):
    state, table = started((2, 4, 8, 8))
    operands = {"uncond": torch.zeros(2, 4, 8, 8), "cond": torch.zeros(2, 4, 8, 8), "table": table} | change
    with pytest.raises(ValueError, match=says):
        step(**operands, state=state)


def operands(finds):
    state, table = started((2, 4, 8, 8), multistep=True)
    return (*torch.randn(2, 2, 4, 8, 8), table, finds, 2, NEVER, 0.0, 0, None, *_buffers(state))


@pytest.mark.parametrize("finds", [True, False])
def test_the_step_is_a_well_formed_operator(finds):
    torch.library.opcheck(torch.ops.basinescape.step.default, operands(finds))


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, -2.0])])
def test_guide_is_a_well_formed_operator(weights):
    uncond, cond = torch.randn(2, 2, 4, 8, 8)
    torch.library.opcheck(
        torch.ops.basinescape.guide.default, (uncond, cond, weights, 1.5, torch.empty_like(uncond), torch.empty(2))
    )


def test_guide_survives_compilation_whole():
    def scaled(uncond, cond):
        guided, gap = guide(uncond * 2, cond * 2, 7.5)
        return guided + 1, gap

    uncond, cond = torch.randn(2, 2, 4, 8, 8)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(uncond, cond), scaled(uncond, cond), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
def test_the_kernels_are_interpreted_here():
    assert INTERPRETED and backend("cpu") == "triton-interpreter"
