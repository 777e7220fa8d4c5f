"""Wan 2.1: videos, a multilingual T5, latents that are always float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number
from .encoded_text import Request
from .lean import LeanWan
from .transformer import PromptedTransformer, Transformer


class PromptedWan(PromptedTransformer):
    """A WanTransformer3DModel. It takes latents in the dtype of its text."""

    lean = LeanWan

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return PromptedTransformer.predict(net, latents.to(inputs["encoder_hidden_states"].dtype), timesteps, inputs)


class Wan(Transformer):
    """The adapter of WanPipeline with one transformer. The option num_frames is the number of frames of a video."""

    guided = PromptedWan
    kwargs = "attention_kwargs"
    options = frozenset((*Transformer.texts, "num_frames", "max_sequence_length", kwargs))
    longest = 1
    own_size = 480, 832  # the defaults of the pipeline's own call
    frames = 81

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def check(self) -> None:
        config = self.pipe.config
        if self.pipe.transformer is None or config.boundary_ratio is not None or config.expand_timesteps:
            raise ValueError("pipe is Wan 2.2, which changes its network on the way or tells it a time per token: use Wan 2.1")
        super().check()

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor_spatial * self.net.config.patch_size[1]

    def shape(self, height: int, width: int, num_frames: int | None = None, **options: Any) -> tuple[int, ...]:
        frames, step = self.frames if num_frames is None else whole_number(num_frames), self.pipe.vae_scale_factor_temporal
        if frames is None or frames < 1 or (frames - 1) % step:
            raise ValueError(f"num_frames must be 1 more than a multiple of {step}, got {num_frames!r}")
        factor = self.pipe.vae_scale_factor_spatial
        return self.net.config.in_channels, (frames - 1) // step + 1, height // factor, width // factor

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        cond, uncond = self.pipe.encode_prompt(
            prompt=request.prompts,
            negative_prompt=[text or "" for text in request.negative],
            do_classifier_free_guidance=True,
            num_videos_per_prompt=request.count,
            device=self.device,
            **request.get(*self.texts, "max_sequence_length"),
        )
        return {"encoder_hidden_states": request.halves(uncond, cond)}, {}

    def _pictures(self, pixels: Tensor, output: str, flagged: Sequence[Any] | None) -> Any:
        """Frames: lists of pictures, or (B, frames, ...)."""
        return self.pipe.video_processor.postprocess_video(pixels, output_type=output)
