"""The UNet of Stable Diffusion and SDXL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .lean import LeanUNet
from .network import Guided


class GuidedUNet(Guided):
    """A UNet2DConditionModel with the encoded prompts of one batch."""

    lean = LeanUNet

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return net(latents, timesteps, **inputs, return_dict=False)[0]


def memory_format(unet: Any) -> torch.memory_format:
    """The memory format of the UNet's convolutions, and so of its predictions."""
    weight = unet.conv_in.weight
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
