"""A diffusion transformer as the network of the loop, and what pipelines built on one have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .family import Family
from .network import Guided


class GuidedTransformer(Guided):
    """A transformer of diffusers and the encoded prompts of one batch."""

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return net(latents, timestep=timesteps, **inputs, return_dict=False)[0]


class Transformer(Family):
    """A pipeline around a `transformer` as a `Model`."""

    network_name = "transformer"
    guided = GuidedTransformer

    def check(self) -> None:
        if getattr(self.net, "is_cache_enabled", False):
            raise ValueError(
                "pipe's transformer caches from step to step, which a batch of both halves does not: disable_cache() it"
            )
        self._check_channels(self.net.config.in_channels, self.latent_channels)

    @property
    def latent_channels(self) -> int:
        """Of what the network takes, by the autoencoder."""
        return self.pipe.vae.config.latent_channels

    @property
    def own_size(self) -> tuple[int, int] | None:
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side


def shift(config: Any, tokens: int, most: float) -> float:
    """The mu of a scheduler with dynamic shifting for a picture of so many tokens: a line through two configured points.

    Esser et al., https://arxiv.org/abs/2403.03206, section 5.3.2. most: the upper point's shift where none is configured.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", most) - base) / (high - low)
    return tokens * slope + (base - slope * low)
