"""Stacks whose blocks torch's `fully_shard` shards one by one, on two and three ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from resode_cuda import ResidualStack, Reverse
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT, TIGHT
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, plain, relative_error

DIM, ROWS, STEPS = 6, 12, 4


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
    found = []
    for parameter in parameters:
        if parameter.requires_grad:
            assert parameter.grad is not None
            if isinstance(parameter.grad, DTensor):
                found.append(parameter.grad.full_tensor() * mesh.size())
            else:
                distributed.all_reduce(parameter.grad, group=mesh.get_group())
                found.append(parameter.grad)
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


MODES = {
    "corrected": {"reverse": "corrected"},
    "extrapolated": {"reverse": "extrapolated"},
    "accelerated": {"reverse": Reverse("extrapolate", corrections=3, accelerate=True)},
    "exact": {"reverse": EXACT},
    "stored": {"reverse": "stored"},
    "rounded": {"reverse": Reverse("stored", bits=4, rounded_forward=True)},
    "anchors": {"anchors": 1},
    "checkpoint": {"gradient": "checkpoint"},
    "backprop": {"gradient": "backprop"},
}
EXACTLY = "exact", "anchors", "checkpoint", "backprop"


def assert_same(found, mode):
    assert max(own for own, _ in found) < TIGHT
    if mode in EXACTLY:
        assert max(exact for _, exact in found) < TIGHT


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_joined_batch(ranks, scheme, kind, mode):
    assert_same(ranks.run(errors, scheme, MODES[mode], kind), mode)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["exact", "stored", "checkpoint"])
def test_however_modules_are_sharded(ranks, scheme, way, mode):
    assert_same(ranks.run(errors, scheme, MODES[mode], "twice", way, count=3), mode)


OPTIONS = {
    "gathered until backward": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", ["exact", "stored", "checkpoint"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_fully_shard(ranks, scheme, mode, options):
    assert_same(ranks.run(partial(errors, **options), scheme, MODES[mode], "twice"), mode)


def replicated(mesh, scheme, options):
    """Sharded over one rank and replicated over three, which reduces gradients by another collective."""
    both = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("replicate", "shard"))
    model = model_of(scheme, options)
    x = torch.randn(ROWS, DIM)
    rows = x.chunk(mesh.size())
    own = summed(model, rows)
    by_block(model, mesh=both)
    half_square(model(rows[mesh.get_local_rank()])).backward()
    return relative_error(gathered(model.parameters(), mesh), own)


@pytest.mark.parametrize("mode", ["exact", "stored"])
def test_replicated_shards(ranks, mode):
    assert max(ranks.run(replicated, "euler", MODES[mode], count=3)) < TIGHT


def against_backprop(mesh, scheme, options, policy):
    """How far gradients under a mixed-precision policy are from those of gradient="backprop" under the same one."""
    x = torch.randn(ROWS, DIM, dtype=torch.float64).chunk(mesh.size())[mesh.get_local_rank()]
    found = []
    for mode in (options, MODES["backprop"]):
        torch.manual_seed(0)
        model = by_block(model_of(scheme, mode, "twice"), mesh=mesh, mp_policy=policy)
        half_square(model(x)).backward()
        found.append(gathered(model.parameters(), mesh))
    return relative_error(*found)


POLICIES = {
    "float32": MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64),
    "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bfloat16 inside": MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64),
    "reduced in float32": MixedPrecisionPolicy(reduce_dtype=torch.float32),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", ["anchors", "checkpoint", "stored", "corrected"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_mixed_precision(ranks, scheme, mode, policy):
    rounding = torch.finfo(policy.param_dtype or policy.reduce_dtype).eps
    assert max(ranks.run(against_backprop, scheme, MODES[mode], policy)) < (rounding if mode in EXACTLY else 1e-2)


def accumulated(mesh, scheme, options, kind):
    """Gradients of two batches, reduced with the second, against those of both."""
    model = model_of(scheme, options, kind)
    rows = torch.randn(2 * ROWS, DIM).chunk(2 * mesh.size())
    own = summed(model, rows)
    by_block(model, mesh=mesh)
    for number in range(2):
        model.set_requires_gradient_sync(number == 1)
        half_square(model(rows[2 * mesh.get_local_rank() + number])).backward()
    return relative_error(gathered(model.parameters(), mesh), own)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", ["exact", "stored", "checkpoint"])
def test_accumulation_reduces_once(ranks, scheme, mode):
    assert max(ranks.run(accumulated, scheme, MODES[mode], "twice")) < TIGHT


def losses(mesh, options, shards):
    """Losses of some training steps."""
    model = model_of("heun", options, "twice")
    batches = torch.randn(6, ROWS, DIM)
    if shards:
        by_block(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    found = []
    for x in batches:
        optimizer.zero_grad()
        rows = x.chunk(mesh.size())[mesh.get_local_rank()] if shards else x
        loss = half_square(model(rows)) / len(rows)
        loss.backward()
        optimizer.step()
        if shards:
            loss = loss.detach() / mesh.size()
            distributed.all_reduce(loss, group=mesh.get_group())
        found.append(loss.item())
    return found


def test_training_goes_as_on_one_machine(ranks):
    (alone, *_), found = (ranks.run(losses, MODES["exact"], shards) for shards in (False, True))
    for of_rank in found:
        assert of_rank == pytest.approx(alone, rel=TIGHT)


class Stateful(nn.Module):
    """Draws random numbers and writes buffers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.Tanh(), nn.Dropout(0.3), nn.Linear(DIM, DIM)
        )

    def forward(self, x, shift):
        return self.inner(x + shift)


def replayed(mesh, options):
    """A sharded stack of blocks with dropout and batch norm, arguments and auxiliaries, against itself unsharded."""
    torch.set_default_dtype(torch.float64)
    found, x = [], torch.randn(ROWS, DIM, requires_grad=True)
    for shards in (False, True):
        torch.manual_seed(0)
        stack = ResidualStack([Stateful() for _ in range(STEPS)], **options)
        if shards:
            for block in stack:
                fully_shard(block, mesh=mesh)
            fully_shard(stack, mesh=mesh)
        torch.manual_seed(1)
        shift = torch.randn(DIM, requires_grad=True)
        of_inputs = torch.autograd.grad(half_square(stack(x, shift)), (x, shift)) if not shards else None
        if shards:
            x.grad = None
            half_square(stack(x, shift)).backward()
            of_inputs = x.grad, shift.grad
        buffers = [buffer.clone() for buffer in stack.buffers()]
        found.append((of_inputs, buffers))
    (own, before), (got, after) = found
    return relative_error(got, own), all(map(torch.equal, before, after))


@pytest.mark.parametrize("mode", ["exact", "stored", "anchors", "checkpoint"])
def test_blocks_are_replayed(ranks, mode):
    for error, are_buffers_equal in ranks.run(replayed, MODES[mode]):
        assert error < TIGHT
        assert are_buffers_equal


def refused(mesh, scheme):
    model = by_block(model_of(scheme, MODES["exact"]), mesh=mesh)
    for block in model.stack:
        block.set_unshard_in_backward(False)
    try:
        half_square(model(torch.randn(ROWS, DIM))).backward()
    except RuntimeError as error:
        return str(error)


def test_parameters_that_are_left_scattered_in_the_backward_pass_are_refused(ranks):
    for message in ranks.run(refused, "euler"):
        assert "set_unshard_in_backward(False)" in message
