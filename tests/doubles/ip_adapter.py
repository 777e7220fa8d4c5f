"""A small IP-Adapter with random weights."""

import torch

WIDTH, TOKENS = 16, 4  # of an image's embedding; the tokens that it becomes


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
