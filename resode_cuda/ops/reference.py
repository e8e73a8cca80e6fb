"""The pointwise ops in plain torch: the specification that every kernel must match, and the backend "torch".

Names are those of `operands.py`. Sums and products of a 16-bit stream may be rounded once less often than here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..squares import squared_norm
from .operands import (
    AdjointUpdateOperands,
    ForwardStepOperands,
    HeunStepOperands,
    ReverseExtrapolateOperands,
    ReverseUpdateOperands,
    adjoint_operands,
)


def forward_step(operands: ForwardStepOperands) -> Tensor:
    """x + h f: a step of Euler's method, and with -h its reverse. The result has x's shape and dtype."""
    return operands.x.add(operands.f, alpha=operands.h)


def heun_step(operands: HeunStepOperands) -> Tensor:
    """x + h/2 (k1 + k2): a step of Heun's method, and with -h its reverse. The result has x's shape and dtype."""
    x, k1, k2, h = operands
    return x.add(_sum(k1, k2, x), alpha=0.5 * h)


def reverse_update_(operands: ReverseUpdateOperands) -> None:
    """x <- x - weight (k1 + k2), in place, and `adjoint_update_` where there is a g.

    squares[0] += |y - x|^2 and squares[1] += |x|^2, with the new x.
    """
    x = operands.x
    x.sub_(_sum(operands.k1, operands.k2, x), alpha=operands.weight)
    _add_squares_(operands.squares, operands.y - x, x)
    if operands.g is not None:
        adjoint_update_(adjoint_operands(operands.g, operands))


def reverse_extrapolate_(operands: ReverseExtrapolateOperands) -> None:
    """`reverse_update_`, and the prediction for the step before: all in place.

    d <- d' = weight (k1 + k2);   x <- x - d';   y <- x - (a d' - b d), with the new x and the old d

    The squares take the old y.
    """
    x, y, d = operands.x, operands.y, operands.d
    stages = _sum(operands.k1, operands.k2, x).to(x.dtype)
    x.sub_(stages, alpha=operands.weight)
    _add_squares_(operands.squares, y.sub_(x), x)
    torch.mul(d, operands.b, out=y)
    torch.mul(stages, operands.weight, out=d)
    y.sub_(d, alpha=operands.a).add_(x)
    if operands.g is not None:
        adjoint_update_(adjoint_operands(operands.g, operands))


def adjoint_update_(operands: AdjointUpdateOperands) -> None:
    """g <- g_scale g + v_scale (v1 + v2), in place."""
    g, v1, v2, g_scale, v_scale = operands
    if g_scale != 1:
        g.mul_(g_scale)
    for v in (v1, v2):
        if v is not None:
            g.add_(v, alpha=v_scale)


def _sum(k1: Tensor, k2: Tensor | None, x: Tensor) -> Tensor:
    """k1 + k2, not rounded to less than x's dtype."""
    return k1 if k2 is None else k1.to(x.dtype).add(k2)


def _add_squares_(squares: Tensor, defect: Tensor, x: Tensor) -> None:
    """squares[0] += |defect|^2, squares[1] += |x|^2"""
    squares[0].add_(squared_norm(defect))
    squares[1].add_(squared_norm(x))
