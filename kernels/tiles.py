"""How a sample is laid over programs, and what the programs of one sample share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .dispatch import jit, tl

# No fused multiply-add: a kernel's bits do not depend on the compiler's choice.
OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Tiles:
    """Samples up to the last block live in one program; larger ones are cut into tiles.

    blocks: (elements, warps), the smallest that fits is taken; tile: (elements, warps). Both depend on a sample's size alone,
    so a sample's bits do not depend on its batch.
    """

    blocks: tuple[tuple[int, int], ...]
    tile: tuple[int, int]

    def of(self, size: int) -> tuple[int, int, int]:
        """(elements a program, warps, programs) for a sample of `size` elements."""
        for block, warps in self.blocks:
            if size <= block:
                return block, warps, 1
        block, warps = self.tile
        return block, warps, -(-size // block)

    def resident(self, device: torch.device) -> int:
        """How many programs of a tile may wait for each other on `device`; none in the interpreter, which runs them in turn."""
        if device.type != "cuda":
            return 0
        return PROGRAMS_AN_SM * torch.cuda.get_device_properties(device).multi_processor_count


# What lets two programs of a tile share an SM, so that all programs of a launch that meets are resident together.
RESIDENT = {"maxnreg": 128, "launch_cooperative_grid": True}
PROGRAMS_AN_SM = 2
TILES = Tiles(blocks=((1024, 4), (4096, 8), (16384, 16)), tile=(4096, 8))


SUMS = 5  # of a tile: that of the squared difference, and those that a guidance rule may ask for


def parts(block: int, itemsize: int) -> int:
    """How many parts a block of predictions of `itemsize` bytes is guided in: a large one 16 bytes a thread at a time."""
    return 1 if block <= 4096 else block * itemsize // 8192


@jit
def arrive(partials, arrivals, squares, sample, tile, tiles):
    """Store this tile's sum of squares and count it in; returns how many programs of the sample came before, ever.

    Each launch counts in every tile once, so a launch begins at a multiple of `tiles`.
    """
    tl.store(partials + sample * tiles + tile, squares)
    # acq_rel, after a barrier of the program: what it has read and stored comes before its arrival, and what the others
    # stored is there for whoever sees theirs.
    tl.debug_barrier()
    return tl.atomic_add(arrivals + sample, 1, sem="acq_rel")


@jit
def norm_of(partials, sample, tiles):
    """The root of a sample's partial sums."""
    return tl.sqrt_rn(sum_of(partials, sample, tiles))


@jit
def sum_of(partials, sample, tiles, LANES: tl.constexpr = 256):
    """A sample's partial sums, added in a fixed order: it does not depend on who came when."""
    lanes = tl.arange(0, LANES)
    sums = tl.zeros((LANES,), tl.float32)
    start = 0
    while start < tiles:
        sums += tl.load(partials + sample * tiles + start + lanes, mask=lanes < tiles - start, other=0.0, cache_modifier=".cg")
        start += LANES
    return tl.sum(sums)
