"""The gradients of a depth-fused stack's parameters, by Triton, from what a state pass has left of each layer call.

    dW1 = sum of u dz^T (transposed), dW2 = sum of c a^T, db1 = sum of dz, db2 = sum of c

each times h or h/2 in float16, in which c lacks it (CONFIG.scales_first).
z, a and dz are computed again from u and c; a call's sums stay in registers over a range of rows. `memory.py` says how
memory is laid out.
Must match `RowTile` of `reference/tile.py`.
"""

import triton
import triton.language as tl

from ..driver import Scratch
from .arguments import Gradients, Weights
from .layer import hidden_units, load_w1, load_w2
from .memory import load_scratch


@triton.jit(do_not_specialize=["scratch_rows", "written", "range_rows", "first", "last"])
def weight_gradient_kernel(
    scratch: Scratch,
    gradients: Gradients,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    hidden: tl.int32,
    scratch_rows: tl.int64,
    written: tl.int64,
    range_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    ATOMIC: tl.constexpr,
    CONFIG: tl.constexpr,
) -> None:
    """Take a chunk of a layer's hidden dimension per program over a range of the rows that were written.

    z and the cotangent are computed again from u and c. With one range no other program adds to the same gradients, and
    the order of the sums is fixed; with several the additions are ATOMIC.
    """
    D: tl.constexpr = CONFIG.padded_dim
    C: tl.constexpr = CONFIG.chunk
    ROWS: tl.constexpr = CONFIG.rows
    weights = Weights(w1, b1, w2, b2, hidden)
    chunks = weights.hidden // C
    layer = first + tl.program_id(0) // chunks
    j = tl.program_id(0) % chunks * C
    start = tl.program_id(1).to(tl.int64) * range_rows
    stop = tl.minimum(start + range_rows, written)
    w1_chunk = load_w1(weights, layer, j, CONFIG)
    w2_chunk = load_w2(weights, layer, j, CONFIG)
    for k in tl.static_range(2 if CONFIG.is_heun else 1):
        # With Heun a layer is the first of its own step, and the second of the one before.
        n = layer - k
        layer_call = 2 * (n - first) + k if CONFIG.is_heun else n - first
        is_there = (n >= first) & (n < last)
        if CONFIG.scales_first:
            scale = 1.0  # c has the factor
        else:
            scale = tl.load(schedule + 4 * n, mask=is_there, other=0)
            if CONFIG.is_heun:
                scale = 0.5 * scale
        sum1 = tl.zeros([D, C], tl.float32)
        sum2 = tl.zeros([D, C], tl.float32)
        # Added up over the rows of a tile at the end, once.
        bias1 = tl.zeros([ROWS, C], tl.float32)
        end = tl.where(is_there, stop, start)
        for at in tl.range(start, end, ROWS, num_stages=CONFIG.stages):
            u = load_scratch(scratch.layer_inputs, layer_call, at, scratch_rows, CONFIG)
            c = load_scratch(scratch.cotangents, layer_call, at, scratch_rows, CONFIG)
            activated = hidden_units(u, w1_chunk, weights, layer, j, CONFIG)
            dz = tl.dot(c, w2_chunk, input_precision=CONFIG.precision) * activated.slope
            sum1 = tl.dot(u.T, dz.to(u.dtype), sum1, input_precision=CONFIG.precision)
            sum2 = tl.dot(c.T, activated.value.to(c.dtype), sum2, input_precision=CONFIG.precision)
            if gradients.db1 is not None:
                bias1 += dz
        # Each call by itself: the sums of two would not fit in registers. Of one that is not there they are zero.
        corner = tl.full([], layer, tl.int64) * D * weights.hidden + j
        places = corner + ((tl.arange(0, D) * weights.hidden)[:, None] + tl.arange(0, C)[None, :])
        _add(gradients.dw1 + places, scale * sum1, ATOMIC)
        _add(gradients.dw2 + places, scale * sum2, ATOMIC)
        if gradients.db1 is not None:
            _add(gradients.db1 + layer * weights.hidden + j + tl.arange(0, C), scale * tl.sum(bias1, 0), ATOMIC)
        if gradients.db2 is not None:
            if j == 0:
                bias2 = tl.zeros([ROWS, D], tl.float32)
                for at in tl.range(start, end, ROWS, num_stages=CONFIG.stages):
                    bias2 += load_scratch(scratch.cotangents, layer_call, at, scratch_rows, CONFIG).to(tl.float32)
                _add(gradients.db2 + layer * D + tl.arange(0, D), scale * tl.sum(bias2, 0), ATOMIC)
        if CONFIG.is_heun:
            # The second call reads what other threads may have written for the first.
            tl.debug_barrier()


@triton.jit
def _add(out: tl.tensor, values: tl.tensor, ATOMIC: tl.constexpr) -> None:
    if ATOMIC:
        tl.atomic_add(out, values, sem="relaxed")
    else:
        tl.store(out, tl.load(out) + values)
