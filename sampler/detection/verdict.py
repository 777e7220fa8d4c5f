"""Verdicts on finished pictures, given as latents or as pictures of any sizes, which the autoencoder encodes.

`basin_score` has the score and says what is suspect; `guidance.guard` has the thresholds without a calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import checks
from ..data.pictures import opened, pixels
from ..models import Model, memory
from ..runs.batch_retry import parts
from ..types import Scheduler
from . import basin_score

Size = tuple[int | None, int | None]
KINDS = "a PIL image, an array (height, width, 3), or a tensor (3, height, width)"
VIDEOS = "a list of PIL images, an array (frames, height, width, 3), or a tensor (frames, 3, height, width)"


@dataclass
class Verdict:
    """The verdict on B finished pictures.

    score: (B,) float32, the basin score. suspect: (B,) bool, the score is above the threshold, or NaN.
    """

    score: Tensor
    suspect: Tensor


@dataclass(frozen=True)
class Lot:
    """Pictures that are judged together, because they have the same size (height, width) and options.

    rows: their indices among all pictures. latents: makes the latents of the pictures at given indices.
    """

    rows: list[int]
    size: tuple[int, int]
    options: dict[str, Any]
    latents: Callable[[Sequence[int]], Tensor]


def judge(
    model: Model,
    scheduler: Scheduler,
    images: Any,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    threshold: float,
    probes: int,
    negative_prompt: str | Sequence[str | None] | None,
    size: Size,
    batch_size: int | None,
    options: dict[str, Any],
) -> Verdict:
    """`Sampler.judge`, to be called in inference mode. size: (height, width); None: the pictures' own."""
    images = [images] if isinstance(images, Image.Image) else images
    try:
        total = len(images)
    except TypeError as error:
        given = f"a {type(images).__name__}"
        raise ValueError(f"images must be latents, or pictures in a list, an array or a tensor; got {given}") from error
    texts = checks.texts("prompts", prompts)
    texts = texts * total if isinstance(prompts, str) else texts
    if len(texts) != total:
        raise ValueError(f"prompts must be one for each of {total} pictures, or one for all; got {len(texts)}")
    seeds = checks.seeds(seeds, total)
    negative = checks.one_each("negative_prompt", negative_prompt, total) or [None] * total
    count, threshold = checks.at_least_one("probes", probes), checks.finite("threshold", threshold)
    most = None if batch_size is None else checks.at_least_one("batch_size", batch_size)
    probe, score, each = basin_score.Probe.of(scheduler), torch.empty(total), model.per_prompt(options, total)
    for lot in lots(model, images, size, options):
        own = {name: x[lot.rows] if isinstance(x, Tensor) else [x[i] for i in lot.rows] for name, x in each.items()}
        encoded = model.encode([texts[i] for i in lot.rows], *lot.size, 1, [negative[i] for i in lot.rows], **lot.options | own)
        for part in parts(len(lot.rows), most or memory.batch_size(model, *lot.size)):
            rows = [lot.rows[k] for k in part]
            predict = partial(basin_score.both, model.network(encoded.select(part), plain=True))
            latents = lot.latents(rows).to(model.device, model.dtype)
            score[rows] = basin_score.scores(predict, probe, latents, [seeds[i] for i in rows], count)
    with torch.inference_mode(False):
        score = score.clone()
        return Verdict(score, basin_score.suspects(score, threshold))


def lots(model: Model, images: Any, size: Size, options: dict[str, Any]) -> list[Lot]:
    """Group the pictures into lots. Raises ValueError for images that are neither the model's latents nor pictures."""
    shape = None
    if isinstance(images, Tensor):
        own = model.size(*size)
        shape = model.shape(*own, **options)
        if images.shape[1:] == shape:
            return [Lot(list(range(len(images))), own, options, lambda rows: images[list(rows)])]
    video = "num_frames" in model.options
    try:
        found = [tuple(picture(image, f"images[{i}]", video).shape[1:]) for i, image in enumerate(images)]
    except ValueError as error:
        raise ValueError(f"{error}; latents must have the shape {(len(images), *shape)}" if shape else str(error)) from error
    made: dict[tuple, Lot] = {}
    for i, (*frames, height, width) in enumerate(found):
        wanted = model.size(*size) if any(size) else (height, width)
        fitting = model.nearest_size(*wanted, **options)
        framed = options | ({"num_frames": frames[0]} if video else {})
        model.shape(*fitting, **framed)  # raises for a number of frames that the model cannot make
        latents = partial(_encoded, model, images, fitting, video)
        made.setdefault((fitting, *frames), Lot([], fitting, framed, latents)).rows.append(i)
    return list(made.values())


def _encoded(model: Model, images: Any, size: tuple[int, int], video: bool, rows: Sequence[int]) -> Tensor:
    found = [fitted(picture(images[i], f"images[{i}]", video), *size).to(model.device) for i in rows]
    return model.encode_pictures(torch.stack(found))


def picture(image: Any, name: str, video: bool = False) -> Tensor:
    """A picture (3, height, width), or a video (3, frames, height, width), float32 in -1..1. name: its name in error messages.

    image: one of KINDS, or of VIDEOS if `video`, with floats in 0..1 or bytes. Raises ValueError for anything else.
    """
    if video and isinstance(image, list | tuple) and image:
        frames = [picture(frame, f"{name}[{k}]") for k, frame in enumerate(image)]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError(f"{name} must have frames of one size")
        return torch.stack(frames, dim=1)
    if isinstance(image, Image.Image) and not video:
        return pixels([opened(image, name)])[0]
    if isinstance(image, np.ndarray):
        found = torch.from_numpy(np.array(image))  # a copy, because an array backed by a file may be read-only
        found = found.movedim(-1, -3) if found.ndim > 2 else found
    else:
        found = image
    kinds = VIDEOS if video else KINDS
    if not isinstance(found, Tensor) or found.ndim != 3 + video or found.shape[-3] != 3 or not found.numel():
        shape = f"{type(image).__name__} of shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise ValueError(f"{name} must be {kinds}, got {shape}")
    if found.dtype == torch.uint8:
        found = found.float() / 255
    elif not found.is_floating_point() or bool(((found < 0) | (found > 1)).any()):
        low, high = (bound.item() for bound in found.double().aminmax())
        raise ValueError(f"{name} must have floats in 0..1, or bytes; got {found.dtype} from {low:g} to {high:g}")
    found = found.float() * 2 - 1
    return found.movedim(0, 1) if video else found


def fitted(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture (3, ..., h, w) in another size: it is resized until it covers that size, then cropped at its centre."""
    h, w = picture.shape[-2:]
    if (h, w) == (height, width):
        return picture
    larger = max(height / h, width / w)
    whole = max(height, round(larger * h)), max(width, round(larger * w))
    frames = picture if picture.ndim == 4 else picture[None]
    resized = F.interpolate(frames, whole, mode="bicubic", antialias=True).clamp(-1, 1).view(*picture.shape[:-2], *whole)
    top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
    return resized[..., top : top + height, left : left + width]
