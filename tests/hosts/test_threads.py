"""`escape` where other threads use the same network: a network keeps nothing between calls, a scheduler does."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from basinescape import Guidance, escape
from basinescape.hosts.network_call import seen
from components import stable_diffusion
from diffusers import DDIMScheduler, StableDiffusionPipeline

FOUR = Guidance.cfg(4.0)


@pytest.fixture
def elsewhere():
    with ThreadPoolExecutor(1) as pool:
        yield lambda *what, **named: pool.submit(*what, **named).result()


def beside(pipe):
    """Another pipeline of the same network, with a scheduler of its own."""
    own = DDIMScheduler.from_config(pipe.scheduler.config)
    made = StableDiffusionPipeline(**{**pipe.components, "scheduler": own}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("guided", [False, True])
def test_a_network_may_be_shared(random_pipeline, elsewhere, guided):
    """With a pipeline that nobody escapes from, and with one under a guidance of its own, in the midst of each step."""
    pipe = random_pipeline("sd", 8, "epsilon")
    other = beside(pipe)
    expected, others = stable_diffusion(pipe, 4.0), stable_diffusion(other, 2.0)
    found = []

    def work():
        if not guided:
            return stable_diffusion(other, 2.0)
        with escape(other, Guidance.cfg(2.0)):
            return stable_diffusion(other, 2.0)

    def meanwhile(pipe, step, timestep, given):
        found.append(elsewhere(work))
        return given

    with escape(pipe, FOUR) as run:
        assert torch.equal(stable_diffusion(pipe, 4.0, callback_on_step_end=meanwhile), expected)
    assert run.calls == len(found) == 6 and all(torch.equal(one, others) for one in found)


def test_a_scheduler_in_the_middle_of_a_call_is_refused(random_pipeline, elsewhere):
    """To another thread and to a callback; the call that is being made goes on."""
    pipe = random_pipeline("sd", 8, "epsilon")
    sharing = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    expected = stable_diffusion(pipe, 4.0)

    def meanwhile(own, step, timestep, given):
        for one in (pipe, sharing):
            for call in (elsewhere, lambda what, *given: what(*given)):
                with pytest.raises(ValueError, match="scheduler is in the middle of another call inside escape"):
                    call(stable_diffusion, one)
        return given

    with escape(sharing, FOUR), escape(pipe, FOUR) as run:
        assert torch.equal(stable_diffusion(pipe, 4.0, callback_on_step_end=meanwhile), expected)
    assert run.calls == 6 and run.noise_gap.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
def test_who_watches_a_network_sees_its_own_threads_calls(elsewhere, compiled):
    """Whoever leaves first."""
    network, x, told = torch.nn.Linear(1, 1), torch.ones(1, 1), {"here": [], "there": []}
    if compiled:
        network._compiled_call_impl = network._call_impl
    expected = network(x)

    def watch(name):
        stack = ExitStack()
        stack.enter_context(seen(network, lambda call, output: told[name].append(call) or output + 1))
        return stack

    here, there = watch("here"), elsewhere(watch, "there")
    assert torch.equal(network(x), expected + 1) and [len(calls) for calls in told.values()] == [1, 0]
    here.close()
    assert torch.equal(elsewhere(network, x), expected + 1) and torch.equal(network(x), expected)
    elsewhere(there.close)
    assert torch.equal(network(x), expected) and torch.equal(elsewhere(network, x), expected)
    assert [len(calls) for calls in told.values()] == [1, 1]
