"""`BasinEscapeGuidance` in real modular pipelines: against diffusers' own guider and against our sampler."""

import json

import numpy as np
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler, escape
from basinescape.hosts.modular import BasinEscapeGuidance
from basinescape.schedulers.schedule import make_scheduler
from components import PIPELINES, build, call, prompts
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3T2ICoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep

STEPS, SCALE = 5, 4.0
BLOCKS = {"StableDiffusion3Pipeline": StableDiffusion3T2ICoreDenoiseStep, "WanPipeline": WanCoreDenoiseStep}
SHAPES = {"StableDiffusion3Pipeline": (2, 4, 4, 4), "WanPipeline": (2, 4, 2, 4, 4)}
WORDS, SEEDS = ["a picture of a cat signed by arno", "a picture of a frog"], [3, 1]


@pytest.fixture(scope="module", params=BLOCKS)
def denoised(request):
    """A function that runs the denoising part of a modular pipeline under a guider: (guider) -> latents."""
    name = request.param
    stock, pipe = build(name), BLOCKS[name]().init_pipeline()
    pipe.update_components(transformer=stock.transformer, scheduler=stock.scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0))

    def run(guider, rows=slice(None)):
        pipe.update_components(guider=guider)
        given = {part: value[rows] for part, value in prompts(name).items()}
        return pipe(**given, **PIPELINES[name].call, latents=noise[rows], num_inference_steps=STEPS, output="latents")

    run.pipe, run.name, run.noise = pipe, name, noise
    return run


def test_plain_cfg_is_the_stock_guiders(denoised):
    guider = BasinEscapeGuidance(Guidance.cfg(SCALE))
    assert torch.equal(denoised(guider), denoised(ClassifierFreeGuidance(guidance_scale=SCALE)))
    assert guider.run.calls == STEPS and guider.run.transition_step.tolist() == [0, 0]
    assert guider.run.noise_gap.isfinite().all()
    off = BasinEscapeGuidance(Guidance.cfg(SCALE), enabled=False)
    assert torch.equal(denoised(off), denoised(ClassifierFreeGuidance(guidance_scale=SCALE, enabled=False)))


@pytest.mark.parametrize("guidance", [Guidance.cfg(SCALE), Guidance.delayed(SCALE, until=At(900))], ids=repr)
def test_it_judges_as_the_stock_pipeline(denoised, guidance):
    """With the prompts of the last run, though its first steps asked for one prediction alone."""
    guider = BasinEscapeGuidance(guidance)
    latents = denoised(guider)
    found = guider.judge(latents, denoised.pipe.scheduler, [0, 1])
    assert found.score.isfinite().all()
    stock = build(denoised.name, transformer=denoised.pipe.transformer, scheduler=denoised.pipe.scheduler)
    given, generators = prompts(denoised.name), [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"num_inference_steps": STEPS, "generator": generators, "output_type": "latent", **PIPELINES[denoised.name].call}
    with escape(stock, guidance) as run:
        stock(**given, **options, latents=denoised.noise.clone())
        whole = 4e-3 if denoised.name == "WanPipeline" else 1e-6  # which is told whole timesteps by its stock pipeline alone
        assert torch.allclose(run.judge().score, found.score, atol=whole)
    alone = BasinEscapeGuidance(guidance)
    one = denoised(alone, slice(1, 2))
    assert torch.allclose(alone.judge(one, denoised.pipe.scheduler, 1).score, found.score[1:], atol=1e-4)
    with pytest.raises(ValueError, match="give them as it takes them"):
        guider.judge(latents[..., :1], denoised.pipe.scheduler, [0, 1])


def test_pictures_of_a_run_without_both_predictions_are_not_judged(denoised):
    guider = BasinEscapeGuidance(Guidance.cfg(0.0))
    latents = denoised(guider)
    with pytest.raises(ValueError, match="never asked for pred_cond"):
        guider.judge(latents, denoised.pipe.scheduler)


def test_samples_of_a_batch_go_their_own_ways(denoised):
    guidance = [Guidance.delayed(SCALE, until=At(900)), Guidance.opposite(1.0, scale=3.0, until=FirstMinimum(latest=3))]
    together = BasinEscapeGuidance(guidance)
    found = denoised(together)
    assert len(set(together.run.transition_step.tolist())) == 2
    for i, one in enumerate(guidance):
        alone = BasinEscapeGuidance(one)
        expected = denoised(alone, slice(i, i + 1))
        assert torch.allclose(found[i], expected[0], rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        assert alone.run.transition_step[0] == together.run.transition_step[i]


def test_a_prediction_that_nobody_needs_is_not_made(denoised):
    """And the next run has both again, though this one ends with the conditional prediction alone, or in an error."""
    calls, plain = [], denoised(BasinEscapeGuidance(Guidance.cfg(SCALE)))
    handle = denoised.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    guider = BasinEscapeGuidance(Guidance.delayed(1.0, until=At(900)))
    denoised(guider)
    assert len(calls) == STEPS and guider.num_conditions == 2 and guider.run.noise_gap.isnan().all()
    handle.remove()
    network = denoised.pipe.transformer
    failing, hooks = network.register_forward_pre_hook(lambda *_: 1 / 0), set(network._forward_hooks)
    with pytest.raises(ZeroDivisionError):
        denoised(guider)
    failing.remove()
    assert guider.num_conditions == 2
    assert torch.equal(denoised(BasinEscapeGuidance(Guidance.cfg(SCALE))), plain)
    assert set(network._forward_hooks) == hooks


@pytest.fixture(scope="module")
def xl(random_pipeline):
    """A whole modular pipeline, from words to pictures, and the stock one of the same parts."""
    stock = random_pipeline("sdxl", 8, "epsilon")
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    pipe.update_components(**{part: getattr(stock, part) for part in parts}, force_zeros_for_empty_prompt=True)
    pipe.set_progress_bar_config(disable=True)

    def run(guider):
        pipe.update_components(guider=guider)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        size = stock.unet.config.sample_size * stock.vae_scale_factor
        options = {"height": size, "width": size, "num_inference_steps": STEPS, "generator": generators, "output_type": "np"}
        return pipe(prompt=WORDS, **options, output="images")

    run.pipe, run.stock = pipe, stock
    return run


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance.delayed(1.0, until=At(500)),
        Guidance.opposite(2.0, scale=SCALE, until=At(650)),
        Guidance.delayed(SCALE, until=FirstMinimum(), before=1.0),
        Guidance.cfg(SCALE, rule="rescale"),
    ],
    ids=repr,
)
def test_it_gives_the_samplers_images(xl, guidance):
    out = Sampler.from_pipeline(xl.stock)(WORDS, SEEDS, STEPS, guidance, output="np", progress=False)
    guider = BasinEscapeGuidance(guidance)
    for _ in range(2):  # the second run encodes its prompts after the first one's last step
        images = xl(guider)
        assert np.abs(images - out.images).max() <= 1 / 255
        assert torch.equal(guider.run.transition_step, out.transition_step)
        known = out.noise_gap.isfinite()
        assert torch.equal(known, guider.run.noise_gap.isfinite())
        assert torch.allclose(guider.run.noise_gap[known], out.noise_gap[known], rtol=1e-3)


def test_it_is_saved_and_loaded(tmp_path):
    for guidance in (Guidance.opposite(2.0, scale=7.5, until=FirstMinimum(drop=0.1)), [Guidance.cfg(1.0), Guidance.cfg(2.0)]):
        BasinEscapeGuidance(guidance).save_pretrained(tmp_path)
        json.loads((tmp_path / "guider_config.json").read_text())
        loaded = BasinEscapeGuidance.from_pretrained(tmp_path)
        assert loaded.guidance == (guidance if isinstance(guidance, list) else [guidance])
        assert BasinEscapeGuidance(guidance).new().guidance == loaded.guidance
        assert "BasinEscapeGuidance" in repr(loaded)


def test_a_transition_that_never_comes_is_said(denoised, caplog):
    for guidance, line in (
        (Guidance.delayed(SCALE, until=FirstMinimum(drop=0.99)), "2 of 2 samples had no transition in 5 steps"),
        (Guidance.delayed(SCALE, until=At(1000)), "is plain guidance here"),
        (Guidance.cfg(SCALE), None),
    ):
        caplog.clear()
        denoised(BasinEscapeGuidance(guidance))
        told = [record.getMessage() for record in caplog.records if record.name.startswith("basinescape")]
        assert len(told) == (line is not None) and all(line in one for one in told)


@pytest.fixture(scope="module")
def two_guiders():
    """Wan 2.2: one transformer and guider for the earlier steps, and one of each for the later ones."""
    stock, later = build("WanPipeline"), build("WanPipeline")
    for parameter in later.transformer.parameters():
        parameter.data.mul_(0.8)
    pipe = Wan22CoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=stock.transformer, transformer_2=later.transformer, scheduler=stock.scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(SHAPES["WanPipeline"], generator=torch.Generator().manual_seed(0))

    def run(**guiders):
        pipe.update_components(**guiders)
        given = prompts("WanPipeline") | PIPELINES["WanPipeline"].call | {"latents": noise, "num_inference_steps": STEPS}
        return pipe(**given, output="latents")

    return run


def test_a_pipeline_with_two_guiders_takes_one_as_both(two_guiders, caplog):
    """One for the earlier steps alone is said when the next run begins; one for the later steps alone is refused."""
    stock = ClassifierFreeGuidance(guidance_scale=SCALE)
    expected = two_guiders(guider=stock, guider_2=ClassifierFreeGuidance(guidance_scale=SCALE))
    guider = BasinEscapeGuidance(Guidance.cfg(SCALE))
    assert torch.equal(two_guiders(guider=guider, guider_2=guider), expected)
    assert guider.run.calls == STEPS and "steps with this guider" not in caplog.text
    later = BasinEscapeGuidance(Guidance.delayed(SCALE, until=At(680)))  # which asks the second network alone for both
    two_guiders(guider=later, guider_2=later)
    scores = [one.judge(expected, build("WanPipeline").scheduler, [0, 1]).score for one in (guider, later)]
    assert scores[0].isfinite().all() and torch.allclose(*scores, rtol=1e-3, atol=1e-6)
    alone = BasinEscapeGuidance(Guidance.cfg(SCALE))
    for _ in range(2):
        assert torch.equal(two_guiders(guider=alone, guider_2=stock), expected) and 0 < alone.run.calls < STEPS
    assert caplog.text.count(f"the last run took {alone.run.calls} of its {STEPS} steps with this guider") == 1
    with pytest.raises(ValueError, match="give it the same object as both"):
        two_guiders(guider=stock, guider_2=BasinEscapeGuidance(Guidance.cfg(SCALE)))


def test_what_it_cannot_follow_is_refused(xl):
    for given in (7.5, None):
        with pytest.raises(ValueError, match="guidance must be a Guidance"):
            BasinEscapeGuidance(given)
    guard = Guidance.guard(4.0)
    with pytest.raises(ValueError, match="use Sampler"):
        BasinEscapeGuidance(guard)
    with pytest.raises(ValueError, match=r"use At\(timestep=...\)"):
        BasinEscapeGuidance(Guidance.delayed(4.0, until=At(log_snr=-2.0)))
    scheduler = xl.pipe.scheduler
    xl.pipe.update_components(scheduler=make_scheduler("heun", scheduler))
    with pytest.raises(ValueError, match="more than once a step, which a guider cannot see: use Sampler"):
        xl(BasinEscapeGuidance(Guidance.cfg(SCALE)))
    xl.pipe.update_components(scheduler=scheduler)
    guider = BasinEscapeGuidance(Guidance.delayed(SCALE, until=At(500)))
    with pytest.raises(ValueError, match=r"timesteps in 0\.\.1000, and the scheduler's begin at 1\.1"):
        guider.set_state(0, STEPS, torch.tensor(1.1))


@pytest.mark.parametrize(
    "guidance",
    [Guidance.cfg(SCALE), Guidance.delayed(SCALE, until=At(900)), Guidance.opposite(1.0, scale=3.0, until=At(900))],
    ids=repr,
)
def test_a_pipeline_that_needs_the_conditional_norm_has_it(guidance):
    """Qwen-Image renormalises what it has guided, by the conditional prediction: also in steps that ask for none."""
    name = "QwenImagePipeline"
    stock, pipe, guider = build(name), QwenImageCoreDenoiseStep().init_pipeline(), BasinEscapeGuidance(guidance)
    pipe.update_components(transformer=stock.transformer, scheduler=stock.scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"num_inference_steps": STEPS, "generator": generators, **PIPELINES[name].call}
    made = pipe(**prompts(name), **options, output="latents")
    latents = stock._pack_latents(made[:, :, 0], len(made), *made.shape[1:2], *made.shape[3:])
    with escape(stock, guidance) as run:
        expected = call(name, stock, steps=STEPS)
    assert torch.allclose(latents, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    found = guider.judge(latents, pipe.scheduler, [0, 1])
    assert torch.allclose(found.score, run.judge().score, rtol=1e-2, atol=1e-6)
