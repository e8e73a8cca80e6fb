"""The depth-fused forward pass that stores increments, by Triton; `memory.py` says how memory is laid out.

    x_N from x_0, the anchored states, and each step's increment in BITS bits a value

The companion stays in registers beside x: what is stored is all that this moves through memory. Before it starts, it is
the state that it is to start at. Must match `StoringSweep` of `reference/companion.py`. It is compiled and interpreted,
not yet run on a GPU.
"""

import triton
import triton.language as tl

from ..storage import StoredIncrements
from .arguments import Weights
from .forward import add_increment
from .grouped import groups_of_row, groups_of_tile, places_of_groups, start_companion, store_increment
from .memory import anchor_place, ends_segment, inside_of, load_tile, segment_of, store_tile, stored_place


@triton.jit(do_not_specialize=["rows", "stride", "steps"])
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
    stride: tl.int64,
    steps: tl.int32,
    LARGEST: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    CONFIG: tl.constexpr,
) -> None:
    """Take a tile per program, of all rows, through the steps.

    squares: [tiles, steps, 2], a tile's |x_{n+1} - c_{n+1}|^2 and |x_{n+1} - c_n|^2. sample: x_{n+1} of the first step
    that is stored, in every `stride`-th row. Layers see the companion where it is ROUNDED.
    """
    weights = Weights(w1, b1, w2, b2, hidden)
    tile = tl.program_id(0).to(tl.int64)
    row = tile * CONFIG.rows
    inside = inside_of(row, rows, CONFIG)
    place, is_there = places_of_groups(rows - row, CONFIG)
    x = load_tile(x_first, row, inside, CONFIG)
    companion = x
    unit = tl.zeros([groups_of_tile(CONFIG)], tl.float32)
    if ROUNDED:
        companion, unit = start_companion(x, x, CONFIG)
    for n in range(steps):
        h = tl.load(schedule + 4 * n)
        segment = segment_of(schedule, n)
        is_anchored = anchor_place(schedule, n) >= 0
        if anchored is not None:
            if is_anchored:
                store_tile(anchored + anchor_place(schedule, n) * rows * CONFIG.dim, x, row, inside, CONFIG)
        if ROUNDED:
            x = add_increment(x, tl.where(is_anchored, x, companion), h, 1, n, n + 1, weights, CONFIG)
            if is_anchored:
                companion, unit = start_companion(x, x, CONFIG)
        else:
            x = add_increment(x, x, h, 1, n, n + 1, weights, CONFIG)
            if is_anchored | (n == 0):
                companion, unit = start_companion(tl.where(is_anchored, x, companion), x, CONFIG)
        if (is_anchored | (n == 0)) & (segment >= 0):
            tl.store(stored.units + (segment * rows + row) * groups_of_row(CONFIG) + place, unit, mask=is_there)
        if not is_anchored:
            of_step = stored_place(schedule, n)
            at_step = squares + (tile * steps + n) * 2
            difference = tl.where(inside, x - companion, 0)
            tl.store(at_step + 1, tl.sum(difference * difference))
            first = (of_step * rows + row) * groups_of_row(CONFIG)
            companion = store_increment(x, companion, unit, stored, first, place, is_there, LARGEST, BITS, CONFIG)
            difference = tl.where(inside, x - companion, 0)
            tl.store(at_step, tl.sum(difference * difference))
            if of_step == 0:
                store_sample(sample, x, row, stride, inside, CONFIG)
            if ends_segment(schedule, n, steps):
                store_tile(stored.companions + segment * rows * CONFIG.dim, companion, row, inside, CONFIG)
    store_tile(x_last, x, row, inside, CONFIG)


@triton.jit
def store_sample(
    sample: tl.tensor, x: tl.tensor, start: tl.tensor, stride: tl.tensor, inside: tl.tensor, CONFIG: tl.constexpr
) -> None:
    """Store every `stride`-th row of the batch, of a tile from row `start` on."""
    row = start + tl.arange(0, CONFIG.rows)
    places = (row // stride * CONFIG.dim)[:, None] + tl.arange(0, CONFIG.padded_dim)[None, :]
    tl.store(sample + places, x, mask=inside & (row % stride == 0)[:, None])
