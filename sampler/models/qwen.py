"""Qwen-Image: a language model's states, padded under a mask; predictions renormalised token by token; a video autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .family import most_likely
from .packed import GuidedPacked, Packed
from .texts import halves


class GuidedQwen(GuidedPacked):
    """A QwenImageTransformer2DModel, which is told the shape of each picture."""

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return GuidedPacked.predict(net, latents, timesteps, {**inputs, "img_shapes": [[inputs["img_shapes"]]] * len(latents)})


def renormalised(guided: Tensor, cond: Tensor, weight: Tensor) -> Tensor:
    """Each token of `guided` (B, tokens, C) as long as that of `cond`, in samples whose weight (B,) is above 1; 0 stays 0."""
    own = guided.float().norm(dim=-1, keepdim=True)
    longer = torch.where(own > 0, cond.float().norm(dim=-1, keepdim=True) / own, 1.0)
    return (guided * torch.where(weight.view(-1, 1, 1) > 1, longer, 1.0)).to(guided.dtype)


class QwenImage(Packed):
    """A QwenImagePipeline as a `Model`.

    The pipeline renormalises what it has guided, which it does at scales above 1 alone; so here, sample by sample. At other
    weights, before a transition, the prediction stays as the guidance makes it.
    """

    guided = GuidedQwen
    masks = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    texts = (*Packed.texts, *masks)
    kwargs = "attention_kwargs"
    options = frozenset((*texts, "max_sequence_length", kwargs))
    encoders = (("text_encoder", "tokenizer"),)
    closing = 0
    settle = staticmethod(renormalised)

    def check(self) -> None:
        if self.net.config.guidance_embeds:
            raise ValueError("pipe is distilled: its network takes the guidance scale as an input")
        super().check()

    @property
    def latent_channels(self) -> int:
        return 4 * self.pipe.vae.config.z_dim

    def _encoded(
        self,
        prompts: list[str] | None,
        negative: list[str | None],
        count: int,
        height: int,
        width: int,
        options: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        def encoded(texts: list[str] | None, prefix: str = "") -> tuple[Tensor, Tensor]:
            states, mask = self.pipe.encode_prompt(
                prompt=texts,
                device=self.device,
                num_images_per_prompt=count,
                max_sequence_length=options.get("max_sequence_length", 512),
                **{name: options.get(prefix + name) for name in ("prompt_embeds", "prompt_embeds_mask")},
            )
            return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()

        both = encoded([text or "" for text in negative], "negative_"), encoded(prompts)
        most = max(states.shape[1] for states, _ in both)
        uncond, cond = (pad(states, (0, 0, 0, most - states.shape[1])) for states, _ in both)
        masks = [pad(mask, (0, most - mask.shape[1])) for _, mask in both]
        inputs = {"encoder_hidden_states": halves(uncond, cond, len(negative), count)}
        if not all(mask.all() for mask in masks):
            inputs["encoder_hidden_states_mask"] = halves(*masks, len(negative), count, "prompt_embeds_mask")
        return inputs, {"img_shapes": (1, *self._grid(height, width))}

    def _readers(self, prompts: list[str], options: dict[str, Any]) -> Iterator[tuple[Any, list[str], int]]:
        yield self.pipe.tokenizer, prompts, options.get("max_sequence_length", 512)

    def _pixels(self, latents: Tensor, generators: Any) -> Tensor:
        return self.pipe.vae.decode(unscaled(latents, self.pipe.vae.config), return_dict=False)[0][:, :, 0]

    def _latents(self, pictures: Tensor) -> Tensor:
        return scaled(most_likely(self.pipe.vae, pictures[:, :, None]), self.pipe.vae.config)


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """Latents (B, C, frames, h, w) as the autoencoders of Wan and Qwen-Image take them, each channel with its own scale."""
    mean, std = _scale(config, latents)
    return latents / (1.0 / std) + mean


def scaled(latents: Tensor, config: Any) -> Tensor:
    """`unscaled` undone."""
    mean, std = _scale(config, latents)
    return (latents - mean) * (1.0 / std)


def _scale(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(like) for values in (config.latents_mean, config.latents_std))
    return mean, std
