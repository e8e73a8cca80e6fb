"""What a training step of a stack asks of memory and of the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resode_cuda import ResidualStack, squares
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, half_square, pretend_to_capture
from tests.support.op_cases import FUNCTIONAL, NAMES


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function.overloadpacket.__name__, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


class Tanh(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def backward_calls(scheme, steps, reverse):
    stack = ResidualStack([Tanh() for _ in range(block_count(scheme, steps))], scheme, reverse=reverse)
    loss = half_square(stack(torch.randn(7, 11, requires_grad=True)))
    with Log() as log:
        loss.backward()
    return log.calls


def passes(name, args):
    """Reads and writes of whole states in memory."""
    if name in FUNCTIONAL:
        return sum(isinstance(value, torch.Tensor) for value in args) + 1
    schema = getattr(torch.ops.resode, name).default._schema
    return sum(
        1 + argument.is_write
        for argument, value in zip(schema.arguments, args, strict=True)
        if isinstance(value, torch.Tensor) and argument.name != "squares"
    )


@pytest.mark.parametrize(
    ("scheme", "reverse", "expected"),
    [
        ("euler", "corrected", {"forward_step": 3, "reverse_update_": 7}),
        ("euler", "extrapolated", {"reverse_extrapolate_": 10}),
        ("euler", "paper", {"forward_step": 3, "adjoint_update_": 3}),
        ("heun", "corrected", {"forward_step": 3 * 3, "heun_step": 4, "reverse_update_": 9}),
        ("heun", "extrapolated", {"forward_step": 2 * 3, "reverse_extrapolate_": 12}),
    ],
)
def test_a_backward_step_touches_memory_as_often_as_the_table_says(scheme, reverse, expected):
    """Two more steps make so many more passes, all of them by these ops, and no other op on whole states but tanh's."""
    found = []
    for steps in (6, 8):
        totals = {}
        for name, args, _ in backward_calls(scheme, steps, reverse):
            if name in NAMES:
                totals[name] = totals.get(name, 0) + passes(name, args)
            elif name not in (
                "tanh",
                "tanh_backward",
                "detach",
                "dot",
                "sub",
                "add_",
                "sub_",
                "mul",
                "view",
                "split",
                "unbind",
                "reshape",
                "_reshape_alias",
                "alias",
                "empty_like",
                "copy_",
                "_local_scalar_dense",  # of the squares: a CPU's are read at once
                "_to_copy",
            ):
                totals[name] = totals.get(name, 0) + sum(
                    isinstance(value, torch.Tensor) and value.shape == (7, 11) for value in args
                )
        found.append(totals)
    few, many = found
    assert {name: (many[name] - few.get(name, 0)) / 2 for name in many if many[name] != few.get(name, 0)} == expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
def test_a_training_step_reads_nothing_back_from_the_device(monkeypatch, scheme, reverse):
    """While a graph is captured; else a GPU's host reads the drift asynchronously, and random states."""
    pretend_to_capture(monkeypatch)
    monkeypatch.setattr(squares, "READ_FREELY", ())  # the CPU stands for a device
    stack = ResidualStack([torch.nn.Linear(3, 3) for _ in range(block_count(scheme, 5))], scheme, reverse=reverse)
    x = torch.randn(4, 3)
    with Log() as log:
        half_square(stack(x)).backward()
    for name, args, kwargs in log.calls:
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero"), name
        assert name != "equal" or args[0].dtype == torch.uint8
        assert "device" not in kwargs or kwargs["device"] in (None, x.device)
