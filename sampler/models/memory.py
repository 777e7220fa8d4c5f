"""The batch size that a device's free memory allows, and the sizes that its whole memory does not hold."""

from __future__ import annotations

import logging
import math
from typing import Any

import psutil
import torch

from .model import Model

log = logging.getLogger(__name__)
ON_CPU = 16  # on a CPU a larger batch is not faster
MOST = 64  # a larger batch does not use a GPU better
SPARE = 0.7  # the share of the free memory that is used
# A sample takes most of its memory in the autoencoder's last block, at the picture's full size. The widest tensors there have
# twice the first number of channels. About so many of them exist at once, the workspace of convolutions included.
ALIVE = 6


def batch_size(model: Model, height: int, width: int) -> int:
    """The number of samples that one batch should have. height, width: in pixels."""
    if model.device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    fitting = int(SPARE * free / sample_bytes(model, height, width))
    found = min(MOST, 2 ** (max(1, fitting).bit_length() - 1))  # few batch sizes: each is compiled or captured by itself
    log.debug("%.1f GiB are free: %d samples of %d x %d at once", free / 2**30, found, width, height)
    return found


def sample_bytes(model: Model, height: int, width: int) -> int:
    """Estimate the peak memory of one sample in bytes, without the weights."""
    config = model.pipe.vae.config  # a video autoencoder names only its base
    channels = 2 * (config.block_out_channels[0] if "block_out_channels" in config else config.base_dim)
    return ALIVE * height * width * channels * model.pipe.vae.dtype.itemsize


def check(model: Model, height: int, width: int, **options: Any) -> None:
    """Raise ValueError if one sample's latents, in float32, and its decoded picture alone exceed the device's whole memory."""
    picture = model.pipe.vae.dtype.itemsize * values(model, height, width, **options)
    least = 4 * math.prod(model.shape(height, width, **options)) + picture
    whole = torch.cuda.mem_get_info(model.device)[1] if model.device.type == "cuda" else psutil.virtual_memory().total
    if least > whole:
        raise ValueError(
            f"height {height} and width {width} are too large: latents and picture alone take {least / 2**30:,.1f} GiB, and "
            f"the device {str(model.device)!r} has {whole / 2**30:,.1f} GiB"
        )


def values(model: Model, height: int, width: int, **options: Any) -> int:
    """Return the number of values of a decoded picture: 3 for each pixel of each frame."""
    return 3 * height * width * options.get("num_frames", getattr(model, "frames", 1))
