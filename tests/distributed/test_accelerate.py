"""Converted models that accelerate prepares for FSDP2, on three ranks.

accelerate selects FSDP2 on accelerators alone: on CPUs it makes DDP of `FullyShardedDataParallelPlugin`
(`AcceleratorState`, 1.15). So the tests select it by hand; all else is what `Accelerator.prepare`, `backward` and
`clip_grad_norm_` do anywhere.
"""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from resode_cuda import convert
from tests.support.networks import relative_error
from tests.support.small_transformers import VOCABULARY, last_pass, small

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

COUNT, STEPS, TOKENS, ROWS = 3, 3, 16, 2
EXACT, STORED = {"anchors": 1}, {"reverse": "stored"}
LOADED_BY_ONE = {"cpu_ram_efficient_loading": True}
"""One rank has the weights, the model goes by way of torch's meta device."""
BFLOAT16 = {"mixed_precision_policy": dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), torch.bfloat16)}
"""What `mixed_precision="bf16"` selects."""
PLUGIN = {
    "fsdp_version": 2,
    "auto_wrap_policy": "transformer_based_wrap",
    "cpu_ram_efficient_loading": False,
}


def accelerator(**plugin):
    """One that trains with FSDP2 on CPUs."""
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank = str(distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(COUNT), LOCAL_WORLD_SIZE=str(COUNT))
    settings = FullyShardedDataParallelPlugin(**PLUGIN | plugin)
    found = accelerate.Accelerator(cpu=True, fsdp_plugin=settings)
    found.state.distributed_type, found.state.fsdp_plugin = DistributedType.FSDP, settings
    assert found.is_fsdp2
    return found


def saved(forward):
    """Bytes of all tensors that autograd has saved after a forward pass, what FSDP has freed since left out."""
    storages = {}

    def note(tensor):
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        storages[storage._cdata] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _alive = forward()
    return sum(storage.nbytes() for storage in storages.values())


def trained(family, settings, dtype, plugin, changes):
    """Losses and gradients of some steps of training, what is held of a forward pass, and how layers ran last."""
    helper = accelerator(**plugin)
    model = small(family, dtype, **changes)
    if settings is not None:
        convert(model, **settings)
    model, optimizer = helper.prepare(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    losses, gradients = [], []
    for step in range(STEPS):
        torch.manual_seed(COUNT * step + distributed.get_rank())
        ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        helper.backward(loss)
        helper.clip_grad_norm_(model.parameters(), 1.0)
        gradients.append([p.grad.full_tensor() for p in model.parameters()])
        optimizer.step()
        losses.append(loss.item())
    memory = saved(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    ran = None if settings is None else last_pass(model)
    return SimpleNamespace(losses=losses, gradients=gradients, memory=memory, ran=ran)


def compared(mesh, family, settings, dtype, plugin, changes):
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, converted = (trained(family, given, dtype, plugin, changes) for given in (None, settings))
    # accelerate tells transformers by variables that FSDP is used, also in later jobs of these processes.
    os.environ.clear()
    os.environ.update(before)
    losses = [abs(a - b) / b for a, b in zip(converted.losses, plain.losses, strict=True)]
    errors = [relative_error(a, b) for a, b in zip(converted.gradients, plain.gradients, strict=True)]
    return max(losses), max(errors), converted.memory / plain.memory, converted.ran


@pytest.mark.parametrize(
    ("family", "settings", "dtype", "plugin", "limit"),
    [
        ("gpt2", EXACT, torch.float64, {}, 1e-12),
        ("llama", EXACT, torch.float32, LOADED_BY_ONE, 1e-6),
        ("llama", STORED, torch.float32, {}, 1e-2),
        ("gpt2", STORED, torch.float32, BFLOAT16, 2e-2),
    ],
    ids=["exact, float64", "exact, float32", "stored, float32", "stored, bfloat16"],
)
def test_a_converted_model_trains_as_the_plain_one_and_as_one_stack(ranks, family, settings, dtype, plugin, limit):
    for loss, gradient, memory, ran in ranks.run(compared, family, settings, dtype, plugin, {}, count=COUNT):
        assert max(loss, gradient) < limit
        assert memory < 0.25  # FSDP keeps the root's weights gathered, beside what layers store
        assert ran == "as a stack"


def test_checkpointing_by_accelerate_on_top_is_right_and_in_vain(ranks):
    """It holds the states of all layers, as without conversion, and runs each layer once more."""
    # With dropout accelerate's own recomputation draws other numbers: `preserve_rng_state=False`.
    plugin, changes = {"activation_checkpointing": True}, {"attention_dropout": 0.0}
    found = ranks.run(compared, "llama", EXACT, torch.float64, plugin, changes, count=COUNT)
    for loss, gradient, memory, _ in found:
        assert max(loss, gradient) < 1e-12
        assert memory == 1
