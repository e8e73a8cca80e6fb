"""What plain FSDP2 leaves alone a stack of sharded blocks leaves alone too: gradients, hooks, frozen parameters."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.support.exact import TIGHT
from tests.support.modes import MODES
from tests.support.networks import half_square, relative_error
from tests.support.sharded import DIM, ROWS, by_block, gathered, model_of, summed

SOLVERS = pytest.mark.parametrize("mode", ["corrected", "stored", "anchors", "checkpoint"])


def local_gradients(model):
    return [None if p.grad is None else p.grad.to_local().clone() for p in model.parameters()]


def of_inputs_alone(mesh, options):
    """Whether gradients on parameters stay as they are when those of the input are asked for, and how far off these
    are."""
    model, x = model_of("euler", options), torch.randn(ROWS, DIM, requires_grad=True)
    (expected,) = torch.autograd.grad(half_square(model(x)), x)
    by_block(model, mesh=mesh)
    half_square(model(x.detach())).backward()
    before = local_gradients(model)
    (found,) = torch.autograd.grad(half_square(model(x)), x)
    half_square(model(x)).backward(inputs=[x])
    are_same = all(map(torch.equal, local_gradients(model), before))
    half_square(model(x.detach())).backward()
    is_doubled = all(torch.equal(now, 2 * of) for now, of in zip(local_gradients(model), before, strict=True))
    return are_same, is_doubled, relative_error([found, x.grad], [expected, expected])


@SOLVERS
def test_gradients_of_inputs_alone_leave_parameters_alone(ranks, mode):
    for are_same, is_doubled, error in ranks.run(of_inputs_alone, MODES[mode]):
        assert are_same
        assert is_doubled
        assert error < TIGHT


def hooked(mesh, options):
    """How often hooks of parameters are called in a training step: those of autograd, and those after accumulation."""
    model, calls = by_block(model_of("heun", options), mesh=mesh), {"tensor": 0, "accumulated": 0}
    for parameter in model.stack.parameters():
        parameter.register_hook(lambda g: calls.update(tensor=calls["tensor"] + 1))
        parameter.register_post_accumulate_grad_hook(lambda p: calls.update(accumulated=calls["accumulated"] + 1))
    half_square(model(torch.randn(ROWS, DIM))).backward()
    return calls["tensor"], calls["accumulated"], len([*model.stack.parameters()])


@SOLVERS
def test_hooks_of_parameters_are_called_once_and_by_fsdp(ranks, mode):
    for of_tensors, accumulated, count in ranks.run(hooked, MODES[mode]):
        assert of_tensors == 0  # as in plain FSDP2
        assert accumulated == count


def frozen_meanwhile(mesh, options):
    model = by_block(model_of("euler", options), mesh=mesh)
    loss = half_square(model(torch.randn(ROWS, DIM)))
    model.stack[1].requires_grad_(False)
    loss.backward()
    return [p.grad is None for p in model.stack[1].parameters()], [p.grad is None for p in model.stack[0].parameters()]


@pytest.mark.parametrize("mode", ["corrected", "stored", "anchors"])
def test_a_parameter_that_is_frozen_before_the_backward_pass_gets_no_gradient(ranks, mode):
    for frozen, others in ranks.run(frozen_meanwhile, MODES[mode]):
        assert all(frozen)
        assert not any(others)


def copied(mesh, options):
    """How far gradients are off where what autograd saves is kept elsewhere."""
    model, x = model_of("euler", options), torch.randn(ROWS, DIM)
    rows = x.chunk(mesh.size())
    own = summed(model, rows)
    by_block(model, mesh=mesh)

    def pack(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = half_square(model(rows[mesh.get_local_rank()]))
    loss.backward()
    return relative_error(gathered(model.parameters(), mesh), own)


@SOLVERS
def test_saved_tensors_that_are_kept_elsewhere(ranks, mode):
    assert max(ranks.run(copied, MODES[mode])) < TIGHT
