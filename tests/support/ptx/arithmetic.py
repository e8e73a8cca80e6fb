"""What instructions that only compute mean: arrays in, an array out.

A value is taken for what the instruction's type says: `f32` are float32, `s32` int32, `b32` and `u32` uint32, of 16 and
64 bits likewise; bf16 and f16 are their bits in uint16. Approximate instructions are off by the error that the PTX ISA
states as their largest, upwards or downwards as the result's bits fall.
"""

import re

import numpy as np

from ..fused_multiply_add import FUSED
from .faults import UnknownInstructionError

NUMBERS = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}").type for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in (8, 16, 32, 64)},
    "f16": np.uint16,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32": np.float32,
    "f64": np.float64,
}
"""What the values of each type are here."""

LARGEST_ERRORS = {"ex2": 2.0**-22, "rcp": 2.0**-23, "rsqrt": 2.0**-22, "tanh": 2.0**-11, "div": 2.0**-22}
"""Relative errors of approximate instructions in float32."""


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values, mode="rn"):
    """Bits of the nearest bfloat16, ties to even, or "rz": the next one towards zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = (bits.astype(np.uint64) + np.uint64(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(
            16
        )
    else:
        rounded = bits >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_f16(bits):
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def to_f16(values, mode="rn"):
    """Bits of the nearest float16, ties to even, or "rz": the next one towards zero."""
    values = np.asarray(values, np.float32)
    rounded = values.astype(np.float16)
    if mode == "rz":
        beyond = np.abs(rounded.astype(np.float32)) > np.abs(values)
        rounded = np.where(beyond, np.nextafter(rounded, np.float16(0)), rounded)
    return rounded.view(np.uint16)


FROM_NARROW = {"bf16": from_bf16, "f16": from_f16}
TO_NARROW = {"bf16": to_bf16, "f16": to_f16}


def flushed(values):
    """float32 with zeros in the place of what is smaller than normal numbers."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def approximate(exact, error):
    """float32 that is off by so much, relative."""
    rounded = exact.astype(np.float32)
    upwards = (rounded.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31) == 1
    return (exact * np.where(upwards, 1 + error, 1 - error)).astype(np.float32)


def meaning(instruction):
    """(types of the operands that are read, type of what is written, function); None for what is no arithmetic."""
    kind = instruction.parts[0]
    if kind == "cvt":
        return _conversion(instruction)
    if not {part for part in instruction.parts[1:-1] if part not in _COMPARISONS} <= _UNDERSTOOD:
        return None
    if kind in ("setp", "selp", "prmt", "bfe", "shl", "shr"):
        return _SPECIAL[kind](instruction)
    if instruction.has("wide"):
        return _wide(instruction)
    type_ = instruction.type
    if type_ in ("f32", "f64") and kind in _REAL:
        count, function = _REAL[kind]
        return [type_] * count, type_, _flushing(instruction, function)
    if type_ == "pred" and kind in _LOGIC:
        count, function = _LOGIC[kind]
        return ["pred"] * count, "pred", lambda *values, i: function(*values)
    if re.fullmatch(r"[bus]\d+", type_) and kind in _INTEGER and not instruction.has("hi"):
        count, function = _INTEGER[kind]
        return [type_] * count, type_, lambda *values, i: function(*values)
    return None


def _flushing(instruction, function):
    if not instruction.has("ftz"):
        return function
    return lambda *values, i: flushed(function(*map(flushed, values), i=i))


def _fused(a, b, c, i):
    if np.float64 in (a.dtype, b.dtype, c.dtype):
        return FUSED[np.dtype(np.float64)](a, b, c)
    # In float64 a product of float32 is exact, and a sum is rounded twice only where it is a tie of float32.
    wide = np.multiply(a, b, dtype=np.float64) + c
    tie = (wide.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    out = wide.astype(np.float32)
    if tie.any():
        out[tie] = FUSED[np.dtype(np.float32)](*(np.broadcast_to(v, out.shape)[tie] for v in (a, b, c)))
    return out


def _approximately(function):
    def computed(*values, i):
        exact = function(*(value.astype(np.float64) for value in values))
        if i.has("approx") or i.has("full"):
            return approximate(exact, LARGEST_ERRORS[i.parts[0]])
        return exact.astype(values[0].dtype)

    return computed


def _extreme(numpy_of_numbers, numpy_with_nan):
    return lambda a, b, i: (numpy_with_nan if i.has("NaN") else numpy_of_numbers)(a, b)


def _plain(function):
    return lambda *values, i: function(*values)


_REAL = {
    "mov": (1, _plain(lambda a: a)),
    "add": (2, _plain(np.add)),
    "sub": (2, _plain(np.subtract)),
    "mul": (2, _plain(np.multiply)),
    "fma": (3, _fused),
    "neg": (1, _plain(np.negative)),
    "abs": (1, _plain(np.abs)),
    "min": (2, _extreme(np.fmin, np.minimum)),
    "max": (2, _extreme(np.fmax, np.maximum)),
    "div": (2, _approximately(np.divide)),
    "ex2": (1, _approximately(np.exp2)),
    "rcp": (1, _approximately(lambda a: 1 / a)),
    "rsqrt": (1, _approximately(lambda a: 1 / np.sqrt(a))),
    "sqrt": (1, _approximately(np.sqrt)),
    "tanh": (1, _approximately(np.tanh)),
}
_LOGIC = {
    "mov": (1, lambda a: a),
    "not": (1, np.logical_not),
    "and": (2, np.logical_and),
    "or": (2, np.logical_or),
    "xor": (2, np.logical_xor),
}


def _towards_zero(a, b):
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) == (b < 0), quotient, np.negative(quotient)).astype(a.dtype)


_INTEGER = {
    "mov": (1, lambda a: a),
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "mad": (3, lambda a, b, c: a * b + c),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "div": (2, _towards_zero),
    "rem": (2, lambda a, b: a - _towards_zero(a, b) * b),
    "not": (1, np.invert),
    "and": (2, np.bitwise_and),
    "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor),
}


def _wide(instruction):
    narrow = instruction.type
    wide = f"{narrow[0]}{2 * int(narrow[1:])}"
    real = NUMBERS[wide]
    if instruction.parts[0] == "mad":
        return [narrow, narrow, wide], wide, lambda a, b, c, i: a.astype(real) * b.astype(real) + c
    return [narrow, narrow], wide, lambda a, b, i: a.astype(real) * b.astype(real)


_COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def _comparison(instruction):
    name, joined = instruction.parts[1], {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    if name in _COMPARISONS:
        function, unordered = _COMPARISONS[name], False
    elif name[-1] == "u" and name[:-1] in _COMPARISONS:
        function, unordered = _COMPARISONS[name[:-1]], True
    elif name in ("num", "nan"):
        function, unordered = (lambda a, b: np.isnan(a + b) == (name == "nan")), False
    else:
        raise UnknownInstructionError(f"no meaning of {instruction}")

    decoded = FROM_NARROW.get(instruction.type.removesuffix("x2"), lambda a: a)

    def compared(a, b, *more, i):
        a, b = decoded(a), decoded(b)
        if i.has("ftz"):
            a, b = flushed(a), flushed(b)
        # Like numpy's, comparisons with NaN are false but for "not equal", which is false here too.
        found = function(a, b)
        if a.dtype.kind == "f" and name not in ("num", "nan"):
            unequal = np.isnan(a) | np.isnan(b)
            found = found | unequal if unordered else found & ~unequal
        return joined[i.parts[2]](found, *more) if more else found

    types = [instruction.type] * 2 + ["pred"] * (len(instruction.operands) - 3)
    return types, "pred", compared


def _choice(instruction):
    type_ = instruction.type
    return [type_, type_, "pred"], type_, lambda a, b, p, i: np.where(p, a, b)


def _permuted(instruction):
    if instruction.type != "b32":
        raise UnknownInstructionError(f"no meaning of {instruction}")

    def permuted(a, b, selector, i):
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
        for place in range(4):
            nibble = selector.astype(np.uint64) >> np.uint64(4 * place)
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            out |= byte.astype(np.uint32) << np.uint32(8 * place)
        return out

    return ["b32"] * 3, "b32", permuted


def _bit_field(instruction):
    type_ = instruction.type
    bits = int(type_[1:])

    def extracted(a, place, length, i):
        if np.min(place) != np.max(place) or np.min(length) != np.max(length):
            raise UnknownInstructionError(f"threads that take different fields: {i}")
        place, length = int(np.max(place)), int(np.max(length))
        real = a.dtype.type
        left = bits - min(length, bits - place)
        # The field's sign, if it has one, comes down with it.
        return (a << real(left - place)) >> real(left) if length else a * real(0)

    return [type_, "u32", "u32"], type_, extracted


def _shift(instruction):
    type_, left = instruction.type, instruction.parts[0] == "shl"
    bits = int(type_[1:])

    def shifted(a, by, i):
        real = a.dtype.type
        within = np.minimum(by, bits - 1).astype(a.dtype)
        if left:
            return np.where(by < bits, a << within, real(0))
        return np.where(by < bits, a >> within, a >> real(bits - 1) if type_[0] == "s" else real(0))

    return [type_, "u32"], type_, shifted


_UNDERSTOOD = {"rn", "ftz", "approx", "full", "lo", "wide", "NaN", "num", "nan", "and", "or", "xor", "to", "global"} | {
    f"{name}u" for name in _COMPARISONS
}
"""Parts between an instruction's kind and its type that are known here, beside comparisons' names."""
_SPECIAL = {
    "setp": _comparison,
    "selp": _choice,
    "prmt": _permuted,
    "bfe": _bit_field,
    "shl": _shift,
    "shr": _shift,
}

_ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _conversion(instruction):
    modes = [part for part in instruction.parts[1:] if part in ("rn", "rz", *_ROUNDED)]
    mode = modes[0] if modes else None
    types = [part for part in instruction.parts[1:] if part not in (*modes, "ftz")]
    if len(types) != 2 or not set(types) <= NUMBERS.keys():
        raise UnknownInstructionError(f"no meaning of {instruction}")
    target, source = types
    if target.endswith("x2"):
        narrow = TO_NARROW[target[:-2]]

        def packed(high, low, i):
            return (narrow(high, mode).astype(np.uint32) << np.uint32(16)) | narrow(low, mode)

        return ["f32", "f32"], "b32", packed
    is_real = source[0] != "u" and source[0] != "s"
    decoded = FROM_NARROW.get(source, lambda a: a)
    if target in TO_NARROW and source == "f32" and mode in ("rn", "rz"):
        return [source], target, lambda a, i: TO_NARROW[target](a, mode)
    if is_real and target[0] in "us" and mode in _ROUNDED:
        return [source], target, lambda a, i: _to_integer(_ROUNDED[mode](decoded(a)), NUMBERS[target])
    if target == source and mode in _ROUNDED:
        return [source], target, _flushing(instruction, lambda a, i: _ROUNDED[mode](a))
    if mode in (None, "rn") and target not in TO_NARROW:
        return [source], target, lambda a, i: decoded(a).astype(NUMBERS[target])
    raise UnknownInstructionError(f"no meaning of {instruction}")


def _to_integer(whole, integer):
    """Numbers beyond an integer's range become its ends, NaN zero."""
    ends = np.iinfo(integer)
    wide = np.where(np.isnan(whole), 0.0, whole).astype(np.float64)
    inside = (wide > ends.min) & (wide < ends.max)
    kept = np.where(inside, wide, 0.0).astype(integer)
    return np.where(inside, kept, np.where(wide < 0, integer(ends.min), np.where(wide > 0, integer(ends.max), kept)))
