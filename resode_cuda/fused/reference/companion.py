"""A tile's way through the depth where increments are stored, forwards and backwards: `stored.py`, row by row.

    forwards    x_{n+1} = x_n + Phi_n(x_n), beside it c_{n+1} = c_n + q_n;   rounded: x_{n+1} = x_n + Phi_n(c_n)
    backwards   c_n = c_{n+1} - q_n, and the vector-Jacobian product at y = c_n

Where a state is kept, the companion ends, and after that step it starts afresh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import stored
from ..signature import ParameterGradients, SavedStates
from ..storage import PackedSteps, RoundingSquares, StoredIncrements
from .tile import RowTile


class StoringSweep:
    """A tile's way forward.

    Args:
        increments, packed, rounding: of the whole batch, of which the tile's rows are filled and added to.
        rows: of the tile.
    """

    def __init__(
        self,
        tile: RowTile,
        increments: StoredIncrements,
        packed: PackedSteps,
        rounding: RoundingSquares,
        rows: slice,
    ) -> None:
        self.tile, self.method, self.rows = tile, tile.method, rows
        self.increments, self.packed, self.rounding = increments, packed, rounding
        self.companion: Tensor | None = None

    def step(self, n: int, x: Tensor) -> None:
        """Step from x_n to x_{n+1}, in place, and store the increment unless x_n is kept."""
        tile, method = self.tile, self.method
        if not method.is_stored(n):
            tile.step(x, x, n)
            if not method.ends_segment(n):
                self._start(method.segment_of(n + 1), x)
            return
        is_rounded = method.solver.rounded_forward
        x_first = x.clone() if n == 0 else x
        if n == 0 and is_rounded:
            self._start(0, x_first)
        if is_rounded:
            tile.add_increment(x, self._companion, n)
        else:
            tile.step(x, x, n)
        if n == 0 and not is_rounded:
            self._start(0, x_first, x)
        self._store(n, x)

    def _start(self, segment: int, x: Tensor, x_next: Tensor | None = None) -> None:
        self.companion, self.increments.units[segment, self.rows] = stored.start(x, x_next)

    @property
    def _companion(self) -> Tensor:
        assert self.companion is not None, "it has started by then"
        return self.companion

    def _store(self, n: int, x_next: Tensor) -> None:
        method, rows, before = self.method, self.rows, self._companion
        segment, place = method.segment_of(n), method.stored_place(n)
        unit = self.increments.units[segment, rows]
        after, packed, scales = self.tile.store(x_next, before, unit, method.solver.bits_of(n))
        self.packed[place][rows], self.increments.scales[place, rows] = packed, scales
        squares, sample, shift = self.rounding
        for column, companion in enumerate((after, before)):
            self.tile.add_square(squares[n, column], x_next, companion)
        if place == 0:
            first, stop = (-(-row >> shift) for row in (rows.start, rows.stop))
            sample[first:stop] = x_next[(first << shift) - rows.start :: 1 << shift]
        if method.ends_segment(n):
            self.increments.companions[segment, rows] = after
        self.companion = after


class TakingBackSweep:
    """A tile's way back.

    Args:
        states, packed: of the whole batch.
        rows: of the tile.
    """

    def __init__(self, tile: RowTile, states: SavedStates, packed: PackedSteps, rows: slice) -> None:
        self.tile, self.method, self.rows = tile, tile.method, rows
        self.states, self.packed = states, packed
        self.x = states.stored.companions.new_empty(0)
        """c_n, or the exact x_n where that is kept, of the step taken last."""

    def step_back(self, n: int, g: Tensor, gradients: ParameterGradients | None, squares: Tensor) -> None:
        """Step back to x and g_n, in place; squares += |x - (c_{n+1} - Phi(x))|^2, |x|^2, |c_{n+1}|^2 for x = c_n."""
        tile, method, rows, kept = self.tile, self.method, self.rows, self.states.stored
        place = method.anchor_place(n)
        increment = after = None
        if place is not None:
            self.x = self.states.anchored[place, rows]
        else:
            segment, place = method.segment_of(n), method.stored_place(n)
            after = kept.companions[segment, rows] if method.ends_segment(n) else self.x
            packed = self.packed[place][rows], kept.scales[place, rows], kept.units[segment, rows]
            self.x = tile.take_back(after, *packed, method.solver.bits_of(n))
            increment = torch.empty_like(after)
        tile.evaluate(n, self.x, tile.points, increment, beta=0.0)
        tile.vjp(n, tile.points, g, gradients)
        if after is not None:
            tile.add_square(squares[0], self.x, after, increment, n)
            tile.add_square(squares[1], self.x)
            tile.add_square(squares[2], after)
