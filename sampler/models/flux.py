"""Flux.1 with two predictions, which diffusers calls true CFG: a T5, a pooled CLIP, perhaps an embedded guidance scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import finite
from .encoded_text import Request
from .packed import Packed


class Flux(Packed):
    """The adapter of FluxPipeline.

    The option guidance_scale is an input of a guidance-distilled network. It is not the guidance scale of the two predictions.
    """

    texts = (
        *Packed.texts,
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        *("prompt_2", "negative_prompt_2"),
    )
    kwargs = "joint_attention_kwargs"
    options = frozenset((*texts, "guidance_scale", "max_sequence_length", kwargs))
    encoders = longest = 2  # the T5; the CLIP adds just a pooled vector

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        scale = finite("guidance_scale", request.options["guidance_scale"])

        def encoded(texts: list[str] | None, prefix: str = "") -> tuple[Tensor, ...]:
            own = {name: request.options.get(prefix + name) for name in ("prompt_2", "prompt_embeds", "pooled_prompt_embeds")}
            if own["prompt_embeds"] is not None:
                texts = None
            return self.pipe.encode_prompt(
                prompt=texts,
                device=self.device,
                num_images_per_prompt=request.count,
                max_sequence_length=request.options["max_sequence_length"],
                lora_scale=self._lora_scale(request),
                **own,
            )

        cond, pooled, positions = encoded(request.prompts)
        uncond, negative_pooled, _ = encoded([text or "" for text in request.negative], "negative_")
        inputs = {
            "encoder_hidden_states": request.halves(uncond, cond),
            "pooled_projections": request.halves(negative_pooled, pooled, "pooled_prompt_embeds"),
        }
        if self.net.config.guidance_embeds:
            inputs["guidance"] = torch.full((2 * request.count * len(request.negative),), scale)
        grid = self.pipe._prepare_latent_image_ids(1, *self._grid(request.height, request.width), self.device, self.dtype)
        return inputs, {"txt_ids": positions, "img_ids": grid}
