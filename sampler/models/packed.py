"""What Flux and Qwen-Image share: latents packed 2 x 2 into tokens, (B, tokens, 4 C)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedulers.schedule import Schedule
from ..types import draw
from .autoencoding import Pixels
from .transformer import PromptedTransformer, Transformer, shift


class PromptedPacked(PromptedTransformer):
    """A transformer that takes the time as 0..1, rounded to the latents' dtype."""

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return PromptedTransformer.predict(net, latents, timesteps.to(latents.dtype) / 1000, inputs)


class Packed(Transformer):
    """The adapter of a pipeline whose transformer takes packed latents."""

    guided = PromptedPacked
    scale = "true_cfg_scale"

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels

    @property
    def multiple(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return height // self.multiple, width // self.multiple

    def shape(self, height: int, width: int, **options: Any) -> tuple[int, ...]:
        rows, columns = self._grid(height, width)
        return rows * columns, self.net.config.in_channels

    def noise(self, generators: Sequence[torch.Generator], height: int, width: int, **options: Any) -> Tensor:
        rows, columns = self._grid(height, width)
        shape = self.net.config.in_channels // 4, 2 * rows, 2 * columns
        return self.pipe._pack_latents(draw(shape, generators), len(generators), *shape)

    def scheduled(
        self, schedule: Schedule, scheduler: Any, height: Pixels = None, width: Pixels = None, **options: Any
    ) -> Schedule:
        config, tokens = scheduler.config, self.shape(*self.size(height, width))[0]
        given = schedule.sigmas is not None or schedule.timesteps is not None
        takes = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if takes and not given and not config.get("use_flow_sigmas"):
            schedule = replace(schedule, sigmas=tuple(np.linspace(1.0, 1 / schedule.steps, schedule.steps).tolist()))
        if schedule.mu is None and config.get("use_dynamic_shifting"):
            schedule = replace(schedule, mu=shift(config, tokens, 1.15))
        return schedule

    def unpacked(self, latents: Tensor, height: Pixels, width: Pixels, options: dict[str, Any]) -> Tensor:
        return self.pipe._unpack_latents(latents, *self.size(height, width), self.pipe.vae_scale_factor)

    def _packed(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents.contiguous(), *latents.shape[:2], *latents.shape[-2:])
