"""A method against memorization as data: its guidance, and functions that change the prompts, the noise or the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from basinescape import Guard, Guidance, Output, Sampler
from basinescape.models import PromptedUNet
from basinescape.sampling.attempt_table import AttemptTable
from basinescape.types import Network

from . import stepwise


def starting_at(step: int, scale: float, steps: int) -> Guidance:
    """Guidance with weight 0 before `step` and `scale` from it on."""
    return Guidance.cfg(scale, shape=tuple(float(k >= step) for k in range(steps)))


@dataclass(frozen=True)
class Batch:
    """The arguments of one call: B prompts and their seeds, which are sampled together in `steps` steps."""

    sampler: Sampler
    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int


@dataclass(frozen=True)
class Method:
    """How a batch is sampled.

    guidance: of every sample.
    prompts:  returns the prompts to sample instead of the batch's; None: the batch's own.
    wrap:     makes the network to sample from of the model's, which holds the encoded prompts; None: the model's own.
    noise:    makes the initial noise of the drawn noise and the first step's predictions; None: the drawn noise.
    suits:    raises ValueError for a sampler or a number of steps that the method is not made for; None: all suit.
    """

    guidance: Guidance | Guard
    prompts: Callable[[Batch], Sequence[str]] | None = None
    wrap: Callable[[PromptedUNet, Batch], Network] | None = None
    noise: stepwise.Noise | None = None
    suits: Callable[[Sampler, int], object] | None = None

    def check(self, sampler: Sampler, steps: int) -> None:
        """Raise ValueError, before any work, for a sampler or steps that the method does not suit."""
        AttemptTable.make(sampler.solver(steps), self.guidance, torch.device("cpu"))
        if self.wrap is not None or self.noise is not None:
            stepwise.no_guard(self.guidance)
        if self.suits is not None:
            self.suits(sampler, steps)

    def sample(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int, output: str = "pil") -> Output:
        """An image for each prompt and its seed. Raises ValueError for a sampler or steps that the method does not suit."""
        batch = Batch(sampler, prompts, seeds, steps)
        if self.prompts is not None:
            batch = replace(batch, prompts=self.prompts(batch))
        if self.wrap is None and self.noise is None:
            return sampler(batch.prompts, seeds, steps, self.guidance, output=output, progress=False, batch_size=len(seeds))
        own = self.wrap
        wrap = None if own is None else lambda network: own(network, batch)
        return stepwise.sample(sampler, batch.prompts, seeds, steps, self.guidance, wrap, self.noise, output=output)
