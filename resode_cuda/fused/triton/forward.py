"""The depth-fused forward pass by Triton; `triton_tile.py` says how memory is laid out.

    x_N from x_0, the last increments, the anchored states

Must match `torch_backend.forward`.
"""

import triton
import triton.language as tl

from .layer import add_layer
from .memory import inside_of, load_tile, store_tile


@triton.jit
def add_increment(
    acc: tl.tensor,
    x: tl.tensor,
    h: tl.tensor,
    SIGN: tl.constexpr,
    first: tl.tensor,
    second: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    HIDDEN: tl.tensor,
    HEUN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> tl.tensor:
    """acc + SIGN Phi(x), of a step h whose layers are these."""
    if HEUN:
        middle = add_layer(
            *(x, x, h, first, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
            *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
        return add_layer(
            *(acc + SIGN * 0.5 * (middle - x), middle, SIGN * 0.5 * h, second, w1, b1, w2, b2, HIDDEN),
            *(ACTIVATION, NORM, EPSILON, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
    else:
        return add_layer(
            *(acc, x, SIGN * h, first, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
            *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )


@triton.jit(do_not_specialize=["count", "rows", "steps", "anchors"])
def forward_kernel(
    x_first: tl.tensor,
    x_last: tl.tensor,
    increments: tl.tensor,
    anchored: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    steps: tl.int32,
    anchors: tl.int32,
    HIDDEN: tl.int32,
    KEPT: tl.constexpr,
    HEUN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> None:
    """A tile per program, of `count` rows. The last KEPT steps form their increment apart, all others add to the state
    itself. increments and anchored: each state is `rows` rows behind the last one."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    inside = inside_of(row, count, DIM, ROWS, D)
    x = load_tile(x_first, row, inside, DIM, ROWS, D)
    for n in range(steps - KEPT):
        if anchored is not None:
            if n % anchors == 0:
                store_tile(anchored + (n // anchors) * rows * DIM, x, row, inside, DIM, ROWS, D)
        h = tl.load(schedule + 3 * n)
        x = add_increment(
            *(x, x, h, 1, n, n + 1, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
            *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
    if KEPT > 0:
        for n in range(steps - KEPT, steps):
            if anchored is not None:
                if n % anchors == 0:
                    store_tile(anchored + (n // anchors) * rows * DIM, x, row, inside, DIM, ROWS, D)
            h = tl.load(schedule + 3 * n)
            d = add_increment(
                *(tl.zeros_like(x), x, h, 1, n, n + 1, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            x += d
            store_tile(increments + (steps - 1 - n) * rows * DIM, d, row, inside, DIM, ROWS, D)
    if x_last is not None:
        store_tile(x_last, x, row, inside, DIM, ROWS, D)
