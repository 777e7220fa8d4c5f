"""How a sample is laid over programs."""

from __future__ import annotations

from dataclasses import dataclass

from .dispatch import jit, tl

# No fused multiply-add: a kernel's bits do not depend on the compiler's choice.
OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Tiles:
    """Samples up to the last block live in one program; larger ones are cut into tiles, one a program.

    The programs of a launch share nothing that one of them writes. What a sample's tiles add up to is the next launch's work.

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


TILES = Tiles(blocks=((1024, 4), (4096, 8), (16384, 16)), tile=(4096, 8))


@jit
def tile_of(tiles, BLOCK: tl.constexpr):
    """(sample, its tile, where in the sample that starts) of a program."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    return sample, tile, tile.to(tl.int64) * BLOCK


@jit
def read(pointer, lanes, mask):
    """Predictions or latents, in float32; 0 where the mask ends."""
    return tl.load(pointer + lanes, mask=mask, other=0.0).to(tl.float32)


def parts(block: int, itemsize: int) -> int:
    """How many parts a block of predictions of `itemsize` bytes is guided in: a large one 16 bytes a thread at a time."""
    return 1 if block <= 4096 else block * itemsize // 8192
