"""DTensors as parameters and arguments of blocks, and where this rank's own tensors belong."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_single
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import resode_cuda
from resode_cuda import ResidualMLP
from tests.support.exact import TIGHT
from tests.support.networks import gradients, half_square, relative_error
from tests.support.split_blocks import (
    DIM,
    HIDDEN,
    LENGTH,
    ROWS,
    SOME,
    STEPS,
    Layer,
    by_itself,
    part_of,
    split_layers,
    split_sequence,
    stack_of,
    trained,
    whole,
)


class Conditioned(nn.Module):
    """Adds to its hidden values what is given beside the state."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x, c):
        if isinstance(c, DTensor):
            c = c.redistribute(placements=[Replicate()])
        return self.down(torch.tanh(self.up(x) + c))


def conditioned(mesh, mode, placement, needs):
    stack, x = stack_of("euler", mode, Conditioned), torch.randn(ROWS, DIM, requires_grad=True)
    c = torch.randn(ROWS, HIDDEN, requires_grad=needs)
    inputs = [x, *[c] * needs, *stack.parameters()]
    own = gradients(lambda: stack(x, c), inputs)
    for block in stack:
        plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel(input_layouts=Shard(1))}
        parallelize_module(block, mesh, plan)
    distributed_c = distribute_tensor(c.detach(), mesh, [placement]).requires_grad_(needs)
    return relative_error(whole(trained(stack, x, distributed_c)), own)


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize(("placement", "needs"), [(Replicate(), False), (Shard(1), True)])
def test_arguments_may_be_distributed(ranks, mode, placement, needs):
    assert max(ranks.run(conditioned, mode, placement, needs)) < TIGHT


def with_hooks(mesh, mode):
    """Hooks of parameters are called once a pass, with the whole gradient."""
    stack, x = stack_of("euler", mode), torch.randn(ROWS, LENGTH, DIM, requires_grad=True)
    own, _ = by_itself(stack, x)
    split_layers(stack, mesh)
    seen = []
    for parameter in stack.parameters():
        parameter.register_hook(lambda g: seen.append(1) or 2 * g)
    of_x, *found = whole(trained(stack, x))
    return relative_error([of_x, *(g / 2 for g in found)], own), len(seen) == 2 * len(found)


@pytest.mark.parametrize("mode", SOME)
def test_hooks_of_distributed_parameters(ranks, mode):
    for error, are_called_once in ranks.run(with_hooks, mode):
        assert error < TIGHT
        assert are_called_once


def from_a_collective(mesh, mode):
    """The input is a tensor that is still on its way."""
    stack, x = stack_of("euler", mode), torch.randn(LENGTH, DIM)
    own = gradients(lambda: stack(x), [*stack.parameters()])
    split_layers(stack, mesh)
    with torch.no_grad():
        arriving = all_gather_single(x.chunk(mesh.size())[mesh.get_local_rank()], 0, mesh)
    assert isinstance(arriving, AsyncCollectiveTensor)
    half_square(stack(arriving)).backward()
    return relative_error(whole([parameter.grad for parameter in stack.parameters()]), own)


@pytest.mark.parametrize("mode", SOME)
def test_states_that_are_still_on_their_way(ranks, mode):
    assert max(ranks.run(from_a_collective, mode)) < TIGHT


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(STEPS))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def converted(mesh, split):
    """A converted model's gradients, and its own when its layers are split or its states are."""
    torch.set_default_dtype(torch.float64)
    model, x = Model(), torch.randn(ROWS, LENGTH, DIM)
    exact = gradients(lambda: model(x), [*model.parameters()])
    split(model.layers, mesh)
    is_split = split is split_sequence
    resode_cuda.convert(model, ["layers"], reverse="stored")
    half_square(model(part_of(x, mesh) if is_split else x)).backward()
    found = [parameter.grad for parameter in model.parameters()]
    if is_split:  # each rank's own tokens have gone through the first layer
        found[:2] = [DTensor.from_local(g, mesh, [Partial()]) for g in found[:2]]
    return relative_error(whole(found), exact), str(resode_cuda.conversion(model))


@pytest.mark.parametrize("split", [split_layers, split_sequence])
def test_converted_models(ranks, split):
    for error, shown in ranks.run(converted, split):
        assert 0 < error < 0.01
        assert "as a stack" in shown


def converted_with_distributed_states(mesh):
    torch.set_default_dtype(torch.float64)
    model, x = Model(), torch.randn(ROWS, LENGTH, DIM)
    exact = gradients(lambda: model(x), [*model.parameters()])
    parallelize_module(model.first, mesh, SequenceParallel(use_local_output=False))
    split_sequence(model.layers, mesh, use_local_output=False)
    resode_cuda.convert(model, ["layers"], reverse="stored")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        half_square(model(part_of(x, mesh)).full_tensor()).backward()
    found = [parameter.grad for parameter in model.parameters()]
    return relative_error(whole(found), exact), [str(warning.message) for warning in caught]


def test_converted_layers_with_distributed_states_run_by_themselves(ranks):
    for error, messages in ranks.run(converted_with_distributed_states):
        assert error < TIGHT
        assert any("given a DTensor, not this rank's own tensor" in message for message in messages)


def refusals(mesh, mode):
    """What is said of DTensors where this rank's own tensors belong."""
    stack, mlp = stack_of("euler", mode), ResidualMLP(DIM, HIDDEN, STEPS, gradient=stack_of("euler", mode).gradient)
    x = distribute_tensor(torch.randn(ROWS, LENGTH, DIM), mesh, [Shard(1)])
    split = stack_of("euler", mode)
    split_sequence(split, mesh, use_local_output=False)
    shared = ResidualMLP(DIM, HIDDEN, STEPS)
    shared.weight_in = nn.Parameter(distribute_tensor(shared.weight_in.detach(), mesh, [Shard(1)]))
    found = []
    for run in (
        lambda: stack(x),
        lambda: stack.invert(x),
        lambda: split(x.to_local()),
        lambda: mlp(x),
        lambda: shared(x.to_local()),
    ):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises(TypeError) as error:
                run()
            found.append(str(error.value))
    return found


@pytest.mark.parametrize("mode", ["exact", "stored", "checkpoint", "backprop"])
def test_distributed_tensors_are_refused_by_name(ranks, mode):
    expected = (
        "ResidualStack: x must be this rank's own tensor, got a DTensor; pass x.to_local()",
        "ResidualStack: x must be this rank's own tensor, got a DTensor; pass x.to_local()",
        "block 0 must return this rank's own tensor, got a DTensor; set use_local_output=True",
        "ResidualMLP: x must be this rank's own tensor, got a DTensor; use x.to_local()",
        "ResidualMLP: weight_in must be this rank's own tensor, got a DTensor; use weight_in.to_local()",
    )
    for found in ranks.run(refusals, mode):
        for wanted, (message, another) in zip(expected, zip(found[::2], found[1::2], strict=True), strict=True):
            assert wanted in message
            assert wanted in another
