"""Small tiles: samples of a few hundred elements have several."""

from basinescape.kernels.tiles import Tiles

SMALL = Tiles(blocks=((64, 4), (256, 8)), tile=(64, 8))  # in the place of the usual ones
