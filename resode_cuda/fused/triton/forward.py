"""The depth-fused forward pass by Triton; `memory.py` says how memory is laid out.

    x_N from x_0, the last increments, the anchored states

Must match `forward` of `reference/passes.py`.
"""

import triton
import triton.language as tl

from .arguments import Weights
from .layer import add_layer
from .memory import anchor_place, inside_of, load_tile, store_tile


@triton.jit
def add_increment(
    acc: tl.tensor,
    x: tl.tensor,
    h: tl.tensor,
    SIGN: tl.constexpr,
    first: tl.tensor,
    second: tl.tensor,
    weights: Weights,
    CONFIG: tl.constexpr,
) -> tl.tensor:
    """acc + SIGN Phi(x), of a step h whose layers are these."""
    if CONFIG.is_heun:
        middle = add_layer(x, x, h, first, weights, CONFIG)
        return add_layer(acc + SIGN * 0.5 * (middle - x), middle, SIGN * 0.5 * h, second, weights, CONFIG)
    else:
        return add_layer(acc, x, SIGN * h, first, weights, CONFIG)


@triton.jit(do_not_specialize=["count", "rows", "steps"])
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
    hidden: tl.int32,
    count: tl.int64,
    rows: tl.int64,
    steps: tl.int32,
    SAVED_INCREMENTS: tl.constexpr,
    CONFIG: tl.constexpr,
) -> None:
    """Take a tile per program, of `count` rows, through the steps.

    The last SAVED_INCREMENTS steps form their increment apart, all others add to the state itself. increments and
    anchored: each state begins `rows` rows after the one before it.
    """
    weights = Weights(w1, b1, w2, b2, hidden)
    row = tl.program_id(0).to(tl.int64) * CONFIG.rows
    inside = inside_of(row, count, CONFIG)
    x = load_tile(x_first, row, inside, CONFIG)
    for n in range(steps - SAVED_INCREMENTS):
        if anchored is not None:
            place = anchor_place(schedule, n)
            if place >= 0:
                store_tile(anchored + place * rows * CONFIG.dim, x, row, inside, CONFIG)
        h = tl.load(schedule + 4 * n)
        x = add_increment(x, x, h, 1, n, n + 1, weights, CONFIG)
    if SAVED_INCREMENTS > 0:
        for n in range(steps - SAVED_INCREMENTS, steps):
            if anchored is not None:
                place = anchor_place(schedule, n)
                if place >= 0:
                    store_tile(anchored + place * rows * CONFIG.dim, x, row, inside, CONFIG)
            h = tl.load(schedule + 4 * n)
            d = add_increment(tl.zeros_like(x), x, h, 1, n, n + 1, weights, CONFIG)
            x += d
            store_tile(increments + (steps - 1 - n) * rows * CONFIG.dim, d, row, inside, CONFIG)
    if x_last is not None:
        store_tile(x_last, x, row, inside, CONFIG)
