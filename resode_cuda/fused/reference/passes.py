"""The depth-fused ops in plain torch, on any device: the specification of the kernels.

A tile of rows goes through the whole depth before the next one is taken, so that on a CPU it stays in the cache, and
scratch does not grow with the number of rows. The formulas are those of `tile.py`.

Matrix products of an Euler step, forward pass included: 8 with extrapolation and with stored increments, 9 as in the
paper, 10 corrected, 2 more for each correction; in the exact adjoint 8, or 10 where the states of a tile are kept for a
segment of the depth at a time. A Heun step takes twice as many, or 19 as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...method import Method
from ...reverse import corrected
from ...squares import square_dtype
from ..network import Network
from ..signature import AdjointResult, ParameterGradients, SavedStates, Wanted
from ..storage import defect_squares, unfilled, unmeasured
from .companion import StoringSweep, TakingBackSweep
from .tile import RowTile, extrapolate_, zero_gradients

TILE_BYTES = {"cpu": 2**20}
"""Size of a tile's hidden activations, by device type: a few such tensors are to stay in the cache."""
LARGE_TILE_BYTES = 2**26
"""The same on other devices, which want large matrices."""
KEPT_BYTES = {"cpu": 7 * 2**20}
"""Size of what the exact adjoint keeps of a tile at a time."""
LARGE_KEPT_BYTES = 2**29
THINNEST = 0.5
"""Share of a tile's rows below which matrix products get slower than two more of them in segments are."""


def reason(network: Network, method: Method, device: torch.device) -> str | None:
    """Why plain torch can't compute this: it can, everywhere."""
    return None


def forward(network: Network, method: Method, x: Tensor, *, kind: type[RowTile] = RowTile) -> SavedStates:
    """x_N, the last increments, newest first, the starting states of anchored steps, and what is stored.

    Args:
        x: [rows, dim], contiguous, in the stream's dtype.
        kind: of tile, here and below.
    """
    count, saved = len(method), method.kept_increments
    x_last = x.clone()
    increments = x.new_empty((saved, *x.shape), dtype=network.dtype)
    anchored = x.new_empty((method.anchor_count, *x.shape))
    stored, rounding = unfilled(method, x), unmeasured(method, x)
    packed = stored.steps(method)
    for rows, tile in _tiles(kind, network, method, x, points=1):
        state = x_last[rows]
        storing = StoringSweep(tile, stored, packed, rounding, rows) if method.solver.is_stored else None
        for n in range(count):
            place = method.anchor_place(n)
            if place is not None:
                anchored[place, rows] = state
            if storing is not None:
                storing.step(n, state)
            elif n < count - saved:
                tile.step(state, state, n)
            else:
                d = torch.zeros_like(state)
                tile.add_increment(d, state, n)
                state += d
                increments[count - 1 - n, rows] = d
    return SavedStates(x_last, increments, anchored, stored, rounding.numbers(len(x)))


def adjoint(
    network: Network,
    method: Method,
    g: Tensor,
    states: SavedStates,
    wanted: Wanted,
    *,
    kind: type[RowTile] = RowTile,
) -> AdjointResult:
    """The backward pass from g_N and what `forward` gave, all of which is left as it is."""
    g_first = g.clone()
    x_first = torch.empty_like(g) if wanted.input else None
    gradients = zero_gradients(network) if wanted.parameters else None
    squares = g.new_zeros(len(method), 3 if method.solver.is_stored else 2, dtype=square_dtype(g.device))
    packed = states.stored.steps(method)
    tile_rows = _tile_rows(network, g)
    if method.solver.accelerate:  # whose coefficients take whole samples
        tile_rows = max(1, tile_rows // states.sample_rows) * states.sample_rows
    for rows, tile in _tiles(kind, network, method, g, method.scheme.blocks_per_step, tile_rows=tile_rows):
        sweep: TakingBackSweep | ReverseSweep
        if method.solver.is_stored:
            sweep = TakingBackSweep(tile, states, packed, rows)
        else:
            sweep = ReverseSweep(tile, states, rows)
        for n in reversed(range(len(method))):
            sweep.step_back(n, g_first[rows], gradients, squares[n])
        if x_first is not None:
            x_first[rows] = sweep.x
        del sweep  # or the next tile's would be made beside it
    return AdjointResult(g_first, gradients, defect_squares(squares), x_first)


def exact_adjoint(
    network: Network,
    method: Method,
    g: Tensor,
    x_first: Tensor,
    wants_parameters: bool,
    *,
    kind: type[RowTile] = RowTile,
) -> tuple[Tensor, ParameterGradients | None]:
    """g_0 and the gradients: each tile goes through the depth once more, and its states are kept meanwhile.

    Args:
        g: g_N; it and x_first, x_0, are left as they are.
    """
    g_first = g.clone()
    gradients = zero_gradients(network) if wants_parameters else None
    count, per_step = len(method), method.scheme.blocks_per_step
    tile_rows, length = _segmented(network, method, g)
    points_at_a_time = length * per_step
    for rows, tile in _tiles(kind, network, method, g, points_at_a_time, keeps_inputs=True, tile_rows=tile_rows):
        starts = []
        state = x_first[rows].clone()
        for begin in range(0, count - length, length):
            starts.append(state.clone())
            for n in range(begin, begin + length):
                tile.step(state, state, n)
        starts.append(state)
        for begin, state in zip(reversed(range(0, count, length)), reversed(starts), strict=True):
            segment = range(begin, min(begin + length, count))
            evaluated = []
            for n in segment:
                points = tile.points[(n - begin) * per_step :][:per_step]
                if n != segment[-1]:
                    tile.step(state, state, n, points)
                else:  # the end is the next segment's start, or is not needed
                    tile.evaluate(n, state, points)
                evaluated.append(points)
            for n, points in zip(reversed(segment), reversed(evaluated), strict=True):
                tile.vjp(n, points, g_first[rows], gradients)
    return g_first, gradients


class ReverseSweep:
    """A tile's way back through the depth: the rebuilt state, and what is known of the next step.

    Args:
        states: of the whole batch.
        rows: of the tile.
    """

    def __init__(self, tile: RowTile, states: SavedStates, rows: slice) -> None:
        assert states.x_last is not None, "what is rebuilt starts there"
        self.tile, self.method, self.sample_rows = tile, tile.method, states.sample_rows
        increments, self.anchored = states.increments[:, rows], states.anchored[:, rows]
        self.x = states.x_last[rows].clone()
        self.y = torch.empty_like(self.x)
        self.d: Tensor | None = None
        self.d_next: Tensor | None = None
        """Memory for the increments of a step and of the next one; None where the solver does not extrapolate."""
        if self.method.extrapolates:
            torch.sub(self.x, increments[0], out=self.y)
            self.d = torch.empty_like(self.x)
            has_two = len(increments) > 1
            self.d_next = increments[1].to(self.x.dtype, copy=True) if has_two else torch.empty_like(self.x)

    def step_back(self, n: int, g: Tensor, gradients: ParameterGradients | None, squares: Tensor) -> None:
        """Step back from x_{n+1} and g_{n+1} to x_n and g_n, in place; squares += |y - x_n|^2, |x_n|^2."""
        tile, method, x = self.tile, self.method, self.x
        place = method.anchor_place(n)
        is_anchored = place is not None
        y = self._predicted(n) if place is None else self.anchored[place]
        is_rebuilt = method.reuses and not is_anchored
        if self.d is None:
            tile.evaluate(n, y, tile.points, x if is_rebuilt else None, -1.0)
        else:
            tile.evaluate(n, y, tile.points, self.d, beta=0.0)
        tile.vjp(n, tile.points, g, gradients)
        if is_rebuilt:
            tile.rebuild(n, x, y, squares, self.d, self.d_next)
        else:
            if is_anchored:
                x.copy_(y)
            else:
                self.x, self.y = y, x
                tile.add_square(squares[1], y)
            if n and self.d is not None and self.d_next is not None:
                tile.add_last_bias(self.d, n)
                extrapolate_(self.x, self.y, self.d, self.d_next, method.weights[n - 1])
        self.d, self.d_next = self.d_next, self.d

    def _predicted(self, n: int) -> Tensor:
        x, y, solver = self.x, self.y, self.method.solver
        if not solver.extrapolates:
            self.tile.step_back(y, x, n)
        if solver.corrections:
            samples = y.view(-1, self.sample_rows, y.shape[-1])
            self.y = corrected(solver, samples, lambda y: self._stepped_back(y, n)).view(y.shape)
        return self.y

    def _stepped_back(self, y: Tensor, n: int) -> Tensor:
        back = self.x.clone()
        self.tile.add_increment(back, y.view(back.shape), n, -1.0)
        return back.view(y.shape)


def _tiles(
    kind: type[RowTile],
    network: Network,
    method: Method,
    x: Tensor,
    points: int,
    keeps_inputs: bool = False,
    tile_rows: int | None = None,
) -> Iterator[tuple[slice, RowTile]]:
    """The rows of x, a tile at a time."""
    size = tile_rows or _tile_rows(network, x)
    tile = None
    for begin in range(0, x.shape[0], size):
        rows = slice(begin, min(begin + size, x.shape[0]))
        if tile is None:
            tile = kind(network, method, rows.stop - begin, points, keeps_inputs)
        elif rows.stop - begin < size:  # the last one
            tile.narrow(rows.stop - begin)
        yield rows, tile


def _tile_rows(network: Network, x: Tensor) -> int:
    budget = TILE_BYTES.get(x.device.type, LARGE_TILE_BYTES)
    return max(1, min(x.shape[0], budget // (max(network.hidden, network.dim) * network.weight_in.itemsize)))


def _segmented(network: Network, method: Method, x: Tensor) -> tuple[int, int]:
    """Rows of a tile, and of how many steps it keeps the states at a time: of all, unless the tile gets too thin."""
    count, rows = len(method), _tile_rows(network, x)
    budget = KEPT_BYTES.get(x.device.type, LARGE_KEPT_BYTES)
    of_step = method.scheme.blocks_per_step * (network.dim + network.hidden) * network.weight_in.itemsize
    if budget // (count * of_step) >= THINNEST * rows:
        return min(rows, budget // (count * of_step)), count
    of_start = network.dim * x.itemsize
    # The length for which the states kept at all starts and those within a segment take least.
    length = max(1, min(count, round(math.sqrt(count * of_start / of_step))))
    return max(1, min(rows, budget // (length * of_step + -(-count // length) * of_start))), length
