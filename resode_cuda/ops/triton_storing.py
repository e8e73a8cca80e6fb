"""Triton kernels that store increments in a few bits, and take them back; `triton.py` launches them.

    store_kernel:        c' = c + Q(x - c), and Q's integers and scales; with a k1, x' = x + w (k1 + k2) in place of x
    stored_step_kernel:  c = c' - q, with q as store_kernel has packed it

Must match `stored.store` and `stored.take_back`: integers, scales and companions bit for bit, but for the mean of one
bit, whose sum torch takes in an order of its own. x' must match `reference.forward_step` and `reference.heun_step`.

States and companions are [samples, values], dense and of one order; packed, scales and units as in `stored.py`. A tile
is GROUPS times 32 values, in registers; groups are counted through all samples, in 32 bits, and values in 64. WHOLE
says that no group is short: a tile is then consecutive, a thread holds as many neighbours as fill 16 bytes of the
companion, and a mask spares whole groups. Else values are accessed one by one. Threads share a group's largest value or
sum, and the fields of a byte where they have fewer neighbours than it has fields. One pass: nothing is read or written
twice, except that threads which unpack one byte each load it, from the cache.

Rounding is written out: divisions are IEEE's, and kernels are compiled with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(32)
NAN = tl.constexpr(float("nan"))
NAN_CODE = tl.constexpr(255)
LARGEST_SCALE = tl.constexpr(7.0 * 2.0**29)
"""In units, that of code 254."""


@triton.constexpr_function
def _mantissa(real: tl.dtype) -> int:
    """Bits of the mantissa. Its three highest are a scale's."""
    return 52 if real == tl.float64 else 23


@triton.constexpr_function
def _one(real: tl.dtype) -> int:
    """Exponent and highest three bits of the mantissa of 1, as an integer: a code counts from there."""
    return (1023 if real == tl.float64 else 127) * 8


@triton.constexpr_function
def _as_integer(real: tl.dtype) -> tl.dtype:
    """Integers of as many bits."""
    return tl.int64 if real == tl.float64 else tl.int32


@triton.constexpr_function
def _to_whole(real: tl.dtype) -> float:
    """The number from which on a dtype has no fractions: added and subtracted, it rounds, ties to even."""
    return 2.0 ** _mantissa(real)


@triton.jit
def _divide(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Rounded as IEEE says, which `/` is in fp64 only."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def _scale_of(code: tl.tensor, real: tl.constexpr) -> tl.tensor:
    """In units: 1 + m/8 is a number's mantissa, and e its exponent."""
    bits = (code.to(_as_integer(real)) + _one(real)) << (_mantissa(real) - 3)
    return tl.where(code == NAN_CODE, NAN, tl.math.ceil(bits.to(real, bitcast=True))).to(real)


@triton.jit
def _code_of(size: tl.tensor) -> tl.tensor:
    """Code of the smallest scale that is at least this size, in units; that of NaN where there is none.

    ceil(s) >= size means s > ceil(size) - 1: it is the code after that number's, rounded down. Sizes that are too large
    to have 1 subtracted have scales without fractions, and take the number before them.
    """
    integer: tl.constexpr = _as_integer(size.dtype)
    whole = tl.math.ceil(size)
    before = tl.minimum((whole - 1.0).to(integer, bitcast=True), whole.to(integer, bitcast=True) - 1)
    code = (before >> (_mantissa(size.dtype) - 3)) - _one(size.dtype) + 1
    code = tl.where(size <= 1.0, 0, code)
    return tl.where(size <= LARGEST_SCALE, code, NAN_CODE).to(tl.int32)


@triton.jit
def _places(
    group: tl.tensor,
    values: tl.tensor,
    groups: tl.tensor,
    all_groups: tl.tensor,
    WHOLE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
) -> tl.tuple:
    """The places of each group's values, how many these are, and a mask of those that are there."""
    sample = group // groups
    place = tl.max_contiguous(tl.arange(0, GROUP), NEIGHBOURS)[None, :]
    is_there = (group < all_groups)[:, None]
    if WHOLE:
        return group.to(tl.int64)[:, None] * GROUP + place, GROUP, is_there
    else:
        first = (group - sample * groups).to(tl.int64) * GROUP
        count = tl.minimum(values - first, GROUP)
        start = sample.to(tl.int64) * values + first
        return start[:, None] + place, count, is_there & (place < count[:, None])


@triton.jit
def _pack(
    packed: tl.tensor,
    integers: tl.tensor,
    group: tl.tensor,
    all_groups: tl.tensor,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Store the part of so many bits from SHIFT up, which follows the one of those below."""
    FIELDS: tl.constexpr = 8 // WIDTH
    fields = integers >> SHIFT & ((1 << WIDTH) - 1)
    if FIELDS > 1:
        fields = tl.reshape(fields, [fields.shape[0], GROUP // FIELDS, FIELDS])
        fields = tl.sum(fields << (WIDTH * tl.arange(0, FIELDS))[None, None, :], axis=2)
    place = group.to(tl.int64)[:, None] * (4 * BITS) + (4 * SHIFT + tl.arange(0, 4 * WIDTH))[None, :]
    tl.store(packed + place, fields.to(tl.uint8), mask=(group < all_groups)[:, None])


@triton.jit
def _unpack(
    packed: tl.tensor,
    group: tl.tensor,
    all_groups: tl.tensor,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The bits of `_pack`, where they were."""
    FIELDS: tl.constexpr = 8 // WIDTH
    value = tl.arange(0, GROUP)[None, :]
    place = group.to(tl.int64)[:, None] * (4 * BITS) + (4 * SHIFT + value // FIELDS)
    byte = tl.load(packed + place, mask=(group < all_groups)[:, None], other=0).to(tl.int32)
    return (byte >> value % FIELDS * WIDTH & ((1 << WIDTH) - 1)) << SHIFT


@triton.jit(do_not_specialize=["values", "groups", "all_groups"])
def store_kernel(
    x: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    companion: tl.tensor,
    unit: tl.tensor,
    x_next: tl.tensor,
    companion_next: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    weight: tl.float64,
    largest: tl.float64,
    values: tl.int64,
    groups: tl.int32,
    all_groups: tl.int32,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """A tile per program."""
    real: tl.constexpr = companion.dtype.element_ty
    LIMIT: tl.constexpr = (1 << (BITS - 1)) - 1
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    place, count, mask = _places(group, values, groups, all_groups, WHOLE, 128 // real.primitive_bitwidth)
    is_there = group < all_groups
    one_unit = tl.load(unit + group, mask=is_there, other=1.0)
    wanted = tl.load(x + place, mask=mask, other=0.0).to(real)
    before = tl.load(companion + place, mask=mask, other=0.0)
    if k1 is not None:
        stages = tl.load(k1 + place, mask=mask, other=0.0).to(real)
        if k2 is not None:
            stages += tl.load(k2 + place, mask=mask, other=0.0).to(real)
        state = tl.fma(tl.full([], weight, real), stages, wanted).to(x.dtype.element_ty)
        tl.store(x_next + place, state, mask=mask)
        wanted = state.to(real)

    limit = (tl.full([], largest, real) * one_unit)[:, None]
    difference = tl.minimum(tl.maximum(wanted, -limit), limit) - before
    difference += 0.0 * wanted  # NaN where it is infinite
    if BITS == 1:
        size = _divide(tl.sum(tl.abs(difference), axis=1), (tl.zeros([GROUPS], tl.int64) + count).to(real))
    else:
        # As integers, which have NaN above all numbers.
        size = tl.max(tl.abs(difference).to(_as_integer(real), bitcast=True), axis=1).to(real, bitcast=True)
        size = _divide(size, tl.full([], LIMIT + 0.499, real))
    code = _code_of(_divide(size, one_unit))
    scale = (_scale_of(code, real) * one_unit)[:, None]
    if BITS == 1:
        whole = tl.where(difference < 0, -1.0, 1.0).to(real)
        integers = tl.where(difference < 0, 0, 1)
    else:
        # At most LIMIT, as the scale was chosen for that.
        magnitude = (_divide(tl.abs(difference), scale) + _to_whole(real)) - _to_whole(real)
        whole = tl.where(difference < 0, -magnitude, magnitude)
        integers = tl.where((code == NAN_CODE)[:, None], 0.0, whole).to(tl.int32)
    tl.store(companion_next + place, before + whole * scale, mask=mask)
    tl.store(scales + group, code.to(tl.uint8), mask=is_there)
    if BITS == 3:
        _pack(packed, integers, group, all_groups, BITS, 0, 2)
        _pack(packed, integers, group, all_groups, BITS, 2, 1)
    elif BITS == 6:
        _pack(packed, integers, group, all_groups, BITS, 0, 4)
        _pack(packed, integers, group, all_groups, BITS, 4, 2)
    else:
        _pack(packed, integers, group, all_groups, BITS, 0, BITS)


@triton.jit(do_not_specialize=["values", "groups", "all_groups"])
def stored_step_kernel(
    companion: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    unit: tl.tensor,
    out: tl.tensor,
    values: tl.int64,
    groups: tl.int32,
    all_groups: tl.int32,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """A tile per program."""
    real: tl.constexpr = companion.dtype.element_ty
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    place, _, mask = _places(group, values, groups, all_groups, WHOLE, 128 // real.primitive_bitwidth)
    is_there = group < all_groups
    one_unit = tl.load(unit + group, mask=is_there, other=1.0)
    code = tl.load(scales + group, mask=is_there, other=0).to(tl.int32)
    after = tl.load(companion + place, mask=mask, other=0.0)
    if BITS == 3:
        unsigned = _unpack(packed, group, all_groups, BITS, 0, 2) | _unpack(packed, group, all_groups, BITS, 2, 1)
    elif BITS == 6:
        unsigned = _unpack(packed, group, all_groups, BITS, 0, 4) | _unpack(packed, group, all_groups, BITS, 4, 2)
    else:
        unsigned = _unpack(packed, group, all_groups, BITS, 0, BITS)
    # The sign bit goes to the top and back.
    integers = 2 * unsigned - 1 if BITS == 1 else (unsigned << (32 - BITS)) >> (32 - BITS)
    scale = (_scale_of(code, real) * one_unit)[:, None]
    tl.store(out + place, after - integers.to(real) * scale, mask=mask)
