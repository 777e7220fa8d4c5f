"""One call of a sampler: what it asks for, and the checks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..guidance.guard import Guard
from ..guidance.guidance import Guidance
from ..schedulers.schedule import Schedule
from . import callbacks

OUTPUTS = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Prompts:
    """The prompts and seeds of a call: `count` pictures of each prompt, all pictures of the first prompt first.

    texts:   the prompts; None where `options` hold prompt_embeds instead. seeds: one a picture. negative: one or None a prompt.
    options: arguments of the pipeline's own call.
    """

    texts: list[str] | None
    seeds: list[int]
    count: int
    negative: list[str | None] | None
    options: dict[str, Any]

    @classmethod
    def checked(
        cls,
        texts: str | Sequence[str] | None,
        seeds: int | Sequence[int],
        count: int,
        negative: str | Sequence[str | None] | None,
        options: dict[str, Any],
    ) -> Prompts:
        """Return the prompts of a caller's arguments. Raises ValueError for arguments that do not fit."""
        count = checks.at_least_one("num_images_per_prompt", count)
        embedded = texts is None and options.get("prompt_embeds") is not None
        found = None if embedded else checks.texts("prompts", texts)
        prompted = len(found) if found is not None else len(options["prompt_embeds"])
        return cls(
            found,
            checks.seeds(seeds, prompted * count),
            count,
            checks.one_each("negative_prompt", negative, prompted),
            options,
        )


@dataclass(frozen=True)
class Call:
    """What one call of a sampler asks for; see `Sampler.__call__`.

    size: (height, width) in pixels. shape: the shape of one sample's latents. latents: (B, *shape), the caller's initial noise.
    wrapped: the network is not the model's own (see `Sampler.wrapped`).

    Raises ValueError for arguments that do not fit together.
    """

    prompts: Prompts
    guidance: Guidance | Guard
    schedule: Schedule
    size: tuple[int, int]
    shape: tuple[int, ...]
    output: str = "pil"
    latents: Tensor | None = None
    batch_size: int | None = None
    stop_after: int | None = None
    callback: callbacks.Callback | None = None
    wrapped: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.guidance, Guidance | Guard):
            raise ValueError(
                f"guidance must be a Guidance, such as Guidance.cfg(7.5) or Guidance.from_dict(...); got {self.guidance!r}"
            )
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        wanted = (self.total, *self.shape)
        if self.latents is not None and (not isinstance(self.latents, Tensor) or tuple(self.latents.shape) != wanted):
            got = (
                tuple(self.latents.shape) if isinstance(self.latents, Tensor) else f"a {type(self.latents).__name__}, no tensor"
            )
            raise ValueError(f"latents must have the shape {wanted}, got {got}")
        unfinished = self.stop_after is not None or self.schedule.denoising_end is not None
        if isinstance(self.guidance, Guard) and (self.seen or unfinished):
            unfit = "a wrapped network, callback_on_step_end, stop_after or denoising_end"
            raise ValueError(f"a guard judges finished pictures: it does not go with {unfit}")
        size = None if self.batch_size is None else checks.at_least_one("batch_size", self.batch_size)
        if size is not None and size < self.total and self.wrapped:
            raise ValueError(f"batch_size must be at least {self.total}, all samples of a wrapped network; got {size}")

    @property
    def total(self) -> int:
        """The number of samples."""
        return len(self.prompts.seeds)

    @property
    def seen(self) -> bool:
        """Whether a wrapped network or a callback sees the batch. Without a batch_size it then holds all samples."""
        return self.wrapped or self.callback is not None

    def generators(self) -> list[torch.Generator]:
        """Return a new generator for each sample, seeded with its seed."""
        return [torch.Generator("cpu").manual_seed(seed) for seed in self.prompts.seeds]
