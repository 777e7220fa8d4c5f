"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .autoencoding import Generators
from .encoded_text import Request
from .lean import LeanUNet
from .model import Model
from .network import PromptedNetwork


class PromptedUNet(PromptedNetwork):
    """A UNet2DConditionModel with the encoded prompts of one batch."""

    lean = LeanUNet

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return net(latents, timesteps, **inputs, return_dict=False)[0]


class StableDiffusion(Model):
    """The adapter of StableDiffusionPipeline."""

    network_name = "unet"
    guided = PromptedUNet
    images = ("ip_adapter_image", "ip_adapter_image_embeds")
    kwargs = "cross_attention_kwargs"
    options = frozenset((*Model.texts, *images, "clip_skip", kwargs))

    @property
    def memory_format(self) -> torch.memory_format:
        weight = self.pipe.unet.conv_in.weight
        channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return torch.channels_last if channels_last else torch.contiguous_format

    def check(self) -> None:
        super().check()
        if self.pipe.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "pipe is distilled: its network takes the guidance scale as an input, so there are no two predictions to merge"
            )

    @property
    def own_size(self) -> tuple[int, int] | None:
        factor, sample = self.pipe.vae_scale_factor, self.pipe.unet.config.sample_size
        if sample is None:
            return None
        height, width = sample if isinstance(sample, (tuple, list)) else (sample, sample)
        return factor * height, factor * width

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        with _final_norm_found(self.pipe.text_encoder):
            encoded = self.pipe.encode_prompt(
                prompt=request.prompts,
                device=self.device,
                num_images_per_prompt=request.count,
                do_classifier_free_guidance=True,
                negative_prompt=request.negative_texts,
                lora_scale=self._lora_scale(request),
                **request.get(*self.texts, "clip_skip"),
            )
        batch = len(encoded[0])
        absent = [request.negative[i // request.count] is None for i in range(batch)]
        inputs = self._inputs(encoded, absent, request)
        if any(name in request.options for name in self.images):
            image, embeds = (request.options.get(name) for name in self.images)
            embeds = self.pipe.prepare_ip_adapter_image_embeds(image, embeds, self.device, batch, True)
            inputs.setdefault("added_cond_kwargs", {})["image_embeds"] = embeds
        return inputs, {}

    def _inputs(self, encoded: tuple[Tensor, ...], absent: list[bool], request: Request) -> dict[str, Any]:
        """The UNet's arguments with a row a sample. absent: which samples have no negative prompt."""
        cond, uncond = encoded
        return {"encoder_hidden_states": request.halves(uncond, cond)}

    def _check(self, prompts: list[str] | None, negative: Sequence[str | None] | None, options: dict[str, Any]) -> None:
        super()._check(prompts, negative, options)
        adapter = self.pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
        if adapter and not any(name in options for name in self.images):
            raise ValueError(f"pipe has an IP-Adapter loaded: give {' or '.join(self.images)}, or unload_ip_adapter() first")
        if not adapter and any(name in options for name in self.images):
            raise ValueError(f"{' and '.join(self.images)} need an IP-Adapter, and pipe has none: load_ip_adapter() first")
        if "ip_adapter_image" in options and self.pipe.image_encoder is None:
            raise ValueError("ip_adapter_image needs an image_encoder, and pipe has none: give ip_adapter_image_embeds")
        for one in options.get("ip_adapter_image_embeds", ()):
            if len(one) != 2:  # the stock pipeline mixes the rows of a larger one, in a way that depends on the batch
                raise ValueError(
                    "ip_adapter_image_embeds must have two rows each, the negative one and the image's, for all prompts; "
                    f"got the shape {tuple(one.shape)}"
                )

    def _pixels(self, latents: Tensor, generators: Generators) -> Tensor:
        latents = latents / self.pipe.vae.config.scaling_factor
        return self.pipe.vae.decode(latents, return_dict=False, generator=generators)[0]


@contextmanager
def _final_norm_found(encoder: nn.Module | None) -> Iterator[None]:
    """Let diffusers' `clip_skip` find `text_model.final_layer_norm`, which transformers 5 moved to the encoder itself."""
    places = {} if encoder is None or hasattr(encoder, "text_model") else vars(encoder)
    places["text_model"] = encoder
    try:
        yield
    finally:
        del places["text_model"]
