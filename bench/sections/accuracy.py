"""Gradient errors of the reverse solvers on trained networks, where they are larger than on fresh ones.

Nets of the digits job, wider and trained for longer, exactly. Errors are medians over five training batches, against
backprop. One more net trains by the adjoint alone, with the solver that it calibrates on the way.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from resode_cuda import Reverse, calibrate

from ..harness import workers
from ..harness.gradients import relative_error
from ..harness.models import DigitsNet
from ..harness.tables import Table, Target, error
from ..options import Options
from .digits import Split, accuracy, load

CHANNELS = 16
BATCH_ROWS = 64
EPOCHS = 12
LEARNING_RATE = 3e-3
BATCHES = 5
ALL_SOLVERS = 1e-30  # a tolerance that none meets, so that calibrate measures them all

TOLERANCE, KEPT_UNDER = 1e-2, 3e-2  # of the net that calibrates on the way
RECALIBRATION, CHECK = 25, 50  # training steps
SHARE = 0.5  # of its time: so short a training would be over before 1% of it paid for a second calibration


@dataclass(frozen=True)
class Net:
    scheme: str
    steps: int
    tied: bool
    step: float | None = None

    def __str__(self) -> str:
        name = f"{self.scheme}, N={self.steps}, {'tied' if self.tied else 'independent'}"
        return name if self.step is None else f"{name}, h={self.step:g}"

    def build(self, seed: int, device: str) -> DigitsNet:
        torch.manual_seed(seed)
        return DigitsNet(self.scheme, self.steps, CHANNELS, self.tied, self.step).to(device)


NETS = (
    Net("heun", 64, tied=False),
    Net("euler", 64, tied=False),
    Net("euler", 64, tied=True),
    Net("heun", 16, tied=False),
    Net("euler", 16, tied=False),
)
RESNET = Net("euler", 16, tied=False, step=1.0)
SOLVERS = {
    "paper": Reverse("step", reuse=False),
    "corrected": Reverse("step"),
    "extrapolated": Reverse("extrapolate"),
    "step + 1": Reverse("step", 1),
    "step + 2": Reverse("step", 2, accelerate=False),
    "step + 2 A": Reverse("step", 2),
    "step + 3": Reverse("step", 3, accelerate=False),
    "step + 3 A": Reverse("step", 3),
    "extr. + 2": Reverse("extrapolate", 2, accelerate=False),
    "extr. + 2 A": Reverse("extrapolate", 2),
}


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    nets = (Net("euler", 4, tied=False),) if options.quick else NETS
    epochs = 1 if options.quick else EPOCHS
    task = progress.add_task("accuracy", total=len(nets) + 2)
    jobs: list[tuple[Any, ...]] = [("errors", net, epochs, options.seed, str(device)) for net in nets]
    jobs += [
        ("calibrated", Net("euler", 4 if options.quick else 16, tied=False), epochs, options.seed, str(device)),
        ("costs", RESNET, epochs, options.seed, str(device)),
    ]
    *rows, calibrated, resnet = workers.results(_job, jobs, device, lambda _: progress.advance(task))
    return {
        "channels": CHANNELS,
        "epochs": epochs,
        "batches": BATCHES,
        "rows": rows,
        "calibrated": calibrated,
        "resnet": resnet,
    }


class _RestOf:
    """The loss as a function of the stack's output, for the labels of the batch at hand."""

    def __init__(self, model: DigitsNet) -> None:
        self._layers = list(model)[2:]
        self._labels = torch.empty(0)

    def sees(self, labels: Tensor) -> None:
        self._labels = labels

    def __call__(self, out: Tensor) -> Tensor:
        for layer in self._layers:
            out = layer(out)
        return F.cross_entropy(out, self._labels)


def _job(kind: str, net: Net, epochs: int, seed: int, device: str) -> dict[str, Any]:
    return {"errors": _errors, "calibrated": _calibrated, "costs": _costs}[kind](net, epochs, seed, device)


def _errors(net: Net, epochs: int, seed: int, device: str) -> dict[str, Any]:
    data = load(torch.device(device))
    model = net.build(seed, device)
    fresh = copy.deepcopy(model)
    _train(model, data, epochs, seed)
    found = {"net": str(net), **vars(net), "test_accuracy": accuracy(model, data.test_images, data.test_labels)}
    for name, trained in (("fresh", fresh), ("trained", model)):
        found[name] = {solver: _median_error(trained.double(), data, reverse) for solver, reverse in SOLVERS.items()}
    # In float32 exact gradients are off themselves; what counts is that none is lost.
    single = copy.deepcopy(model).float()
    found["finite_in_float32"] = all(
        math.isfinite(_median_error(single, data, reverse)) for reverse in SOLVERS.values()
    )
    if net == NETS[1]:
        found["costs"] = {"fresh": _candidates(fresh, data), "trained": _candidates(model, data)}
    return found


def _costs(net: Net, epochs: int, seed: int, device: str) -> dict[str, Any]:
    data, model = load(torch.device(device)), net.build(seed, device)
    _train(model, data, epochs, seed)
    return {"net": str(net), "candidates": _candidates(model.double(), data)}


def _candidates(model: DigitsNet, data: Split) -> list[dict[str, Any]]:
    stack = model.stack[0]
    loss = _RestOf(model)
    images, labels = _batch(data, 0, torch.float64)
    loss.sees(labels)
    with torch.no_grad():
        x = model[0](images)
    stack.gradient = "backprop"
    plan = calibrate(stack, x, tolerance=ALL_SOLVERS, loss=loss)
    return [
        {
            "name": str(candidate),
            "anchors": candidate.anchors,
            "predictor": candidate.reverse and candidate.reverse.predictor,
            "accelerate": candidate.reverse and candidate.reverse.accelerate,
            "evaluations": candidate.evaluations / len(stack.steps),
            "error": candidate.error if math.isfinite(candidate.error) else None,
        }
        for candidate in plan.candidates
    ]


def _calibrated(net: Net, epochs: int, seed: int, device: str) -> dict[str, Any]:
    data, model = load(torch.device(device)), net.build(seed, device)
    stack, loss = model.stack[0], _RestOf(model)
    stack.recalibrate_every(RECALIBRATION, TOLERANCE, share=SHARE, loss=loss)
    checks: list[dict[str, Any]] = []

    def check(step: int, images: Tensor, labels: Tensor) -> None:
        if step % CHECK:
            return
        reverse, gradient, recalibration = stack.reverse, stack.gradient, stack._recalibration
        stack.recalibrate_every(0)
        got = _gradients(model, images, labels)
        stack.gradient = "backprop"
        exact = _gradients(model, images, labels)
        stack.gradient, stack.reverse, stack._recalibration = gradient, reverse, recalibration
        checks.append({"step": step, "error": relative_error(got, exact), "solver": _solver(gradient, reverse)})

    _train(model, data, epochs, seed, "adjoint", loss.sees, check)
    return {
        "net": str(net),
        "checks": checks,
        "test_accuracy": accuracy(model, data.test_images, data.test_labels),
    }


def _train(
    model: DigitsNet,
    data: Split,
    epochs: int,
    seed: int,
    gradient: str = "backprop",
    before: Callable[[Tensor], None] = lambda labels: None,
    check: Callable[[int, Tensor, Tensor], None] = lambda step, images, labels: None,
) -> None:
    model.stack[0].gradient = gradient
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images), generator=shuffle).to(data.train_images.device)
        for rows in order.split(BATCH_ROWS):
            images, labels = data.train_images[rows], data.train_labels[rows]
            before(labels)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            check(step, images, labels)
            optimizer.step()
            step += 1


def _batch(data: Split, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = slice(index * BATCH_ROWS, (index + 1) * BATCH_ROWS)
    return data.train_images[rows].to(dtype), data.train_labels[rows]


def _gradients(model: DigitsNet, images: Tensor, labels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters())))


def _median_error(model: DigitsNet, data: Split, reverse: Reverse) -> float:
    stack, dtype = model.stack[0], next(model.parameters()).dtype
    found = []
    for index in range(BATCHES):
        images, labels = _batch(data, index, dtype)
        stack.gradient = "backprop"
        exact = _gradients(model, images, labels)
        stack.gradient, stack.reverse = "adjoint", reverse
        found.append(relative_error(_gradients(model, images, labels), exact))
    return statistics.median(found) if all(map(math.isfinite, found)) else math.inf


def tables(figures: dict[str, Any]) -> list[Table]:
    table = Table(
        "Accuracy: relative gradient error, fresh and after training",
        ["solver", "weights", *(row["net"] for row in figures["rows"])],
        note=f"float64, median over {figures['batches']} batches; {figures['epochs']} epochs of exact training. "
        "A: accelerated. extr.: extrapolated.",
    )
    for solver in SOLVERS:
        for weights in ("fresh", "trained"):
            table.rows.append((solver, weights, *(error(row[weights][solver]) for row in figures["rows"])))
    checks = figures["calibrated"]["checks"]
    run = Table(
        f"Calibrated run ({figures['calibrated']['net']}), tolerance {TOLERANCE:g}",
        ["step", "solver", "error"],
        rows=[(str(check["step"]), check["solver"], error(check["error"])) for check in checks],
        note=f"Test accuracy {figures['calibrated']['test_accuracy']:.2f}%.",
    )
    return [table, run]


def _solver(gradient: str, reverse: Reverse) -> str:
    if gradient != "adjoint":
        return gradient
    return f"{reverse.predictor} + {reverse.corrections}{' A' if reverse.accelerate else ''}"


def targets(figures: dict[str, Any]) -> list[Target]:
    found = []
    for row in figures["rows"]:
        if row["steps"] == 64:
            trained, name = row["trained"], f"accuracy, {row['net']}, trained"
            limit = 1e-3 if row["scheme"] == "euler" else 1e-4
            found.append(Target(f"{name}: error of step + 2 A", trained["step + 2 A"], limit))
            if trained["step + 2"] > 1e-4:
                gain = trained["step + 2"] / trained["step + 2 A"]
                found.append(Target(f"{name}: gain of acceleration", gain, 5, at_least=True))
        found.append(Target(f"accuracy, {row['net']}: finite in float32", row["finite_in_float32"], 1, at_least=True))
    worst = max(check["error"] for check in figures["calibrated"]["checks"])
    return [*found, Target("accuracy, calibrated run: largest error", worst, KEPT_UNDER)]


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    from ..harness.plots import draw_costs

    panels = {
        f"{row['net']}, {weights}": candidates
        for row in figures["rows"]
        for weights, candidates in row.get("costs", {}).items()
    }
    panels[f"{figures['resnet']['net']}, trained"] = figures["resnet"]["candidates"]
    return [draw_costs(panels, directory / "error_against_cost.png")]
