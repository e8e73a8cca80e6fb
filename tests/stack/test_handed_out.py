"""Blocks that a model takes out of a stack and calls itself, which trains by backprop."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack
from tests.support.networks import mlp

DIM = 6


def stack(count=4):
    torch.manual_seed(0)
    return ResidualStack([mlp(DIM) for _ in range(count)], step=1.0)


class Foreign(nn.Module):
    """A model that takes its layers for a list."""

    def __init__(self, layers, calls):
        super().__init__()
        self.layers, self.calls = layers, calls

    def forward(self, x):
        return self.calls(self.layers, x)


def iterated(layers, x):
    for layer in layers:
        x = x + layer(x)
    return x


def sliced(layers, x):
    return iterated(layers[:3], x)


def indexed(layers, x):
    return x + layers[-1](x)


@pytest.mark.parametrize("calls", [iterated, sliced, indexed])
def test_the_first_backward_pass_of_blocks_called_from_outside_says_so_once(calls):
    model, x = Foreign(stack(), calls), torch.randn(3, DIM)
    out = model(x).sum()
    with pytest.warns(RuntimeWarning, match="called from outside, one by one"):
        out.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()


@pytest.mark.parametrize("handed_out_first", [True, False])
def test_nothing_is_said_where_the_stack_itself_runs(handed_out_first):
    layers, x = stack(), torch.randn(3, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if handed_out_first:
            assert len(list(layers)) == 4
        layers(x).sum().backward()
        iterated(layers, x).sum().backward()
    assert not layers[0][0].weight._post_accumulate_grad_hooks


def test_nothing_is_said_where_compiled_code_runs_the_stack():
    layers, x = stack(), torch.randn(3, DIM)
    list(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        warnings.filterwarnings("error", message="ResidualStack: its blocks")
        torch.compile(layers, backend="eager")(x).sum().backward()


def test_nothing_is_watched_without_gradients_or_parameters_to_train():
    layers = stack()
    with torch.no_grad():
        list(layers)
    assert layers._watch is None
    frozen = stack().requires_grad_(False)
    iterated(frozen, torch.randn(3, DIM, requires_grad=True)).sum().backward()
    assert frozen._watch is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))])
def test_copies_watch_for_themselves(copied):
    layers = stack()
    list(layers)
    twin = copied(layers)
    out = iterated(twin, torch.randn(3, DIM)).sum()
    with pytest.warns(RuntimeWarning, match="called from outside"):
        out.backward()


@pytest.mark.parametrize("chosen", [slice(1, 3), slice(None), slice(None, None, -1), slice(2, 2)])
def test_slices_are_those_of_a_module_list(chosen):
    layers = stack()
    expected = nn.ModuleList(list(layers))[chosen]
    assert type(layers[chosen]) is nn.ModuleList
    assert list(layers[chosen]) == list(expected)
