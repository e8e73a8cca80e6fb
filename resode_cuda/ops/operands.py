"""Operands of the pointwise ops: a structure for each, whose fields are its schema's arguments, in their order.

x is the residual stream, of any shape; k1 and k2 are the outputs of a step's blocks (Euler has k1 alone; k2 is None); y
is the point at which the step's vector-Jacobian product was taken, d an increment, g the adjoint, v1 and v2 are
vector-Jacobian products. Streams (x, y, d, g, v1, v2) share shape and dtype: float64, float32, float16 or bfloat16. f,
k1 and k2 have that shape and that dtype or a narrower one. What is stored of increments `stored.py` describes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ForwardStepOperands(NamedTuple):
    x: Tensor
    f: Tensor
    """Output of the block."""
    h: float
    """Step, dimensionless."""


class HeunStepOperands(NamedTuple):
    x: Tensor
    k1: Tensor
    k2: Tensor
    h: float
    """Step, dimensionless."""


class AdjointUpdateOperands(NamedTuple):
    g: Tensor
    v1: Tensor | None
    v2: Tensor | None
    """A product that is None is zero."""
    g_scale: float
    v_scale: float


class ReverseUpdateOperands(NamedTuple):
    x: Tensor
    y: Tensor
    k1: Tensor
    k2: Tensor | None
    weight: float
    """Factor of k1 + k2 in the increment: h for Euler, h/2 for Heun."""
    squares: Tensor
    """Shape [2], to which |y - x|^2 and |x|^2 are added; float64 for a float64 stream, else float32."""
    g: Tensor | None
    """None where no adjoint is needed; the fields after it are then unused."""
    v1: Tensor | None
    v2: Tensor | None
    g_scale: float
    v_scale: float


class ReverseExtrapolateOperands(NamedTuple):
    x: Tensor
    y: Tensor
    d: Tensor
    """Increment of step n + 1 on entry, of step n on return."""
    k1: Tensor
    k2: Tensor | None
    weight: float
    a: float
    """Factor of the new increment in the prediction, from `reverse.extrapolation_weights`."""
    b: float
    """Factor of the old increment."""
    squares: Tensor
    """As in `ReverseUpdateOperands`, with the y on entry."""
    g: Tensor | None
    v1: Tensor | None
    v2: Tensor | None
    g_scale: float
    v_scale: float


class StoreOperands(NamedTuple):
    x: Tensor
    companion: Tensor
    """The one before; its dtype is `stored.companion_dtype` of x's, as is that of unit."""
    unit: Tensor
    """Shape [samples]."""
    bits: int


class StoreStepOperands(NamedTuple):
    x: Tensor
    k1: Tensor
    k2: Tensor | None
    weight: float
    """Factor of k1 + k2 in the increment, as in `ReverseUpdateOperands`."""
    companion: Tensor
    unit: Tensor
    bits: int


class StoredStepOperands(NamedTuple):
    companion: Tensor
    packed: Tensor
    """uint8, shape [samples, groups, 4 bits]."""
    scales: Tensor
    """uint8, shape [samples, groups]."""
    unit: Tensor
    bits: int


class StoreResults(NamedTuple):
    """What storing an increment results in."""

    companion: Tensor
    packed: Tensor
    scales: Tensor


def adjoint_operands(g: Tensor, operands: ReverseUpdateOperands | ReverseExtrapolateOperands) -> AdjointUpdateOperands:
    """Operands of the update of g that is part of a reverse update."""
    return AdjointUpdateOperands(g, operands.v1, operands.v2, operands.g_scale, operands.v_scale)
