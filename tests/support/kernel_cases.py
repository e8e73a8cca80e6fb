"""What a backend with kernels is asked in tests, on the host and on a GPU alike, and what it must answer.

Operands lie in larger buffers: what is read only between NaNs, what is written between sevens, so that a value read
from outside shows in the results or the squares, and one written there in the sevens.
"""

import itertools
from dataclasses import dataclass

import torch

from resode_cuda import ops
from resode_cuda.ops import reference

STREAMS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPE_PAIRS = [(x, f) for x, f in itertools.product(STREAMS, STREAMS) if x == f or x.itemsize > f.itemsize]
MARGIN = 16

SCALARS = {"h": 0.1, "weight": 0.1, "a": 1.7, "b": 0.6, "g_scale": 0.9, "v_scale": 0.3}
"""None representable, so that each rounding shows, and float32 scalars in a float64 stream."""
STAGES = ("f", "k1", "k2")
WRITTEN = {
    "reverse_update_": ("x", "squares", "g"),
    "reverse_extrapolate_": ("x", "y", "d", "squares", "g"),
    "adjoint_update_": ("g",),
}
PRODUCTS = [(), ("v2",), ("v1", "v2"), ("g", "v1", "v2")]
"""Combinations of products that are None, as the ops are called."""


@dataclass(frozen=True)
class Case:
    """An op, and which of its operands are None."""

    op: str
    absent: tuple[str, ...] = ()

    def __str__(self):
        return "-".join([self.op, *(f"no_{name}" for name in self.absent)])

    @property
    def written(self):
        return [name for name in WRITTEN.get(self.op, ("out",)) if name not in self.absent]


CASES = [
    Case("forward_step"),
    Case("heun_step"),
    *(Case("adjoint_update_", absent) for absent in PRODUCTS[:3]),
    *(
        Case(op, stages + products)
        for op in ("reverse_update_", "reverse_extrapolate_")
        for stages, products in itertools.product([(), ("k2",)], PRODUCTS)
    ),
]


def pair_id(pair):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


def operands(case, pair, shape):
    """The op's operands: tensors of normal values on the CPU."""
    stream, stage = pair
    generator = torch.Generator().manual_seed(0)
    structure = getattr(ops, case.op).operands
    values = {}
    for name in structure._fields:
        if name in SCALARS:
            values[name] = SCALARS[name]
        elif name in case.absent:
            values[name] = None
        elif name == "squares":  # to which kernels add
            values[name] = torch.tensor([3.0, 5.0], dtype=torch.float64)
        else:
            value = torch.randn(shape, dtype=torch.float64, generator=generator)
            values[name] = value.to(stage if name in STAGES else stream)
    return structure(**values)


SIZES = [1e-30, 1e-20, 1e20, 1e30, (1e-20, 1.0), (1.0, 1e30), (1e-30, 1e30)]
"""Sizes of values whose squares float32 does not hold; a pair stands for two sizes in turn."""


def of_size(size, values):
    """The operands with states of that size, and nothing in squares yet."""
    first, second = size if isinstance(size, tuple) else (size, size)

    def scaled(value):
        sizes = torch.where(torch.arange(value.numel()) % 2 == 0, first, second).to(torch.float64)
        return (value.double() * sizes.view(value.shape)).to(value.dtype)

    states = {name: scaled(v) for name, v in values._asdict().items() if torch.is_tensor(v) and name != "squares"}
    return values._replace(**states, squares=torch.zeros_like(values.squares))


def by_reference(case, values, dtype=None):
    """What the op writes, by name; computed in that dtype, if one is given."""
    values = values._make(
        value.to(dtype or value.dtype, copy=True) if isinstance(value, torch.Tensor) else value for value in values
    )
    results = {**values._asdict(), "out": getattr(reference, case.op)(values)}
    return {name: results[name] for name in case.written}


def by_kernel(backend, case, values, device="cpu", offset=lambda name: 0):
    """What the op writes, by name, on the CPU. A tensor starts `offset` values after a 16-byte boundary."""
    arguments = values._asdict()
    if "out" in case.written:
        arguments["out"] = torch.full_like(values.x, torch.nan)
    before, buffers = dict(arguments), {}
    for name, value in before.items():
        if not isinstance(value, torch.Tensor):
            continue
        around = 7.0 if name in case.written else torch.nan
        start = MARGIN + offset(name)
        buffers[name] = torch.full((value.numel() + start + MARGIN,), around, dtype=value.dtype, device=device)
        arguments[name] = buffers[name].as_strided(value.shape, value.stride(), start).copy_(value)
    out = [arguments["out"]] if "out" in case.written else []
    assert getattr(backend, case.op)(values._make(arguments[name] for name in values._fields), *out) is None
    result = {name: arguments[name].to("cpu", copy=True) for name in case.written}
    for name, buffer in buffers.items():
        if name in case.written:
            arguments[name].fill_(7.0)
            assert (buffer == 7.0).all(), f"{case.op} wrote beyond {name}"
        else:
            torch.testing.assert_close(arguments[name].cpu(), before[name], rtol=0, atol=0, equal_nan=True)
    return result


def check(case, values, results):
    """Results within the budget of the float64 reference, and bit for bit where rounding is laid down."""
    stream = values[0].dtype
    wide = torch.promote_types(stream, torch.float32)
    exact, own, widely = (by_reference(case, values, dtype) for dtype in (torch.float64, None, wide))
    for name, result in results.items():
        assert result.dtype == own[name].dtype
        if name == "squares":
            _check_squares(values, results)
            continue
        error, own_error = ((value.double() - exact[name]).abs() for value in (result, own[name]))
        band = torch.finfo(result.dtype).eps * exact[name].abs().max()
        assert (error.max() <= 2 * (own_error.max() + band)).item(), (
            f"{name}: error {error.max():.3g}, the reference's own {own_error.max():.3g}, band {band:.3g}"
        )
        # y of a 16-bit stream starts from the stored x: two roundings, of which the wide reference has one.
        if name != "y" or stream == wide:
            assert torch.equal(result, widely[name].to(stream)), f"{name} differs from the reference's arithmetic"


def _check_squares(values, results):
    """The squares are those of the stored x; each thread adds up few of them, so few roundings pile up."""
    x_dtype, x = results["x"].dtype, results["x"].double()
    exact = values.squares.double() + torch.stack([(values.y.double() - x).square().sum(), x.square().sum()])
    eps = torch.finfo(torch.promote_types(x_dtype, torch.float32)).eps
    torch.testing.assert_close(results["squares"].double(), exact, rtol=64 * eps, atol=0)
