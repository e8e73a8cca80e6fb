"""Increments in a few bits: rounding, packing, exactness, and the ops that do it."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from resode_cuda import ops, stored
from resode_cuda.ops import storing
from tests.support.storing_layouts import LAYOUTS

DTYPES = [torch.float32, torch.float64]
SHAPES = [(5, 7), (3, 64), (4, 3, 5, 5), (2, 70), (9,), (), (0, 4), (4, 0), (3, 32)]


def walk(x, bits, steps=12, size=0.2):
    """A companion's way along states that move at random: states, companions and what is stored of each step."""
    companion, unit = stored.start(x)
    states, companions, kept = [x], [companion], []
    for _ in range(steps):
        states.append(states[-1] + size * torch.randn_like(x))
        companion, packed, scales = ops.store(states[-1], companion, unit, bits)
        companions.append(companion)
        kept.append((packed, scales))
    return states, companions, kept, unit


def quanta(scales, unit):
    """The scale of each group."""
    return stored._scales(unit)[scales.int()] * unit


def grouped(tensor, companion):
    return stored._grouped(stored._rows(tensor, companion))


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_companions_come_back_to_the_last_bit(shape, dtype, bits):
    _, companions, kept, unit = walk(torch.randn(shape, dtype=dtype), bits)
    companion = companions[-1]
    for before, (packed, scales) in zip(reversed(companions[:-1]), reversed(kept), strict=True):
        companion = ops.stored_step(companion, packed, scales, unit, bits)
        assert torch.equal(companion, before)


@pytest.mark.parametrize("bits", stored.BITS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 0.2, 30.0])
def test_a_state_is_off_by_half_a_quantum_at_most(size, dtype, bits):
    states, companions, kept, unit = walk(torch.randn(4, 96, dtype=dtype), bits, size=size)
    for state, companion, (_, scales) in zip(states[1:], companions[1:], kept, strict=True):
        error = grouped(state - companion, companion).abs()
        assert (error <= (0.5 + 1e-6) * quanta(scales, unit)[..., None]).all()


@pytest.mark.parametrize("bits", stored.BITS[1:])
def test_the_quantum_is_the_smallest_that_reaches_the_groups_largest_value(bits):
    torch.manual_seed(0)
    x = torch.randn(6, 64)
    companion, unit = stored.start(x)
    target = x + torch.randn_like(x)
    _, _, scales = ops.store(target, companion, unit, bits)
    needed = grouped(target - companion, companion).abs().amax(-1) / (stored.quantum_count(bits) + 0.5)
    scale = quanta(scales, unit)
    assert (scale >= 0.999 * needed).all()
    assert (scale <= 9 / 8 * 1.002 * needed + unit).all()


def test_one_bit_is_a_sign_times_the_groups_mean_magnitude():
    x = torch.randn(3, 40)
    companion, unit = stored.start(x)
    target = x + torch.randn_like(x)
    moved, packed, scales = ops.store(target, companion, unit, 1)
    assert packed.shape == (3, 2, 4)
    step = moved - companion
    assert torch.equal(step > 0, target - companion >= 0)
    for values in (slice(0, 32), slice(32, 40)):
        mean = (target - companion)[:, values].abs().mean(1)
        assert ((step[:, values].abs() / mean[:, None] - 1).abs() < 0.13).all()
    assert torch.equal(ops.stored_step(moved, packed, scales, unit, 1), companion)


def test_errors_halve_with_each_bit():
    torch.manual_seed(0)
    x = torch.randn(8, 256)
    errors = {}
    for bits in stored.BITS[1:]:
        torch.manual_seed(1)
        states, companions, _, _ = walk(x, bits)
        errors[bits] = (states[-1] - companions[-1]).norm()
    for fewer, more in itertools.pairwise(stored.BITS[1:]):
        ratio = errors[fewer] / errors[more]
        assert 0.8 * 2 ** (more - fewer) < ratio < 1.8 * 2 ** (more - fewer)


def test_errors_do_not_add_up():
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    states, companions, _, _ = walk(x, 4, steps=1000, size=0.1)
    errors = torch.stack([(a - b).abs().amax() for a, b in zip(states, companions, strict=True)])
    assert errors[500:].max() < 1.5 * errors[1:100].max()


@pytest.mark.parametrize("bits", stored.BITS)
def test_every_whole_number_survives_packing(bits):
    limit = stored.quantum_count(bits)
    values = [-1, 1] if bits == 1 else range(-limit, limit + 1)
    cycle = torch.tensor([*values], dtype=torch.float32)
    integers = cycle.repeat(math.ceil(320 / len(cycle)))[:320].view(2, 5, 32)
    packed = stored._packed(integers, bits)
    assert packed.shape == (2, 5, 4 * bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(stored._unpacked(packed, bits, torch.float32), integers)


@pytest.mark.parametrize("bits", stored.BITS)
def test_a_sample_does_not_depend_on_who_shares_its_batch(bits):
    x, other = torch.randn(1, 70), 100 * torch.randn(5, 70)
    torch.manual_seed(0)
    step = torch.randn(1, 70)
    alone = ops.store(x + step, *stored.start(x), bits)
    together = torch.cat([other, x])
    others = ops.store(together + torch.cat([other, step]), *stored.start(together), bits)
    for one, many in zip(alone, others, strict=True):
        assert torch.equal(one[0], many[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales(dtype):
    """ceil((1 + m/8) 2^e)"""
    scales = stored._scales(torch.empty(0, dtype=dtype)).tolist()
    assert scales[:255] == [math.ceil((8 + code % 8) / 8 * 2 ** (code // 8)) for code in range(255)]
    assert math.isnan(scales[255])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", stored.BITS)
def test_what_is_not_finite_stays_so_and_in_its_group(bits, value):
    x = torch.randn(2, 96)
    companion, unit = stored.start(x)
    target = x + 0.1
    target[1, 40] = value
    moved, packed, scales = ops.store(target, companion, unit, bits)
    assert scales[1, 1] == 255
    assert moved[1, 32:64].isnan().all()
    assert ops.stored_step(moved, packed, scales, unit, bits)[1, 32:64].isnan().all()
    moved[1, 32:64] = 0
    assert moved.isfinite().all()
    broken = x.clone()
    broken[1, 3] = value
    companion, unit = stored.start(broken)
    assert companion[0].isfinite().all()
    assert not companion[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4, 1e30])
def test_units_follow_the_size_of_the_states(scale):
    torch.manual_seed(0)
    relative = []
    for factor in (1.0, scale):
        torch.manual_seed(1)
        x = factor * torch.randn(4, 64)
        companion, unit = stored.start(x)
        moved, _, _ = ops.store(x + 0.1 * factor * torch.randn(4, 64), companion, unit, 8)
        relative.append((((moved - companion) / factor).norm() / (x / factor).norm()).item())
    assert relative[1] == pytest.approx(relative[0], rel=1e-2)


def test_states_that_begin_with_zero():
    x = torch.zeros(3, 40)
    companion, unit = stored.start(x)
    assert torch.equal(companion, x)
    target = torch.randn(3, 40)
    moved, packed, scales = ops.store(target, companion, unit, 8)
    assert (moved - target).abs().max() < 0.03
    assert torch.equal(ops.stored_step(moved, packed, scales, unit, 8), companion)


def test_a_state_beyond_the_largest_companion_is_off_and_comes_back():
    x = torch.randn(2, 32)
    companion, unit = stored.start(x)
    target = x.clone()
    target[0, 5] = 1e6
    moved, packed, scales = ops.store(target, companion, unit, 8)
    assert 500 < moved[0, 5] < 1e4
    assert torch.equal(ops.stored_step(moved, packed, scales, unit, 8), companion)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, bits):
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 6))
    companion, unit = stored.start(x)
    target = x + 0.1 * torch.randn(3, 4, 5, 6)
    moved, packed, scales = ops.store(target, companion, unit, bits)
    assert torch.equal(ops.stored_step(moved, packed, scales, unit, bits), companion)
    assert (moved - target).abs().max() < 0.4 / 2 ** (bits - 1)
    if layout == "channels last":
        assert companion.is_contiguous(memory_format=torch.channels_last)
    contiguous, _ = stored.start(x.contiguous())
    assert ((companion - contiguous).abs() <= unit.max()).all()  # whose groups are others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_k2", [False, True], ids=["euler", "heun"])
def test_store_step_moves_the_state_and_stores(has_k2, dtype):
    x, k1 = torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype)
    k2 = torch.randn(3, 40).to(dtype) if has_k2 else None
    companion, unit = stored.start(x)
    assert companion.dtype == stored.companion_dtype(dtype)
    x_next, *found = ops.store_step(x, k1, k2, 0.5, companion, unit, 6)
    expected = ops.heun_step(x, k1, k2, 1.0) if has_k2 else ops.forward_step(x, k1, 0.5)
    assert torch.equal(x_next, expected)
    for one, other in zip(found, ops.store(x_next, companion, unit, 6), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 4, 8), (7,)], ids=str)
def test_the_ops_are_registered_rightly(shape, dtype, bits):
    x, k = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    companion, unit = stored.start(x)
    moved, packed, scales = ops.store(x + k, companion, unit, bits)
    torch.library.opcheck(torch.ops.resode.start_companion.default, (x,))
    torch.library.opcheck(torch.ops.resode.store.default, (x + k, companion, unit, bits))
    torch.library.opcheck(torch.ops.resode.store_step.default, (x, k, None, 0.5, companion, unit, bits))
    torch.library.opcheck(torch.ops.resode.store_step.default, (x, k, k.clone(), 0.5, companion, unit, bits))
    torch.library.opcheck(torch.ops.resode.stored_step.default, (moved, packed, scales, unit, bits))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
def test_nothing_is_launched_for_states_without_values(monkeypatch, shape):
    x = torch.randn(shape)
    companion, unit = stored.start(x)
    expected = ops.store_step(x, x, None, 0.5, companion, unit, 4)
    monkeypatch.setattr(storing, "select", lambda device: SimpleNamespace())  # without a launch
    found = ops.store_step(x, x, None, 0.5, companion, unit, 4)
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]
    assert ops.store(x, companion, unit, 4)[1].shape == expected[2].shape
    assert torch.equal(ops.stored_step(*expected[1:], unit, 4), companion)


def test_more_groups_than_kernels_count_are_refused(monkeypatch):
    monkeypatch.setattr(storing, "select", lambda device: SimpleNamespace())
    monkeypatch.setattr(storing, "MOST_GROUPS", 5)
    x = torch.randn(3, 40)
    with pytest.raises(ValueError, match="must have 5 groups of 32 values at most, got 6; split them"):
        ops.store(x, *stored.start(x), 4)


def arguments():
    x = torch.randn(3, 40)
    companion, unit = stored.start(x)
    return {"x": x, "companion": companion, "unit": unit, "bits": 8}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 5}, ValueError, r"store: bits must be among \(1, 2, 3, 4, 6, 8\), got 5"),
        ({"x": torch.ones(3, 40, dtype=torch.int32)}, TypeError, "store: x must be one of"),
        ({"companion": torch.randn(3, 40).double()}, TypeError, "companion and unit must be float32 for states in"),
        (
            {"companion": torch.randn(3, 41)},
            ValueError,
            r"must have the shape and device of x, got \[3, 41\]",
        ),
        ({"companion": torch.randn(40, 3).t()}, ValueError, "companion must lie in memory sample after sample"),
        ({"unit": torch.ones(3)}, ValueError, r"unit must have shape \[3, 2\] on cpu, got \[3\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_operands_of_store(change, error, message):
    with pytest.raises(error, match=message):
        torch.ops.resode.store(*{**arguments(), **change}.values())


def test_bad_operands_of_stored_step():
    companion, unit, bits = (arguments()[name] for name in ("companion", "unit", "bits"))
    moved, packed, scales = ops.store(companion + 0.1, companion, unit, bits)
    with pytest.raises(ValueError, match=r"packed must be uint8 of shape \[3, 2, 16\] on cpu, got uint8 of shape"):
        torch.ops.resode.stored_step(moved, packed, scales, unit, 4)
    with pytest.raises(ValueError, match=r"scales must be uint8 of shape \[3, 2\]"):
        torch.ops.resode.stored_step(moved, packed, scales.int(), unit, bits)
    with pytest.raises(TypeError, match="companion must be one of float32, float64, got bfloat16"):
        torch.ops.resode.stored_step(moved.bfloat16(), packed, scales, unit, bits)
