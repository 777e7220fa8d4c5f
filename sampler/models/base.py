"""What a model is to the rest: the `Model` protocol, and what it takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..schedulers.schedule import Schedule
from ..types import Settle
from .network import Guided

Pixels = int | None  # a height or a width; None: the model's own


@dataclass(frozen=True)
class Request:
    """What `encode` was asked for.

    prompts: None where options hold embeddings instead. negative: a negative prompt or None for each prompt.
    count:   samples of each prompt. height, width: in pixels. options: the others, without those that are None.
    """

    prompts: list[str] | None
    negative: list[str | None]
    count: int
    height: int
    width: int
    options: dict[str, Any]

    def get(self, *names: str) -> dict[str, Any]:
        """Those of these options that were given."""
        return {name: self.options[name] for name in names if name in self.options}

    def halves(self, uncond: Tensor, cond: Tensor, name: str = "prompt_embeds") -> Tensor:
        """Both halves of a batch, (2 * prompts * count, ...). Each is given as a row a prompt, or as a row a sample.

        Raises ValueError, which names the argument `name`, if their shapes differ.
        """
        prompts, samples = len(self.negative), len(self.negative) * self.count
        if uncond.shape[1:] != cond.shape[1:] or not {len(uncond), len(cond)} <= {prompts, samples}:
            raise ValueError(
                f"{name} are {tuple(cond.shape)} and negative_{name} {tuple(uncond.shape)}: they must be alike, a row a prompt"
            )
        return torch.cat([half.repeat_interleave(samples // len(half), dim=0) for half in (uncond, cond)])

    @property
    def negative_texts(self) -> list[str] | None:
        """The negative prompts as a pipeline's `encode_prompt` takes them; None for none, which some tell from empty ones."""
        return None if all(text is None for text in self.negative) else [text or "" for text in self.negative]


@dataclass(frozen=True)
class Encoded:
    """The text of B samples, as the network takes it.

    inputs:    the network's keyword arguments with a row a sample: first the unconditional half, then the conditional one.
    shared:    its other keyword arguments, which are the same for every picture of one size.
    own:       keyword arguments that the caller handed through; such a call is neither captured in a CUDA graph nor compiled.
    truncated: for each sample, what the text encoder's limit cut off its prompt; "" for nothing.
    """

    inputs: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    truncated: Sequence[str] = ()

    def select(self, samples: Sequence[int]) -> Encoded:
        """Only these samples."""
        rows = [*samples, *(i + len(self.truncated) for i in samples)]
        return replace(self, inputs=_joined([self.inputs], [rows]), truncated=[self.truncated[i] for i in samples])

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """The samples of all parts, one part after the other."""
        rows = [range(len(part.truncated)) for part in parts]
        conditional = [range(len(part.truncated), 2 * len(part.truncated)) for part in parts]
        inputs = _joined([part.inputs for part in (*parts, *parts)], [*rows, *conditional])
        return replace(parts[0], inputs=inputs, truncated=[text for part in parts for text in part.truncated])


def _joined(values: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
    """The chosen rows of each value, one value after the other. The values are tensors, or like containers of tensors."""
    if isinstance(values[0], dict):
        return {name: _joined([value[name] for value in values], rows) for name in values[0]}
    if isinstance(values[0], list):
        return [_joined(inner, rows) for inner in zip(*values, strict=True)]
    return torch.cat([value[list(some)] for value, some in zip(values, rows, strict=True)])


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


class Model(Protocol):
    """A diffusers pipeline, as the loop sees it. Each call looks at the pipeline as it is then.

    pipe:    the DiffusionPipeline; Any, as diffusers declares no attribute for a pipeline's parts.
    options: the names that `encode` takes as `options`. `shape`, `noise` and `decode` get the same options, for those that
             decide a size.
    settle:  what the model does to a guided prediction; None for nothing.
    """

    pipe: Any
    options: frozenset[str]
    settle: Settle | None

    @property
    def net(self) -> Any:
        """The pipeline's network, a module of diffusers with a `config` and a `dtype`."""

    @property
    def device(self) -> torch.device:
        """Where the network runs. Offloaded weights may lie elsewhere."""

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and predictions."""

    @property
    def half(self) -> bool:
        """Whether some weights are in half precision, so that `in_float32` changes something."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the network's predictions."""

    def check(self) -> None:
        """Raise ValueError unless the pipeline is a text-to-image model guided by two predictions."""

    def set_attention(self, attention: str) -> None:
        """Switch to "sdpa" or "xformers", as diffusers does.

        Raises ValueError for another name or where xformers cannot run, ImportError where it is missing.
        """

    @property
    def own_steps(self) -> int:
        """The number of steps that the pipeline itself takes."""

    @property
    def own_scale(self) -> float:
        """The guidance scale that the pipeline itself has."""

    def unpacked(self, latents: Tensor, height: Pixels, width: Pixels, options: dict[str, Any]) -> Tensor:
        """Latents (B, ...) as the autoencoder takes them, before they are scaled."""

    def size(self, height: Pixels = None, width: Pixels = None) -> tuple[int, int]:
        """(height, width) in pixels. Raises ValueError for a size that the model cannot make."""

    def shape(self, height: int, width: int, **options: Any) -> tuple[int, ...]:
        """The shape of one sample's latents. Raises ValueError for options that do not fit the size."""

    def noise(self, generators: Sequence[torch.Generator], height: int, width: int, **options: Any) -> Tensor:
        """The initial noise, not yet scaled, (B, *shape) float32 on the CPU. Each sample's comes from its own generator."""

    def scheduled(
        self, schedule: Schedule, scheduler: Any, height: Pixels = None, width: Pixels = None, **options: Any
    ) -> Schedule:
        """`schedule`, completed with what the pipeline itself asks `scheduler` for at this size."""

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

    def network(self, encoded: Encoded, plain: bool = False) -> Guided:
        """The fastest network for `encoded`. plain: one that takes its inputs just as `encode` made them."""

    def decode(
        self,
        latents: Tensor,
        output: str,
        generators: list[torch.Generator] | None = None,
        height: Pixels = None,
        width: Pixels = None,
        **options: Any,
    ) -> Decoded:
        """Pictures from latents (B, ...). output: "pil", "np" or "pt"."""

    def nearest_size(self, height: int, width: int, **options: Any) -> tuple[int, int]:
        """The (height, width) nearest to these that the model can make."""

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """The reverse of `decode`: latents (B, *shape) in the model's dtype. They are the most likely ones, the same each time.

        pictures: (B, 3, height, width) in -1..1, for a video model (B, 3, frames, height, width), in a size that
                  `nearest_size` gives. Where an autoencoder in half precision overflows, it encodes again in float32.
        """

    def in_float32(self) -> AbstractContextManager[None]:
        """Inside, everything computes in float32 from the same weights. Afterwards the weights are back, bit for bit."""
