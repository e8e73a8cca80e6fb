"""Models of transformers and timm, trained for seconds: gradients of their converted layers, and fine-tuning by them.

Each model learns one half of its data; fine-tuning goes on with the other half, and its held-out loss is compared.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pydoc_data.topics
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from resode_cuda import Reverse, conversion, convert, unconvert

from ..harness.foreign import define_torchvision_operators
from ..harness.gradients import relative_error
from ..harness.tables import Table, Target, error
from ..options import Options

EXACT = "exact"
CONVERTED: dict[str, dict[str, Any]] = {
    "stored, 8 bits": {},
    "stored, 4 bits": {"reverse": Reverse("stored", bits=4)},
    "x_0 kept": {"reverse": "corrected", "anchors": {0}},
    "nothing stored": {"reverse": "corrected"},
}
PLANNED, AUTOCAST = "as calibrated", "autocast itself"
STEPS, FINE_RATE = 40, 3e-4
NEAR = 0.01
"""How much worse than exact fine-tuning the held-out loss may end."""
TOKENS, ROWS, LAYERS, DIM = 64, 16, 8, 64
MASK, MASKED = 127, 0.15
"""The token that hides others from BERT, and the share that it hides."""

Sample = Callable[[torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Task:
    """A model and its data; samples are batches of what it learns first, what it is tuned on, and what is held out."""

    name: str
    container: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    learned: Sample
    tuned: Sample
    held_out: Sample


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    define_torchvision_operators()
    steps = 5 if options.quick else 300
    tasks = [_gpt(), _bert(), _vit()]
    bar = progress.add_task("finetuning", total=len(tasks) * (2 + len(CONVERTED) + 2))
    rows = []
    for task in tasks:
        torch.manual_seed(options.seed)
        model = task.model().to(device).train()
        _train(task, model, task.learned, steps, 2e-3, options.seed)
        progress.advance(bar)
        errors = _errors(task, model, options.seed)
        progress.advance(bar)
        losses, plans = {}, {}
        for mode, settings in {EXACT: None, **CONVERTED, PLANNED: {"batch": _batch(task, options.seed)}}.items():
            losses[mode], plans[mode] = _tuned(task, model, settings, 2 if options.quick else STEPS, options.seed)
            progress.advance(bar)
        rows.append({"model": task.name, "errors": errors, "losses": losses, "plan": plans[PLANNED]})
    return {"rows": rows}


def _train(task: Task, model: nn.Module, sample: Sample, steps: int, rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, sample(generator)).backward()
        optimizer.step()


def _batch(task: Task, seed: int) -> dict[str, Tensor]:
    return task.tuned(torch.Generator().manual_seed(seed + 1))


def _errors(task: Task, model: nn.Module, seed: int) -> dict[str, float]:
    """Relative errors of the layers' gradients in float64; of autocast in float32."""
    batch = _batch(task, seed)
    wide = copy.deepcopy(model).double()
    exact = _gradients(task, wide, batch)
    found = {}
    for mode, settings in CONVERTED.items():
        found[mode] = relative_error(_gradients(task, _converted(task, wide, settings), batch), exact)
        unconvert(wide)
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
        found[AUTOCAST] = relative_error(_gradients(task, model, batch), exact)
    return found


def _gradients(task: Task, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    dtype = next(model.parameters()).dtype
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    layers = list(model.get_submodule(task.container).parameters())
    return torch.autograd.grad(task.loss(model, given), layers)


def _converted(task: Task, model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    convert(model, [task.container], loss=None, **settings)
    for layer in model.get_submodule(task.container).children():
        layer.forward.stage.stack.on_drift = "ignore"  # type: ignore[attr-defined]
    return model


def _tuned(task: Task, model: nn.Module, settings: dict[str, Any] | None, steps: int, seed: int) -> tuple[float, str]:
    """The held-out loss after fine-tuning a copy, and how it got its gradients."""
    tuned, plan = copy.deepcopy(model), EXACT
    if settings is not None:
        if "batch" in settings:
            batch = settings["batch"]
            convert(_WithLoss(task, tuned), [f"model.{task.container}"], batch=(batch,))
        else:
            _converted(task, tuned, settings)
        plan = conversion(tuned).stages[0].plan
    _train(task, tuned, task.tuned, steps, FINE_RATE, seed + 2)
    generator = torch.Generator().manual_seed(seed + 3)
    with torch.no_grad():
        losses = [task.loss(tuned.eval(), task.held_out(generator)).item() for _ in range(16)]
    return statistics.fmean(losses), plan


class _WithLoss(nn.Module):
    """A model and its loss in one, as trainers' modules are."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.task.loss(self.model, batch)


def _text() -> tuple[Tensor, Tensor, Tensor]:
    """Python's help texts, the source of a module, and the end of that."""
    texts = "\n".join(pydoc_data.topics.topics.values()), inspect.getsource(statistics)
    topics, source = (torch.tensor(list(text.encode("ascii", "ignore"))) for text in texts)
    return topics, source[:-20_000], source[-20_000:]


def _pieces(text: Tensor) -> Callable[[torch.Generator], Tensor]:
    def piece(generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(text) - TOKENS, (ROWS, 1), generator=generator)
        return text[starts + torch.arange(TOKENS)]

    return piece


def _sizes() -> dict[str, int]:
    return {"vocab_size": 128, "num_hidden_layers": LAYERS, "hidden_size": DIM, "num_attention_heads": 4}


def _gpt() -> Task:
    def model() -> nn.Module:
        import transformers

        settings = {"n_positions": TOKENS, "bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_sizes(), **settings, **dropout))

    def sample(text: Tensor) -> Sample:
        piece = _pieces(text)
        return lambda generator: {"input_ids": piece(generator)}

    return Task("GPT-2", "transformer.h", model, _next_token, *map(sample, _text()))


def _next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = batch["input_ids"]
    logits = model(input_ids=x, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def _bert() -> Task:
    def model() -> nn.Module:
        import transformers

        settings = {"intermediate_size": 4 * DIM, "max_position_embeddings": TOKENS}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(transformers.BertConfig(**_sizes(), **settings, **dropout))

    def sample(text: Tensor) -> Sample:
        piece = _pieces(text)

        def batch(generator: torch.Generator) -> dict[str, Tensor]:
            x = piece(generator)
            return {"input_ids": x, "is_hidden": torch.rand(x.shape, generator=generator) < MASKED}

        return batch

    return Task("BERT", "bert.encoder.layer", model, _hidden_token, *map(sample, _text()))


def _hidden_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x, is_hidden = batch["input_ids"], batch["is_hidden"]
    logits = model(input_ids=x.masked_fill(is_hidden, MASK)).logits
    return F.cross_entropy(logits[is_hidden], x[is_hidden])


def _vit() -> Task:
    def model() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, embed_dim=DIM, depth=LAYERS, num_heads=4, num_classes=10
        )

    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(found.target)

    def sample(begin: int, end: int) -> Sample:
        def batch(generator: torch.Generator) -> dict[str, Tensor]:
            chosen = torch.randint(begin, end, (4 * ROWS,), generator=generator)
            return {"images": images[chosen], "labels": labels[chosen]}

        return batch

    bounds = itertools.pairwise((0, 700, 1400, len(labels)))
    return Task("ViT", "blocks", model, _class_of_image, *(sample(*pair) for pair in bounds))


def _class_of_image(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])


def tables(figures: dict[str, Any]) -> list[Table]:
    modes = [*CONVERTED, AUTOCAST]
    errors = Table(
        "Trained models, converted: gradient errors of the layers",
        ["model", *modes],
        note="Relative error of all layers' gradients, float64; autocast itself: backprop in bfloat16 autocast of "
        "float32. x_0 kept, nothing stored: states rebuilt by “corrected”.",
    )
    losses = Table(
        f"Fine-tuning by {STEPS} steps: held-out loss",
        ["model", EXACT, *CONVERTED, PLANNED, "plan"],
        note="Difference to exact fine-tuning, whose loss the first column has. As calibrated: what convert chose on a "
        "batch at the tolerance of autocast's own error.",
    )
    for row in figures["rows"]:
        errors.rows.append((row["model"], *(error(row["errors"][mode]) for mode in modes)))
        exact = row["losses"][EXACT]
        differences = (f"{row['losses'][mode] - exact:+.4f}" for mode in (*CONVERTED, PLANNED))
        losses.rows.append((row["model"], f"{exact:.4f}", *differences, row["plan"]))
    return [errors, losses]


def targets(figures: dict[str, Any]) -> list[Target]:
    found = []
    for row in figures["rows"]:
        for mode in ("stored, 8 bits", PLANNED):
            worse = row["losses"][mode] - row["losses"][EXACT]
            found.append(Target(f"finetuning, {row['model']}, {mode}: loss above exact fine-tuning's", worse, NEAR))
        eight, own = row["errors"]["stored, 8 bits"], row["errors"][AUTOCAST]
        found.append(Target(f"finetuning, {row['model']}: error with 8 bits over autocast's own", eight / own, 1.0))
    return found


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []
