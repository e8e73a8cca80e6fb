"""How large the Triton kernels' tiles are, by the padded dim, the bytes of a parameter and the GPU."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Of one kernel: rows of a tile, chunk of the hidden dimension, warps of a program, chunks of weights in flight."""

    rows: int
    chunk: int
    warps: int
    stages: int = 2


class Tiles(NamedTuple):
    forward: Tile
    adjoint: Tile
    fused: Tile
    """The adjoint that adds a tile's gradients to memory itself."""
    exact: Tile
    weights: Tile

    @property
    def chunk(self) -> int:
        """What hidden is padded to a multiple of; chunks are powers of two."""
        return max(tile.chunk for tile in self)


LARGEST_FUSED_DIM = 64
"""Up to which gradients are reduced in memory; beyond, a tile's weigh more than the scratch of the split form."""


def tiles_for(capability: tuple[int, int], dim: int, itemsize: int) -> Tiles:
    """The tiles for a padded dim of 16 to 256."""
    has_wgmma = capability >= (9, 0)
    if itemsize == 4:
        return _of_float32(dim)
    return _on_hopper(dim) if has_wgmma else _on_ampere(dim)


def _on_hopper(dim: int) -> Tiles:
    if dim <= 64:
        return Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(128, 32, 8), Tile(128, 64, 8), Tile(64, 64, 4))
    if dim == 128:
        return Tiles(Tile(64, 64, 4), Tile(64, 32, 8), Tile(64, 32, 8), Tile(64, 32, 8), Tile(64, 64, 8))
    return Tiles(Tile(64, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8))


def _on_ampere(dim: int) -> Tiles:
    if dim <= 64:
        return Tiles(Tile(64, 32, 4), Tile(64, 32, 8), Tile(64, 32, 8), Tile(64, 32, 8), Tile(64, 32, 4))
    if dim == 128:
        return Tiles(Tile(64, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8), Tile(64, 32, 8))
    return Tiles(Tile(32, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8), Tile(32, 32, 8))


def _of_float32(dim: int) -> Tiles:
    if dim <= 64:
        return Tiles(Tile(64, 32, 4), Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 4))
    if dim == 128:
        return Tiles(Tile(32, 32, 4), Tile(32, 16, 8), Tile(32, 16, 8), Tile(32, 16, 8), Tile(32, 32, 8))
    return Tiles(Tile(16, 16, 4), Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8), Tile(16, 16, 8))
