"""What the adapters of diffusion transformers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .model import Model
from .network import PromptedNetwork


class PromptedTransformer(PromptedNetwork):
    """A transformer of diffusers with the encoded prompts of one batch."""

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return net(latents, timestep=timesteps, **inputs, return_dict=False)[0]


class Transformer(Model):
    """The adapter of a pipeline whose network is its `transformer`."""

    network_name = "transformer"
    guided = PromptedTransformer

    def check(self) -> None:
        super().check()
        if getattr(self.net, "is_cache_enabled", False):
            raise ValueError(
                "pipe's transformer caches from step to step, which does not work on a batch of both halves: disable_cache() it"
            )


def shift(config: Any, tokens: int, most: float) -> float:
    """Return the mu of a scheduler with dynamic shifting, linear in `tokens` through two configured points.

    tokens: the number of the picture's tokens.
    most:   the shift at the upper point, if the configuration has none.

    Esser et al., https://arxiv.org/abs/2403.03206, section 5.3.2.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", most) - base) / (high - low)
    return tokens * slope + (base - slope * low)
