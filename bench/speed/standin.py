"""A stand-in for a model: the small pipeline with a network that only waits, so that only the loop has work to do.

Its arithmetic is exact for each element, so an image has the same bits in every batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from basinescape import Sampler
from basinescape.models import Decoded, Encoded, Model, PromptedUNet
from PIL import Image
from torch import Tensor


class StandIn:
    """A `Model` around another, without its work. seconds: the time of a call of the network, for a batch of any size."""

    def __init__(self, model: Model, seconds: float = 0.0):
        self._model, self.seconds, self.calls = model, seconds, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(
        self,
        prompts: list[str] | None,
        height: int,
        width: int,
        count: int = 1,
        negative_prompt: Sequence[str | None] | None = None,
        **options: Any,
    ) -> Encoded:
        prompts = prompts or []
        texts = [*([""] * len(prompts) if negative_prompt is None else negative_prompt), *prompts]
        numbers = [int.from_bytes(hashlib.sha256((text or "").encode()).digest()[:2]) / 2**16 for text in texts]
        embedded = torch.tensor(numbers).view(-1, 1, 1).to(self._model.device)
        return Encoded({"encoder_hidden_states": embedded}, truncated=[""] * len(prompts))

    def encode_each(self, prompts: list[str], **given: Any) -> Encoded:
        return self.encode(prompts, **given)

    def network(self, encoded: Encoded, plain: bool = False) -> PromptedUNet:
        return PromptedUNet(self._predict, encoded.inputs)

    def _predict(self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.calls += 1
        if self.seconds:
            time.sleep(self.seconds)
        return (latents * 0.25 + encoder_hidden_states[..., None],)

    def decode(self, latents: Tensor, output: str, *_: Any, **size: Any) -> Decoded:
        pixels = (latents[:, :3].float() * 32 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
        return Decoded([Image.fromarray(image) for image in pixels], latents.isfinite().flatten(1).all(dim=1), None)


def stand_in(pipe: Any, scheduler: str = "dpmsolver++", seconds: float = 0.0) -> Sampler:
    """A sampler of `pipe` without the work of its model."""
    sampler = Sampler.from_pipeline(pipe, scheduler)
    model: Any = StandIn(sampler.model, seconds)  # has the methods of a `Model`
    sampler.model = model
    return sampler
