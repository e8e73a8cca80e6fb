"""The depth-fused ops in plain torch, on any device: the specification of the kernels.

A tile of rows goes through the whole depth before the next one is taken, so that on a CPU it stays in the cache, and
scratch does not grow with the number of rows. Products are added to the state, to the adjoint and to the gradients
by the matrix multiplication itself; in 16 bits, where it cannot add to a wider tensor, by one addition more.

Matrix products of an Euler step, forward pass included: 8 with extrapolation, 9 as in the paper, 10 corrected, 2 more
for each correction; in the exact adjoint 8, or 10 where the states of a tile are kept for a segment of the depth at a
time. A Heun step takes twice as many, or 19 as in the paper.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..reverse import Reverse, corrected, extrapolation_weights
from .activations import ACTIVATIONS
from .network import Network
from .norms import normalize, pull_back

TILE_BYTES = {"cpu": 2**20}
"""Of a tile's hidden activations, by device type: a few such tensors are to stay in the cache."""
LARGE_TILE_BYTES = 2**26
"""On other devices, which want large matrices."""
KEPT_BYTES = {"cpu": 7 * 2**20}
"""Of what the exact adjoint keeps of a tile at a time."""
LARGE_KEPT_BYTES = 2**29
THINNEST = 0.5
"""Share of a tile's rows below which matrix products get slower than two more of them in segments are."""


class Gradients(NamedTuple):
    """Of the parameters, in the dtype in which they are added up; None for absent biases."""

    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None

    @classmethod
    def zeros(cls, network: Network) -> Gradients:
        weight_in, bias_in, weight_out, bias_out = (
            None if parameter is None else parameter.new_zeros(parameter.shape, dtype=network.stream_dtype)
            for parameter in network.parameters
        )
        assert weight_in is not None
        assert weight_out is not None
        return cls(weight_in, bias_in, weight_out, bias_out)


def forward(
    network: Network, x: Tensor, kept: int, anchors: int | None, kind: type[Tile] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_N; the last `kept` increments, newest first; the states of every step divisible by `anchors`.

    Args:
        x: [rows, dim], contiguous, in the stream's dtype.
        kind: of tile, here and below; `Tile` by default.
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
    kind: type[Tile] | None = None,
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
    network: Network, g: Tensor, x_first: Tensor, wants_parameters: bool, kind: type[Tile] | None = None
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


@dataclass
class Point:
    """A layer evaluated at a point: what its vector-Jacobian product needs, in memory that is used again."""

    u_memory: Tensor
    z: Tensor
    a: Tensor
    layer: int = 0
    u: Tensor = field(init=False)
    r: Tensor | None = None

    def __post_init__(self) -> None:
        self.u = self.u_memory


class Tile:
    """The network's formulas for a tile of rows, in place.

    Args:
        rows: of the tile.
        points: layers whose evaluations are needed at a time.
        keeps: their points u are kept while the state goes on; activations are computed again from z.
    """

    def __init__(self, network: Network, rows: int, points: int, keeps: bool = False) -> None:
        self.network = network
        self.norm = network.norm
        self.activation = ACTIVATIONS[network.activation]
        self.is_heun = network.formulas.blocks_per_step == 2
        weight_in, weight_out = network.weight_in, network.weight_out
        self.weight_in, self.weight_out = weight_in.unbind(), weight_out.unbind()
        self.weight_in_t, self.weight_out_t = weight_in.mT.unbind(), weight_out.mT.unbind()
        self.bias_in = None if network.bias_in is None else network.bias_in.unbind()
        self.bias_out = None if network.bias_out is None else network.bias_out.unbind()
        self._is_mixed = network.dtype != network.stream_dtype
        hidden, a = (weight_in.new_empty(rows, network.hidden) for _ in range(2))
        self._cotangent = hidden
        self._middle = weight_in.new_empty((rows if self.is_heun else 0, network.dim), dtype=network.stream_dtype)
        self._keeps = keeps
        needs_u = self.norm is not None or self._is_mixed or keeps
        self.points = [
            Point(
                weight_in.new_empty((rows if needs_u else 0, network.dim)),
                weight_in.new_empty((rows, network.hidden)),
                a if keeps else weight_in.new_empty((rows, network.hidden)),
            )
            for _ in range(points)
        ]

    def narrow(self, rows: int) -> None:
        """From now on it is a tile of its first rows alone."""
        self._cotangent, self._middle = self._cotangent[:rows], self._middle[:rows]
        self.points = [Point(point.u_memory[:rows], point.z[:rows], point.a[:rows]) for point in self.points]

    def add_increment(self, acc: Tensor, x: Tensor, n: int, sign: float = 1.0) -> None:
        """acc += sign Phi_n(x). acc may be x."""
        self._add_step(acc, x, n, n + 1, self.network.steps[n], sign)

    def add_reverse_increment(self, acc: Tensor, x: Tensor, n: int) -> None:
        """acc += R_n(x) - x: the scheme run backwards."""
        first, second = (n + 1, n) if self.is_heun else (n, n)
        self._add_step(acc, x, first, second, -self.network.steps[n], 1.0)

    def _add_step(self, acc: Tensor, x: Tensor, first: int, second: int, h: float, sign: float) -> None:
        if not self.is_heun:
            self._add(acc, self._at(first, x, self.points[0]), sign * h)
            return
        middle = self._middle.copy_(x)
        self._add(middle, self._at(first, x, self.points[0]), h)
        self._add_half(acc, x, middle, sign)
        self._add(acc, self._at(second, middle, self.points[0]), 0.5 * sign * h)

    @staticmethod
    def _add_half(acc: Tensor, x: Tensor, middle: Tensor, sign: float) -> None:
        """acc += sign (middle - x) / 2, Heun's first stage: middle = x + h k1."""
        if acc is x:
            acc.lerp_(middle, 0.5 * sign)
        else:
            acc.add_(middle, alpha=0.5 * sign).sub_(x, alpha=0.5 * sign)

    def evaluate(self, n: int, x: Tensor, points: Sequence[Point], acc: Tensor | None, sign: float) -> None:
        """The layers of step n at x, for `pull`; and acc += sign Phi_n(x), unless acc is None. acc may be x if the
        tile keeps its points."""
        h = self.network.steps[n]
        first = self._at(n, x, points[0])
        if not self.is_heun:
            if acc is not None:
                self._add(acc, first, sign * h)
            return
        middle = self._middle.copy_(x)
        self._add(middle, first, h)
        second = self._at(n + 1, middle, points[1])
        if acc is not None:
            self._add_half(acc, x, middle, sign)
            self._add(acc, second, 0.5 * sign * h)

    def pull(self, n: int, points: Sequence[Point], g: Tensor, gradients: Gradients | None) -> None:
        """g += (dPhi_n/dx)^T g, and the gradients of the layers."""
        h = self.network.steps[n]
        if not self.is_heun:
            self._pull(points[0], g, h, g, gradients)
            return
        through = torch.zeros_like(g)  # (h/2) (df_{n+1}/dx)^T g
        self._pull(points[1], g, 0.5 * h, through, gradients)
        cotangent = torch.add(g, through, alpha=2.0)
        g += through
        self._pull(points[0], cotangent, 0.5 * h, g, gradients)

    def _at(self, layer: int, x: Tensor, point: Point) -> Point:
        """u, z and a of a layer at x. u is x itself, unless it is to be kept."""
        point.layer = layer
        if self.norm is None and not self._is_mixed and not self._keeps:
            point.u = x
        else:
            point.u = point.u_memory
            if self.norm is None:
                point.u.copy_(x)
            else:
                self._normalize(x, point)
        if self.bias_in is None:
            torch.mm(point.u, self.weight_in_t[layer], out=point.z)
        else:
            torch.addmm(self.bias_in[layer], point.u, self.weight_in_t[layer], out=point.z)
        self.activation.forward(point.z, point.a)
        return point

    def _add(self, acc: Tensor, point: Point, scale: float) -> None:
        """acc += scale f(x), from the layer's evaluation at x."""
        self._add_product(acc, point.a, self.weight_out_t[point.layer], scale)
        if self.bias_out is not None:
            acc.add_(self.bias_out[point.layer], alpha=scale)

    def _pull(self, point: Point, cotangent: Tensor, scale: float, out: Tensor, gradients: Gradients | None) -> None:
        """out += scale (df/dx)^T cotangent, and the gradients of the layer. out may be the cotangent."""
        layer = point.layer
        narrow = cotangent.to(self.network.dtype)
        # Scaled before it is rounded, except in float16, which loses what is small.
        first, last = (1.0, scale) if self.network.dtype == torch.float16 else (scale, 1.0)
        if self._keeps:
            self.activation.forward(point.z, point.a)
        hidden = torch.addmm(self._cotangent, narrow, self.weight_out[layer], beta=0, alpha=first, out=self._cotangent)
        if gradients is not None:
            self._add_product(gradients.weight_out[layer], narrow.t(), point.a, scale)
            if gradients.bias_out is not None:
                gradients.bias_out[layer].add_(cotangent.sum(0), alpha=scale)
        bias = None if gradients is None or gradients.bias_in is None else gradients.bias_in[layer]
        self._pull_activation(hidden, point, bias, last)
        if gradients is not None:
            self._add_product(gradients.weight_in[layer], hidden.t(), point.u, last)
        if self.norm is None:
            self._add_product(out, hidden, self.weight_in[layer], last)
        else:
            self._pull_norm(out, point, hidden @ self.weight_in[layer], last)

    def _add_product(self, acc: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        if not self._is_mixed:
            acc.addmm_(a, b, alpha=scale)
        elif acc.is_cuda and adds_to_wider(acc.device, a.dtype):
            torch.ops.aten.addmm.dtype_out(acc, a, b, acc.dtype, alpha=scale, out=acc)
        else:
            acc.add_(torch.mm(a, b), alpha=scale)

    # What a subclass does in fewer passes over memory.

    def _normalize(self, x: Tensor, point: Point) -> None:
        """u and r of a point x."""
        assert self.norm is not None
        point.r = normalize(self.norm, x, point.u)

    def _pull_norm(self, out: Tensor, point: Point, cotangent: Tensor, scale: float) -> None:
        """out += scale times the cotangent of x, from that of u."""
        assert self.norm is not None
        assert point.r is not None
        out.add_(pull_back(self.norm, point.u, point.r, cotangent), alpha=scale)

    def _pull_activation(self, cotangent: Tensor, point: Point, bias: Tensor | None, scale: float) -> None:
        """The cotangent of a becomes that of z, in place; bias, a gradient, += scale times its sum over rows."""
        self.activation.backward(cotangent, point.z, point.a)
        if bias is not None:
            bias.add_(cotangent.sum(0, dtype=bias.dtype), alpha=scale)

    def rebuild(
        self, x: Tensor, y: Tensor, d: Tensor, d_next: Tensor, weights: tuple[float, float] | None, norms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x <- x - d; norms += |y - x|^2, |x|^2; with weights (a, b), y <- x - (a d - b d_next), all in place.

        Returns:
            Memory for the next increment, and d.
        """
        x -= d
        norms[0] += _square(y.sub_(x))
        norms[1] += _square(x)
        if weights is not None:
            predict(x, y, d, d_next, weights)
        return d_next, d


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
            norms[0] += _square(y.sub_(x))
        norms[1] += _square(x)

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


def predict(x: Tensor, y: Tensor, d: Tensor, d_next: Tensor, weights: tuple[float, float]) -> None:
    """y <- x - (a d - b d_next)"""
    a, b = weights
    torch.add(x, d, alpha=-a, out=y).add_(d_next, alpha=b)


@functools.cache
def adds_to_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of this 16-bit dtype to a float32 matrix on this device, as newer ones do."""
    wide, narrow = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(wide, narrow, narrow, wide.dtype, out=wide)
    except (RuntimeError, AttributeError):
        return False
    return True


def _square(vector: Tensor) -> Tensor:
    flat = vector.view(-1)
    return flat.dot(flat)


def _copied(x: Tensor, out: Tensor | None) -> Tensor:
    return x.clone() if out is None else out.copy_(x)


def _tiles(
    kind: type[Tile] | None, network: Network, x: Tensor, points: int, keeps: bool = False, most: int | None = None
) -> Iterator[tuple[slice, Tile]]:
    """The rows of x, a tile at a time."""
    size = most or _tile_rows(network, x)
    tile = None
    for begin in range(0, x.shape[0], size):
        rows = slice(begin, min(begin + size, x.shape[0]))
        if tile is None:
            tile = (kind or Tile)(network, rows.stop - begin, points, keeps)
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
