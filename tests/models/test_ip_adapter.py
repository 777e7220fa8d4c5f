"""An image as a prompt: an IP-Adapter's embeddings reach the network as in the stock pipeline."""

import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.models import adapt
from rounding import assert_same_but_for_rounding

PROMPTS, SEEDS, STEPS, SCALE, WIDTH, TOKENS = ["a cat", "a frog"], [3, 4], 2, 4.0, 16, 4


def load_adapter(unet):
    """Random weights of a small IP-Adapter, in diffusers' own form."""
    rng = torch.Generator().manual_seed(0)
    text = unet.config.cross_attention_dim

    def random(*shape):
        return 0.3 * torch.randn(shape, generator=rng)

    readers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    keys = [f"{1 + 2 * i}.{name}.weight" for i in range(len(readers)) for name in ("to_k_ip", "to_v_ip")]
    widths = {module.inner_dim for module in readers}
    assert len(widths) == 1
    unet._load_ip_adapter_weights(
        [
            {
                "image_proj": {
                    "proj.weight": random(TOKENS * text, WIDTH),
                    "proj.bias": random(TOKENS * text),
                    "norm.weight": torch.ones(text),
                    "norm.bias": torch.zeros(text),
                },
                "ip_adapter": {key: random(*widths, text) for key in keys},
            }
        ]
    )


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
    pipe.set_ip_adapter_scale(0.2)
    assert_same_but_for_rounding(sample(ip_adapter_image_embeds=embeds), stock(), pipe, stock)
