"""What a caller has around a call, and steps that no scheduler can take: neither changes a picture in silence."""

from contextlib import contextmanager

import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.data.prompts import Job
from basinescape.schedulers.schedule import Schedule
from basinescape.schedulers.solver_coefficients import Solver
from bulkruns import make, sound
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_is_around_a_call_changes_nothing(small, tmp_path, around):
    sampler, guard = Sampler.from_pipeline(small, "dpmsolver++"), Guidance.guard(5.0)
    right = sampler(["a cat"], [3], 4, guard, output="latent", progress=False)
    verdict = sampler.judge(right.latents, "a cat", 3).score
    with around():
        found = sampler(["a cat"], [3], 4, guard, output="latent", progress=False)
        assert torch.equal(sampler.judge(right.latents, "a cat", 3).score, verdict)
        make(sampler, [Job("a", "a cat", 3)], tmp_path, guard, steps=4, format="latents")
    assert torch.equal(found.latents, right.latents) and found.latents.dtype == torch.float32
    (line,) = sound(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / line["file"])["latents"], right.latents[0], rtol=1e-3, atol=1e-3)
    assert torch.get_default_dtype() == torch.float32


class Broken(DDIMScheduler):
    def set_timesteps(self, *given, **named):
        super().set_timesteps(*given, **named)
        self.alphas_cumprod = self.alphas_cumprod * torch.nan


@pytest.mark.parametrize(
    ("scheduler", "schedule", "says"),
    [
        (FlowMatchEulerDiscreteScheduler(), Schedule(sigmas=(3.0,)), "noise levels that scheduler"),
        (FlowMatchEulerDiscreteScheduler(), Schedule(sigmas=(1.5, 0.5)), "noise levels that scheduler"),
        (DDIMScheduler(), Schedule(sigmas=(1.0,)), "cannot take sigmas"),
        (Broken(), Schedule(4), "not finite|draws noise"),
        (EulerDiscreteScheduler(), Schedule(4, eta=0.5), "eta is 0.5, but scheduler EulerDiscreteScheduler takes none"),
    ],
)
def test_steps_that_cannot_be_are_refused(scheduler, schedule, says):
    with pytest.raises(ValueError, match=says):
        Solver.of(scheduler, schedule)


def test_sigmas_reach_a_scheduler_that_multiplies_them():
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    levels = Solver.of(flow, Schedule(sigmas=(1.0, 0.5))).levels
    assert levels[0] > levels[1] > 0
