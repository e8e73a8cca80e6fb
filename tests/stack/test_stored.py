"""Stacks whose increments are stored in a few bits."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack, Reverse, stored
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, plain, relative_error

SCHEMES = ["euler", "heun"]
DIM = 40


def blocks_of(scheme="euler", steps=6, scale=1.0, dim=DIM):
    return [mlp(dim, 32, scale) for _ in range(block_count(scheme, steps))]


def ordinary(blocks, scheme="euler", **options):
    """A network of h = 1."""
    return ResidualStack(blocks, scheme, step=1.0, **{"on_drift": "ignore", **options})


def error_of(stack, x, *args, loss=half_square):
    """Relative error of the gradients of the parameters and the input."""
    inputs = [x, *stack.parameters()]
    found = gradients(lambda: stack(x, *args), inputs, loss)
    exact = copy.deepcopy(stack)
    exact.gradient = "backprop"
    inputs = [x, *exact.parameters()]
    return relative_error(found, gradients(lambda: exact(x, *args), inputs, loss))


def states_of(stack, x):
    """The states that a backward pass evaluates blocks at, first to last, each block being called twice a step."""
    seen = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone())) for block in stack]
    out = stack(x)
    forward = list(seen)
    seen.clear()
    half_square(out).backward()
    for hook in hooks:
        hook.remove()
    return forward, seen[::-1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("float64")
def test_the_gradients_error_halves_with_each_bit(scheme):
    torch.manual_seed(0)
    stack, x = ordinary(blocks_of(scheme, 8), scheme), torch.randn(6, DIM, requires_grad=True)
    errors = {}
    for bits in stored.BITS:
        stack.reverse = Reverse("stored", bits=bits)
        errors[bits] = error_of(stack, x)
    assert errors[8] < 4e-3
    for fewer, more in ((2, 3), (3, 4), (4, 6), (6, 8)):
        assert 0.6 < errors[fewer] / errors[more] / 2 ** (more - fewer) < 2
    assert errors[1] < 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", ["residual", "block"])
def test_the_forward_pass_is_that_of_the_network(scheme, form):
    if (form, scheme) == ("block", "heun"):
        pytest.skip("blocks that add the state themselves step by Euler's method")
    blocks, x = blocks_of(scheme), torch.randn(6, DIM)
    if form == "block":
        blocks = [Adding(block) for block in blocks]
    stack = ResidualStack(blocks, scheme, form=form, step=1.0)
    out = stack(x)
    with torch.no_grad():
        assert torch.equal(stack(x), out)
    stack.gradient = "backprop"
    assert torch.equal(stack(x), out)


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_states_come_back_to_the_last_bit(dtype, bits):
    torch.manual_seed(0)
    stack = ordinary(blocks_of(steps=9), reverse=Reverse("stored", bits=bits, rounded_forward=True)).to(dtype)
    forward, backward = states_of(stack, torch.randn(4, DIM, dtype=dtype))
    assert len(forward) == len(backward) == 9
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))
    assert len({tuple(state.flatten().tolist()) for state in forward}) == 9


def test_a_thousand_rounded_states_come_back_to_the_last_bit():
    torch.manual_seed(0)
    block = mlp(32, 8, 0.3)
    stack = ordinary([block] * 1000, reverse=Reverse("stored", bits=4, rounded_forward=True))
    seen = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    half_square(stack(torch.randn(2, 32))).backward()
    forward, backward = seen[:1000], seen[1000:][::-1]
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))


@pytest.mark.parametrize("bits", stored.BITS[1:])
def test_states_are_off_by_half_a_quantum_at_most(bits):
    torch.manual_seed(0)
    stack = ordinary(blocks_of(steps=12), reverse=Reverse("stored", bits=bits))
    forward, backward = states_of(stack, torch.randn(4, DIM))
    unit = stored.start(forward[0])[1].max()
    assert (forward[0] - backward[0]).abs().max() <= unit / 2
    for state, rebuilt, rebuilt_before in zip(forward[1:], backward[1:], backward, strict=False):
        # The quantum of a group is 9/8 of its largest value over the largest whole number, at most.
        largest = (state - rebuilt_before).abs().amax(1)
        quantum = torch.maximum(9 / 8 * largest / (stored.quantum_count(bits) + 0.499), unit)
        assert ((state - rebuilt).abs().amax(1) <= 0.5001 * quantum).all()


class RoundingAsIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, g):
        return g, None


def rounded_network(blocks, x, bits, anchors=()):
    """The same network by autograd, rounding taken as the identity."""
    companion = unit = None
    for n, block in enumerate(blocks):
        if n in anchors:
            start = x
        else:
            if companion is None:
                companion, unit = stored.start(x.detach())
            start = RoundingAsIdentity.apply(x, companion)
        x = x + block(start)
        if n in anchors:
            companion, unit = stored.start(x.detach())
        else:
            companion, _, _ = stored.store(x.detach(), companion, unit, bits)
    return x


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("anchors", [(), (0,), (0, 1, 4), (3,)], ids=str)
@pytest.mark.usefixtures("float64")
def test_the_rounded_networks_gradient_is_exact(anchors, bits):
    blocks, x = blocks_of(steps=7), torch.randn(5, DIM, requires_grad=True)
    reverse = Reverse("stored", bits=bits, rounded_forward=True)
    stack = ordinary(blocks, reverse=reverse, anchors=anchors)
    inputs = [x, *stack.parameters()]
    out, expected = stack(x), rounded_network(blocks, x, bits, anchors)
    assert torch.equal(out, expected)
    found = torch.autograd.grad(half_square(out), inputs)
    for one, other in zip(found, torch.autograd.grad(half_square(expected), inputs), strict=True):
        assert torch.equal(one, other)


def test_without_gradients_the_plain_network_runs():
    blocks, x = blocks_of(), torch.randn(5, DIM)
    stack = ordinary(blocks, reverse=Reverse("stored", bits=2, rounded_forward=True))
    with torch.no_grad():
        exact = stack(x)
        assert torch.equal(exact, plain(blocks, "euler", x, h=1.0))
    assert not torch.equal(stack(x), exact)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("anchors", [1, 2, (0,), (0, 1, 2), (5,), (2, 3)], ids=str)
@pytest.mark.usefixtures("float64")
def test_the_companion_starts_afresh_at_kept_states(anchors, scheme):
    torch.manual_seed(0)
    stack, x = ordinary(blocks_of(scheme, 6), scheme, anchors=anchors), torch.randn(5, DIM, requires_grad=True)
    stack.reverse = Reverse("stored", bits=4)
    error = error_of(stack, x)
    if anchors == 1:
        assert error < 1e-14
    else:
        stack.anchors = None
        assert error < 1.05 * error_of(stack, x)


@pytest.mark.usefixtures("float64")
def test_a_wild_first_step_costs_nothing_where_its_states_are_kept():
    torch.manual_seed(0)
    blocks = blocks_of(steps=6, scale=0.5)
    with torch.no_grad():
        blocks[0][-1].weight *= 60
    stack, x = ordinary(blocks, reverse=Reverse("stored", bits=4)), torch.randn(5, DIM, requires_grad=True)
    without = error_of(stack, x)
    stack.anchors = (0, 1)
    assert error_of(stack, x) < without / 3


@pytest.mark.usefixtures("float64")
def test_bits_may_differ_by_step():
    torch.manual_seed(0)
    blocks, x = blocks_of(steps=4), torch.randn(5, DIM, requires_grad=True)
    errors = {}
    for bits in ((8, 8, 8, 8), (8, 2, 8, 8), (2, 2, 2, 2)):
        errors[bits] = error_of(ordinary(blocks, reverse=Reverse("stored", bits=bits)), x)
    assert errors[8, 8, 8, 8] < errors[8, 2, 8, 8] < errors[2, 2, 2, 2]
    with pytest.raises(ValueError, match="bits must be one number or 4, one for each step, got 3"):
        ordinary(blocks, reverse=Reverse("stored", bits=(8, 8, 8)))


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("steps", [16, 64])
def test_bytes_held(steps, bits):
    """b + 0.25 bits a value and step, one companion, and what does not depend on the state's size."""
    dim, rows = 256, 64
    stack = ordinary([mlp(dim, 4) for _ in range(steps)], reverse=Reverse("stored", bits=bits))
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    for parameter in stack.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(rows, dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = stack(x)
    mine = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
    found = sum(size for address, size in held.items() if address not in mine)
    values = rows * dim
    expected = values * (steps * (bits + 0.25) + 32) / 8
    assert found == pytest.approx(expected, rel=0.02)
    half_square(out).backward()


def test_one_evaluation_a_step():
    stack, calls = ordinary(blocks_of(steps=5)), 0

    def count(*_):
        nonlocal calls
        calls += 1

    for block in stack:
        block.register_forward_pre_hook(count)
    out = stack(torch.randn(3, DIM))
    assert calls == 5
    half_square(out).backward()
    assert calls == 10


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("float64")
def test_all_that_other_solvers_do(scheme):
    """A graph that is kept, two forward passes before two backward passes, shared blocks, frozen ones, no gradient of
    the input, arguments with gradients, copies."""
    torch.manual_seed(0)

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(DIM, 32)

        def forward(self, x, context, scale=1.0):
            return self.body(x) * scale + context

    blocks = [Conditioned() for _ in range(block_count(scheme, 5))]
    blocks[2] = blocks[1]
    blocks[3].requires_grad_(False)
    stack = ordinary(blocks, scheme)
    x, context = torch.randn(4, DIM), torch.randn(DIM, requires_grad=True)
    parameters = [context, *(p for p in stack.parameters() if p.requires_grad)]
    out = stack(x, context, scale=0.7)
    first = torch.autograd.grad(half_square(out), parameters, retain_graph=True)
    again = torch.autograd.grad(half_square(out), parameters)
    other = stack(2 * x, context, scale=0.7)
    late = stack(x, context, scale=0.7)
    torch.autograd.grad(half_square(other), parameters)
    interleaved = torch.autograd.grad(half_square(late), parameters)
    twin = copy.deepcopy(stack)
    of_twin = torch.autograd.grad(
        half_square(twin(x, context, scale=0.7)), [context, *(p for p in twin.parameters() if p.requires_grad)]
    )
    stack.gradient = "backprop"
    exact = torch.autograd.grad(half_square(stack(x, context, scale=0.7)), parameters)
    for found in (again, interleaved, of_twin):
        assert all(torch.equal(one, one_more) for one, one_more in zip(first, found, strict=True))
    assert relative_error(first, exact) < 1e-2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_autocast_and_with_16_bit_inputs(scheme):
    torch.manual_seed(0)
    stack, x = ordinary(blocks_of(scheme), scheme), torch.randn(5, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert error_of(stack, x, loss=lambda out: half_square(out.float())) < 2e-2
    half = stack.to(torch.bfloat16)
    assert error_of(half, x.detach().bfloat16().requires_grad_(), loss=lambda out: half_square(out.float())) < 5e-2
    half.stream_dtype = torch.bfloat16
    assert error_of(half, x.detach().bfloat16().requires_grad_(), loss=lambda out: half_square(out.float())) < 8e-2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch, by its own code
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rounded_forward", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("anchors", [None, (0, 3)], ids=str)
def test_compiled_stacks(anchors, rounded_forward, scheme):
    torch.manual_seed(0)
    reverse = Reverse("stored", bits=6, rounded_forward=rounded_forward)
    stack = ordinary(blocks_of(scheme, 4), scheme, anchors=anchors, reverse=reverse)
    x = torch.randn(5, DIM, requires_grad=True)
    inputs = [x, *stack.parameters()]
    for is_dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager", dynamic=is_dynamic)
        found = gradients(lambda: compiled(x), inputs)  # noqa: B023
        assert relative_error(found, gradients(lambda: stack(x), inputs)) < 1e-5


def test_states_that_are_returned_and_auxiliaries():
    torch.manual_seed(0)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(DIM, 32)

        def forward(self, x):
            return self.body(x), self.body[0].weight.square().sum() + x.square().mean()

    stack = ordinary([WithLoss() for _ in range(6)], auxiliary=sum)
    x = torch.randn(4, DIM, requires_grad=True)

    def loss(outputs):
        last, auxiliary, (early, late) = outputs
        return half_square(last) + auxiliary + early.square().sum() + late.sum()

    inputs = [x, *stack.parameters()]
    found = gradients(lambda: stack(x, return_states=[2, 4]), inputs, loss)
    stack.gradient = "backprop"
    assert relative_error(found, gradients(lambda: stack(x, return_states=[2, 4]), inputs, loss)) < 1e-2


def test_the_defect_is_measured():
    torch.manual_seed(0)
    stack, x = ordinary(blocks_of(steps=5)), torch.randn(4, DIM)
    half_square(stack(x)).backward()
    fine = stack.drift
    assert 0 < fine.maximum < 1e-2
    assert fine.replayed
    assert fine.defects.shape == (5,)
    stack.reverse = Reverse("stored", bits=2)
    half_square(stack(x)).backward()
    assert stack.drift.maximum > 20 * fine.maximum


@pytest.mark.parametrize("bits", stored.BITS)
def test_healthy_networks_are_not_warned_of(bits):
    for seed in range(5):
        torch.manual_seed(seed)
        stack = ResidualStack(blocks_of(steps=8, scale=1.5), step=1.0, reverse=Reverse("stored", bits=bits))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            half_square(stack(torch.randn(8, DIM))).backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_that_became_another_function_is_told_of(bits):
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.adapter = mlp(DIM, 32), mlp(DIM, 32)

        def forward(self, x):
            return self.body(x) + (self.adapter(x) if switch["on"] else 0)

    torch.manual_seed(0)
    switch = {"on": True}
    stack = ResidualStack([Switched() for _ in range(5)], step=1.0, reverse=Reverse("stored", bits=bits))
    stack.on_drift = "raise"
    out = stack(torch.randn(8, DIM))
    switch["on"] = False
    with pytest.raises(DriftError):
        half_square(out).backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_told_of(value):
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(DIM, 32)

        def forward(self, x):
            out = self.body(x)
            return torch.where(torch.arange(DIM) == 3, out * value, out)

    stack = ResidualStack([mlp(DIM, 32), Exploding(), mlp(DIM, 32)], step=1.0)
    with pytest.warns(RuntimeWarning, match="met NaN, Inf or a norm too large"):
        half_square(stack(torch.randn(4, DIM))).backward()


def test_defaults():
    blocks = blocks_of(steps=4)
    assert ResidualStack(blocks).reverse == Reverse("step")
    assert ResidualStack(blocks[:1]).reverse == Reverse("step")
    assert ResidualStack(blocks, step=0.5).reverse == Reverse("step")
    assert ResidualStack(blocks, step=1.0).reverse == Reverse("stored", bits=8)
    assert ResidualStack(blocks, step=[1.0] * 4).reverse == Reverse("stored")
    assert ResidualStack(blocks, "heun", step=1.0).reverse == Reverse("stored")
    assert ResidualStack(blocks, step=1.0, reverse="corrected").reverse == Reverse("step")


def test_drift_may_lead_to_storing():
    torch.manual_seed(0)
    stack = ResidualStack(blocks_of(steps=5, scale=4.0), step=1.0, reverse="corrected", on_drift="store", anchors=(0,))
    x = torch.randn(4, DIM)
    with pytest.warns(RuntimeWarning, match="stored increments from the next step on"):
        half_square(stack(x)).backward()
    for copied in (stack, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        half_square(copied(x)).backward()
        assert (copied.gradient, copied.reverse, copied.anchors) == ("adjoint", Reverse("stored"), (0,))
        half_square(copied(x)).backward()
        assert copied.gradient == "adjoint"


def test_a_training_state_keeps_the_bits(tmp_path):
    stack = ordinary(blocks_of(steps=3), reverse=Reverse("stored", bits=(8, 4, 2), rounded_forward=True))
    torch.save(stack.training_state(), tmp_path / "state.pt")
    other = ordinary(blocks_of(steps=3))
    other.load_training_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.reverse == stack.reverse


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 5}, ValueError, r"bits must be among \(1, 2, 3, 4, 6, 8\), got 5"),
        ({"bits": (8, 16)}, ValueError, r"bits must be among .* got \(8, 16\)"),
        ({"bits": ()}, ValueError, "bits must be among"),
        ({"bits": 4.0}, TypeError, "bits must be an integer, or one for each step, got 4.0"),
        ({"bits": "8"}, TypeError, "bits must be an integer"),
        ({"bits": True}, TypeError, "bits must be an integer"),
        ({"corrections": 1}, ValueError, "must have no corrections and no acceleration, got corrections=1"),
        ({"accelerate": True}, ValueError, "must have no corrections and no acceleration"),
        ({"rounded_forward": 1}, TypeError, "rounded_forward must be True or False, got 1"),
    ],
    ids=str,
)
def test_bad_solvers(arguments, error, message):
    with pytest.raises(error, match=message):
        Reverse("stored", **arguments)


@pytest.mark.parametrize("arguments", [{"bits": 8}, {"rounded_forward": True}], ids=str)
def test_only_stored_increments_have_bits(arguments):
    with pytest.raises(ValueError, match=r'bits and rounded_forward must go with predictor="stored", got \'step\''):
        Reverse("step", **arguments)


def test_inverting_takes_the_reverse_step():
    stack, x = ResidualStack(mlps("euler", 16)), torch.randn(4, 6)
    expected = stack.invert(stack(x).detach())
    stack.reverse = "stored"
    assert torch.equal(stack.invert(stack(x).detach()), expected)


class Adding(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)
