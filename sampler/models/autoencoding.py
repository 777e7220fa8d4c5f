"""Decodes a model's latents to pictures, and encodes pictures to latents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .precision import HALF, in_float32

log = logging.getLogger(__name__)
Pixels = int | None  # a height or a width; None: the model's own
Generators = list[torch.Generator] | None  # one a sample


@dataclass(frozen=True)
class Decoded:
    """Pictures of B samples.

    images:  of the kind that `output` asked for.
    finite:  (B,) bool on the CPU: whether all of a picture's pixels are finite.
    flagged: what the safety checker says of each; None without one.
    """

    images: Any
    finite: Tensor
    flagged: list[bool] | None


class Autoencoding:
    """The part of a `Model` that uses the pipeline's autoencoder."""

    upcasts = False  # whether the pipeline decodes in float32 where its autoencoder has force_upcast
    pipe: Any
    _overflowed = False

    @property
    def device(self) -> torch.device:
        """The device that the network runs on. Offloaded weights may be on another one."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents and predictions."""
        raise NotImplementedError

    def decode(
        self,
        latents: Tensor,
        output: str,
        generators: Generators = None,
        height: Pixels = None,
        width: Pixels = None,
        **options: Any,
    ) -> Decoded:
        """Pictures from latents (B, ...), as the pipeline makes them, with its safety checker and watermark.

        output: "pil", "np" or "pt". Pictures that overflow in half precision are decoded again in float32.
        """
        pipe = self.pipe
        pixels = self._through(self._pixels, self.unpacked(latents, height, width, options), generators)
        finite, flagged = _finite(pixels), None
        if getattr(pipe, "safety_checker", None) is not None:
            pixels, flagged = pipe.run_safety_checker(pixels, self.device, pipe.safety_checker.dtype)
        if getattr(pipe, "watermark", None) is not None:
            pixels = pipe.watermark.apply_watermark(pixels)
        images = self._pictures(self._cropped(pixels, height, width, options), output, flagged)
        return Decoded(images, finite.cpu(), None if flagged is None else [bool(flag) for flag in flagged])

    def unpacked(self, latents: Tensor, height: Pixels, width: Pixels, options: dict[str, Any]) -> Tensor:
        """Latents (B, ...) as the autoencoder takes them, before they are scaled."""
        return latents

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """The reverse of `decode`: latents (B, *shape) in the model's dtype. They are the mode, so they do not vary.

        pictures: (B, 3, height, width) in -1..1, for a video model (B, 3, frames, height, width), in a size that
                  `nearest_size` gives. Pictures that overflow in half precision are encoded again in float32.
        """
        latents = self._through(self._latents, pictures.to(self.device))
        return self._packed(latents).to(self.dtype)

    def _packed(self, latents: Tensor) -> Tensor:
        """The reverse of `unpacked`."""
        return latents

    def _through(self, run: Callable[..., Tensor], values: Tensor, generators: Generators = None) -> Tensor:
        """Apply `run`, which uses the autoencoder, to values (B, ...); in float32 again where half precision overflows.

        run: takes values and the generators of these samples.
        """
        vae, dtype = self.pipe.vae, self.pipe.vae.dtype  # diffusers walks through all parameters each time
        upcast = self.upcasts and dtype == torch.float16 and vae.config.force_upcast
        with in_float32([vae]) if upcast else nullcontext():
            made = run(values.to(torch.float32 if upcast else dtype), generators)
        again = _finite(values) & ~_finite(made)
        if dtype in HALF and again.any():
            if not self._overflowed:
                log.warning("the autoencoder overflows in %s: it takes such pictures again in float32", dtype)
                self._overflowed = True
            own = None if generators is None else [generators[i] for i in again.nonzero()[:, 0].tolist()]
            with in_float32([vae]):
                made[again] = run(values[again].float(), own).to(made.dtype)
        return made

    def _pixels(self, latents: Tensor, generators: Generators) -> Tensor:
        """Pictures from unpacked latents."""
        scaling, std, mean = self._scale(latents)
        return self.pipe.vae.decode(latents / (scaling / std) + mean, return_dict=False)[0]

    def _latents(self, pictures: Tensor, generators: Generators) -> Tensor:
        """The reverse of `_pixels`: the most likely latents of pictures in -1..1, in the network's scale."""
        scaling, std, mean = self._scale(pictures)
        return (most_likely(self.pipe.vae, pictures) - mean) * (scaling / std)

    def _scale(self, like: Tensor) -> tuple[float, Tensor | float, Tensor | float]:
        """(scaling, std, mean): the autoencoder reads latents / scaling * std + mean. std and mean may be per channel."""
        config = self.pipe.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return config.scaling_factor, 1.0, config.get("shift_factor") or 0.0
        mean, std = (torch.tensor(values).view(-1, *[1] * (like.ndim - 2)).to(like) for values in (mean, std))
        return config.get("scaling_factor", 1.0), std, mean

    def _cropped(self, pixels: Tensor, height: Pixels, width: Pixels, options: dict[str, Any]) -> Tensor:
        """The pictures, cut to the size that was asked for."""
        return pixels

    def _pictures(self, pixels: Tensor, output: str, flagged: Sequence[Any] | None) -> Any:
        denormalize = None if flagged is None else [not flag for flag in flagged]
        return self.pipe.image_processor.postprocess(pixels, output_type=output, do_denormalize=denormalize)


def most_likely(vae: Any, pictures: Tensor) -> Tensor:
    """Encode pictures to latents in the autoencoder's scale. If it returns a distribution, they are its mode."""
    made = vae.encode(pictures)
    return made.latents if hasattr(made, "latents") else made.latent_dist.mode()


def _finite(values: Tensor) -> Tensor:
    """(B,) bool: whether all of a sample's values, (B, ...), are finite."""
    return values.isfinite().flatten(1).all(dim=1)
