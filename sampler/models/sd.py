"""Stable Diffusion 1.x and 2.x. What the pipeline has a method for is done by that method."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..arguments import whole
from .base import Decoded, Encoded
from .precision import HALF, in_float32
from .unet import GuidedUNet, Networks, memory_format

log = logging.getLogger(__name__)
ATTENTION = ("sdpa", "xformers")


class StableDiffusion:
    """A StableDiffusionPipeline as a `Model`. compile, lean: as for `Networks`."""

    texts = ("prompt_embeds", "negative_prompt_embeds")  # what stands for prompts, or goes with them
    images = ("ip_adapter_image", "ip_adapter_image_embeds")
    options = frozenset((*texts, *images, "clip_skip", "cross_attention_kwargs"))
    encoders = (("text_encoder", "tokenizer"),)
    last_layer = 1  # the text is read that many layers from the end, counting back from the last one's result

    def __init__(self, pipe: DiffusionPipeline, compile: bool = False, lean: bool = False):
        self.pipe = pipe
        self._networks = Networks(compile, lean)
        self._live = False
        self._overflowed = False

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    @property
    def half(self) -> bool:
        return any(part.dtype in HALF for part in self.pipe.components.values() if isinstance(part, nn.Module))

    @property
    def memory_format(self) -> torch.memory_format:
        return memory_format(self.pipe.unet)

    def check(self) -> None:
        config = self.pipe.unet.config
        if config.time_cond_proj_dim is not None:
            raise ValueError(
                "pipe is distilled: its network takes the guidance scale as an input, so there are no two predictions to merge"
            )
        if config.in_channels != self.pipe.vae.config.latent_channels:
            raise ValueError(
                f"pipe's network takes {config.in_channels} channels and its latents have "
                f"{self.pipe.vae.config.latent_channels}: it is not text-to-image"
            )

    def set_attention(self, attention: str) -> None:
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        if attention == "xformers":
            if self.device.type != "cuda":
                raise ValueError(f"attention 'xformers' runs on CUDA only, and the pipeline is on {self.device}; use 'sdpa'")
            try:
                self.pipe.enable_xformers_memory_efficient_attention()
            except ModuleNotFoundError as error:
                raise ImportError(
                    "attention 'xformers' needs the package xformers: pip install 'basinescape[xformers]'"
                ) from error

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        factor, sample = self.pipe.vae_scale_factor, self.pipe.unet.config.sample_size
        own = sample if isinstance(sample, (tuple, list)) else (sample, sample)
        found = []
        for name, pixels, default in zip(("height", "width"), (height, width), own, strict=True):
            if pixels is None and default is None:
                raise ValueError(f"{name} must be given: the network's configuration names no sample_size")
            number = factor * default if pixels is None else whole(pixels)
            if number is None or number < 1 or number % factor:
                raise ValueError(f"{name} must be a multiple of {factor} pixels, got {pixels!r}")
            found.append(number)
        return found[0], found[1]

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        return self.pipe.unet.config.in_channels, height // factor, width // factor

    def encode(
        self,
        prompts: list[str] | None,
        height: int,
        width: int,
        count: int = 1,
        negative_prompt: Sequence[str | None] | None = None,
        **options: Any,
    ) -> Encoded:
        options = {name: value for name, value in options.items() if value is not None}
        self._check(prompts, negative_prompt, options)
        kwargs = options.get("cross_attention_kwargs")
        try:
            with _final_norm_found(self.pipe.text_encoder):
                encoded = self.pipe.encode_prompt(
                    prompt=prompts,
                    device=self.device,
                    num_images_per_prompt=count,
                    do_classifier_free_guidance=True,
                    negative_prompt=None if negative_prompt is None else [text or "" for text in negative_prompt],
                    lora_scale=None if kwargs is None else kwargs.get("scale"),
                    **{name: options[name] for name in (*self.texts, "clip_skip") if name in options},
                )
        except (AttributeError, TypeError) as error:
            missing = [part for pair in self.encoders for part in pair if getattr(self.pipe, part, None) is None]
            if not missing:
                raise
            raise ValueError(
                f"pipe has no {' and no '.join(missing)} to read a prompt with: give prompt_embeds and the like"
            ) from error
        absent = [negative_prompt is None or negative_prompt[i // count] is None for i in range(len(encoded[0]))]
        inputs = self._inputs(encoded, absent, height, width, options)
        if any(name in options for name in self.images):
            image, embeds = (options.get(name) for name in self.images)
            embeds = self.pipe.prepare_ip_adapter_image_embeds(image, embeds, self.device, len(encoded[0]), True)
            inputs.setdefault("added_cond_kwargs", {})["image_embeds"] = embeds
        shared = {} if kwargs is None else {"cross_attention_kwargs": kwargs}
        truncated = self._truncated(prompts, options) if prompts else [""] * (len(encoded[0]) // count)
        return Encoded(self._cast(inputs), shared, [text for text in truncated for _ in range(count)])

    def _inputs(self, encoded: tuple[Tensor, ...], absent: list[bool], height: int, width: int, options: dict) -> dict:
        """The UNet's arguments by sample; absent: the samples without a negative prompt."""
        cond, uncond = encoded
        return {"encoder_hidden_states": torch.cat([uncond, cond])}

    def _check(self, prompts: list[str] | None, negative: Sequence[str | None] | None, options: dict[str, Any]) -> None:
        unknown = sorted(set(options) - self.options)
        if unknown:
            takes = ", ".join(sorted(self.options))
            raise ValueError(f"{', '.join(unknown)}: no option of {type(self.pipe).__name__}, whose options are {takes}")
        self.pipe.check_inputs(
            prompt=prompts,
            height=8,
            width=8,
            callback_steps=None,
            negative_prompt=None if negative is None else list(negative),
            **{name: options.get(name) for name in (*self.texts, *self.images)},
        )
        skip = options.get("clip_skip")
        if skip is not None:
            layers = [
                getattr(self.pipe, part).config.num_hidden_layers for part, _ in self.encoders if getattr(self.pipe, part)
            ]
            most = min(layers, default=0) + 1 - self.last_layer
            if whole(skip) is None or not 0 <= skip <= most:
                raise ValueError(f"clip_skip must be a whole number from 0 to {most}, got {skip!r}")
        if not isinstance(options.get("cross_attention_kwargs", {}), dict):
            raise ValueError(f"cross_attention_kwargs must be a dict, got {options['cross_attention_kwargs']!r}")
        adapter = self.pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
        if adapter and not any(name in options for name in self.images):
            raise ValueError(f"pipe has an IP-Adapter loaded: give {' or '.join(self.images)}, or unload_ip_adapter() first")
        if not adapter and any(name in options for name in self.images):
            raise ValueError(f"{' and '.join(self.images)} need an IP-Adapter, and pipe has none: load_ip_adapter() first")

    def _truncated(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        """What each prompt loses at the limit of the text encoder, by the first tokenizer that cuts it."""
        cut = [""] * len(prompts)
        for i, (_, name) in enumerate(self.encoders):
            tokenizer = getattr(self.pipe, name, None)
            if tokenizer is None:
                continue
            texts = options.get("prompt_2") or prompts if i else prompts
            texts = self.pipe.maybe_convert_prompt([texts] if isinstance(texts, str) else list(texts), tokenizer)
            limit = tokenizer.model_max_length
            for k, ids in enumerate(tokenizer(texts, truncation=False, verbose=False).input_ids):
                cut[k] = cut[k] or tokenizer.decode(ids[limit - 1 : -1]).strip()
        return cut

    def _cast(self, value: Any) -> Any:
        """To the network's device and dtype, whatever the text encoder's."""
        if isinstance(value, dict):
            return {name: self._cast(inner) for name, inner in value.items()}
        return [self._cast(inner) for inner in value] if isinstance(value, list) else value.to(self.device, self.dtype)

    def network(self, encoded: Encoded, plain: bool = False) -> GuidedUNet:
        unet = self.pipe.unet
        if self._live or encoded.shared:  # arguments of somebody's own: neither recorded nor compiled into a network
            return GuidedUNet(unet, encoded.inputs, shared=encoded.shared)
        return (self._networks.plain if plain else self._networks.fast)(unet, encoded.inputs)

    def decode(self, latents: Tensor, output: str, generators: list[torch.Generator] | None = None) -> Decoded:
        """As the pipeline does, its safety checker and watermark included.

        Where an autoencoder in half precision overflows, the picture is decoded again in float32.
        """
        pipe, vae = self.pipe, self.pipe.vae
        with in_float32([vae]) if self._upcast() else nullcontext():
            pixels = self._pixels(latents.to(vae.dtype), generators)
        finite = _finite(pixels)
        again = _finite(latents) & ~finite if vae.dtype in HALF else finite & False
        if again.any():
            if not self._overflowed:
                log.warning("the autoencoder overflows in %s: such pictures are decoded again in float32", vae.dtype)
                self._overflowed = True
            drawn = None if generators is None else [generators[i] for i in again.nonzero()[:, 0].tolist()]
            with in_float32([vae]):
                pixels[again] = self._pixels(latents[again].float(), drawn).to(pixels.dtype)
            finite = _finite(pixels)
        flagged = None
        if getattr(pipe, "safety_checker", None) is not None:
            pixels, flagged = pipe.run_safety_checker(pixels, self.device, pipe.safety_checker.dtype)
        if getattr(pipe, "watermark", None) is not None:
            pixels = pipe.watermark.apply_watermark(pixels)
        denormalize = None if flagged is None else [not flag for flag in flagged]
        images = pipe.image_processor.postprocess(pixels, output_type=output, do_denormalize=denormalize)
        return Decoded(images, finite.cpu(), None if flagged is None else [bool(flag) for flag in flagged])

    def _upcast(self) -> bool:
        """Whether the pipeline itself decodes in float32."""
        return False

    def _pixels(self, latents: Tensor, generators: list[torch.Generator] | None) -> Tensor:
        vae = self.pipe.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False, generator=generators)[0]

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        live, self._live = self._live, True
        try:
            with in_float32(part for part in self.pipe.components.values() if isinstance(part, nn.Module)):
                yield
        finally:
            self._live = live


@contextmanager
def _final_norm_found(encoder: nn.Module | None) -> Iterator[None]:
    """diffusers' `clip_skip` asks for `text_model.final_layer_norm`, which is the encoder's own since transformers 5."""
    places = {} if encoder is None or hasattr(encoder, "text_model") else vars(encoder)
    places["text_model"] = encoder
    try:
        yield
    finally:
        del places["text_model"]


def _finite(values: Tensor) -> Tensor:
    """(B,) bool, whether all of a sample's values (B, ...) are finite."""
    return values.isfinite().flatten(1).all(dim=1)
