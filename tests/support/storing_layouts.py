"""Layouts that states of [samples, channels, height, width] may have where increments are stored."""

import torch

from resode_cuda import ops, stored
from resode_cuda.ops import storing
from tests.support.storing_cases import OPS, StoringCase, assert_same_bits, operands

LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


def laid_out(layout, values):
    """The operands with the first state laid out so, and the companion as `stored.start` lays it out beside it."""
    first = LAYOUTS[layout](values[0])
    return values._replace(**{values._fields[0]: first, "companion": _in_order_of(first, values.companion)})


def _in_order_of(x, companion):
    return stored.empty_companion(x, companion.dtype).copy_(companion)


def check_layouts(backend, layout, monkeypatch):
    """By a backend, whatever lies how, the ops return what the reference does, laid out as its results are."""
    for op in OPS:
        values = laid_out(layout, operands(StoringCase(op, 6, shape=(3, 4, 5, 6))))
        expected = _results(op, values)
        with monkeypatch.context() as patch:
            patch.setattr(storing, "select", lambda device: backend)
            found = _results(op, values)
        for result, other in zip(found, expected, strict=True):
            assert_same_bits(result, other)
        places = zip(found, (values.x, values.companion) if op == "store_step" else (values.companion,), strict=False)
        assert all(result.stride() == torch.empty_like(like).stride() for result, like in places)


def _results(op, values):
    found = getattr(ops, op)(*values)
    return (found,) if torch.is_tensor(found) else found
