"""Models of transformers and timm, converted: what their layers hold between forward and backward pass, and the time of
a training step, beside the model as it is and beside its own checkpointing of each layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from resode_cuda import Reverse, convert

from ..harness import memory
from ..harness.foreign import Job, jobs, own_checkpointing, without_layers
from ..harness.tables import Table, Target, mebibytes, relative_time
from ..harness.timing import Spread, interleaved, ratios
from ..options import Options

PLAIN, CHECKPOINT = "plain", "own checkpointing"
CONVERTED: dict[str, dict[str, Any]] = {
    "stored, 8 bits": {},
    "stored, 4 bits": {"reverse": Reverse("stored", bits=4)},
    "x_0 kept": {"reverse": "corrected", "anchors": {0}},
}
OF_CHECKPOINT = {"stored, 8 bits": 0.36, "stored, 4 bits": 0.23, "x_0 kept": 0.18}
"""The most that the layers of the deepest GPT-2 may hold, of what they hold with checkpointing."""
FLAT = 1.1
"""How much more the deepest model's layers may hold than the shallowest's where nothing is stored."""


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    found = jobs(options.quick)
    task = progress.add_task("models", total=2 * sum(len(job.depths) for job in found))
    prepared = []
    for job in found:
        for depth in job.depths:
            models = _models(job, depth, options.seed, device)
            torch.manual_seed(options.seed)
            x = job.batch().to(device)
            steps = {mode: partial(_step, job, model, x) for mode, model in models.items()}
            prepared.append((job, depth, models, x, interleaved(steps, options.rounds, device)))
            progress.advance(task)
    rows: list[dict[str, Any]] = []
    for job, depth, models, x, seconds in prepared:  # after all timing: profiled processes are slower
        rows += _rows(job, depth, models, x, seconds, device)
        progress.advance(task)
    return {"rows": rows}


def _models(job: Job, depth: int, seed: int, device: torch.device) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    plain = job.make(depth).to(device).train()
    converted = {
        mode: convert(copy.deepcopy(plain), [job.container], **settings) for mode, settings in CONVERTED.items()
    }
    for model in converted.values():
        _quiet(model)
    return {PLAIN: plain, CHECKPOINT: own_checkpointing(copy.deepcopy(plain)), **converted}


def _quiet(model: nn.Module) -> None:
    """Only memory and time are measured: random layers are not to be told of as hard to rebuild."""
    for layer in model.modules():
        stage = getattr(layer.__dict__.get("forward"), "stage", None)
        if stage is not None:
            stage.stack.on_drift = "ignore"


def _step(job: Job, model: nn.Module, x: Tensor) -> None:
    job.loss(model, x).backward()


def _rows(
    job: Job,
    depth: int,
    models: Mapping[str, nn.Module],
    x: Tensor,
    seconds: Mapping[str, list[float]],
    device: torch.device,
) -> list[dict[str, Any]]:
    def memory_of(model: nn.Module) -> memory.StepMemory:
        forward: Callable[[], Tensor] = partial(job.loss, model, x)
        forward().backward()
        return memory.measure(forward, device)

    without = without_layers(copy.deepcopy(models[PLAIN]), job.container)
    rest = memory_of(without).held
    rest_checkpointed = memory_of(own_checkpointing(without)).held  # of ConvNeXt the other stages, too
    found: list[dict[str, Any]] = []
    for mode, model in models.items():
        used = memory_of(model)
        found.append(
            {
                "model": job.name,
                "layers": depth,
                "mode": mode,
                "held_bytes": used.held,
                "held_by_layers_bytes": used.held - (rest_checkpointed if mode == CHECKPOINT else rest),
                "peak_bytes": used.peak,
                "seconds": seconds[mode],
                "relative_time": asdict(ratios(seconds[mode], seconds[PLAIN])),
                "of_checkpoint_time": asdict(ratios(seconds[mode], seconds[CHECKPOINT])),
            }
        )
    baseline = next(row for row in found if row["mode"] == CHECKPOINT)["held_by_layers_bytes"]
    for row in found:
        row["of_checkpoint"] = row["held_by_layers_bytes"] / baseline
    return found


def tables(figures: dict[str, Any]) -> list[Table]:
    table = Table(
        "Models: what converted layers hold, and the time of a step",
        ["model", "mode", "N", "held", "of own", "peak", "time"],
        note="N layers. Held: MiB that the layers hold between forward and backward pass, which is what the model "
        "holds less what it holds without them (x_0 kept: and nothing stored); of own: of that with its own "
        "checkpointing. Peak: of the step, in MiB, gradients of parameters aside. Time of a training step relative to "
        "plain in the same round: median ± half the distance of the quartiles.",
    )
    for row in figures["rows"]:
        figures_of_row = mebibytes(row["held_by_layers_bytes"]), f"{row['of_checkpoint']:.3f}"
        time = relative_time(Spread(**row["relative_time"]))
        shown = row["model"], row["mode"], str(row["layers"]), *figures_of_row, mebibytes(row["peak_bytes"]), time
        table.rows.append(shown)
    return [table]


def targets(figures: dict[str, Any]) -> list[Target]:
    rows = [row for row in figures["rows"] if row["model"] == "GPT-2"]
    shallow, deep = (depth(row["layers"] for row in rows) for depth in (min, max))
    found = []
    for row in rows:
        if row["layers"] == deep and row["mode"] in OF_CHECKPOINT:
            what = f"models, GPT-2 of {deep} layers, {row['mode']}: held, of checkpointing's"
            found.append(Target(what, row["of_checkpoint"], OF_CHECKPOINT[row["mode"]]))
    flat = "x_0 kept"
    held = {row["layers"]: row["held_by_layers_bytes"] for row in rows if row["mode"] == flat}
    found.append(Target(f"models, GPT-2, {flat}: {deep} layers over {shallow}", held[deep] / held[shallow], FLAT))
    return found


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []
