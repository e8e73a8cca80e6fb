"""`ResidualMLP` and `residual_mlp`: the module around the depth-fused ops."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from resode_cuda import ResidualMLP, ResidualStack, Reverse, smooth_init_
from resode_cuda.functional import residual_mlp
from resode_cuda.fused.activations import ACTIVATIONS
from resode_cuda.fused.norms import NORMS
from resode_cuda.fused.reference import passes
from tests.support.fused_networks import EXACT, ROUNDING, TIGHT, worst_error
from tests.support.networks import gradients, half_square, mlp, parameters_of

NAMES = ("weight_in", "bias_in", "weight_out", "bias_out")


def stacked(stack, of=lambda parameter: parameter.detach()):
    """A stack's parameters as its ResidualMLP has them."""
    each = [of(parameter) for parameter in parameters_of(list(stack))]
    per_block = len(each) // len(stack)
    return [torch.stack(each[place::per_block]) for place in range(per_block)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_and_back_are_the_same_network(float64, scheme, activation, norm, bias):
    module = ResidualMLP(6, 10, 4, scheme, activation=activation, norm=norm, bias=bias, reverse=EXACT)
    stack, x = module.to_blocks(), torch.randn(5, 6)
    back = ResidualMLP.from_blocks(stack)
    assert (back.activation, back.norm) == (activation, norm)
    assert all(map(torch.equal, stacked(stack), module.parameters()))
    assert all(map(torch.equal, back.parameters(), module.parameters()))
    torch.testing.assert_close(stack(x), module(x), rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(back(x), module(x))
    half_square(stack(x)).backward()
    theirs = stacked(stack, lambda parameter: parameter.grad)
    for same in (module, back):
        assert worst_error(gradients(lambda same=same: same(x), list(same.parameters())), theirs) < TIGHT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_settings_come_with_the_parameters(scheme, dtype):
    settings = {
        "gradient": "checkpoint",
        "reverse": Reverse("extrapolate", 2),
        "anchors": 2,
        "max_drift": 0.25,
        "on_drift": "ignore",
    }
    module = ResidualMLP(6, 10, 3, scheme, step=[0.1, 0.2, 0.3], dtype=dtype, **settings).eval()
    module.bias_in.requires_grad_(False)
    stack = module.to_blocks()
    back = ResidualMLP.from_blocks(stack, backend="torch")
    for other in (stack, back):
        assert {name: getattr(other, name) for name in settings} == settings
        assert other.steps == (0.1, 0.2, 0.3)
        assert not other.training
        assert {parameter.dtype for parameter in other.parameters()} == {dtype}
    assert [p.requires_grad for p in stack.parameters()] == [True, False, True, True] * len(stack)
    assert [p.requires_grad for p in back.parameters()] == [True, False, True, True]
    assert back.backend == "torch"
    assert repr(back) == repr(module).replace("backend='auto'", "backend='torch'")


def test_blocks_are_copies():
    module = ResidualMLP(6, 10, 3)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    stack = module.to_blocks()
    back = ResidualMLP.from_blocks(stack)
    for other in (stack, back):
        for parameter in other.parameters():
            parameter.data.zero_()
    assert all(map(torch.equal, module.parameters(), before))


def block(*, hidden=10, activation=None, norm=(), bias=(True, True), dim=6, **options):
    inner, outer = nn.Linear(dim, hidden, bias=bias[0], **options), nn.Linear(hidden, dim, bias=bias[1], **options)
    return nn.Sequential(*norm, inner, activation or nn.Tanh(), outer)


NOT_A_PERCEPTRON = [
    nn.Linear(6, 6),
    nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
    block(activation=nn.Sigmoid()),
    block(bias=(True, False)),
    block(norm=[nn.LayerNorm(6)]),
    block(norm=[nn.LayerNorm(6, eps=1e-6, elementwise_affine=False)]),
    block(norm=[nn.RMSNorm(6, elementwise_affine=False)]),  # whose epsilon is the dtype's
    block(norm=[nn.LayerNorm((5, 6), elementwise_affine=False)]),
    block(norm=[nn.BatchNorm1d(6, affine=False)]),
]


@pytest.mark.parametrize("odd", NOT_A_PERCEPTRON, ids=lambda module: re.sub(r"\s+", " ", repr(module))[:70])
def test_from_blocks_says_which_block_is_no_perceptron(odd):
    expected = r"ResidualMLP: block 1 must be nn\.Sequential\(\[norm,\] Linear\(dim, hidden\), activation, .*, got "
    with pytest.raises(ValueError, match=f"^{expected}{type(odd).__name__}"):
        ResidualMLP.from_blocks(ResidualStack([block(), odd]))


@pytest.mark.parametrize(
    ("odd", "facts"),
    [
        (block(hidden=11), "6 -> 11 -> 6"),
        (block(activation=nn.ReLU()), "relu"),
        (block(norm=[nn.LayerNorm(6, elementwise_affine=False)]), "norm layer"),
        (block(bias=(False, False)), "biases False and False"),
        (block(dtype=torch.float64), "torch.float64"),
        (block(device="meta"), "meta"),
        (block().requires_grad_(False), r"frozen \[True, True, True, True\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_from_blocks_says_how_blocks_differ(odd, facts):
    expected = f"^ResidualMLP: all blocks must be alike to be stacked, got .* in block 0 and .*{facts}.* in block 2$"
    with pytest.raises(ValueError, match=expected):
        ResidualMLP.from_blocks(ResidualStack([block(), block(), odd]))


def test_from_blocks_takes_a_stack():
    with pytest.raises(TypeError, match=r"^ResidualMLP: from_blocks needs a ResidualStack, got Sequential$"):
        ResidualMLP.from_blocks(nn.Sequential(mlp()))


def test_parameters_start_as_those_of_linear_layers():
    module = ResidualMLP(64, 256, 8)
    for (name, tensor), inputs in zip(module.named_parameters(), (64, 64, 256, 256), strict=True):
        bound = inputs**-0.5
        assert tensor.abs().max() <= bound
        # Uniform in ±bound: standard deviation bound / sqrt(3); the estimate from n values is off by 0.45 / sqrt(n).
        n = tensor.numel()
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=4 * 0.45 / n**0.5), name
        assert abs(tensor.mean().item()) < 4 * bound / (3 * n) ** 0.5, name
    torch.manual_seed(1)
    module.reset_parameters()
    first = module.weight_in.detach().clone()
    torch.manual_seed(1)
    assert torch.equal(ResidualMLP(64, 256, 8).weight_in, first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_smooth_init_is_that_of_the_blocks(scheme, dtype):
    module = ResidualMLP(6, 10, 5, scheme, dtype=dtype)
    before, stack = dict(module.named_parameters()), smooth_init_(module.to_blocks())
    assert smooth_init_(module) is module
    assert dict(module.named_parameters()).keys() == before.keys()
    assert all(module.get_parameter(name) is parameter for name, parameter in before.items())
    for mine, theirs in zip(module.parameters(), stacked(stack), strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=0)


def test_smooth_init_leaves_frozen_parameters_as_they_are():
    module = ResidualMLP(6, 10, 5)
    module.weight_in.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    stack = smooth_init_(module.to_blocks())
    smooth_init_(module)
    kept = [torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True)]
    assert kept == [True, False, False, False]
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, True, True, True]
    for mine, theirs in zip(module.parameters(), stacked(stack.requires_grad_(True)), strict=True):
        torch.testing.assert_close(mine.detach(), theirs)


def test_smooth_init_needs_values():
    with pytest.raises(ValueError, match=r"^smooth_init_: parameters must have values, got .* on the meta device"):
        smooth_init_(ResidualMLP(6, 10, 3, device="meta"))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_state_dict(scheme, bias):
    module, other = (ResidualMLP(6, 10, 3, scheme, bias=bias) for _ in range(2))
    layers = 3 + (scheme == "heun")
    shapes = {
        "weight_in": (layers, 10, 6),
        "bias_in": (layers, 10),
        "weight_out": (layers, 6, 10),
        "bias_out": (layers, 6),
    }
    expected = {name: shape for name, shape in shapes.items() if bias or "bias" not in name}
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == expected
    other.load_state_dict(module.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(scheme, copied):
    module, x = ResidualMLP(6, 10, 3, scheme, reverse="extrapolated", max_drift=0.3), torch.randn(5, 6)
    half_square(module(x)).backward()
    other = copied(module)
    assert repr(other) == repr(module)
    assert (other.max_drift, other.drift) == (0.3, None)
    got, expected = (gradients(lambda m=m: m(x), list(m.parameters())) for m in (other, module))
    assert all(map(torch.equal, got, expected))
    assert torch.equal(other.drift.defects, module.drift.defects)


def test_autocast_narrows_products_alone(scheme):
    module, x = ResidualMLP(6, 10, 4, scheme, norm="rms"), torch.randn(5, 6, requires_grad=True)
    narrow = copy.deepcopy(module).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        got = gradients(lambda: out, [x, *module.parameters()])
    assert out.dtype == torch.float32
    assert {gradient.dtype for gradient in got} == {torch.float32}
    assert torch.equal(out, narrow(x))
    expected = gradients(lambda: narrow(x), [x, *narrow.parameters()])
    assert all(torch.equal(a, b.float()) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(out, module(x))


def test_autocast_takes_an_x_of_any_narrow_dtype():
    module, x = ResidualMLP(6, 10, 4, dtype=torch.float16), torch.randn(5, 6).half()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module.bfloat16()(x))


def test_autocast_leaves_float64_alone(scheme):
    module, x = ResidualMLP(6, 10, 4, scheme, norm="layer", dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    expected = gradients(lambda: module(x), list(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lambda: module(x), list(module.parameters()))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_modules_keep_a_wide_stream(scheme, dtype, gradient):
    module = ResidualMLP(6, 10, 4, scheme, dtype=dtype, gradient=gradient)
    narrow = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    wide = narrow.detach().float().requires_grad_()
    assert module(wide).dtype == torch.float32
    assert torch.equal(module(narrow), module(wide).to(dtype))
    seed = torch.randn(5, 6, dtype=dtype)
    got, expected = (
        torch.autograd.grad(module(x), [x, *module.parameters()], seed.to(x.dtype)) for x in (narrow, wide)
    )
    assert {g.dtype for g in got} == {dtype}
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("tile_rows", [1, 8, 1000], ids="{} rows".format)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 3, 6), (2, 3, 2, 6), (0, 3, 6), (3, 0, 6)], ids=str)
@pytest.mark.parametrize("solver", [Reverse("step", 2), Reverse("extrapolate", 3)], ids=str)
def test_iterates_are_mixed_sample_by_sample_as_in_a_stack(monkeypatch, float64, scheme, solver, shape, tile_rows):
    monkeypatch.setitem(passes.TILE_BYTES, "cpu", tile_rows * 10 * 8)
    module = ResidualMLP(6, 10, 3, scheme, reverse=solver, step=0.9, on_drift="ignore")
    x = torch.randn(shape, requires_grad=True)
    stack = module.to_blocks()
    x_gradient, *each = gradients(lambda: stack(x), [x, *stack.parameters()])
    expected = [x_gradient, *(torch.stack(each[place::4]) for place in range(4))]
    got = gradients(lambda: module(x), [x, *module.parameters()])
    torch.testing.assert_close(list(got), expected, rtol=TIGHT, atol=TIGHT)
    if len(shape) > 2 and x.numel():
        rows = x.detach().flatten(0, -2).requires_grad_()
        assert worst_error(gradients(lambda: module(rows), list(module.parameters())), got[1:]) > 1e-6


@pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6), (5, 4, 3, 6)], ids=str)
def test_vmap_mixes_the_samples_that_it_maps_over(float64, scheme, shape):
    module = ResidualMLP(6, 10, 3, scheme, reverse=Reverse("step", 2), anchors={1}, step=0.9, on_drift="ignore")
    x, inputs = torch.randn(shape, requires_grad=True), list(module.parameters())
    got = gradients(lambda: torch.vmap(module)(x), [x, *inputs])
    expected = gradients(lambda: torch.stack([module(each) for each in x]), [x, *inputs])
    torch.testing.assert_close(got, expected, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_the_result_is_contiguous(scheme, gradient):
    module = ResidualMLP(6, 10, 4, scheme, gradient=gradient)
    x = torch.randn(6, 5, 2).permute(2, 1, 0).requires_grad_()
    assert module(x).is_contiguous()


def test_settings_may_change_between_training_steps(float64, scheme):
    module, x = ResidualMLP(6, 10, 4, scheme, gradient="backprop"), torch.randn(5, 6)
    inputs = list(module.parameters())
    exact = gradients(lambda: module(x), inputs)
    for name, value in (("gradient", "checkpoint"), ("gradient", "adjoint"), ("reverse", EXACT), ("anchors", 1)):
        setattr(module, name, value)
        error = worst_error(gradients(lambda: module(x), inputs), exact)
        assert (error > 1e-6) if value == "adjoint" else (error < TIGHT)
    assert module.reverse is EXACT


def test_backprop_has_second_derivatives(float64, scheme):
    module, x = ResidualMLP(3, 4, 2, scheme, gradient="backprop"), torch.randn(2, 3, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, x)
    module.gradient = "adjoint"
    (g,) = torch.autograd.grad(half_square(module(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'got a double backward .*use gradient="backprop"'):
        g.sum().backward()


def test_the_function_is_the_module_without_a_drift(float64, scheme):
    module = ResidualMLP(6, 10, 4, scheme, norm="rms", reverse="extrapolated", backend="torch")
    x, inputs = torch.randn(5, 6), list(module.parameters())
    function = lambda: residual_mlp(x, *inputs, scheme, norm="rms", reverse="extrapolated", backend="torch")  # noqa: E731
    assert torch.equal(function(), module(x))
    assert all(map(torch.equal, gradients(function, inputs), gradients(lambda: module(x), inputs)))
