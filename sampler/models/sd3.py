"""Stable Diffusion 3 and 3.5: flow matching, the joined text of two CLIPs and perhaps a T5, pooled text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..schedulers.schedule import Schedule
from .autoencoding import Pixels
from .encoded_text import Request
from .transformer import Transformer, shift


class StableDiffusion3(Transformer):
    """The adapter of StableDiffusion3Pipeline."""

    texts = (
        *Transformer.texts,
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        *("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"),
    )
    kwargs = "joint_attention_kwargs"
    options = frozenset((*texts, "clip_skip", "max_sequence_length", kwargs))
    encoders = 2
    longest = 3  # the T5, where there is one
    last_layer = 2

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def size(self, height: Pixels = None, width: Pixels = None) -> tuple[int, int]:
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
        return self._rounded(shrunk * height), self._rounded(shrunk * width)

    def scheduled(
        self, schedule: Schedule, scheduler: Any, height: Pixels = None, width: Pixels = None, **options: Any
    ) -> Schedule:
        if schedule.mu is not None or not scheduler.config.get("use_dynamic_shifting"):
            return schedule
        rows, columns = (pixels // self.multiple for pixels in self.size(height, width))
        return replace(schedule, mu=shift(scheduler.config, rows * columns, 1.16))

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        cond, uncond, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt=request.prompts,
            device=self.device,
            num_images_per_prompt=request.count,
            do_classifier_free_guidance=True,
            negative_prompt=request.negative_texts,
            lora_scale=self._lora_scale(request),
            **{"prompt_2": None, "prompt_3": None, **request.get(*self.texts, "clip_skip", "max_sequence_length")},
        )
        return {
            "encoder_hidden_states": request.halves(uncond, cond),
            "pooled_projections": request.halves(negative_pooled, pooled, "pooled_prompt_embeds"),
        }, {}
