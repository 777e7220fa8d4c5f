"""The steps and runs that the ComfyUI node sees: all samplers' calls, second passes, cancelled runs, scales that change."""

import logging
from types import SimpleNamespace

import comfy
import pytest
import torch
from basinescape.hosts.comfyui import node
from basinescape.hosts.guidance_widgets import FALLEN, MINIMUM, WIDGETS
from basinescape.hosts.noise_levels import timestep
from basinescape.hosts.step_of_sigma import StepOfSigma, evaluates_twice
from comfy_runs import (
    BATCH,
    CFG,
    DEFAULTS,
    SIGMAS,
    STEPS,
    given,
    network,
    patched,
    sampled,
    state_of,
    visits,
    weights_of,
)
from kd_package import package


@pytest.fixture(scope="module")
def kd():
    return package()


# What ComfyUI 0.8.0's samplers call in 4 steps: (step, place in the schedule) of each call, as its loops count steps.
CALLS = {
    "euler": "0:0 1:1 2:2 3:3",
    "flow, whose samplers begin a little below 1": "0:0.01 1:1 2:2 3:3",
    "dpm_2": "0:0 0:0.5 1:1 1:1.5 2:2 2:2.5 3:3",
    "seeds_3": "0:0.01 0:0.3 0:0.6 1:1 1:1.3 1:1.6 2:2 2:2.3 2:2.6 3:3",
    "heun": "0:0 0:1 1:1 1:2 2:2 2:3 3:3",
    "heunpp2": "0:0 0:1 0:2 1:1 1:2 1:3 2:2 2:3 3:3",
    "dpmpp_2s_ancestral_cfg_pp": "0:0 0:1 1:1 1:2 2:2 2:3.5 3:3",
    "dpmpp_2s_ancestral": "0:0 0:1 1:1 1:1.5 2:2 2:2.5 3:3",
}
PROVISIONAL = {"heun": 1, "heunpp2": 2, "dpmpp_2s_ancestral": 1, "dpmpp_2s_ancestral_cfg_pp": 1}  # before the first return


@pytest.mark.parametrize("name", CALLS)
def test_the_step_of_a_call_is_told_by_its_noise_level(name):
    """Until it has once come back to a noise level, a sampler that looks ahead seems to take a step. That is undone."""
    steps = StepOfSigma([4.0, 3.0, 2.0, 1.0])
    calls = [(int(step), float(place)) for step, place in (call.split(":") for call in CALLS[name].split())]
    found = [(steps.call(4 - place), steps.step) for _, place in calls]
    expected = [(i == 0 or step != calls[i - 1][0], step) for i, (step, _) in enumerate(calls)]
    wrong = [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    assert wrong == list(range(1, 1 + PROVISIONAL.get(name, 0))) and steps.returns == 0


def test_a_sampler_that_evaluates_each_step_twice_is_known_by_its_name_or_option():
    def sample_sa_solver_pece():
        pass

    def sample_sa_solver():
        pass

    for function, options, expected in (
        (sample_sa_solver_pece, {}, True),
        (sample_sa_solver, {"use_pece": True}, True),
        (sample_sa_solver, {"use_pece": False}, False),
    ):
        assert evaluates_twice(SimpleNamespace(sampler_function=function, extra_options=options)) is expected
    assert not evaluates_twice(object())  # a sampler of another node's
    for twice, expected in ((True, [0, None, 1, None, 2, None]), (False, [0, 0, 1, 1, None, 2])):
        steps = StepOfSigma([4.0, 3.0, 2.0], twice)
        assert [steps.step if steps.call(sigma) else None for sigma in (4, 4, 3, 3, 2, 2)] == expected


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ((0, 1, 1, 5, 6), [0, 1, 1, 5, None]),  # seemed to look ahead, and goes on much further
        ((0, 1.5, 1.7, 1.5, 2.2, 3.1), [0, 1, None, 1, 2, 3]),  # came back off the schedule, to take a smaller step
        ((0, 0.5, 0, 1, 2), [0, None, 0, 1, 2]),
    ],
)
def test_a_sampler_that_comes_back_is_not_stuck(places, expected):
    steps = StepOfSigma([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert [steps.step if steps.call(8 - place) else None for place in places] == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((0, 0.5, 1.5, 2.2, 3.7, 4.5, 5.5, 6.5), [0, 0, 0, 0, 0, CFG, CFG, CFG]),  # dpm_fast
        (
            (0, 0.4, 0.8, 1.2, 2.5, 4.5, 2.5, 3.5, 3.6, 4.2, 4.1, 5.5),
            [0, 0, 0, 0, 0, CFG, 0, 0, 0, CFG, CFG, CFG],
        ),  # dpm_adaptive
        ((0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7), [0, 0, 0, 0, CFG, CFG, 0, 0, CFG, CFG, CFG, CFG]),  # one that starts again
    ],
)
def test_a_sampler_off_the_schedule_or_back_on_it_is_guided_by_noise_level(caplog, order, expected):
    caplog.set_level(logging.INFO)
    patcher = patched(timestep=float(timestep(comfy.EPS(), float(SIGMAS[4]))))
    assert weights_of(patcher, order)[:, 0].tolist() == expected
    assert ("went back" in caplog.text) == (list(order) != sorted(order))
    assert state_of(patcher).transition_step.tolist() == [4, 4]


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.parametrize("widgets", [{"timestep": 600.0}, {"until": MINIMUM}, {"until": FALLEN}])
def test_samplers_with_steps_of_their_own_reach_full_guidance(kd, name, widgets):
    sampler = getattr(kd[0], f"sample_{name}")
    ends = {"sigma_min": float(SIGMAS[-2]), "sigma_max": float(SIGMAS[0])} | ({"n": STEPS} if name == "dpm_fast" else {})
    x, uncond, cond = given()
    patcher = patched(**widgets)
    wrapped = lambda model, x, sigmas, **more: sampler(model, x, **ends, **more)  # noqa: E731
    comfy.CFGGuider(patcher, CFG, positive=cond, negative=uncond).sample(wrapped, SIGMAS[0] * x, SIGMAS)
    assert (state_of(patcher).transition_step > 0).all() and (state_of(patcher).weight == CFG).all()


@pytest.mark.parametrize(
    ("order", "gaps", "expected"),
    [
        ([0, 1, 2, 3, 1, 2, 3], [5, 3, 4, 4.5, 4, 3, 2], [-1, -1, 2, 2, -1, -1, -1]),
        ([0, 1, 2, 2, 3, 3], [5, 3, 4, 2.5, 9, 2], [-1, -1, 2, -1, -1, -1]),  # looks one step ahead
        ([0, 1, 2, 1, 2, 3, 2, 3, 4, 3], [5, 3, 4, 4, 9, 9, 3, 9, 9, 2], [-1, -1, 2, *[-1] * 7]),  # ... two
    ],
)
def test_what_a_sampler_noted_before_it_came_back_is_undone(order, gaps, expected):
    """The gaps have a minimum, those of the calls that count have none."""
    made = iter(gaps)
    patcher = node.patched(
        comfy.Patcher(lambda x, t, prompt: torch.full_like(x, next(made) if prompt else 0.0), comfy.EPS()),
        **DEFAULTS | {"until": MINIMUM, "latest": 1.0},
    )
    x = given()[0]
    seen = []
    guider = comfy.CFGGuider(patcher, CFG, positive=1, negative=0)
    called = lambda: seen.append(int(state_of(patcher).transition_step[0]))  # noqa: E731
    guider.sample(visits(order), SIGMAS[0] * x, SIGMAS, called=called)
    assert seen == expected
    assert torch.allclose(state_of(patcher).noise_gap[0, 3], x[0].numel() ** 0.5 * torch.tensor(float(gaps[-1])), rtol=1e-3)


@pytest.mark.parametrize("until", [MINIMUM, FALLEN])
@pytest.mark.parametrize(
    ("start", "noise", "timestep", "expected"),
    [
        (4, 1.0, 680.0, 0),  # image to image from below the basin, such as a second pass at a denoise of a half
        (1, 0.0, 680.0, 0),  # goes on from where another run has stopped
        (1, 1.0, 680.0, None),  # begins with much noise: its basin lies before it
        (1, 1.0, 1000.0, 0),
        (0, 1.0, 680.0, None),
    ],
)
def test_a_run_that_begins_past_its_basin_is_guided_in_full(kd, until, start, noise, timestep, expected):
    patcher = patched(until=until, timestep=timestep)
    sigmas = SIGMAS[start:]
    sampled(kd, "euler", patcher, sigmas, noise=noise * torch.ones(BATCH, 12))
    steps = state_of(patcher).transition_step.tolist()
    assert steps == [0, 0] if expected == 0 else min(steps) > 0


def test_a_run_without_new_noise_from_the_highest_level_on_does_not_go_on(kd):
    patcher, top = patched(until=MINIMUM), float(comfy.EPS().sigma_max)
    sigmas = torch.cat([torch.tensor([top]), SIGMAS])
    sampled(kd, "euler", patcher, sigmas, noise=torch.zeros(BATCH, 12))
    assert state_of(patcher).transition_step.min() >= 2


@pytest.mark.parametrize("count", [2, 3, 8, 20])
@pytest.mark.parametrize("until", [MINIMUM, FALLEN])
def test_every_latest_share_on_offer_works(kd, until, count):
    least, sigmas = {MINIMUM: 2, FALLEN: 1}[until], torch.linspace(10.0, 0.0, count + 1)
    options = WIDGETS["latest"].options
    for latest in (options["min"], options["min"] + options["step"], options["default"], options["max"]):
        patcher = patched(until=until, latest=latest)
        sampled(kd, "euler", patcher, sigmas)
        deadline = max(round(latest * count), least)
        steps = state_of(patcher).transition_step
        assert ((steps >= least) & (steps <= deadline)).all() if deadline < count else (steps != 0).all()


def test_a_cancelled_run_leaves_nothing_behind(kd):
    patcher = patched(timestep=600.0)
    expected = sampled(kd, "euler", patcher)

    class Cancelled(Exception):
        pass

    def cancel():
        raise Cancelled

    for calls in (1, 5):
        with pytest.raises(Cancelled):
            x, uncond, cond = given()
            guider = comfy.CFGGuider(patcher, 9.0, positive=cond, negative=uncond)
            left = iter(range(calls))
            stop = lambda left=left: next(left, None) is None and cancel()  # noqa: E731
            guider.sample(visits(range(STEPS)), SIGMAS[0] * x, SIGMAS, called=stop)
        assert torch.equal(sampled(kd, "euler", patcher), expected)


def test_a_scale_that_changes_in_a_run_is_followed(kd):
    class Changing(comfy.CFGGuider):
        def predict_noise(self, x, sigma, model_options):
            self.cfg = 1.0 + float(sigma[0])
            return super().predict_noise(x, sigma, model_options)

    x, uncond, cond = given()
    found = {}
    for name, patcher in {"stock": comfy.Patcher(network, comfy.EPS()), "ours": patched(timestep=1000.0)}.items():
        guider = Changing(patcher, CFG, positive=cond, negative=uncond)
        found[name] = guider.sample(kd[0].sample_heun, SIGMAS[0] * x, SIGMAS)
    assert torch.allclose(found["ours"], found["stock"], rtol=1e-3, atol=1e-3)
    patcher = patched(until=FALLEN)
    sampled(kd, "euler", patcher)
    fixed = state_of(patcher)
    Changing(patcher, CFG, positive=cond, negative=uncond).sample(kd[0].sample_euler, SIGMAS[0] * x, SIGMAS)
    changed, until = state_of(patcher), fixed.transition_step.min() + 1
    assert torch.equal(changed.transition_step, fixed.transition_step)
    assert torch.allclose(changed.noise_gap[:, :until], fixed.noise_gap[:, :until]) and changed.noise_gap.isfinite().all()
    assert torch.allclose(changed.weight, 1 + SIGMAS[-2])
