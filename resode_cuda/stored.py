"""Increments in a few bits: how they are rounded, packed and taken back. The specification of the ops that do it.

Beside the states x_n runs a companion c_n that moves by rounded increments, with error feedback (delta-sigma modulation
along depth):

    c_0 = x_0, on the grid;    q_n = Q_b(x_{n+1} - c_n),    c_{n+1} = c_n + q_n

|x_n - c_n| is at most half a quantum of step n - 1, whatever the blocks do: errors do not add up. The backward pass has
q_n in b bits a value and c_N, and goes back exactly, c_n = c_{n+1} - q_n.

Q_b: 32 neighbours of a sample share a scale s, values are integers of b bits, symmetric about 0; with one bit they are
signs, times the group's mean magnitude. Scales are 8 bits, ceil((1 + m/8) 2^e) units. The unit is a power of two, one
for each group, 2^-13 (float64: 2^-20) of the largest value of its first states: all companions are multiples of it, so
that sums are exact, up to 2^10 times that value. Companions of larger states stay behind.

The idea of a shared scale is that of the OCP Microscaling formats (MX, v1.0, 2023); three mantissa bits make it as good
as one in full precision.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from .devices import is_capturing

BITS = (1, 2, 3, 4, 6, 8)
"""Bits a value that increments are stored in."""
GROUP = 32
"""Neighbours that share a scale."""
NAN_CODE = 255
"""The scale's code where a group has a value that is not finite."""
UNITS = {torch.float32: 2**13, torch.float64: 2**20}
"""Units in the largest value of the first state, by the companion's dtype."""
LARGEST = {torch.float32: 2**23, torch.float64: 2**30}
"""The largest companion, in units; scales reach as far, and sums are exact."""
OVERSHOOT = {1: 4, 2: 2}
"""How much less it is for bits so few that companions overshoot."""
QUIETEST = 16
"""How many times smaller than the sample's mean a group's largest value may be for its unit to follow it."""
_PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""Widths, all divisors of 8, that a value is packed in, from its low bits up."""
_WORDS = {
    4: (torch.int16, (0x0F0F,)),
    2: (torch.int32, (0x000F000F, 0x03030303)),
    1: (torch.int64, (0x0000000F0000000F, 0x0003000300030003, 0x0101010101010101)),
}
"""For each width the words of as many bytes as a byte has fields, and the bits that are used when a byte's fields are
spread over its word in halves, quarters, ... (Low bytes first in memory, as on all that CUDA runs on.)"""


def companion_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the companion of states of this one."""
    return torch.promote_types(dtype, torch.float32)


def quantum_count(bits: int) -> int:
    """The largest integer of so many bits; -it is the smallest."""
    return max(1, 2 ** (bits - 1) - 1)


def largest_companion(dtype: torch.dtype, bits: int) -> int:
    """The largest companion that increments of so many bits lead to, in units."""
    return LARGEST[dtype] // OVERSHOOT.get(bits, 1)


def sample_count(x: Tensor) -> int:
    """A state of one dimension is one sample."""
    return x.shape[0] if x.ndim > 1 else 1


def group_count(x: Tensor) -> int:
    """Groups of each sample. The last one may be short."""
    return -(-math.prod(x.shape[min(1, x.ndim - 1) :]) // GROUP)


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Values of a sample of x, which is not empty, its groups, and those of all samples."""
    samples, groups = sample_count(x), group_count(x)
    return x.numel() // samples, groups, samples * groups


def start(x: Tensor, x_next: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The companion of the state x that it starts at, and its units, shape [samples, groups].

    A group's unit follows its largest value in x and, where that is known already, in the state after it: the first
    step may move a small state far. Groups of zeros take the unit of a typical value of their sample.
    """
    dtype = companion_dtype(x.dtype)
    companion = empty_companion(x, dtype)
    rows = _rows(x, companion).to(dtype)
    magnitude = _grouped(rows.abs())
    if x_next is not None:
        magnitude = torch.maximum(magnitude, _grouped(_rows(x_next, companion).to(dtype).abs()))
    typical = magnitude.sum((1, 2)) / max(1, rows.shape[1])
    largest = torch.maximum(magnitude.amax(2), typical[:, None] / QUIETEST)
    exponent = torch.frexp(torch.where(largest == 0, 1.0, largest)).exponent
    unit = torch.ldexp(torch.ones_like(largest), exponent - int(math.log2(UNITS[dtype])))
    unit = torch.where(largest.isfinite(), unit, largest).clamp_min(torch.finfo(dtype).tiny)
    of_value = _of_values(unit, rows)
    torch.mul((rows / of_value).round_(), of_value, out=_rows(companion, companion))
    return companion, unit


def _of_values(of_groups: Tensor, rows: Tensor) -> Tensor:
    """What each group has, for each of its values, shape of the rows."""
    return of_groups.repeat_interleave(GROUP, 1)[:, : rows.shape[1]]


def store(target: Tensor, companion: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(c_{n+1}, packed q_n, scales of q_n) from x_{n+1} and c_n.

    Packed: uint8, [samples, groups, 4 bits]; scales: uint8, [samples, groups]. What is not finite has scale 255, NaN.
    """
    limit, rows = quantum_count(bits), _rows(companion, companion)
    largest = (largest_companion(companion.dtype, bits) * unit)[..., None]
    wanted = _grouped(_rows(target, companion).to(companion.dtype))
    # In place from here on: new memory costs a CPU more than what is computed in it.
    difference = torch.minimum(wanted, largest)
    torch.maximum(difference, -largest, out=difference)
    difference.sub_(_grouped(rows)).add_(wanted, alpha=0.0)  # NaN where it is infinite
    magnitude = difference.abs()
    size = _mean(magnitude, rows) if bits == 1 else magnitude.amax(-1) / (limit + 0.499)
    table = _scales(companion)
    codes = torch.bucketize(size / unit, table[:-1])
    scale = (table[codes] * unit)[..., None]
    if bits == 1:
        integers = magnitude.copy_(difference < 0).mul_(-2).add_(1)
    else:  # at most the limit, as the scale was chosen for that
        integers = torch.div(difference, scale, out=magnitude).round_()
    packed = _packed(integers, bits)
    increment = integers.mul_(scale).flatten(1)[:, : rows.shape[1]]
    return _in_place_of(companion, increment.add_(rows)), packed, codes.to(torch.uint8)


def take_back(companion: Tensor, packed: Tensor, scales: Tensor, unit: Tensor, bits: int) -> Tensor:
    """c_n from c_{n+1}, exactly."""
    rows = _rows(companion, companion)
    scale = _scales(companion)[scales.int()] * unit
    increment = _unpacked(packed, bits, companion.dtype).mul_(scale[..., None]).flatten(1)[:, : rows.shape[1]]
    return _in_place_of(companion, torch.sub(rows, increment, out=increment))


def _in_place_of(companion: Tensor, rows: Tensor) -> Tensor:
    """The next companion, in the memory of the rows where these are consecutive."""
    if rows.is_contiguous():
        return rows.as_strided(companion.shape, companion.stride())
    moved = torch.empty_like(companion)
    _rows(moved, moved).copy_(rows)
    return moved


def _inner_dims(x: Tensor) -> list[int]:
    """All dimensions but the first, from the outermost in memory to the innermost."""
    return sorted(range(1, x.ndim), key=lambda dim: (-x.stride()[dim], dim))


def empty_companion(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense, sample after sample, each in the order of x in memory."""
    dims = [*range(min(1, x.ndim)), *_inner_dims(x)]
    empty = x.new_empty([x.shape[dim] for dim in dims], dtype=dtype)
    return empty.permute([dims.index(dim) for dim in range(x.ndim)])


def is_companion_layout(x: Tensor) -> bool:
    """Whether it lies in memory as `empty_companion` lays out a companion of it."""
    return x.is_contiguous() or (x.ndim > 1 and x.permute(0, *_inner_dims(x)).is_contiguous())


def _rows(x: Tensor, companion: Tensor) -> Tensor:
    """[samples, values], in the companion's order in memory."""
    if x.ndim <= 1:
        return x.reshape(1, -1)
    return (x if companion.is_contiguous() else x.permute(0, *_inner_dims(companion))).flatten(1)


def _grouped(rows: Tensor) -> Tensor:
    missing = group_count(rows) * GROUP - rows.shape[1]
    padded = functional.pad(rows, (0, missing)) if missing else rows
    return padded.unflatten(1, (group_count(rows), GROUP))


def _mean(grouped: Tensor, rows: Tensor) -> Tensor:
    """Mean of each group, of which the last may have fewer than 32 values."""
    starts = torch.arange(0, rows.shape[1], GROUP, device=rows.device)
    return grouped.sum(-1) / (rows.shape[1] - starts).clamp_max(GROUP)


def _made_scales(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The scale of each code, in units."""
    codes = torch.arange(NAN_CODE, device=device)
    scales = torch.ldexp((8.0 + codes % 8).double() / 8, codes // 8).ceil()
    return torch.cat([scales, scales.new_full((1,), math.nan)]).to(dtype)


_kept_scales = lru_cache(maxsize=16)(_made_scales)


def _scales(companion: Tensor) -> Tensor:
    # What is made while a graph is captured has no values until it is replayed.
    scales = _made_scales if is_capturing() else _kept_scales
    return scales(companion.dtype, companion.device)


def _packed(integers: Tensor, bits: int) -> Tensor:
    """[samples, groups, 4 bits], uint8, from whole numbers [samples, groups, 32]."""
    unsigned = (integers > 0).to(torch.uint8) if bits == 1 else integers.to(torch.int8).view(torch.uint8)
    parts, shift = [], 0
    for width in _PARTS[bits]:
        parts.append(_joined(unsigned >> shift if shift else unsigned, width))
        shift += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _joined(unsigned: Tensor, width: int) -> Tensor:
    """The low bits of neighbours side by side in bytes, the first one's lowest."""
    if width == 8:
        return unsigned
    word, masks = _WORDS[width]
    words = unsigned.view(word) & masks[-1]
    for doubling in range(len(masks)):
        words = words | words >> (8 - width << doubling)
    return words.to(torch.uint8)


def _unpacked(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers [samples, groups, 32], from `_packed`."""
    low, *high = [
        _split(part, width)
        for part, width in zip(packed.split([4 * width for width in _PARTS[bits]], -1), _PARTS[bits], strict=True)
    ]
    unsigned = low | high[0] << _PARTS[bits][0] if high else low
    if bits == 1:
        return unsigned.to(dtype).mul_(2).sub_(1)
    # The sign bit to the top and back.
    signed = (unsigned << 8 - bits).view(torch.int8) >> 8 - bits if bits < 8 else unsigned.view(torch.int8)
    return signed.to(dtype)


def _split(joined: Tensor, width: int) -> Tensor:
    if width == 8:
        return joined
    word, masks = _WORDS[width]
    words = joined.to(word)
    for doubling, mask in zip(reversed(range(len(masks))), masks, strict=True):
        words = (words | words << (8 - width << doubling)) & mask
    return words.view(torch.uint8)
