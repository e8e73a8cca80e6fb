"""A KeyboardInterrupt at any line leaves parameters, buffers, attributes, generators and settings as they were."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.backends import mha
from torch.nn.utils import parametrize

import resode_cuda
from resode_cuda import ResidualStack
from resode_cuda.adjoint.restoration import restoring, undo_later, undo_leftovers
from tests.support.networks import half_square

PACKAGE = str(Path(resode_cuda.__file__).parent)


class Stateful(nn.Module):
    """Everything that a re-evaluation has to replay."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen, self.count, self.last = [], 0, None

    def forward(self, x):
        self.calls.add_(1)
        self.count += 1
        self.seen.append(self.count)
        self.last = x.sum()
        x = x * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.dropout(self.norm(y.flatten(0, 1)).view_as(y))


def state(stack):
    """All that must be as it was; objects by identity where another object would be a change."""
    modules = list(stack.modules())
    slots = [(id(module), name, id(p)) for module in modules for name, p in module._parameters.items()]
    buffers = [(id(module), name, id(b)) for module in modules for name, b in module._buffers.items()]
    attributes = [{k: v for k, v in vars(m).items() if isinstance(v, (int, str, bool))} for m in modules]
    lists = [list(module.seen) for module in modules if hasattr(module, "seen")]
    last = [id(module.last) for module in modules if hasattr(module, "last")]
    values = [buffer.tolist() for buffer in stack.buffers()]
    flags = [p.requires_grad for p in stack.parameters()]
    settings = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    others = torch.get_default_dtype(), mha.get_fastpath_enabled(), parametrize._cache_enabled
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return slots, buffers, attributes, lists, last, values, flags, settings, others, generators


def interrupted(run, line):
    """Run with a KeyboardInterrupt before the package's line of that number; the number of lines that ran."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(PACKAGE) else None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def prepared(gradient, reverse):
    """A forward pass in one mode and what its backward pass, in another, must leave as it was."""
    torch.manual_seed(0)
    stack = ResidualStack([Stateful() for _ in range(2)], gradient=gradient, reverse=reverse, on_drift="ignore")
    next(stack.parameters()).register_hook(lambda g: g)
    with torch.autocast("cpu", torch.bfloat16):
        loss = half_square(stack(torch.randn(3, 4, 8, requires_grad=True)).float())
    stack.eval()
    torch.rand(3), random.random(), np.random.rand()
    return stack, loss


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("gradient", "reverse"), [("adjoint", "corrected"), ("checkpoint", "corrected")])
def test_an_interrupt_of_the_backward_pass_leaves_everything_as_it_was(gradient, reverse):
    stack, loss = prepared(gradient, reverse)
    lines = interrupted(loss.backward, 0)
    assert lines > 500
    late = 0
    # A stride that is prime to the loops' lengths meets every line of theirs in one turn or another.
    for line in range(1, lines, 7):
        stack, loss = prepared(gradient, reverse)
        before = state(stack)
        interrupted(loss.backward, line)
        late += state(stack) != before
        undo_leftovers()  # as the next forward pass does
        assert state(stack) == before, line
    assert late <= 2


def test_what_an_interrupt_kept_from_being_undone_is_undone_by_the_next_forward_pass():
    stack, found = ResidualStack([nn.Linear(3, 3)]), []

    def interrupt():
        if not found:
            found.append("interrupted")
            raise KeyboardInterrupt
        found.append("undone")

    from resode_cuda.adjoint import restoration

    restoration._changes.actions.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        undo_leftovers()
    assert found == ["interrupted", "undone"]
    restoration._changes.actions.append(interrupt)
    stack(torch.randn(2, 3))
    assert found == ["interrupted", "undone", "undone"]
    assert not restoration._changes.actions


def test_what_fails_to_be_undone_keeps_nothing_else_from_it():
    found = []

    def fail():
        raise ValueError("lost")

    def run():
        undo_later(found.append, "first")
        undo_later(fail)
        undo_later(found.append, "last")

    with pytest.raises(ValueError, match="lost"):
        restoring(run)
    assert found == ["last", "first"]
