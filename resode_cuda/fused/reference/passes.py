"""The depth-fused ops in plain torch, on any device: the specification of the kernels.

A tile of rows goes through the whole depth before the next one is taken, so that on a CPU it stays in the cache, and
scratch does not grow with the number of rows. The formulas are those of `tile.py`.

Matrix products of an Euler step, forward pass included: 8 with extrapolation, 9 as in the paper, 10 corrected, 2 more
for each correction; in the exact adjoint 8, or 10 where the states of a tile are kept for a segment of the depth at a
time. A Heun step takes twice as many, or 19 as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...reverse import Reverse, corrected, extrapolation_weights
from ..network import Network
from .tile import Gradients, Tile, predict, square_norm

TILE_BYTES = {"cpu": 2**20}
"""Of a tile's hidden activations, by device type: a few such tensors are to stay in the cache."""
LARGE_TILE_BYTES = 2**26
"""On other devices, which want large matrices."""
KEPT_BYTES = {"cpu": 7 * 2**20}
"""Of what the exact adjoint keeps of a tile at a time."""
LARGE_KEPT_BYTES = 2**29
THINNEST = 0.5
"""Share of a tile's rows below which matrix products get slower than two more of them in segments are."""


def forward(
    network: Network, x: Tensor, kept: int, anchors: int | None, *, kind: type[Tile] = Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """x_N; the last `kept` increments, newest first; the states of every step divisible by `anchors`.

    Args:
        x: [rows, dim], contiguous, in the stream's dtype.
        kind: of tile, here and below.
    """
    count = len(network.steps)
    x_last = x.clone()
    increments = x.new_empty((kept, *x.shape), dtype=network.dtype)
    anchored = x.new_empty((0 if anchors is None else -(-count // anchors), *x.shape))
    for rows, tile in _tiles(kind, network, x, points=1):
        state = x_last[rows]
        for n in range(count):
            if anchors is not None and n % anchors == 0:
                anchored[n // anchors, rows] = state
            if n < count - kept:
                tile.add_increment(state, state, n)
            else:
                d = torch.zeros_like(state)
                tile.add_increment(d, state, n)
                state += d
                increments[count - 1 - n, rows] = d
    return x_last, increments, anchored


def adjoint(
    network: Network,
    solver: Reverse,
    anchors: int | None,
    g: Tensor,
    x_last: Tensor,
    increments: Tensor,
    anchored: Tensor,
    wants_parameters: bool,
    wants_input: bool,
    *,
    kind: type[Tile] = Tile,
) -> tuple[Tensor, Gradients | None, Tensor, Tensor | None]:
    """g_0, the gradients, each step's squared norms |y - x_n|^2 and |x_n|^2 (shape [steps, 2]), and the rebuilt x_0.

    Args:
        g: g_N; it, x_last, increments and anchored, from `forward`, are left as they are.
    """
    g_first = g.clone()
    x_first = torch.empty_like(x_last) if wants_input else None
    gradients = Gradients.zeros(network) if wants_parameters else None
    norms = g.new_zeros(len(network.steps), 2)
    for rows, tile in _tiles(kind, network, g, points=network.formulas.blocks_per_step):
        x = _copied(x_last[rows], None if x_first is None else x_first[rows])
        walk = Walk(tile, solver, anchors, anchored[:, rows], x, [d[rows] for d in increments])
        for n in reversed(range(len(network.steps))):
            walk.step_back(n, g_first[rows], gradients, norms[n])
        del x, walk  # or the next tile's would be made beside them
    return g_first, gradients, norms, x_first


def exact_adjoint(
    network: Network, g: Tensor, x_first: Tensor, wants_parameters: bool, *, kind: type[Tile] = Tile
) -> tuple[Tensor, Gradients | None]:
    """g_0 and the gradients: each tile goes through the depth once more, and its states are kept meanwhile.

    Args:
        g: g_N; it and x_first, x_0, are left as they are.
    """
    g_first = g.clone()
    gradients = Gradients.zeros(network) if wants_parameters else None
    count, per_step = len(network.steps), network.formulas.blocks_per_step
    most, length = _segmented(network, g)
    for rows, tile in _tiles(kind, network, g, points=length * per_step, keeps=True, most=most):
        starts = []
        state = x_first[rows].clone()
        for begin in range(0, count - length, length):
            starts.append(state.clone())
            for n in range(begin, begin + length):
                tile.add_increment(state, state, n)
        starts.append(state)
        for begin, state in zip(reversed(range(0, count, length)), reversed(starts), strict=True):
            segment = range(begin, min(begin + length, count))
            evaluated = []
            for n in segment:
                points = tile.points[(n - begin) * per_step :][:per_step]
                # The last state is that of the segment behind, or of nobody.
                acc = state if n != segment[-1] else None
                tile.evaluate(n, state, points, acc, 1.0)
                evaluated.append(points)
            for n, points in zip(reversed(segment), reversed(evaluated), strict=True):
                tile.pull(n, points, g_first[rows], gradients)
    return g_first, gradients


class Walk:
    """A tile's way back through the depth: the rebuilt state, and what is known of the next step.

    Args:
        x: x_N, which is overwritten.
        increments: the last ones, newest first; none if the solver does not extrapolate.
    """

    def __init__(
        self,
        tile: Tile,
        solver: Reverse,
        anchors: int | None,
        anchored: Tensor,
        x: Tensor,
        increments: Sequence[Tensor],
    ) -> None:
        self.tile, self.solver, self.anchors, self.anchored = tile, solver, anchors, anchored
        self.steps, self.formulas = tile.network.steps, tile.network.formulas
        self.x = x
        self.y = torch.empty_like(x)
        if solver.extrapolates:
            torch.sub(x, increments[0], out=self.y)
            self.d = torch.empty_like(x)
            self.d_next = increments[1].to(x.dtype, copy=True) if len(increments) > 1 else torch.empty_like(x)

    def step_back(self, n: int, g: Tensor, gradients: Gradients | None, norms: Tensor) -> None:
        """From x_{n+1} and g_{n+1} to x_n and g_n, all in place; norms += |y - x_n|^2, |x_n|^2."""
        tile, solver, x = self.tile, self.solver, self.x
        is_anchored = self.anchors is not None and n % self.anchors == 0
        y = self.anchored[n // (self.anchors or 1)] if is_anchored else self._predicted(n)
        is_rebuilt = solver.reuse and not is_anchored
        acc: Tensor | None
        if solver.extrapolates:
            acc, sign = self.d.zero_(), 1.0
        else:
            acc, sign = x if is_rebuilt else None, -1.0
        tile.evaluate(n, y, tile.points, acc, sign)
        tile.pull(n, tile.points, g, gradients)
        weights = self._weights_before(n) if solver.extrapolates and n else None
        if is_rebuilt and solver.extrapolates:
            self.d, self.d_next = tile.rebuild(x, y, self.d, self.d_next, weights, norms)
            return
        if not is_rebuilt:
            x.copy_(y)
            if weights is not None:
                predict(x, self.y, self.d, self.d_next, weights)
                self.d, self.d_next = self.d_next, self.d
            if is_anchored:
                return
        else:
            norms[0] += square_norm(y.sub_(x))
        norms[1] += square_norm(x)

    def _predicted(self, n: int) -> Tensor:
        x, y = self.x, self.y
        if not self.solver.extrapolates:
            y.copy_(x)
            self.tile.add_reverse_increment(y, x, n)
        if self.solver.corrections:
            self.y = corrected(self.solver, y, lambda y: self._stepped_back(y, n))
        return self.y

    def _stepped_back(self, y: Tensor, n: int) -> Tensor:
        back = self.x.clone()
        self.tile.add_increment(back, y, n, -1.0)
        return back

    def _weights_before(self, n: int) -> tuple[float, float]:
        """Of step n - 1. The last step knows d_{N-2} from the forward pass, where others have d_{n+1}."""
        if n == len(self.steps) - 1:
            return 0.0, -1.0
        return extrapolation_weights(self.formulas, self.steps, n - 1)


def _copied(x: Tensor, out: Tensor | None) -> Tensor:
    return x.clone() if out is None else out.copy_(x)


def _tiles(
    kind: type[Tile], network: Network, x: Tensor, points: int, keeps: bool = False, most: int | None = None
) -> Iterator[tuple[slice, Tile]]:
    """The rows of x, a tile at a time."""
    size = most or _tile_rows(network, x)
    tile = None
    for begin in range(0, x.shape[0], size):
        rows = slice(begin, min(begin + size, x.shape[0]))
        if tile is None:
            tile = kind(network, rows.stop - begin, points, keeps)
        elif rows.stop - begin < size:  # the last one
            tile.narrow(rows.stop - begin)
        yield rows, tile


def _tile_rows(network: Network, x: Tensor) -> int:
    budget = TILE_BYTES.get(x.device.type, LARGE_TILE_BYTES)
    return max(1, min(x.shape[0], budget // (max(network.hidden, network.dim) * network.weight_in.itemsize)))


def _segmented(network: Network, x: Tensor) -> tuple[int, int]:
    """Rows of a tile, and of how many steps it keeps the states at a time: of all, unless the tile gets too thin."""
    count, rows = len(network.steps), _tile_rows(network, x)
    budget = KEPT_BYTES.get(x.device.type, LARGE_KEPT_BYTES)
    of_step = network.formulas.blocks_per_step * (network.dim + network.hidden) * network.weight_in.itemsize
    if budget // (count * of_step) >= THINNEST * rows:
        return min(rows, budget // (count * of_step)), count
    of_start = network.dim * x.itemsize
    # The length for which the states kept at all starts and those within a segment take least.
    length = max(1, min(count, round(math.sqrt(count * of_start / of_step))))
    return max(1, min(rows, budget // (length * of_step + -(-count // length) * of_start))), length
