"""How many samples the free memory of a device holds at once."""

from __future__ import annotations

import logging

import torch

from .base import Model

log = logging.getLogger(__name__)
ON_CPU = 16  # more bring nothing there
MOST = 64  # on a GPU: by then it has enough to do
SPARE = 0.7  # the share of the free memory that is planned with
# What a sample takes beside the weights is nearly all in the autoencoder's last block, at the picture's full size. Its widest
# tensors there have twice its first number of channels, and about so many are alive at once, convolution workspace included.
ALIVE = 6


def size(model: Model, height: int, width: int) -> int:
    """The number of samples of so many pixels that one batch should have."""
    if model.device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    fitting = int(SPARE * free / sample_bytes(model, height, width))
    found = min(MOST, 2 ** (max(1, fitting).bit_length() - 1))  # few shapes: each is compiled or captured anew
    log.debug("%.1f GiB are free: %d samples of %d x %d at once", free / 2**30, found, width, height)
    return found


def sample_bytes(model: Model, height: int, width: int) -> int:
    """About what one sample takes at most, weights not counted."""
    config = model.pipe.vae.config  # a video model's names its base alone
    channels = 2 * (config.block_out_channels[0] if "block_out_channels" in config else config.base_dim)
    return ALIVE * height * width * channels * model.pipe.vae.dtype.itemsize
