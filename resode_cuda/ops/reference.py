"""The ops in plain torch: the specification that every kernel must match, and what runs where there is no kernel."""

from __future__ import annotations

from torch import Tensor


def forward_step(x: Tensor, f: Tensor, h: float) -> Tensor:
    """One forward Euler step of the residual stream: x + h f.

    Args:
        x: residual stream, any shape; float64, float32, float16 or bfloat16.
        f: the block's output, x's shape, x's dtype or a narrower one.
        h: step, dimensionless.
    Returns:
        x + h f, x's shape and dtype. The product is rounded to x's dtype, then the sum; kernels keep the product of a
        16-bit stream in float32, and round once less.
    """
    return x + h * f.to(x.dtype)
