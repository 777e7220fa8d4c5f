"""SDXL: two text encoders, pooled text and sizes as conditions, an autoencoder that overflows in float16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number
from .autoencoding import Generators, most_likely
from .encoded_text import Request
from .sd import StableDiffusion

SIZES = ("original_size", "crops_coords_top_left", "target_size")
NEGATIVE_SIZES = tuple(f"negative_{name}" for name in SIZES)


class StableDiffusionXL(StableDiffusion):
    """The adapter of StableDiffusionXLPipeline."""

    texts = (
        *StableDiffusion.texts,
        *("prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )
    options = StableDiffusion.options | {*texts, *SIZES, *NEGATIVE_SIZES}
    encoders = 2
    upcasts = True
    last_layer = 2

    def _check(self, prompts: list[str] | None, negative: Sequence[str | None] | None, options: dict[str, Any]) -> None:
        super()._check(prompts, negative, options)
        for name in (*SIZES, *NEGATIVE_SIZES):
            pair = options.get(name, (0, 0))
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(whole_number(pixels) is None for pixels in pair):
                raise ValueError(f"{name} must be two whole numbers of pixels, got {pair!r}")
        given = [name for name in NEGATIVE_SIZES if name in options]
        if given and not {"negative_original_size", "negative_target_size"} <= set(given):
            raise ValueError(f"{', '.join(given)}: negative_original_size and negative_target_size go together")

    def _inputs(self, encoded: tuple[Tensor, ...], absent: list[bool], request: Request) -> dict[str, Any]:
        cond, uncond, pooled, negative_pooled = encoded
        if self.pipe.config.force_zeros_for_empty_prompt and any(absent) and not all(absent):
            kept = torch.tensor([not empty for empty in absent], device=uncond.device)
            uncond, negative_pooled = (x * kept.view(-1, *[1] * (x.ndim - 1)) for x in (uncond, negative_pooled))
        encoder = self.pipe.text_encoder_2
        projection = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
        size, options = (request.height, request.width), request.options

        def ids(names: Sequence[str]) -> Tensor:
            original, crop, target = (
                options.get(name, default) for name, default in zip(names, (size, (0, 0), size), strict=True)
            )
            made = self.pipe._get_add_time_ids(tuple(original), tuple(crop), tuple(target), cond.dtype, projection)
            return made.repeat(len(cond), 1)

        negative = ids(NEGATIVE_SIZES if "negative_original_size" in options else SIZES)
        text = request.halves(negative_pooled, pooled, "pooled_prompt_embeds")
        added = {"text_embeds": text, "time_ids": torch.cat([negative, ids(SIZES)])}
        return {"encoder_hidden_states": request.halves(uncond, cond), "added_cond_kwargs": added}

    def _pixels(self, latents: Tensor, generators: Generators) -> Tensor:
        scaling, std, mean = self._scale(latents)
        return self.pipe.vae.decode(latents * std / scaling + mean, return_dict=False)[0]

    def _latents(self, pictures: Tensor, generators: Generators) -> Tensor:
        scaling, std, mean = self._scale(pictures)
        return (most_likely(self.pipe.vae, pictures) - mean) / (std / scaling)
