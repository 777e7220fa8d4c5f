"""Any number of prompts in one call: the same images whatever their batches; and the first steps alone."""

import numpy as np
import pytest
import torch
from basinescape import At, Guidance, Sampler
from basinescape.models import memory
from rounding import assert_same_but_for_rounding

PROMPTS = [f"a picture of a {name}" for name in ("cat", "frog", "dog", "fish")]
STEPS = 3


@pytest.fixture(scope="module")
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


def sample(sampler, **options):
    options = {"steps": STEPS, "guidance": Guidance.cfg(7.5), "output": "latent", "progress": False} | options
    prompts = None if "prompt_embeds" in options else PROMPTS
    return sampler(prompts, options.pop("seeds", 3), **options)


def test_images_are_the_same_in_any_batches(sampler, pipe):
    """Batches of 3, 3 and 2, which part the images of one prompt."""
    options = {"negative_prompt": [None, "blue", "", "red"], "guidance": Guidance.delayed(7.5, until=At(500))}
    options |= {"num_images_per_prompt": 2, "seeds": range(8)}

    def whole():
        made = sample(sampler, batch_size=8, **options)
        return made.latents, made.noise_gap, made.transition_step.float()

    made = sample(sampler, batch_size=3, **options)
    found = made.latents, made.noise_gap, made.transition_step.float()
    assert len(made.latents) == len(made.finite) == len(made.truncated) == 8 and made.timesteps.shape == (STEPS,)
    assert_same_but_for_rounding(found, whole(), pipe, whole)


def test_embeddings_latents_and_pictures_go_by_batches_too(sampler, pipe):
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    latents = torch.randn((4, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    options = {"prompt_embeds": cond, "negative_prompt_embeds": uncond, "latents": latents}

    def whole():
        return sample(sampler, batch_size=4, **options).latents

    assert_same_but_for_rounding(sample(sampler, batch_size=2, **options).latents, whole(), pipe, whole)
    for output, kind in (("pil", list), ("np", np.ndarray), ("pt", torch.Tensor)):
        parts, together = (sample(sampler, batch_size=size, output=output, steps=1).images for size in (3, 4))
        assert isinstance(parts, kind) and len(parts) == 4
        assert np.abs(pixels(parts) - pixels(together)).max() < 1.5 / 255  # at most one level of 8 bits


def pixels(images):
    """(B, height, width, 3) in 0 to 1."""
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images]) / 255
    return images.permute(0, 2, 3, 1).numpy() if isinstance(images, torch.Tensor) else images


def test_what_sees_the_batch_has_all_of_it(sampler, monkeypatch):
    seen = []

    def callback(pipe, index, timestep, given):
        seen.append(len(given["latents"]))
        return given

    monkeypatch.setattr(memory, "ON_CPU", 2)
    sample(sampler, callback_on_step_end=callback, steps=2)
    assert seen == [4, 4]
    sample(sampler.wrapped(lambda network: lambda x, t, branch: (seen.append(len(x)), network(x, t, branch))[1]), steps=1)
    assert seen[2:] == [8]
    with pytest.raises(ValueError, match="batch_size must be at least 4"):
        sample(sampler.wrapped(lambda network: network), batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        sample(sampler, batch_size=0)


def test_what_the_steps_have_done_is_told_over_all_batches(sampler):
    told = []
    sample(sampler, batch_size=3, progress=told.append)
    assert told == pytest.approx([(k + 1) / (2 * STEPS) for k in range(2 * STEPS)])


def test_the_first_steps_have_the_gaps_of_a_whole_run(sampler):
    for scheduler in ("dpmsolver++", "heun", "unipc"):  # heun: two calls a step; unipc: not linear
        own = Sampler.from_pipeline(sampler.pipe, scheduler)
        whole, part = sample(own), sample(own, stop_after=2)
        assert torch.equal(part.noise_gap[:, :2], whole.noise_gap[:, :2]) and part.noise_gap[:, 2:].isnan().all()
    for stop, says in ((0, "whole number"), (4, "1 to 3")):
        with pytest.raises(ValueError, match=f"stop_after must be .*{says}"):
            sample(sampler, stop_after=stop)


def test_on_a_gpu_the_batch_grows_with_the_memory_and_shrinks_with_the_picture(sampler, monkeypatch):
    class Model:
        device, pipe = torch.device("cuda"), sampler.pipe

    free = 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    sizes = {}
    for free in (1, 2**32, 2**34, 2**44):
        sizes[free] = [memory.batch_size(Model, side, side) for side in (512, 1024)]
        for size, side in zip(sizes[free], (512, 1024), strict=True):
            assert size == 1 or size * memory.sample_bytes(Model, side, side) <= free
    assert sizes[1] == [1, 1] and sizes[2**44] == [memory.MOST, memory.MOST]
    assert sizes[2**32][0] > sizes[2**32][1] and sizes[2**32][0] < sizes[2**34][0]
    assert memory.batch_size(sampler.model, 64, 64) == memory.ON_CPU


def test_a_size_is_refused_that_the_whole_memory_does_not_hold(sampler, monkeypatch):
    class Model:
        device, pipe, shape = torch.device("cuda"), sampler.pipe, sampler.model.shape

    made = sampler(["a"], seeds=0, steps=1, guidance=Guidance.cfg(2.0), height=64, width=96, output="pt")
    least = made.images.nbytes + 4 * made.latents.numel()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, least))
    memory.check(Model(), 64, 96)
    with pytest.raises(ValueError, match=r"height 64 and width 128 are too large: .*'cuda' has"):
        memory.check(Model(), 64, 128)
