"""Models with a stack whose blocks `fully_shard` shards, and their gradients against those of one machine."""

from __future__ import annotations

from collections import Counter

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from resode_cuda import ResidualStack
from tests.support.exact import TIGHT
from tests.support.modes import EXACTLY
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, plain, relative_error

DIM, ROWS, STEPS = 6, 12, 3


class Counted(TorchDispatchMode):
    """Counts the calls of torch's ops."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops[str(op.overloadpacket)] += 1
        return op(*args, **kwargs or {})

    @property
    def collectives(self):
        """How many of each kind."""
        return {op: count for op, count in self.ops.items() if op.startswith("c10d")}


class Whole(nn.Module):
    """A stack between two layers of other parameters."""

    def __init__(self, blocks, scheme, **options):
        super().__init__()
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)
        self.stack = ResidualStack(blocks, scheme, **options)

    def forward(self, x):
        return self.last(self.stack(self.first(x)))

    def plain(self, x):
        return self.last(plain(list(self.stack), self.stack.scheme, self.first(x)))


class Adapted(nn.Module):
    """A frozen block with a low-rank adapter beside it."""

    def __init__(self):
        super().__init__()
        self.base = mlp().requires_grad_(False)
        self.down, self.up = nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def twice(steps, scheme):
    """Blocks of which the second stands at two places."""
    blocks = mlps(scheme, steps)
    return [*blocks[:2], blocks[1], *blocks[3:]]


def frozen(steps, scheme):
    """Blocks of which the second has no gradients, and of the third only a part."""
    blocks = mlps(scheme, steps)
    blocks[1].requires_grad_(False)
    blocks[2][0].requires_grad_(False)
    return blocks


KINDS = {
    "plain": lambda steps, scheme: mlps(scheme, steps),
    "twice": twice,
    "frozen": frozen,
    "adapted": lambda steps, scheme: [Adapted() for _ in range(block_count(scheme, steps))],
}


def by_block(model, **options):
    """Shard it as users do, each block by itself and the rest of the model."""
    for block in dict.fromkeys(model.stack):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def inside_blocks(model, **options):
    """Layers inside blocks are sharded by themselves, too."""
    for block in dict.fromkeys(model.stack):
        for layer in block.children():
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, **options)
    return by_block(model, **options)


def without_root(model, **options):
    """Nothing but the blocks."""
    for block in dict.fromkeys(model.stack):
        fully_shard(block, **options)
    return model


def the_stack(model, **options):
    """The stack and each block; its parameters outside are whole on all ranks."""
    for block in dict.fromkeys(model.stack):
        fully_shard(block, **options)
    fully_shard(model.stack, **options)
    return model


WAYS = {way.__name__: way for way in (by_block, inside_blocks, without_root, the_stack)}


def gathered(parameters, mesh):
    """Gradients summed over all ranks, whole; where FSDP has averaged over them, times their number."""
    trained = [parameter.grad for parameter in parameters if parameter.requires_grad]
    assert all(gradient is not None for gradient in trained)
    # One collective: one for each gradient takes as long as a training step.
    parts = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in trained]
    of_ranks = [None] * mesh.size()
    distributed.all_gather_object(of_ranks, parts, mesh.get_group())
    found = []
    for gradient, *of_each in zip(trained, *of_ranks, strict=True):
        if not isinstance(gradient, DTensor):
            found.append(sum(of_each))
        elif any(placement.is_replicate() for placement in gradient.placements):
            found.append(gradient.full_tensor() * mesh.size())
        else:
            found.append(torch.cat(of_each) * mesh.size())
    return found


def summed(model, batches, run=None):
    """Gradients of the whole model, summed over batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [gradients(lambda x=x: (run or model)(x), parameters) for x in batches]
    return [sum(of_parameter) for of_parameter in zip(*found, strict=True)]


def model_of(scheme, options, kind="plain"):
    torch.set_default_dtype(torch.float64)
    return Whole(KINDS[kind](STEPS, scheme), scheme, **options)


def errors(mesh, scheme, options, kind="plain", way="by_block", **sharding):
    """How far a sharded model's gradients, each rank's from its own rows, are from those of the same model unsharded on
    these rows, and from those of the plain loop on the whole batch."""
    model = model_of(scheme, options, kind)
    x = torch.randn(ROWS, DIM)
    rows = x.chunk(mesh.size())
    exact, own = summed(model, [x], model.plain), summed(model, rows)
    WAYS[way](model, mesh=mesh, **sharding)
    for _ in range(2):
        model.zero_grad()
        half_square(model(rows[mesh.get_local_rank()])).backward()
    found = gathered(model.parameters(), mesh)
    return relative_error(found, own), relative_error(found, exact)


def assert_same(found, mode):
    assert max(own for own, _ in found) < TIGHT
    if mode in EXACTLY:
        assert max(exact for _, exact in found) < TIGHT
