"""Small models of Hugging Face transformers in the tests: five layers of 32 channels, and batches for them."""

import copy

import pytest
import torch

from bench.harness.foreign import define_torchvision_operators
from resode_cuda import conversion, convert

define_torchvision_operators()
transformers = pytest.importorskip("transformers", reason="needs transformers")
transformers.logging.set_verbosity_error()

VOCABULARY, LAYERS, TOKENS = 64, 5, 12
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "attention_dropout": 0.1}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 10,
    "hidden_dropout_prob": 0.1,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4}

FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen2 sliding": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED | SLIDING),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 6}),
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA | {"pad_token_id": 0}),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE | {"intermediate_size": 64}),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        IMAGE | {"drop_path_rate": 0.3, "layerscale_value": 0.5, "mlp_ratio": 2},
    ),
}
IMAGES = ("vit", "dinov2")


def small(name, dtype=torch.float32, **changes):
    """A model in train mode.

    Args:
        changes: of the configuration's entries.
    """
    model, config, entries = FAMILIES[name]
    entries = entries | changes
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**entries)).to(dtype).train()


def batch_for(name, dtype=torch.float32, padded=True):
    """Keywords of a training pass, the second text shorter than the first."""
    torch.manual_seed(1)
    if name in IMAGES:
        return {"pixel_values": torch.randn(3, 3, 16, 16).to(dtype), "labels": torch.tensor([1, 7, 3])}
    ids = torch.randint(3, VOCABULARY, (2, TOKENS))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 10:] = 0  # of windows of 4 tokens, each still sees one
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def small_and_converted(name, dtype=torch.float32, settings=None, **changes):
    """A model, and its copy that is converted.

    Args:
        settings: of `convert`.
    """
    plain = small(name, dtype, **changes)
    return plain, convert(copy.deepcopy(plain), **(settings or {}))


def only_loss(out):
    return out.loss


def trained_on(model, batch, loss=only_loss, seed=3, **kwargs):
    """What the model returns for a batch, and the gradients by their parameters' names."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**batch, **kwargs)
    loss(out).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def last_pass(model):
    """How the last training pass ran the only stage."""
    (stage,) = conversion(model).stages
    return stage.last_pass
