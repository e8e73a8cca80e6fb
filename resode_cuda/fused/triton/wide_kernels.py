"""Triton kernels of what lies between the matrix products of layers too wide to keep on chip; `wide.py` launches them.

    normalize_kernel        u and r of the norm; with an out, out = x + scale b2: reads x once, writes u and out
    norm_vjp_kernel         out += scale times the norm's vector-Jacobian product: reads c, u and out once, writes out
    activation_vjp_kernel   the cotangent of z from that of s(z), in place, and its sums over rows
    rebuild_kernel          x <- x - (d + scale b2), |y - x|^2 and |x|^2; with a d_next the extrapolation of y, and d
                            with the bias: reads and writes each once
    squares_kernel          |x - minus + (increment + scale b2)|^2, without what is not there: reads each once

A row is held by one program, padded to a power of two; its squares are left in [rows, *] float64. Cotangents go through
the activation in tiles of CONFIG.rows x CONFIG.columns down a range of rows, whose sums are left in [ranges, hidden]
float32. Both are added up in a fixed order. Arithmetic is float32, formulas are those of `norms.py`. CONFIG is a
`WideConfig`. Must match `RowTile` of `reference/tile.py`.
"""

import triton
import triton.language as tl

from .layer import activate


@triton.jit(do_not_specialize=["scale"])
def normalize_kernel(
    x: tl.tensor,
    u: tl.tensor,
    r: tl.tensor,
    out: tl.tensor,
    bias: tl.tensor,
    scale: tl.float32,
    CONFIG: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CONFIG.padded_dim)
    inside = column < CONFIG.dim
    places = row * CONFIG.dim + column
    values = tl.load(x + places, mask=inside, other=0)
    if out is not None:
        tl.store(out + places, values + _scaled_bias(bias, scale, CONFIG), mask=inside)
    if CONFIG.norm is not None:
        if CONFIG.norm == "layer":
            values = tl.where(inside, values - tl.sum(values) / CONFIG.dim, 0)
        inverse = tl.rsqrt(tl.sum(values * values) / CONFIG.dim + CONFIG.epsilon)
        values *= inverse
        tl.store(r + row, inverse)
    tl.store(u + places, values.to(u.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_bias(bias: tl.tensor, scale: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """scale b2, for each value of a row; zeros without a bias."""
    column = tl.arange(0, CONFIG.padded_dim)
    if bias is None:
        return tl.zeros([CONFIG.padded_dim], tl.float32)
    else:
        return scale * tl.load(bias + column, mask=column < CONFIG.dim, other=0).to(tl.float32)


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


@triton.jit(do_not_specialize=["scale", "a", "b"])
def rebuild_kernel(
    x: tl.tensor,
    y: tl.tensor,
    d: tl.tensor,
    d_next: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
    scale: tl.float32,
    a: tl.float32,
    b: tl.float32,
    CONFIG: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CONFIG.padded_dim)
    inside = column < CONFIG.dim
    places = row * CONFIG.dim + column
    state = tl.load(x + places, mask=inside, other=0)
    point = tl.load(y + places, mask=inside, other=0)
    increment = _scaled_bias(bias, scale, CONFIG)
    if d is not None:
        increment += tl.load(d + places, mask=inside, other=0)
    state -= increment
    if d_next is not None:
        predicted = state - (a * increment - b * tl.load(d_next + places, mask=inside, other=0))
        tl.store(y + places, predicted, mask=inside)
        tl.store(d + places, increment, mask=inside)
    tl.store(x + places, state, mask=inside)
    tl.store(sums + 2 * row, _square_sum(point - state))
    tl.store(sums + 2 * row + 1, _square_sum(state))


@triton.jit
def _square_sum(values: tl.tensor) -> tl.tensor:
    # Even GPUs with few units for float64 take less time for this than for reading the row.
    wide = values.to(tl.float64)
    return tl.sum(wide * wide)


@triton.jit(do_not_specialize=["scale"])
def squares_kernel(
    x: tl.tensor,
    minus: tl.tensor,
    increment: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
    scale: tl.float32,
    CONFIG: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CONFIG.padded_dim)
    inside = column < CONFIG.dim
    places = row * CONFIG.dim + column
    values = tl.load(x + places, mask=inside, other=0)
    if minus is not None:
        values -= tl.load(minus + places, mask=inside, other=0)
    if increment is not None:
        values += tl.load(increment + places, mask=inside, other=0) + _scaled_bias(bias, scale, CONFIG)
    tl.store(sums + row, _square_sum(values))
