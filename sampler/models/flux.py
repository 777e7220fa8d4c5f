"""Flux.1 with two predictions, diffusers' true CFG: a T5 and a pooled CLIP; positions; perhaps an embedded guidance scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..checks import finite
from .family import most_likely
from .packed import Packed
from .texts import halves


class Flux(Packed):
    """A FluxPipeline as a `Model`.

    guidance_scale, an option, is the number that a guidance-distilled network is told; the guidance of the two predictions is
    the sampler's own.
    """

    texts = (
        *Packed.texts,
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        *("prompt_2", "negative_prompt_2"),
    )
    kwargs = "joint_attention_kwargs"
    options = frozenset((*texts, "guidance_scale", "max_sequence_length", kwargs))
    encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))

    def _encoded(
        self,
        prompts: list[str] | None,
        negative: list[str | None],
        count: int,
        height: int,
        width: int,
        options: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        told = finite("guidance_scale", options.get("guidance_scale", 3.5))

        def encoded(texts: list[str] | None, prefix: str = "") -> tuple[Tensor, ...]:
            own = {name: options.get(prefix + name) for name in ("prompt_2", "prompt_embeds", "pooled_prompt_embeds")}
            if own["prompt_embeds"] is not None:
                texts = None
            return self.pipe.encode_prompt(
                prompt=texts,
                device=self.device,
                num_images_per_prompt=count,
                max_sequence_length=options.get("max_sequence_length", 512),
                lora_scale=self._lora_scale(options),
                **own,
            )

        cond, pooled, positions = encoded(prompts)
        uncond, negative_pooled, _ = encoded([text or "" for text in negative], "negative_")
        inputs = {
            "encoder_hidden_states": halves(uncond, cond, len(negative), count),
            "pooled_projections": halves(negative_pooled, pooled, len(negative), count, "pooled_prompt_embeds"),
        }
        if self.net.config.guidance_embeds:
            inputs["guidance"] = torch.full((2 * count * len(negative),), told)
        grid = self.pipe._prepare_latent_image_ids(1, *self._grid(height, width), self.device, self.dtype)
        return inputs, {"txt_ids": positions, "img_ids": grid}

    def _readers(self, prompts: list[str], options: dict[str, Any]) -> Iterator[tuple[Any, list[str], int]]:
        """The T5; the CLIP adds a pooled vector alone."""
        yield self.pipe.tokenizer_2, options.get("prompt_2") or prompts, options.get("max_sequence_length", 512)

    def _pixels(self, latents: Tensor, generators: Any) -> Tensor:
        config = self.pipe.vae.config
        return self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    def _latents(self, pictures: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (most_likely(self.pipe.vae, pictures) - config.shift_factor) * config.scaling_factor
