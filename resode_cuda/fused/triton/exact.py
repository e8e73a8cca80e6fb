"""The depth-fused adjoint from the exact states, by Triton; `triton_tile.py` says how memory is laid out.

    from x_first forward over a range of steps, keeping u of every use of a layer, and back with g_last to g_first

Must match `torch_backend.exact_adjoint`.
"""

import triton
import triton.language as tl

from .layer import add_layer, normalize, pull_layer, rounded
from .memory import inside_of, keep, kept, load_tile, store_tile


@triton.jit(do_not_specialize=["count", "scratch_rows", "first", "last"])
def exact_kernel(
    x_first: tl.tensor,
    g_last: tl.tensor,
    g_first: tl.tensor,
    us: tl.tensor,
    rs: tl.tensor,
    cs: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    count: tl.int64,
    scratch_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    HIDDEN: tl.int32,
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
    """A tile per program, of `count` rows: forward over the steps from first to last - 1, and back.

    u of each use goes to us and, with a norm, r to rs, [uses, scratch_rows] float32; they are read again on the way
    back, when c goes to cs.
    """
    start = tl.program_id(0).to(tl.int64) * ROWS
    inside = inside_of(start, count, DIM, ROWS, D)
    x = load_tile(x_first, start, inside, DIM, ROWS, D)
    for i in range(last - first):
        n = first + i
        h = tl.load(schedule + 3 * n)
        u, r = normalize(x, NORM, DIM, D, EPSILON)
        use = 2 * i if HEUN else i
        keep(us, u, use, start, scratch_rows, ROWS, D)
        if rs is not None:
            tl.store(rs + use * scratch_rows + start + tl.arange(0, ROWS), r)
        if HEUN:
            middle = add_layer(
                *(x, x, h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            u, r = normalize(middle, NORM, DIM, D, EPSILON)
            keep(us, u, use + 1, start, scratch_rows, ROWS, D)
            if rs is not None:
                tl.store(rs + (use + 1) * scratch_rows + start + tl.arange(0, ROWS), r)
            x = add_layer(
                *(0.5 * (x + middle), middle, 0.5 * h, n + 1, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        else:
            x = add_layer(
                *(x, x, h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        x = tl.where(inside, x, 0)
    # What this program's threads have written is read by others of them.
    tl.debug_barrier()
    g = load_tile(g_last, start, inside, DIM, ROWS, D)
    for i in range(last - first):
        n = last - 1 - i
        h = tl.load(schedule + 3 * n)
        if HEUN:
            use = 2 * (n - first)
            u = kept(us, use + 1, start, scratch_rows, ROWS, D)
            if rs is not None:
                r = tl.load(rs + (use + 1) * scratch_rows + start + tl.arange(0, ROWS))
            else:
                r = tl.zeros([ROWS], tl.float32)
            c = rounded(g, w1)
            keep(cs, c, use + 1, start, scratch_rows, ROWS, D)
            through, _ = pull_layer(
                *(tl.zeros_like(g), g, u, r, c, 0.5 * h, n + 1, w1, b1, w2, b2, None, None, None, None, HIDDEN),
                *(False, False, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            c = rounded(g + 2 * through, w1)
            g += through
        else:
            use = n - first
            c = rounded(g, w1)
        u = kept(us, use, start, scratch_rows, ROWS, D)
        if rs is not None:
            r = tl.load(rs + use * scratch_rows + start + tl.arange(0, ROWS))
        else:
            r = tl.zeros([ROWS], tl.float32)
        keep(cs, c, use, start, scratch_rows, ROWS, D)
        g, _ = pull_layer(
            *(g, g, u, r, c, 0.5 * h if HEUN else h, n, w1, b1, w2, b2, None, None, None, None, HIDDEN),
            *(False, False, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
    store_tile(g_first, g, start, inside, DIM, ROWS, D)
