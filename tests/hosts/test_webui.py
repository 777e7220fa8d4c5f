"""The webuis' script on stand-ins of AUTOMATIC1111 and Forge, and on Forge's own CFG code, under k-diffusion's samplers."""

import io
import re
from pathlib import Path

import oracle
import own_code
import pytest
import torch
import webui
from basinescape import At, FirstMinimum, Guidance
from basinescape.data.prompt_in_file import prompt_in
from basinescape.hosts import webui as extension
from basinescape.hosts.guidance_widgets import MINIMUM, TIMESTEP, WIDGETS
from basinescape.hosts.kdiffusion import EscapeDenoiser
from basinescape.hosts.webui.guided import NAME, guide
from comfy_runs import CFG, DEFAULTS, SIGMAS, STEPS, given, network
from hosts_tested import FORGE
from kd_package import package
from PIL import Image, PngImagePlugin
from rounding import close

SCRIPT = Path(extension.__file__).parent / "scripts" / "basin_escape.py"
STEP = f"{NAME} full guidance from step"


@pytest.fixture(scope="module")
def kd():
    return package()


@pytest.fixture(params=["a1111", "forge", "forge's own"], ids=["AUTOMATIC1111 stand-in", "Forge stand-in", str(FORGE)])
def kind(request):
    return request.param


def sampled(kind, kd, name="euler", sliders=None, cfg=CFG, parts=(1.0,), change=None, skipped=0, job=None, net=network):
    """(latents, the job) of a sampling; parts: the weights of a prompt's parts, of which each is a share."""
    x, uncond, cond = given()
    p = job or webui.job(kind, kd, net, f"sample_{name}", SIGMAS, cfg)
    if change:
        change(p)
    if sliders is not None:
        guide(p, **DEFAULTS | sliders)
    torch.manual_seed(0)
    prompts = [(cond / (k + 1), weight) for k, weight in enumerate(parts)]
    return p.sampler.sample(p, x, prompts, uncond, skipped), p


@pytest.mark.parametrize("parts", [(1.0,), (0.7, 0.6)], ids=["a prompt", "parts by AND"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_constant_guidance_is_the_webuis_own(kind, kd, name, parts):
    # At 1 Forge leaves the negative prompt out, and then weighs a prompt's parts against nothing.
    for cfg in (CFG, 1.0) if len(parts) == 1 else (CFG,):
        stock, _ = sampled(kind, kd, name, cfg=cfg, parts=parts)
        found, p = sampled(kind, kd, name, {"timestep": 1000.0}, cfg=cfg, parts=parts)
        assert close(found, stock) and p.extra_generation_params[STEP] == [0, 0]


@pytest.mark.parametrize(
    ("sliders", "guidance"),
    [
        ({"timestep": 600.0}, Guidance.delayed(CFG, until=At(600))),
        ({"timestep": 800.0, "before": -2.0}, Guidance.opposite(2.0, scale=CFG, until=At(800))),
        (
            {"until": MINIMUM, "latest": 5 / STEPS, "before": -1.0, "rule": "rescale"},
            Guidance.opposite(1.0, scale=CFG, until=FirstMinimum(latest=5), rule="rescale"),
        ),
    ],
    ids=["delayed", "opposite", "minimum"],
)
def test_it_is_what_the_definition_says(kind, kd, sliders, guidance):
    """Under Euler's method, sample by sample."""
    found, p = sampled(kind, kd, "euler", sliders)
    x, uncond, cond = (one.double() for one in given())
    levels = webui.Predictor()
    timesteps = [float(levels.timestep(sigma[None])) for sigma in SIGMAS[:-1]]

    def predict(x, k, i):
        scaled, t = x / (SIGMAS[k].double() ** 2 + 1).sqrt(), torch.tensor([timesteps[k]])
        return network(scaled, t, uncond[i : i + 1]), network(scaled, t, cond[i : i + 1])

    def step(x, guided, k):
        return x + (SIGMAS[k + 1] - SIGMAS[k]).double() * guided

    latents, transitions, _ = oracle.samples(predict, step, SIGMAS[0] * x, timesteps, [guidance] * len(x))
    assert p.extra_generation_params[STEP] == transitions.tolist()
    assert close(found.double(), latents)


@pytest.mark.parametrize("name", ["heun", "dpm_2", "dpmpp_2s_ancestral", "lms"])
def test_other_samplers_are_followed_as_elsewhere(kind, kd, name):
    guidance = Guidance.delayed(CFG, until=FirstMinimum(latest=5), before=-1.0)
    found, p = sampled(kind, kd, name, {"until": MINIMUM, "latest": 5 / STEPS, "before": -1.0})
    order = 1 if name == "lms" else 2
    wrapped = webui.job("a1111", kd, network, "sample_euler", SIGMAS).sampler.model_wrap_cfg.inner_model
    denoiser = EscapeDenoiser(wrapped, guidance, order=order)
    x, uncond, cond = given()
    torch.manual_seed(0)
    extra = {"cond": cond, "uncond": uncond}
    expected = getattr(kd[0], f"sample_{name}")(denoiser, SIGMAS[0] * x, SIGMAS, extra_args=extra, disable=True)
    assert close(found, expected) and p.extra_generation_params[STEP] == denoiser.transition_step.tolist()


def test_a_second_pass_and_the_next_batch_begin_anew(kind, kd):
    first, p = sampled(kind, kd, sliders={"until": MINIMUM})
    again, _ = sampled(kind, kd, sliders={"until": MINIMUM}, skipped=6)  # begins past its transition
    stock, _ = sampled(kind, kd, skipped=6)
    assert close(again, stock)

    def hires(p):
        p.is_hr_pass = True
        p.extra_generation_params[STEP] = [7, 7]

    _, later = sampled(kind, kd, sliders={"until": MINIMUM}, skipped=6, change=hires)
    assert later.extra_generation_params[STEP] == [7, 7]
    assert later.extra_generation_params[f"{NAME} hires full guidance from step"] == [0, 0]
    two = webui.job(kind, kd, network, "sample_euler", SIGMAS, batches=2)
    sampled(kind, kd, sliders={"until": MINIMUM}, job=two)
    assert two.extra_generation_params[STEP][2:] == [None, None]
    two.iteration, two.sampler = 1, webui.job(kind, kd, network, "sample_euler", SIGMAS).sampler
    two.sampler.model_wrap_cfg.__dict__["p"] = two
    assert torch.equal(sampled(kind, kd, sliders={"until": MINIMUM}, job=two)[0], first)
    assert two.extra_generation_params[STEP] == p.extra_generation_params[STEP] * 2


def test_a_cancelled_sampling_leaves_nothing_behind(kind, kd):
    class Cancelled(Exception):
        pass

    calls = []

    def stops(x, t, prompt):
        calls.append(prompt)
        if len(calls) == 5:
            raise Cancelled
        return network(x, t, prompt)

    with pytest.raises(Cancelled):
        sampled(kind, kd, sliders={"until": MINIMUM}, net=stops)
    assert torch.equal(sampled(kind, kd)[0], sampled(kind, kd)[0])
    first, _ = sampled(kind, kd, sliders={"until": MINIMUM})
    assert torch.equal(sampled(kind, kd, sliders={"until": MINIMUM})[0], first)


def changed(name, value):
    return lambda p: setattr(p, name, value)


@pytest.mark.parametrize(
    ("name", "sliders", "change", "told"),
    [
        ("euler", {"timestep": 1001.0}, None, "timestep must be at most 1000"),
        ("euler", {"until": MINIMUM, "latest": 2.0}, None, "latest must be a number from 0 to 1"),
        ("euler", {"until": "minimum"}, None, "until must be one of timestep, first minimum of the noise gap"),
        ("dpm_adaptive", {}, None, "chooses its noise levels by itself"),
        ("euler", {}, changed("s_min_uncond", 0.5), "negative guidance minimum sigma"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_work(kind, kd, name, sliders, change, told):
    """By the denoiser: a webui goes on without a script that fails."""
    calls = []
    with pytest.raises(ValueError, match=told):
        sampled(kind, kd, name, sliders, change=change, net=lambda *given: calls.append(given))
    assert not calls


def test_samplers_by_timesteps_are_refused(kind, kd):
    p = webui.job(kind, kd, network, "sample_euler", SIGMAS)
    own, p.sampler = p.sampler, type("TimestepSampler", (), {"model_wrap_cfg": p.sampler.model_wrap_cfg})()
    guide(p, **DEFAULTS)
    with pytest.raises(ValueError, match="DDIM, PLMS and UniPC"):
        own.sample(p, *given()[:1], [(given()[2], 1.0)], given()[1])


def test_a_denoiser_that_automatic1111_has_for_other_models_is_refused_before_work(kd):
    p = webui.job("a1111", kd, lambda *given: pytest.fail("work was done"), "sample_euler", SIGMAS)
    own = p.sampler.model_wrap_cfg.inner_model
    p.sampler.model_wrap_cfg.__dict__["inner_model"] = type("SD3Denoiser", (), {"__call__": lambda self, *given: own(*given)})()
    with pytest.raises(ValueError, match="SD3Denoiser is not a denoiser of Stable Diffusion 1, 2 or XL: use Forge"):
        sampled("a1111", kd, sliders={}, job=p)


def test_other_extensions_may_clone_the_model_but_not_combine(kd):
    """Of Forge: an extension that comes later, or before, and its refiner. And three predictions of AUTOMATIC1111."""
    expected, _ = sampled("forge", kd, sliders={"until": MINIMUM})
    p = webui.job("forge", kd, network, "sample_euler", SIGMAS)
    guide(p, **DEFAULTS | {"until": MINIMUM})
    p.sd_model.forge_objects.unet = p.sd_model.forge_objects.unet.clone()
    assert torch.equal(sampled("forge", kd, job=p)[0], expected)
    p.sd_model.forge_objects.unet.set_model_sampler_cfg_function(lambda args: args["input"])
    with pytest.raises(ValueError, match="another extension combines"):
        sampled("forge", kd, job=p)
    calls = []
    before = webui.job("forge", kd, lambda *given: calls.append(given), "sample_euler", SIGMAS)
    before.sd_model.forge_objects.unet.set_model_sampler_cfg_function(lambda args: args["input"])
    with pytest.raises(ValueError, match="another extension combines"):
        sampled("forge", kd, sliders={}, job=before)
    before.sd_model.forge_objects.unet.model_options, before.refiner_checkpoint_info = {}, object()
    with pytest.raises(ValueError, match="refiner is another model"):
        sampled("forge", kd, sliders={}, job=before)
    assert not calls
    edits = webui.job("a1111", kd, network, "sample_euler", SIGMAS)
    edits.sd_model.cond_stage_key, edits.image_cfg_scale = "edit", 1.5
    with pytest.raises(ValueError, match="three predictions"):
        sampled("a1111", kd, sliders={}, job=edits)


def test_the_script_has_its_sliders_and_reads_its_settings_back(monkeypatch, kd):
    made, options = webui.script(monkeypatch, SCRIPT)
    script = made.BasinEscape()
    components = script.ui(False)
    assert [one.label for one in components] == ["Enable", *WIDGETS] and script.show(False) and script.title() == NAME
    p = webui.job("forge", kd, network, "sample_euler", SIGMAS)
    forward = p.sampler.model_wrap_cfg.forward
    script.process_before_every_sampling(p, False, *DEFAULTS.values())
    assert p.sampler.model_wrap_cfg.forward == forward and not p.extra_generation_params
    script.process_before_every_sampling(p, True, *DEFAULTS.values(), x=None)
    shown = {name: p.extra_generation_params[f"{NAME} {name}"] for name in WIDGETS}
    assert shown == DEFAULTS
    enabled, *fields = script.infotext_fields
    assert enabled[1](p.extra_generation_params) and not enabled[1]({})
    assert [name for _, name in fields] == script.paste_field_names == [f"{NAME} {name}" for name in WIDGETS]
    options.skip_early_cond = 0.1
    script.process_before_every_sampling(p, True, *DEFAULTS.values())
    with pytest.raises(ValueError, match="early sampling"):
        sampled("forge", kd, job=p)


def infotext(p, prompt):
    """What a webui writes beside a picture: as its own code writes it, where it is at hand."""
    settings = {"Steps": 20, "Sampler": "Euler", "CFG scale": CFG} | p.extra_generation_params
    values = {name: value[0] if isinstance(value, list) else value for name, value in settings.items()}
    path = own_code.find(webui.FORGE, "modules/infotext_utils.py")
    utils = own_code.parts(path, ["quote"], {"json": __import__("json")})
    pattern = re.search(r"re_param_code = r'(.*)'", path.read_text(encoding="utf-8")).group(1)
    line = ", ".join(f"{name}: {utils.quote(value)}" for name, value in values.items() if value is not None)
    return f"{prompt}\nNegative prompt: blurry\n{line}", dict(re.findall(pattern, line))


def test_judge_reads_the_prompt_of_such_a_picture(kd):
    _, p = sampled("forge", kd, sliders={"until": TIMESTEP})
    text, read = infotext(p, "a cat, on a roof: at night")
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(file, "png", pnginfo=info)
    assert prompt_in(file.getvalue(), "nothing")[0] == "a cat, on a roof: at night"
    assert {name: read[f"{NAME} {name}"] for name in WIDGETS} == {name: str(value) for name, value in DEFAULTS.items()}
    assert int(read[STEP]) == p.extra_generation_params[STEP][0]
