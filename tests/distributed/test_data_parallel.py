"""Stacks under `DistributedDataParallel`, on two and three ranks: each has some of the rows, and the whole gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import TIGHT
from tests.support.modes import EXACTLY, MODES
from tests.support.networks import block_count, half_square, mlp, mlps, plain, relative_error

DIM, ROWS, STEPS = 6, 12, 4

TRIED = [mode for mode in MODES if mode not in ("extrapolated", "backprop")]
SOME = pytest.mark.parametrize("mode", ["stored", "anchors", "checkpoint"])
SCHEME = pytest.mark.parametrize("scheme", SCHEMES)


class Partly(nn.Module):
    """A block with parameters that it does not use, or not train."""

    def __init__(self):
        super().__init__()
        self.inner, self.unused, self.frozen = mlp(), nn.Linear(DIM, 2), nn.Linear(DIM, DIM)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.inner(x) + self.frozen(x)


def twice(scheme):
    """Blocks of which the second stands at two places."""
    blocks = mlps(scheme, STEPS)
    return [*blocks[:2], blocks[1], *blocks[3:]]


KINDS = {
    "plain": lambda scheme: mlps(scheme, STEPS),
    "twice": twice,
    "partly": lambda scheme: [Partly() for _ in range(block_count(scheme, STEPS))],
}


class Whole(nn.Module):
    """A stack between two layers."""

    def __init__(self, stack):
        super().__init__()
        self.first, self.stack, self.last = nn.Linear(DIM, DIM), stack, nn.Linear(DIM, 3)

    def forward(self, x):
        return self.last(self.stack(self.first(x)))

    def plain(self, x):
        return self.last(plain(list(self.stack), self.stack.scheme, self.first(x)))


def model_of(scheme, options, kind="plain"):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return Whole(ResidualStack(KINDS[kind](scheme), scheme, **options))


def loss_of(out):
    """A mean over rows: that of the joined batch is the mean over ranks."""
    return half_square(out) / len(out)


def gradients_of(model, run, x):
    """By name, without those of parameters that are not used."""
    found = torch.autograd.grad(
        loss_of(run(x)), trained := [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    return [None if g is None or not g.any() else g for g, _ in zip(found, trained, strict=True)]


def mean_of(gradients):
    """Over ranks."""
    return [None if of[0] is None else sum(of) / len(of) for of in zip(*gradients, strict=True)]


def distance(found, expected):
    assert [g is None or not g.any() for g in found] == [g is None for g in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    return relative_error([a for a, _ in pairs], [b for _, b in pairs])


def left(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def wrapped(model, mesh, **options):
    return DistributedDataParallel(model, process_group=mesh.get_group(), **options)


def errors(mesh, scheme, options, kind="plain", **ddp):
    """How far a rank's gradients in two passes are from the mean of those of each rank's rows, from those of the same
    model on the joined batch, and from those of the plain loop on it."""
    model = model_of(scheme, options, kind)
    batches, expected = torch.randn(2, ROWS, DIM), []
    for x in batches:
        by_rank = mean_of([gradients_of(model, model, rows) for rows in x.chunk(mesh.size())])
        expected.append((by_rank, gradients_of(model, model, x), gradients_of(model, model.plain, x)))
    parallel, found = wrapped(model, mesh, **ddp), []
    for x, references in zip(batches, expected, strict=True):
        parallel.zero_grad()
        loss_of(parallel(x.chunk(mesh.size())[mesh.get_local_rank()])).backward()
        found.append([distance(left(model), reference) for reference in references])
    return [max(of_passes) for of_passes in zip(*found, strict=True)]


def assert_same(found, mode):
    for by_rank, joined, exact in found:
        assert by_rank < TIGHT
        assert joined < TIGHT or mode not in (*EXACTLY, "rounded")
        assert exact < TIGHT or mode not in EXACTLY


@SCHEME
@pytest.mark.parametrize("kind", ["plain", "twice"])
@pytest.mark.parametrize("mode", TRIED)
def test_gradients_are_those_of_the_joined_batch(ranks, scheme, kind, mode):
    assert_same(ranks.run(errors, scheme, MODES[mode], kind, count=3 if kind == "twice" else 2), mode)


def with_options(mesh, scheme, options, kind, ddp):
    return errors(mesh, scheme, options, kind, **ddp)


OPTIONS = {
    "static": ("twice", {"static_graph": True}),
    "unused": ("partly", {"find_unused_parameters": True}),
    "views": ("twice", {"gradient_as_bucket_view": True}),
    "static with views of unused ones": ("partly", {"gradient_as_bucket_view": True, "static_graph": True}),
}


@SCHEME
@SOME
@pytest.mark.parametrize(("kind", "ddp"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_ddp(ranks, scheme, mode, kind, ddp):
    assert_same(ranks.run(with_options, scheme, MODES[mode], kind, ddp), mode)


EVENTS = []
"""Outside of all modules, whose lists are as they were once a block has run again."""


class Noted(nn.Module):
    """A block that notes its evaluations in the backward pass."""

    def __init__(self, number):
        super().__init__()
        self.inner, self.number = mlp(), number

    def forward(self, x):
        if torch._C._current_graph_task_id() != -1:
            EVENTS.append(("evaluated", self.number))
        return self.inner(x)


def order(mesh, scheme, options):
    """Evaluations of blocks and reductions of their gradients in the second backward pass, in their order."""
    torch.set_default_dtype(torch.float64)
    stack = ResidualStack([Noted(n) for n in range(block_count(scheme, STEPS))], scheme, **options)
    block_of = {parameter: block.number for block in stack for parameter in block.parameters()}
    size = sum(p.nbytes for p in stack[0].parameters())
    parallel = wrapped(stack, mesh, bucket_cap_mb=size / 2**20)

    def reduce(group, bucket):
        EVENTS.append(("reduced", *sorted({block_of[parameter] for parameter in bucket.parameters()})))
        return allreduce_hook(group, bucket)

    parallel.register_comm_hook(mesh.get_group(), reduce)
    for _ in range(2):
        EVENTS.clear()
        half_square(parallel(torch.randn(ROWS, DIM))).backward()
    return list(EVENTS)


@SCHEME
@pytest.mark.parametrize("mode", ["corrected", "stored", "anchors", "checkpoint"])
def test_a_block_s_gradients_leave_before_earlier_blocks_run(ranks, scheme, mode):
    for events in ranks.run(order, scheme, MODES[mode]):
        evaluated, reduced = {}, {}
        for place, (what, *blocks) in enumerate(events):
            for n in blocks:
                if what == "evaluated":
                    evaluated.setdefault(n, place)
                else:
                    reduced[n] = place
        # Under Heun a block takes part in the step before its own, too.
        behind = SCHEMES[scheme].blocks_per_step
        last = block_count(scheme, STEPS) - 1
        assert {*evaluated} == {*reduced} == {*range(last + 1)}
        for n in range(last, behind - 1, -1):
            assert evaluated[n] < reduced[n] < evaluated[n - behind]
            assert reduced[n] < reduced[n - 1]


def accumulated(mesh, scheme, options, ddp):
    """How far the gradients of two batches, reduced with the second, are from those of both."""
    model = model_of(scheme, options, "twice")
    rows = torch.randn(2 * ROWS, DIM).chunk(2 * mesh.size())
    of_rows = [gradients_of(model, model, x) for x in rows]
    expected = [sum(of) / mesh.size() for of in zip(*of_rows, strict=True)]
    first, second = rows[2 * mesh.get_local_rank() :][:2]
    parallel = wrapped(model, mesh, **ddp)
    with parallel.no_sync():
        loss_of(parallel(first)).backward()
    local = distance(left(model), of_rows[2 * mesh.get_local_rank()])
    loss_of(parallel(second)).backward()
    return local, distance(left(model), expected)


@SCHEME
@SOME
@pytest.mark.parametrize("views", [False, True])
def test_accumulation_reduces_once(ranks, scheme, mode, views):
    for found in ranks.run(accumulated, scheme, MODES[mode], {"gradient_as_bucket_view": views}):
        assert max(found) < TIGHT


def warned(mesh, on_drift):
    """What a rank warns of in some passes."""
    model = model_of("euler", {"reverse": "corrected", "max_drift": 1e-9, "on_drift": on_drift})
    parallel = wrapped(model, mesh)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(4):
            loss_of(parallel(torch.randn(ROWS, DIM))).backward()
    return ["the defect of step" in str(warning.message) for warning in seen]


@pytest.mark.parametrize("on_drift", ["warn", "checkpoint"])
def test_each_rank_warns_once(ranks, on_drift):
    assert ranks.run(warned, on_drift) == [[True]] * 2
