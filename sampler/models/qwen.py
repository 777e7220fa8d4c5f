"""Qwen-Image: the padded states of a language model, predictions renormalised token by token, a video autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.state import per_sample
from .autoencoding import Generators
from .encoded_text import Encoded, Request
from .packed import Packed, PromptedPacked


class PromptedQwen(PromptedPacked):
    """A QwenImageTransformer2DModel, which takes each picture's shape as an input."""

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return PromptedPacked.predict(
            net, latents, timesteps, {**inputs, "img_shapes": [[inputs["img_shapes"]]] * len(latents)}
        )


def renormalised(guided: Tensor, cond: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `guided` (B, tokens, C) with each token scaled to the norm of the same token of `cond`. A token of 0 stays 0.

    weight: (B,), the guidance weights. Only samples with a weight above 1 are scaled. dtype: of the computation.
    """
    wide = guided.to(dtype)
    own = wide.norm(dim=-1, keepdim=True)
    scaled = (wide * (cond.to(dtype).norm(dim=-1, keepdim=True) / own)).to(guided.dtype)
    return torch.where((per_sample(weight, guided) > 1) & (own != 0), scaled, guided)


class QwenImage(Packed):
    """The adapter of QwenImagePipeline.

    The pipeline guides only at scales above 1, and renormalises the guided prediction. Here a sample is renormalised at weights
    above 1. At other weights, such as before a transition, the guided prediction is not changed.
    """

    guided = PromptedQwen
    texts = (*Packed.texts, "prompt_embeds_mask", "negative_prompt_embeds_mask")
    kwargs = "attention_kwargs"
    options = frozenset((*texts, "max_sequence_length", kwargs))
    longest = 1
    closing = 0
    correction = staticmethod(renormalised)

    def check(self) -> None:
        super().check()
        if self.net.config.guidance_embeds:
            raise ValueError("pipe is distilled: its network takes the guidance scale as an input")

    def encode_each(self, prompts: list[str], *, negative_prompt: Sequence[str | None], **given: Any) -> Encoded:
        """As `Model.encode_each`: each text alone, since the pipeline pads texts to the longest of them, and then padded."""
        most = given.get("max_sequence_length") or self._defaults["max_sequence_length"]

        def alone(prompt: str, negative: str | None) -> Encoded:
            text = self.encode([prompt], negative_prompt=[negative], **given)
            states = text.inputs["encoder_hidden_states"]
            mask = text.inputs.get("encoder_hidden_states_mask", states.new_ones(states.shape[:2], dtype=torch.bool))
            more = most - states.shape[1]
            padded = {"encoder_hidden_states": pad(states, (0, 0, 0, more)), "encoder_hidden_states_mask": pad(mask, (0, more))}
            return replace(text, inputs=padded)

        asked = list(zip(prompts, negative_prompt, strict=True))
        texts = {one: alone(*one) for one in dict.fromkeys(asked)}
        return Encoded.joined([texts[one] for one in asked])

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        def encoded(texts: list[str] | None, prefix: str = "") -> tuple[Tensor, Tensor]:
            states, mask = self.pipe.encode_prompt(
                prompt=texts,
                device=self.device,
                num_images_per_prompt=request.count,
                max_sequence_length=request.options["max_sequence_length"],
                **{name: request.options.get(prefix + name) for name in ("prompt_embeds", "prompt_embeds_mask")},
            )
            return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()

        both = encoded([text or "" for text in request.negative], "negative_"), encoded(request.prompts)
        most = max(states.shape[1] for states, _ in both)
        uncond, cond = (pad(states, (0, 0, 0, most - states.shape[1])) for states, _ in both)
        masks = [pad(mask, (0, most - mask.shape[1])) for _, mask in both]
        inputs = {"encoder_hidden_states": request.halves(uncond, cond)}
        if not all(mask.all() for mask in masks):
            inputs["encoder_hidden_states_mask"] = request.halves(masks[0], masks[1], "prompt_embeds_mask")
        return inputs, {"img_shapes": (1, *self._grid(request.height, request.width))}

    def _pixels(self, latents: Tensor, generators: Generators) -> Tensor:
        return super()._pixels(latents, generators)[:, :, 0]

    def _latents(self, pictures: Tensor, generators: Generators) -> Tensor:
        return super()._latents(pictures[:, :, None], generators)
