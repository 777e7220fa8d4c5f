"""A pipeline sampled by us and by diffusers, at equal settings."""

import torch
from basinescape import Guidance, Sampler
from rounding import assert_same_but_for_rounding

PROMPTS = ["a picture of a cat", "a picture of a frog signed by arno"]
STEPS, SCALE, SEEDS = 2, 4.0, [3, 4]


def ours(pipe, prompts=PROMPTS, seeds=SEEDS, output="latent", **options):
    return Sampler.from_pipeline(pipe)(prompts, seeds, STEPS, Guidance.cfg(SCALE), output=output, progress=False, **options)


def stock(pipe, prompts=PROMPTS, seeds=SEEDS, output="latent", **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "generator": generators, "output_type": output}
    return pipe(prompts, **settings, **options).images


def assert_stock(pipe, prompts=PROMPTS, seeds=SEEDS, **options):
    """The latents are the stock pipeline's, and the options change them."""
    found, expected = ours(pipe, prompts, seeds, **options).latents, stock(pipe, prompts, seeds, **options)
    assert found.shape == expected.shape
    assert_same_but_for_rounding(found, expected, pipe, lambda: stock(pipe, prompts, seeds, **options))
    return found
