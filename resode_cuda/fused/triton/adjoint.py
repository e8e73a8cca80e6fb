"""The depth-fused adjoint that rebuilds the states, by Triton; `triton_tile.py` says how memory is laid out.

    from x_last and g_last to x_first and g_first over a range of steps

y, where a step's product is taken, is the reverse step or x_{n+1} less the increment expected, a d1 - b d2, of which d1
and d2 are those of the two steps behind. The last two steps are predicted by the increments that the forward pass has
kept, d2 with a = 0 and b = -1. Increments are held in the parameters' dtype: y is rounded to that anyway.
Must match `torch_backend.adjoint`.
"""

import triton
import triton.language as tl

from .forward import add_increment
from .layer import add_layer, normalize, pull_layer, rounded
from .memory import inside_of, keep, load_tile, store_tile


@triton.jit(
    do_not_specialize=["count", "rows", "d_last_rows", "scratch_rows", "first", "last", "steps", "anchors"],
)
def adjoint_kernel(
    x_last: tl.tensor,
    g_last: tl.tensor,
    d_last: tl.tensor,
    x_first: tl.tensor,
    g_first: tl.tensor,
    d_first: tl.tensor,
    anchored: tl.tensor,
    norms: tl.tensor,
    us: tl.tensor,
    cs: tl.tensor,
    dw1: tl.tensor,
    db1: tl.tensor,
    dw2: tl.tensor,
    db2: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    d_last_rows: tl.int64,
    scratch_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    steps: tl.int32,
    anchors: tl.int32,
    HIDDEN: tl.int32,
    EXTRAPOLATES: tl.constexpr,
    CORRECTIONS: tl.constexpr,
    REUSES: tl.constexpr,
    FUSED: tl.constexpr,
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
    """A tile per program, of `count` rows, over the steps from last - 1 down to first.

    d_last, d_first: d2 and d1 before and after the range, d_last_rows and count rows apart; those that the forward pass
    has kept stand newest first. anchored: its states are `rows` apart. x_first, d_first: None where nobody goes on from
    there.
    """
    tile = tl.program_id(0).to(tl.int64)
    row = tile * ROWS
    inside = inside_of(row, count, DIM, ROWS, D)
    x = load_tile(x_last, row, inside, DIM, ROWS, D)
    g = load_tile(g_last, row, inside, DIM, ROWS, D)
    if EXTRAPOLATES:
        d2 = rounded(load_tile(d_last, row, inside, DIM, ROWS, D), w1)
        d1 = rounded(load_tile(d_last + d_last_rows * DIM, row, inside, DIM, ROWS, D), w1)
    for i in range(last - first):
        n = last - 1 - i
        h = tl.load(schedule + 3 * n)
        if EXTRAPOLATES:
            a, b = tl.load(schedule + 3 * n + 1), tl.load(schedule + 3 * n + 2)
            y = x - (a * d1.to(tl.float32) - b * d2.to(tl.float32))
        elif HEUN:
            y = add_increment(
                *(x, x, -h, 1, n + 1, n, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        else:
            y = add_layer(
                *(x, x, -h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        for _ in range(CORRECTIONS):
            y = add_increment(
                *(x, y, h, -1, n, n + 1, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        if anchored is not None:
            is_anchored = n % anchors == 0
            exact = load_tile(anchored + (n // anchors) * rows * DIM, row, inside & is_anchored, DIM, ROWS, D)
            y = tl.where(is_anchored, exact, y)
        # Rows beyond the end must stay finite: their cotangents are zero.
        y = tl.where(inside, y, 0)

        p = tl.zeros_like(x)
        if HEUN:
            middle = add_layer(
                *(y, y, h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            if REUSES:
                p = 0.5 * (middle - y)
            u, r = normalize(middle, NORM, DIM, D, EPSILON)
            u, c = rounded(u, w1), rounded(g, w1)
            if us is not None:
                keep(us, u, 2 * (n - first) + 1, row, scratch_rows, ROWS, D)
                keep(cs, c, 2 * (n - first) + 1, row, scratch_rows, ROWS, D)
            # (h/2) (df_{n+1}/dx)^T g
            through, p = pull_layer(
                *(tl.zeros_like(g), p, u, r, c, 0.5 * h, n + 1, w1, b1, w2, b2, dw1, db1, dw2, db2, HIDDEN),
                *(REUSES, FUSED, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            u, r = normalize(y, NORM, DIM, D, EPSILON)
            u, c = rounded(u, w1), rounded(g + 2 * through, w1)
            if us is not None:
                keep(us, u, 2 * (n - first), row, scratch_rows, ROWS, D)
                keep(cs, c, 2 * (n - first), row, scratch_rows, ROWS, D)
            g, p = pull_layer(
                *(g + through, p, u, r, c, 0.5 * h, n, w1, b1, w2, b2, dw1, db1, dw2, db2, HIDDEN),
                *(False, FUSED, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        else:
            u, r = normalize(y, NORM, DIM, D, EPSILON)
            u, c = rounded(u, w1), rounded(g, w1)
            if us is not None:
                keep(us, u, n - first, row, scratch_rows, ROWS, D)
                keep(cs, c, n - first, row, scratch_rows, ROWS, D)
            g, p = pull_layer(
                *(g, p, u, r, c, h, n, w1, b1, w2, b2, dw1, db1, dw2, db2, HIDDEN),
                *(REUSES, FUSED, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )

        if REUSES:
            x = x - p
        else:
            x = y
        measured = inside
        if anchored is not None:
            x = tl.where(is_anchored, y, x)
            measured = inside & (n % anchors != 0)
        if REUSES and EXTRAPOLATES:
            d2 = d1
            d1 = rounded(p, w1)
        place = norms + (tile * steps + n) * 2
        if REUSES:
            e = tl.where(measured, y - x, 0)
            tl.store(place, tl.sum(e * e))
        x_measured = tl.where(measured, x, 0)
        tl.store(place + 1, tl.sum(x_measured * x_measured))
    store_tile(g_first, g, row, inside, DIM, ROWS, D)
    if x_first is not None:
        store_tile(x_first, x, row, inside, DIM, ROWS, D)
    if EXTRAPOLATES:
        if d_first is not None:
            store_tile(d_first, d2, row, inside, DIM, ROWS, D)
            store_tile(d_first + count * DIM, d1, row, inside, DIM, ROWS, D)
