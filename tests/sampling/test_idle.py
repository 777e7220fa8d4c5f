"""A transition that changes nothing is said, once a call and with the same words, by the sampler and by `escape`."""

from dataclasses import replace

import pytest
import torch
from basinescape import At, Fallen, FirstMinimum, Guard, Guidance, Sampler, Settled, escape
from basinescape.guidance.guard import Attempt

PLAIN, NEVER = "is plain guidance here: the first of {} steps is past", "has no transition here: none of {} steps comes so far"


def delayed(until):
    return Guidance.delayed(7.5, until=until)


CASES = [
    (At(680), 1, "NEVER"),
    (At(1000), 3, "PLAIN"),
    (At(0), 3, "NEVER"),
    (At(log_snr=-20), 3, "PLAIN"),
    (At(log_snr=20), 3, "NEVER"),
    (FirstMinimum(), 2, "NEVER"),
    (FirstMinimum(latest=3), 2, "NEVER"),
    (Settled((1.0,) * 3, wait=3), 3, "NEVER"),
    (At(500), 3, None),
    (FirstMinimum(), 3, None),
    (Fallen(), 2, None),
    (Settled((1.0,) * 3, wait=2), 3, None),
]


@pytest.mark.parametrize(("until", "steps", "said"), CASES)
def test_a_transition_that_changes_nothing_is_said(pipe, caplog, until, steps, said):
    sampler = Sampler.from_pipeline(pipe, "ddim")
    made = sampler(["a", "b"], 0, steps, delayed(until), output="latent", progress=False, batch_size=1)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("basinescape")]
    if said == "NEVER" and steps == 1:
        said = "PLAIN" if sampler.solver(1).levels[0] <= 680 else "NEVER"
    waiting = int((made.transition_step < 0).sum())
    came = f"{waiting} of 2 samples had no transition in {{}} steps" if waiting else None
    wanted = {"PLAIN": PLAIN, "NEVER": NEVER}.get(said, came)
    assert len(lines) == (wanted is not None) and (wanted is None or wanted.format(steps) in lines[0])
    caplog.clear()
    own = type(pipe)(**{**pipe.components, "scheduler": sampler.scheduler})
    own.set_progress_bar_config(disable=True)
    with escape(own, delayed(until)):
        own(["a", "b"], num_inference_steps=steps, output_type="latent")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("basinescape")] == lines


@pytest.mark.parametrize(("interval", "said"), [((0.1, 0.7), True), ((300, 1000), False)])
def test_an_interval_that_holds_no_step_is_said(pipe, caplog, interval, said):
    some = Guidance.cfg(7.5, interval=interval)
    sampler = Sampler.from_pipeline(pipe, "ddim")
    out = sampler("a", 0, 3, some, output="latent", progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("basinescape")]
    assert bool(out.noise_gap.isnan().all()) == said and len(lines) == said
    assert not said or (repr(some) in lines[0] and "guides no step here: none of 3 steps is in its interval" in lines[0])


@pytest.mark.parametrize("shape", ["static", (1.0,) * 3])
def test_one_weight_on_both_sides_is_said(pipe, caplog, shape):
    same = Guidance.delayed(7.5, until=FirstMinimum(), before=7.5, shape=shape)
    sampler = Sampler.from_pipeline(pipe, "ddim")
    found = sampler("a", 0, 3, same, output="latent", progress=False).latents
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("basinescape")]
    assert repr(same) in line and "its weight is the same before the transition and after it" in line
    assert torch.equal(found, sampler("a", 0, 3, Guidance.cfg(7.5), output="latent", progress=False).latents)
    assert same.idle([900, 500, 100]) is not None and replace(same, shape=(1.0, 0.5, 1.0)).idle([900, 500, 100]) is None


def test_attempts_of_a_guard_are_told_apart(pipe, caplog):
    """Plain guidance changes nothing on purpose, and is not said."""
    idle, fine = delayed(At(1000)), delayed(At(500))
    guard = Guard(tuple(Attempt(one, 1e9) for one in (Guidance.cfg(7.5), idle, idle, fine)))
    Sampler.from_pipeline(pipe, "ddim")("a", 0, 3, guard, output="latent", progress=False)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("basinescape")]
    assert repr(idle) in line and PLAIN.format(3) in line
