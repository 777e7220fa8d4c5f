"""What the adapters of diffusion transformers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, most_likely
from .network import Guided


class GuidedTransformer(Guided):
    """A transformer of diffusers with the encoded prompts of one batch."""

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return net(latents, timestep=timesteps, **inputs, return_dict=False)[0]


class Transformer(Adapter):
    """The adapter of a pipeline whose network is its `transformer`."""

    network_name = "transformer"
    guided = GuidedTransformer

    def check(self) -> None:
        if getattr(self.net, "is_cache_enabled", False):
            raise ValueError(
                "pipe's transformer caches from step to step, which does not work on a batch of both halves: disable_cache() it"
            )
        self._check_channels(self.net.config.in_channels, self.latent_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the autoencoder makes."""
        return self.pipe.vae.config.latent_channels

    @property
    def own_size(self) -> tuple[int, int] | None:
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def _pixels(self, latents: Tensor, generators: list[torch.Generator] | None) -> Tensor:
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor
        return vae.decode(latents if self._shift is None else latents + self._shift, return_dict=False)[0]

    def _latents(self, pictures: Tensor) -> Tensor:
        latents = most_likely(self.pipe.vae, pictures)
        return (latents if self._shift is None else latents - self._shift) * self.pipe.vae.config.scaling_factor

    @property
    def _shift(self) -> float | None:
        return self.pipe.vae.config.shift_factor


def shift(config: Any, tokens: int, most: float) -> float:
    """The mu of a scheduler with dynamic shifting, on a line through two configured points.

    tokens: of the picture.
    most:   the shift of the upper point where the configuration has none.

    Esser et al., https://arxiv.org/abs/2403.03206, section 5.3.2.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", most) - base) / (high - low)
    return tokens * slope + (base - slope * low)
