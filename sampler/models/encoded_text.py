"""The text of samples: as the caller gives it (`Request`), and as the network reads it (`Encoded`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Request:
    """The arguments of `Model.encode`.

    prompts: None where options hold embeddings instead. negative: a negative prompt or None for each prompt.
    count:   samples of each prompt. height, width: in pixels.
    options: all other arguments that are not None, and the pipeline's own defaults for those that were not given.
    """

    prompts: list[str] | None
    negative: list[str | None]
    count: int
    height: int
    width: int
    options: dict[str, Any]

    def get(self, *names: str) -> dict[str, Any]:
        """Return the options of these names, except those that are missing."""
        return {name: self.options[name] for name in names if name in self.options}

    def halves(self, uncond: Tensor, cond: Tensor, name: str = "prompt_embeds") -> Tensor:
        """Join both halves of a batch, (2 * prompts * count, ...). Each half has a row for each prompt, or for each sample.

        Raises ValueError, naming the argument `name`, if the halves' shapes do not fit.
        """
        prompts, samples = len(self.negative), len(self.negative) * self.count
        if uncond.shape[1:] != cond.shape[1:] or not {len(uncond), len(cond)} <= {prompts, samples}:
            raise ValueError(
                f"{name} are {tuple(cond.shape)} and negative_{name} {tuple(uncond.shape)}: they must be alike, a row a prompt"
            )
        return torch.cat([half.repeat_interleave(samples // len(half), dim=0) for half in (uncond, cond)])

    @property
    def negative_texts(self) -> list[str] | None:
        """The negative prompts for `encode_prompt`; None if there are none, which some pipelines treat unlike empty ones."""
        return None if all(text is None for text in self.negative) else [text or "" for text in self.negative]


@dataclass(frozen=True)
class Encoded:
    """The text of B samples, as the network takes it.

    inputs:    the network's keyword arguments with a row a sample: first the unconditional half, then the conditional one.
    shared:    its other keyword arguments, which are the same for every picture of one size.
    own:       the caller's own keyword arguments; with them the network is neither captured in a CUDA graph nor compiled.
    truncated: for each sample, what the text encoder's limit cut off its prompt; "" for nothing.
    """

    inputs: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    truncated: Sequence[str] = ()

    def select(self, samples: Sequence[int]) -> Encoded:
        """Only these samples."""
        rows = [*samples, *(i + len(self.truncated) for i in samples)]
        return replace(self, inputs=tree_map(lambda x: x[rows], self.inputs), truncated=[self.truncated[i] for i in samples])

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """The samples of all parts, one part after the other."""

        def joined(*given: Tensor) -> Tensor:
            unconds, conds = zip(*(x.chunk(2) for x in given), strict=True)
            return torch.cat([*unconds, *conds])

        inputs = tree_map(joined, *(part.inputs for part in parts))
        return replace(parts[0], inputs=inputs, truncated=[text for part in parts for text in part.truncated])
