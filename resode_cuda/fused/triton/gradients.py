"""The gradients of a depth-fused stack's parameters, by Triton, from what a state pass has left of each layer's use.

    dW1 = sum of u dz^T (transposed), dW2 = sum of c a^T, db1 = sum of dz, db2 = sum of c, each times h or h/2

z, a and dz are computed again from u and c; a use's sums stay in registers over a range of rows. `triton_tile.py` says
how memory is laid out.
Must match `tile.Tile`.
"""

import triton
import triton.language as tl

from .layer import activate, hidden, load_w1, load_w2
from .memory import kept


@triton.jit(do_not_specialize=["scratch_rows", "written", "range_rows", "first", "last"])
def weight_gradient_kernel(
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
    scratch_rows: tl.int64,
    written: tl.int64,
    range_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    HIDDEN: tl.int32,
    ATOMIC: tl.constexpr,
    HEUN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A chunk of a layer's hidden dimension per program, over a range of the rows that were written.

    z and the cotangent are computed again from u and c. With one range nobody else adds to the same gradients, and the
    order of the sums is fixed; with several the additions are ATOMIC.
    """
    chunks = HIDDEN // C
    layer = first + tl.program_id(0) // chunks
    j = tl.program_id(0) % chunks * C
    start = tl.program_id(1).to(tl.int64) * range_rows
    stop = tl.minimum(start + range_rows, written)
    w1_chunk = load_w1(w1, layer, j, HIDDEN, D, C)
    w2_chunk = load_w2(w2, layer, j, HIDDEN, D, C)
    for k in tl.static_range(2 if HEUN else 1):
        # With Heun a layer is the first of its own step, and the second of the one before.
        n = layer - k
        use = 2 * (n - first) + k if HEUN else n - first
        is_there = (n >= first) & (n < last)
        scale = tl.load(schedule + 3 * n, mask=is_there, other=0)
        if HEUN:
            scale = 0.5 * scale
        sum1 = tl.zeros([D, C], tl.float32)
        sum2 = tl.zeros([D, C], tl.float32)
        # Added up over the rows of a tile at the end, once.
        bias1 = tl.zeros([ROWS, C], tl.float32)
        end = tl.where(is_there, stop, start)
        for at in tl.range(start, end, ROWS, num_stages=STAGES):
            u = kept(us, use, at, scratch_rows, ROWS, D)
            c = kept(cs, use, at, scratch_rows, ROWS, D)
            a, slope = activate(hidden(u, w1_chunk, b1, layer * HIDDEN + j, C, PRECISION), ACTIVATION)
            dz = tl.dot(c, w2_chunk, input_precision=PRECISION) * slope
            sum1 = tl.dot(u.T, dz.to(u.dtype), sum1, input_precision=PRECISION)
            sum2 = tl.dot(c.T, a.to(c.dtype), sum2, input_precision=PRECISION)
            if db1 is not None:
                bias1 += dz
        # Each use by itself: the sums of two would not fit in registers. Of one that is not there they are zero.
        corner = tl.full([], layer, tl.int64) * D * HIDDEN + j
        place = corner + ((tl.arange(0, D) * HIDDEN)[:, None] + tl.arange(0, C)[None, :])
        _add(dw1 + place, scale * sum1, ATOMIC)
        _add(dw2 + place, scale * sum2, ATOMIC)
        if db1 is not None:
            _add(db1 + layer * HIDDEN + j + tl.arange(0, C), scale * tl.sum(bias1, 0), ATOMIC)
        if db2 is not None:
            if j == 0:
                bias2 = tl.zeros([ROWS, D], tl.float32)
                for at in tl.range(start, end, ROWS, num_stages=STAGES):
                    bias2 += kept(cs, use, at, scratch_rows, ROWS, D).to(tl.float32)
                _add(db2 + layer * D + tl.arange(0, D), scale * tl.sum(bias2, 0), ATOMIC)
        if HEUN:
            # The second use reads what other threads may have written for the first.
            tl.debug_barrier()


@triton.jit
def _add(out: tl.tensor, values: tl.tensor, ATOMIC: tl.constexpr) -> None:
    if ATOMIC:
        tl.atomic_add(out, values, sem="relaxed")
    else:
        tl.store(out, tl.load(out) + values)
