"""What else models of Hugging Face transformers are asked for, and what is done to them, while they are converted."""

import copy
import io
import pickle

import pytest
import torch

from resode_cuda import conversion, convert, unconvert
from tests.support.networks import relative_error
from tests.support.small_transformers import (
    TOKENS,
    batch_for,
    last_pass,
    small,
    small_and_converted,
    trained_on,
    transformers,
)

# The names of caches among the arguments are about to change.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
STORED = 5e-3
"""The most that gradients of fresh models are off by here, all together; measured up to 1.5e-3."""


def of_hidden_states(out):
    return out.loss + sum(state.square().mean() for state in out.hidden_states)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "dinov2"])
def test_hidden_states_and_attention_maps(name):
    """Each pass that is asked for them runs the layers one by one, the next one does not."""
    plain, converted = small_and_converted(name, attn_implementation="eager")
    batch, wanted = batch_for(name), {"output_hidden_states": True, "output_attentions": True}
    (out, found), (expected, exact) = (
        trained_on(model, batch, of_hidden_states, **wanted) for model in (converted, plain)
    )
    for got, own in ((out.hidden_states, expected.hidden_states), (out.attentions, expected.attentions)):
        assert len(got) == len(own)
        assert all(torch.equal(a, b) for a, b in zip(got, own, strict=True))
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    assert last_pass(converted).startswith("layer by layer: ")
    out, _ = trained_on(converted, batch, of_hidden_states, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))
    assert last_pass(converted) == "as a stack"
    trained_on(converted, batch)
    assert last_pass(converted) == "as a stack"


def test_hidden_states_that_the_models_own_loop_collects():
    """They are tensors, with gradients."""
    plain, converted = small_and_converted("mamba", torch.float64, {"anchors": 1})
    batch = batch_for("mamba")
    (out, found), (expected, exact) = (
        trained_on(model, batch, of_hidden_states, output_hidden_states=True) for model in (converted, plain)
    )
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))
    assert all(isinstance(state, torch.Tensor) for state in out.hidden_states)
    assert relative_error([found[name] for name in exact], list(exact.values())) < 1e-10
    assert last_pass(converted) == "as a stack"


def test_a_cache_that_a_training_pass_left_empty_is_refused():
    _, converted = small_and_converted("llama")
    ids = batch_for("llama")["input_ids"]
    cache = converted(ids[:, :6], use_cache=True).past_key_values
    for train in (True, False):
        converted.train(train)
        with pytest.raises(ValueError, match=r"DynamicCache of an earlier training pass.*use_cache=False"):
            converted(ids[:, 6:], past_key_values=cache)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2 sliding", "mamba"])
def test_generated_tokens_are_the_same(name, mode):
    plain, converted = small_and_converted(name)
    prompt, batch = batch_for(name)["input_ids"][:, :5], batch_for(name)
    trained_on(converted, batch)
    found = []
    for model in (converted, plain):
        model.train(mode == "train")
        torch.manual_seed(0)
        found.append(model.generate(prompt, max_new_tokens=6, do_sample=True))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["gpt2", "qwen2 sliding"])
def test_a_cache_that_holds_keys_is_attended_to_and_grows(name):
    plain, converted = small_and_converted(name)
    ids = batch_for(name)["input_ids"]
    found = []
    for model in (converted, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            cache = model(ids[:, :5], use_cache=True).past_key_values
        out, gradients = trained_on(model, {"input_ids": ids[:, 5:], "labels": ids[:, 5:]}, past_key_values=cache)
        assert cache.get_seq_length() == TOKENS
        found.append((out.logits, gradients))
    (logits, gradients), (expected, exact) = found
    assert torch.equal(logits, expected)
    assert all(torch.equal(gradients[name], exact[name]) for name in exact)
    assert "holds keys already" in last_pass(converted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_a_training_pass_leaves_caches_empty(name):
    """Also its first one, which looks at what layers return."""
    plain, converted = small_and_converted(name)
    batch = batch_for(name)
    _, exact = trained_on(plain, batch)
    for _ in range(2):
        out, found = trained_on(converted, batch, use_cache=True)
        assert relative_error([found[name] for name in exact], list(exact.values())) < STORED
        assert last_pass(converted) == "as a stack"
        if name != "mamba":
            assert out.past_key_values.get_seq_length() == 0
    own = transformers.DynamicCache(config=plain.config)
    trained_on(converted, batch, **{"cache_params" if name == "mamba" else "past_key_values": own})
    assert last_pass(converted) == "as a stack"


def test_a_model_that_is_cast_between_passes():
    """Mamba's states are of float32 between layers of 16 bits."""
    plain, converted = small_and_converted("mamba")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plain.to(dtype), converted.to(dtype)
        (out, _), (expected, _) = (trained_on(model, batch_for("mamba")) for model in (converted, plain))
        assert torch.equal(out.logits, expected.logits)
        assert last_pass(converted) == "as a stack"


FROZEN = {
    "the first layers": lambda name: not any(part in name for part in ("embed", "layers.0", "layers.1")),
    "all but the head": lambda name: name.startswith("lm_head"),
    "all but the norms": lambda name: "norm" in name,
    "all layers": lambda name: "layers" not in name,
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen):
    plain, converted = small_and_converted("llama", tie_word_embeddings=False)
    for model in (plain, converted):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(FROZEN[frozen](name))
    batch = batch_for("llama")
    (out, found), (expected, exact) = trained_on(converted, batch), trained_on(plain, batch)
    assert torch.equal(out.logits, expected.logits)
    assert found.keys() == exact.keys()
    assert relative_error([found[name] for name in exact], list(exact.values())) < STORED


def test_passes_without_gradients():
    plain, converted = small_and_converted("llama")
    batch, found = batch_for("llama"), []
    for model in (converted, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model(**batch))
    assert torch.equal(found[0].logits, found[1].logits)
    assert found[0].past_key_values.get_seq_length() == TOKENS
    assert last_pass(converted) == "none yet"


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_a_saved_model_is_a_plain_one(name, tmp_path):
    plain, converted = small_and_converted(name)
    batch = batch_for(name)
    trained_on(converted, batch)
    converted.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert "resode" not in (tmp_path / "config.json").read_text()
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="must be converted"):
        conversion(loaded)
    assert torch.equal(loaded(**batch).logits, converted.eval()(**batch).logits)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_train_by_themselves(copied):
    _, converted = small_and_converted("llama")
    batch = batch_for("llama")
    _, exact = trained_on(converted, batch)
    other = copied(converted)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    converted.gradient_checkpointing_disable()
    _, found = trained_on(other, batch)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    assert last_pass(other) == "as a stack"


def test_training_between_convert_and_unconvert():
    """The optimizer was made before; what was trained loads into a fresh model."""
    model, batch = small("llama"), batch_for("llama")
    start, plain, file = copy.deepcopy(model), copy.deepcopy(model), io.BytesIO()
    forwards = [layer.forward.__func__ for layer in model.model.layers]
    optimizers = [torch.optim.SGD(trained.parameters(), lr=0.1) for trained in (model, plain)]
    convert(model)
    for seed in range(2):
        for trained, optimizer in zip((model, plain), optimizers, strict=True):
            trained_on(trained, batch, seed=seed)
            optimizer.step()
    assert last_pass(model) == "as a stack"
    unconvert(model)
    assert [layer.forward.__func__ for layer in model.model.layers] == forwards
    moved, expected = (
        [(a - b).detach() for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
        for trained in (model, plain)
    )
    assert relative_error(moved, expected) < STORED
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = small("llama")
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)
