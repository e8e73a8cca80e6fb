"""The library's tables of tiles for Triton's kernels, as `python -m bench.tiles` reads, tries and rewrites them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.fused.triton import tiles as library_tiles
from resode_cuda.fused.triton.tiles import Tile, Tiles, tiles_for

SOURCE = Path(library_tiles.__file__)
KERNELS = Tiles._fields
"""Forward pass, adjoint by two passes and by one, exact adjoint, weight gradients."""
MOST = 6
"""Tiles that are tried for a kernel."""
LEAST = 16
"""Rows and chunk that a matrix product takes at least."""
TRIED_TOO = {
    ("HOPPER", 64): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(64, 32, 8), Tile(128, 64, 8), Tile(32, 128, 8)),
    ("HOPPER", 128): Tiles(Tile(128, 64, 8), Tile(64, 16, 8), Tile(64, 16, 8), Tile(128, 64, 8), Tile(32, 128, 8)),
}
"""Tiles that are tried too, by the row of the tables: large ones that spill no registers. A processor holds one program
of them."""


class Entry(NamedTuple):
    """A row of a table: which one, the largest padded dim that it serves, and its tiles."""

    table: str
    key: int
    tiles: Tiles


def entry_for(capability: tuple[int, int], dim: int, itemsize: int, is_plain: bool) -> Entry:
    """The row that serves such networks on such a GPU."""
    tiles = tiles_for(capability, dim, itemsize, is_plain)
    return next(Entry(name, key, tiles) for name, key, row in _rows() if row is tiles)


def entry_at(table: str, key: int) -> Entry:
    """The row of a table."""
    return Entry(table, key, next(row for *place, row in _rows() if place == [table, key]))


def candidates(entry: Entry, kernel: str) -> list[Tile]:
    """The tile in use, that of `TRIED_TOO`, its neighbours, and those of the other tables for the same dim."""
    current: Tile = getattr(entry.tiles, kernel)
    rows, chunk, warps, stages = current
    found = [current]
    found += [getattr(tiles, kernel) for place, tiles in TRIED_TOO.items() if place == (entry.table, entry.key)]
    found += [
        # Half as much for a program and its warps, and twice; warp groups are of four.
        Tile(rows // 2, chunk, max(4, warps // 2), stages),
        Tile(rows, chunk // 2, warps, stages),
        Tile(2 * rows, chunk, min(8, 2 * warps), stages),
        Tile(rows, 2 * chunk, warps, stages),
        Tile(rows, chunk, warps, 2 if stages == 3 else 3),
    ]
    found += [getattr(row, kernel) for name, key, row in _rows() if key == entry.key and name != "FLOAT32"]
    return [tile for tile in dict.fromkeys(found) if min(tile.rows, tile.chunk) >= LEAST][:MOST]


@contextmanager
def instead_of(entry: Entry, kernel: str, tile: Tile) -> Iterator[None]:
    """The library takes this tile for a kernel, whatever the network."""
    tiles = entry.tiles._replace(**{kernel: tile})
    # Not by unittest.mock, whose patches take as long as a small kernel.
    library_choice = triton_passes.tiles_for
    triton_passes.tiles_for = lambda *_: tiles
    try:
        yield
    finally:
        triton_passes.tiles_for = library_choice


def rewritten(source: str, entry: Entry) -> str:
    """The library's source with the entry's tiles in its row of the table."""
    pattern = rf"(?m)^({entry.table} = \{{\n(?:    .*\n)*?    {entry.key}: )Tiles\((?:[^()]|\([^()]*\))*\)"
    found, count = re.subn(pattern, lambda match: match[1] + _text(entry.tiles), source)
    if count != 1:
        raise ValueError(f"bench.tiles: {SOURCE} must have a row {entry.key} in {entry.table}, but it was not found")
    return found


def _rows() -> Iterator[tuple[str, int, Tiles]]:
    for name, table in vars(library_tiles).items():
        if name.isupper() and isinstance(table, dict):
            for key, row in table.items():
                yield name, key, row


def _text(tiles: Tiles) -> str:
    """The tiles as the table has them: stages only where they are not the default."""
    default = Tile._field_defaults["stages"]
    shown = (tile[:-1] if tile.stages == default else tile for tile in tiles)
    return f"Tiles({', '.join('Tile' + str(tuple(tile)) for tile in shown)})"
