"""Triton kernels of what lies between the matrix products of layers too wide to keep on chip; `wide.py` launches them.

    normalize_kernel            u and r of `norms.normalize`: reads x once, writes u
    pull_back_kernel            out += scale times the product of `norms.pull_back`: reads c, u and out once, writes out
    activation_backward_kernel  the cotangent of z from that of s(z), in place, and its sums over rows

A row of the first two is held by one program, [D] values padded to a power of two. The third takes ROWS x COLUMNS tiles
down a range of rows, and leaves a range's sums in [ranges, hidden] float32, to be added up in a fixed order. Arithmetic
is float32. Must match `tile.Tile`.
"""

import triton
import triton.language as tl

from .layer import activate


@triton.jit
def normalize_kernel(
    x: tl.tensor,
    u: tl.tensor,
    r: tl.tensor,
    HAS_MEAN: tl.constexpr,
    EPSILON: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    inside = column < DIM
    values = tl.load(x + row * DIM + column, mask=inside, other=0)
    if HAS_MEAN:
        values = tl.where(inside, values - tl.sum(values) / DIM, 0)
    scale = tl.rsqrt(tl.sum(values * values) / DIM + EPSILON)
    tl.store(u + row * DIM + column, (values * scale).to(u.dtype.element_ty), mask=inside)
    tl.store(r + row, scale)


@triton.jit(do_not_specialize=["scale"])
def pull_back_kernel(
    c: tl.tensor,
    u: tl.tensor,
    r: tl.tensor,
    out: tl.tensor,
    scale: tl.float32,
    HAS_MEAN: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    inside = column < DIM
    place = row * DIM + column
    cotangent = tl.load(c + place, mask=inside, other=0).to(tl.float32)
    normed = tl.load(u + place, mask=inside, other=0).to(tl.float32)
    along = tl.sum(cotangent * normed) / DIM
    if HAS_MEAN:
        cotangent -= tl.sum(cotangent) / DIM
    product = (cotangent - normed * along) * (scale * tl.load(r + row))
    tl.store(out + place, tl.load(out + place, mask=inside, other=0) + product, mask=inside)


@triton.jit(do_not_specialize=["rows", "range_rows"])
def activation_backward_kernel(
    c: tl.tensor,
    z: tl.tensor,
    sums: tl.tensor,
    rows: tl.int64,
    range_rows: tl.int64,
    HIDDEN: tl.int32,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * range_rows
    stop = tl.minimum(start + range_rows, rows)
    total = tl.zeros([COLUMNS], tl.float32)
    for at in range(start, stop, ROWS):
        row = at + tl.arange(0, ROWS)
        inside = (row < stop)[:, None] & (column < HIDDEN)[None, :]
        place = row[:, None] * HIDDEN + column[None, :]
        slope = activate(tl.load(z + place, mask=inside, other=0).to(tl.float32), ACTIVATION)[1]
        cotangent = tl.load(c + place, mask=inside, other=0).to(tl.float32) * slope
        tl.store(c + place, cotangent.to(c.dtype.element_ty), mask=inside)
        total += tl.sum(cotangent, 0)
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * HIDDEN + column, total, mask=column < HIDDEN)
