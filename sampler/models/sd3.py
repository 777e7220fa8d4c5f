"""Stable Diffusion 3 and 3.5: two CLIPs and perhaps a T5, joined; pooled text; flow matching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..schedulers.schedule import Schedule
from .family import most_likely
from .texts import halves, negative_texts
from .transformer import Transformer, shift


class StableDiffusion3(Transformer):
    """A StableDiffusion3Pipeline as a `Model`."""

    texts = (
        *Transformer.texts,
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        *("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"),
    )
    kwargs = "joint_attention_kwargs"
    options = frozenset((*texts, "clip_skip", "max_sequence_length", kwargs))
    encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    last_layer = 2

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        found = super().size(height, width)
        for name, pixels in zip(("height", "width"), found, strict=True):
            if pixels > self._most:
                raise ValueError(
                    f"{name} must be at most {self._most} pixels, for which the network has positions; got {pixels}"
                )
        return found

    @property
    def _most(self) -> int:
        return self.net.config.pos_embed_max_size * self.multiple

    def nearest_size(self, height: int, width: int, **options: Any) -> tuple[int, int]:
        shrunk = min(1.0, self._most / max(height, width))
        return super().nearest_size(shrunk * height, shrunk * width)

    def scheduled(
        self,
        schedule: Schedule,
        scheduler: SchedulerMixin,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Schedule:
        if schedule.mu is not None or not scheduler.config.get("use_dynamic_shifting"):
            return schedule
        height, width = (pixels // self.multiple for pixels in self.size(height, width))
        return replace(schedule, mu=shift(scheduler.config, height * width, 1.16))

    def _encoded(
        self,
        prompts: list[str] | None,
        negative: list[str | None],
        count: int,
        height: int,
        width: int,
        options: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        cond, uncond, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt=prompts,
            device=self.device,
            num_images_per_prompt=count,
            do_classifier_free_guidance=True,
            negative_prompt=negative_texts(negative),
            lora_scale=self._lora_scale(options),
            **{"prompt_2": None, "prompt_3": None, **self._text(options, "clip_skip", "max_sequence_length")},
        )
        return {
            "encoder_hidden_states": halves(uncond, cond, len(negative), count),
            "pooled_projections": halves(negative_pooled, pooled, len(negative), count, "pooled_prompt_embeds"),
        }, {}

    def _readers(self, prompts: list[str], options: dict[str, Any]) -> Iterator[tuple[Any, list[str], int]]:
        if self.pipe.text_encoder_3 is None:
            yield from super()._readers(prompts, options)
        else:  # which reads more than the others
            yield self.pipe.tokenizer_3, options.get("prompt_3") or prompts, options.get("max_sequence_length", 256)

    def _pixels(self, latents: Tensor, generators: list[torch.Generator] | None) -> Tensor:
        config = self.pipe.vae.config
        return self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    def _latents(self, pictures: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (most_likely(self.pipe.vae, pictures) - config.shift_factor) * config.scaling_factor
