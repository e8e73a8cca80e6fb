"""Memory, time and gradient error against depth, on an MLP stack whose weights are one smooth function of depth.

The deeper the stack, the finer the samples of that function, so gradient errors fall with the order of the solver.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..harness import gradients, memory, workers
from ..harness.models import smooth_mlp_workload
from ..harness.modes import BASELINE, MODES, REBUILDING, SCHEMES
from ..harness.tables import Table, Target, error
from ..harness.timing import interleaved
from ..harness.workload import Workload, step_figures
from ..options import Options

WIDTH = 64
ROWS = 256
ERROR_WIDTH, ERROR_ROWS = 16, 8
TIMED_SCHEMES = ("euler",)


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    rows_per_batch = 64 if options.quick else ROWS
    jobs = [
        (scheme, steps, rows_per_batch, str(device), options.seed) for steps in options.depths for scheme in SCHEMES
    ]
    # The time of one depth grows with the depth.
    timing = progress.add_task("sweep: time", total=sum(options.depths))
    seconds: dict[tuple[str, int], dict[str, list[float]]] = {}
    for scheme, steps, *_ in jobs:
        # Heun's times relative to backprop are in the digits' table; here they would take two thirds of the time.
        if scheme not in TIMED_SCHEMES:
            continue
        # A step of a deep stack is an average over many alike, and takes long.
        rounds = min(options.rounds, max(2, 32 * options.rounds // steps))
        workload = _timed_workload(scheme, steps, rows_per_batch, str(device), options.seed)
        seconds[scheme, steps] = interleaved(workload.steps(), rounds, device)
        progress.advance(timing, steps)
    measuring = progress.add_task("sweep: memory and errors", total=sum(job[1] for job in jobs))
    measured = workers.results(
        _memories_and_errors, jobs[::-1], device, lambda index: progress.advance(measuring, jobs[::-1][index][1])
    )[::-1]
    rows = []
    for (scheme, steps, *_), (memories, errors) in zip(jobs, measured, strict=True):
        for mode in MODES:
            rows.append(
                {
                    "steps": steps,
                    "scheme": scheme,
                    **step_figures(mode, memories, seconds.get((scheme, steps))),
                    "gradient_error": errors.get(mode),  # None where it is exact
                }
            )
    return {
        "width": WIDTH,
        "batch_rows": rows_per_batch,
        "dtype": "float32",
        "error_width": ERROR_WIDTH,
        "error_batch_rows": ERROR_ROWS,
        "error_dtype": "float64",
        "depths": list(options.depths),
        "orders": {scheme: {mode: _order(rows, scheme, mode) for mode in REBUILDING} for scheme in SCHEMES},
        "rows": rows,
    }


def _timed_workload(scheme: str, steps: int, rows: int, device: str, seed: int) -> Workload:
    return smooth_mlp_workload(scheme, steps, WIDTH, WIDTH, rows, device, torch.float32, seed)


def _memories_and_errors(
    scheme: str, steps: int, rows: int, device: str, seed: int
) -> tuple[dict[str, memory.StepMemory], dict[str, float]]:
    workload = _timed_workload(scheme, steps, rows, device, seed)
    workload.step(BASELINE)  # so that what is allocated once is there
    memories = {mode: memory.measure(partial(workload.forward, mode), torch.device(device)) for mode in MODES}
    small = smooth_mlp_workload(scheme, steps, ERROR_WIDTH, 2 * ERROR_WIDTH, ERROR_ROWS, device, torch.float64, seed)
    return memories, gradients.errors(small, REBUILDING)


def _order(rows: list[dict[str, Any]], scheme: str, mode: str) -> float | None:
    mine = [row for row in rows if (row["scheme"], row["mode"]) == (scheme, mode)]
    return gradients.fitted_order([row["steps"] for row in mine], [row["gradient_error"] for row in mine])


def tables(figures: dict[str, Any]) -> list[Table]:
    table = Table(
        "Sweep: relative gradient error against depth, weights smooth in depth",
        ["scheme", "mode", *(f"N={steps}" for steps in figures["depths"]), "p"],
        note=f"MLP blocks {figures['error_width']}-{2 * figures['error_width']}-{figures['error_width']}, "
        f"{figures['error_batch_rows']} rows, float64. p: order, error ~ N^-p, fitted over N of 16 and more.",
    )
    for scheme, orders in figures["orders"].items():
        for mode, order in orders.items():
            errors = [
                row["gradient_error"] for row in figures["rows"] if (row["scheme"], row["mode"]) == (scheme, mode)
            ]
            table.rows.append((scheme, mode, *map(error, errors), "–" if order is None else f"{order:.1f}"))
    return [table]


def targets(figures: dict[str, Any]) -> list[Target]:
    return []


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    from ..harness.plots import draw  # so that a machine without matplotlib still measures

    return draw(figures, directory, TIMED_SCHEMES)
