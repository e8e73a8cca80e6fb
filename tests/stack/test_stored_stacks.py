"""All else that stacks do, with stored increments: autocast, compiling, drift, defaults, bad input."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack, Reverse, stored
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, relative_error
from tests.support.stored_networks import DIM, SCHEMES, blocks_of, error_of, ordinary


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
@pytest.mark.parametrize(
    ("anchors", "rounded_forward", "scheme"),
    [(None, False, "euler"), (None, True, "euler"), ((0, 3), True, "heun"), ((0, 3), False, "euler")],
    ids=str,
)
def test_compiled_stacks(anchors, rounded_forward, scheme):
    torch.manual_seed(0)
    reverse = Reverse("stored", bits=6, rounded_forward=rounded_forward)
    stack = ordinary(blocks_of(scheme, 4), scheme, anchors=anchors, reverse=reverse)
    torch._dynamo.reset()
    for rows in (5, 7):  # the second time with any number of rows
        x = torch.randn(rows, DIM, requires_grad=True)
        inputs = [x, *stack.parameters()]
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
        found = gradients(lambda: compiled(x), inputs)  # noqa: B023
        assert relative_error(found, gradients(lambda: stack(x), inputs)) < 1e-5  # noqa: B023


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
    with pytest.warns(
        RuntimeWarning, match="8 stored bits, or checkpointing where these were not enough, from the next step on"
    ):
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


def test_what_is_saved_may_come_back_in_another_layout():
    """Offloaded by torch.autograd.graph.save_on_cpu, which does not keep that."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1)) for _ in range(4)]
    stack = ordinary(blocks, anchors=(2,)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    alone = gradients(lambda: stack(x), [*stack.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous(), lambda t: t):
        out = stack(x)
    for one, other in zip(torch.autograd.grad(half_square(out), [*stack.parameters()]), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
