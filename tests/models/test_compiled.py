"""Converted models, compiled and exported."""

import copy

import pytest
import torch

from resode_cuda import convert
from tests.models.layers import Layer, Model
from tests.support.networks import relative_error
from tests.support.small_transformers import IMAGES, batch_for, last_pass, small_and_converted, trained_on

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
STORED = 5e-3
"""The most that gradients of fresh models are off by here, all together; measured up to 1.2e-3."""


def compiled_steps(name, is_warm, **changes):
    """Three training steps of a compiled model, beside those of a plain one. Returns the number of graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, converted = small_and_converted(name, settings={"min_depth": 3}, num_hidden_layers=3, **changes)
    batch = batch_for(name)
    if is_warm:
        trained_on(converted, batch)
    compiled = torch.compile(converted, backend="eager")
    expected, exact = trained_on(plain, batch)
    for _ in range(3):
        out, found = trained_on(compiled, batch)
        torch.testing.assert_close(out.loss, expected.loss)
        assert relative_error([found[f"_orig_mod.{name}"] for name in exact], list(exact.values())) < STORED
        assert last_pass(converted) == "as a stack"
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_model_trains_as_a_stack_beside_what_is_compiled(name):
    """Also the first time."""
    assert compiled_steps(name, is_warm=name == "vit") > 1


class InTuple(Layer):
    def forward(self, x):
        return (super().forward(x),)


def of_tuples(layers, x):
    for layer in layers:
        x = layer(x)[0]
    return x


def between(layers, x):
    for layer in layers:
        x = layer(x) * 0.9
    return x


def asking(layers, x):
    """As what looks for caches among the arguments does."""
    for layer in layers:
        x = layer(x)
        assert not hasattr(x, "get_seq_length")
    return x


@pytest.mark.parametrize(
    ("layer", "loop", "ran"),
    [
        (InTuple, of_tuples, "as a stack"),
        (Layer, asking, "as a stack"),
        (Layer, between, "as a stack, in 4 pieces"),
    ],
)
def test_a_loop_that_is_compiled_before_a_layer_has_run(layer, loop, ran):
    torch._dynamo.reset()
    plain = Model(4, loop=loop, layer=layer).train()
    converted = convert(copy.deepcopy(plain), ["layers"])
    compiled, x = torch.compile(converted, backend="eager"), torch.randn(5, 8)
    for _ in range(2):
        assert torch.equal(compiled(x), plain(x))
        assert last_pass(converted) == ran


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_an_exported_model(name):
    plain, converted = small_and_converted(name)
    batch = batch_for(name)
    given = {entry: batch[entry] for entry in batch if entry in ("pixel_values", "input_ids")}
    given |= {} if name in IMAGES else {"use_cache": False}
    trained_on(converted, batch)
    with torch.no_grad():
        program = torch.export.export(converted.eval(), (), given)
        assert torch.equal(program.module()(**given).logits, plain.eval()(**given).logits)
    assert program.state_dict.keys() == plain.state_dict().keys()
