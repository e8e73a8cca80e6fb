"""Models of Hugging Face transformers, converted: the same outputs to the last bit, and their gradients by 8 bits."""

import math

import pytest
import torch

from resode_cuda import conversion, convert, unconvert
from tests.support.networks import relative_error
from tests.support.small_transformers import (
    FAMILIES,
    IMAGES,
    LAYERS,
    batch_for,
    last_pass,
    small,
    small_and_converted,
    trained_on,
)

OF_ALL = 2e-3
"""The most that 8 bits may be off by, of all gradients together: measured 5e-5 to 7e-4 after some training."""
OF_A_PART = 2e-2
"""The largest error of one layer (measured: up to 4e-3) or one parameter (up to 8e-3), such as Mamba's decay rates."""
EXACT = 1e-10
every_family = pytest.mark.parametrize("name", FAMILIES)


def fitted(name, dtype=torch.float64, steps=20, **changes):
    """A model that has seen some training, by its own loop: the gradients of a fresh one are no example."""
    model, batch = small(name, **changes), batch_for(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.to(dtype)


def error_of(found, exact, names):
    return relative_error([found[name] for name in names], [exact[name] for name in names])


def parts_of(model, exact):
    """Parameters by layer, and each alone, but those whose exact gradient is zero up to rounding, as keys' biases."""
    size = math.sqrt(sum(g.double().square().sum() for g in exact.values()))
    names = [name for name, g in exact.items() if g.double().norm() > 1e-6 * size]
    path = conversion(model).stages[0].path.removesuffix(f"0 to {LAYERS - 1}")
    layers = [[name for name in names if f"{path}{n}." in name] for n in range(LAYERS)]
    return layers, [[name] for name in names]


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_the_models_own_to_the_last_bit(name, dtype):
    plain, converted = small_and_converted(name, dtype)
    batch = batch_for(name, dtype)
    assert list(converted.state_dict()) == list(plain.state_dict())
    for _ in range(2):  # the first pass also looks at what layers return
        (out, _), (expected, _) = trained_on(converted, batch), trained_on(plain, batch)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.loss, expected.loss)
        assert last_pass(converted) == "as a stack"
    with torch.no_grad():
        out, expected = converted.eval()(**batch), plain.eval()(**batch)
    assert torch.equal(out.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(converted.buffers(), plain.buffers(), strict=True))


@every_family
def test_gradients_by_8_bits_after_some_training(name):
    model, batch = fitted(name), batch_for(name, torch.float64)
    _, exact = trained_on(model, batch)
    _, found = trained_on(convert(model), batch)
    assert found.keys() == exact.keys()
    layers, parameters = parts_of(model, exact)
    assert all(layers)
    assert error_of(found, exact, exact) < OF_ALL
    assert max(error_of(found, exact, part) for part in (*layers, *parameters)) < OF_A_PART
    assert any(not torch.equal(found[name], exact[name]) for name in exact)


@every_family
def test_gradients_from_stored_states_are_exact(name):
    plain, converted = small_and_converted(name, torch.float64, {"anchors": 1})
    batch = batch_for(name, torch.float64)
    (_, found), (_, exact) = trained_on(converted, batch), trained_on(plain, batch)
    assert error_of(found, exact, exact) < EXACT
    assert last_pass(converted) == "as a stack"


@pytest.mark.parametrize("name", ["llama", "mamba", "vit"])
def test_bfloat16_is_off_by_its_own_rounding(name):
    """By less from what its own loop gives than that is from float64's."""
    model = fitted(name, torch.bfloat16)
    batch = batch_for(name, torch.bfloat16)
    _, own = trained_on(model, batch)
    _, found = trained_on(convert(model), batch)
    unconvert(model).double()
    _, exact = trained_on(model, batch_for(name, torch.float64))
    assert error_of(found, own, own) < error_of(own, exact, exact)


def as_embeddings(model, batch):
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch["input_ids"])
    return {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embedded}


CALLS = {
    "no padding": lambda model, batch: {"input_ids": batch["input_ids"], "labels": batch["input_ids"]},
    "padding": lambda model, batch: batch,
    "positions": lambda model, batch: batch | {"position_ids": torch.arange(3, 3 + batch["input_ids"].shape[1])[None]},
    "embeddings": as_embeddings,
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["gpt2", "qwen2 sliding"])
def test_what_layers_are_called_with(name, call, attention):
    plain, converted = small_and_converted(name, torch.float64, {"anchors": 1}, attn_implementation=attention)
    batch = CALLS[call](plain, batch_for(name))
    (out, found), (expected, exact) = trained_on(converted, batch), trained_on(plain, batch)
    assert torch.equal(out.logits, expected.logits)
    assert error_of(found, exact, exact) < EXACT
    assert last_pass(converted) == "as a stack"


def test_layers_that_are_given_masks_of_their_own():
    """Sliding attention on the last layers alone."""
    model = small("qwen2 sliding")
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    full = small("qwen2")
    full.load_state_dict(model.state_dict())
    batch = batch_for("qwen2")
    (out, _), (other, _) = trained_on(convert(model), batch), trained_on(full, batch)
    assert not torch.equal(out.logits, other.logits)
    assert last_pass(model) == "as a stack"


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_get_gradients(name):
    plain, converted = small_and_converted(name, torch.float64, {"anchors": 1})
    found = []
    for model in (converted, plain):
        batch = batch_for(name, torch.float64)
        batch["pixel_values"].requires_grad_()
        trained_on(model, batch)
        found.append(batch["pixel_values"].grad)
    assert relative_error(found[:1], found[1:]) < EXACT
