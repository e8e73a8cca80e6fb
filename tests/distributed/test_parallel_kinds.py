"""Blocks and models of several kinds under `DistributedDataParallel`, on two and three ranks."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce

from resode_cuda import ResidualMLP, ResidualStack
from tests.distributed.test_data_parallel import (
    DIM,
    ROWS,
    SCHEME,
    SOME,
    STEPS,
    Whole,
    distance,
    gradients_of,
    left,
    loss_of,
    mean_of,
    wrapped,
)
from tests.support.exact import TIGHT
from tests.support.modes import EXACTLY, MODES
from tests.support.networks import block_count, mlp, relative_error


class Own(nn.Module):
    """Module.compile leaves the classes of torch.nn itself uncompiled."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x)


def compiled(mesh, options):
    """How far gradients of compiled blocks are from those of the same blocks, uncompiled, and how many graphs were
    compiled."""
    torch.set_default_dtype(torch.float64)
    model, calls = Whole(ResidualStack([Own() for _ in range(STEPS)], **options)), []
    x = torch.randn(2, ROWS, DIM)
    expected = [mean_of([gradients_of(model, model, rows) for rows in of.chunk(mesh.size())]) for of in x]
    torch._dynamo.reset()

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    for block in model.stack:
        block.compile(backend=backend)
    parallel, found = wrapped(model, mesh), []
    for of, reference in zip(x, expected, strict=True):
        parallel.zero_grad()
        loss_of(parallel(of.chunk(mesh.size())[mesh.get_local_rank()])).backward()
        found.append(distance(left(model), reference))
    return max(found), len(calls)


@SOME
def test_compiled_blocks(ranks, mode):
    for error, graphs in ranks.run(compiled, MODES[mode]):
        assert error < TIGHT
        assert graphs > 0


class Synced(nn.Module):
    """Batch norm over the rows of all ranks, between two layers.

    torch's own `SyncBatchNorm` takes CUDA tensors alone. As that does, this one has collectives in its forward and in
    its backward pass, both of which run again in the stack's backward pass.
    """

    def __init__(self, group=None):
        super().__init__()
        self.first, self.last, self.group = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), group
        self.register_buffer("mean", torch.zeros(DIM))

    def over_ranks(self, value):
        if self.group is None:
            return value
        return all_reduce(value, distributed.ReduceOp.SUM, self.group) / distributed.get_world_size(self.group)

    def forward(self, x):
        x = self.first(x)
        mean = self.over_ranks(x.mean(0))
        variance = self.over_ranks((x - mean).square().mean(0))
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
        return self.last(torch.tanh((x - mean) / (variance + 1e-5).sqrt()))


def synced(mesh, scheme, options):
    """How far gradients and statistics of a net with batch norms over all ranks are from those of the joined batch."""
    torch.set_default_dtype(torch.float64)
    found, x = [], torch.randn(ROWS, DIM)
    for group in (None, mesh.get_group()):
        torch.manual_seed(0)
        model = Whole(ResidualStack([Synced(group) for _ in range(block_count(scheme, STEPS))], scheme, **options))
        run = model if group is None else wrapped(model, mesh)
        loss_of(run(x if group is None else x.chunk(mesh.size())[mesh.get_local_rank()])).backward()
        found.append((left(model), [*model.buffers()]))
    (expected, statistics), (got, other_statistics) = found
    return relative_error(got, expected), relative_error(other_statistics, statistics)


@SCHEME
@pytest.mark.parametrize("mode", ["corrected", "anchors", "checkpoint", "stored"])
def test_batch_norm_over_all_ranks(ranks, scheme, mode):
    for of_gradients, of_statistics in ranks.run(synced, scheme, MODES[mode], count=3 if mode == "corrected" else 2):
        assert of_gradients < TIGHT
        assert of_statistics < TIGHT


class Norm(nn.SyncBatchNorm):
    """What a model is known by that synchronises its batch norms, on CPUs."""

    def __init__(self, group):
        super().__init__(DIM, process_group=group)
        self.synced = Synced(group)

    def forward(self, x):
        return self.synced(x)


def drifting(mesh, on_drift):
    """How a stack trains, pass by pass, of which one rank alone sees drift, and its gradients' error at last."""
    torch.set_default_dtype(torch.float64)
    rank, x = mesh.get_local_rank(), torch.randn(ROWS, DIM)
    blocks = [Norm(mesh.get_group()) for _ in range(STEPS)]
    exact = Whole(ResidualStack(blocks, gradient="checkpoint"))
    model = Whole(ResidualStack(blocks, on_drift=on_drift, max_drift=1e-9 if rank else 1e9))
    model.load_state_dict(exact.state_dict())
    rows, found = x.chunk(mesh.size())[rank], []
    with warnings.catch_warnings(record=True):
        for _ in range(3):
            model.zero_grad()
            loss_of(model(rows)).backward()
            got = left(model)
            found.append((model.stack.gradient, model.stack.reverse.bits))
    exact.zero_grad()
    loss_of(exact(rows)).backward()
    return found, distance(got, left(exact))


@pytest.mark.parametrize("on_drift", ["checkpoint", "store"])
def test_synchronised_batch_norms_fall_back_together(ranks, on_drift):
    (first, first_error), (second, second_error) = ranks.run(drifting, on_drift)
    assert first == second
    assert first[0] == ("adjoint", None)
    assert first[-1] == ("checkpoint", 8 if on_drift == "store" else None)
    assert max(first_error, second_error) < TIGHT


def of_residual_mlp(mesh, options):
    torch.set_default_dtype(torch.float64)
    model, x = ResidualMLP(DIM, 10, STEPS, **options), torch.randn(ROWS, DIM)
    by_rank = mean_of([gradients_of(model, model, rows) for rows in x.chunk(mesh.size())])
    joined = gradients_of(model, model, x)
    parallel = wrapped(model, mesh)
    loss_of(parallel(x.chunk(mesh.size())[mesh.get_local_rank()])).backward()
    return distance(left(model), by_rank), distance(left(model), joined)


@pytest.mark.parametrize("mode", ["exact", "stored", "anchors", "checkpoint"])
def test_a_residual_mlp(ranks, mode):
    for found in ranks.run(of_residual_mlp, MODES[mode]):
        assert max(found) < TIGHT


def converted(mesh, options):
    """How far gradients of a converted GPT-2 are from those of the joined batch, by itself converted and as it was."""
    from tests.support.small_transformers import batch_for, last_pass, only_loss, small_and_converted, trained_on

    without_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    plain, model = small_and_converted("gpt2", torch.float64, options, **without_dropout)
    batch = batch_for("gpt2", padded=False)
    references = [trained_on(of, batch)[1] for of in (model, plain)]
    rank = mesh.get_local_rank()
    _, found = trained_on(wrapped(model, mesh), {name: of[rank : rank + 1] for name, of in batch.items()}, only_loss)
    found = {name.removeprefix("module."): gradient for name, gradient in found.items()}
    return last_pass(model), *(relative_error([found[name] for name in of], [*of.values()]) for of in references)


@pytest.mark.parametrize("mode", ["anchors", "stored"])
def test_a_converted_model(ranks, mode):
    for how, converted_error, error in ranks.run(converted, MODES[mode]):
        assert how == "as a stack"
        assert converted_error < TIGHT
        assert error < (TIGHT if mode in EXACTLY else 2e-2)
