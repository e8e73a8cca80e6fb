"""Converted models in the hands of trainers: their switches, adapters, mixed precision and averages."""

import copy

import pytest
import torch

from resode_cuda import conversion, convert, unconvert
from tests.support.networks import relative_error
from tests.support.small_transformers import (
    LAYERS,
    batch_for,
    last_pass,
    small,
    small_and_converted,
    trained_on,
    transformers,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Of loaders of data, loggers and accelerators that these small runs do without.
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|pytorch_lightning|torch|accelerate|peft).*"),
]
STORED = 5e-3
"""The most that gradients, and steps of plain descent, are off by here, all together; measured up to 4.6e-3 with
autocast, else 2e-3."""


def evaluations(model, batch):
    """How often a layer's attention is computed in a training step."""
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return attention(*args, **kwargs)

    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        trained_on(model, batch)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    return count


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_the_models_own_switch(name):
    """Each layer runs twice, as a stack or where transformers checkpoints it; once without either; never thrice."""
    plain, converted = small_and_converted(name)
    batch = batch_for(name)
    trained_on(converted, batch)
    assert evaluations(converted, batch) == 2 * LAYERS
    for options in ({}, {"use_reentrant": False}):
        converted.gradient_checkpointing_enable(options)
        assert evaluations(converted, batch) == 2 * LAYERS
        assert last_pass(converted) == "as a stack"
    converted.gradient_checkpointing_disable()
    assert evaluations(converted, batch) == LAYERS
    assert last_pass(converted) == "layer by layer: switched off"
    assert conversion(converted).stages[0].plan == "switched off"
    assert evaluations(unconvert(converted), batch) == evaluations(plain, batch) == LAYERS


def test_what_was_switched_on_before_is_on_again_without_the_stack():
    model, batch = small("llama"), batch_for("llama")
    model.gradient_checkpointing_enable()
    convert(model)
    trained_on(model, batch)
    assert last_pass(model) == "as a stack"
    unconvert(model)
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert evaluations(model, batch) == 2 * LAYERS


def moves(models, start):
    return [[(a - b).detach() for a, b in zip(model.parameters(), start.parameters(), strict=True)] for model in models]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(checkpointing, tmp_path):
    pytest.importorskip("accelerate", reason="the trainer needs accelerate")
    plain, converted = small_and_converted("llama")
    start, batch = copy.deepcopy(plain), batch_for("llama")
    rows = [{name: value[row] for name, value in batch.items()} for row in (0, 1, 1, 0)]
    for model in (plain, converted):
        settings = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            optim="sgd",
            learning_rate=0.1,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        transformers.Trainer(model=model, args=settings, train_dataset=rows).train()
    assert last_pass(converted) == "as a stack"
    assert not any(layer.gradient_checkpointing for layer in converted.model.layers)
    found, expected = moves((converted, plain), start)
    assert relative_error(found, expected) < STORED


@pytest.mark.parametrize("order", ["convert, then adapt", "adapt, then convert"])
def test_low_rank_adapters(order):
    """Two of them on a frozen base, one after the other, then merged into it."""
    peft = pytest.importorskip("peft", reason="needs peft")
    plain, converted = small("llama"), small("llama")
    if order.startswith("convert"):
        convert(converted)

    def adapted(model):
        torch.manual_seed(0)
        settings = {"init_lora_weights": False, "lora_dropout": 0.1}
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj", "up_proj"], **settings))
        return model

    plain, converted = adapted(plain), adapted(converted)
    if order.startswith("adapt"):
        convert(converted)
    converted.gradient_checkpointing_enable()
    batch = batch_for("llama")

    def compare():
        (out, found), (expected, exact) = trained_on(converted, batch), trained_on(plain, batch)
        assert torch.equal(out.logits, expected.logits)
        assert found.keys() == exact.keys()
        assert relative_error([found[name] for name in exact], list(exact.values())) < STORED
        assert last_pass(converted) == "as a stack"
        return set(exact)

    trained = []
    for name in ("default", "other", "default"):
        for model in (plain, converted):
            model.set_adapter(name)
        trained.append(compare())
    assert trained[0] == trained[2]
    assert trained[0].isdisjoint(trained[1])
    assert converted.state_dict().keys() == plain.state_dict().keys()
    plain, converted = plain.merge_and_unload(), converted.merge_and_unload()
    for model in (plain, converted):
        model.requires_grad_(True)
    assert not any("lora" in name for name in compare())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    plain, converted = small_and_converted("llama")
    start, batch = copy.deepcopy(plain), batch_for("llama")
    for model in (plain, converted):
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for seed in range(2):
            optimizer.zero_grad()
            torch.manual_seed(seed)
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
    assert last_pass(converted) == "as a stack"
    found, expected = moves((converted, plain), start)
    assert relative_error(found, expected) < 2 * STORED


def test_lightning():
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, number):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    plain, converted = small_and_converted("llama")
    start, batch = copy.deepcopy(plain), batch_for("llama")
    for model in (plain, converted):
        torch.manual_seed(0)
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Task(model), torch.utils.data.DataLoader([batch, batch], batch_size=None))
    assert last_pass(converted) == "as a stack"
    found, expected = moves((converted, plain), start)
    assert relative_error(found, expected) < STORED


def test_scaled_losses_under_autocast():
    plain, converted = small_and_converted("gpt2")
    batch, found = batch_for("gpt2"), []
    for model in (converted, plain):
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10
    (loss, gradients), (expected, exact) = found
    assert torch.equal(loss, expected)
    assert relative_error(gradients, exact) < STORED
    assert last_pass(converted) == "as a stack"


def test_averages_of_parameters():
    _, converted = small_and_converted("llama")
    batch = batch_for("llama")
    average = torch.optim.swa_utils.AveragedModel(
        converted, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    for seed in range(2):
        trained_on(converted, batch, seed=seed)
        optimizer.step()
        average.update_parameters(converted)
    fresh = small("llama")
    fresh.load_state_dict(average.module.state_dict())
    out = average.eval()(**batch).logits
    assert torch.equal(out, fresh.eval()(**batch).logits)
    assert not torch.equal(out, converted.eval()(**batch).logits)
