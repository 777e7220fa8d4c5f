"""What all adapters share: checks, text, decoding. Each adapter's own file adds what its pipeline does differently."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..checks import whole_number
from ..schedulers.schedule import Schedule
from ..types import Settle, draw
from .base import Decoded, Encoded, Pixels, Request
from .network import Guided, Networks
from .precision import HALF, in_float32

log = logging.getLogger(__name__)
ATTENTION = ("sdpa", "xformers")


class Adapter:
    """A diffusers pipeline as a `Model`. compile, lean: see `Networks`."""

    network_name: str  # of the pipeline's part that is the network
    guided: type[Guided]
    texts: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")  # options that `encode_prompt` takes as they are
    options: frozenset[str]  # all options of `encode`
    scale = "guidance_scale"  # the argument of the pipeline's call that is the guidance scale
    kwargs = ""  # the option that the network gets as it is; "" for none
    encoders: tuple[tuple[str, str], ...]  # the parts that read a prompt: (text encoder, tokenizer) each
    closing = 1  # how many tokens end each text; a text that is cut keeps them
    last_layer = 1  # which of the text encoder's layers is read, counted from the end: 1 is the last
    settle: Settle | None = None

    def __init__(self, pipe: DiffusionPipeline, compile: bool = False, lean: bool = False):
        self.pipe: Any = pipe  # diffusers declares no attributes for a pipeline's parts
        self._networks = Networks(self.guided, compile, lean)
        self._live = False
        self._overflowed = False

    @property
    def net(self) -> Any:
        return getattr(self.pipe, self.network_name)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.dtype

    @property
    def half(self) -> bool:
        return any(part.dtype in HALF for part in self.pipe.components.values() if isinstance(part, nn.Module))

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.contiguous_format

    def check(self) -> None:
        raise NotImplementedError

    def _check_channels(self, taken: int, latent: int) -> None:
        if taken != latent:
            raise ValueError(f"pipe's network takes {taken} channels and its latents have {latent}: it is not text-to-image")

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

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.pipe.vae_scale_factor

    @property
    def own_size(self) -> tuple[int, int] | None:
        """The default (height, width) in pixels; None where the pipeline has none."""
        raise NotImplementedError

    def size(self, height: Pixels = None, width: Pixels = None) -> tuple[int, int]:
        own = self.own_size or (None, None)
        found = []
        for name, pixels, default in zip(("height", "width"), (height, width), own, strict=True):
            if pixels is None and default is None:
                raise ValueError(f"{name} must be given: the network's configuration names no sample_size")
            number = default if pixels is None else whole_number(pixels)
            if number is None or number < 1 or number % self.multiple:
                raise ValueError(f"{name} must be a multiple of {self.multiple} pixels, got {pixels!r}")
            found.append(number)
        return found[0], found[1]

    @property
    def own_steps(self) -> int:
        return self._default("num_inference_steps")

    @property
    def own_scale(self) -> float:
        return float(self._default(self.scale))

    def _default(self, name: str) -> Any:
        return inspect.signature(type(self.pipe).__call__).parameters[name].default

    def shape(self, height: int, width: int, **options: Any) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        return self.net.config.in_channels, height // factor, width // factor

    def noise(self, generators: Sequence[torch.Generator], height: int, width: int, **options: Any) -> Tensor:
        return draw(self.shape(height, width, **options), generators)

    def scheduled(
        self, schedule: Schedule, scheduler: Any, height: Pixels = None, width: Pixels = None, **options: Any
    ) -> Schedule:
        return schedule

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
        prompted = len(options["prompt_embeds"] if prompts is None else prompts)
        negative = [None] * prompted if negative_prompt is None else negative_prompt
        request = Request(prompts, list(negative), count, height, width, options)
        try:
            inputs, shared = self._encoded(request)
        except (AttributeError, TypeError) as error:
            missing = [part for pair in self.encoders for part in pair if getattr(self.pipe, part, None) is None]
            if not missing:
                raise
            raise ValueError(
                f"pipe has no {' and no '.join(missing)} to read a prompt with: give prompt_embeds and the like"
            ) from error
        cut = self._truncated(prompts, options) if prompts else [""] * prompted
        truncated = [text for text in cut for _ in range(count)]
        return Encoded(self._cast(inputs), self._cast(shared), request.get(self.kwargs), truncated)

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        """`inputs` and `shared` of the `Encoded`."""
        raise NotImplementedError

    def _lora_scale(self, request: Request) -> float | None:
        return request.options.get(self.kwargs, {}).get("scale")

    def _check(self, prompts: list[str] | None, negative: Sequence[str | None] | None, options: dict[str, Any]) -> None:
        unknown = sorted(set(options) - self.options)
        if unknown:
            takes = ", ".join(("height", "width", *sorted(self.options)))
            raise ValueError(f"{', '.join(unknown)}: no option of {type(self.pipe).__name__}, whose options are {takes}")
        side = 16 * self.multiple  # a size that passes: the size of the run has been checked
        given: dict[str, Any] = {"prompt": prompts, "negative_prompt": None if negative is None else list(negative)}
        given |= {"height": side, "width": side, "callback_steps": 1, **options}
        known = inspect.signature(self.pipe.check_inputs).parameters.values()
        required = {parameter.name: None for parameter in known if parameter.default is inspect.Parameter.empty}
        names = {parameter.name for parameter in known}
        self.pipe.check_inputs(**(required | {name: value for name, value in given.items() if name in names}))
        skip = options.get("clip_skip")
        if skip is not None:
            layers = [
                getattr(self.pipe, part).config.num_hidden_layers for part, _ in self.encoders if getattr(self.pipe, part)
            ]
            most = min(layers, default=0) + 1 - self.last_layer
            if whole_number(skip) is None or not 0 <= skip <= most:
                raise ValueError(f"clip_skip must be a whole number from 0 to {most}, got {skip!r}")
        if not isinstance(options.get(self.kwargs, {}), dict):
            raise ValueError(f"{self.kwargs} must be a dict, got {options[self.kwargs]!r}")
        for name in {"prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"} & set(options):
            if prompts is not None and isinstance(options[name], list) and len(options[name]) != len(prompts):
                raise ValueError(f"{name} has {len(options[name])} entries for {len(prompts)} prompts")

    def _readers(self, prompts: list[str], options: dict[str, Any]) -> Iterator[tuple[Any, list[str], int]]:
        """For each tokenizer that reads for the network: itself, what it reads, and its limit in tokens."""
        for i, (_, name) in enumerate(self.encoders, 1):
            tokenizer = getattr(self.pipe, name, None)
            if tokenizer is not None:
                yield tokenizer, options.get(f"prompt_{i}") or prompts, tokenizer.model_max_length

    def _truncated(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        """What each prompt loses at the text encoder's limit. The first tokenizer that cuts it decides."""
        cut = [""] * len(prompts)
        for tokenizer, texts, limit in self._readers(prompts, options):
            texts = [texts] if isinstance(texts, str) else list(texts)
            if hasattr(self.pipe, "maybe_convert_prompt"):
                texts = self.pipe.maybe_convert_prompt(texts, tokenizer)
            for k, ids in enumerate(tokenizer(texts, truncation=False, verbose=False).input_ids):
                cut[k] = cut[k] or tokenizer.decode(ids[limit - self.closing : len(ids) - self.closing]).strip()
        return cut

    def _cast(self, value: Any) -> Any:
        """Tensors on the network's device, those of floating point in its dtype."""
        if isinstance(value, dict):
            return {name: self._cast(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._cast(inner) for inner in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.net.dtype if value.is_floating_point() else value.dtype)

    def network(self, encoded: Encoded, plain: bool = False) -> Guided:
        if self._live or encoded.own:  # replaced weights, or the caller's arguments: run the network as it is
            return self.guided(self.net, encoded.inputs, shared={**encoded.shared, **encoded.own})
        return (self._networks.plain if plain else self._networks.fast)(self.net, encoded.inputs, encoded.shared)

    def decode(
        self,
        latents: Tensor,
        output: str,
        generators: list[torch.Generator] | None = None,
        height: Pixels = None,
        width: Pixels = None,
        **options: Any,
    ) -> Decoded:
        """Decode as the pipeline does, with its safety checker and watermark.

        Where an autoencoder in half precision overflows, it decodes again in float32.
        """
        pipe = self.pipe
        unpacked = self.unpacked(latents, height, width, options)

        def decoded(some: Tensor, rows: Sequence[int]) -> Tensor:
            return self._pixels(some, None if generators is None else [generators[i] for i in rows])

        pixels = self._through(decoded, unpacked)
        finite, flagged = _finite(pixels), None
        if getattr(pipe, "safety_checker", None) is not None:
            pixels, flagged = pipe.run_safety_checker(pixels, self.device, pipe.safety_checker.dtype)
        if getattr(pipe, "watermark", None) is not None:
            pixels = pipe.watermark.apply_watermark(pixels)
        images = self._pictures(self._cropped(pixels, height, width, options), output, flagged)
        return Decoded(images, finite.cpu(), None if flagged is None else [bool(flag) for flag in flagged])

    def unpacked(self, latents: Tensor, height: Pixels, width: Pixels, options: dict[str, Any]) -> Tensor:
        """The latents (B, ...) in the autoencoder's layout, not yet in its scale."""
        return latents

    def nearest_size(self, height: int, width: int, **options: Any) -> tuple[int, int]:
        return self._rounded(height), self._rounded(width)

    def _rounded(self, pixels: float) -> int:
        return max(1, round(pixels / self.multiple)) * self.multiple

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        latents = self._through(lambda some, rows: self._latents(some), pictures.to(self.device))
        return self._packed(latents).to(self.dtype)

    def _latents(self, pictures: Tensor) -> Tensor:
        """The reverse of `_pixels`: latents in the network's scale, of pictures in -1..1."""
        raise NotImplementedError

    def _packed(self, latents: Tensor) -> Tensor:
        """The reverse of `unpacked`."""
        return latents

    def _upcast(self) -> bool:
        """Whether the pipeline itself decodes in float32."""
        return False

    def _through(self, run: Callable[[Tensor, Sequence[int]], Tensor], values: Tensor) -> Tensor:
        """What `run` makes of values (B, ...) with the autoencoder. It runs again in float32 for those that overflow in half.

        run: takes some of the values, and their places in the batch.
        """
        vae = self.pipe.vae
        with in_float32([vae]) if self._upcast() else nullcontext():
            made = run(values.to(vae.dtype), range(len(values)))
        again = _finite(values) & ~_finite(made)
        if vae.dtype in HALF and again.any():
            if not self._overflowed:
                log.warning("the autoencoder overflows in %s: it takes such pictures again in float32", vae.dtype)
                self._overflowed = True
            with in_float32([vae]):
                made[again] = run(values[again].float(), again.nonzero()[:, 0].tolist()).to(made.dtype)
        return made

    def _pixels(self, latents: Tensor, generators: list[torch.Generator] | None) -> Tensor:
        """Pictures from unpacked latents."""
        raise NotImplementedError

    def _cropped(self, pixels: Tensor, height: Pixels, width: Pixels, options: dict[str, Any]) -> Tensor:
        """The pictures, cut to the size that was asked for."""
        return pixels

    def _pictures(self, pixels: Tensor, output: str, flagged: Sequence[Any] | None) -> Any:
        denormalize = None if flagged is None else [not flag for flag in flagged]
        return self.pipe.image_processor.postprocess(pixels, output_type=output, do_denormalize=denormalize)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        live, self._live = self._live, True
        try:
            with in_float32(part for part in self.pipe.components.values() if isinstance(part, nn.Module)):
                yield
        finally:
            self._live = live


def most_likely(vae: Any, pictures: Tensor) -> Tensor:
    """The pictures' latents in the autoencoder's scale: the mode, where it gives a distribution."""
    made = vae.encode(pictures)
    return made.latents if hasattr(made, "latents") else made.latent_dist.mode()


def _finite(values: Tensor) -> Tensor:
    """(B,) bool: whether all of a sample's values, (B, ...), are finite."""
    return values.isfinite().flatten(1).all(dim=1)
