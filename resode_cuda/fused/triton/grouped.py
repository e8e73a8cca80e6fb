"""A tile's companion, for the depth-fused Triton kernels: started, moved on and taken back, by groups of 32 neighbours.

A tile [ROWS, D] is ROWS D / 32 groups, of which a row's last ones may be short or padding: D is 32 at least. What is
stored of a step lies in memory as `storage.py` says, from a tile's first group on. Formulas and roundings are those of
`ops/triton_rounding.py`. Must match `stored.start`, `stored.store` and `stored.take_back`, but for the last bits of the
means that units and 1-bit scales are made of. A companion's padding is zero.
"""

import torch
import triton
import triton.language as tl

from ... import stored as specification
from ...ops.triton_rounding import GROUP, limited_difference, load_increment, quantize, store_integers, whole_number
from ..storage import StoredIncrements
from .arguments import KernelConfig

UNIT_BITS = tl.constexpr(specification.UNITS[torch.float32].bit_length() - 1)
QUIETEST = tl.constexpr(specification.QUIETEST)


@triton.constexpr_function
def groups_of_row(config: KernelConfig) -> int:
    """Groups of a row of the batch."""
    return -(-config.dim // 32)


@triton.constexpr_function
def groups_of_tile(config: KernelConfig) -> int:
    """Groups of a tile, with padding."""
    return config.rows * config.padded_dim // 32


@triton.jit
def grouped(tile: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    return tl.reshape(tile, [groups_of_tile(CONFIG), GROUP])


@triton.jit
def whole(groups: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """The tile of these groups."""
    return tl.reshape(groups, [CONFIG.rows, CONFIG.padded_dim])


@triton.jit
def places_of_groups(rows: tl.tensor, CONFIG: tl.constexpr) -> tl.tuple:
    """(the place of each group after the tile's first one, whether it is there); rows: those from the tile's on."""
    OF_TILE_ROW: tl.constexpr = CONFIG.padded_dim // GROUP
    group = tl.arange(0, groups_of_tile(CONFIG))
    row, in_row = group // OF_TILE_ROW, group % OF_TILE_ROW
    return row * groups_of_row(CONFIG) + in_row, (row < rows) & (in_row < groups_of_row(CONFIG))


@triton.jit
def start_companion(x: tl.tensor, x_next: tl.tensor, CONFIG: tl.constexpr) -> tl.tuple:
    """(the companion of x, the units of its groups), which follow x_next too."""
    ROWS: tl.constexpr = CONFIG.rows
    OF_TILE_ROW: tl.constexpr = CONFIG.padded_dim // GROUP
    # NaN goes through.
    magnitude = tl.maximum(tl.abs(x), tl.abs(x_next), propagate_nan=tl.PropagateNan.ALL)
    typical = tl.sum(magnitude, 1) / CONFIG.dim
    typical = tl.broadcast_to(tl.abs(typical / QUIETEST)[:, None], [ROWS, OF_TILE_ROW])
    # As integers, which have NaN above all numbers, whose sign must be cleared.
    bits = tl.max(grouped(magnitude, CONFIG).to(tl.int32, bitcast=True), axis=1)
    bits = tl.maximum(bits, tl.reshape(typical, [groups_of_tile(CONFIG)]).to(tl.int32, bitcast=True))
    exponent = tl.maximum(tl.where(bits == 0, 127, bits >> 23) + 1 - UNIT_BITS, 1)
    is_finite = bits >> 23 < 255
    unit = tl.where(is_finite, exponent << 23, bits).to(tl.float32, bitcast=True)
    per_unit = tl.where(is_finite, (254 - exponent) << 23, bits).to(tl.float32, bitcast=True)
    values = grouped(x, CONFIG)
    count = whole_number(tl.abs(values) * per_unit[:, None])
    companion = tl.where(values < 0, -count, count) * tl.where(is_finite, unit, float("nan"))[:, None]
    return whole(companion, CONFIG), unit


@triton.jit
def store_increment(
    x: tl.tensor,
    companion: tl.tensor,
    unit: tl.tensor,
    stored: StoredIncrements,
    first: tl.tensor,
    place: tl.tensor,
    is_there: tl.tensor,
    LARGEST: tl.constexpr,
    BITS: tl.constexpr,
    CONFIG: tl.constexpr,
) -> tl.tensor:
    """The companion moved by the increment to x, which is stored from a step's group `first` on, at these places."""
    OF_TILE_ROW: tl.constexpr = CONFIG.padded_dim // GROUP
    in_row = tl.arange(0, groups_of_tile(CONFIG)) % OF_TILE_ROW
    count = tl.minimum(tl.maximum(CONFIG.dim - in_row * GROUP, 1), GROUP)
    difference = limited_difference(grouped(x, CONFIG), grouped(companion, CONFIG), unit, LARGEST)
    increment, integers, code = quantize(difference, unit, count, BITS)
    tl.store(stored.scales + first + place, code.to(tl.uint8), mask=is_there)
    store_integers(stored.packed + first * (4 * BITS), integers, place, is_there, BITS)
    return companion + without_padding(whole(increment, CONFIG), CONFIG)


@triton.jit
def stored_increment(
    stored: StoredIncrements,
    unit: tl.tensor,
    first: tl.tensor,
    place: tl.tensor,
    is_there: tl.tensor,
    BITS: tl.constexpr,
    CONFIG: tl.constexpr,
) -> tl.tensor:
    """What `store_increment` has stored; zero where nothing is there."""
    code = tl.load(stored.scales + first + place, mask=is_there, other=0).to(tl.int32)
    increment = load_increment(stored.packed + first * (4 * BITS), code, unit, place, is_there, BITS)
    return without_padding(whole(tl.where(is_there[:, None], increment, 0.0), CONFIG), CONFIG)


@triton.jit
def without_padding(tile: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    if CONFIG.dim < CONFIG.padded_dim:
        tile = tl.where((tl.arange(0, CONFIG.padded_dim) < CONFIG.dim)[None, :], tile, 0.0)
    return tile
