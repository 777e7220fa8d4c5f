"""A method against memorization as data: its guidance, what it makes of the prompts, and what it makes of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from basinescape import Guidance, Output, Sampler
from basinescape.loop import Network
from basinescape.models import GuidedUNet


@dataclass(frozen=True)
class Batch:
    """One call, as a method sees it: B prompts and their seeds, sampled together in so many steps."""

    sampler: Sampler
    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int


@dataclass(frozen=True)
class Method:
    """How a batch is sampled.

    guidance: of every sample.
    prompts:  the prompts that are sampled in the place of the batch's; None: those.
    wrap:     the network that is sampled from, made of the model's, which holds the encoded prompts; None: the model's.
    """

    guidance: Guidance
    prompts: Callable[[Batch], Sequence[str]] | None = None
    wrap: Callable[[GuidedUNet, Batch], Network] | None = None

    def sample(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int, output: str = "pil") -> Output:
        """An image for each prompt and its seed. Raises ValueError for a sampler or steps that the method does not suit."""
        batch = Batch(sampler, prompts, seeds, steps)
        if self.prompts is not None:
            batch = replace(batch, prompts=self.prompts(batch))
        if self.wrap is not None:
            sampler = sampler.wrapped(partial(self.wrap, batch=batch))
        return sampler(batch.prompts, seeds, steps, self.guidance, output=output, progress=False, batch_size=len(seeds))
