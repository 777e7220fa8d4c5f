"""`escape` in Stable Diffusion's and SDXL's pipelines: our sampler's images, every kind of scheduler, all that they can do."""

import numpy as np
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler, escape
from basinescape.schedulers.schedule import make_scheduler
from components import SEEDS, WORDS, stable_diffusion
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
)
from rounding import close
from variants import adapted, controlled, guessing, hooked, img2img, inpaint, inpaint_of_nine, with_an_image

STEPS = 6
FOUR = Guidance.cfg(4.0)
METHODS = [
    Guidance.delayed(7.5, until=At(500)),
    Guidance.opposite(2.0, scale=7.5, until=At(650)),
    Guidance.delayed(7.5, until=FirstMinimum(), before=1.0),
    Guidance.opposite(7.5, scale=7.5, until=FirstMinimum(latest=4), rule="rescale"),
]


@pytest.mark.parametrize(
    ("guidance", "scheduler"),
    [*zip(METHODS, ["ddim", "euler", "dpmsolver++", "unipc"], strict=True), (METHODS[2], "heun")],
    ids=str,
)
def test_stable_diffusion_gives_the_samplers_images(random_pipeline, guidance, scheduler):
    pipe = random_pipeline("sd", 8, "v_prediction")
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    assert_the_samplers(pipe, guidance)


@pytest.mark.parametrize("guidance", METHODS[1:3], ids=repr)
def test_stable_diffusion_xl_gives_the_samplers_images(random_pipeline, guidance):
    assert_the_samplers(random_pipeline("sdxl", 8, "epsilon"), guidance)


def test_the_pipeline_that_ships_gives_the_samplers_images(pipe):
    assert_the_samplers(pipe, METHODS[1])


def assert_the_samplers(pipe, guidance):
    out = Sampler.from_pipeline(pipe)(WORDS, SEEDS, STEPS, guidance, output="np", progress=False)
    with escape(pipe, guidance) as run:
        images = stable_diffusion(pipe, output_type="np")
    assert torch.equal(run.transition_step, out.transition_step)
    known = out.noise_gap.isfinite()
    assert torch.allclose(run.noise_gap[known], out.noise_gap[known], rtol=1e-3)
    assert np.abs(images - out.images).max() <= 1 / 255


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "euler-ancestral"])
def test_every_kind_of_scheduler_takes_its_own_steps(random_pipeline, scheduler):
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    expected = stable_diffusion(pipe, 4.0)
    with escape(pipe, FOUR) as run:
        assert torch.equal(stable_diffusion(pipe), expected)
    assert run.noise_gap.shape == (2, STEPS) and run.noise_gap.isfinite().all()


def test_the_second_call_of_a_step_has_its_weight(random_pipeline):
    """Heun: the steps before the transition are the unconditional ones, both calls of each."""
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = make_scheduler("heun", pipe.scheduler)
    seen = []

    def keep(pipe, i, t, given):
        seen.append(given["latents"].clone())
        return given

    stable_diffusion(pipe, 4.0, ["", ""], callback_on_step_end=keep)
    plain, seen = seen, []
    levels = pipe.scheduler.timesteps[::2].tolist()
    with escape(pipe, Guidance.delayed(4.0, until=At(levels[2]))) as run:
        stable_diffusion(pipe, callback_on_step_end=keep)
    assert run.transition_step.tolist() == [2, 2] and run.timesteps == levels
    assert all(close(seen[call], plain[call]) for call in range(4)) and not close(seen[4], plain[4])


@pytest.mark.parametrize(
    ("variant", "scheduler"),
    [
        (img2img, "ddim"),
        (img2img, "heun"),
        (inpaint, "euler"),
        (inpaint_of_nine, "ddim"),
        (controlled, "ddim"),
        (guessing, "euler"),
        (adapted, "ddim"),
        (with_an_image, "ddim"),
        (hooked, "euler"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_the_pipeline_can_do_it_still_does(random_pipeline, variant, scheduler):
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    pipe, options = variant(pipe)
    pipe.set_progress_bar_config(disable=True)
    expected = stable_diffusion(pipe, 4.0, **options)
    with escape(pipe, FOUR) as run:
        assert torch.equal(stable_diffusion(pipe, **options), expected)
    taken = pipe.scheduler.timesteps[-run.calls :: pipe.scheduler.order].tolist()
    assert run.timesteps == taken and run.noise_gap.shape == (2, len(taken)) and run.noise_gap.isfinite().all()
    assert torch.equal(stable_diffusion(pipe, 4.0, **options), expected)


def test_a_run_may_be_shared_by_two_pipelines(random_pipeline):
    """SDXL and a refiner: each takes its part of the schedule, and its steps count from its own first."""
    base = random_pipeline("sdxl", 8, "epsilon")
    refiner = StableDiffusionXLImg2ImgPipeline(**base.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    noisy = stable_diffusion(base, 4.0, denoising_end=0.6)
    with escape(base, FOUR) as run:
        assert torch.equal(stable_diffusion(base, denoising_end=0.6), noisy)
    first = run.timesteps
    with pytest.raises(ValueError, match="leaves its last steps to another pipeline"):
        run.judge()
    work = base.unet.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with escape(base, Guidance.guard(4.0)), pytest.raises(ValueError, match=r"denoising_end.*use the guard, or judge, there"):
        stable_diffusion(base, denoising_end=0.6)
    work.remove()
    expected = stable_diffusion(refiner, 4.0, denoising_start=0.6, image=noisy)
    with escape(refiner, FOUR) as run:
        assert torch.equal(stable_diffusion(refiner, denoising_start=0.6, image=noisy), expected)
    assert run.judge().score.isfinite().all()
    assert first + run.timesteps == base.scheduler.timesteps.tolist() and run.calls == len(run.timesteps)


def test_rescaled_guidance_is_the_pipelines(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    expected = stable_diffusion(pipe, 4.0, guidance_rescale=0.6)
    with escape(pipe, FOUR):
        assert close(stable_diffusion(pipe, guidance_rescale=0.6), expected)
    with escape(pipe, Guidance.cfg(4.0, rule="apg")), pytest.raises(ValueError, match="the guidance has the rule 'apg'"):
        stable_diffusion(pipe, guidance_rescale=0.6)
