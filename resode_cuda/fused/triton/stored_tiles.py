"""How large the tiles of the Triton kernels that store increments are, in 16 bits.

They hold a companion beside the state, and round it: chosen by what compiles without spilling registers within matrix
loops in bfloat16, with 8 bits, without a norm and without anchors. In float32 those tiles are small enough. None has
been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

from .tiles import Tile, Tiles


class StoredTiles(NamedTuple):
    """The tiles of the forward pass, and of the adjoint's in either gradient form."""

    forward: Tile
    two_pass: Tile
    one_pass: Tile


SMALLEST = Tile(16, 16, 8)

# As in `tiles.py`, by the largest padded dim that they serve.
HOPPER = {
    64: StoredTiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 64, 8)),
    128: StoredTiles(Tile(64, 32, 8), Tile(32, 64, 8), Tile(32, 64, 8)),
    256: StoredTiles(Tile(16, 64, 8), Tile(16, 64, 8), Tile(16, 64, 8)),
}
BLACKWELL = {
    64: StoredTiles(Tile(128, 64, 8), Tile(64, 64, 8), Tile(64, 64, 8)),
    128: StoredTiles(Tile(32, 64, 8), Tile(32, 64, 8), Tile(32, 64, 8)),
    256: StoredTiles(Tile(16, 64, 8), Tile(16, 64, 8), Tile(16, 64, 8)),
}
AMPERE = {
    64: StoredTiles(Tile(128, 16, 8), Tile(128, 16, 8), Tile(128, 16, 8)),
    128: StoredTiles(Tile(32, 64, 8), Tile(32, 64, 8), Tile(32, 64, 8)),
    256: StoredTiles(Tile(16, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8)),
}
CONSUMER = {
    64: StoredTiles(Tile(32, 64, 8), Tile(32, 64, 8), Tile(32, 64, 8)),
    128: StoredTiles(Tile(32, 64, 8), Tile(32, 64, 8), Tile(32, 64, 8)),
    256: StoredTiles(Tile(16, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8)),
}
FLOAT32 = {
    64: StoredTiles(Tile(64, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8)),
    128: StoredTiles(Tile(32, 16, 8), Tile(32, 16, 8), Tile(32, 16, 8)),
}


def storing(tiles: Tiles, capability: tuple[int, int], dim: int, itemsize: int, is_plain: bool) -> Tiles:
    """The tiles with those of kernels that store increments; the other arguments are those of `tiles_for`."""
    table = FLOAT32 if itemsize == 4 else {8: AMPERE, 9: HOPPER, 10: BLACKWELL}.get(capability[0], CONSUMER)
    served = dim if is_plain else 2 * max(dim, 64)
    found = next((tiles for largest, tiles in table.items() if served <= largest), StoredTiles(*[SMALLEST] * 3))
    return tiles._replace(**found._asdict())
