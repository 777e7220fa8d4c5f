"""The ComfyUI node on a stand-in of ComfyUI's contract, under k-diffusion's samplers, which ComfyUI has copies of."""

import json
import logging
import tomllib
from pathlib import Path

import comfy
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, __version__
from basinescape.hosts import comfyui
from basinescape.hosts.comfyui import judge, node
from basinescape.hosts.comfyui.described import CATEGORY
from basinescape.hosts.guidance_widgets import FALLEN, MINIMUM, TIMESTEP, WIDGETS
from basinescape.hosts.kdiffusion import EscapeDenoiser
from comfy_runs import BATCH, CFG, DEFAULTS, SIGMAS, STEPS, function_of, given, network, patched, sampled, state_of, visits
from kd_package import package

FOLDER = Path(comfyui.__file__).parent
FLOW = torch.linspace(1.0, 0.0, STEPS + 1)
ORDERS = {"euler": 1, "dpmpp_2m": 1, "lms": 1, "heun": 2, "dpm_2": 2, "dpmpp_2s_ancestral": 2}


def warned(caplog):
    """What was warned of: other tests may have had the log say more."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def kd():
    return package()


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
            {"until": MINIMUM, "latest": 5 / STEPS, "before": -1.0, "rule": "rescale"},
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
    run = state_of(patcher)
    assert torch.equal(run.transition_step, denoiser.transition_step)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    known = denoiser.noise_gap.isfinite() & run.noise_gap.isfinite()
    assert known[:, run.transition_step.max() :].all()
    assert torch.allclose(run.noise_gap[known], denoiser.noise_gap[known], rtol=1e-3)


def test_a_run_begins_anew_and_samples_go_their_own_ways(kd):
    patcher = patched(until=MINIMUM)
    first = sampled(kd, "heun", patcher)
    together = state_of(patcher).transition_step
    assert torch.equal(sampled(kd, "heun", patcher), first)
    for i in range(BATCH):
        alone = sampled(kd, "heun", patcher, rows=slice(i, i + 1))
        assert torch.allclose(alone[0], first[i], rtol=1e-4, atol=1e-4)
        assert state_of(patcher).transition_step[0] == together[i]
    later = sampled(kd, "euler", patcher, SIGMAS[3:])  # part of a schedule: its steps count from its own first
    assert state_of(patcher).noise_gap.shape == (BATCH, STEPS - 3) and later.isfinite().all()


@pytest.mark.parametrize("clones", [0, 1, 2])
def test_the_clone_of_a_guided_model_is_guided(kd, clones):
    patcher = patched(timestep=600.0)
    expected = sampled(kd, "euler", patcher)
    for _ in range(clones):
        patcher = patcher.clone()  # as a node behind it does
    assert torch.equal(sampled(kd, "euler", patcher), expected)


def test_a_guider_without_a_negative_is_refused_before_any_work():
    """BasicGuider: ComfyUI would hand over 0 for the unconditional prediction."""
    called = []
    patcher = node.patched(comfy.Patcher(lambda *given: called.append(given), comfy.EPS()), **DEFAULTS)
    x, _, cond = given()
    with pytest.raises(ValueError, match="needs a negative conditioning, which may be empty"):
        comfy.CFGGuider(patcher, 1.0, positive=cond).sample(visits([0]), x, SIGMAS)
    assert not called
    patcher.model_options["sampler_calc_cond_batch_function"] = lambda args: [args["input"]] * 2  # another node's
    with pytest.raises(ValueError, match="needs a negative conditioning"):
        comfy.CFGGuider(patcher, 1.0, positive=cond).sample(visits([0]), x, SIGMAS)


@pytest.mark.parametrize(
    ("guider", "names", "told"),
    [
        (comfy.CFGGuider, (), None),
        (comfy.PerpNegGuider, ("empty_negative_prompt",), "PerpNegGuider did not call it, and nothing was guided by it"),
        (comfy.DualCFGGuider, ("middle",), "DualCFGGuider combines middle by itself"),
    ],
)
def test_a_guider_that_combines_predictions_by_itself_is_named(caplog, guider, names, told):
    x, uncond, cond = given()
    more = dict.fromkeys(names, 0.5 * cond)
    guider(patched(), CFG, positive=cond, negative=uncond, **more).sample(visits(range(STEPS)), SIGMAS[0] * x, SIGMAS)
    warnings = warned(caplog)
    assert (not warnings) if told is None else any(told in warning for warning in warnings)


def test_another_cfg_function_is_told_of(kd, caplog):
    def theirs(args):
        return args["cond"]

    before = comfy.Patcher(network, comfy.EPS())
    before.set_model_sampler_cfg_function(theirs)
    patcher = node.patched(before, **DEFAULTS)
    assert "a node before it has set a CFG function, which it replaces" in caplog.text
    alone = sampled(kd, "euler", patched())
    caplog.clear()
    assert torch.equal(sampled(kd, "euler", patcher), alone) and not warned(caplog)
    after = patched().clone()
    after.set_model_sampler_cfg_function(theirs)
    stock = sampled(kd, "euler", before)
    caplog.clear()
    assert torch.equal(sampled(kd, "euler", after), stock)  # theirs alone, with both predictions
    assert "a node after it has set a CFG function of its own" in caplog.text and "nothing was guided by it" in caplog.text
    caplog.clear()
    twice = node.patched(patched(timestep=0.0), **DEFAULTS)
    assert "which it replaces" in caplog.text
    caplog.clear()
    assert torch.equal(sampled(kd, "euler", twice), alone) and not warned(caplog)
    assert twice.model_options["sampler_calc_cond_batch_function"].__self__ is function_of(twice)


@pytest.mark.parametrize(
    ("widgets", "cfg", "watched", "left_out"),
    [
        ({}, CFG, False, True),
        ({"before": -1.0}, CFG, False, False),
        ({"until": MINIMUM}, CFG, False, False),
        ({}, 0.0, False, False),
        ({}, CFG, True, False),  # another node's function is given both predictions
    ],
)
def test_the_conditional_prediction_is_made_where_it_has_a_weight(kd, widgets, cfg, watched, left_out):
    prompts = []

    def counted(x, t, prompt):
        prompts.append(prompt)
        return network(x, t, prompt)

    patcher = node.patched(comfy.Patcher(counted, comfy.EPS()), **DEFAULTS | widgets)
    if watched:
        patcher.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    found = sampled(kd, "euler", patcher, cfg=cfg)
    _, uncond, cond = given()
    assert sum(torch.equal(prompt, uncond) for prompt in prompts) == STEPS
    transition = int(state_of(patcher).transition_step[0])
    assert sum(torch.equal(prompt, cond) for prompt in prompts) == STEPS - transition * left_out
    patcher.model_options["sampler_calc_cond_batch_function"] = lambda args: comfy.calc_cond_batch(*args_of(args))
    assert torch.equal(sampled(kd, "euler", patcher, cfg=cfg), found)


def args_of(args):
    return [args[name] for name in ("model", "conds", "input", "sigma", "model_options")]


def test_the_log_tells_what_became_of_each_sample(kd, caplog):
    caplog.set_level(logging.INFO)
    patcher = patched(until=MINIMUM)
    sampled(kd, "euler", patcher)
    lines = [record.getMessage() for record in caplog.records]
    for i, (line, step, gaps) in enumerate(
        zip(lines, state_of(patcher).transition_step, state_of(patcher).noise_gap, strict=True)
    ):
        assert f"sample {i + 1} of {BATCH}, {STEPS} steps" in line and f"full guidance from step {step} " in line
        assert all(f" {k}:{gap:.4g}" in line for k, gap in enumerate(gaps.tolist()))
    caplog.clear()
    sampled(kd, "euler", patched(timestep=0.0))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * BATCH and "no full guidance" in caplog.text
    caplog.clear()
    sampled(kd, "euler", patched(timestep=0.0), SIGMAS[:3])  # the image is another run's
    assert [record.levelname for record in caplog.records] == ["INFO"] * BATCH


@pytest.mark.parametrize("schema", [True, False], ids=["V3", "V1"])
def test_the_folder_can_be_put_into_custom_nodes(monkeypatch, schema):
    nodes = comfy.load(FOLDER, "custom_nodes_x_basinescape", monkeypatch, schema)
    assert list(nodes) == [node.ID, judge.NODE.id]
    made = nodes[node.ID]
    model = comfy.Patcher(network, comfy.EPS())
    if schema:
        described = made.define_schema()
        assert [one.id for one in described.inputs] == ["model", *WIDGETS] and described.category == CATEGORY
        assert all(one.tooltip for one in described.inputs[1:])
        (result,) = made.execute(model=model, **DEFAULTS).result
    else:
        required = made.INPUT_TYPES()["required"]
        assert list(required) == ["model", *WIDGETS] and made.RETURN_TYPES == ("MODEL",)
        assert required["until"][0] == [TIMESTEP, MINIMUM, FALLEN] and required["before"][0] == "FLOAT"
        assert all(options["tooltip"] and "default" in options for _, options in list(required.values())[1:])
        (result,) = getattr(made(), made.FUNCTION)(model=model, **DEFAULTS)
    assert "sampler_cfg_function" in result.model_options and "sampler_cfg_function" not in model.model_options


@pytest.mark.parametrize("latest", [-1, 1.5, "0.5"])
def test_widgets_out_of_range_are_refused(latest):
    with pytest.raises(ValueError, match="latest must be a number from 0 to 1"):
        patched(until=MINIMUM, latest=latest)
    with pytest.raises(ValueError, match="timestep must be at most 1000"):
        patched(timestep=1001.0)


def test_what_cannot_be_followed_is_refused(monkeypatch):
    _, uncond, _ = given()
    args = {"input": uncond, "sigma": torch.ones(BATCH), "input_uncond": uncond, "cond_scale": CFG}
    with pytest.raises(ValueError, match="outside the run of a guider"):
        function_of(patched())(args)
    monkeypatch.delattr(comfy.Patcher, "add_wrapper_with_key")
    with pytest.raises(ValueError, match="update it"):
        patched()


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
    widgets = dict(zip(WIDGETS, ours["widgets_values"], strict=True))
    assert widgets == DEFAULTS
    node.patched(comfy.Patcher(network, comfy.EPS()), **widgets)


@pytest.mark.parametrize("sampling", [comfy.EPS, comfy.CONST])
def test_the_second_node_judges_as_the_other_hosts(kd, sampling):
    """And tells what became of each sample's guidance."""
    sigmas, asked = FLOW if sampling is comfy.CONST else SIGMAS, []

    def counted(x, t, prompt):
        asked.append(prompt)
        return network(x, t, prompt)

    patcher = node.patched(comfy.Patcher(counted, sampling()), **DEFAULTS | {"until": MINIMUM})
    latents = sampled(kd, "euler", patcher, sigmas)
    state, (_, uncond, cond) = state_of(patcher), given()
    before, asked[:] = (state.transition_step.tolist(), state.noise_gap.tolist()), []
    latent, scores, suspects, steps, gaps = judge.judged(patcher, {"samples": latents}, cond, uncond, 5, 0.0, 2)
    assert latent["samples"] is latents and len(asked) == 4
    assert (steps, [json.loads(row) for row in gaps]) == before and state_of(patcher) is state

    class Model:
        def __call__(self, x, sigma, cond):
            model = sampling()
            output = network(model.calculate_input(sigma, x), model.timestep(sigma), cond)
            return model.calculate_denoised(sigma, output, x)

    guidance = Guidance.cfg(CFG)
    denoiser = EscapeDenoiser(Model(), guidance, scalings=lambda sigma: (torch.ones_like(sigma), -sigma))
    expected = denoiser.judge(latents, cond, uncond, [5, 6], 0.0, 2, flow=sampling is comfy.CONST)
    assert torch.allclose(torch.tensor(scores), expected.score, rtol=1e-3, atol=1e-5)
    assert suspects == expected.suspect.tolist() == [score > 0 for score in scores]
    assert torch.equal(sampled(kd, "euler", patcher, sigmas), latents)  # the model is as it was
    plain = comfy.Patcher(network, sampling())
    assert judge.judged(plain, {"samples": latents}, cond, uncond, 5, 0.0, 2)[3:] == ([-1] * BATCH, [""] * BATCH)
    with pytest.raises(ValueError, match="probes must be"):
        judge.judged(plain, {"samples": latents}, cond, uncond, 5, 0.0, 0)


def test_latents_with_noise_left_are_not_judged(kd):
    patcher = node.patched(comfy.Patcher(network, comfy.EPS()), **DEFAULTS)
    (x, uncond, cond), middle = given(), len(SIGMAS) // 2
    left = sampled(kd, "euler", patcher, SIGMAS[:middle])
    with pytest.raises(ValueError, match="judge that of the sampler that takes the last steps"):
        judge.judged(patcher, {"samples": left}, cond, uncond, 5, 0.3, 2)
    judge.judged(patcher, {"samples": x}, cond, uncond, 5, 0.3, 2)  # from another sampler
    made = sampled(kd, "euler", patcher, SIGMAS)
    judge.judged(patcher, {"samples": made}, cond, uncond, 5, 0.3, 2)


def test_a_model_whose_sampling_a_node_has_changed_is_judged_by_that():
    (latents, uncond, cond), scores = given(), []
    for own, later in ((comfy.CONST, None), (comfy.EPS, comfy.CONST)):
        patcher = comfy.Patcher(network, own())
        if later is not None:  # as the nodes ModelSampling... do
            patcher.add_object_patch("model_sampling", later())
        scores.append(judge.judged(patcher, {"samples": latents}, cond, uncond, 5, 0.3, 2)[1])
    assert scores[0] == scores[1]


def test_the_registry_finds_what_it_needs():
    made = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert made["project"]["version"] == __version__ and made["project"]["dependencies"] == ["basinescape"]
    assert made["tool"]["comfy"]["DisplayName"]
