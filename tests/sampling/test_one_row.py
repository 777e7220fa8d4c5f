"""An image does not depend on its batch where a step runs one branch alone: batches of 1, 2, 3 and 5, in two dtypes."""

import copy

import pytest
import torch
from basinescape import At, Guidance, Sampler
from rounding import assert_same_but_for_rounding

PROMPTS = [f"a picture of a {name}" for name in ("cat", "frog", "fish", "dog", "boat")]
STEPS = 3
UNCOND, COND = Guidance.delayed(7.5, until=At(500)), Guidance.delayed(7.5, until=At(500), before=1.0)


@pytest.fixture(scope="module")
def flow():
    return Sampler.from_pretrained("flow", device="cpu", dtype=torch.float32).pipe


@pytest.fixture(scope="module", params=["tiny", "flow"])
def model(request, pipe):
    """A pipeline in float32, and options of its calls."""
    return (pipe, {}) if request.param == "tiny" else (request.getfixturevalue("flow"), {"max_sequence_length": 16})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("guidance", [UNCOND, COND], ids=["uncond", "cond"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_does_not_depend_on_its_batch(model, dtype, guidance, threads):
    """In half precision to the bit: the rounding of a row that is multiplied alone would move a picture far."""
    pipe, options = model
    pipe = pipe if dtype == torch.float32 else copy.deepcopy(pipe).to(dtype)
    sampler, before = Sampler.from_pipeline(pipe), torch.get_num_threads()

    def sampled(size):
        out = sampler(PROMPTS, 0, STEPS, guidance, output="latent", progress=False, batch_size=size, **options)
        assert out.noise_gap[:, 0].isnan().all() and not out.noise_gap[:, -1].isnan().any()  # one branch, then both
        return out.latents

    torch.set_num_threads(threads)
    try:
        alone = sampled(1)
        for size in (2, 3, 5):
            if dtype == torch.float32:
                assert_same_but_for_rounding(sampled(size), alone, pipe, lambda: sampled(1))
            else:
                assert torch.equal(sampled(size), alone)
    finally:
        torch.set_num_threads(before)
