"""What the loop promises without a GPU: no value read back, the same operators in every step, buffers made once."""

from collections import Counter

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance
from basinescape.kernels import step as kernels_step
from basinescape.loop import Plan, denoise, fused_step, lockstep
from basinescape.models import adapt
from basinescape.schedulers import Schedule, make_scheduler
from basinescape.solver import Solver
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def start(pipe, guidance, scheduler="euler"):
    model = adapt(pipe)
    plan = Plan.make(Solver.of(make_scheduler(scheduler, pipe.scheduler), Schedule(STEPS)), guidance, torch.device("cpu"))
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
    assert state.step.tolist() == [STEPS, STEPS]


@pytest.mark.parametrize("way", [fused_step, lockstep])
@pytest.mark.parametrize("guidance", METHODS, ids=repr)
def test_the_loop_runs_on_tensors_without_values(pipe, eager, monkeypatch, guidance, way):
    """In fake tensors there is nothing to read: any read of a value raises."""
    step = kernels_step._step
    monkeypatch.setattr(torch.ops.basinescape, "step", step)  # the definition itself, not the operator's shape function
    network, plan, _ = start(pipe, guidance)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        state = plan.state(torch.randn(2, 4, 16, 16))
        denoise(way(network, plan, state), plan.branches)
        assert state.latents.shape == (2, 4, 16, 16) and state.latents.fake_mode is fake
        with pytest.raises(DataDependentOutputException):
            state.step[0].item()


@pytest.mark.parametrize("way", [fused_step, lockstep])
@torch.inference_mode()
def test_a_step_keeps_its_buffers(pipe, eager, way):
    network, plan, state = start(pipe, METHODS[-1], "dpmsolver++")
    where = {name: value.data_ptr() for name, value in vars(state).items() if value is not None}
    denoise(way(network, plan, state), plan.branches)
    assert where == {name: value.data_ptr() for name, value in vars(state).items() if value is not None}


def constant_network(value):
    def network(latents, timesteps, branch):
        return value.expand_as(latents).clone()

    return network


def test_flow_euler_goes_straight_along_a_constant_velocity():
    """dx/dsigma = v integrates to x - v from sigma 1 to 0, whatever the number of steps."""
    plan = Plan.make(Solver.of(FlowMatchEulerDiscreteScheduler(), Schedule(STEPS)), Guidance.cfg(3.0), torch.device("cpu"))
    noise, velocity = torch.randn(2, 4, 8, 8), torch.randn(4, 8, 8)
    state = plan.state(noise)
    denoise(fused_step(constant_network(velocity), plan, state), plan.branches)
    torch.testing.assert_close(state.latents, noise - velocity, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++"])
def test_coefficients_carry_the_prediction_type(prediction, name):
    base = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction)
    scheduler = make_scheduler(name, base)
    solver = Solver.of(scheduler, Schedule(STEPS))
    assert solver.coefficients is not None
    plan = Plan.make(solver, Guidance.cfg(2.0), torch.device("cpu"))
    noise, predicted = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    state = plan.state(noise * solver.init_sigma)
    denoise(fused_step(constant_network(predicted), plan, state), plan.branches)
    scheduler.set_timesteps(STEPS)
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(latents, t)
        latents = scheduler.step(predicted, t, latents).prev_sample
    torch.testing.assert_close(state.latents, latents, atol=1e-4, rtol=1e-4)
