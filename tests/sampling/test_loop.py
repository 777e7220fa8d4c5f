"""What the loop promises without a GPU: no value read back, the same operators in every step, buffers made once."""

import importlib
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from basinescape import At, Fallen, FirstMinimum, Guidance, Settled
from basinescape.kernels import definition
from basinescape.kernels.lockstep import Lockstep
from basinescape.kernels.state import State, buffers_of
from basinescape.kernels.table import Column
from basinescape.models import adapt
from basinescape.sampling.step_table import StepTable
from basinescape.sampling.steps import denoise, fused_move, fused_step, lockstep_move, stepping
from basinescape.schedulers.schedule import Schedule, make_scheduler
from basinescape.schedulers.solver_coefficients import Solver
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from mean_fallen import MeanFallen
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.interpreter

STEPS = 8
METHODS = [
    Guidance.cfg(7.5),
    Guidance.delayed(7.5, until=At(500)),
    Guidance.opposite(2.0, scale=7.5, until=At(650)),
    Guidance.opposite(7.5, scale=7.5, until=FirstMinimum(latest=6)),
]


class Operators(TorchDispatchMode):
    """Counts the operators of each step; a value read back to the host is an error."""

    def __init__(self):
        super().__init__()
        self.steps, self.stored = [], []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function)
        assert "_local_scalar_dense" not in name and "nonzero" not in name and "is_nonzero" not in name, name
        if self.steps:
            self.steps[-1][name] += 1
        return function(*arguments, **(keywords or {}))


@pytest.fixture(scope="module")
def pipe(small):
    return small


def start(pipe, guidance, scheduler="euler"):
    model = adapt(pipe)
    plan = StepTable.make(Solver.of(make_scheduler(scheduler, pipe.scheduler), Schedule(STEPS)), guidance, torch.device("cpu"))
    state = plan.state(torch.randn(2, 4, 16, 16))
    return model.network(model.encode(["a picture of a cat", "a picture of a frog"], 64, 64)), plan, state


@pytest.mark.parametrize("scheduler", ["euler", "dpmsolver++", "ddim"])
@pytest.mark.parametrize("guidance", METHODS, ids=repr)
@torch.inference_mode()
def test_every_step_of_a_branch_runs_the_same_operators_and_reads_nothing(pipe, eager, guidance, scheduler):
    network, plan, state = start(pipe, guidance, scheduler)
    take = fused_step(network, plan, state)
    with Operators() as operators:
        for branch in plan.branches:
            operators.steps.append(Counter())
            take(branch)
    for branch in set(plan.branches):
        counts = [count for count, ran in zip(operators.steps, plan.branches, strict=True) if ran == branch]
        assert all(count == counts[0] for count in counts)
    assert state.transition.row.tolist() == [STEPS, STEPS]


@pytest.mark.parametrize("way", [fused_move, lockstep_move])
@pytest.mark.parametrize("guidance", METHODS, ids=repr)
def test_the_loop_runs_on_tensors_without_values(pipe, eager, monkeypatch, guidance, way):
    """In fake tensors there is nothing to read: any read of a value raises."""
    step = importlib.import_module("basinescape.kernels.step")._step
    monkeypatch.setattr(torch.ops.basinescape, "step", step)  # the step itself, not the operator's shape function
    network, plan, _ = start(pipe, guidance)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        state = plan.state(torch.randn(2, 4, 16, 16))
        denoise(stepping(network, state, way(plan, state)), plan.branches)
        assert state.latents.x.shape == (2, 4, 16, 16) and state.latents.x.fake_mode is fake
        with pytest.raises(DataDependentOutputException):
            state.transition.row[0].item()


@torch.inference_mode()
def test_a_step_keeps_its_buffers(pipe, eager):
    network, plan, state = start(pipe, METHODS[-1], "dpmsolver++")
    where = [buffer.data_ptr() for buffer in buffers_of(state) if buffer is not None]
    denoise(fused_step(network, plan, state), plan.branches)
    assert where == [buffer.data_ptr() for buffer in buffers_of(state) if buffer is not None]


def constant_network(value):
    def network(latents, timesteps, branch):
        return value.expand_as(latents).clone()

    return network


def test_flow_euler_goes_straight_along_a_constant_velocity():
    """dx/dsigma = v integrates to x - v from sigma 1 to 0, whatever the number of steps."""
    plan = StepTable.make(Solver.of(FlowMatchEulerDiscreteScheduler(), Schedule(STEPS)), Guidance.cfg(3.0), torch.device("cpu"))
    noise, velocity = torch.randn(2, 4, 8, 8), torch.randn(4, 8, 8)
    state = plan.state(noise)
    denoise(fused_step(constant_network(velocity), plan, state), plan.branches)
    torch.testing.assert_close(state.latents.x, noise - velocity, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++"])
def test_coefficients_carry_the_prediction_type(prediction, name):
    base = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction)
    scheduler = make_scheduler(name, base)
    solver = Solver.of(scheduler, Schedule(STEPS))
    assert solver.coefficients is not None
    plan = StepTable.make(solver, Guidance.cfg(2.0), torch.device("cpu"))
    noise, predicted = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    state = plan.state(noise * solver.init_sigma)
    denoise(fused_step(constant_network(predicted), plan, state), plan.branches)
    scheduler.set_timesteps(STEPS)
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(latents, t)
        latents = scheduler.step(predicted, t, latents).prev_sample
    torch.testing.assert_close(state.latents.x, latents, atol=1e-4, rtol=1e-4)


EIGHT = [
    Guidance.cfg(7.5),
    Guidance.cfg(3.0, shape="sine", interval=(200, 900)),
    Guidance.delayed(7.5, until=At(500)),
    Guidance.opposite(2.0, scale=5.0, until=At(-1)),
    Guidance.delayed(7.5, until=FirstMinimum()),
    Guidance.opposite(2.0, scale=7.5, until=FirstMinimum(earliest=3, latest=6, drop=0.1)),
    Guidance.delayed(7.5, until=Settled((30.0,) * STEPS, factor=0.5, wait=1, latest=6)),
    Guidance.opposite(1.0, scale=7.5, until=Settled((30.0,) * STEPS, factor=0.4)),
]


def guided_differently(steps):
    """(a plan for each of EIGHT, one table of them all, the row each starts at); `steps` of each."""
    scheduler, plans = make_scheduler("dpmsolver++", DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)), []
    for guidance, count in zip(EIGHT, steps, strict=True):
        if isinstance(guidance.until, Settled):
            guidance = replace(guidance, until=replace(guidance.until, ordinary=(30.0,) * count))
        plans.append(StepTable.make(Solver.of(scheduler, Schedule(count)), guidance, torch.device("cpu")))
    lengths = torch.tensor([len(plan.table) for plan in plans])
    return plans, torch.cat([plan.table for plan in plans]), lengths.cumsum(0) - lengths


def wavering(latents, timesteps, branch):
    """A network whose predictions' distance goes up and down with the timestep, each sample its own way."""
    uncond, cond = latents.chunk(2)
    t = timesteps.chunk(2)[0].view(-1, 1, 1, 1)
    return torch.cat([0.3 * uncond, 0.3 * cond + (1.2 + torch.sin(t / 60 + 40 * cond[:, :1, :1, :1])) * cond.roll(1, -1)])


def alone(plan, noise):
    """(latents, transition, gaps) of a sample's own run, its state always at `noise` (1, ...)."""
    state = State.empty((1, *noise.shape[1:]), STEPS, torch.float32, "cpu", True, plan.scaled).start(noise, plan.table)
    denoise(fused_step(wavering, plan, state), ["both"] * len(plan.table))
    return results(state)[0]


def results(state):
    way = state.transition
    return list(zip(state.latents.x.clone(), way.at.tolist(), way.gaps.nan_to_num(-1), strict=True))


def same(found, expected):
    return all(
        torch.equal(a[0], b[0]) and a[1] == b[1] and torch.equal(a[2], b[2]) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("way", ["kernel", "eager"])
def test_a_batch_of_eight_guidances_two_step_counts_and_a_restart_is_eight_runs(way, request):
    if way == "eager":
        request.getfixturevalue("eager")
    steps = [STEPS, 5, STEPS, 5, STEPS, STEPS, STEPS, 5]
    plans, table, rows = guided_differently(steps)
    noise, fresh = torch.randn((2, 8, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    lasts = rows + torch.tensor(steps) - 1
    state = State.empty((8, 4, 8, 8), STEPS, torch.float32, "cpu", True, plans[0].scaled).start(noise, table, rows, lasts)
    take = fused_step(wavering, replace(plans[0], table=table, finds=True), state)
    again = torch.tensor([2, 4])
    for call in range(4 + STEPS):
        if call == 4:  # sent back, the one to its own guidance, the other to another's
            state.restart(again, fresh[again], table, rows[[2, 5]], lasts[[2, 5]])
        take("both")
    expected = [alone(plan, noise[i : i + 1]) for i, plan in enumerate(plans)]
    expected[2], expected[4] = alone(plans[2], fresh[2:3]), alone(plans[5], fresh[4:5])
    assert same(results(state), expected)
    assert len({transition for _, transition, _ in expected}) >= 4


def test_samples_in_lockstep_may_be_guided_differently(eager):
    plans, table, rows = guided_differently([STEPS] * 8)
    noise = torch.randn((8, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    state = State.empty((8, 4, 8, 8), STEPS, torch.float32, "cpu", True, plans[0].scaled)
    state.start(noise, table, rows, rows + STEPS - 1)
    move = Lockstep(state, table, rows + torch.arange(STEPS)[:, None])
    for _ in range(STEPS):
        move(*wavering(state.latents.model_input, state.latents.timestep, "both").chunk(2))
    assert same(results(state), [alone(plan, noise[i : i + 1]) for i, plan in enumerate(plans)])


def test_a_solver_of_two_calls_a_step_is_laid_out_by_steps():
    """Guidance, gaps and transitions count steps; the second call of each has the weight of the first, and is not looked at."""
    solver = Solver.of(make_scheduler("ddim", DDIMScheduler(clip_sample=False)), Schedule(6))
    doubled = replace(solver, step=torch.tensor([0, 0, 1, 1, 2, 2]))
    plan = StepTable.make(doubled, Guidance.delayed(7.5, until=FirstMinimum(), shape=(1.0, 2.0, 3.0)), torch.device("cpu"))
    assert plan.steps == 3 and plan.calls(2) == 4
    assert plan.table[:, Column.AFTER].tolist() == [7.5, 7.5, 15, 15, 22.5, 22.5]
    assert plan.table[:, Column.KEEP].tolist() == [-math.inf] * 4 + [1, -math.inf]
    assert plan.table[:, Column.FIRST].tolist() == [1, 0] * 3
    state = plan.state(torch.randn(1, 4, 8, 8))
    assert state.transition.gaps.shape == (1, 3)


def test_a_table_with_room_has_the_same_rows_first():
    plan = StepTable.make(Solver.of(FlowMatchEulerDiscreteScheduler(), Schedule(STEPS)), Guidance.cfg(3.0), torch.device("cpu"))
    roomy = plan.roomy(20, 30)
    assert roomy.table.shape == (20, len(Column)) and torch.equal(roomy.table[:STEPS], plan.table)
    assert roomy.state(torch.randn(1, 4, 8, 8)).transition.gaps.shape == (1, 30)
    assert torch.equal(plan.roomy(3, 30).table, plan.table)  # longer than the room


@pytest.mark.parametrize("until", [FirstMinimum(), Settled((1.0,) * 3, factor=1.0), Fallen(0.5), MeanFallen(0.5)], ids=repr)
def test_the_gap_of_a_steps_second_call_lets_no_sample_leave(until):
    """The first calls' gaps 5, 4, 3 have no minimum, none is 1 or less, none fell by half. Some second calls' did."""
    solver = Solver.of(make_scheduler("ddim", DDIMScheduler(clip_sample=False)), Schedule(6))
    doubled, gaps = replace(solver, step=torch.tensor([0, 0, 1, 1, 2, 2])), iter([5.0, 0.1, 4.0, 0.1, 3.0, 9.0, 0.1])

    def network(latents, timesteps, branch):
        made = torch.zeros_like(latents)
        made[1:, 0, 0, 0] = next(gaps)
        return made

    plan = StepTable.make(doubled, Guidance.delayed(7.5, until=until), torch.device("cpu"))
    state = plan.state(torch.randn(1, 4, 8, 8))
    take = fused_step(network, plan, state)
    for _ in range(7):  # one more than there are: a sample that is done stays as it is
        take("both")
    assert state.transition.gaps.tolist() == [[5.0, 4.0, 3.0]] and state.transition.at.item() == -1


@pytest.mark.parametrize(
    ("guidance", "branches", "finds"),
    [
        (Guidance.cfg(7.5), ["both"] * 4, False),
        (Guidance.cfg(1.0), ["cond"] * 4, False),
        (Guidance.delayed(7.5, until=At(500)), ["uncond"] * 2 + ["both"] * 2, False),
        (Guidance.opposite(2.0, scale=1.0, until=At(500)), ["both"] * 2 + ["cond"] * 2, False),
        (Guidance.delayed(1.0, until=FirstMinimum(latest=3)), ["both"] * 3 + ["cond"], True),
        (Guidance.delayed(0.0, until=Settled((9.0,) * 4, wait=1, latest=3)), ["both"] * 3 + ["uncond"], True),
        (Guidance.delayed(7.5, until=FirstMinimum(latest=2)), ["uncond"] * 2 + ["both"] * 2, False),
    ],
    ids=repr,
)
def test_a_branch_nobody_needs_is_not_run(guidance, branches, finds):
    solver = Solver.of(make_scheduler("ddim", DDIMScheduler(clip_sample=False)), Schedule(4))
    plan = StepTable.make(replace(solver, level=torch.tensor([900.0, 700.0, 500.0, 300.0])), guidance, torch.device("cpu"))
    assert list(plan.branches) == branches and plan.finds == finds


def test_a_rule_on_a_curve_finds_what_its_rows_find():
    """The rows of each rule, through the definition: strictly a minimum, from `earliest` on, deep enough, or the deadline."""
    curve = [5.0, 3.0, 4.0, 6.0, 1.0, 2.0, 2.0]
    cases = {FirstMinimum(): 2, FirstMinimum(earliest=3): 5, FirstMinimum(drop=0.5): 5, FirstMinimum(drop=0.9): -1}
    cases |= {FirstMinimum(drop=0.9, latest=4): 4, Settled((4.0,) * 7, factor=1.0, wait=2): 3, At(300): 4}
    for rule, expected in cases.items():
        assert definition.transition(curve, rule.criteria([900, 700, 500, 400, 300, 200, 100])) == expected
