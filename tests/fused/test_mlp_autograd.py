"""What autograd's users do between and around the passes of a `ResidualMLP`: right, or an error that says why not."""

import copy

import pytest
import torch

from resode_cuda import ResidualMLP, Reverse
from resode_cuda.fused.norms import NORMS
from tests.support.fused_networks import EXACT, TIGHT, worst_error
from tests.support.networks import gradients, half_square

REBUILT_OR_KEPT = pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])


def exact_gradients(module, x, loss=half_square):
    """Gradients of x and of the parameters by autograd through the module's blocks."""
    blocks = module.to_blocks()
    blocks.gradient = "backprop"
    per_block = len(list(blocks[0].parameters()))
    x_gradient, *each = gradients(lambda: blocks(x), [x, *blocks.parameters()], loss)
    return [x_gradient, *(torch.stack(each[place::per_block]) for place in range(per_block))]


def add(y):
    y += 1


IN_PLACE = {
    "y += 1": add,
    "y.mul_(2)": lambda y: y.mul_(2),
    "y.relu_()": lambda y: y.relu_(),
    "y[0] = 0": lambda y: y[0].zero_(),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_the_output_modified_in_place(float64, scheme, gradient, change):
    """Right where it is not what the backward pass starts from."""
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient, reverse=EXACT), torch.randn(5, 6, requires_grad=True)

    def loss(y):
        change(y)
        return half_square(y)

    if gradient == "adjoint":
        expected = r"^mlp_stack: between .* neither the output nor a parameter .*; use y = y \+ z instead of y \+= z"
        with pytest.raises(RuntimeError, match=expected):
            loss(module(x)).backward()
    else:
        got = gradients(lambda: module(x), [x, *module.parameters()], loss)
        assert worst_error(got, exact_gradients(module, x, loss)) < TIGHT


@REBUILT_OR_KEPT
def test_a_detached_output_modified_in_place(float64, scheme, gradient):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient), torch.randn(5, 6)
    y = module(x)
    y.detach().zero_()
    if gradient == "adjoint":
        with pytest.raises(RuntimeError, match=r"^mlp_stack: between .* neither the output nor a parameter may be"):
            half_square(y).backward()
    else:
        y.sum().backward()


@REBUILT_OR_KEPT
def test_an_input_modified_in_place_matters_where_it_is_kept(float64, scheme, gradient):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient, reverse=EXACT), torch.randn(5, 6, requires_grad=True)
    exact, start = exact_gradients(module, x), 1 * x
    out = module(start)
    start += 1
    if gradient == "checkpoint":
        with pytest.raises(RuntimeError, match=r"^mlp_stack: between .* neither x nor a parameter may be modified"):
            half_square(out).backward()
    else:
        assert worst_error(gradients(lambda: out, [x, *module.parameters()]), exact) < TIGHT


@REBUILT_OR_KEPT
def test_the_optimizer_steps_after_backward(scheme, gradient):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient), torch.randn(5, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    half_square(module(x)).backward()
    loss = half_square(module(x))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"nor a parameter may be modified .* step the optimizer after backward$"):
        loss.backward()


@REBUILT_OR_KEPT
@pytest.mark.parametrize(("dtype", "then"), [("float32", "float64"), ("bfloat16", "float16")])
def test_parameters_converted_between_forward_and_backward(gradient, dtype, then):
    module = ResidualMLP(6, 10, 4, gradient=gradient, dtype=getattr(torch, dtype))
    loss = half_square(module(torch.randn(5, 6)))
    module.to(getattr(torch, then))
    with pytest.raises(RuntimeError, match=f"parameters must keep dtype and device, got {dtype} on cpu -> {then} on"):
        loss.backward()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["paper", "extrapolated", Reverse("step", 2), "checkpoint"], ids=str)
def test_autocast_in_the_backward_pass_alone_changes_nothing(scheme, norm, dtype, solver):
    is_exact = solver == "checkpoint"
    module = ResidualMLP(6, 10, 4, scheme, norm=norm, dtype=dtype, on_drift="ignore")
    module.gradient, module.reverse = ("checkpoint", EXACT) if is_exact else ("adjoint", solver)
    x = torch.randn(5, 6, requires_grad=True)
    inputs = [x, *module.parameters()]
    expected = gradients(lambda: module(x), inputs)
    out = module(x)
    with torch.autocast("cpu", torch.float16):
        got = gradients(lambda: out, inputs)
    assert all(map(torch.equal, got, expected))


@REBUILT_OR_KEPT
def test_what_is_set_between_forward_and_backward_is_for_the_next_pass(float64, scheme, gradient):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient, reverse=EXACT), torch.randn(5, 6, requires_grad=True)
    exact, out = exact_gradients(module, x), module(x)
    module.gradient, module.reverse, module.anchors = "backprop", "paper", {1}
    assert worst_error(gradients(lambda: out, [x, *module.parameters()]), exact) < TIGHT


@REBUILT_OR_KEPT
def test_saved_tensors_may_wait_elsewhere_and_change_meanwhile(float64, scheme, gradient):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient, reverse=EXACT), torch.randn(5, 6, requires_grad=True)
    exact = exact_gradients(module, x)
    with torch.autograd.graph.save_on_cpu():
        out = module(x)
    assert worst_error(gradients(lambda: out, [x, *module.parameters()]), exact) < TIGHT
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        out = module(x)
        loss = half_square(out.clone())
        with torch.no_grad():
            out += 1
            module.weight_in *= 2
        got = torch.autograd.grad(loss, [x, *module.parameters()])
        assert worst_error(got, exact) < TIGHT


@REBUILT_OR_KEPT
def test_hooks_may_modify_gradients_in_place(float64, scheme, gradient):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient, reverse=EXACT), torch.randn(5, 6, requires_grad=True)
    exact = exact_gradients(module, x)
    for tensor in (x, *module.parameters()):
        tensor.register_hook(lambda g: g.mul_(2))
    got = torch.autograd.grad(half_square(module(x)), [x, *module.parameters()], create_graph=True)
    got = [gradient.detach() for gradient in got]
    assert worst_error(got, [2 * each for each in exact]) < TIGHT


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "a row expanded": lambda x: x[:, :1].expand(x.shape),
    "every second value": lambda x: torch.stack([x, x], -1)[..., 0],
    "overlapping": lambda x: x.as_strided(x.shape, (6, 2, 1)),
    "negative": lambda x: torch.complex(x, x).conj().imag,
    "no rows": lambda x: x[:0],
    "no samples": lambda x: x[:, :0],
    "a row alone": lambda x: x[0, 0],
}


@REBUILT_OR_KEPT
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_x_and_of_its_cotangent(float64, scheme, gradient, layout):
    module = ResidualMLP(6, 10, 3, scheme, norm="layer", gradient=gradient, reverse=EXACT)
    x, seed = (layout(torch.randn(4, 5, 6)).detach() for _ in range(2))
    x.requires_grad_()
    weighted = lambda y: (seed * y).sum()  # noqa: E731
    got = gradients(lambda: module(x), [x, *module.parameters()], weighted)
    torch.testing.assert_close(got, tuple(exact_gradients(module, x, weighted)), rtol=TIGHT, atol=TIGHT)


@REBUILT_OR_KEPT
def test_layouts_of_the_parameters(float64, scheme, gradient):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient=gradient, reverse=EXACT), torch.randn(5, 6, requires_grad=True)
    tied = copy.deepcopy(module)
    for name, parameter in list(module.named_parameters()):
        first = parameter.detach()[:1]
        tied.get_parameter(name).data = first.expand(parameter.shape)
        module.get_parameter(name).data = first.expand(parameter.shape).contiguous()
    got = gradients(lambda: tied(x), [x, *tied.parameters()])
    assert worst_error(got, exact_gradients(module, x)) < TIGHT
