"""PixArt-Sigma: a masked T5, a network that also predicts a variance, pictures in the sizes of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .autoencoding import Pixels
from .encoded_text import Request
from .lean import LeanPixArt
from .transformer import PromptedTransformer, Transformer


class PromptedPixArt(PromptedTransformer):
    """A PixArtTransformer2DModel, without the channels in which it predicts a variance."""

    lean = LeanPixArt

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        return PromptedTransformer.predict(net, latents, timesteps, inputs)[:, : latents.shape[1]]


class PixArtSigma(Transformer):
    """The adapter of PixArtSigmaPipeline.

    As in diffusers, a picture is made in the nearest size that the network was trained on, then resized and cropped. The option
    use_resolution_binning=False switches that off.
    """

    guided = PromptedPixArt
    texts = (*Transformer.texts, "prompt_attention_mask", "negative_prompt_attention_mask")
    options = frozenset((*texts, "clean_caption", "max_sequence_length", "use_resolution_binning"))
    longest = 1

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.net.config.patch_size

    @property
    def own_size(self) -> tuple[int, int]:
        side = self.net.config.sample_size * self.pipe.vae_scale_factor
        return side, side

    def size(self, height: Pixels = None, width: Pixels = None) -> tuple[int, int]:
        return self._checked(height, width, 1)

    def shape(self, height: int, width: int, use_resolution_binning: bool | None = None, **options: Any) -> tuple[int, ...]:
        if use_resolution_binning and self._sizes is None:
            raise ValueError(
                f"use_resolution_binning must be left out: there are no sizes for sample_size {self.net.config.sample_size}"
            )
        return super().shape(*(self._bin(height, width, use_resolution_binning) or super().size(height, width)))

    def nearest_size(
        self, height: int, width: int, use_resolution_binning: bool | None = None, **options: Any
    ) -> tuple[int, int]:
        return self._bin(height, width, use_resolution_binning) or super().nearest_size(height, width)

    def _bin(self, height: int, width: int, wanted: bool | None) -> tuple[int, int] | None:
        """Return the training size in which a picture of this size is made; None if it is made in its own size."""
        sizes = self._sizes
        if sizes is None or wanted is False:
            return None
        return self.pipe.image_processor.classify_height_width_bin(height, width, sizes)

    @property
    def _sizes(self) -> dict[str, list[float]] | None:
        """Ratio -> (height, width) of training, for networks of this sample_size; None for other networks."""
        from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as own

        side = {32: 256, 64: 512, 128: 1024, 256: 2048}.get(self.net.config.sample_size)
        return None if side is None else getattr(own, f"ASPECT_RATIO_{side}_BIN")

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        cond, mask, uncond, negative_mask = self.pipe.encode_prompt(
            request.prompts,
            do_classifier_free_guidance=True,
            negative_prompt=[text or "" for text in request.negative],
            num_images_per_prompt=request.count,
            device=self.device,
            **request.get(*self.texts, "clean_caption", "max_sequence_length"),
        )
        return {
            "encoder_hidden_states": request.halves(uncond, cond),
            "encoder_attention_mask": request.halves(negative_mask, mask, "prompt_attention_mask"),
        }, {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    def _cropped(self, pixels: Tensor, height: Pixels, width: Pixels, options: dict[str, Any]) -> Tensor:
        return pixels if height is None else self.pipe.image_processor.resize_and_crop_tensor(pixels, width, height)
