"""Sharded blocks under the options of `fully_shard` and beside other things that training does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from resode_cuda import ResidualStack
from resode_cuda.adjoint.sharding import Shards
from resode_cuda.schemes import SCHEMES
from tests.support.exact import TIGHT
from tests.support.modes import EXACTLY, MODES
from tests.support.networks import half_square, relative_error
from tests.support.sharded import DIM, ROWS, STEPS, assert_same, by_block, errors, gathered, model_of, summed

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


def in_pairs(model, mesh):
    blocks = list(model.stack)
    for n in range(0, len(blocks), 2):
        fully_shard(blocks[n : n + 2], mesh=mesh)
    fully_shard(model, mesh=mesh)


def compiled(model, mesh):
    for block in model.stack:
        block.compile(backend="aot_eager")
    by_block(model, mesh=mesh)


def checkpointed(model, mesh):
    forward = model.stack.forward
    model.stack.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    by_block(model, mesh=mesh)


SURROUNDINGS = {function.__name__: function for function in (in_pairs, compiled, checkpointed)}


def surrounded(mesh, scheme, options, name):
    model = model_of(scheme, options)
    rows = torch.randn(ROWS, DIM).chunk(mesh.size())
    own = summed(model, rows)
    SURROUNDINGS[name](model, mesh)
    for _ in range(2):
        model.zero_grad()
        half_square(model(rows[mesh.get_local_rank()])).backward()
    return relative_error(gathered(model.parameters(), mesh), own)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", ["exact", "stored", "checkpoint"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_blocks_sharded_together_compiled_and_checkpointed(ranks, scheme, mode, name):
    assert max(ranks.run(surrounded, scheme, MODES[mode], name)) < TIGHT


def stepped_too_early(mesh):
    model = by_block(model_of("euler", MODES["stored"]), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    half_square(model(torch.randn(ROWS, DIM))).backward()
    loss = half_square(model(torch.randn(ROWS, DIM)))
    optimizer.step()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)


def test_an_optimizer_step_between_forward_and_backward_is_refused(ranks):
    for message in ranks.run(stepped_too_early):
        assert "step the optimizer after backward" in message


def of_another_release(mesh, owner, name, policy):
    """What a stack says in a torch release without a part of fully_shard."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fsdp_state

    holder = _fsdp_param_group.FSDPParamGroup if owner == "group" else _fsdp_state.FSDPState
    model = by_block(model_of("euler", MODES["stored"]), mesh=mesh, mp_policy=policy)
    function = getattr(holder, name)
    delattr(holder, name)
    try:
        model(torch.randn(ROWS, DIM))
    except RuntimeError as error:
        return str(error)
    finally:
        setattr(holder, name, function)


@pytest.mark.parametrize(
    ("owner", "name", "policy"),
    [("group", "post_backward", MixedPrecisionPolicy()), ("state", "_pre_backward", MixedPrecisionPolicy())],
)
def test_a_torch_release_without_what_is_needed_is_named(ranks, owner, name, policy):
    for message in ranks.run(of_another_release, owner, name, policy):
        assert name in message
        assert torch.__version__ in message
        assert 'use gradient="backprop"' in message


def without_casts(mesh):
    """What a block's shards say in a release whose recomputed modules do not cast."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    block = fully_shard(nn.Linear(DIM, DIM), mesh=mesh, mp_policy=POLICIES["bfloat16"])
    plain = fully_shard(nn.Linear(DIM, DIM), mesh=mesh)
    function = FSDPState._cast_forward_inputs
    del FSDPState._cast_forward_inputs
    try:
        Shards([plain])
        Shards([block])
    except RuntimeError as error:
        return str(error)
    finally:
        FSDPState._cast_forward_inputs = function


def test_a_torch_release_that_does_not_cast_again_is_refused_with_mixed_precision_alone(ranks):
    for message in ranks.run(without_casts):
        assert "_cast_forward_inputs" in message
