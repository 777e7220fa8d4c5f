"""The ComfyUI node on a stand-in of ComfyUI's contract, under k-diffusion's samplers, which ComfyUI has copies of."""

import json
from pathlib import Path

import comfy
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance
from basinescape.hosts import comfyui
from basinescape.hosts.comfyui import node
from basinescape.hosts.comfyui.guided import Steps
from basinescape.hosts.kdiffusion import EscapeDenoiser
from kd_package import package

FOLDER = Path(comfyui.__file__).parent
STEPS, BATCH, CFG = 8, 2, 4.0
SIGMAS = torch.cat([torch.linspace(10.0**0.2, 0.1**0.2, STEPS) ** 5, torch.zeros(1)])
FLOW = torch.linspace(1.0, 0.0, STEPS + 1)
DEFAULTS = {name: widget.options["default"] for name, widget in node.WIDGETS.items()}
ORDERS = {"euler": 1, "dpmpp_2m": 1, "lms": 1, "heun": 2, "dpm_2": 2, "dpmpp_2s_ancestral": 2}


@pytest.fixture(scope="module")
def kd():
    return package()


def network(x, t, cond):
    return 0.3 * x + 0.1 * torch.sin(x + cond) + 0.3 * torch.cos(t / 100)[:, None] * cond


def given(shape=(BATCH, 12)):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng) for _ in range(3)]


def sampled(kd, name, patcher, sigmas=SIGMAS, cfg=CFG, rows=slice(None)):
    x, uncond, cond = (value[rows] for value in given())
    torch.manual_seed(0)
    return comfy.sample(patcher, getattr(kd[0], f"sample_{name}"), sigmas[0] * x, sigmas, cond, uncond, cfg)


def patched(sampling=comfy.EPS, **widgets):
    return node.patched(comfy.Patcher(network, sampling()), **DEFAULTS | widgets)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("sampling", [comfy.EPS, comfy.V, comfy.CONST])
def test_plain_guidance_is_what_the_sampler_would_do(kd, name, sampling):
    sigmas = FLOW if sampling is comfy.CONST else SIGMAS
    for cfg in (CFG, 1.0):
        found = sampled(kd, name, patched(sampling, timestep=1000.0), sigmas, cfg)
        assert torch.allclose(found, sampled(kd, name, comfy.Patcher(network, sampling()), sigmas, cfg), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(
    ("widgets", "guidance"),
    [
        ({"timestep": 600.0}, Guidance.delayed(CFG, until=At(600))),
        (
            {"until": node.MINIMUM, "latest_step": 5, "before": -1.0, "rule": "rescale"},
            Guidance.opposite(1.0, scale=CFG, until=FirstMinimum(latest=5), rule="rescale"),
        ),
    ],
    ids=["timestep", "minimum"],
)
def test_steps_gaps_and_transitions_are_those_of_the_other_hosts(kd, name, widgets, guidance):
    patcher = patched(**widgets)
    found = sampled(kd, name, patcher)

    class Network(torch.nn.Module):
        alphas_cumprod = 1 / (1 + (2 * comfy.EPS().log_sigmas).exp())
        apply_model = staticmethod(network)

    denoiser = EscapeDenoiser(kd[1].CompVisDenoiser(Network(), quantize=True), guidance, order=ORDERS[name])
    x, uncond, cond = given()
    torch.manual_seed(0)
    extra = {"cond": cond, "uncond": uncond}
    expected = getattr(kd[0], f"sample_{name}")(denoiser, SIGMAS[0] * x, SIGMAS, extra_args=extra, disable=True)
    run = patcher.model_options["sampler_cfg_function"].run
    assert torch.equal(run.transition_step, denoiser.transition_step)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    known = denoiser.noise_gap.isfinite()
    assert torch.allclose(run.noise_gap[known], denoiser.noise_gap[known], rtol=1e-3)


def test_a_run_begins_anew_and_samples_go_their_own_ways(kd):
    patcher = patched(until=node.MINIMUM, latest_step=4)
    first = sampled(kd, "heun", patcher)
    together = patcher.model_options["sampler_cfg_function"].run.transition_step
    assert torch.equal(sampled(kd, "heun", patcher), first)
    for i in range(BATCH):
        alone = sampled(kd, "heun", patcher, rows=slice(i, i + 1))
        run = patcher.model_options["sampler_cfg_function"].run
        assert torch.allclose(alone[0], first[i], rtol=1e-4, atol=1e-4) and run.transition_step[0] == together[i]
    later = sampled(kd, "euler", patcher, SIGMAS[3:])  # part of a schedule: its steps count from its own first
    assert patcher.model_options["sampler_cfg_function"].run.noise_gap.shape == (BATCH, STEPS - 3) and later.isfinite().all()


@pytest.mark.parametrize(
    ("sigmas", "expected"),
    [
        ([4, 3, 2, 1], [0, 1, 2, 3]),
        ([4, 3.5, 3, 2.5, 2, 1.5, 1], [0, None, 1, None, 2, None, 3]),
        ([4, 2.9, 3, 1.9, 2, 0.9, 1], [0, None, 1, None, 2, None, 3]),
        ([4, 3, 3, 2, 2, 1, 1], [0, 1, 1, None, 2, None, 3]),
    ],
)
def test_the_step_of_a_call_is_told_by_its_noise_level(sigmas, expected):
    steps = Steps([4.0, 3.0, 2.0, 1.0])
    found = []
    for sigma in sigmas:
        first, other = steps.call(sigma)
        assert other == (first and steps.step in found)
        found.append(steps.step if first else None)
    assert found == expected


@pytest.mark.parametrize("schema", [True, False], ids=["V3", "V1"])
def test_the_folder_can_be_put_into_custom_nodes(monkeypatch, schema):
    made = comfy.load(FOLDER, "custom_nodes_x_basinescape", monkeypatch, schema)[node.ID]
    model = comfy.Patcher(network, comfy.EPS())
    if schema:
        described = made.define_schema()
        assert [one.id for one in described.inputs] == ["model", *node.WIDGETS] and described.category == node.CATEGORY
        assert all(one.tooltip for one in described.inputs[1:])
        (result,) = made.execute(model=model, **DEFAULTS).result
    else:
        required = made.INPUT_TYPES()["required"]
        assert list(required) == ["model", *node.WIDGETS] and made.RETURN_TYPES == ("MODEL",)
        assert required["until"][0] == [node.TIMESTEP, node.MINIMUM, node.FALLEN] and required["before"][0] == "FLOAT"
        assert all(options["tooltip"] and "default" in options for _, options in list(required.values())[1:])
        (result,) = getattr(made(), made.FUNCTION)(model=model, **DEFAULTS)
    assert "sampler_cfg_function" in result.model_options and "sampler_cfg_function" not in model.model_options


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="latest must be a whole number of at least 2"):
        patched(until=node.MINIMUM, latest_step=1)
    function = patched().model_options["sampler_cfg_function"]
    with pytest.raises(ValueError, match="does not tell a model the sampler's sigmas"):
        function({"input": torch.zeros(BATCH, 12), "model_options": {"transformer_options": {}}})


def test_the_example_workflow_holds_together():
    """Every link joins an output and an input of its type, and the node's widgets are those that it has."""
    (path,) = (FOLDER / "example_workflows").glob("*.json")
    flow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {one["id"]: one for one in flow["nodes"]}
    for number, source, output, target, slot, kind in flow["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in out["links"] and into["link"] == number and kind == out["type"] == into["type"]
    assert all(slot["link"] is not None for one in nodes.values() for slot in one["inputs"])
    (ours,) = (one for one in nodes.values() if one["type"] == node.ID)
    widgets = dict(zip(node.WIDGETS, ours["widgets_values"], strict=True))
    assert widgets == DEFAULTS
    node.patched(comfy.Patcher(network, comfy.EPS()), **widgets)
