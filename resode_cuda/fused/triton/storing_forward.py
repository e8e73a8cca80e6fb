"""The depth-fused forward pass that stores increments, by Triton; `memory.py` says how memory is laid out.

    x_N from x_0, the anchored states, and each step's increment in BITS bits a value

The companion stays in registers beside x: what is stored is all that this moves through memory. Before it starts, it is
the state that it is to start at. Must match `StoringSweep` of `reference/companion.py`. It was executed on a CPU, not
yet on a GPU.
"""

import triton
import triton.language as tl

from ..storage import StoredIncrements
from .arguments import Weights
from .forward import add_increment
from .grouped import groups_of_row, groups_of_tile, places_of_groups, start_companion, store_increment
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


@triton.jit(do_not_specialize=["rows", "shift", "steps"])
def storing_forward_kernel(
    x_first: tl.tensor,
    x_last: tl.tensor,
    anchored: tl.tensor,
    stored: StoredIncrements,
    squares: tl.tensor,
    sample: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    hidden: tl.int32,
    rows: tl.int64,
    shift: tl.int32,
    steps: tl.int32,
    LARGEST: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    CONFIG: tl.constexpr,
) -> None:
    """Take a tile per program, of all rows, through the steps.

    squares: [tiles, steps, 2], a tile's |x_{n+1} - c_{n+1}|^2 and |x_{n+1} - c_n|^2. sample: x_{n+1} of the first step
    that is stored, in every 2^shift-th row. Layers see the companion where it is ROUNDED.
    """
    weights = Weights(w1, b1, w2, b2, hidden)
    tile = tl.program_id(0).to(tl.int64)
    row = tile * CONFIG.rows
    inside = inside_of(row, rows, CONFIG)
    x = load_tile(x_first, row, inside, CONFIG)
    if ROUNDED:
        companion, unit = start_companion(x, x, CONFIG)
    else:
        companion, unit = x, tl.zeros([groups_of_tile(CONFIG)], tl.float32)
    squares += tile * steps * 2
    # The first step by itself: what only it and anchors need takes registers.
    x, companion, unit = storing_step(
        *(x, companion, unit, anchored, stored, squares, sample, schedule, weights),
        *(row, rows, shift, 0, steps, True, LARGEST, BITS, ROUNDED, CONFIG),
    )
    for n in range(1, steps):
        x, companion, unit = storing_step(
            *(x, companion, unit, anchored, stored, squares, sample, schedule, weights),
            *(row, rows, shift, n, steps, False, LARGEST, BITS, ROUNDED, CONFIG),
        )
    if anchored is None:
        store_tile(stored.companions, companion, row, inside, CONFIG)
    store_tile(x_last, x, row, inside, CONFIG)


@triton.jit
def storing_step(
    x: tl.tensor,
    companion: tl.tensor,
    unit: tl.tensor,
    anchored: tl.tensor,
    stored: StoredIncrements,
    squares: tl.tensor,
    sample: tl.tensor,
    schedule: tl.tensor,
    weights: Weights,
    row: tl.tensor,
    rows: tl.tensor,
    shift: tl.tensor,
    n: tl.tensor,
    steps: tl.tensor,
    IS_FIRST: tl.constexpr,
    LARGEST: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    CONFIG: tl.constexpr,
) -> tl.tuple:
    """(x_{n+1}, the companion and its units after step n)"""
    MAY_START: tl.constexpr = IS_FIRST or anchored is not None
    h = tl.load(schedule + 4 * n)
    segment = segment_of(schedule, n)
    inside = inside_of(row, rows, CONFIG)
    place, is_there = places_of_groups(rows - row, CONFIG)
    seen = companion if ROUNDED else x
    if anchored is not None:
        is_anchored = anchor_place(schedule, n) >= 0
        if is_anchored:
            store_tile(anchored + anchor_place(schedule, n) * rows * CONFIG.dim, x, row, inside, CONFIG)
        seen = tl.where(is_anchored, x, seen)
    else:
        is_anchored = False
    x = add_increment(x, seen, h, 1, n, n + 1, weights, CONFIG)
    if IS_FIRST and not ROUNDED:
        companion, unit = start_companion(companion, x, CONFIG)
    if is_anchored:
        companion, unit = start_companion(x, x, CONFIG)
    if MAY_START:
        if (segment >= 0) & (IS_FIRST | is_anchored):
            tl.store(stored.units + (segment * rows + row) * groups_of_row(CONFIG) + place, unit, mask=is_there)
    if not is_anchored:
        of_step = stored_place(schedule, n)
        first = (of_step * rows + row) * groups_of_row(CONFIG)
        tl.store(squares + 2 * n + 1, square_of_rows(x - companion, rows - row))
        companion = store_increment(x, companion, unit, stored, first, place, is_there, LARGEST, BITS, CONFIG)
        tl.store(squares + 2 * n, square_of_rows(x - companion, rows - row))
        if MAY_START:
            if of_step == 0:
                store_sample(sample, x, row, shift, inside, CONFIG)
        if anchored is not None:
            if ends_segment(schedule, n, steps):
                store_tile(stored.companions + segment * rows * CONFIG.dim, companion, row, inside, CONFIG)
    return x, companion, unit


@triton.jit
def store_sample(
    sample: tl.tensor, x: tl.tensor, start: tl.tensor, shift: tl.tensor, inside: tl.tensor, CONFIG: tl.constexpr
) -> None:
    """Store every 2^shift-th row of the batch, of a tile from row `start` on."""
    row = start + tl.arange(0, CONFIG.rows)
    place = row >> shift
    places = (place * CONFIG.dim)[:, None] + tl.arange(0, CONFIG.padded_dim)[None, :]
    tl.store(sample + places, x, mask=inside & (place << shift == row)[:, None])
