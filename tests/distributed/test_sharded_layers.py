"""Converted models whose layers `fully_shard` shards one by one."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from resode_cuda import Reverse, convert
from tests.support.networks import relative_error
from tests.support.sharded import Counted, gathered
from tests.support.small_transformers import batch_for, last_pass, small

SETTINGS = {
    "stored": {"reverse": "stored"},
    "exact": {"anchors": 1},
    "rebuilt": {"reverse": Reverse("step", corrections=4), "anchors": {0}},
}
WITHOUT_DROPOUT = {
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "llama": {"attention_dropout": 0.0},
    "vit": {"hidden_dropout_prob": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def layers_of(model):
    (container,) = (module for name, module in model.named_modules() if name.endswith((".h", ".layers", ".layer")))
    return container


def sharded(mesh, family, settings, **options):
    """A model, converted unless the settings are None, whose layers and root are sharded."""
    model = small(family, **WITHOUT_DROPOUT[family])
    if settings is not None:
        convert(model, **settings)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model, family):
    batch = batch_for(family)
    return model(**batch, **({"use_cache": False} if family in ("gpt2", "llama") else {})).loss


def trained(mesh, family, settings, options=None):
    """Gradients of the second training pass, summed over ranks, its collectives, and how the layers ran."""
    model = sharded(mesh, family, settings, **(options or {}))
    for _ in range(2):
        model.zero_grad()
        with Counted() as counted:
            loss_of(model, family).backward()
    found = gathered([p for p in model.parameters() if p.grad is not None], mesh)
    return found, counted.collectives, None if settings is None else last_pass(model)


def compared(mesh, family, settings, options=None):
    exact, wanted, _ = trained(mesh, family, None, options)
    found, collectives, ran = trained(mesh, family, settings, options)
    return relative_error(found, exact), wanted, collectives, ran


@pytest.mark.parametrize("family", WITHOUT_DROPOUT)
def test_layers_that_are_sharded_run_as_one_stack(ranks, family):
    for error, wanted, collectives, ran in ranks.run(compared, family, SETTINGS["exact"]):
        assert error < 1e-6
        assert collectives == wanted
        assert ran == "as a stack"


@pytest.mark.parametrize("mode", ["stored", "rebuilt"])
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_solvers(ranks, mode, reshard):
    options = {"reshard_after_forward": reshard}
    for error, wanted, collectives, ran in ranks.run(compared, "gpt2", SETTINGS[mode], options):
        assert error < 1e-2
        assert collectives == wanted
        assert ran == "as a stack"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mixed_precision(ranks, family):
    """The same policy without the adjoint: bfloat16 throughout, gradients reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for error, wanted, collectives, ran in ranks.run(compared, family, SETTINGS["exact"], {"mp_policy": policy}):
        assert error < torch.finfo(torch.bfloat16).eps
        assert collectives == wanted
        assert ran == "as a stack"
