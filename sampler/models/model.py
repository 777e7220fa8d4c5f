"""The base class of all models. Each family's file overrides what its pipeline does differently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..checks import at_least_one, one_each, whole_number
from ..schedulers.schedule import Schedule
from ..types import Correction, draw
from .autoencoding import Autoencoding, Pixels
from .encoded_text import Encoded, Request
from .network import Networks, PromptedNetwork
from .precision import HALF, in_float32

ATTENTION = ("sdpa", "xformers")
# The parts of pipelines that read a prompt: (text encoder, tokenizer) each.
ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))
# An argument of diffusers' pipelines -> the argument of a sampler that means the same.
OURS = {
    "prompt": "prompts",
    "seed": "seeds",
    "generator": "seeds",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "output_type": "output",
}


class Model(Autoencoding):
    """A diffusers pipeline behind the interface that the loop uses. Each call reads the pipeline's current state.

    pipe:    the DiffusionPipeline; Any, as diffusers declares no attribute for a pipeline's parts.
    compile, lean: see `Networks`.
    options: the names that `encode` takes as `options`. `shape`, `noise` and `decode` take the same options, because some of
             them decide a size.
    correction: the model's change to a guided prediction; None for no change.
    """

    network_name: str  # the name of the pipeline's part that is the network
    guided: type[PromptedNetwork]
    texts: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")  # options that `encode_prompt` takes as they are
    options: frozenset[str]
    scale = "guidance_scale"  # the argument of the pipeline's call that is the guidance scale
    kwargs = ""  # the option that is passed to the network unchanged; "" for none
    encoders = 1  # how many of ENCODERS are needed to read a prompt, from the first on
    longest = 0  # the number in ENCODERS, from 1, of the encoder that cuts texts at max_sequence_length tokens; 0: none
    closing = 1  # how many tokens end each text; a text that is cut keeps them
    last_layer = 1  # which of the text encoder's layers is read, counted from the end: 1 is the last
    correction: Correction | None = None

    def __init__(self, pipe: DiffusionPipeline, compile: bool = False, lean: bool = False):
        self.pipe: Any = pipe
        self._networks = Networks(self.guided, compile, lean)
        self._live = False  # whether the network runs uncompiled, because `in_float32` replaces its weights

    @property
    def net(self) -> Any:
        """The pipeline's network, a module of diffusers with a `config` and a `dtype`."""
        return getattr(self.pipe, self.network_name)

    @property
    def dtype(self) -> torch.dtype:
        return self.net.dtype

    @property
    def half(self) -> bool:
        """Whether some weights are in half precision, so that `in_float32` changes something."""
        return any(part.dtype in HALF for part in self.pipe.components.values() if isinstance(part, nn.Module))

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the network's predictions."""
        return torch.contiguous_format

    def check(self) -> None:
        """Raise ValueError unless the pipeline is a text-to-image model guided by two predictions."""
        for part in (self.network_name, "vae"):
            if getattr(self.pipe, part) is None:
                raise ValueError(f"pipe has no {part}, which the sampler needs")
        if self.net.dtype == torch.float64:
            raise ValueError("pipe's network is in float64, and guidance computes in float32: use pipe.to(torch.float32)")
        taken, latent = self.net.config.in_channels, self.latent_channels
        if taken != latent:
            raise ValueError(f"pipe's network takes {taken} channels and its latents have {latent}: it is not text-to-image")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the network takes."""
        config = self.pipe.vae.config
        return config.z_dim if "z_dim" in config else config.latent_channels

    def set_attention(self, attention: str) -> None:
        """Switch to "sdpa" or "xformers", as diffusers does.

        Raises ValueError for another name or where xformers cannot run, ImportError where it is missing.
        """
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        if attention == "xformers":
            if self.device.type != "cuda":
                raise ValueError(f"attention 'xformers' runs on CUDA only, and the pipeline is on {self.device}; use 'sdpa'")
            try:
                self.pipe.enable_xformers_memory_efficient_attention()
            except ModuleNotFoundError as error:
                needed = "attention 'xformers' needs the package xformers: pip install 'basinescape[xformers]'"
                raise ImportError(needed) from error

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.pipe.vae_scale_factor

    @property
    def own_size(self) -> tuple[int, int] | None:
        """The default (height, width) in pixels; None where the pipeline has none."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def size(self, height: Pixels = None, width: Pixels = None) -> tuple[int, int]:
        """(height, width) in pixels. Raises ValueError for a size that the model cannot make."""
        return self._checked(height, width, self.multiple)

    def _checked(self, height: Pixels, width: Pixels, multiple: int) -> tuple[int, int]:
        own = self.own_size or (None, None)
        found = []
        for name, pixels, default in zip(("height", "width"), (height, width), own, strict=True):
            if pixels is None and default is None:
                raise ValueError(f"{name} must be given: the network's configuration names no sample_size")
            number = default if pixels is None else whole_number(pixels)
            if number is None or number < 1 or number % multiple:
                kind = f"multiple of {multiple}" if multiple > 1 else "whole number of"
                raise ValueError(f"{name} must be a {kind} pixels, got {pixels!r}")
            found.append(number)
        return found[0], found[1]

    @property
    def own_steps(self) -> int:
        """The number of steps that the pipeline itself takes."""
        return self._defaults["num_inference_steps"]

    @property
    def own_scale(self) -> float:
        """The guidance scale that the pipeline itself has."""
        return float(self._defaults[self.scale])

    @property
    def _defaults(self) -> dict[str, Any]:
        """The default of each argument of the pipeline's own call."""
        arguments = inspect.signature(type(self.pipe).__call__).parameters
        return {name: argument.default for name, argument in arguments.items()}

    def shape(self, height: int, width: int, **options: Any) -> tuple[int, ...]:
        """The shape of one sample's latents. Raises ValueError for options that do not fit the size."""
        factor = self.pipe.vae_scale_factor
        return self.net.config.in_channels, height // factor, width // factor

    def noise(self, generators: Sequence[torch.Generator], height: int, width: int, **options: Any) -> Tensor:
        """The initial noise, not yet scaled, (B, *shape) float32 on the CPU. Each sample's comes from its own generator."""
        return draw(self.shape(height, width, **options), generators)

    def scheduled(
        self, schedule: Schedule, scheduler: Any, height: Pixels = None, width: Pixels = None, **options: Any
    ) -> Schedule:
        """Return `schedule` with the sigmas and the shift that the pipeline itself sets at this size."""
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
        """The text of `count` samples of each prompt: all samples of the first prompt, then those of the next.

        Raises ValueError for arguments that do not fit the model or each other.
        """
        options = {name: value for name, value in options.items() if value is not None}
        self._check(prompts, negative_prompt, options)
        own = {name: value for name, value in self._defaults.items() if name in self.options and value is not None}
        prompted = len(options["prompt_embeds"] if prompts is None else prompts)
        negative = [None] * prompted if negative_prompt is None else negative_prompt
        given = own | options | self.per_prompt(options, prompted)
        request = Request(prompts, list(negative), count, height, width, given)
        try:
            inputs, shared = self._encoded(request)
        except (AttributeError, TypeError) as error:
            parts = [part for pair in ENCODERS[: self.encoders] for part in pair]
            missing = [part for part in parts if getattr(self.pipe, part, None) is None]
            if not missing:
                raise
            raise ValueError(
                f"pipe has no {' and no '.join(missing)} to read a prompt with: give prompt_embeds and the like"
            ) from error
        cut = self._truncated(prompts, request.options) if prompts else [""] * prompted
        truncated = [text for text in cut for _ in range(count)]
        inputs, shared = self._cast((inputs, shared))
        return Encoded(inputs, shared, request.get(self.kwargs), truncated)

    def encode_each(self, prompts: list[str], *, negative_prompt: Sequence[str | None], **given: Any) -> Encoded:
        """As `encode`. A text's shape and bits depend on how many prompts are encoded together, not on what the others say."""
        return self.encode(prompts, negative_prompt=negative_prompt, **given)

    def _encoded(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        """`inputs` and `shared` of the `Encoded`."""
        raise NotImplementedError

    def _lora_scale(self, request: Request) -> float | None:
        return request.options.get(self.kwargs, {}).get("scale")

    def per_prompt(self, options: dict[str, Any], prompts: int) -> dict[str, Any]:
        """The texts and embeddings among the options, one for each of `prompts` prompts; a single one is repeated.

        Raises ValueError for another number of them.
        """
        found: dict[str, Any] = {}
        for name in sorted(options.keys() & set(self.texts)):
            if not isinstance(given := options[name], Tensor):
                found[name] = one_each(name, given, prompts)
            elif len(given) in (1, prompts):
                found[name] = given.expand(prompts, *given.shape[1:])
            else:
                raise ValueError(f"{name} has {len(given)} entries for {prompts} prompts")
        return found

    def check_names(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options that the model does not have, unless they are None."""
        unknown = sorted(name for name, value in options.items() if value is not None and name not in self.options)
        if unknown:
            takes = ", ".join(("height", "width", *sorted(self.options)))
            hint = "".join(f"; say {OURS[name]} in place of {name}" for name in unknown if name in OURS)
            kind = type(self.pipe).__name__
            raise ValueError(f"{', '.join(unknown)}: no option of {kind}, whose options are {takes}{hint}")

    def _check(self, prompts: list[str] | None, negative: Sequence[str | None] | None, options: dict[str, Any]) -> None:
        self.check_names(options)
        for name in options.keys() & set(self.texts):
            if name.endswith(("_embeds", "_mask")) and not isinstance(options[name], Tensor):
                raise ValueError(f"{name} must be a tensor, got a {type(options[name]).__name__}")
        side = 16 * self.multiple  # any valid size, because the call's size is already checked
        negative = None if negative is None or all(text is None for text in negative) else list(negative)
        given: dict[str, Any] = {"prompt": prompts, "negative_prompt": negative}
        given |= {"height": side, "width": side, "callback_steps": 1, **options}
        known = inspect.signature(self.pipe.check_inputs).parameters.values()
        required = {parameter.name: None for parameter in known if parameter.default is inspect.Parameter.empty}
        names = {parameter.name for parameter in known}
        self.pipe.check_inputs(**(required | {name: value for name, value in given.items() if name in names}))
        skip = options.get("clip_skip")
        if skip is not None:
            readers = [getattr(self.pipe, part) for part, _ in ENCODERS[: self.encoders]]
            layers = [reader.config.num_hidden_layers for reader in readers if reader is not None]
            most = min(layers, default=0) + 1 - self.last_layer
            if whole_number(skip) is None or not 0 <= skip <= most:
                raise ValueError(f"clip_skip must be a whole number from 0 to {most}, got {skip!r}")
        if "max_sequence_length" in options:
            at_least_one("max_sequence_length", options["max_sequence_length"])
        if not isinstance(options.get(self.kwargs, {}), dict):
            raise ValueError(f"{self.kwargs} must be a dict, got {options[self.kwargs]!r}")

    def _truncated(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        """What each prompt loses at the text encoder's limit. The first tokenizer that cuts it decides."""
        cut = [""] * len(prompts)
        alone = self.longest and getattr(self.pipe, ENCODERS[self.longest - 1][0]) is not None
        for i in [self.longest] if alone else range(1, self.encoders + 1):
            tokenizer = getattr(self.pipe, ENCODERS[i - 1][1])
            if tokenizer is None:
                continue
            limit = options["max_sequence_length"] if alone else tokenizer.model_max_length
            given = options.get(f"prompt_{i}") or prompts
            texts = [given] if isinstance(given, str) else list(given)
            if hasattr(self.pipe, "maybe_convert_prompt"):
                texts = self.pipe.maybe_convert_prompt(texts, tokenizer)
            for k, ids in enumerate(tokenizer(texts, truncation=False, verbose=False).input_ids):
                cut[k] = cut[k] or tokenizer.decode(ids[limit - self.closing : len(ids) - self.closing]).strip()
        return cut

    def _cast(self, tree: Any) -> Any:
        """Move all tensors in nested dicts and tuples to the network's device, and floating point tensors to its dtype."""
        device, dtype = self.device, self.net.dtype  # diffusers walks through all modules each time
        return tree_map_only(Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), tree)

    def network(self, encoded: Encoded, plain: bool = False) -> PromptedNetwork:
        """Return the fastest network for `encoded`. plain: one that takes its inputs exactly as `encode` returns them."""
        if self._live or encoded.own:  # the caller's own arguments, too, need the uncompiled network
            return self.guided(self.net, encoded.inputs, shared={**encoded.shared, **encoded.own})
        return self._networks.of(self.net, encoded.inputs, encoded.shared, plain)

    def nearest_size(self, height: int, width: int, **options: Any) -> tuple[int, int]:
        """The (height, width) nearest to these that the model can make."""
        return self._rounded(height), self._rounded(width)

    def _rounded(self, pixels: float) -> int:
        return max(1, round(pixels / self.multiple)) * self.multiple

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """A context in which all parts compute in float32 from the same weights. On exit these are restored bit for bit."""
        live, self._live = self._live, True
        try:
            with in_float32(part for part in self.pipe.components.values() if isinstance(part, nn.Module)):
                yield
        finally:
            self._live = live

    def finite(self, measure: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
        """Return `measure(items)`, (n, ...). Rows that are not finite in half precision are measured again in float32."""
        values = measure(items)
        again = (~values.isfinite().flatten(1).all(dim=1)).nonzero()[:, 0].tolist() if self.half else []
        if again:
            with self.in_float32():
                values[again] = measure([items[i] for i in again])
        return values
