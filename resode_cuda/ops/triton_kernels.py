"""Triton kernels of the pointwise ops; `triton.py` launches them. Importing this module needs Triton.

    step_kernel:            out = x + w (k1 + k2)
    reverse_kernel:         x <- x - w (k1 + k2), |y - x|^2 and |x|^2, and with d the extrapolation of y and d
    adjoint_update_kernel:  g <- s g + t (v1 + v2), which reverse_kernel does too where there is a g

Formulas and names are those of `reference.py`, which these must match: bit for bit in fp32 and fp64, squares excepted.
Operands are n consecutive values each; k1 and k2 have x's dtype or a narrower one. An operand that is None is compiled
away. A tile is BLOCK consecutive values, and a thread holds neighbours, so that each access of an aligned operand moves
16 bytes. All loads of a tile come before its stores, which the compiler could not reorder: it takes every pointer for
an alias of every other. Nothing is read or written twice; squares are summed in registers, then through shared memory,
and in fp32 by three sums, as `csrc/pointwise/square_sum.h` explains.

Rounding: 16-bit values are computed in fp32. A fused multiply-add is written `tl.fma` where the reference has one, and
kernels are compiled with enable_fp_fusion=False, so that no other product and sum are fused.

Scalars are declared tl.float64 and rounded here: a Python float that is not declared arrives in fp32, whatever the
stream. They are not specialised on. Addresses are those of a tile, in int64, plus a 32-bit place in it.
"""

import triton
import triton.language as tl

SHRINK, GROW = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)
LEAST, MOST = tl.constexpr(2.0**-80), tl.constexpr(3.4028234e38)
"""Sums of squares in fp32 between these have lost nothing that counts."""


@triton.constexpr_function
def _wide(stream: tl.dtype) -> tl.dtype:
    """Dtype in which a stream is computed, given the type of pointers to it."""
    return tl.float64 if stream.element_ty == tl.float64 else tl.float32


@triton.constexpr_function
def _neighbours(stream: tl.dtype) -> int:
    """Number of a stream's values that fill an access of 16 bytes."""
    return 128 // stream.element_ty.primitive_bitwidth


@triton.jit
def _load(
    operand: tl.tensor, stream: tl.constexpr, start: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """A tile in the dtype of the arithmetic. `left` values are there, or a whole tile if it is None; the others are 0.

    A mask would break accesses of 16 bytes up wherever n is odd, so whole tiles go without.
    """
    # A thread would hold as many values as fill 16 bytes of a narrower k1, and stores of x go through shared memory.
    place = tl.max_contiguous(tl.arange(0, BLOCK), _neighbours(stream))
    if left is None:
        return tl.load(operand + start + place).to(_wide(stream))
    else:
        return tl.load(operand + start + place, mask=place < left, other=0).to(_wide(stream))


@triton.jit
def _load_sum(
    k1: tl.tensor, k2: tl.tensor, stream: tl.constexpr, start: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    values = _load(k1, stream, start, left, BLOCK)
    if k2 is not None:
        values += _load(k2, stream, start, left, BLOCK)
    return values


@triton.jit
def _store(operand: tl.tensor, start: tl.tensor, left: tl.tensor, values: tl.tensor, BLOCK: tl.constexpr) -> None:
    place = tl.arange(0, BLOCK)
    if left is None:
        tl.store(operand + start + place, values)
    else:
        tl.store(operand + start + place, values, mask=place < left)


@triton.jit
def _scalar(value: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """The float64 argument, rounded once. (The interpreter's argument is a Python float, without a method `to`.)"""
    return tl.full([], value, _wide(stream))


@triton.jit
def _step_tile(
    x: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    out: tl.tensor,
    w: tl.tensor,
    start: tl.tensor,
    left: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    x_tile = _load(x, x.dtype, start, left, BLOCK)
    k_tile = _load_sum(k1, k2, x.dtype, start, left, BLOCK)
    _store(out, start, left, tl.fma(w, k_tile, x_tile), BLOCK)


@triton.jit(do_not_specialize=["n"])
def step_kernel(
    x: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    out: tl.tensor,
    weight: tl.float64,
    n: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    """A tile per program."""
    w = _scalar(weight, x.dtype)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        _step_tile(x, k1, k2, out, w, start, None, BLOCK)
    else:
        _step_tile(x, k1, k2, out, w, start, n - start, BLOCK)


@triton.jit
def _adjoint_tile(
    g: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    s: tl.tensor,
    t: tl.tensor,
    start: tl.tensor,
    left: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The new g, not stored yet."""
    g_tile = s * _load(g, g.dtype, start, left, BLOCK)
    if v1 is not None:
        g_tile = tl.fma(t, _load(v1, g.dtype, start, left, BLOCK), g_tile)
    if v2 is not None:
        g_tile = tl.fma(t, _load(v2, g.dtype, start, left, BLOCK), g_tile)
    return g_tile


@triton.jit(do_not_specialize=["n"])
def adjoint_update_kernel(
    g: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    g_scale: tl.float64,
    v_scale: tl.float64,
    n: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    """A tile per program."""
    s, t = _scalar(g_scale, g.dtype), _scalar(v_scale, g.dtype)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        _store(g, start, None, _adjoint_tile(g, v1, v2, s, t, start, None, BLOCK), BLOCK)
    else:
        _store(g, start, n - start, _adjoint_tile(g, v1, v2, s, t, start, n - start, BLOCK), BLOCK)


@triton.jit
def _reverse_tile(
    x: tl.tensor,
    y: tl.tensor,
    d: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    g: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    w: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    s: tl.tensor,
    t: tl.tensor,
    start: tl.tensor,
    left: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Update a tile; its y - x and x are returned for the squares."""
    x_tile = _load(x, x.dtype, start, left, BLOCK)
    y_tile = _load(y, x.dtype, start, left, BLOCK)
    k_tile = _load_sum(k1, k2, x.dtype, start, left, BLOCK)
    if d is not None:
        d_tile = _load(d, x.dtype, start, left, BLOCK)
    if g is not None:
        g_tile = _adjoint_tile(g, v1, v2, s, t, start, left, BLOCK)

    # The state as it is stored: its squares are summed, and the prediction starts from it.
    x_tile = tl.fma(-w, k_tile, x_tile).to(x.dtype.element_ty).to(w.dtype)
    _store(x, start, left, x_tile, BLOCK)
    if d is not None:
        increment = w * k_tile
        _store(y, start, left, tl.fma(-a, increment, b * d_tile) + x_tile, BLOCK)
        _store(d, start, left, increment, BLOCK)
    if g is not None:
        _store(g, start, left, g_tile, BLOCK)
    return y_tile - x_tile, x_tile


@triton.jit
def _no_squares(stream: tl.constexpr, BLOCK: tl.constexpr) -> tl.tuple:
    """A program's sums of squares, for each thread those of places that it loads together."""
    zeros = tl.zeros([BLOCK // _neighbours(stream)], _wide(stream))
    return zeros, zeros, zeros


@triton.jit
def _with_squares(sums: tl.tuple, values: tl.tensor, stream: tl.constexpr) -> tl.tuple:
    """The sums with the squares of a tile: of its values as they are and, in fp32, of 2^-60 and 2^60 times them."""
    plain, of_large, of_small = sums
    plain += _square_sums(values, stream)
    if values.dtype == tl.float32:
        of_large += _square_sums(values * SHRINK, stream)
        of_small += _square_sums(values * GROW, stream)
    return plain, of_large, of_small


@triton.jit
def _square_sums(values: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    neighbours: tl.constexpr = _neighbours(stream)
    return tl.sum(tl.reshape(values * values, [values.shape[0] // neighbours, neighbours]), axis=1)


@triton.jit
def _total(sums: tl.tuple) -> tl.tensor:
    """The sum in fp64: of plain sums where they are in range, else of those of scaled values."""
    plain, of_large, of_small = sums
    total = plain.to(tl.float64)
    if plain.dtype == tl.float32:
        total = tl.where(plain < LEAST, of_small.to(tl.float64) * (SHRINK * SHRINK), total)
        # NaN, too, is in the other sum.
        total = tl.where(plain <= MOST, total, of_large.to(tl.float64) * (GROW * GROW))
    return tl.sum(total)


@triton.jit(do_not_specialize=["n"])
def reverse_kernel(
    x: tl.tensor,
    y: tl.tensor,
    d: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    g: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    squares: tl.tensor,
    partial_squares: tl.tensor,
    weight: tl.float64,
    a: tl.float64,
    b: tl.float64,
    g_scale: tl.float64,
    v_scale: tl.float64,
    n: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    """Tiles in turn by a limited number of programs, each of which adds to the squares once.

    With partial_squares, of shape [2, programs], the sums go there, for add_partial_squares_kernel.
    """
    w = _scalar(weight, x.dtype)
    a, b = _scalar(a, x.dtype), _scalar(b, x.dtype)
    s, t = _scalar(g_scale, x.dtype), _scalar(v_scale, x.dtype)
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    whole = n // BLOCK
    defects = _no_squares(x.dtype, BLOCK)
    states = _no_squares(x.dtype, BLOCK)
    for tile in range(program, whole, programs):
        e, x_tile = _reverse_tile(x, y, d, k1, k2, g, v1, v2, w, a, b, s, t, tile * BLOCK, None, BLOCK)
        defects = _with_squares(defects, e, x.dtype)
        states = _with_squares(states, x_tile, x.dtype)
    start = whole * BLOCK
    if (start < n) & (program == whole % programs):
        e, x_tile = _reverse_tile(x, y, d, k1, k2, g, v1, v2, w, a, b, s, t, start, n - start, BLOCK)
        defects = _with_squares(defects, e, x.dtype)
        states = _with_squares(states, x_tile, x.dtype)
    if partial_squares is None:
        tl.atomic_add(squares, _total(defects), sem="relaxed")
        tl.atomic_add(squares + 1, _total(states), sem="relaxed")
    else:
        tl.store(partial_squares + program, _total(defects))
        tl.store(partial_squares + programs + program, _total(states))


@triton.jit(do_not_specialize=["count"])
def add_partial_squares_kernel(
    partial_squares: tl.tensor, squares: tl.tensor, count: tl.int32, BLOCK: tl.constexpr
) -> None:
    """squares[i] += the sum of partial_squares[i], of shape [2, count], in an order that only count determines."""
    place = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], squares.dtype.element_ty)
    for start in range(0, count, BLOCK):
        total += tl.load(partial_squares + row * count + start + place, mask=start + place < count, other=0)
    tl.store(squares + row, tl.load(squares + row) + tl.sum(total))
