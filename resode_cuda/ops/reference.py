"""The ops in plain torch: the specification that every kernel must match, and what runs where there is no kernel.

Names: x the residual stream, k1 and k2 the outputs of a step's blocks (Euler has k1 alone; k2 is None), y the point at
which the step's vector-Jacobian product was taken, d an increment, g the adjoint, v1 and v2 vector-Jacobian products.
Streams (x, y, d, g, v1, v2) share shape and dtype: float64, float32, float16 or bfloat16. k1 and k2 have that shape and
that dtype or a narrower one. Sums and products of a 16-bit stream may be rounded once less often than here.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDENED = 2**18
"""Values at most that are widened at once for the norms of a 16-bit stream: a copy of all would be two states large."""


def forward_step(x: Tensor, f: Tensor, h: float) -> Tensor:
    """x + h f: a step of Euler's method, and with -h its reverse.

    Args:
        x: residual stream, any shape; float64, float32, float16 or bfloat16.
        f: the block's output, x's shape, x's dtype or a narrower one.
        h: step, dimensionless.
    Returns:
        x's shape and dtype.
    """
    return x.add(f, alpha=h)


def heun_step(x: Tensor, k1: Tensor, k2: Tensor, h: float) -> Tensor:
    """x + h/2 (k1 + k2): a step of Heun's method, and with -h its reverse.

    Args:
        x: residual stream, any shape; float64, float32, float16 or bfloat16.
        k1, k2: the blocks' outputs, x's shape, x's dtype or a narrower one.
        h: step, dimensionless.
    Returns:
        x's shape and dtype.
    """
    return x.add(_sum(k1, k2, x), alpha=0.5 * h)


def reverse_update_(
    x: Tensor,
    y: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    weight: float,
    norms: Tensor,
    g: Tensor | None,
    v1: Tensor | None,
    v2: Tensor | None,
    g_scale: float,
    v_scale: float,
) -> None:
    """x <- x - weight (k1 + k2), in place, and g <- g_scale g + v_scale (v1 + v2), in place, where there is a g.

    norms[0] += |y - x|^2 and norms[1] += |x|^2, with the new x.

    Args:
        weight: h for Euler, h/2 for Heun.
        norms: shape [2]; float64 for a float64 stream, else float32.
    """
    x.sub_(_sum(k1, k2, x), alpha=weight)
    _add_squares_(norms, y - x, x)
    if g is not None:
        adjoint_update_(g, v1, v2, g_scale, v_scale)


def reverse_extrapolate_(
    x: Tensor,
    y: Tensor,
    d: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    weight: float,
    a: float,
    b: float,
    norms: Tensor,
    g: Tensor | None,
    v1: Tensor | None,
    v2: Tensor | None,
    g_scale: float,
    v_scale: float,
) -> None:
    """`reverse_update_`, and the prediction for the step before: all in place.

    d <- d' = weight (k1 + k2);   x <- x - d';   y <- x - (a d' - b d), with the new x and the old d

    Args:
        d: the increment of the step after this one.
        a, b: weights of the two increments, from `reverse.extrapolation_weights`.
        Others as for `reverse_update_`; norms take the old y.
    """
    stages = _sum(k1, k2, x).to(x.dtype)
    x.sub_(stages, alpha=weight)
    _add_squares_(norms, y.sub_(x), x)
    torch.mul(d, b, out=y)
    torch.mul(stages, weight, out=d)
    y.sub_(d, alpha=a).add_(x)
    if g is not None:
        adjoint_update_(g, v1, v2, g_scale, v_scale)


def adjoint_update_(g: Tensor, v1: Tensor | None, v2: Tensor | None, g_scale: float, v_scale: float) -> None:
    """g <- g_scale g + v_scale (v1 + v2), in place. A product that is None is zero."""
    if g_scale != 1:
        g.mul_(g_scale)
    for v in (v1, v2):
        if v is not None:
            g.add_(v, alpha=v_scale)


def _sum(k1: Tensor, k2: Tensor | None, x: Tensor) -> Tensor:
    """k1 + k2, not rounded to less than x's dtype."""
    return k1 if k2 is None else k1.to(x.dtype).add(k2)


def _add_squares_(norms: Tensor, defect: Tensor, x: Tensor) -> None:
    """norms[0] += |defect|^2, norms[1] += |x|^2"""
    for norm, vector in zip(norms.unbind(), (defect, x), strict=True):
        vector = vector.reshape(-1)
        for part in (vector,) if vector.dtype == norm.dtype else vector.split(WIDENED):
            wide = part.to(norm.dtype)
            norm.add_(wide.dot(wide))
