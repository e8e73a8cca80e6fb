"""The depth-fused adjoint that rebuilds the states, by Triton; `memory.py` says how memory is laid out.

    from x and g after a range of steps to x and g before it

y, where a step's product is taken, is the reverse step or x_{n+1} less the increment expected, a d1 - b d2, of which d1
and d2 are those of the next two steps. The last two steps are predicted by the increments that the forward pass has
saved, d2 with a = 0 and b = -1. Increments are held in the parameters' dtype: y is rounded to that anyway.
Must match `adjoint` of `reference/passes.py`.
"""

import triton
import triton.language as tl

from ..driver import Boundary, Scratch
from .arguments import Gradients, Weights
from .forward import add_increment
from .layer import add_layer, rounded
from .memory import anchor_place, inside_of, load_tile, store_tile
from .step_product import step_vjp


@triton.jit(do_not_specialize=["count", "anchored_rows", "increments_rows", "scratch_rows", "first", "last", "steps"])
def adjoint_kernel(
    start: Boundary,
    end: Boundary,
    anchored: tl.tensor,
    squares: tl.tensor,
    scratch: Scratch,
    dw1: tl.tensor_descriptor,
    db1: tl.tensor,
    dw2: tl.tensor_descriptor,
    db2: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    hidden: tl.int32,
    count: tl.int64,
    anchored_rows: tl.int64,
    increments_rows: tl.int64,
    scratch_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    steps: tl.int32,
    SOLVER: tl.constexpr,
    CONFIG: tl.constexpr,
) -> None:
    """Take a tile per program, of `count` rows, through the steps from last - 1 down to first, by a `Reverse` solver.

    start's increments are `increments_rows` rows apart, d2 before d1, those that the forward pass has saved newest
    first; end's are `count` rows apart, anchored states `anchored_rows`. Gradients are added to if dw1 is there, and u
    and c go to scratch memory if that is there.
    """
    weights = Weights(w1, b1, w2, b2, hidden)
    gradients = Gradients(dw1, db1, dw2, db2)
    tile = tl.program_id(0).to(tl.int64)
    row = tile * CONFIG.rows
    inside = inside_of(row, count, CONFIG)
    x = load_tile(start.x, row, inside, CONFIG)
    g = load_tile(start.g, row, inside, CONFIG)
    if SOLVER.extrapolates:
        d2 = rounded(load_tile(start.increments, row, inside, CONFIG), weights)
        d1 = rounded(load_tile(start.increments + increments_rows * CONFIG.dim, row, inside, CONFIG), weights)
    for i in range(last - first):
        n = last - 1 - i
        h = tl.load(schedule + 4 * n)
        if SOLVER.extrapolates:
            a, b = tl.load(schedule + 4 * n + 1), tl.load(schedule + 4 * n + 2)
            y = x - (a * d1.to(tl.float32) - b * d2.to(tl.float32))
        elif CONFIG.is_heun:
            y = add_increment(x, x, -h, 1, n + 1, n, weights, CONFIG)
        else:
            y = add_layer(x, x, -h, n, weights, CONFIG)
        for _ in range(SOLVER.corrections):
            y = add_increment(x, y, h, -1, n, n + 1, weights, CONFIG)
        if anchored is not None:
            place = anchor_place(schedule, n)
            is_anchored = place >= 0
            at = anchored + place * anchored_rows * CONFIG.dim
            y = tl.where(is_anchored, load_tile(at, row, inside & is_anchored, CONFIG), y)
        # Rows beyond the end must stay finite: their cotangents are zero.
        y = tl.where(inside, y, 0)

        g, p = step_vjp(
            *(g, tl.zeros_like(x), y, h, n, first, row, scratch_rows),
            *(scratch, weights, gradients, SOLVER.reuse, CONFIG),
        )

        if SOLVER.reuse:
            x = x - p
        else:
            x = y
        measured = inside
        if anchored is not None:
            x = tl.where(is_anchored, y, x)
            measured = inside & (place < 0)
        if SOLVER.reuse and SOLVER.extrapolates:
            d2 = d1
            d1 = rounded(p, weights)
        at_step = squares + (tile * steps + n) * 2
        if SOLVER.reuse:
            e = tl.where(measured, y - x, 0)
            tl.store(at_step, tl.sum(e * e))
        x_measured = tl.where(measured, x, 0)
        tl.store(at_step + 1, tl.sum(x_measured * x_measured))
    store_tile(end.g, g, row, inside, CONFIG)
    if end.x is not None:
        store_tile(end.x, x, row, inside, CONFIG)
    if SOLVER.extrapolates:
        if end.increments is not None:
            store_tile(end.increments, d2, row, inside, CONFIG)
            store_tile(end.increments + count * CONFIG.dim, d1, row, inside, CONFIG)
