"""What the loop needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ..schedulers.schedule import Schedule
from ..types import Network, Settle


@dataclass(frozen=True)
class Encoded:
    """The text of one batch as the network takes it, for B samples.

    inputs:    the network's keyword arguments, a row a sample: the unconditional half, then the conditional one.
    shared:    those that are not by sample, the same for every picture of one size.
    own:       what the caller handed through to the network; such a call is neither recorded nor compiled.
    truncated: (B) what the text encoder's limit cut off each prompt, "" for nothing.
    """

    inputs: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    truncated: Sequence[str] = ()

    def select(self, samples: Sequence[int]) -> Encoded:
        """Some samples alone."""
        rows = [*samples, *(i + len(self.truncated) for i in samples)]
        return replace(self, inputs=_joined([self.inputs], [rows]), truncated=[self.truncated[i] for i in samples])

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """The samples of several after each other."""
        rows = [range(len(part.truncated)) for part in parts]
        conditional = [range(len(part.truncated), 2 * len(part.truncated)) for part in parts]
        inputs = _joined([part.inputs for part in (*parts, *parts)], [*rows, *conditional])
        return replace(parts[0], inputs=inputs, truncated=[text for part in parts for text in part.truncated])


def _joined(values: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
    """Rows of each of several values, tensors or alike containers of tensors, after each other."""
    if isinstance(values[0], dict):
        return {name: _joined([value[name] for value in values], rows) for name in values[0]}
    if isinstance(values[0], list):
        return [_joined(inner, rows) for inner in zip(*values, strict=True)]
    return torch.cat([value[list(some)] for value, some in zip(values, rows, strict=True)])


@dataclass(frozen=True)
class Decoded:
    """Pictures of B samples.

    images: as `output` asked. finite: (B,) bool on the CPU, the pixels were. flagged: the safety checker's verdicts, None
    without one.
    """

    images: Any
    finite: Tensor
    flagged: list[bool] | None


class Model(Protocol):
    """A diffusers pipeline, as the loop sees it. Everything is looked up in the pipeline as it is at that moment.

    options: names of the arguments that `encode` takes beside those written out; `shape`, `noise` and `decode` get the same
             ones, and look for what decides a size.
    settle:  see `Plan`.
    """

    pipe: DiffusionPipeline
    options: frozenset[str]
    settle: Settle | None

    @property
    def net(self) -> nn.Module:
        """The network, among the pipeline's parts."""

    @property
    def device(self) -> torch.device:
        """Where the network runs, offloaded or not."""

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and predictions."""

    @property
    def half(self) -> bool:
        """Some of its weights are in half precision, so that `in_float32` changes something."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the network's predictions."""

    def check(self) -> None:
        """Raises ValueError unless the pipeline's parts make a text-to-image model guided by two predictions."""

    def set_attention(self, attention: str) -> None:
        """Choose "sdpa" or "xformers" through diffusers' own switch.

        Raises ValueError for another name or where xformers cannot run, ImportError where it is missing.
        """

    @property
    def own_steps(self) -> int:
        """The number of steps that the pipeline itself takes."""

    @property
    def own_scale(self) -> float:
        """The guidance scale that the pipeline itself has."""

    def unpacked(self, latents: Tensor, height: int | None, width: int | None, options: dict[str, Any]) -> Tensor:
        """Latents (B, ...) as the autoencoder takes them, but for their scale."""

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, by default the model's own. Raises ValueError for one that it cannot make."""

    def shape(self, height: int, width: int, **options: Any) -> tuple[int, ...]:
        """Of one sample's latents for a picture of so many pixels. Raises ValueError for options that do not fit them."""

    def noise(self, generators: Sequence[torch.Generator], height: int, width: int, **options: Any) -> Tensor:
        """The initial noise before its scale, each sample's from its own generator: (B, *shape) float32 on the CPU."""

    def scheduled(
        self,
        schedule: Schedule,
        scheduler: SchedulerMixin,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Schedule:
        """`schedule` with what the pipeline itself asks `scheduler` for, for pictures of so many pixels."""

    def encode(
        self,
        prompts: list[str] | None,
        height: int,
        width: int,
        count: int = 1,
        negative_prompt: Sequence[str | None] | None = None,
        **options: Any,
    ) -> Encoded:
        """`count` samples of each prompt, one after the other.

        Raises ValueError for what does not fit the model or each other.
        """

    def network(self, encoded: Encoded, plain: bool = False) -> Network:
        """The fastest network for `encoded`; plain: one whose inputs are as they were encoded."""

    def decode(
        self,
        latents: Tensor,
        output: str,
        generators: list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Decoded:
        """Pictures of so many pixels from latents (B, ...); output "pil", "np" or "pt"."""

    def nearest_size(self, height: int, width: int, **options: Any) -> tuple[int, int]:
        """The (height, width) in which the model would make a picture, or nearly one, of so many pixels."""

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """`decode` undone: latents (B, *shape) in the model's dtype, the most likely ones, so the same each time.

        pictures: (B, 3, height, width) in -1..1, of a video model (B, 3, frames, height, width), of a size that `nearest_size`
                  gives. Where an autoencoder in half precision overflows, it takes the picture again in float32.
        """

    def in_float32(self) -> AbstractContextManager[None]:
        """Everything computes in float32 inside, from the same weights, which are back afterwards, bit for bit."""
