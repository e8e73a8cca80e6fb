"""Triton kernels that store increments in a few bits, and take them back; `triton.py` launches them.

    store_kernel:        c' = c + Q(x - c), and Q's integers and scales; with a k1, x' = x + w (k1 + k2) in place of x
    stored_step_kernel:  c = c' - q, with q as store_kernel has packed it

Must match `stored.store` and `stored.take_back` as `triton_rounding.py` says, which has what a tile is rounded by. x'
must match `reference.forward_step` and `reference.heun_step`.

States and companions are [samples, values], dense and of one order; packed, scales and units as in `stored.py`. A tile
is GROUPS times 32 values, in registers; groups are counted through all samples, in 32 bits, and values in 64. WHOLE
says that no group is short: a tile is then consecutive, a thread holds as many neighbours as fill 16 bytes of the
companion, and a mask spares whole groups. Else values are accessed one by one. One pass: nothing is read or written
twice, except for bytes that several threads unpack.

Rounding is written out: kernels are compiled with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

from .triton_rounding import GROUP, limited_difference, load_increment, quantize, store_integers


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

    difference = limited_difference(wanted, before, one_unit, tl.full([], largest, real))
    increment, integers, code = quantize(difference, one_unit, count, BITS)
    tl.store(companion_next + place, before + increment, mask=mask)
    tl.store(scales + group, code.to(tl.uint8), mask=is_there)
    store_integers(packed, integers, group.to(tl.int64), is_there, BITS)


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
    increment = load_increment(packed, code, one_unit, group.to(tl.int64), is_there, BITS)
    tl.store(out + place, after - increment, mask=mask)
