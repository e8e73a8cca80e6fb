"""A script for Hugging Face's Trainer, and the one line that converts its model.

`convert(model)` stands between making the model and handing it to the Trainer; the rest of the script is as it was. The
model keeps its class and its `state_dict`, so what the Trainer saves is an ordinary checkpoint, which `from_pretrained`
loads where this library is not installed.

    python examples/hf_trainer.py

40 seconds on 2 cores of an AMD EPYC: 67.56 MiB held plainly, 2.31 MiB converted, 63 and 97 ms a step. Held-out losses
with seeds 0, 1 and 2: 1.94, 2.03 and 1.93 plainly, 1.88, 2.11 and 1.94 converted.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from common import CHARACTERS, documentation, extra, held_bytes, mib, options, table
from torch import Tensor, nn

from resode_cuda import conversion, convert

with extra():
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed
    from transformers.utils.logging import disable_progress_bar

QUICK = {"layers": 4, "dim": 32, "length": 32, "rows": 8, "steps": 4}
USUAL = {"layers": 12, "dim": 64, "length": 64, "rows": 16, "steps": 200}
FULL = {"layers": 24, "dim": 1024, "length": 1024, "rows": 8, "steps": 2000}


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch, labels=batch).loss


def main() -> None:
    given = options(__doc__, quick=QUICK, usual=USUAL, full=FULL)
    disable_progress_bar()
    dataset = [{"input_ids": piece, "labels": piece} for piece in documentation().unfold(0, given.length, given.length)]
    learnt, held_out = dataset[:-200], dataset[-200:]
    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=given.dim,
        intermediate_size=3 * given.dim,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        max_position_embeddings=given.length,
    )
    rows = []
    for way in ("plain", "converted"):
        set_seed(given.seed)
        model = LlamaForCausalLM(config)
        if way == "converted":
            convert(model)  # the line
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model,
                TrainingArguments(
                    folder,
                    max_steps=given.steps,
                    per_device_train_batch_size=given.rows,
                    learning_rate=3e-3,
                    warmup_steps=given.steps // 10,
                    seed=given.seed,
                    use_cpu=given.device == "cpu",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=learnt,
                eval_dataset=held_out,
            )
            trainer.remove_callback(PrinterCallback)
            trained = trainer.train()
            if way == "converted":
                print(f"{conversion(model)}\n")
            batch = torch.stack([sample["labels"] for sample in learnt[: given.rows]]).to(model.device)
            held = held_bytes(model, partial(loss_of, model, batch))
            loss = trainer.evaluate()["eval_loss"]
            trainer.save_model(folder)
            loaded = LlamaForCausalLM.from_pretrained(folder).to(model.device)
        with torch.no_grad():
            are_equal = torch.equal(loaded(batch).logits, model.eval()(batch).logits)
        milliseconds = 1000 * trained.metrics["train_runtime"] / given.steps
        cells = f"{loss:.3f}", "yes" if are_equal else "no", mib(held), f"{milliseconds:.0f}"
        rows.append([way, f"{trained.training_loss:.3f}", *cells])
    print(table(["", "mean loss", "held-out loss", "loads as it was", "MiB held", "ms a step"], rows))


if __name__ == "__main__":
    main()
