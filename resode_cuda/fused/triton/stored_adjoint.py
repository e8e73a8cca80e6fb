"""The depth-fused adjoint that takes stored increments back, by Triton; `memory.py` says how memory is laid out.

    from c and g after a range of steps to c and g before it: c_n = c_{n+1} - q_n, and the step's product at y = c_n

At a kept state y is that, and where a segment ends c is read. No state is rebuilt. Must match `TakingBackSweep` of
`reference/companion.py`. It was executed on a CPU, not yet on a GPU.
"""

import triton
import triton.language as tl

from ..driver import Boundary, Scratch
from ..storage import StoredIncrements
from .arguments import Gradients, Weights
from .grouped import groups_of_row, places_of_groups, stored_increment
from .memory import (
    anchor_place,
    ends_segment,
    inside_of,
    load_tile,
    segment_of,
    square_of_rows,
    store_tile,
    stored_place,
)
from .step_product import step_vjp


@triton.jit(do_not_specialize=["count", "anchored_rows", "stored_rows", "scratch_rows", "first", "last", "steps"])
def stored_adjoint_kernel(
    start: Boundary,
    end: Boundary,
    anchored: tl.tensor,
    stored: StoredIncrements,
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
    stored_rows: tl.int64,
    scratch_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    steps: tl.int32,
    BITS: tl.constexpr,
    CONFIG: tl.constexpr,
) -> None:
    """Take a tile per program, of `count` rows, through the steps from last - 1 down to first.

    start's x is c_last, unless nothing is known of it yet; end's gets y of the first step. Segments, and steps, of what
    is stored are `stored_rows` rows apart, anchored states `anchored_rows`. squares: [tiles, steps, 3], of the defect
    y - (c_{n+1} - Phi(y)), of y and of c_{n+1}. Gradients and scratch memory are as for `adjoint_kernel`.
    """
    weights = Weights(w1, b1, w2, b2, hidden)
    gradients = Gradients(dw1, db1, dw2, db2)
    tile = tl.program_id(0).to(tl.int64)
    row = tile * CONFIG.rows
    inside = inside_of(row, count, CONFIG)
    place, is_there = places_of_groups(count - row, CONFIG)
    g = load_tile(start.g, row, inside, CONFIG)
    if start.x is not None:
        y = load_tile(start.x, row, inside, CONFIG)
    elif anchored is None:
        y = load_tile(stored.companions, row, inside, CONFIG)
    else:
        y = tl.zeros_like(g)
    squares += tile * steps * 3
    for i in range(last - first):
        n = last - 1 - i
        h = tl.load(schedule + 4 * n)
        after, segment, is_kept = y, 0, is_there
        if anchored is not None:
            at_anchor, segment = anchor_place(schedule, n), tl.maximum(segment_of(schedule, n), 0)
            is_stored = at_anchor < 0
            is_read = is_stored & ends_segment(schedule, n, steps)
            ending = stored.companions + segment * stored_rows * CONFIG.dim
            after = tl.where(is_read, load_tile(ending, row, inside & is_read, CONFIG), y)
            is_kept &= is_stored
        of_segment = (segment * stored_rows + row) * groups_of_row(CONFIG)
        unit = tl.load(stored.units + of_segment + place, mask=is_kept, other=1.0)
        of_step = (stored_place(schedule, n) * stored_rows + row) * groups_of_row(CONFIG)
        increment = stored_increment(stored, unit, of_step, place, is_kept, BITS, CONFIG)
        y = after - increment
        # Rows beyond the end are zero.
        squares_here = tl.sum(y * y), tl.sum(after * after)
        if anchored is not None:
            kept = anchored + at_anchor * anchored_rows * CONFIG.dim
            y = tl.where(is_stored, y, load_tile(kept, row, inside & (at_anchor >= 0), CONFIG))
        g, defect = step_vjp(
            *(g, -increment, y, h, n, first, row, scratch_rows),
            *(scratch, weights, gradients, True, CONFIG),
        )
        if anchored is None or is_stored:
            tl.store(squares + 3 * n, square_of_rows(defect, count - row))
            tl.store(squares + 3 * n + 1, squares_here[0])
            tl.store(squares + 3 * n + 2, squares_here[1])
    store_tile(end.g, g, row, inside, CONFIG)
    if end.x is not None:
        store_tile(end.x, y, row, inside, CONFIG)
