"""Stable Diffusion 3 and 3.5: two CLIPs and perhaps a T5, joined; pooled text; flow matching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..schedulers import Schedule
from .family import halves
from .transformer import Transformer, shift


class StableDiffusion3(Transformer):
    """A StableDiffusion3Pipeline as a `Model`."""

    prompts = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
    texts = (*Transformer.texts, "pooled_prompt_embeds", "negative_pooled_prompt_embeds", *prompts)
    kwargs = "joint_attention_kwargs"
    options = frozenset((*texts, "clip_skip", "max_sequence_length", kwargs))
    encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    last_layer = 2

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        found = super().size(height, width)
        most = self.net.config.pos_embed_max_size * self.multiple
        for name, pixels in zip(("height", "width"), found, strict=True):
            if pixels > most:
                raise ValueError(f"{name} must be at most {most} pixels, for which the network has positions; got {pixels}")
        return found

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

    def _check(self, prompts: list[str] | None, negative: Sequence[str | None] | None, options: dict[str, Any]) -> None:
        super()._check(prompts, negative, options)
        for name in self.prompts:
            texts = options.get(name)
            if isinstance(texts, list) and prompts is not None and len(texts) != len(prompts):
                raise ValueError(f"{name} has {len(texts)} entries for {len(prompts)} prompts")

    def _encoded(
        self,
        prompts: list[str] | None,
        negative: Sequence[str | None] | None,
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
            negative_prompt=None if negative is None else [text or "" for text in negative],
            lora_scale=self._lora_scale(options),
            **{"prompt_2": None, "prompt_3": None, **self._text(options, "clip_skip", "max_sequence_length")},
        )
        batch = count * len(options["prompt_embeds"] if prompts is None else prompts)
        return {
            "encoder_hidden_states": halves(uncond, cond, batch),
            "pooled_projections": halves(negative_pooled, pooled, batch, "pooled_prompt_embeds"),
        }, {}

    def _readers(self, prompts: list[str], options: dict[str, Any]) -> Iterator[tuple[Any, list[str], int]]:
        if self.pipe.text_encoder_3 is None:
            yield from super()._readers(prompts, options)
        else:  # which reads more than the others
            yield self.pipe.tokenizer_3, options.get("prompt_3") or prompts, options.get("max_sequence_length", 256)

    def _pixels(self, latents: Tensor, generators: list[torch.Generator] | None) -> Tensor:
        config = self.pipe.vae.config
        return self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
