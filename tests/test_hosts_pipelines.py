"""`escape` in stock diffusers pipelines: against the pipelines themselves, and against our own sampler."""

import copy

import numpy as np
import pytest
import torch
from basinescape import At, Calibration, FirstMinimum, Guidance, Rung, Sampler, escape
from basinescape.schedulers import make_scheduler
from components import PIPELINES, build, call, prompts
from diffusers import (
    ControlNetModel,
    DDIMPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from rounding import LEEWAY, NEAR
from test_ip_adapter import WIDTH, load_adapter

STEPS = 6
PROMPTS = ["a picture of a cat signed by arno", "a picture of a frog"]
SEEDS = [3, 1]
FOUR = Guidance.cfg(4.0)
METHODS = [
    Guidance.delayed(7.5, until=At(500)),
    Guidance.opposite(2.0, scale=7.5, until=At(650)),
    Guidance.delayed(7.5, until=FirstMinimum(), before=1.0),
    Guidance.opposite(7.5, scale=7.5, until=FirstMinimum(latest=4), rule="rescale"),
]


@pytest.fixture(scope="module")
def doubles():
    """Each pipeline of the matrix, made once."""
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, build(name))


def close(found, expected, own=0.0):
    """Equal but for rounding: of a few operations, or that of the pipeline itself, `own`."""
    return (found - expected).abs().max() <= LEEWAY * max(own, NEAR * expected.abs().max())


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents(pipe, scale=7.5, given=PROMPTS, seeds=SEEDS, **options):
    options = {"num_inference_steps": STEPS, "output_type": "latent"} | options
    return pipe(given, guidance_scale=scale, generator=generators(seeds), **options).images


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_cfg_is_the_pipelines_own(doubles, name):
    """To the bit, but where our formula is not the pipeline's (c + s (c - u) is u + (s + 1) (c - u) rounded otherwise)."""
    pipe = doubles(name)
    stock = call(name, pipe, 4.0)
    assert (stock - call(name, pipe, 2.0)).abs().max() > 1e-3
    with escape(pipe, FOUR) as run:
        found = call(name, pipe, 3.0)
    assert close(found, stock) if PIPELINES[name].shift else torch.equal(found, stock)
    assert run.transition_step.tolist() == [0, 0] and run.calls == 3 and run.noise_gap.isfinite().all()
    assert torch.equal(call(name, pipe, 4.0), stock)


@pytest.mark.parametrize("name", ["SanaPipeline", "LTXPipeline", "CogVideoXPipeline"])
def test_predictions_in_half_are_combined_in_the_pipelines_dtype(name):
    pipe = build(name).to(torch.bfloat16)
    expected = call(name, pipe, 4.0)
    with escape(pipe, FOUR):
        assert torch.equal(call(name, pipe), expected)


@pytest.mark.parametrize("name", PIPELINES)
def test_other_weights_are_the_predictions_they_say(doubles, name):
    """Weight 0 is what the negative prompt alone predicts; u - 2 (c - u) is c + 3 (u - c), the two prompts exchanged."""
    pipe, given = doubles(name), prompts(name)
    negative = {part: given["negative_" + part] for part in PIPELINES[name].prompt}
    positive = {"negative_" + part: given[part] for part in PIPELINES[name].prompt}
    with escape(pipe, Guidance.cfg(0.0)):
        assert torch.equal(call(name, pipe), call(name, pipe, **negative))
    if name == "QwenImagePipeline":  # which renormalises; weights below 1 are as they are
        return
    plain = {"cfg_normalization": False} if name == "Lumina2Pipeline" else {}
    with escape(pipe, Guidance.cfg(-2.0)):
        found = call(name, pipe)
    assert close(found, call(name, pipe, 3.0, **negative, **positive, **plain))


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_of_a_batch_go_their_own_ways(doubles, name):
    pipe = doubles(name)
    guidance = [Guidance.delayed(4.0, until=At(900)), Guidance.opposite(1.0, scale=3.0, until=FirstMinimum(latest=2))]
    batch = call(name, pipe)
    with escape(pipe, guidance) as run:
        together = call(name, pipe)
    transitions = run.transition_step
    assert len(set(transitions.tolist())) == 2
    for i, one in enumerate(guidance):
        rows = slice(i, i + 1)
        own = (call(name, pipe, rows=rows) - batch[rows]).abs().max()
        with escape(pipe, one) as run:
            alone = call(name, pipe, rows=rows)
        assert run.transition_step == transitions[i] and close(together[rows], alone, own)


@pytest.mark.parametrize(
    ("guidance", "scheduler"),
    [*zip(METHODS, ["ddim", "euler", "dpmsolver++", "unipc"], strict=True), (METHODS[2], "heun")],
    ids=repr,
)
def test_stable_diffusion_gives_the_samplers_images(pipe, guidance, scheduler):
    own = StableDiffusionPipeline(**{**pipe.components, "scheduler": make_scheduler(scheduler, pipe.scheduler)})
    own.set_progress_bar_config(disable=True)
    assert_the_samplers(own, guidance)


@pytest.mark.parametrize("guidance", METHODS[1:3], ids=repr)
def test_stable_diffusion_xl_gives_the_samplers_images(random_pipeline, guidance):
    assert_the_samplers(random_pipeline("sdxl", 8, "epsilon"), guidance)


def assert_the_samplers(pipe, guidance):
    out = Sampler.from_pipeline(pipe)(PROMPTS, SEEDS, STEPS, guidance, output="np", progress=False)
    with escape(pipe, guidance) as run:
        images = latents(pipe, output_type="np")
    assert torch.equal(run.transition_step, out.transition_step)
    known = out.noise_gap.isfinite()
    assert torch.allclose(run.noise_gap[known], out.noise_gap[known], rtol=1e-3)
    assert np.abs(images - out.images).max() <= 1 / 255


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "euler-ancestral", "unipc", "ddpm"])
def test_every_kind_of_scheduler_takes_its_own_steps(random_pipeline, scheduler):
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    expected = latents(pipe, 4.0)
    with escape(pipe, FOUR) as run:
        assert torch.equal(latents(pipe), expected)
    assert run.noise_gap.shape == (2, STEPS) and run.noise_gap.isfinite().all()


def test_the_second_call_of_a_step_has_its_weight(random_pipeline):
    """Heun: the steps before the transition are the unconditional ones, both calls of each."""
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = make_scheduler("heun", pipe.scheduler)
    seen = []

    def keep(pipe, i, t, given):
        seen.append(given["latents"].clone())
        return given

    latents(pipe, 4.0, ["", ""], callback_on_step_end=keep)
    plain, seen = seen, []
    levels = pipe.scheduler.timesteps[::2].tolist()
    with escape(pipe, Guidance.delayed(4.0, until=At(levels[2]))) as run:
        latents(pipe, callback_on_step_end=keep)
    assert run.transition_step.tolist() == [2, 2] and run.timesteps == levels
    assert all(close(seen[call], plain[call]) for call in range(4)) and not close(seen[4], plain[4])


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((32, 64), 255, dtype=np.uint8), ((0, 32), (0, 0))))


def img2img(pipe):
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), {
        "image": PICTURE,
        "strength": 0.5,
        "num_inference_steps": 8,
    }


def inpaint(pipe):
    return StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False), {
        "image": PICTURE,
        "mask_image": MASK,
        "height": 64,
        "width": 64,
        "strength": 0.8,
    }


def controlled(pipe):
    torch.manual_seed(1)
    network = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return StableDiffusionControlNetPipeline(**pipe.components, controlnet=network, requires_safety_checker=False), {
        "image": [PICTURE] * 2
    }


def guessing(pipe):
    made, options = controlled(pipe)
    return made, {**options, "guess_mode": True}


def adapted(pipe):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config, "x")
    return pipe, {"cross_attention_kwargs": {"scale": 0.5}}


def with_an_image(pipe):
    load_adapter(pipe.unet)
    embeds = torch.randn((2, 1, WIDTH), generator=torch.Generator().manual_seed(1))
    return pipe, {"ip_adapter_image_embeds": [embeds]}


def compiled(pipe):
    pipe.unet.compile(backend="eager")
    return pipe, {}


def compiled_otherwise(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe, {}


def hooked(pipe):
    """As offload has it: what moves weights and inputs sits in the network's forward."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(pipe.unet, AlignDevicesHook("cpu", offload=True, io_same_device=True))
    return pipe, {}


@pytest.mark.parametrize(
    ("variant", "scheduler"),
    [
        (img2img, "ddim"),
        (img2img, "heun"),
        (inpaint, "euler"),
        (controlled, "ddim"),
        (guessing, "euler"),
        (adapted, "ddim"),
        (with_an_image, "ddim"),
        (compiled, "ddim"),
        (compiled_otherwise, "euler"),
        (hooked, "euler"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_the_pipeline_can_do_it_still_does(random_pipeline, variant, scheduler):
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    pipe, options = variant(pipe)
    pipe.set_progress_bar_config(disable=True)
    expected = latents(pipe, 4.0, **options)
    with escape(pipe, FOUR) as run:
        assert torch.equal(latents(pipe, **options), expected)
    taken = pipe.scheduler.timesteps[-run.calls :: pipe.scheduler.order].tolist()
    assert run.timesteps == taken and run.noise_gap.shape == (2, len(taken)) and run.noise_gap.isfinite().all()
    assert torch.equal(latents(pipe, 4.0, **options), expected)


def test_a_run_may_be_shared_by_two_pipelines(random_pipeline):
    """SDXL and a refiner: each takes its part of the schedule, and its steps count from its own first."""
    base = random_pipeline("sdxl", 8, "epsilon")
    refiner = StableDiffusionXLImg2ImgPipeline(**base.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    noisy = latents(base, 4.0, denoising_end=0.6)
    with escape(base, FOUR) as run:
        assert torch.equal(latents(base, denoising_end=0.6), noisy)
    first = run.timesteps
    expected = latents(refiner, 4.0, denoising_start=0.6, image=noisy)
    with escape(refiner, FOUR) as run:
        assert torch.equal(latents(refiner, denoising_start=0.6, image=noisy), expected)
    assert first + run.timesteps == base.scheduler.timesteps.tolist() and run.calls == len(run.timesteps)


def test_rescaled_guidance_is_the_pipelines(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    expected = latents(pipe, 4.0, guidance_rescale=0.6)
    with escape(pipe, FOUR):
        assert close(latents(pipe, guidance_rescale=0.6), expected)
    with escape(pipe, Guidance.cfg(4.0, rule="apg")), pytest.raises(ValueError, match="the guidance has the rule 'apg'"):
        latents(pipe, guidance_rescale=0.6)


def test_the_norm_is_capped_as_the_pipeline_does(doubles):
    pipe, name = doubles("ZImagePipeline"), "ZImagePipeline"
    expected = call(name, pipe, 4.0, cfg_normalization=0.5)
    with escape(pipe, FOUR):
        found = call(name, pipe, cfg_normalization=0.5)
    assert close(found, expected) and not close(found, call(name, pipe, 4.0))


def test_a_network_for_each_noise_level(doubles):
    """Wan 2.2: another transformer takes the later steps; its scale is the guidance's as well."""
    name, first = "WanPipeline", doubles("WanPipeline")
    second = copy.deepcopy(first.transformer)
    for parameter in second.parameters():
        parameter.data *= 0.9
    pipe = build(name, transformer_2=second, boundary_ratio=0.7)
    assert isinstance(pipe.transformer_2, WanTransformer3DModel)
    expected = call(name, pipe, 4.0)
    assert not close(expected, call(name, first, 4.0))
    with escape(pipe, FOUR) as run:
        assert torch.equal(call(name, pipe), expected) and run.calls == 3
        with pytest.raises(ValueError, match=r"guidance_scale_2 is 3\.0, which escape cannot follow"):
            call(name, pipe, guidance_scale_2=3.0)


def test_a_negative_prompt_is_given_where_guidance_needs_one(doubles):
    name = "FluxPipeline"
    pipe, asked, given = copy.copy(doubles(name)), [], prompts(name)

    def encoded(prompt=None, prompt_embeds=None, pooled_prompt_embeds=None, **named):
        asked.append(prompt)
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"]
        return prompt_embeds, pooled_prompt_embeds, torch.zeros(prompt_embeds.shape[1], 3)

    pipe.encode_prompt = encoded
    expected = call(name, pipe, 4.0)
    with escape(pipe, FOUR):
        found = call(name, pipe, negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    assert torch.equal(found, expected) and asked == [None, None, None, ""]


def test_what_looks_memorized_is_said(pipe):
    pipe.scheduler.set_timesteps(STEPS)
    levels = tuple(pipe.scheduler.timesteps.float().tolist())
    usual = Rung(FOUR, (2.0,) * STEPS, 1, 1.0, 2, 1, 1.2, levels)
    with escape(pipe, FOUR, Calibration({}, STEPS, 4.0, 1, 0.1, 0.1, (usual,))) as run:
        latents(pipe)
    assert torch.equal(run.score, usual.score(run.noise_gap)) and torch.equal(run.suspect, run.score > 1.2)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "SanaPipeline", "QwenImagePipeline", "WanPipeline"])
def test_an_exception_leaves_the_pipeline_as_it_was(doubles, random_pipeline, name):
    sd = name == "StableDiffusionPipeline"
    pipe = random_pipeline("sd", 8, "epsilon") if sd else doubles(name)
    network, take = (pipe.unet, latents) if sd else (pipe.transformer, lambda pipe, **more: call(name, pipe, **more))
    expected = take(pipe)
    before = what_it_is(pipe, network)

    def fail(pipe, i, t, given):
        if i == 1:
            raise RuntimeError("in the middle")
        return given

    with pytest.raises(RuntimeError, match="in the middle"), escape(pipe, FOUR):
        assert isinstance(pipe, type(pipe).__mro__[2]) and type(pipe).__name__ == name
        take(pipe, callback_on_step_end=fail)
    assert what_it_is(pipe, network) == before
    handle = network.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), escape(pipe, FOUR):
        take(pipe)
    handle.remove()
    assert what_it_is(pipe, network) == before
    assert torch.equal(take(pipe), expected)


def what_it_is(pipe, network):
    """All that `escape` touches."""
    hooks = [len(getattr(network, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")]
    return (
        type(pipe),
        set(vars(pipe)),
        hooks,
        network._compiled_call_impl,
        set(vars(pipe.scheduler)),
        pipe.scheduler.step.__func__,
    )


GUARD = Guidance.ladder([Rung(FOUR, (1.0,) * STEPS, 1, 1.0, 1, 0, 1.0)])


def test_what_cannot_be_is_refused_in_a_line(random_pipeline, doubles):
    sd, flux = random_pipeline("sd", 8, "epsilon"), doubles("FluxPipeline")
    refused = {
        "must be a diffusers pipeline, got Linear": lambda: escape(torch.nn.Linear(1, 1), FOUR),
        "not among those whose two predictions are known": lambda: escape(other(sd), FOUR),
        "guidance must be a Guidance": lambda: escape(sd, [7.5]),
        "a guard begins samples again.*use Sampler": lambda: escape(sd, GUARD),
        "restart.*use Sampler": lambda: escape(sd, Guidance.cfg(4.0, restart=(300, 500, 1))),
        "is distilled and makes one prediction": lambda: escape(distilled(sd), FOUR),
    }
    for message, ask in refused.items():
        with pytest.raises(ValueError, match=message) as error:
            ask()
        assert "\n" not in str(error.value)
    with escape(sd, FOUR) as run:
        with pytest.raises(ValueError, match="inside another escape"):
            escape(sd, FOUR)
        with pytest.raises(ValueError, match="noise_gap is known when the pipeline has been called"):
            run.noise_gap  # noqa: B018
        with pytest.raises(AttributeError, match="no attribute 'gap'"):
            run.gap  # noqa: B018
    with escape(sd, [FOUR]), pytest.raises(ValueError, match="guidance has 1 entries for 2 samples"):
        latents(sd)
    handle = flux.transformer.register_forward_pre_hook(copying)
    with escape(flux, FOUR), pytest.raises(ValueError, match="did not step with the guided prediction"):
        call("FluxPipeline", flux)
    handle.remove()
    flux.transformer._forward_hooks.clear()


def copying(network, given):
    """Whoever called the network gets a copy of what `escape` returned."""
    network.register_forward_hook(lambda _, given, output: (output[0].clone(), *output[1:]))


def other(pipe):
    return DDIMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)


def distilled(pipe):
    made = copy.copy(pipe)
    made.unet = copy.deepcopy(pipe.unet)
    made.unet.register_to_config(time_cond_proj_dim=8)
    return made


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("StableDiffusion3Pipeline", "skip_guidance_layers", [0]),
        ("CogVideoXPipeline", "use_dynamic_cfg", True),
        ("ZImagePipeline", "cfg_truncation", 0.5),
        ("Lumina2Pipeline", "cfg_trunc_ratio", 0.5),
        ("Flux2KleinPipeline", "image", PICTURE),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused_before_work(doubles, name, option, value):
    pipe = doubles(name)
    work = pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with escape(pipe, FOUR), pytest.raises(ValueError, match=f"{option} is .* which escape cannot follow"):
        call(name, pipe, **{option: value})
    work.remove()
