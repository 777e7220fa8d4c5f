"""The sums over a sample for its gap and for guidance rules: in one program, over tiles, and in PyTorch operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .dispatch import jit, launch, tl
from .operands import sample_size, sample_stride
from .tiles import OPTIONS, TILES, read, tile_of

SUMS = 5  # sums of a sample: that of its squared difference, and the four of `sums_of`


@jit
def _add(one, two, other_one, other_two):
    return one + other_one, two + other_two


@jit
def sums_of(uncond, difference):
    """The sums of u, d, u u and u d, which a guidance rule needs in addition to that of d d."""
    u, d = tl.reduce((uncond, difference), 0, _add)
    uu, ud = tl.reduce((uncond * uncond, uncond * difference), 0, _add)
    return u, d, uu, ud


@jit
def added(some, more):
    return some[0] + more[0], some[1] + more[1], some[2] + more[2], some[3] + more[3]


@jit
def total(partials, sample, tiles, LANES: tl.constexpr = 256):
    """The sum over the tiles of a sample, added in a fixed order."""
    lanes = tl.arange(0, LANES)
    sums = tl.zeros((LANES,), tl.float32)
    start = 0
    while start < tiles:
        sums += tl.load(partials + sample * tiles + start + lanes, mask=lanes < tiles - start, other=0.0)
        start += LANES
    return tl.sum(sums)


@jit
def total_gap(partials, sample, tiles):
    return tl.sqrt_rn(total(partials, sample, tiles))


@jit
def total_sums(partials, sample, batch, tiles):
    """`sums_of` a whole sample."""
    u, d = total(partials, batch + sample, tiles), total(partials, 2 * batch + sample, tiles)
    return u, d, total(partials, 3 * batch + sample, tiles), total(partials, 4 * batch + sample, tiles)


@jit
def sums_kernel(uncond, cond, partials, batch, size, tiles, uncond_stride, cond_stride, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """One program writes one tile's sum of squared differences, with ALL also its `sums_of`, to partials (SUMS, B, tiles)."""
    sample, tile, start = tile_of(tiles, BLOCK)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < size - start
    u = read(uncond + sample * uncond_stride + start, lanes, mask)
    c = read(cond + sample * cond_stride + start, lanes, mask)
    tl.store(partials + sample * tiles + tile, tl.sum((c - u) * (c - u)))
    if ALL:
        sums = sums_of(u, c - u)
        for i in tl.static_range(4):
            tl.store(partials + ((i + 1) * batch + sample) * tiles + tile, sums[i])


def launch_sums(uncond: torch.Tensor, cond: torch.Tensor, partials: torch.Tensor, all_sums: bool) -> None:
    """Fill `partials` for samples of several tiles: the sums of squared differences, or all sums."""
    batch, size = len(uncond), sample_size(uncond)
    block, warps, tiles = TILES.of(size)
    strides = sample_stride(uncond), sample_stride(cond)
    options = {"ALL": all_sums, "BLOCK": block, "num_warps": warps, **OPTIONS}
    launch(sums_kernel, batch * tiles, uncond, cond, partials, batch, size, tiles, *strides, **options)


@jit
def gap_kernel(partials, gap, tiles):
    """One program computes the noise gap of one sample from the sums of its tiles."""
    sample = tl.program_id(0).to(tl.int64)
    tl.store(gap + sample, total_gap(partials, sample, tiles))


PART = 256  # elements in one stage of a reduction; stages keep rounding from growing with the size of a sample


def norms(samples: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The 2-norm of each row of (B, n), (B,); a row's bits are the same in every batch."""
    return Folded(samples)(torch.linalg.vector_norm, out)


def sample_sums(uncond: torch.Tensor, difference: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`sums_of` of every sample of (B, ...), (B,) each; a sample's bits are the same in every batch."""
    values = uncond, difference, uncond * uncond, uncond * difference
    return tuple(Folded(value.flatten(1))(torch.sum) for value in values)


class Folded:
    """Reduces each row of (B, n) in stages of up to PART numbers. It keeps views, so each call reduces their current values."""

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
        # One reduction for each sample, because a batched one may add a long row in another order.
        alone = [reduce(sample, dim=0, keepdim=True) for sample in self.rest]
        return torch.cat([self.rest.new_empty(0), *alone], out=out)
