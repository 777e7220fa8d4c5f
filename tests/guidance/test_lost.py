"""Samples that half precision loses: a guard makes no further attempts, which float32 is to make."""

import copy
import math

import pytest
import torch
from basinescape import At, Guidance, Sampler
from basinescape.guidance.early import EarlyLook
from basinescape.guidance.guard import Attempt, Guard
from smallguards import EVERY

STEPS, PROBES = 4, 1
GOOD, BAD = "a picture of a cat", "a picture of a frog"
LATE = [Guidance.delayed(7.5, until=At(900), before=2.0), Guidance.delayed(7.5, until=At(300), before=2.0)]
GUARD = Guard(tuple(Attempt(one, EVERY, PROBES) for one in (Guidance.cfg(7.5), *LATE)))


def losing(pipe, dtype, scheduler):
    """A sampler in `dtype` whose network's conditional prediction is NaN for BAD in all dtypes."""
    own = copy.deepcopy(pipe).to(dtype)
    bad = own.encode_prompt([BAD], "cpu", 1, False)[0]

    def lose(net, given, named, output):
        hit = (named["encoder_hidden_states"] == bad.to(dtype)).flatten(1).all(dim=1)
        output[0][hit] = math.nan
        return output

    own.unet.register_forward_hook(lose, with_kwargs=True)
    return Sampler.from_pipeline(own, scheduler)


def sampled(sampler, guard, **options):
    return sampler([GOOD, BAD], [0, 1], STEPS, guard, output="latent", progress=False, **options)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "unipc"])
def test_a_sample_that_half_precision_loses_is_attempted_once(pipe, scheduler):
    """unipc steps by itself; the sample beside it makes all its attempts."""
    out = sampled(losing(pipe, torch.bfloat16, scheduler), GUARD)
    assert out.finite.tolist() == [True, False] and out.suspect.all() and out.score[1].isnan()
    assert out.attempts.tolist() == [3, 1]
    assert out.calls.tolist() == [3 * (2 * STEPS + 2 * PROBES), 2 * STEPS + 2 * PROBES]


def test_float32_makes_all_attempts(pipe):
    """There another noise is the one chance that a sample has."""
    out = sampled(losing(pipe, torch.float32, "dpmsolver++"), GUARD)
    assert out.attempts.tolist() == [3, 3] and not out.finite[1]


def test_the_early_look_ends_it_too(pipe):
    sampler = losing(pipe, torch.bfloat16, "dpmsolver++")
    look = EarlyLook((1e9,) * STEPS, tuple(sampler.solver(STEPS).levels), 2, 1e9)
    out = sampled(sampler, Guard(GUARD.attempts, look))
    assert out.attempts.tolist() == [3, 1] and out.suspect.all() and out.score[1].isnan()
    assert out.calls.tolist()[1] == 2 * look.steps


def test_the_last_step_may_be_the_one_that_is_looked_at(pipe):
    """An attempt that ends there and is given up begins again, and is not judged."""
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    look = EarlyLook((1e-9,) * STEPS, tuple(sampler.solver(STEPS).levels), STEPS, 1.0)
    out = sampled(sampler, Guard(GUARD.attempts[:2], look))
    assert out.attempts.tolist() == [2, 2] and out.calls.tolist() == [2 * STEPS + 2 * STEPS + 2 * PROBES] * 2
