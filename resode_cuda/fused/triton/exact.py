"""The depth-fused adjoint from the exact states, by Triton; `memory.py` says how memory is laid out.

    from x_first forward over a range of steps, storing u of every layer call, and back with g_last to g_first

Must match `exact_adjoint` of `reference/passes.py`.
"""

import triton
import triton.language as tl

from ..driver import Scratch
from .arguments import Gradients, Weights
from .layer import add_layer, layer_vjp, normalize, output_cotangent
from .memory import inside_of, load_scratch, load_tile, store_scratch, store_tile


@triton.jit
def store_point(
    scratch: Scratch,
    u: tl.tensor,
    r: tl.tensor,
    layer_call: tl.tensor,
    start: tl.tensor,
    scratch_rows: tl.tensor,
    CONFIG: tl.constexpr,
) -> None:
    """Store u and, with a norm, r of a layer call."""
    store_scratch(scratch.layer_inputs, u, layer_call, start, scratch_rows, CONFIG)
    if scratch.inverse_rms is not None:
        tl.store(scratch.inverse_rms + layer_call * scratch_rows + start + tl.arange(0, CONFIG.rows), r)


@triton.jit
def load_point(
    scratch: Scratch, layer_call: tl.tensor, start: tl.tensor, scratch_rows: tl.tensor, CONFIG: tl.constexpr
) -> tl.tensor:
    """(u, r) as `store_point` has stored them; r is zero without a norm."""
    ROWS: tl.constexpr = CONFIG.rows
    u = load_scratch(scratch.layer_inputs, layer_call, start, scratch_rows, CONFIG)
    if scratch.inverse_rms is not None:
        r = tl.load(scratch.inverse_rms + layer_call * scratch_rows + start + tl.arange(0, ROWS))
    else:
        r = tl.zeros([ROWS], tl.float32)
    return u, r


@triton.jit(do_not_specialize=["count", "scratch_rows", "first", "last"])
def exact_kernel(
    x_first: tl.tensor,
    g_last: tl.tensor,
    g_first: tl.tensor,
    scratch: Scratch,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    hidden: tl.int32,
    count: tl.int64,
    scratch_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    CONFIG: tl.constexpr,
) -> None:
    """Take a tile per program, of `count` rows, forward over the steps from first to last - 1, and back.

    u of each layer call and, with a norm, r, [layer calls, scratch_rows] float32, go to scratch memory; they are read
    again on the way back, when c goes there.
    """
    weights = Weights(w1, b1, w2, b2, hidden)
    no_gradients = Gradients(None, None, None, None)
    start = tl.program_id(0).to(tl.int64) * CONFIG.rows
    inside = inside_of(start, count, CONFIG)
    x = load_tile(x_first, start, inside, CONFIG)
    for i in range(last - first):
        n = first + i
        h = tl.load(schedule + 4 * n)
        u, r = normalize(x, CONFIG)
        layer_call = 2 * i if CONFIG.is_heun else i
        store_point(scratch, u, r, layer_call, start, scratch_rows, CONFIG)
        if CONFIG.is_heun:
            middle = add_layer(x, x, h, n, weights, CONFIG)
            u, r = normalize(middle, CONFIG)
            store_point(scratch, u, r, layer_call + 1, start, scratch_rows, CONFIG)
            x = add_layer(0.5 * (x + middle), middle, 0.5 * h, n + 1, weights, CONFIG)
        else:
            x = add_layer(x, x, h, n, weights, CONFIG)
        x = tl.where(inside, x, 0)
    # What this program's threads have written is read by others of them.
    tl.debug_barrier()
    g = load_tile(g_last, start, inside, CONFIG)
    for i in range(last - first):
        n = last - 1 - i
        scale = tl.load(schedule + 4 * n)
        if CONFIG.is_heun:
            scale = 0.5 * scale
            layer_call = 2 * (n - first)
            u, r = load_point(scratch, layer_call + 1, start, scratch_rows, CONFIG)
            c = output_cotangent(g, scale, weights, CONFIG)
            store_scratch(scratch.cotangents, c, layer_call + 1, start, scratch_rows, CONFIG)
            # (h/2) (df_{n+1}/dx)^T g
            through, _ = layer_vjp(tl.zeros_like(g), g, u, r, c, scale, n + 1, weights, no_gradients, False, CONFIG)
            c = output_cotangent(g + 2 * through, scale, weights, CONFIG)
            g += through
        else:
            layer_call = n - first
            c = output_cotangent(g, scale, weights, CONFIG)
        u, r = load_point(scratch, layer_call, start, scratch_rows, CONFIG)
        store_scratch(scratch.cotangents, c, layer_call, start, scratch_rows, CONFIG)
        g, _ = layer_vjp(g, g, u, r, c, scale, n, weights, no_gradients, False, CONFIG)
    store_tile(g_first, g, start, inside, CONFIG)
