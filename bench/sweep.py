"""Memory, time and gradient error against depth, on an MLP stack whose weights are one smooth function of depth.

The deeper the stack, the finer the samples of that function, so gradient errors fall with the order of the solver.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from . import gradients, memory
from .models import smooth_mlp_workload
from .modes import BASELINE, MODES, REBUILDING, SCHEMES
from .options import Options
from .report import Table, Target, error
from .timing import interleaved
from .workload import step_figures

WIDTH = 64
ROWS = 256
ERROR_WIDTH, ERROR_ROWS = 16, 8
TIMED_SCHEMES = ("euler",)


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    rows_per_batch = 64 if options.quick else ROWS
    # The time of one depth grows with the depth.
    measuring = progress.add_task("sweep", total=sum(options.depths) * len(SCHEMES))
    rows = []
    for steps in options.depths:
        # A step of a deep stack is an average over many alike, and takes long.
        rounds = min(options.rounds, max(2, 32 * options.rounds // steps))
        for scheme in SCHEMES:
            shape = (scheme, steps, WIDTH, WIDTH, rows_per_batch, str(device), torch.float32, options.seed)
            workload = smooth_mlp_workload(*shape)
            # Heun's times relative to backprop are in the digits' table; here they would take half of the sweep.
            seconds = interleaved(workload.steps(), rounds, device) if scheme in TIMED_SCHEMES else None
            if seconds is None:
                workload.step(BASELINE)  # so that what is allocated once is there
            memories = {mode: memory.measure(partial(workload.forward, mode), device) for mode in MODES}
            shape = (scheme, steps, ERROR_WIDTH, 2 * ERROR_WIDTH, ERROR_ROWS, str(device), torch.float64, options.seed)
            errors = gradients.errors(smooth_mlp_workload(*shape), REBUILDING)
            for mode in MODES:
                rows.append(
                    {
                        "steps": steps,
                        "scheme": scheme,
                        **step_figures(mode, memories, seconds),
                        "gradient_error": errors.get(mode),  # None where it is exact
                    }
                )
            progress.advance(measuring, steps)
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
    from .plots import draw  # so that a machine without matplotlib still measures

    return draw(figures, directory, TIMED_SCHEMES)
