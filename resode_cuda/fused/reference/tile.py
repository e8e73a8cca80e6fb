"""The formulas of a depth-fused stack on a tile of rows, in plain torch and in place.

Products are added to the state, to the adjoint and to the gradients by the matrix multiplication itself; in 16 bits,
where it cannot add to a wider tensor, by one addition more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import stored
from ...method import Method
from ...schemes import Heun
from ...squares import squared_norm
from ..activations import ACTIVATIONS
from ..network import Network
from ..norms import norm_vjp, normalize
from ..signature import ParameterGradients


def zero_gradients(network: Network) -> ParameterGradients:
    """What gradients are added to, in the stream's dtype."""
    weight_in, bias_in, weight_out, bias_out = (
        None if parameter is None else parameter.new_zeros(parameter.shape, dtype=network.stream_dtype)
        for parameter in network.parameters
    )
    assert weight_in is not None
    assert weight_out is not None
    return ParameterGradients(weight_in, bias_in, weight_out, bias_out)


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


class RowTile:
    """The formulas of a network's layers and steps on a tile of rows, in place.

    Args:
        rows: of the tile.
        points: layers whose evaluations are needed at a time.
        keeps_inputs: u of each point stays while the state goes on; activations are computed again from z.
    """

    def __init__(self, network: Network, method: Method, rows: int, points: int, keeps_inputs: bool = False) -> None:
        self.network, self.method = network, method
        self.norm = network.norm
        self.activation = ACTIVATIONS[network.activation]
        self.is_heun = method.scheme is Heun
        weight_in, weight_out = network.weight_in, network.weight_out
        self.weight_in, self.weight_out = weight_in.unbind(), weight_out.unbind()
        self.weight_in_t, self.weight_out_t = weight_in.mT.unbind(), weight_out.mT.unbind()
        self.bias_in = None if network.bias_in is None else network.bias_in.unbind()
        self.bias_out = None if network.bias_out is None else network.bias_out.unbind()
        self._is_mixed = network.dtype != network.stream_dtype
        hidden, a = (weight_in.new_empty(rows, network.hidden) for _ in range(2))
        self._cotangent = hidden
        self._middle = weight_in.new_empty((rows if self.is_heun else 0, network.dim), dtype=network.stream_dtype)
        self._keeps_inputs = keeps_inputs
        needs_u = self.norm is not None or self._is_mixed or keeps_inputs
        self.points = [
            Point(
                weight_in.new_empty((rows if needs_u else 0, network.dim)),
                weight_in.new_empty((rows, network.hidden)),
                a if keeps_inputs else weight_in.new_empty((rows, network.hidden)),
            )
            for _ in range(points)
        ]

    def narrow(self, rows: int) -> None:
        """Become a tile of its first rows alone."""
        self._cotangent, self._middle = self._cotangent[:rows], self._middle[:rows]
        self.points = [Point(point.u_memory[:rows], point.z[:rows], point.a[:rows]) for point in self.points]

    def add_increment(self, acc: Tensor, x: Tensor, n: int, sign: float = 1.0) -> None:
        """acc += sign Phi_n(x). acc may be x."""
        self._add_step(acc, x, n, n + 1, self.method.steps[n], sign)

    def add_reverse_increment(self, acc: Tensor, x: Tensor, n: int) -> None:
        """acc += R_n(x) - x: the scheme run backwards."""
        first, second = (n + 1, n) if self.is_heun else (n, n)
        self._add_step(acc, x, first, second, -self.method.steps[n], 1.0)

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
        """The layers of step n at x, for `vjp`; and acc += sign Phi_n(x), unless acc is None. acc may be x if the
        tile keeps its points."""
        h = self.method.steps[n]
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

    def vjp(self, n: int, points: Sequence[Point], g: Tensor, gradients: ParameterGradients | None) -> None:
        """g += (dPhi_n/dx)^T g, and the gradients of the layers."""
        h = self.method.steps[n]
        if not self.is_heun:
            self._layer_vjp(points[0], g, h, g, gradients)
            return
        through = torch.zeros_like(g)  # (h/2) (df_{n+1}/dx)^T g
        self._layer_vjp(points[1], g, 0.5 * h, through, gradients)
        cotangent = torch.add(g, through, alpha=2.0)
        g += through
        self._layer_vjp(points[0], cotangent, 0.5 * h, g, gradients)

    def _at(self, layer: int, x: Tensor, point: Point) -> Point:
        """u, z and a of a layer at x. u is x itself, unless it is to be kept."""
        point.layer = layer
        if self.norm is None and not self._is_mixed and not self._keeps_inputs:
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

    def _layer_vjp(
        self, point: Point, cotangent: Tensor, scale: float, out: Tensor, gradients: ParameterGradients | None
    ) -> None:
        """out += scale (df/dx)^T cotangent, and the gradients of the layer. out may be the cotangent."""
        layer = point.layer
        narrow = cotangent.to(self.network.dtype)
        # Scaled before it is rounded, except in float16, which loses what is small.
        first, last = (1.0, scale) if self.network.dtype == torch.float16 else (scale, 1.0)
        if self._keeps_inputs:
            self.activation.forward(point.z, point.a)
        hidden = torch.addmm(self._cotangent, narrow, self.weight_out[layer], beta=0, alpha=first, out=self._cotangent)
        if gradients is not None:
            self._add_product(gradients.weight_out[layer], narrow.t(), point.a, scale)
            if gradients.bias_out is not None:
                gradients.bias_out[layer].add_(cotangent.sum(0), alpha=scale)
        bias = None if gradients is None or gradients.bias_in is None else gradients.bias_in[layer]
        self._activation_vjp(hidden, point, bias, last)
        if gradients is not None:
            self._add_product(gradients.weight_in[layer], hidden.t(), point.u, last)
        if self.norm is None:
            self._add_product(out, hidden, self.weight_in[layer], last)
        else:
            self._norm_vjp(out, point, hidden @ self.weight_in[layer], last)

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

    def _norm_vjp(self, out: Tensor, point: Point, cotangent: Tensor, scale: float) -> None:
        """out += scale times the cotangent of x, from that of u."""
        assert self.norm is not None
        assert point.r is not None
        out.add_(norm_vjp(self.norm, point.u, point.r, cotangent), alpha=scale)

    def _activation_vjp(self, cotangent: Tensor, point: Point, bias: Tensor | None, scale: float) -> None:
        """The cotangent of a becomes that of z, in place; bias, a gradient, += scale times its sum over rows."""
        self.activation.backward(cotangent, point.z, point.a)
        if bias is not None:
            bias.add_(cotangent.sum(0, dtype=bias.dtype), alpha=scale)

    def store(self, x: Tensor, companion: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `stored.store`."""
        return stored.store(x, companion, unit, bits)

    def take_back(self, companion: Tensor, packed: Tensor, scales: Tensor, unit: Tensor, bits: int) -> Tensor:
        """As `stored.take_back`."""
        return stored.take_back(companion, packed, scales, unit, bits)

    def rebuild(
        self, x: Tensor, y: Tensor, d: Tensor, d_next: Tensor, weights: tuple[float, float] | None, squares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x <- x - d; squares += |y - x|^2, |x|^2; with weights (a, b), y <- x - (a d - b d_next), all in place.

        Returns:
            Memory for the next increment, and d.
        """
        x -= d
        squares[0] += squared_norm(y.sub_(x))
        squares[1] += squared_norm(x)
        if weights is not None:
            extrapolate_(x, y, d, d_next, weights)
        return d_next, d


def extrapolate_(x: Tensor, y: Tensor, d: Tensor, d_next: Tensor, weights: tuple[float, float]) -> None:
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
