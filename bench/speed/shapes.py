"""Pipelines to time: those that ship, and the public shapes of SD 1.5 and SDXL base with random weights.

Speed does not depend on the values. Text embeddings are random, too, so no text encoder is needed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from basinescape import Guidance, Sampler
from basinescape.models import load
from basinescape.sampling.output import Output
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

TOKENS = 77
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def pipeline(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The diffusers pipeline of a name: tiny, flow, sd15 or sdxl."""
    pipe: Any = load(Sampler.model_path(name), dtype, False) if name in ("tiny", "flow") else _random(name, dtype, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sampled(
    sampler: Sampler, prompts: list[str], seeds: list[int], steps: int, guidance: Guidance, output: str, **size: int
) -> Output:
    """One batch by `sampler`. Raises what kept it from a capture that it was to make: its times would be another one's."""
    together: Any = {"batch_size": len(prompts), "output": output, "progress": False, **size}
    made = sampler(prompts, seeds, steps, guidance, **together)
    if sampler.graphs is not None and sampler.graphs.failure is not None:
        raise sampler.graphs.failure
    return made


def _random(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    pipe: Any
    with device:
        unet: Any = UNet2DConditionModel(**UNETS[name])
        vae: Any = AutoencoderKL(**VAE, scaling_factor=SCALING[name], force_upcast=False)
    parts = {
        "vae": vae.to(dtype).eval(),
        "unet": unet.to(dtype).eval(),
        "scheduler": DDIMScheduler(**SCHEDULER),
        "text_encoder": None,
        "tokenizer": None,
    }
    if name == "sdxl":
        width = UNETS[name]["projection_class_embeddings_input_dim"] - 6 * UNETS[name]["addition_time_embed_dim"]
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=_projection(width), tokenizer_2=None, add_watermarker=False)
    else:
        width = None
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **rest)
    pipe.encode_prompt = _Embeddings(UNETS[name]["cross_attention_dim"], width, dtype, device)
    return pipe


def _projection(width: int) -> CLIPTextModelWithProjection:
    """A small text encoder that never runs: the pipeline only reads the projection's `width` from its configuration."""
    small: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return CLIPTextModelWithProjection(CLIPTextConfig(**small, projection_dim=width))


class _Embeddings:
    """Replaces a pipeline's `encode_prompt`: random embeddings, the same for all prompts and calls; cond and uncond differ."""

    def __init__(self, width: int, pooled: int | None, dtype: torch.dtype, device: torch.device):
        self.width, self.pooled, self.like = width, pooled, SimpleNamespace(dtype=dtype, device=device)

    def __call__(self, prompt: str | list[str], *_: object, **__: object) -> tuple[Tensor, ...]:
        count = 1 if isinstance(prompt, str) else len(prompt)
        rng = torch.Generator().manual_seed(0)
        shapes: list[tuple[int, ...]] = [(TOKENS, self.width), (TOKENS, self.width)]
        shapes += [] if self.pooled is None else [(self.pooled,), (self.pooled,)]
        drawn = [torch.randn((1, *shape), generator=rng) for shape in shapes]
        return tuple(one.expand(count, *one.shape[1:]).to(self.like.device, self.like.dtype) for one in drawn)
