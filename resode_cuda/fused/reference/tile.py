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
        self._needs_u = self.norm is not None or self._is_mixed or keeps_inputs
        self.points = [
            Point(
                weight_in.new_empty((rows if self._needs_u else 0, network.dim)),
                weight_in.new_empty((rows, network.hidden)),
                a if keeps_inputs else weight_in.new_empty((rows, network.hidden)),
            )
            for _ in range(points)
        ]

    def narrow(self, rows: int) -> None:
        """Become a tile of its first rows alone."""
        self._cotangent, self._middle = self._cotangent[:rows], self._middle[:rows]
        self.points = [Point(point.u_memory[:rows], point.z[:rows], point.a[:rows]) for point in self.points]

    def step(self, out: Tensor, x: Tensor, n: int, points: Sequence[Point] = ()) -> None:
        """out = x + Phi_n(x), and the layers of step n at x, for `vjp`. out may be x; `vjp` then needs a tile that
        keeps its points."""
        self._step(out, x, n, n + 1, self.method.steps[n], points)

    def step_back(self, out: Tensor, x: Tensor, n: int) -> None:
        """out = R_n(x): the scheme run backwards."""
        first, second = (n + 1, n) if self.is_heun else (n, n)
        self._step(out, x, first, second, -self.method.steps[n])

    def _step(self, out: Tensor, x: Tensor, first: int, second: int, h: float, points: Sequence[Point] = ()) -> None:
        points = points or self.points[:1] * 2
        if not self.is_heun:
            self._layer_step(out, first, x, points[0], h)
            return
        # Heun's method is the mean of x and what two of Euler's steps make of it.
        self._layer_step(self._middle, first, x, points[0], h)
        self._layer_step(self._middle, second, self._middle, points[1], h)
        torch.lerp(x, self._middle, 0.5, out=out)

    def add_increment(self, acc: Tensor, x: Tensor, n: int, sign: float = 1.0) -> None:
        """acc += sign Phi_n(x). acc may not be x."""
        self.evaluate(n, x, self.points[:1] * 2, acc, sign)
        self.add_last_bias(acc, n, sign)

    def evaluate(
        self,
        n: int,
        x: Tensor,
        points: Sequence[Point],
        acc: Tensor | None = None,
        sign: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        """The layers of step n at x, for `vjp`; and acc <- beta acc + sign Phi_n(x), unless acc is None, without the
        last layer's b2: that is for a pass over acc that is made anyway, or for `add_last_bias`. acc may not be x."""
        h = self.method.steps[n]
        if not self.is_heun:
            point = self._at(n, x, points[0])
            if acc is not None:
                self._add_product(acc, point.a, self.weight_out_t[n], sign * h, beta)
            return
        middle = self._middle
        self._layer_step(middle, n, x, points[0], h)
        point = self._at(n + 1, middle, points[1])
        if acc is not None:
            if not beta:
                acc.zero_()
            acc.add_(middle, alpha=0.5 * sign).sub_(x, alpha=0.5 * sign)  # the first stage: middle = x + h k1
            self._add_product(acc, point.a, self.weight_out_t[n + 1], 0.5 * sign * h)

    def add_last_bias(self, acc: Tensor, n: int, sign: float = 1.0) -> None:
        """acc += what `evaluate` has left out."""
        bias, h = self._last_bias(n)
        if bias is not None:
            acc.add_(bias, alpha=sign * h)

    def _last_bias(self, n: int) -> tuple[Tensor | None, float]:
        """b2 of the last layer of step n, and its factor in Phi_n."""
        layer, factor = (n + 1, 0.5) if self.is_heun else (n, 1.0)
        return None if self.bias_out is None else self.bias_out[layer], factor * self.method.steps[n]

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
        if not self._needs_u:
            point.u = x
        else:
            point.u = point.u_memory
            self._normalize(x, point)
        return self._activate(layer, point)

    def _activate(self, layer: int, point: Point) -> Point:
        """z and a of a layer at the point's u."""
        point.layer = layer
        if self.bias_in is None:
            torch.mm(point.u, self.weight_in_t[layer], out=point.z)
        else:
            torch.addmm(self.bias_in[layer], point.u, self.weight_in_t[layer], out=point.z)
        self.activation.forward(point.z, point.a)
        return point

    def _layer_step(self, out: Tensor, layer: int, x: Tensor, point: Point, scale: float) -> None:
        """out = x + scale f(x), with the layer's evaluation at x. out may be x."""
        self._at(layer, x, point)
        if out is not x:
            out.copy_(x)
        self._add_product(out, point.a, self.weight_out_t[layer], scale)
        if self.bias_out is not None:
            out.add_(self.bias_out[layer], alpha=scale)

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

    def _add_product(self, acc: Tensor, a: Tensor, b: Tensor, scale: float, beta: float = 1.0) -> None:
        """acc <- beta acc + scale a b, for beta 1 or 0."""
        if not self._is_mixed:
            acc.addmm_(a, b, beta=beta, alpha=scale)
        elif adds_to_wider(acc.device, a.dtype):
            torch.ops.aten.addmm.dtype_out(acc, a, b, acc.dtype, beta=beta, alpha=scale, out=acc)
        elif beta:
            acc.add_(torch.mm(a, b), alpha=scale)
        else:
            torch.mul(torch.mm(a, b), scale, out=acc)

    # What a subclass does in fewer passes over memory.

    def _normalize(self, x: Tensor, point: Point) -> None:
        """u and r of a point x."""
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
        self, n: int, x: Tensor, y: Tensor, squares: Tensor, d: Tensor | None = None, d_next: Tensor | None = None
    ) -> None:
        """x becomes x_n, and squares += |y - x_n|^2, |x_n|^2, once `evaluate` has subtracted Phi_n(y) from x or left it
        in d. With d, which gets the bias that was left out, y <- the extrapolation to n - 1. What is not needed before
        the first step may be left undone."""
        if d is None:
            self.add_last_bias(x, n, -1.0)
        else:
            self.add_last_bias(d, n)
            x -= d
        self.add_square(squares[0], y.sub_(x))
        self.add_square(squares[1], x)
        if n and d is not None and d_next is not None:
            extrapolate_(x, y, d, d_next, self.method.weights[n - 1])

    def add_square(
        self, square: Tensor, x: Tensor, minus: Tensor | None = None, increment: Tensor | None = None, n: int = 0
    ) -> None:
        """square += |x - minus + increment|^2, with the bias that `evaluate` has left out of the increment of step n.
        The increment may be overwritten."""
        difference = x if minus is None else x - minus
        if increment is not None:
            self.add_last_bias(increment, n)
            difference = difference + increment
        square += squared_norm(difference)


def extrapolate_(x: Tensor, y: Tensor, d: Tensor, d_next: Tensor, weights: tuple[float, float]) -> None:
    """y <- x - (a d - b d_next)"""
    a, b = weights
    torch.add(x, d, alpha=-a, out=y).add_(d_next, alpha=b)


@functools.cache
def adds_to_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of this 16-bit dtype to a float32 matrix on this device, as newer ones do."""
    if device.type != "cuda":
        return False
    wide, narrow = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(wide, narrow, narrow, wide.dtype, out=wide)
    except (RuntimeError, AttributeError):
        return False
    return True
