"""What blocks get beside the state: the caller's own objects, and when they run again what they were given."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT, TIGHT
from tests.support.networks import block_count, half_square, mlp, parameters_of, plain, relative_error
from tests.support.stateful import Outside

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]

MODES = {
    "adjoint": {"reverse": EXACT},
    "extrapolated": {"reverse": "extrapolated", "anchors": 1},
    "checkpoint": {"gradient": "checkpoint"},
    "backprop": {"gradient": "backprop"},
}
every_mode = pytest.mark.parametrize("mode", MODES)
STEPS = 4


class WithBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()


class Popping(WithBody):
    """Takes its own scale out of a list."""

    def forward(self, x, scales):
        return self.body(x) * scales.pop()


class PoppingNested(WithBody):
    def forward(self, x, *, more):
        return self.body(x) * more["scales"][1].pop(0)


class Appending(WithBody):
    """Adds up what the blocks before it have left in a list."""

    def forward(self, x, seen):
        out = self.body(x)
        seen.append(out.detach())
        return out * torch.stack(seen).mean(dim=0)


class Numbering(WithBody):
    """Counts in a dict, which holds a tensor too."""

    def forward(self, x, shared):
        shared["calls"] = shared.get("calls", 0) + 1
        shared[f"block {shared['calls']}"] = shared["scale"].detach() * shared["calls"]
        return self.body(x) * shared["scale"] * torch.tensor(float(shared["calls"])).cos()


def evaluations(scheme):
    """How often blocks are called in a forward pass of `STEPS` steps."""
    return STEPS * SCHEMES[scheme].blocks_per_step


def scales(scheme):
    return [torch.rand(6).add_(0.5).requires_grad_(n % 2 == 0) for n in range(evaluations(scheme))]


CASES = {
    "popped tensors": (Popping, lambda scheme: ((scales(scheme),), {})),
    "popped numbers": (Popping, lambda scheme: (([0.5 + n / 7 for n in range(evaluations(scheme))],), {})),
    "popped in a nest": (PoppingNested, lambda scheme: ((), {"more": {"scales": (1, scales(scheme))}})),
    "appended": (Appending, lambda scheme: (([torch.randn(5, 6)],), {})),
    "appended to nothing": (Appending, lambda scheme: (([],), {})),
    "dict": (Numbering, lambda scheme: (({"scale": torch.rand(6, requires_grad=True)},), {})),
}


def shallow(call):
    """The arguments in containers of their own, with the same tensors."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf, call)
    return args, kwargs


def leaves(call):
    return pytree.tree_leaves(call)


def need_gradients(call):
    return [leaf for leaf in leaves(call) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


@every_mode
@pytest.mark.parametrize("case", CASES)
def test_containers_that_blocks_change_are_those_of_the_ordinary_network(scheme, mode, case):
    build, arguments = CASES[case]
    blocks, x = [build() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6, requires_grad=True)
    call = arguments(scheme)
    inputs = [x, *parameters_of(blocks), *need_gradients(call)]
    given = shallow(call)
    args, kwargs = given
    out = plain(blocks, scheme, x, *args, **kwargs)
    exact = torch.autograd.grad(half_square(out), inputs)
    ours = shallow(call)
    args, kwargs = ours
    got = ResidualStack(blocks, scheme, **MODES[mode])(x, *args, **kwargs)
    assert torch.equal(got, out)
    assert relative_error(torch.autograd.grad(half_square(got), inputs), exact) < TIGHT
    assert pytree.tree_structure(ours) == pytree.tree_structure(given)
    for a, b in zip(leaves(ours), leaves(given), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Noting(WithBody):
    """Notes what it got in the forward pass."""

    def __init__(self):
        super().__init__()
        self.outside = Outside(got=None)

    def forward(self, x, *args, **kwargs):
        self.outside.got = self.outside.got or (*args, *kwargs.values())
        return self.body(x)


@every_mode
def test_the_forward_pass_gets_the_callers_own_objects(scheme, mode):
    blocks, x = [Noting() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    weight, opaque = nn.Parameter(torch.randn(6)), Outside()
    mine = weight, [weight, x], {"more": (weight,)}, opaque, weight * 2
    half_square(ResidualStack(blocks, scheme, **MODES[mode])(x, *mine[:3], opaque=opaque, late=mine[4])).backward()
    for block in blocks:
        assert all(got is given for got, given in zip(block.outside.got, mine, strict=True))


class Scaled(WithBody):
    """Reads an attribute in Python of a tensor among its arguments."""

    def forward(self, x, weight):
        return self.body(x) * weight * getattr(weight, "quantisation", 1.0)


class AskingForItsClass(WithBody):
    def forward(self, x, weight):
        return self.body(x) * (weight if isinstance(weight, nn.Parameter) else 1.0)


class AskingForIdentity(WithBody):
    def forward(self, x, weight, other):
        return self.body(x) * (weight if weight is other else 1.0)


@every_mode
@pytest.mark.parametrize("block", [Scaled, AskingForItsClass, AskingForIdentity])
@pytest.mark.parametrize("needs", [False, True], ids=["constant", "with gradients"])
def test_tensors_keep_their_class_attributes_and_identity(scheme, mode, block, needs):
    blocks, x = [block() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    weight = nn.Parameter(torch.rand(6), requires_grad=needs)
    weight.quantisation = 0.3
    args = (weight, weight) if block is AskingForIdentity else (weight,)
    inputs = [*parameters_of(blocks), *([weight] if needs else [])]
    exact = torch.autograd.grad(half_square(plain(blocks, scheme, x, *args)), inputs)
    got = torch.autograd.grad(half_square(ResidualStack(blocks, scheme, **MODES[mode])(x, *args)), inputs)
    assert relative_error(got, exact) < TIGHT


class AskingForItsOwn(WithBody):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x, weight):
        return self.body(x) * (weight if weight is self.weight else 1.0)


@every_mode
def test_an_argument_that_is_a_parameter_of_the_block_is_the_same_object(scheme, mode):
    weight, x = nn.Parameter(torch.rand(6)), torch.randn(5, 6)
    blocks = [AskingForItsOwn(weight) for _ in range(block_count(scheme, STEPS))]
    inputs = parameters_of(blocks)
    exact = torch.autograd.grad(half_square(plain(blocks, scheme, x, weight)), inputs)
    got = torch.autograd.grad(half_square(ResidualStack(blocks, scheme, **MODES[mode])(x, weight)), inputs)
    assert relative_error(got, exact) < TIGHT


class Hooked(WithBody):
    """Asks one of its own parameters for its class and an attribute."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.weight.quantisation = 0.3

    def forward(self, x):
        factor = self.weight.quantisation if hasattr(self.weight, "quantisation") else 1.0
        return self.body(x) * (self.weight if isinstance(self.weight, nn.Parameter) else 1.0) * factor


@every_mode
@pytest.mark.parametrize("hooked", ["weight", "body.0.weight"])
def test_hooked_parameters_keep_their_class_and_attributes(scheme, mode, hooked):
    blocks, x = [Hooked() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    for block in blocks:
        block.get_parameter(hooked).register_hook(lambda g: 2 * g)
    inputs = parameters_of(blocks)
    exact = torch.autograd.grad(half_square(plain(blocks, scheme, x)), inputs)
    got = torch.autograd.grad(half_square(ResidualStack(blocks, scheme, **MODES[mode])(x)), inputs)
    assert relative_error(got, exact) < TIGHT


class Writing(WithBody):
    def forward(self, x, *args, **kwargs):
        args[0].mul_(2)
        return self.body(x) * args[0]


class WritingKeyword(WithBody):
    def forward(self, x, *, scale):
        return self.body(x) * scale.mul_(2)


class WritingNested(WithBody):
    def forward(self, x, first, *, more):
        more["of them"][1].mul_(2)
        return self.body(x) * more["of them"][1]


@pytest.mark.parametrize(
    ("block", "arguments", "name"),
    [
        (Writing, lambda t: ((t,), {}), "argument 0"),
        (WritingKeyword, lambda t: ((), {"scale": t}), "scale"),
        (WritingNested, lambda t: ((1,), {"more": {"of them": [0, t]}}), r"more\['of them'\]\[1\]"),
    ],
    ids=["positional", "keyword", "nested"],
)
@pytest.mark.parametrize("mode", ["adjoint", "extrapolated", "checkpoint"])
def test_a_tensor_argument_written_in_place_is_an_error_with_its_name(scheme, mode, block, arguments, name):
    blocks, x = [mlp() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    blocks = [IgnoringArguments(body) for body in blocks]
    blocks[2] = block()
    args, kwargs = arguments(torch.ones(6))
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    with pytest.raises(RuntimeError, match=f"block 2 must not write a tensor among its arguments.*it wrote {name};"):
        stack(x, *args, **kwargs)
    stack.gradient = "backprop"
    assert stack(x, *args, **kwargs).shape == x.shape


class IgnoringArguments(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, *args, **kwargs):
        return self.body(x)


@every_mode
def test_tensors_of_inference_mode_serve_as_arguments(scheme, mode):
    blocks, x = [Scaled() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6, requires_grad=True)
    with torch.inference_mode():
        weight = torch.rand(6)
    usual = weight.clone()
    inputs = [x, *blocks[1].body[0].parameters()]
    with torch.no_grad():
        out = plain(blocks, scheme, x, usual)
    exact = torch.autograd.grad(half_square(plain(blocks, scheme, x, usual)), inputs)
    blocks = [CastFirst(block) for block in blocks]
    got = ResidualStack(blocks, scheme, **MODES[mode])(x, weight)
    assert torch.equal(got, out)
    assert relative_error(torch.autograd.grad(half_square(got), inputs), exact) < TIGHT


class CastFirst(IgnoringArguments):
    """Clones its argument, since autograd saves no tensor of inference mode."""

    def forward(self, x, weight):
        return self.body(x, weight.clone())


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_iterators_are_refused_by_name(scheme, gradient):
    blocks, x = [IgnoringArguments(mlp()) for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    stack = ResidualStack(blocks, scheme, gradient=gradient)
    for args, kwargs, name in (
        ((iter([1, 2]),), {}, "argument 0"),
        ((), {"more": [(n for n in range(3))]}, r"more\[0\]"),
    ):
        with pytest.raises(TypeError, match=f"{name} must not be an iterator, .*pass a list"):
            stack(x, *args, **kwargs)
