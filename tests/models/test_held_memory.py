"""What converted models hold between forward and backward pass, from the allocator's own events.

All figures are a model's less those of the same model without layers: what embedding, head and loss hold.
"""

import pytest
import torch

from bench.harness.foreign import define_torchvision_operators
from resode_cuda import Reverse, convert
from tests.support.memory import held

define_torchvision_operators()
transformers = pytest.importorskip("transformers", reason="needs transformers")

DIM, TOKENS, ROWS = 64, 64, 4
VALUES = ROWS * TOKENS * DIM
STATE = 4 * VALUES
GENERATOR = 5056
"""Bytes of the CPU generator's state, which is kept of a layer that draws random numbers."""
NUMBERS = 64
"""Bytes, at most, of the numbers by which a step that runs again is compared."""
SHALLOW, DEEP = 4, 12
STORED_BITS = (8, 4, 2)
KEPT = {"nothing": {"reverse": "corrected"}, "x_0": {"reverse": "corrected", "anchors": {0}}}


def gpt(layers, dropout=0.0):
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_embd": DIM, "n_layer": layers, "n_head": 4, "n_positions": TOKENS, "vocab_size": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts, **tokens)).train()


def of_layers(layers, prepare, dropout=0.0):
    """Bytes that a model's layers hold.

    Args:
        prepare: what is done to the model before.
    """
    ids = torch.randint(64, (ROWS, TOKENS))
    model, without_layers = gpt(layers, dropout), gpt(0, dropout)
    prepare(model)
    whole, rest = (held(lambda x, m=m: m(input_ids=x, labels=x).loss, ids) for m in (model, without_layers))
    return whole - rest


def checkpointing(model):
    """Each layer checkpointed by transformers, whose method has another name since version 5."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})


def converted(**options):
    return lambda model: convert(model, **options)


def stored(bits):
    return converted(reverse=Reverse("stored", bits=bits))


@pytest.mark.parametrize("bits", STORED_BITS)
def test_each_layer_holds_its_stored_bits_alone(bits):
    shallow, deep = (of_layers(layers, stored(bits)) for layers in (SHALLOW, DEEP))
    a_layer = (bits + 0.25) / 8 * VALUES  # a scale of 8 bits for 32 values
    assert (deep - shallow) / (DEEP - SHALLOW) == pytest.approx(a_layer, rel=0.01, abs=NUMBERS)
    # The companion of the last state, and the units of its values.
    assert shallow - SHALLOW * a_layer == pytest.approx(STATE * (1 + 1 / 32), rel=0.01)


@pytest.mark.parametrize(("kept", "states"), [("nothing", 0), ("x_0", 1)])
def test_nothing_is_held_of_layers_that_are_rebuilt(kept, states):
    shallow, deep = (of_layers(layers, converted(**KEPT[kept])) for layers in (SHALLOW, DEEP))
    assert deep - shallow < 0.002 * STATE
    assert shallow == pytest.approx(states * STATE, abs=0.002 * STATE)


def test_dropout_holds_its_random_state_alone():
    """As `torch.utils.checkpoint` does."""
    for prepare in (stored(8), checkpointing):
        shallow, deep = (of_layers(layers, prepare, dropout=0.1) for layers in (SHALLOW, DEEP))
        a_layer = 8.25 / 8 * VALUES if prepare is not checkpointing else STATE
        assert (deep - shallow) / (DEEP - SHALLOW) == pytest.approx(a_layer + GENERATOR, rel=0.01)


@pytest.mark.parametrize(
    ("prepare", "most"),
    [(stored(8), 0.36), (stored(4), 0.23), (converted(**KEPT["x_0"]), 0.18)],
    ids=["8 bits", "4 bits", "x_0"],
)
def test_of_what_checkpointing_each_layer_holds(prepare, most):
    assert of_layers(DEEP, prepare) < most * of_layers(DEEP, checkpointing)


def test_a_stage_between_layers_that_stay():
    """The first block of a ResNet's stage stays as it is, and so do the other stages."""
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")

    def network(depth):
        torch.manual_seed(0)
        return convert(models.resnet.ResNet(models.resnet.BasicBlock, [1, 1 + depth, 1, 1], num_classes=5).train())

    x = torch.randn(4, 3, 32, 32)
    shallow, deep = (held(network(depth), x) for depth in (SHALLOW, DEEP))
    a_layer = 8.25 / 8 * len(x) * 128 * 4 * 4
    assert (deep - shallow) / (DEEP - SHALLOW) == pytest.approx(a_layer, rel=0.01)
