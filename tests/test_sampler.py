"""The sampler on the pipeline that ships: against diffusers, against a plain loop, alone and in a batch."""

import numpy as np
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.solver import make_scheduler
from diffusers import StableDiffusionPipeline

STEPS = 8
PROMPTS = ["a picture of a cat signed by arno", "a picture of a frog", "a picture of a fish signed by dirk"]
SEEDS = [3, 1, 2]


def sample(pipe, scheduler, guidance, prompts=PROMPTS, seeds=SEEDS, output="latent"):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    return sampler(prompts, seeds, STEPS, guidance, output=output, progress=False)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++", "unipc"])
def test_plain_cfg_is_the_pipelines_own(pipe, scheduler):
    own = StableDiffusionPipeline(**{**pipe.components, "scheduler": make_scheduler(scheduler, pipe.scheduler)})
    own.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = own(PROMPTS, num_inference_steps=STEPS, guidance_scale=7.5, generator=generators, output_type="np").images
    found = sample(pipe, scheduler, Guidance.cfg(7.5), output="np").images
    assert np.abs(found - expected).max() <= 1 / 255


METHODS = [
    Guidance.delayed(7.5, until=At(500)),
    Guidance.delayed(7.5, until=FirstMinimum()),
    Guidance.opposite(2.0, scale=7.5, until=At(650)),
    Guidance.opposite(7.5, scale=7.5, until=FirstMinimum(earliest=3, latest=5)),
]


def plain_loop(pipe, scheduler, guidance, prompt, seed):
    """One sample, straight from the method's definitions: latents and transition step."""
    scheduler = make_scheduler(scheduler, pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    cond, uncond = pipe.encode_prompt(prompt, "cpu", 1, True)
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    gaps, transition, rule = [], -1, guidance.until
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latents, t)
        u, c = (pipe.unet(x, t, states).sample for states in (uncond, cond))
        gaps.append((c - u).norm().item())
        if transition < 0:
            if isinstance(rule, At):
                leaves = t <= rule.timestep
            else:
                minimum = k >= rule.earliest and gaps[k - 2] > gaps[k - 1] < gaps[k]
                leaves = minimum or (rule.latest is not None and k >= rule.latest)
            transition = k if leaves else -1
        weight = guidance.scale if transition >= 0 else guidance.before
        latents = scheduler.step(u + weight * (c - u), t, latents).prev_sample
    return latents, transition


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("guidance", METHODS, ids=repr)
@torch.inference_mode()
def test_a_batch_is_the_plain_loop_of_each_sample(pipe, scheduler, guidance):
    out = sample(pipe, scheduler, guidance)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        latents, transition = plain_loop(pipe, scheduler, guidance, prompt, seed)
        assert out.transition_step[i] == transition
        torch.testing.assert_close(out.latents[i : i + 1], latents, atol=5e-4, rtol=5e-4)


def test_a_sample_is_the_same_alone_and_in_another_order(pipe):
    guidance = METHODS[1]
    batch = sample(pipe, "dpmsolver++", guidance)
    turned = sample(pipe, "dpmsolver++", guidance, PROMPTS[::-1], SEEDS[::-1])
    alone = sample(pipe, "dpmsolver++", guidance, PROMPTS[:1], SEEDS[:1])
    torch.testing.assert_close(turned.latents.flip(0), batch.latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.latents, batch.latents[:1], atol=1e-5, rtol=0)
    assert turned.transition_step.flip(0).tolist() == batch.transition_step.tolist()


def test_a_branch_nobody_needs_is_not_run(pipe):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        out = sample(pipe, "ddim", Guidance.delayed(7.5, until=At(500)))
    finally:
        hook.remove()
    first = out.transition_step[0].item()
    assert 0 < first < STEPS
    assert rows == [3] * first + [6] * (STEPS - first)
    assert out.noise_gap[:, :first].isnan().all() and out.noise_gap[:, first:].isfinite().all()


@pytest.mark.parametrize("guidance", [*METHODS, Guidance.cfg(5, shape=(1.0, 2.0), interval=(100, 900))], ids=repr)
def test_guidance_survives_serialisation_and_its_repr(guidance):
    assert Guidance.from_dict(guidance.to_dict()) == guidance
    assert eval(repr(guidance)) == guidance


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"seeds": [1]}, {"output": "jpg"}, {"guidance": 7.5}, {"height": 63}, {"prompts": []}],
    ids=lambda change: next(iter(change)),
)
def test_bad_arguments_are_named(pipe, change):
    arguments = {"prompts": PROMPTS, "seeds": SEEDS, "steps": STEPS, "progress": False} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        Sampler.from_pipeline(pipe)(**arguments)
