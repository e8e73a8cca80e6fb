"""Stages of converted models deepened, tied and untied, and their gradients smoothed along depth."""

import copy

import pytest
import torch
from torch import nn

from resode_cuda import (
    ResidualStack,
    conversion,
    convert,
    deepen_stage,
    smooth_gradients_,
    smooth_init_,
    tie_stage,
    unconvert,
    untie_stage,
)
from tests.models.layers import DIM, Model


def deepened(steps, count=4, scale=0.3):
    torch.manual_seed(0)
    model = Model(count).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.body[2].weight.mul_(scale)
    shallow = copy.deepcopy(model)
    return shallow, deepen_stage(convert(model, ["layers"]), "layers", steps)


def x(rows=5):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_stage_of_the_same_depth_is_the_same():
    shallow, deep = deepened(4)
    assert torch.equal(shallow(x()), deep(x()))
    assert list(shallow.state_dict()) == list(deep.state_dict())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_deeper_stage_takes_smaller_steps_through_the_same_time(mode):
    shallow, deep = deepened(8)
    getattr(deep, mode)()
    state = shallow.embedding(x())
    layers = list(unconvert(copy.deepcopy(deep)).layers)
    for layer in layers:
        state = state + (type(layer).forward(layer, state) - state) / 2
    assert torch.equal(deep(x()), shallow.head(state))
    assert len(deep.layers) == 8
    assert torch.equal(layers[2].body[0].weight, shallow.layers[1].body[0].weight)


def test_a_smooth_stage_stays_nearly_the_same_function():
    torch.manual_seed(0)
    model = Model(8).double()
    smooth_init_(ResidualStack(list(model.layers)))
    with torch.no_grad():
        for layer in model.layers:
            layer.body[2].weight.mul_(0.3)
    exact = model(x())
    for factor, most in ((2, 0.1), (4, 0.2)):
        deep = deepen_stage(convert(copy.deepcopy(model), ["layers"]), "layers", 8 * factor)
        assert (deep(x()) - exact).norm() < most * exact.norm()


def test_a_deepened_stage_trains_as_a_stack_and_by_its_own_loop_alike():
    _, deep = deepened(12)
    out = deep(x())
    gradients = torch.autograd.grad(out.square().sum(), list(deep.parameters()))
    assert conversion(deep).stages[0].last_pass == "as a stack"
    assert conversion(deep).stages[0].steps == 12
    plain = unconvert(deep)
    again = plain(x())
    assert torch.equal(out, again)
    exact = torch.autograd.grad(again.square().sum(), list(plain.parameters()))
    off = sum((a - b).square().sum() for a, b in zip(gradients, exact, strict=True))
    assert (off / sum(b.square().sum() for b in exact)).sqrt() < 2e-3


def test_tied_layers_share_parameters_and_untied_ones_do_not():
    torch.manual_seed(0)
    model = convert(Model(5).double(), ["layers"])
    mean = torch.stack([layer.body[0].weight.detach() for layer in model.layers]).mean(0)
    keys = list(model.state_dict())
    tie_stage(model, "layers")
    assert len({id(layer.body[0].weight) for layer in model.layers}) == 1
    assert torch.allclose(model.layers[3].body[0].weight, mean)
    tied = model(x())
    tied.sum().backward()
    untie_stage(model, "layers")
    assert len({id(layer.body[0].weight) for layer in model.layers}) == 5
    assert torch.equal(model(x()), tied)
    assert list(model.state_dict()) == keys
    shared = model.layers[0].body[0].weight.grad.clone()
    model.zero_grad()
    model(x()).sum().backward()
    own = sum(layer.body[0].weight.grad for layer in model.layers)
    assert torch.allclose(own, shared, rtol=2e-2)


@pytest.mark.parametrize("change", [lambda m: deepen_stage(m, "layers", 3), lambda m: tie_stage(m, "head")])
def test_what_is_refused_leaves_the_model_as_it_was(change):
    model = convert(Model(4), ["layers"])
    with pytest.raises(ValueError, match=r"deepen: steps must be >= 4|one of \['layers'\]"):
        change(model)
    model(torch.randn(2, 8)).sum().backward()
    assert conversion(model).stages[0].last_pass == "as a stack"


def test_what_one_layer_holds_twice_it_holds_twice_when_untied():
    torch.manual_seed(0)
    model = Model(4).double()
    for layer in model.layers:
        layer.again = layer.norm
        layer.twice = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        layer.norm.also = layer.twice
    convert(model, ["layers"])
    untie_stage(tie_stage(model, "layers"), "layers")
    assert all(layer.twice is layer.norm.also for layer in model.layers)
    assert len({id(layer.twice) for layer in model.layers}) == 4


def test_layers_with_a_forward_of_their_own_are_not_deepened():
    model = Model(4)
    model.layers[1].forward = lambda x: x
    convert(model, ["layers"])
    with pytest.raises(ValueError, match=r"forward of layers.1 must be its class's"):
        deepen_stage(model, "layers", 8)


def test_gradients_of_a_converted_model_are_smoothed_along_depth():
    torch.manual_seed(0)
    model = convert(Model(6).double(), ["layers"])
    model(x()).sum().backward()
    stack = ResidualStack([nn.Linear(DIM, 4 * DIM) for _ in range(6)]).double()
    for block, layer in zip(stack, model.layers, strict=True):
        block.weight.grad = layer.body[0].weight.grad.clone()
    head = model.head.weight.grad.clone()
    smooth_gradients_(stack, 0.3)
    smooth_gradients_(model, 0.3)
    for block, layer in zip(stack, model.layers, strict=True):
        assert torch.equal(block.weight.grad, layer.body[0].weight.grad)
    assert torch.equal(model.head.weight.grad, head)
    with pytest.raises(TypeError, match="got Model; of another model"):
        smooth_gradients_(unconvert(model), 0.3)
