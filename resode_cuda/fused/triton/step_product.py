"""A step's vector-Jacobian product on a tile of rows, for the depth-fused Triton kernels that go back from y.

Must match `RowTile.evaluate` and `RowTile.vjp` of `reference/tile.py`.
"""

import triton
import triton.language as tl

from ..driver import Scratch
from .arguments import Gradients, Weights
from .layer import add_layer, layer_vjp, normalize, output_cotangent, rounded
from .memory import store_scratch


@triton.jit
def step_vjp(
    g: tl.tensor,
    p: tl.tensor,
    y: tl.tensor,
    h: tl.tensor,
    n: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    scratch_rows: tl.tensor,
    scratch: Scratch,
    weights: Weights,
    gradients: Gradients,
    WITH_P: tl.constexpr,
    CONFIG: tl.constexpr,
) -> tl.tensor:
    """(g + (dPhi_n/dx)^T g, p + Phi_n(y)), both at y; p is returned as it is unless WITH_P.

    Gradients are added to if they are there. u and c of the step's layer calls go to scratch memory if that is there,
    that of the range of steps from `first` on.
    """
    if CONFIG.is_heun:
        middle = add_layer(y, y, h, n, weights, CONFIG)
        if WITH_P:
            p += 0.5 * (middle - y)
        u, r = normalize(middle, CONFIG)
        u, c = rounded(u, weights), output_cotangent(g, 0.5 * h, weights, CONFIG)
        if scratch.layer_inputs is not None:
            store_scratch(scratch.layer_inputs, u, 2 * (n - first) + 1, row, scratch_rows, CONFIG)
            store_scratch(scratch.cotangents, c, 2 * (n - first) + 1, row, scratch_rows, CONFIG)
        # (h/2) (df_{n+1}/dx)^T g
        through, p = layer_vjp(tl.zeros_like(g), p, u, r, c, 0.5 * h, n + 1, weights, gradients, WITH_P, CONFIG)
        u, r = normalize(y, CONFIG)
        u, c = rounded(u, weights), output_cotangent(g + 2 * through, 0.5 * h, weights, CONFIG)
        if scratch.layer_inputs is not None:
            store_scratch(scratch.layer_inputs, u, 2 * (n - first), row, scratch_rows, CONFIG)
            store_scratch(scratch.cotangents, c, 2 * (n - first), row, scratch_rows, CONFIG)
        g, p = layer_vjp(g + through, p, u, r, c, 0.5 * h, n, weights, gradients, False, CONFIG)
    else:
        u, r = normalize(y, CONFIG)
        u, c = rounded(u, weights), output_cotangent(g, h, weights, CONFIG)
        if scratch.layer_inputs is not None:
            store_scratch(scratch.layer_inputs, u, n - first, row, scratch_rows, CONFIG)
            store_scratch(scratch.cotangents, c, n - first, row, scratch_rows, CONFIG)
        g, p = layer_vjp(g, p, u, r, c, h, n, weights, gradients, WITH_P, CONFIG)
    return g, p
