"""What blocks leave for others, beside their output: told of where it has no gradients, and never kept alive."""

import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT
from tests.support.networks import block_count, half_square, mlp, parameters_of, plain, relative_error
from tests.support.stateful import Outside

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]

STEPS, LEAVING = 4, 2
SOLVERS = {
    "converged": {"reverse": EXACT},
    "paper": {"reverse": "paper", "anchors": 1},
    "extrapolated": {"reverse": "extrapolated", "anchors": 1},
}
every_solver = pytest.mark.parametrize("solver", SOLVERS)


class Leaving(nn.Module):
    """Its hidden layer is of interest to others; weak references to all of them are kept."""

    def __init__(self, has_gradients=True):
        super().__init__()
        self.body, self.has_gradients, self.outside = mlp(), has_gradients, Outside(hidden=[])

    def forward(self, x, *args, **kwargs):
        hidden = self.body[:2](x)
        self.outside.hidden.append(weakref.ref(hidden))
        self.leave(hidden if self.has_gradients else hidden.detach(), *args, **kwargs)
        return self.body[2](hidden)

    def alive(self):
        return sum(reference() is not None for reference in self.outside.hidden)


class KeepsALoss(Leaving):
    def leave(self, hidden):
        self.loss = hidden.square().mean()


class CollectsLosses(Leaving):
    def __init__(self, has_gradients=True):
        super().__init__(has_gradients)
        self.losses = []

    def leave(self, hidden):
        self.losses.append(hidden.square().mean())


class KeepsANamedLoss(Leaving):
    def __init__(self, has_gradients=True):
        super().__init__(has_gradients)
        self.table = {}

    def leave(self, hidden):
        self.table["balance"] = hidden.square().mean()


class LeavesItToAChild(Leaving):
    def leave(self, hidden):
        self.body.loss = hidden.square().mean()


class AppendsToAnArgument(Leaving):
    def leave(self, hidden, kept=None):
        if kept is not None:
            kept.append(hidden.square().mean())


PLACES = {
    KeepsALoss: "KeepsALoss.loss",
    CollectsLosses: "CollectsLosses.losses",
    KeepsANamedLoss: "KeepsANamedLoss.table",
    LeavesItToAChild: "Sequential.loss",
}
ON_MODULES = pytest.mark.parametrize("leaving", PLACES)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, *args, **kwargs):
        return self.body(x)


def network(leaving, scheme):
    """One block that leaves something, among others that don't."""
    blocks = [Bare() for _ in range(block_count(scheme, STEPS))]
    blocks[LEAVING] = leaving
    return blocks


WAYS_OUT = r'auxiliary=sum, .*return_states=, or use gradient="checkpoint"; detach it'


@every_solver
@ON_MODULES
def test_a_tensor_with_gradients_on_a_module_is_warned_of_once_by_its_place(scheme, leaving, solver):
    blocks, x = network(leaving(), scheme), torch.randn(5, 6)
    inputs = parameters_of(blocks)
    exact = torch.autograd.grad(half_square(plain(blocks, scheme, x)), inputs)
    if leaving is CollectsLosses:
        blocks[LEAVING].losses.clear()
    stack = ResidualStack(blocks, scheme, **SOLVERS[solver])
    loss = half_square(stack(x))
    message = rf"ResidualStack: block 2 leaves a tensor that has gradients in {PLACES[leaving]}, .*{WAYS_OUT}"
    with pytest.warns(RuntimeWarning, match=message) as seen:
        got = torch.autograd.grad(loss, inputs)
    assert len(seen) == 1
    assert relative_error(got, exact) < 1e-11
    half_square(stack(x)).backward()  # pytest makes errors of warnings


@every_solver
@pytest.mark.parametrize("name", ["args", "kwargs"])
def test_a_tensor_with_gradients_in_an_argument_is_warned_of_once(scheme, name, solver):
    blocks, x, kept = network(AppendsToAnArgument(), scheme), torch.randn(5, 6), []
    stack = ResidualStack(blocks, scheme, **SOLVERS[solver])
    loss = half_square(stack(x, kept) if name == "args" else stack(x, kept=kept))
    message = f"block 2 leaves a tensor that has gradients in a container among the arguments, .*{WAYS_OUT}"
    with pytest.warns(RuntimeWarning, match=message) as seen:
        loss.backward()
    assert len(seen) == 1
    assert len(kept) == (1 if scheme == "euler" else 2)
    half_square(stack(x, kept)).backward()


@every_solver
@pytest.mark.parametrize("leaving", [*PLACES, AppendsToAnArgument])
def test_what_re_evaluations_leave_is_taken_off_and_holds_no_memory(scheme, leaving, solver):
    blocks = [leaving() for _ in range(block_count(scheme, STEPS))]
    stack, x, kept = ResidualStack(blocks, scheme, **SOLVERS[solver]), torch.randn(5, 6), []
    args = (kept,) if leaving is AppendsToAnArgument else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half_square(stack(x, *args)).backward()
    assert [block.alive() for block in blocks] == [0] * len(blocks)
    assert len(kept) == (STEPS * SCHEMES[scheme].blocks_per_step if args else 0)
    for block in blocks:
        left = {KeepsALoss: ["loss"], LeavesItToAChild: ["body.loss"]}.get(leaving, [])
        for name in left:
            *path, last = name.split(".")
            assert getattr(block.get_submodule(".".join(path)), last).grad_fn is None
    if leaving is CollectsLosses:
        of_inner = SCHEMES[scheme].blocks_per_step
        assert [len(block.losses) for block in blocks[1:-1]] == [of_inner] * (len(blocks) - 2)


@pytest.mark.parametrize("leaving", [*PLACES, AppendsToAnArgument])
def test_detached_tensors_are_not_warned_of(scheme, leaving):
    blocks, x = [leaving(has_gradients=False) for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    args = ([],) if leaving is AppendsToAnArgument else ()
    stack = ResidualStack(blocks, scheme)
    for _ in range(2):
        half_square(stack(x, *args)).backward()


def total(blocks):
    """The auxiliary losses that blocks have left on themselves."""
    found = [block.loss for block in blocks if isinstance(block, KeepsALoss)]
    return sum(found) + sum(sum(block.losses) for block in blocks if isinstance(block, CollectsLosses))


@pytest.mark.parametrize("leaving", [KeepsALoss, CollectsLosses])
@pytest.mark.parametrize("aim", ["both", "auxiliary alone"])
def test_checkpointing_keeps_the_graph_of_what_is_left(scheme, leaving, aim):
    blocks, x = [leaving() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    inputs, stack = parameters_of(blocks[:2]), ResidualStack(blocks, scheme, gradient="checkpoint")
    found = []
    for run in (lambda: plain(blocks, scheme, x), lambda: stack(x)):
        for block in blocks:
            vars(block).get("losses", []).clear()
        out = run()
        loss = total(blocks) + (half_square(out) if aim == "both" else 0)
        found.append((loss.detach(), torch.autograd.grad(loss, inputs)))
    assert torch.equal(found[1][0], found[0][0])
    assert relative_error(found[1][1], found[0][1]) < 1e-14


def test_attributes_that_hooks_compute_anew_are_not_warned_of(scheme):
    blocks, x = [mlp() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    for block in blocks:
        prune.l1_unstructured(block[0], "weight", 0.5)
    inputs = parameters_of(blocks)
    exact = torch.autograd.grad(half_square(plain(blocks, scheme, x)), inputs)
    stack = ResidualStack(blocks, scheme, reverse=EXACT)
    assert relative_error(torch.autograd.grad(half_square(stack(x)), inputs), exact) < 1e-11
