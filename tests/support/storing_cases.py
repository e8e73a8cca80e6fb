"""What a backend is asked about increments in a few bits, on the host and on a GPU alike, and what it must answer.

Operands and results lie in larger buffers: what is read between values that spoil any result, what is written between
sevens, as in `kernel_cases.py`.
"""

import itertools
from dataclasses import dataclass

import torch

from resode_cuda import stored
from resode_cuda.ops.operands import StoredStepOperands, StoreOperands, StoreResults, StoreStepOperands
from tests.support.kernel_cases import DTYPE_PAIRS, MARGIN, pair_id

WEIGHT = 0.1
"""Not representable, so that each rounding shows."""
SHAPES = [(3, 64), (5, 7), (2, 70), (4, 3, 5, 5), (9,), (), (1, 32), (40, 1), (2, 352)]
"""Samples of whole groups, of short ones, of one value, and a state that is one sample."""
OPS = ("store", "store_step", "stored_step")


@dataclass(frozen=True)
class StoringCase:
    """An op; `stages` are those of store_step."""

    op: str
    bits: int
    pair: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    shape: tuple[int, ...] = (2, 70)
    stages: int = 1

    def __str__(self):
        shape = "x".join(map(str, self.shape)) or "scalar"
        return "-".join([self.op, f"{self.bits}_bits", pair_id(self.pair), shape] + ["heun"] * (self.stages - 1))


EVERY_PAIR = [
    StoringCase(op, bits, pair, stages=stages)
    for bits, pair in itertools.product(stored.BITS, DTYPE_PAIRS)
    for op, stages in (("store", 1), ("store_step", 1), ("store_step", 2), ("stored_step", 1))
    # Without stages one pair for each stream is enough; a companion is float32 or float64.
    if (op == "store_step" or pair[0] == pair[1]) and (op != "stored_step" or pair[0] in stored.UNITS)
]
EVERY_SHAPE = [StoringCase(op, bits, shape=shape) for op in OPS for bits in stored.BITS for shape in SHAPES]


def operands(case):
    """The op's operands: a state, its companion a few tenths away, and stages, all of normal values on the CPU."""
    generator = torch.Generator().manual_seed(0)
    stream, stage = case.pair

    def normal(dtype):
        return torch.randn(case.shape, dtype=torch.float64, generator=generator).to(dtype)

    x, k1, k2 = normal(stream), normal(stage), normal(stage)
    companion, unit = stored.start((x + 0.3 * normal(stream)).to(stream))
    if case.op == "store":
        return StoreOperands(x, companion, unit, case.bits)
    if case.op == "store_step":
        return StoreStepOperands(x, k1, k2 if case.stages == 2 else None, WEIGHT, companion, unit, case.bits)
    return StoredStepOperands(*stored.store(x, companion, unit, case.bits), unit, case.bits)


def by_kernel(backend, values, device="cpu", offset=0):
    """What the op returns, on the CPU. Floating operands and results start so many values after a 16-byte boundary."""
    companion, bits = values.companion, values.bits
    given = values._make(_between(v, device, offset)[0] if torch.is_tensor(v) else v for v in values)
    like = [companion]
    if not isinstance(values, StoredStepOperands):
        shape = stored.sample_count(companion), stored.group_count(companion)
        bytes_of = (torch.empty(*shape, 4 * bits, dtype=torch.uint8), torch.empty(shape, dtype=torch.uint8))
        like = [*([values.x] if isinstance(values, StoreStepOperands) else []), companion, *bytes_of]
    results, buffers = zip(*(_between(tensor, device, offset, 7) for tensor in like), strict=True)
    if isinstance(values, StoredStepOperands):
        backend.stored_step(given, *results)
    elif isinstance(values, StoreOperands):
        backend.store(given, StoreResults(*results))
    else:
        backend.store_step(given, results[0], StoreResults(*results[1:]))
    found = [result.to("cpu", copy=True) for result in results]
    for result, buffer in zip(results, buffers, strict=True):
        result.fill_(7)
        assert (buffer == 7).all(), f"{type(values).__name__}: something was written beyond a result"
    return found


def _between(tensor, device, offset, around=None):
    """A copy of the tensor in a larger buffer, and the buffer; around it lie NaN, scales of NaN, or a number given."""
    if around is None:
        around = torch.nan if tensor.is_floating_point() else stored.NAN_CODE
    # Bytes are never accessed in packs that a caller could misalign: the ops allocate them, or make them contiguous.
    start = MARGIN + (offset if tensor.is_floating_point() else 0)
    buffer = torch.full((tensor.numel() + start + MARGIN,), around, dtype=tensor.dtype, device=device)
    return buffer[start : start + tensor.numel()].view(tensor.shape).copy_(tensor), buffer


def by_reference(values, x_next=None):
    """What the op returns; x_next is what store_step has made of x, for its rounding is that of other ops."""
    if isinstance(values, StoredStepOperands):
        return [stored.take_back(*values)]
    if isinstance(values, StoreOperands):
        return [*stored.store(*values)]
    return [x_next, *stored.store(x_next, values.companion, values.unit, values.bits)]


def next_state(values):
    """x + w (k1 + k2), rounded to x's dtype at the end."""
    x, k1, k2, weight, *_ = values
    wide = stored.companion_dtype(x.dtype)
    return x.to(wide).add(k1 if k2 is None else k1.to(wide).add(k2), alpha=weight).to(x.dtype)


def check(values, found):
    """Results bit for bit.

    With one bit the reference's own sum of 32 magnitudes has an order that torch chooses, and a kernel another: their
    codes could differ where a mean is within a rounding of a scale. No case here is so close.
    """
    x_next = next_state(values) if isinstance(values, StoreStepOperands) else None
    for result, expected in zip(found, by_reference(values, x_next), strict=True):
        assert_same_bits(result, expected)


def assert_same_bits(result, expected):
    """Zeros have the same sign, too; NaNs may be any."""
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    if result.is_floating_point():
        nan = result.isnan()
        assert torch.equal(nan, expected.isnan())
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[result.itemsize]
        result, expected = (tensor.view(integer).masked_fill(nan, 0) for tensor in (result, expected))
    assert torch.equal(result, expected), f"{(result != expected).sum()} of {result.numel()} differ"


def at_every_scale(dtype, bits):
    """Operands of store whose groups need scales just below, at and just above each code's, and what is not finite.

    One sample a group, each unit 1 and the companion 0. With one bit all values of a group are of one magnitude.
    """
    scales = stored._made_scales(dtype, torch.device("cpu"))[:-1]
    sizes = torch.cat([torch.nextafter(scales, scales.new_tensor(end)) for end in (0.0, torch.inf)] + [scales])
    more = [0.0, 0.3, 0.5, 1.5, 2.5, 2.0**20, 2.0**30, 1e30, torch.nan, torch.inf, -torch.inf]
    sizes = torch.cat([sizes, sizes.new_tensor(more)])
    x = torch.linspace(-1.0, 1.0, stored.GROUP, dtype=dtype).sign() if bits == 1 else torch.zeros(stored.GROUP)
    x = sizes[:, None] * x.to(dtype)
    if bits > 1:
        largest = sizes * (stored.quantum_count(bits) + 0.499)
        # Halves of a quantum round to even; a group of zeros but for its ends shows which code it has.
        x = largest[:, None] * torch.linspace(-1.0, 1.0, stored.GROUP, dtype=dtype)
    return StoreOperands(x, torch.zeros_like(x), torch.ones_like(sizes)[:, None], bits)


def halves(dtype, bits):
    """Operands of store with differences halfway between integers, quanta of a unit."""
    limit = stored.quantum_count(bits)
    x = (torch.arange(stored.GROUP, dtype=dtype) % limit - limit // 2 + 0.5)[None].repeat(2, 1)
    x[1] *= -1
    x[:, 0] = limit  # so that the scale is 1
    return StoreOperands(x, torch.zeros_like(x), torch.ones(2, 1, dtype=dtype), bits)


def not_finite(value, bits, dtype=torch.float32):
    """Operands of store, with a value that is not finite in one group of six."""
    values = operands(StoringCase("store", bits, (dtype, dtype), (2, 96)))
    values.x[1, 40] = value
    return values
