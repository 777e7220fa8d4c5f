"""How samples are divided among the programs of a launch."""

from __future__ import annotations

from dataclasses import dataclass

from .dispatch import jit, tl

# No fused multiply-add, so that a kernel's bits do not depend on the compiler's choice.
OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Tiles:
    """One program holds a sample of up to the largest block; larger samples are cut into tiles, one for each program.

    No program reads what another one of the same launch writes. The next launch adds up the sums of a sample's tiles.

    blocks: (elements, warps), from which the smallest that fits is taken; tile: (elements, warps). The choice depends only on
    a sample's size, so a sample's bits do not depend on its batch.
    """

    blocks: tuple[tuple[int, int], ...]
    tile: tuple[int, int]

    def of(self, size: int) -> tuple[int, int, int]:
        """(elements per program, warps, programs) for a sample of `size` elements."""
        for block, warps in self.blocks:
            if size <= block:
                return block, warps, 1
        block, warps = self.tile
        return block, warps, -(-size // block)


TILES = Tiles(blocks=((1024, 4), (4096, 8), (16384, 16)), tile=(4096, 8))


@jit
def tile_of(tiles, BLOCK: tl.constexpr):
    """(sample, number of the tile in it, offset of the tile in it) of a program."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    return sample, tile, tile.to(tl.int64) * BLOCK


@jit
def read(pointer, lanes, mask):
    """Load predictions or latents as float32; 0 outside the mask."""
    return tl.load(pointer + lanes, mask=mask, other=0.0).to(tl.float32)


def parts(block: int, itemsize: int) -> int:
    """The number of parts in which a block is guided: 1, or for a large block so many that each has 16 bytes a thread."""
    return 1 if block <= 4096 else block * itemsize // 8192
