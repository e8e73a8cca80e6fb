"""What a rank holds between forward and backward pass whose blocks, or layers, `fully_shard` shards one by one."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from resode_cuda import ResidualStack, Reverse, convert
from tests.support.memory import allocations
from tests.support.networks import half_square, mlp
from tests.support.small_transformers import batch_for, small

SHALLOW, DEEP = 4, 12
DIM, ROWS = 32, 64
NUMBERS = 64
"""Bytes, at most, of the numbers by which a step that runs again is compared."""


def of_a_step(held, *args):
    """Bytes that one more step holds.

    Args:
        held: from the number of steps, and these arguments, to all bytes.
    """
    return (held(DEEP, *args) - held(SHALLOW, *args)) / (DEEP - SHALLOW)


def by_stack(depth, mesh, reverse):
    stack = ResidualStack([mlp(DIM, DIM) for _ in range(depth)], reverse=reverse)
    for block in stack:
        fully_shard(block, mesh=mesh)
    model = fully_shard(nn.Sequential(nn.Linear(DIM, DIM), stack), mesh=mesh)
    x = torch.randn(ROWS, DIM)
    for _ in range(2):
        half_square(model(x)).backward()
    return sum(allocations(lambda: model(x)))


@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
def test_bytes_held_do_not_depend_on_depth(mesh, reverse):
    assert of_a_step(by_stack, mesh, reverse) <= NUMBERS


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_step_holds_its_stored_bits_alone(mesh, bits):
    wanted = DIM * ROWS * (bits + 0.25) / 8
    assert of_a_step(by_stack, mesh, Reverse("stored", bits=bits)) == pytest.approx(wanted, abs=NUMBERS)


def by_model(depth, mesh, bits):
    model = small("gpt2", n_layer=depth, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    convert(model, reverse=Reverse("stored", bits=bits))
    for layer in model.transformer.h:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = batch_for("gpt2")
    for _ in range(2):
        model(**batch, use_cache=False).loss.backward()
    return sum(allocations(lambda: model(**batch, use_cache=False).loss))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_converted_layer_holds_its_stored_bits_alone(mesh, bits):
    wanted = batch_for("gpt2")["input_ids"].numel() * 32 * (bits + 0.25) / 8
    assert of_a_step(by_model, mesh, bits) == pytest.approx(wanted, abs=2 * NUMBERS)
