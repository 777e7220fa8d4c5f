"""An image as a prompt: an IP-Adapter's embeddings reach the network as in the stock pipeline."""

import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.models import adapt
from ip_adapter import WIDTH, load_adapter
from rounding import assert_same_but_for_rounding

PROMPTS, SEEDS, STEPS, SCALE = ["a cat", "a frog"], [3, 4], 2, 4.0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_ip_adapters_images_are_the_stock_pipelines(random_pipeline, kind):
    pipe = random_pipeline(kind, 8, "epsilon")
    sampler = Sampler.from_pipeline(pipe)
    sampler.model = adapt(pipe, lean=True)

    def sample(**options):
        return sampler(PROMPTS, SEEDS, STEPS, Guidance.cfg(SCALE), output="latent", progress=False, **options).latents

    plain = sample()
    embeds = [torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(1))]
    with pytest.raises(ValueError, match="ip_adapter_image"):
        sample(ip_adapter_image_embeds=embeds)
    load_adapter(pipe.unet)
    with pytest.raises(ValueError, match="ip_adapter_image"):
        sample()

    def stock():
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "generator": generators, "output_type": "latent"}
        return pipe(PROMPTS, ip_adapter_image_embeds=embeds, **settings).images

    found = sample(ip_adapter_image_embeds=embeds)
    assert_same_but_for_rounding(found, stock(), pipe, stock)
    assert not torch.equal(found, plain)
    for bad, says in (
        ({"ip_adapter_image_embeds": [embeds[0].repeat(2, 1, 1)]}, r"two rows each, .* got the shape \(4, 1, 16\)"),
        ({"ip_adapter_image_embeds": [embeds[0][:1]]}, r"two rows each, .* got the shape \(1, 1, 16\)"),
        ({"ip_adapter_image": torch.rand(1, 3, 8, 8)}, "ip_adapter_image needs an image_encoder"),
    ):
        with pytest.raises(ValueError, match=says):
            sample(**bad)
    pipe.set_ip_adapter_scale(0.2)
    assert_same_but_for_rounding(sample(ip_adapter_image_embeds=embeds), stock(), pipe, stock)
