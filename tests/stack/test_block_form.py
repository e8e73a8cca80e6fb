"""Blocks that add the state themselves, x -> block(x), as the layers of most models do."""

import copy

import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack, Reverse
from tests.support.exact import TIGHT
from tests.support.networks import gradients, half_square, mlp, relative_error

DIM = 40


class Layer(nn.Module):
    """A pre-norm layer with its addition inside."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.norm, self.body = nn.LayerNorm(DIM), mlp(DIM, 32, scale)

    def forward(self, x):
        return x + self.body(self.norm(x))


class WithNothing(Layer):
    """What layers of transformers return that have no cache and no attention maps to give."""

    def forward(self, x):
        return super().forward(x), None, None


class WithLoss(Layer):
    def forward(self, x):
        out = super().forward(x)
        return out, out.square().mean()


class InsideOut(nn.Module):
    """ReLU after the addition, as in torchvision's BasicBlock."""

    def __init__(self):
        super().__init__()
        self.body = mlp(DIM, 32)

    def forward(self, x):
        return torch.relu(x + self.body(x))


def stack_of(kind=Layer, steps=6, **options):
    torch.manual_seed(0)
    return ResidualStack([kind() for _ in range(steps)], form="block", **{"on_drift": "ignore", **options})


def plain(stack, x):
    for block in stack:
        out = block(x)
        x = out[0] if isinstance(out, tuple) else out
    return x


@pytest.mark.parametrize("kind", [Layer, WithNothing, InsideOut])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_the_forward_pass_is_that_of_the_blocks(gradient, dtype, kind):
    stack, x = stack_of(kind, gradient=gradient).to(dtype), torch.randn(5, DIM).to(dtype)
    expected = plain(stack, x)
    assert torch.equal(stack(x), expected)
    with torch.no_grad():
        assert torch.equal(stack(x), expected)
    assert expected.dtype == dtype


def test_the_forward_pass_under_autocast():
    stack, x = stack_of(), torch.randn(5, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stack(x), plain(stack, x))


@pytest.mark.parametrize("reverse", ["stored", Reverse("step", 40), "corrected", "extrapolated", "paper"], ids=str)
@pytest.mark.parametrize("anchors", [None, 1, (0, 2, 3)], ids=str)
@pytest.mark.usefixtures("float64")
def test_every_solver(anchors, reverse):
    torch.manual_seed(0)
    stack = ResidualStack([Layer(0.1) for _ in range(6)], form="block", reverse=reverse, anchors=anchors)
    stack.on_drift = "ignore"
    x = torch.randn(5, DIM, requires_grad=True)
    inputs = [x, *stack.parameters()]
    found = gradients(lambda: stack(x), inputs)
    exact = gradients(lambda: plain(stack, x), inputs)
    is_exact = anchors == 1 or reverse == Reverse("step", 40)
    assert relative_error(found, exact) < (TIGHT if is_exact else 0.3)
    if reverse == "stored":
        assert relative_error(found, exact) < 2e-3


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_the_gradient_is_the_blocks_own_to_the_last_bit(gradient):
    stack, x = stack_of(gradient=gradient, anchors=1), torch.randn(5, DIM, requires_grad=True)
    inputs = [x, *stack.parameters()]
    exact = gradients(lambda: plain(stack, x), inputs)
    for one, other in zip(gradients(lambda: stack(x), inputs), exact, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [Layer, WithNothing, InsideOut])
@pytest.mark.usefixtures("float64")
def test_stored_increments_are_the_default(kind):
    stack, x = stack_of(kind), torch.randn(5, DIM, requires_grad=True)
    assert stack.reverse == Reverse("stored")
    assert stack.scheme == "euler"
    assert stack.steps == (1.0,) * 6
    inputs = [x, *stack.parameters()]
    assert relative_error(gradients(lambda: stack(x), inputs), gradients(lambda: plain(stack, x), inputs)) < 5e-2


@pytest.mark.usefixtures("float64")
def test_rounded_states_have_the_exact_gradient_of_the_rounded_network():
    stack, x = stack_of(reverse=Reverse("stored", bits=2, rounded_forward=True)), torch.randn(5, DIM)
    out = stack(x)
    assert not torch.equal(out, plain(stack, x))
    half_square(out).backward()
    assert stack.drift.maximum < 10


@pytest.mark.parametrize("bits", [8, 4])
def test_models_in_bfloat16(bits):
    """Their own gradient is off by about 1e-2."""
    stack = stack_of(reverse=Reverse("stored", bits=bits))
    exact = copy.deepcopy(stack).double()
    stack.bfloat16()
    x = torch.randn(16, DIM).bfloat16()
    inputs = [*stack.parameters()]
    found = [g.double() for g in gradients(lambda: stack(x).float(), inputs)]
    wanted = gradients(lambda: plain(exact, x.double()), [*exact.parameters()])
    own = [g.double() for g in gradients(lambda: plain(stack, x).float(), inputs)]
    assert relative_error(found, wanted) < 1.2 * relative_error(own, wanted) + 0.2 * 2.0**-bits


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
@pytest.mark.usefixtures("float64")
def test_auxiliaries(gradient):
    stack, x = stack_of(WithLoss, gradient=gradient, auxiliary=sum), torch.randn(5, DIM, requires_grad=True)
    inputs = [x, *stack.parameters()]

    def exact():
        state, total = x, 0.0
        for block in stack:
            state, loss = block(state)
            total = total + loss
        return state, total

    def loss(outputs):
        return half_square(outputs[0]) + outputs[1]

    found, wanted = gradients(lambda: stack(x), inputs, loss), gradients(exact, inputs, loss)
    assert relative_error(found, wanted) < (5e-3 if gradient == "adjoint" else 1e-14)


def test_states_that_are_returned():
    stack, x = stack_of(), torch.randn(5, DIM, requires_grad=True)
    last, (first, middle) = stack(x, return_states=[0, 3])
    assert torch.equal(first, x)
    assert torch.equal(middle, plain(list(stack)[:3], x))
    assert torch.equal(last, plain(stack, x))
    inputs = [x, *stack.parameters()]
    found = torch.autograd.grad(middle.square().sum() + last.sum(), inputs)
    state = plain(list(stack)[:3], x)
    wanted = torch.autograd.grad(state.square().sum() + plain(list(stack)[3:], state).sum(), inputs)
    assert relative_error(found, wanted) < 5e-3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("reverse", ["stored", "corrected"])
def test_compiled_stacks(reverse):
    torch.manual_seed(0)
    torch._dynamo.reset()
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)]
    stack = ResidualStack(blocks, form="block", reverse=reverse, on_drift="ignore")
    x = torch.randn(2, 5, 8, requires_grad=True)
    inputs = [x, *stack.parameters()]
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    assert relative_error(gradients(lambda: compiled(x), inputs), gradients(lambda: stack(x), inputs)) < 1e-4


def test_inverting():
    torch.manual_seed(0)
    stack = ResidualStack([Layer(0.1) for _ in range(4)], form="block", reverse=Reverse("step", 20)).double()
    x = torch.randn(5, DIM).double()
    assert relative_error([stack.invert(stack(x).detach())], [x]) < 1e-10


def test_a_layer_that_became_another_function_is_told_of():
    class Switched(Layer):
        def forward(self, x):
            return x + self.body(self.norm(x)) * switch["scale"]

    switch = {"scale": 1.0}
    stack = stack_of(Switched, on_drift="raise")
    out = stack(torch.randn(8, DIM))
    switch["scale"] = -1.0
    with pytest.raises(DriftError):
        half_square(out).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "layer"}, r"form must be one of \('residual', 'block'\), got 'layer'"),
        ({"scheme": "heun"}, 'form="block" must go with scheme="euler", got \'heun\''),
        ({"step": 0.5}, 'form="block" must have step=1.0, .* got 0.5'),
        ({"stream_dtype": torch.float32}, 'form="block" must have no stream_dtype, .* got torch.float32'),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualStack([Layer(), Layer()], **{"form": "block", **options})


def test_what_else_a_block_returns():
    class Cache(Layer):
        def forward(self, x):
            return super().forward(x), torch.ones(3)

    for gradient in ("adjoint", "checkpoint", "backprop"):
        with pytest.raises(TypeError, match=r"must return one tensor, or a tuple of it and None; .*auxiliary=sum"):
            stack_of(Cache, gradient=gradient)(torch.randn(2, DIM))
    with pytest.raises(TypeError, match=r"block 0 must return one tensor, got tuple"):
        ResidualStack([WithNothing()])(torch.randn(2, DIM))


def test_settings_make_a_stack_alike():
    stack = stack_of()
    other = ResidualStack(list(stack), **stack.settings())
    assert other.form == "block"
    assert other.settings() == stack.settings()


def small(gain):
    """A stack of layers whose increments are `gain["now"]` as large."""

    class Small(Layer):
        def forward(self, x):
            return x + gain["now"] * self.body(self.norm(x))

    return stack_of(Small, on_drift="raise").bfloat16(), torch.randn(64, DIM).bfloat16()


@pytest.mark.parametrize("gain", [1e-6, 1e-4, 1e-2])
def test_increments_that_16_bits_round_are_not_warned_of(gain):
    """A new LayerScale makes them smaller than what the addition rounds off."""
    stack, x = small({"now": gain})
    half_square(stack(x)).backward()


@pytest.mark.parametrize(("before", "after"), [(1e-3, 1.0), (1.0, 1e-3), (1.0, -1.0)])
def test_layers_in_16_bits_that_became_another_function_are_told_of(before, after):
    gain = {"now": before}
    stack, x = small(gain)
    out = stack(x)
    gain["now"] = after
    with pytest.raises(DriftError):
        half_square(out).backward()
