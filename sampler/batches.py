"""A call's samples in batches, and the bars that count their steps.

Where the caller leaves it open, as many are denoised together as the device's free memory holds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from .models import Model

log = logging.getLogger(__name__)
ON_CPU = 16  # more bring nothing there
MOST = 64  # on a GPU: by then it has enough to do
SPARE = 0.7  # the share of the free memory that is planned with
# What a sample takes beside the weights is nearly all in the autoencoder's last block, at the picture's full size. Its widest
# tensors there have twice its first number of channels, and about so many are alive at once, convolution workspace included.
ALIVE = 6

Bar = Callable[[Sequence], Iterable]  # what the rows of a run go through


def parts(total: int, size: int) -> list[range]:
    """`total` samples, at most `size` at a time."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


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


def bar(progress: bool | Callable[[float], None], part: int, parts: int) -> Bar:
    """A bar for the rows of one part of the work, or what tells `progress` of them."""
    if not callable(progress):
        of = f" {part + 1}/{parts}" if parts > 1 else ""
        return partial(tqdm, desc=f"sampling{of}", unit="step", disable=not progress, file=sys.stderr)

    def told(rows: Sequence) -> Iterable:
        for k, row in enumerate(rows, 1):
            yield row
            progress((part + k / len(rows)) / parts)

    return told
