"""Stored increments: the graph of the forward pass is kept, and blocks run again as far as its last saved tensor."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resode_cuda import ResidualStack, Reverse
from tests.support.networks import mlp
from tests.support.stored_networks import DIM, SCHEMES, Adding, blocks_of, error_of, ordinary

STEPS = 6


def gradients_of(stack, x, *args, loss=lambda out: out.sin().sum()):
    wanted = [tensor for tensor in (x, *stack.parameters(), *args) if tensor.requires_grad]
    out = stack(x, *args)
    return torch.autograd.grad(loss(out), wanted, allow_unused=True)


def assert_passes_agree(stack, x, *args, count=3):
    """All passes give the bits of the first one, which evaluates every block to its end."""
    first = gradients_of(stack, x, *args)
    for _ in range(count):
        for a, b in zip(gradients_of(stack, x, *args), first, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    return first


def points(rows=4, dim=DIM):
    return torch.randn(rows, dim, dtype=torch.float64, requires_grad=True)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(DIM, 16)

    def forward(self, x, scale, shift):
        return self.body(x) * scale + shift


def test_the_last_product_of_a_block_is_computed_once():
    stack = ordinary([nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)) for _ in range(STEPS)])
    stack, x = stack.double(), points()
    products = []
    for _ in range(3):
        with Products() as counting:
            gradients_of(stack, x)
        products.append(counting.count)
    assert products == [8 * STEPS, 7 * STEPS + 1, 7 * STEPS + 1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("solver", ["stored", Reverse("stored", bits=4, rounded_forward=True)])
@pytest.mark.parametrize("anchors", [None, 2, {0, 4}])
def test_all_passes_give_the_same_gradients(scheme, solver, anchors):
    stack = ordinary(blocks_of(scheme), scheme, reverse=solver, anchors=anchors).double()
    assert_passes_agree(stack, points(), count=7)


@pytest.mark.parametrize(
    "body",
    [
        lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.ReLU(), nn.Linear(DIM, DIM)),
        lambda: nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM), nn.Softmax(-1)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM)),
        nn.Identity,
    ],
    ids=["batch norm", "ends in what is saved", "parametrized", "no parameters"],
)
@pytest.mark.parametrize("form", ["residual", "block"])
def test_blocks_of_many_kinds(body, form):
    blocks = [Adding(body()) if form == "block" else body() for _ in range(4)]
    stack = ResidualStack(blocks, form=form, step=1.0, reverse="stored", on_drift="ignore").double()
    assert_passes_agree(stack, points())
    assert error_of(stack, points()) < 0.05


@pytest.mark.parametrize("frozen", ["input", "first block", "all parameters"])
def test_what_is_frozen(frozen):
    stack, x = ordinary(blocks_of()).double(), points()
    if frozen == "input":
        x = x.detach()
    else:
        (stack[0] if frozen == "first block" else stack).requires_grad_(False)
    assert_passes_agree(stack, x)


def test_dropout_draws_what_it_drew():
    stack = ordinary([nn.Sequential(mlp(DIM, 16), nn.Dropout(0.5)) for _ in range(4)], gradient="backprop").double()
    x, found = points(), []
    for gradient in ("backprop", "adjoint", "adjoint", "adjoint"):
        torch.manual_seed(0)
        stack.gradient = gradient if stack.gradient != gradient else stack.gradient
        found.append(torch.cat([g.flatten() for g in gradients_of(stack, x)]))
    for later in found[1:]:
        assert torch.equal(later, found[1])
        assert (later - found[0]).norm() < 0.02 * found[0].norm()


def test_arguments_that_are_computed_from_each_other():
    stack = ResidualStack([Conditioned() for _ in range(4)], step=1.0, anchors=1, reverse="stored").double()
    exact = copy.deepcopy(stack)
    exact.gradient = "backprop"
    base = torch.randn(DIM, dtype=torch.float64, requires_grad=True)

    def gradients(stack):
        scale = base.sin()
        return torch.autograd.grad(stack(points_, scale, scale.cos()).sin().sum(), [base, points_, *stack.parameters()])

    points_ = points()
    for _ in range(3):
        for a, b in zip(gradients(stack), gradients(exact), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_that_branches_on_its_input_is_differentiated_where_it_is_evaluated(scheme):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(DIM, 16)

        def forward(self, x):
            # Companions are multiples of a power of two.
            return self.body(x) if torch.equal(x, x.float().half().double()) else self.body(x).exp().log()

    stack = ordinary([Branching() for _ in range(STEPS + (scheme == "heun"))], scheme).double()
    twin = ordinary([block.body for block in copy.deepcopy(stack)], scheme).double()
    x = points()
    for a, b in zip(assert_passes_agree(stack, x), gradients_of(twin, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Energy(nn.Module):
    """The gradient of an energy, with noise and running statistics."""

    def __init__(self, is_functional):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())
        self.is_functional, self.evaluations = is_functional, 0
        self.register_buffer("mean", torch.zeros(DIM))

    def _energy(self, x):
        return self.body(x).square().sum()

    def forward(self, x):
        self.evaluations += 1
        self.mean.lerp_(x.detach().mean(0), 0.1)
        x = x + 0.1 * torch.randn_like(x)
        if self.is_functional:
            return -torch.func.grad(self._energy)(x)
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return -torch.autograd.grad(self._energy(x), x, create_graph=True)[0]


@pytest.mark.parametrize("is_functional", [False, True])
def test_a_block_that_differentiates_inside_leaves_no_trace_of_its_first_try(is_functional):
    stack = ordinary([Energy(is_functional) for _ in range(3)], anchors=1, reverse="stored").double()
    exact = copy.deepcopy(stack)
    exact.gradient = "backprop"
    x = points()
    for _ in range(3):
        outcomes = []
        for network in (stack, exact):
            torch.manual_seed(0)
            found = gradients_of(network, x)
            outcomes.append([*found, *network.buffers(), torch.get_rng_state(), torch.tensor(network[0].evaluations)])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kept = mlp(DIM, 16), []

    def forward(self, x):
        out = self.body(x)
        self.penalty = out.square().mean()
        self.kept[:] = [out]
        return out


def test_what_is_left_on_a_module_has_no_graph_and_is_told_of():
    stack = ordinary([Leaving() for _ in range(3)], on_drift="warn").double()
    with pytest.warns(RuntimeWarning, match="Leaving"):
        gradients_of(stack, points())
    for block in stack:
        assert not block.penalty.requires_grad
        assert not block.kept[0].requires_grad


def test_what_a_hook_has_caught_can_not_be_differentiated():
    stack, caught = ordinary(blocks_of()).double(), []
    stack[1][1].register_forward_hook(lambda module, args, out: caught.append(out))
    stack(points())
    with pytest.raises(RuntimeError, match="return_states"):
        caught[0].sum().backward()


def test_what_is_saved_must_not_be_written():
    class Spoiling(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(DIM, DIM)

        def forward(self, x):
            saved = self.body(x).sigmoid()
            out = saved * 1.0
            saved.add_(1.0)
            return out.tanh()

    stack = ordinary([Spoiling() for _ in range(3)]).double()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in place"):
            gradients_of(stack, points())


def test_an_input_that_is_written_is_told_of():
    stack = ordinary([nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM)) for _ in range(3)]).double()
    with pytest.raises(RuntimeError, match="inplace=False"):
        stack(points())


def measured_in(stack, x):
    """The steps whose measurement the pass has changed, each of which sees a state twice as large."""
    before = stack.drift.changes
    gradients_of(stack, x)
    return (stack.drift.changes != before).nonzero().flatten().tolist()


def test_after_the_first_pass_steps_take_turns_in_being_measured():
    stack, x = ordinary(blocks_of(), on_drift="warn").double(), points()
    gradients_of(stack, x)
    assert stack.drift.changes.isfinite().all()
    assert stack.drift.replayed
    turns = [measured_in(stack, x * (2 + n)) for n in range(2 * STEPS)]
    assert [turn for (turn,) in turns] == 2 * [1, 2, 3, 4, 5, 0]
    stack.anchors = {0}
    assert len(measured_in(stack, x)) == STEPS


def test_who_wants_errors_has_all_steps_measured():
    stack, x = ordinary(blocks_of(), on_drift="raise").double(), points()
    gradients_of(stack, x)
    assert len(measured_in(stack, 2 * x)) == STEPS


def test_a_block_that_becomes_another_is_found_when_its_turn_comes():
    stack, x = ordinary(blocks_of(scale=0.2), on_drift="warn").double(), points()
    gradients_of(stack, x)

    def train():
        for _ in range(STEPS):
            loss = stack(x).sum()
            stack[3][2].weight.data.neg_()
            loss.backward()

    with pytest.warns(RuntimeWarning, match="block 3 changed its increment"):
        train()


@pytest.mark.parametrize("anchors", [None, {3}])
def test_nan_is_found_in_every_pass(anchors):
    stack, x = ordinary(blocks_of(), on_drift="raise", anchors=anchors).double(), points()
    gradients_of(stack, x)
    stack.on_drift = "warn"
    with pytest.warns(RuntimeWarning, match="NaN"):
        gradients_of(stack, torch.full_like(x, torch.nan).requires_grad_())
    gradients_of(stack, x)
    assert stack.drift.defects.isfinite().all()


def test_errors_of_blocks_that_run_again_arrive():
    class Failing(nn.Module):
        evaluations = 0

        def __init__(self):
            super().__init__()
            self.body = mlp(DIM, 16)

        def forward(self, x):
            Failing.evaluations += 1
            if Failing.evaluations > 10:
                raise ValueError("broken on purpose")
            return self.body(x)

    stack = ordinary([Failing() for _ in range(3)]).double()
    gradients_of(stack, points())
    with pytest.raises(ValueError, match="broken on purpose"):
        gradients_of(stack, points())
