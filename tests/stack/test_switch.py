"""The switch by which trainers turn checkpointing on and off, on stacks themselves."""

import pytest
import torch
from torch import nn

from resode_cuda import ResidualMLP, ResidualStack
from tests.support.networks import mlp

DIM = 6


def modules():
    torch.manual_seed(0)
    return [ResidualStack([mlp(DIM) for _ in range(4)]), ResidualMLP(DIM, DIM, 4)]


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("kind", [0, 1])
def test_the_switch_goes_to_backprop_and_back(kind, gradient):
    module = modules()[kind]
    module.gradient = gradient
    assert module.gradient_checkpointing
    module.gradient_checkpointing_disable()
    assert module.gradient == "backprop"
    assert not module.gradient_checkpointing
    module.gradient_checkpointing_disable()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert module.gradient == gradient
    module.set_grad_checkpointing(False)
    assert module.gradient == "backprop"
    module.set_grad_checkpointing()
    assert module.gradient == gradient


def test_a_stack_that_was_made_for_backprop_is_switched_to_the_adjoint():
    stack = ResidualStack([mlp(DIM)], gradient="backprop")
    stack.gradient_checkpointing_enable()
    assert stack.gradient == "adjoint"


def test_a_loop_over_modules_with_the_attribute_finds_stacks():
    """As transformers switches the modules of a model."""
    model = nn.Sequential(nn.Linear(DIM, DIM), *modules())
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    assert [module.gradient for module in model[1:]] == ["backprop", "backprop"]
    x = torch.randn(3, DIM)
    model(x).sum().backward()
    assert model[1].drift is None
