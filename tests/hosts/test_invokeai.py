"""InvokeAI's node on the code of its own backend, and on a stand-in of its contract, under diffusers' schedulers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import basinescape
import invokeai_backend
import oracle
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance
from basinescape.hosts.guidance_widgets import MINIMUM, WIDGETS
from basinescape.hosts.own_loop import judge
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from hosts_tested import INVOKEAI
from rounding import close

FOLDER = Path(basinescape.__file__).parent / "hosts/invokeai/basin_escape"  # what a user links
STEPS, SCALE, SHAPE = 9, 4.0, (2, 4, 8, 8)
DEFAULTS = {name: widget.options["default"] for name, widget in WIDGETS.items()}


@pytest.fixture(params=["stand-in", INVOKEAI.version], ids=["stand-in", str(INVOKEAI)])
def node(request, monkeypatch):
    with invokeai_backend.installed(request.param, monkeypatch) as found:
        yield found


@pytest.mark.parametrize("load", ["stand-in", INVOKEAI.version], ids=["stand-in", str(INVOKEAI)])
def test_the_folder_can_be_put_into_nodes(monkeypatch, tmp_path, load):
    """InvokeAI loads a folder as the module of its name, whatever other module has that name."""
    with invokeai_backend.installed("stand-in", monkeypatch) as found:
        own, link = sys.modules["invokeai"], tmp_path / FOLDER.name
        link.symlink_to(FOLDER)
        monkeypatch.setitem(sys.modules, link.name, None)  # nothing stays behind
        invokeai_backend.load_nodes(load, tmp_path, monkeypatch)
        assert sys.modules["invokeai"] is own and sys.modules[link.name].BasinEscapeInvocation is found


def network(x, t, prompt):
    prompt, share = prompt.view(-1, 4, 1, 1), torch.as_tensor(t).to(x) / 1000
    pull = 0.2 + (share - 0.55 - 0.3 * (3 * prompt.mean(dim=1, keepdim=True)).tanh()).abs()
    return 0.3 * x + 0.1 * torch.sin(x + prompt) + pull * prompt


def given():
    rng = torch.Generator().manual_seed(3)
    return torch.randn(SHAPE, generator=rng), 0 * torch.ones(2, 4), torch.randn((2, 4), generator=rng)


def connected(scheduler=EulerDiscreteScheduler, first=0, net=network, calls=None, **more):
    """What the node is connected to: noise, prompts, a network."""
    made = scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    made.set_timesteps(STEPS)
    noise, uncond, cond = given()

    def unet(sample, timestep, encoder_hidden_states, **_):
        if calls is not None:
            calls.append(timestep)
        return SimpleNamespace(sample=net(sample, timestep, encoder_hidden_states))

    own = {"latents": torch.zeros(SHAPE), "noise": noise, "uncond": uncond, "cond": cond, "seed": 5, "first": first}
    return SimpleNamespace(**own | {"scheduler": made, "unet": unet, "is_canceled": None} | more)


def denoise(node, context=None, cfg_scale=SCALE, **fields):
    return node(cfg_scale=cfg_scale, **DEFAULTS | fields).invoke(context or connected())


def stock(node, context=None, cfg_scale=SCALE):
    """By InvokeAI's own node."""
    return node.__mro__[1](cfg_scale=cfg_scale)._new_invoke(context or connected()).latents


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_constant_guidance_is_invokeais_own(node, scheduler):
    found = denoise(node, connected(scheduler), timestep=1000.0)
    assert close(found.latents, stock(node, connected(scheduler)))
    assert found.transition_step == [0, 0] and (found.width, found.height) == (64, 64)


def test_a_scale_for_each_step_is_followed(node):
    scales = [2.0 + 0.5 * k for k in range(STEPS)]
    assert close(denoise(node, cfg_scale=scales, timestep=1000.0).latents, stock(node, cfg_scale=scales))
    with pytest.raises(ValueError, match="give a number"):
        denoise(node, connected(HeunDiscreteScheduler), cfg_scale=scales)


@pytest.mark.parametrize(
    ("fields", "guidance"),
    [
        ({"timestep": 600.0}, Guidance.delayed(SCALE, until=At(600))),
        ({"timestep": 700.0, "before": -2.0, "rule": "apg"}, Guidance.opposite(2.0, scale=SCALE, until=At(700), rule="apg")),
        ({"until": MINIMUM, "latest": 1.0, "before": 1.0}, Guidance.delayed(SCALE, until=FirstMinimum(latest=9), before=1.0)),
    ],
    ids=["delayed", "opposite", "minimum"],
)
def test_it_is_what_the_definition_says(node, fields, guidance):
    found = denoise(node, **fields)
    context = connected()
    sigmas, timesteps = context.scheduler.sigmas.double(), context.scheduler.timesteps
    noise, uncond, cond = (one.double() for one in given())

    def predict(x, k, i):
        scaled = x / (sigmas[k] ** 2 + 1).sqrt()
        return tuple(network(scaled, timesteps[k], one[i : i + 1]) for one in (uncond, cond))

    def step(x, guided, k):
        return x + (sigmas[k + 1] - sigmas[k]) * guided

    each = [guidance] * 2
    latents, transitions, _ = oracle.samples(predict, step, sigmas[0] * noise, timesteps.tolist(), each)
    assert found.transition_step == transitions.tolist() and close(found.latents.double(), latents)
    if fields.get("until") == MINIMUM:
        assert len(set(found.transition_step)) == 2


def test_pictures_are_judged(node):
    calls = []
    found = denoise(node, connected(calls=calls))
    context, (_, uncond, cond) = connected(), given()

    def predict(x, timesteps):
        return network(x, timesteps[0], uncond), network(x, timesteps[0], cond)

    expected = judge(predict, context.scheduler, found.latents, 5)
    assert torch.allclose(torch.tensor(found.score), expected.score, rtol=1e-4) and len(calls) == STEPS + 2
    assert found.suspect == expected.suspect.tolist()
    alone = denoise(node, connected(calls=calls), judge=False)
    assert torch.equal(alone.latents, found.latents) and alone.score == alone.suspect == [] and len(calls) == 2 * STEPS + 2


def test_a_second_pass_begins_past_its_transition(node):
    context = connected(first=6)
    assert close(denoise(node, context, until=MINIMUM).latents, stock(node, connected(first=6)))
    latents = 0.5 * given()[0]
    goes_on = connected(first=2, noise=None, latents=latents)  # from another node's latents
    found = denoise(node, goes_on, until=MINIMUM, timestep=0.0)
    assert close(found.latents, stock(node, connected(first=2, noise=None, latents=latents))) and found.transition_step == [
        0,
        0,
    ]
    nothing = denoise(node, connected(first=STEPS))
    assert nothing.transition_step == nothing.score == []


def test_a_cancelled_denoising_leaves_nothing_behind(node):
    asked = []
    with pytest.raises(invokeai_backend.CanceledException):
        denoise(node, connected(is_canceled=lambda: asked.append(1) or len(asked) > 12), until=MINIMUM)
    expected = stock(node)
    first, again = denoise(node, until=MINIMUM), denoise(node, until=MINIMUM)
    assert torch.equal(first.latents, again.latents) and first.transition_step == again.transition_step
    assert torch.equal(stock(node), expected) and not close(first.latents, expected)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"cfg_rescale_multiplier": 0.7}, "choose that rule"),
        ({"ip_adapter": [object()]}, "ip_adapter is given"),
        ({"denoising_end": 0.8}, "denoising_end is 0.8, and pictures are judged at the end"),
        ({"timestep": 1001.0}, "timestep must be at most 1000"),
        ({"until": MINIMUM, "latest": 2.0}, "latest must be a number from 0 to 1"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_work(node, fields, told):
    calls = []
    with pytest.raises(ValueError, match=told):
        denoise(node, connected(calls=calls), **fields)
    assert not calls
