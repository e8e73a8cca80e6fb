"""A deep residual convolutional network learns the handwritten digits that ship with scikit-learn, in every mode.

Every mode of a scheme starts from the same weights and sees the same batches in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..harness import gradients, memory, resident, workers
from ..harness.models import DigitsNet, digits_loss, digits_workload
from ..harness.modes import BASELINE, MODES, SCHEMES, set_mode
from ..harness.tables import MEMORY_NOTE, TIME_NOTE, Table, Target, error, mebibytes, relative_time
from ..harness.timing import Spread, interleaved
from ..harness.workload import step_figures
from ..options import Options

CHANNELS = 8
BATCH_ROWS = 64
LEARNING_RATE = 0.03
TEST_SHARE = 0.4  # 719 images: one is 0.14 percentage points
LEAST_ACCURACY = 97.0  # percent
LARGEST_GAP = 1.0  # percentage points


@dataclass(frozen=True)
class Start:
    """The start that every training of a scheme shares. `images`: how many are trained on; None is all of them."""

    steps: int
    seed: int
    images: int | None = None

    def net(self, scheme: str) -> DigitsNet:
        torch.manual_seed(self.seed)
        return DigitsNet(scheme, self.steps, CHANNELS)


@dataclass(frozen=True)
class Split:
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    steps = 3 if options.quick else 12
    start = Start(steps, options.seed, 4 * BATCH_ROWS if options.quick else None)
    data = load(device, start.images)
    trained = _train_all(start, options, device, progress)
    measuring = progress.add_task("digits: memory and time", total=len(SCHEMES) + 1)
    rows: list[dict[str, Any]] = []
    for scheme in SCHEMES:
        net = start.net(scheme).to(device)
        start_errors = gradient_errors(net, data)
        workload = net.workload(data.train_images[:BATCH_ROWS], data.train_labels[:BATCH_ROWS])
        seconds = interleaved(workload.steps(), options.rounds, device)
        memories = {mode: memory.measure(partial(workload.forward, mode), device) for mode in MODES}
        for mode in MODES:
            rows.append(
                {
                    "scheme": scheme,
                    **step_figures(mode, memories, seconds),
                    "gradient_error_at_start": start_errors[mode],
                    **trained[scheme, mode],
                }
            )
        progress.advance(measuring)
    sizes = {"steps": steps, "channels": CHANNELS, "rows": BATCH_ROWS, "device": "cpu"}
    jobs = [resident.Job(digits_workload, {"scheme": row["scheme"], **sizes}, row["mode"]) for row in rows]
    for row, grown in zip(rows, resident.growth(jobs, device), strict=True):
        row["resident_bytes"] = grown
    progress.advance(measuring)
    return {
        "steps": steps,
        "channels": CHANNELS,
        "batch_rows": BATCH_ROWS,
        "epochs": options.epochs,
        "train_images": len(data.train_images),
        "test_images": len(data.test_images),
        "rows": rows,
    }


def _train_all(
    start: Start, options: Options, device: torch.device, progress: Progress
) -> dict[tuple[str, str], dict[str, float]]:
    """Figures of the trained net of each scheme and mode."""
    runs = [(scheme, mode) for scheme in reversed(SCHEMES) for mode in MODES]  # the longest first
    training = progress.add_task("digits: training", total=len(runs))
    jobs = [(start, *run, options.epochs, str(device)) for run in runs]
    return dict(zip(runs, workers.results(_trained, jobs, device, lambda _: progress.advance(training)), strict=True))


def _trained(start: Start, scheme: str, mode: str, epochs: int, device: str) -> dict[str, float]:
    data = load(torch.device(device), start.images)
    net = start.net(scheme).to(device)
    train(net, mode, data, epochs, start.seed)
    return {
        "gradient_error_trained": gradient_errors(net, data, [mode])[mode],
        "test_accuracy": accuracy(net, data.test_images, data.test_labels),
    }


def load(device: torch.device, train_images: int | None = None) -> Split:
    """Images [rows, 1, 8, 8] in [0, 1] and labels; the same split every time, each digit in proportion.

    Args:
        train_images: so many of the images to train on; None is all of them.
    """
    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=TEST_SHARE, stratify=digits.target, random_state=0)
    images = [torch.tensor(part / 16, dtype=torch.float32, device=device).unsqueeze(1) for part in parts[:2]]
    labels = [torch.tensor(part, device=device) for part in parts[2:]]
    return Split(images[0][:train_images], labels[0][:train_images], images[1], labels[1])


def train(
    net: DigitsNet,
    mode: str,
    data: Split,
    epochs: int,
    seed: int,
    before_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with a one-cycle rate. The rows left over when an epoch is cut into batches come again in another epoch.

    Args:
        before_step: called once gradients are there.
    """
    set_mode(net.stack[0], mode)
    shuffle = torch.Generator().manual_seed(seed)
    count = len(data.train_images)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
    batches = count // BATCH_ROWS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        order = torch.randperm(count, generator=shuffle).to(data.train_images.device)
        for rows in order.split(BATCH_ROWS)[:batches]:
            optimizer.zero_grad(set_to_none=False)
            digits_loss(net(data.train_images[rows]), data.train_labels[rows]).backward()
            before_step()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that are recognised."""
    return 100 * (net(images).argmax(dim=1) == labels).double().mean().item()


def gradient_errors(net: DigitsNet, data: Split, modes: Sequence[str] = tuple(MODES)) -> dict[str, float]:
    """The relative error of the gradients in each mode, in float64 on the first training batch."""
    images, labels = data.train_images[:BATCH_ROWS].double(), data.train_labels[:BATCH_ROWS]
    return gradients.errors(copy.deepcopy(net).double().workload(images, labels), modes)


def tables(figures: dict[str, Any]) -> list[Table]:
    table = Table(
        f"Digits: {figures['steps']} steps, {figures['channels']} channels, {figures['epochs']} epochs",
        ["scheme", "mode", "peak", "held", "grown", "time", "error", "trained", "test %"],
        note=f"{MEMORY_NOTE} {TIME_NOTE} Error: relative gradient error against backprop, float64, at the initial "
        f"weights; trained: at the trained ones. A step has {figures['batch_rows']} images, the test "
        f"{figures['test_images']}.",
    )
    for row in figures["rows"]:
        table.rows.append(
            (
                row["scheme"],
                row["mode"],
                mebibytes(row["peak_bytes"]),
                mebibytes(row["held_bytes"]),
                mebibytes(row["resident_bytes"]),
                relative_time(Spread(**row["relative_time"])),
                error(row["gradient_error_at_start"]),
                error(row["gradient_error_trained"]),
                f"{row['test_accuracy']:.2f}",
            )
        )
    return [table]


def targets(figures: dict[str, Any]) -> list[Target]:
    rows = figures["rows"]
    exact = {row["scheme"]: row["test_accuracy"] for row in rows if row["mode"] == BASELINE}
    worst = min(rows, key=lambda row: row["test_accuracy"])
    furthest = max(rows, key=lambda row: abs(row["test_accuracy"] - exact[row["scheme"]]))
    gap = abs(furthest["test_accuracy"] - exact[furthest["scheme"]])
    return [
        Target(
            f"digits, lowest test accuracy of all modes ({worst['scheme']}, {worst['mode']})",
            worst["test_accuracy"],
            LEAST_ACCURACY,
            at_least=True,
            unit="%",
        ),
        Target(
            f"digits, largest distance from backprop's accuracy ({furthest['scheme']}, {furthest['mode']})",
            gap,
            LARGEST_GAP,
            unit=" points",
        ),
    ]


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []
