"""What is remembered of a block's modules from one pass to the next: as much as is still so."""

import copy
import gc
import pickle
import random
import weakref

import numpy
import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack
from resode_cuda.adjoint.generators import Generators
from resode_cuda.adjoint.inventory import Inventories, Inventory
from resode_cuda.adjoint.restoration import restoring
from tests.support.networks import gradients, half_square, mlp, mlps


def changes():
    """Ways of changing a block of modules, by what is changed."""

    def add_an_attribute(block):
        block[0].scale = 2.0

    def rename_an_attribute(block):
        del block[0].in_features
        block[0].inputs = 6

    def switch_a_flag(block):
        block[1].eval()

    def swap_a_parameter(block):
        block[0].weight = nn.Parameter(block[0].weight.detach().clone())

    def swap_a_module(block):
        block[0] = nn.Linear(6, 10)

    def register_a_buffer(block):
        block[2].register_buffer("offset", torch.zeros(6))

    def register_a_parameter(block):
        block[1].register_parameter("gain", nn.Parameter(torch.ones(6)))

    def take_a_bias_away(block):
        block[2].bias = None

    found = [value for value in locals().values() if callable(value)]
    return found


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_a_change_is_noticed(change):
    block, inventories = mlp(), Inventories()
    before = inventories.of(block, 0)
    assert inventories.of(block, 0) is before
    change(block)
    assert not before.is_current()
    assert inventories.of(block, 0) is not before


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("change", changes()[3:5] + changes()[7:], ids=lambda change: change.__name__)
@pytest.mark.usefixtures("float64")
def test_gradients_are_those_of_the_changed_network(change, gradient):
    stack, x = ResidualStack(mlps("euler", 3), gradient=gradient, anchors=1), torch.randn(4, 6)
    half_square(stack(x)).backward()
    change(stack[1])
    parameters = list(stack.parameters())
    found = gradients(lambda: stack(x), parameters)
    stack.gradient = "backprop"
    expected = gradients(lambda: stack(x), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_what_modules_let_go_of_is_not_kept_alive():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            self.last = self.body(x).detach()
            return self.last * 1.0 + self.body(x)

    stack, x = ResidualStack([Keeping() for _ in range(3)], on_drift="ignore"), torch.randn(4, 6)
    half_square(stack(x)).backward()
    half_square(stack(x)).backward()
    remembered = weakref.ref(stack[1].last)
    for block in stack:
        block.last = None
    gc.collect()
    assert remembered() is None


def test_parameters_that_were_swapped_in_for_a_call_are_not_kept_alive():
    stack, x = ResidualStack(mlps("euler", 3)), torch.randn(4, 6)
    half_square(stack(x)).backward()
    swapped = {name: (2 * parameter).detach().requires_grad_() for name, parameter in stack.named_parameters()}
    half_square(torch.func.functional_call(stack, swapped, (x,))).backward()
    assert all(tensor.grad is not None for tensor in swapped.values())
    remembered = weakref.ref(swapped["1.0.weight"])
    del swapped
    gc.collect()
    assert remembered() is None


def test_copies_and_pickles_remember_nothing():
    stack = ResidualStack(mlps("euler", 3))
    half_square(stack(torch.randn(4, 6))).backward()
    assert len(stack._inventories._last) == 3
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert not other._inventories._last


def test_torchs_own_modules_use_no_tensors_from_elsewhere():
    assert not Inventory(mlp()).may_use_strangers
    hooked = mlp()
    inventory = Inventory(hooked)
    hooked[0].register_forward_hook(lambda *_: None)
    assert inventory.may_use_strangers

    class Own(nn.Linear):
        pass

    rebound = nn.Linear(6, 6)
    rebound.forward = lambda x: x
    gradient_attribute = nn.Linear(6, 6, bias=False)
    del gradient_attribute.weight
    gradient_attribute.weight = torch.randn(6, 6, requires_grad=True)
    for module in (Own(6, 6), rebound, gradient_attribute, nn.BatchNorm1d(6)):
        assert Inventory(module).may_use_strangers


DRAWS = {
    "random.random": random.random,
    "random.gauss": lambda: random.gauss(0, 1),
    "random.getrandbits": lambda: random.getrandbits(7),
    "random.shuffle": lambda: random.shuffle([1, 2, 3]),
    "numpy.random.rand": numpy.random.rand,
    "numpy.random.randn": numpy.random.randn,
    "torch.rand": lambda: torch.rand(()),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("before", [0, 1, 623, 700], ids=lambda count: f"after {count}")
def test_a_draw_is_noticed_and_replayed(name, before):
    for _ in range(before):
        DRAWS[name]()
    generators = Generators(torch.device("cpu"))
    first = [DRAWS[name]()]
    drawn = generators.drawn_since_last()
    assert len(drawn) == 1
    assert not generators.drawn_since_last()
    following = random.getstate(), numpy.random.get_state()[2], torch.get_rng_state()

    def again():
        drawn.replay()
        return [DRAWS[name]()]

    assert restoring(again) == first
    now = random.getstate(), numpy.random.get_state()[2], torch.get_rng_state()
    assert now[:2] == following[:2]
    assert torch.equal(now[2], following[2])


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_function_among_the_attributes_may_use_a_tensor_from_elsewhere(gradient):
    scale = nn.Parameter(torch.tensor(1.3))

    def activation(z):
        return torch.nn.functional.gelu(z) * scale

    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=activation)]
    stack = ResidualStack(layers, form="block", gradient=gradient)
    out = half_square(stack(torch.randn(2, 5, 8)))
    if gradient == "checkpoint":
        out.backward()
        assert scale.grad is not None
    else:
        with pytest.raises(RuntimeError, match=r"use a tensor of shape .* that needs gradients"):
            out.backward()


def test_another_class_in_place_is_noticed():
    class Scaled(nn.Tanh):
        pass

    block, inventories = mlp(), Inventories()
    before = inventories.of(block, 0)
    block[1].__class__ = Scaled
    assert not before.is_current()
    assert inventories.of(block, 0).may_use_strangers


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda block: torch.jit.trace(block, torch.randn(3, 6))], ids=["script", "trace"]
)
def test_modules_of_torchscript_train(compiled):
    # (Under gradient="checkpoint" torch's own checkpoint can't stop TorchScript's interpreter.)
    stack = ResidualStack([compiled(mlp()) for _ in range(3)], step=0.1, anchors=1)
    x = torch.randn(3, 6, requires_grad=True)
    for _ in range(2):
        got = gradients(lambda: stack(x), [x, *stack.parameters()])
    stack.gradient = "backprop"
    for have, want in zip(got, gradients(lambda: stack(x), [x, *stack.parameters()]), strict=True):
        torch.testing.assert_close(have, want)
