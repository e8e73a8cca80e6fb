"""How large the Triton kernels' tiles are, by the padded dim, the bytes of a parameter and the GPU.

Those of 9.0 up to dim 128 take the fewest cycles as reckoned from the machine code (`tests/support/reckoned.py`), in
bfloat16, without a norm, and spill no registers within a matrix loop; what is spilled once a layer they allow. Programs
of 4 warps won, of which a processor holds two or three: one computes activations while another multiplies.

All others were chosen by what compiles without spilling registers, and among that by the instructions of the inner loop
for each row and hidden unit: warps lie along the rows, so that a tile of fewer than 16 rows a warp computes some of
them twice, as registers force the adjoint to from dim 128 on. `tests/budgets/fused.json` has what each setting spills.
None has been timed on a GPU yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Tile(NamedTuple):
    """One kernel's tile: its rows, chunk of the hidden dimension, warps of a program, chunks of weights in flight."""

    rows: int
    chunk: int
    warps: int
    stages: int = 3
    """With 2 the compiler waits for the chunk that it has just asked for."""


class Tiles(NamedTuple):
    """The tiles of each kernel, of the adjoint's in either gradient form."""

    forward: Tile
    two_pass: Tile
    one_pass: Tile
    exact: Tile
    weight_gradient: Tile
    """Its u and c are read once for each chunk: the larger it is the better, but hidden is not padded for its sake."""

    @property
    def chunk(self) -> int:
        """Number that hidden is padded to a multiple of; chunks are powers of two."""
        return max(tile.chunk for tile in (self.forward, self.two_pass, self.one_pass, self.exact))

    def weights_for(self, hidden: int) -> Tile:
        """The tile of the weight-gradient pass, of a padded hidden size."""
        return self.weight_gradient._replace(chunk=math.gcd(self.weight_gradient.chunk, hidden))


LARGEST_ONE_PASS_DIM = 64
"""Largest padded dim whose gradients are reduced in memory; beyond, they weigh more than scratch does."""

# By the largest padded dim that they serve. What holds more in registers than a plain Euler step counts for twice that.
HOPPER = {
    64: Tiles(Tile(64, 32, 4), Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 64, 4)),
    128: Tiles(Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 64, 4), Tile(32, 64, 4)),
    256: Tiles(Tile(32, 64, 8), Tile(32, 16, 8), Tile(32, 16, 8), Tile(32, 64, 8), Tile(32, 64, 8)),
    512: Tiles(Tile(32, 32, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(32, 32, 8), Tile(16, 32, 8)),
}
BLACKWELL = {
    64: Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(64, 64, 8), Tile(64, 64, 4), Tile(32, 128, 4)),
    128: Tiles(Tile(64, 64, 8), Tile(32, 64, 8), Tile(32, 64, 8), Tile(64, 64, 8), Tile(64, 128, 8)),
    256: Tiles(Tile(32, 32, 8), Tile(32, 16, 8), Tile(32, 16, 8), Tile(32, 32, 8), Tile(32, 32, 8)),
    512: Tiles(Tile(32, 32, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(32, 32, 8), Tile(16, 32, 8)),
}
AMPERE = {
    64: Tiles(Tile(128, 64, 8), Tile(64, 16, 4), Tile(64, 16, 4), Tile(128, 64, 8), Tile(32, 128, 8)),
    128: Tiles(Tile(64, 64, 8), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 4), Tile(128, 32, 8)),
    256: Tiles(Tile(32, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(32, 16, 8), Tile(32, 16, 8)),
    512: Tiles(Tile(32, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(32, 16, 8)),
}
CONSUMER = {
    64: Tiles(Tile(128, 32, 8), Tile(32, 32, 4), Tile(32, 32, 4), Tile(64, 32, 4), Tile(32, 128, 8)),
    128: Tiles(Tile(64, 64, 8), Tile(32, 32, 8), Tile(32, 32, 8), Tile(32, 64, 4), Tile(128, 16, 8)),
    256: AMPERE[256],
    512: AMPERE[512],
}
FLOAT32 = {
    64: Tiles(Tile(32, 32, 8), Tile(32, 16, 8), Tile(32, 16, 8), Tile(32, 16, 8), Tile(16, 16, 8)),
    128: Tiles(Tile(32, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8)),
    256: Tiles(Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8)),
}


def tiles_for(capability: tuple[int, int], dim: int, itemsize: int, is_plain: bool) -> Tiles:
    """The tiles for a padded dim of 16 to 256, or to 128 in float32.

    Args:
        is_plain: an Euler step without a norm.
    """
    if itemsize == 4:
        table = FLOAT32
    else:
        # 12.x, consumer Blackwell, has neither Hopper's nor Blackwell's matrix units.
        table = {8: AMPERE, 9: HOPPER, 10: BLACKWELL}.get(capability[0], CONSUMER)
    served = dim if is_plain else 2 * max(dim, 64)
    return next(tiles for largest, tiles in table.items() if served <= largest)
