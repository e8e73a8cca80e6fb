"""What kernels are handed: dense operands of one layout, apart from what is written."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from resode_cuda.layouts import is_dense, same_layout
from resode_cuda.ops import pointwise, reference
from tests.support.kernel_cases import WRITTEN
from tests.support.op_cases import (
    FUNCTIONAL,
    LAYOUTS,
    MUTATING,
    NAMES,
    formula,
    mapped,
    operands,
    run,
    tensors_of,
)


class Contract:
    """A backend that demands what kernels are promised, and computes in plain torch."""

    def __getattr__(self, name):
        def check_and_run(values, *out):
            tensors = [tensor for tensor in tensors_of((*values, *out)) if tensor.shape != (2,)]
            assert all(same_layout(tensor, tensors[0]) for tensor in tensors)
            assert all(is_dense(tensor) and tensor.numel() for tensor in tensors)
            k2 = getattr(values, "k2", None)
            assert k2 is None or values.k1.dtype == k2.dtype
            written = out if name in FUNCTIONAL else [getattr(values, field) for field in WRITTEN[name]]
            for a, b in itertools.product(written, tensors):
                shares = a is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
                assert a is b or not shares
            result = getattr(reference, name)(values)
            for tensor in out:
                tensor.copy_(result)

        return check_and_run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["first", "others", "all"])
def test_kernels_are_handed_dense_operands_of_one_layout(monkeypatch, name, layout, which):
    monkeypatch.setattr(pointwise, "select", lambda device: Contract())
    lay = LAYOUTS[layout]

    values = operands(name, (4, 4))
    first, *others = values._fields
    for field in {"first": [first], "others": others, "all": values._fields}[which]:
        value = getattr(values, field)
        if not isinstance(value, torch.Tensor) or value.shape != (4, 4):
            continue
        if layout == "expanded" and field in WRITTEN.get(name, ()):
            continue  # an expanded operand cannot be written
        values = values._replace(**{field: lay(value)})
    expected = formula(name, mapped(torch.Tensor.double, values))
    strides = [tensor.stride() for tensor in tensors_of(values)]
    got = run(name, values)
    assert [tensor.stride() for tensor in tensors_of(values)] == strides
    for result, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one storage"])
def test_operands_of_one_layout_are_not_copied(monkeypatch, together):
    seen = []

    class Spy:
        def reverse_update_(self, values):
            seen.extend(tensor.data_ptr() for tensor in tensors_of(values))

    monkeypatch.setattr(pointwise, "select", lambda device: Spy())
    values = operands("reverse_update_")
    states = {field: value for field, value in values._asdict().items() if getattr(value, "ndim", 0) == 2}
    stored = torch.stack(list(states.values()))
    values = values._replace(
        **{field: state.t() if together else state.t().clone() for field, state in zip(states, stored, strict=True)}
    )
    torch.ops.resode.reverse_update_(*values)
    assert seen == [tensor.data_ptr() for tensor in tensors_of(values)]


@pytest.mark.parametrize("name", MUTATING)
@pytest.mark.parametrize("has_kernel", [False, True])
def test_autograd_notices_what_was_written(monkeypatch, name, has_kernel):
    if has_kernel:  # which torch does not see writing
        monkeypatch.setattr(pointwise, "select", lambda device: SimpleNamespace(**{name: lambda *values: None}))
    values = operands(name)
    loss = (torch.ones_like(values[0], requires_grad=True) * values[0]).sum()
    getattr(torch.ops.resode, name)(*values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
