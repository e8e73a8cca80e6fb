"""Blocks that ranks have parts of, and the ways of splitting them."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from resode_cuda import ResidualStack
from tests.support.modes import MODES
from tests.support.networks import block_count, gradients, half_square, plain

DIM, HIDDEN, ROWS, LENGTH, STEPS = 6, 12, 3, 8, 4

SOME = "corrected", "anchors", "stored", "checkpoint"
"""One of each kind."""


class Perceptron(nn.Module):
    """A norm and two layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        nn.init.normal_(self.norm.weight, 1.0, 0.1)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


class Layer(Perceptron):
    """The same as a layer of a model, which adds the state itself."""

    def forward(self, x):
        return x + super().forward(x)


def split_layers(blocks, mesh):
    """Layers inside are split, states are whole on all ranks."""
    for block in blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def split_sequence(blocks, mesh, use_local_output=True):
    """States are split along the sequence, norms too; layers see all of it."""
    for block in blocks:
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=use_local_output),
        }
        parallelize_module(block, mesh, plan)


def gather_first(blocks, mesh):
    """States are split along the sequence; a block gathers its input, and scatters its output."""
    for block in blocks:
        plan = {
            "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True),
            "up": ColwiseParallel(),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, plan)


def whole(tensors):
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def are_same(mesh, tensors):
    """Whether tensors have the same bits on all ranks."""
    for tensor in tensors:
        found = [torch.empty_like(tensor) for _ in range(mesh.size())]
        distributed.all_gather(found, tensor.contiguous(), mesh.get_group())
        if not all(torch.equal(tensor, other) for other in found):
            return False
    return True


def stack_of(scheme, mode, block=Perceptron):
    torch.set_default_dtype(torch.float64)
    return ResidualStack([block() for _ in range(block_count(scheme, STEPS))], scheme, **MODES[mode])


def by_itself(stack, x, *others):
    """The stack's gradients before it is split, and those of the plain loop."""
    inputs = [x, *others, *stack.parameters()]
    own = gradients(lambda: stack(x, *others), inputs)
    return own, gradients(lambda: plain(list(stack), stack.scheme, x, *others), inputs)


def trained(stack, *given):
    """Gradients of what is given and of the parameters, in the second of two passes."""
    inputs = [*(tensor for tensor in given if tensor.requires_grad), *stack.parameters()]
    for _ in range(2):
        for tensor in inputs:
            tensor.grad = None
        half_square(stack(*given)).backward()
    return [tensor.grad for tensor in inputs]


def part_of(x, mesh):
    """This rank's part of the sequence."""
    return x.detach().chunk(mesh.size(), 1)[mesh.get_local_rank()].clone().requires_grad_()


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))
