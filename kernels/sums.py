"""The sums over a sample: its gap's, and those of a guidance rule; in one program, over tiles, and in PyTorch operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .dispatch import jit, tl
from .tiles import SUMS, sum_of


@jit
def _add(one, two, other_one, other_two):
    return one + other_one, two + other_two


@jit
def sums_of(uncond, difference):
    """The sums that a guidance rule needs beside that of the squared difference: of u, d, u u, u d."""
    u, d = tl.reduce((uncond, difference), 0, _add)
    uu, ud = tl.reduce((uncond * uncond, uncond * difference), 0, _add)
    return u, d, uu, ud


@jit
def added(some, more):
    return some[0] + more[0], some[1] + more[1], some[2] + more[2], some[3] + more[3]


@jit
def keep_sums(partials, own, sample, tile, batch, tiles):
    """Store a tile's sums beside that of its squares, before it arrives."""
    for i in tl.static_range(4):
        tl.store(partials + ((i + 1) * batch + sample) * tiles + tile, own[i])


@jit
def met_sums(partials, sample, batch, tiles):
    """A sample's sums once all of its tiles have arrived."""
    u, d = sum_of(partials, batch + sample, tiles), sum_of(partials, 2 * batch + sample, tiles)
    return u, d, sum_of(partials, 3 * batch + sample, tiles), sum_of(partials, 4 * batch + sample, tiles)


@jit
def known_sums(sums, sample, batch):
    """A sample's sums, computed beforehand."""
    u, d = tl.load(sums + sample), tl.load(sums + batch + sample)
    return u, d, tl.load(sums + 2 * batch + sample), tl.load(sums + 3 * batch + sample)


def empty_sums(uncond: torch.Tensor) -> torch.Tensor:
    """Room for the sums of every sample that a guidance rule needs beside the gap."""
    return torch.empty((SUMS - 1, len(uncond)), dtype=torch.float32, device=uncond.device)


PART = 256  # elements whose squares are added first: rounding does not grow with the size of a sample


def norms(samples: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The 2-norm of each row of (B, n), (B,); a row's bits are the same in every batch."""
    return Folded(samples)(torch.linalg.vector_norm, out)


def sample_sums(uncond: torch.Tensor, difference: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`sums_of` of every sample of (B, ...), (B,) each; a sample's bits are the same in every batch."""
    values = uncond, difference, uncond * uncond, uncond * difference
    return tuple(Folded(value.flatten(1))(torch.sum) for value in values)


class Folded:
    """A reduction of each row of (B, n), a part of it at a time: of what is in that memory whenever it is called."""

    def __init__(self, samples: torch.Tensor):
        self.stages = []
        while (size := samples.shape[1]) > PART and (part := math.gcd(size, PART)) >= 16:
            reduced = samples.new_empty(len(samples), size // part)
            self.stages.append((samples.view(len(samples), size // part, part), reduced))
            samples = reduced
        self.rest = samples

    def __call__(self, reduce: Callable[..., torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        for parts, reduced in self.stages:
            reduce(parts, dim=2, out=reduced)
        if self.rest.shape[1] <= PART:
            return reduce(self.rest, dim=1, out=out)
        # A reduction a sample: nothing promises that a batched one adds a long row in one order.
        alone = [reduce(sample, dim=0, keepdim=True) for sample in self.rest]
        return torch.cat([self.rest.new_empty(0), *alone], out=out)
