"""Triton kernels of what lies between the matrix products of layers too wide to keep on chip; `wide.py` launches them.

    normalize_kernel        u and r of the norm: reads x once, writes u
    norm_vjp_kernel         out += scale times the norm's vector-Jacobian product: reads c, u and out once, writes out
    activation_vjp_kernel   the cotangent of z from that of s(z), in place, and its sums over rows

A row of the first two is held by one program, padded to a power of two. The third takes tiles of CONFIG.rows x
CONFIG.columns down a range of rows, and leaves a range's sums in [ranges, hidden] float32, to be added up in a fixed
order. Arithmetic is float32, formulas are those of `norms.py`. CONFIG is a `WideConfig`. Must match `RowTile` of
`reference/tile.py`.
"""

import triton
import triton.language as tl

from .layer import activate


@triton.jit
def normalize_kernel(x: tl.tensor, u: tl.tensor, r: tl.tensor, CONFIG: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CONFIG.padded_dim)
    inside = column < CONFIG.dim
    values = tl.load(x + row * CONFIG.dim + column, mask=inside, other=0)
    if CONFIG.norm == "layer":
        values = tl.where(inside, values - tl.sum(values) / CONFIG.dim, 0)
    scale = tl.rsqrt(tl.sum(values * values) / CONFIG.dim + CONFIG.epsilon)
    tl.store(u + row * CONFIG.dim + column, (values * scale).to(u.dtype.element_ty), mask=inside)
    tl.store(r + row, scale)


@triton.jit(do_not_specialize=["scale"])
def norm_vjp_kernel(
    c: tl.tensor, u: tl.tensor, r: tl.tensor, out: tl.tensor, scale: tl.float32, CONFIG: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CONFIG.padded_dim)
    inside = column < CONFIG.dim
    places = row * CONFIG.dim + column
    cotangent = tl.load(c + places, mask=inside, other=0).to(tl.float32)
    normed = tl.load(u + places, mask=inside, other=0).to(tl.float32)
    along = tl.sum(cotangent * normed) / CONFIG.dim
    if CONFIG.norm == "layer":
        cotangent -= tl.sum(cotangent) / CONFIG.dim
    product = (cotangent - normed * along) * (scale * tl.load(r + row))
    tl.store(out + places, tl.load(out + places, mask=inside, other=0) + product, mask=inside)


@triton.jit(do_not_specialize=["rows", "range_rows"])
def activation_vjp_kernel(
    c: tl.tensor,
    z: tl.tensor,
    sums: tl.tensor,
    rows: tl.int64,
    range_rows: tl.int64,
    hidden: tl.int32,
    CONFIG: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = CONFIG.columns
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * range_rows
    stop = tl.minimum(start + range_rows, rows)
    total = tl.zeros([COLUMNS], tl.float32)
    for at in range(start, stop, CONFIG.rows):
        row = at + tl.arange(0, CONFIG.rows)
        inside = (row < stop)[:, None] & (column < hidden)[None, :]
        places = row[:, None] * hidden + column[None, :]
        slope = activate(tl.load(z + places, mask=inside, other=0).to(tl.float32), CONFIG).slope
        cotangent = tl.load(c + places, mask=inside, other=0).to(tl.float32) * slope
        tl.store(c + places, cotangent.to(c.dtype.element_ty), mask=inside)
        total += tl.sum(cotangent, 0)
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * hidden + column, total, mask=column < hidden)
