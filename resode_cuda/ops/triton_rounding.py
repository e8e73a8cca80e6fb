"""Device functions that round increments to a few bits, pack them and take them back, for all Triton kernels that do.

A tile is groups of 32 values, [GROUPS, 32], in registers, and what a group has of its own [GROUPS]: its scale's code,
its unit, and its place among the groups that lie one after the other in packed and scales. BITS is known when a kernel
is compiled. Must match `stored.store` and `stored.take_back`: integers, scales and companions bit for bit, but for the
mean of one bit, whose sum torch takes in an order of its own.

Divisions are IEEE's. Products of integers and scales, and the sums of companions, are exact: a compiler may fuse them.
Threads share a group's largest value or sum, and the fields of a byte where they have fewer neighbours than it has
fields; those that unpack one byte each load it, from the cache.
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
def limited_difference(wanted: tl.tensor, before: tl.tensor, one_unit: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """The difference of states from their companions, which may not grow beyond so many units; NaN where a state is
    not finite."""
    limit = (largest * one_unit)[:, None]
    return tl.minimum(tl.maximum(wanted, -limit), limit) - before + 0.0 * wanted


@triton.jit
def quantize(difference: tl.tensor, one_unit: tl.tensor, count: tl.tensor, BITS: tl.constexpr) -> tl.tuple:
    """(the increment, its integers, the codes of its scales); count: values of each group."""
    real: tl.constexpr = difference.dtype
    LIMIT: tl.constexpr = (1 << (BITS - 1)) - 1
    if BITS == 1:
        size = _divide(tl.sum(tl.abs(difference), axis=1), (tl.zeros([difference.shape[0]], tl.int64) + count).to(real))
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
        magnitude = whole_number(_divide(tl.abs(difference), scale))
        whole = tl.where(difference < 0, -magnitude, magnitude)
        integers = tl.where((code == NAN_CODE)[:, None], 0.0, whole).to(tl.int32)
    return whole * scale, integers, code


@triton.jit
def whole_number(magnitude: tl.tensor) -> tl.tensor:
    """The nearest one, ties to even, of numbers that are not negative and have fractions at all."""
    return (magnitude + _to_whole(magnitude.dtype)) - _to_whole(magnitude.dtype)


@triton.jit
def store_integers(
    packed: tl.tensor, integers: tl.tensor, place: tl.tensor, is_there: tl.tensor, BITS: tl.constexpr
) -> None:
    """Pack the integers of the groups that are there."""
    if BITS == 3:
        _pack(packed, integers, place, is_there, BITS, 0, 2)
        _pack(packed, integers, place, is_there, BITS, 2, 1)
    elif BITS == 6:
        _pack(packed, integers, place, is_there, BITS, 0, 4)
        _pack(packed, integers, place, is_there, BITS, 4, 2)
    else:
        _pack(packed, integers, place, is_there, BITS, 0, BITS)


@triton.jit
def load_increment(
    packed: tl.tensor,
    code: tl.tensor,
    one_unit: tl.tensor,
    place: tl.tensor,
    is_there: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """The increment of the groups that are there; what else there is of it means nothing."""
    if BITS == 3:
        unsigned = _unpack(packed, place, is_there, BITS, 0, 2) | _unpack(packed, place, is_there, BITS, 2, 1)
    elif BITS == 6:
        unsigned = _unpack(packed, place, is_there, BITS, 0, 4) | _unpack(packed, place, is_there, BITS, 4, 2)
    else:
        unsigned = _unpack(packed, place, is_there, BITS, 0, BITS)
    # The sign bit goes to the top and back.
    integers = 2 * unsigned - 1 if BITS == 1 else (unsigned << (32 - BITS)) >> (32 - BITS)
    scale = (_scale_of(code, one_unit.dtype) * one_unit)[:, None]
    return integers.to(one_unit.dtype) * scale


@triton.jit
def _pack(
    packed: tl.tensor,
    integers: tl.tensor,
    place: tl.tensor,
    is_there: tl.tensor,
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
    offset = place[:, None] * (4 * BITS) + (4 * SHIFT + tl.arange(0, 4 * WIDTH))[None, :]
    tl.store(packed + offset, fields.to(tl.uint8), mask=is_there[:, None])


@triton.jit
def _unpack(
    packed: tl.tensor,
    place: tl.tensor,
    is_there: tl.tensor,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The bits of `_pack`, where they were."""
    FIELDS: tl.constexpr = 8 // WIDTH
    value = tl.arange(0, GROUP)[None, :]
    offset = place[:, None] * (4 * BITS) + (4 * SHIFT + value // FIELDS)
    byte = tl.load(packed + offset, mask=is_there[:, None], other=0).to(tl.int32)
    return (byte >> value % FIELDS * WIDTH & ((1 << WIDTH) - 1)) << SHIFT
