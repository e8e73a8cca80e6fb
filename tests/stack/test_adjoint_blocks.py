"""The adjoint of stacks whose blocks share, hide, wrap or replace their parameters."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT, TIGHT, assert_same_gradients, exact_stack
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, parameters_of, plain, relative_error

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]


def test_blocks_without_parameters(scheme):
    blocks = [nn.Sequential(nn.Tanh()) for _ in range(8)]
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


def test_blocks_that_ignore_their_input_or_a_parameter(scheme):
    blocks = [mlp() for _ in range(6)]
    blocks[2] = Constant()
    blocks[3].register_parameter("unused", nn.Parameter(torch.ones(3)))
    x = torch.randn(5, 6, requires_grad=True)
    used = [p for name, p in nn.ModuleList(blocks).named_parameters() if "unused" not in name]
    assert_same_gradients(blocks, scheme, x, inputs=[x, *used])
    exact_stack(blocks, scheme)(x).sum().backward()
    assert blocks[3].unused.grad is None


def test_one_block_used_at_every_step(scheme):
    block = mlp()
    assert_same_gradients([block] * 8, scheme, torch.randn(5, 6, requires_grad=True), tolerance=1e-11)


def test_parameters_shared_between_blocks_and_with_modules_outside(scheme):
    blocks, head = mlps(scheme, 6), nn.Linear(6, 10)
    head.weight = blocks[1][0].weight
    blocks[4][0].weight = blocks[1][0].weight
    inputs = [*parameters_of(blocks), head.bias]
    x = torch.randn(5, 6)
    exact = gradients(lambda: head(plain(blocks, scheme, x)), inputs)
    assert relative_error(gradients(lambda: head(exact_stack(blocks, scheme)(x)), inputs), exact) < TIGHT


def test_parametrized_blocks(scheme):
    blocks = mlps(scheme, 6)
    for block in blocks:
        parametrizations.weight_norm(block[0])
        parametrizations.orthogonal(block[2])
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_by_hooks(scheme):
    blocks = mlps(scheme, 6)
    for block in blocks:
        nn.utils.weight_norm(block[0])
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


def test_nested_stacks(scheme):
    inner = [ResidualStack(mlps("euler", 3), step=0.3, reverse=EXACT) for _ in range(block_count(scheme, 5))]
    x = torch.randn(5, 6, requires_grad=True)
    assert_same_gradients(inner, scheme, x, tolerance=1e-11)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body, self.use_reentrant = mlp(), use_reentrant

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def test_checkpointing_inside_blocks(scheme):
    blocks = [Checkpointed(use_reentrant=False) for _ in range(6)]
    assert_same_gradients(blocks, scheme, torch.randn(5, 6, requires_grad=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpointing_inside_blocks_is_refused(scheme):
    stack = exact_stack([Checkpointed(use_reentrant=True) for _ in range(block_count(scheme, 6))], scheme)
    with pytest.raises(RuntimeError, match=r"ResidualStack: the blocks of step 5 .*pass use_reentrant=False"):
        stack(torch.randn(5, 6, requires_grad=True)).sum().backward()


def test_checkpointing_around_the_stack(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    inputs = [x, *parameters_of(blocks)]
    exact = gradients(lambda: plain(blocks, scheme, x), inputs)
    stack = exact_stack(blocks, scheme)
    assert relative_error(gradients(lambda: checkpoint(stack, x, use_reentrant=False), inputs), exact) < TIGHT


def test_saved_tensor_hooks_around_the_stack(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    inputs = [x, *parameters_of(blocks)]
    exact = gradients(lambda: plain(blocks, scheme, x), inputs)
    with torch.autograd.graph.save_on_cpu():
        out = exact_stack(blocks, scheme)(x)
    assert relative_error(torch.autograd.grad(half_square(out), inputs), exact) < TIGHT


@pytest.mark.parametrize("options", [{"reverse": EXACT}, {"anchors": 1}, {"gradient": "checkpoint"}])
def test_functional_call_differentiates_for_the_tensors_it_was_given(scheme, options):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6)
    stack = ResidualStack(blocks, scheme, **options)
    given = {name: (2 * p).detach().requires_grad_() for name, p in stack.named_parameters()}
    made = {name: p * 1.0 for name, p in given.items()}  # no leaves, as an inner loop of meta-learning has them
    got = torch.autograd.grad(half_square(torch.func.functional_call(stack, made, (x,))), list(given.values()))
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.copy_(given[name])
    exact = gradients(lambda: plain(blocks, scheme, x), list(stack.parameters()))
    assert relative_error(got, exact) < TIGHT


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("how", ["hook", "saved", "functional"])
def test_a_weight_in_two_places_is_replaced_in_both(scheme, how):
    blocks, x = [Tied() for _ in range(block_count(scheme, 5))], torch.randn(5, 6)
    blocks[2].second.bias = blocks[1].first.bias  # and over the two blocks of a Heun step
    parameters, stack = parameters_of(blocks), exact_stack(blocks, scheme)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)
    if how == "hook":
        for parameter in parameters:
            parameter.register_hook(lambda g: None)
        got = gradients(lambda: stack(x), parameters)
    elif how == "saved":
        with torch.autograd.graph.save_on_cpu():
            out = stack(x)
        got = torch.autograd.grad(half_square(out), parameters)
    else:
        given = {name: p.detach().clone().requires_grad_() for name, p in stack.named_parameters()}
        got = torch.autograd.grad(half_square(torch.func.functional_call(stack, given, (x,))), list(given.values()))
    assert relative_error(got, exact) < TIGHT


def test_lazy_blocks_must_have_run_once(scheme):
    blocks = [nn.Sequential(nn.LazyLinear(6), nn.Tanh()) for _ in range(block_count(scheme, 3))]
    stack, x = exact_stack(blocks, scheme), torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="parameters of block 0 must be initialised, got a lazy 'weight'; run the"):
        stack(x)
    with torch.no_grad():
        stack(x)
    assert_same_gradients(blocks, scheme, x)


def test_hooks_on_parameters_fire_once_with_the_whole_gradient(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6)
    parameter = blocks[1][0].weight
    exact = gradients(lambda: plain(blocks, scheme, x), [parameter])
    seen = []
    parameter.register_hook(lambda g: seen.append(g) or 2 * g)
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad / 2))
    half_square(exact_stack(blocks, scheme)(x)).backward()
    assert len(seen) == 2
    assert relative_error([*seen, parameter.grad / 2], [*exact] * 3) < TIGHT
