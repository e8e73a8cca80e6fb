"""Time and memory of a step of the reference job: Linear-Tanh-Linear blocks of 128, 2048 rows, fp32, Euler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..harness import memory, resident
from ..harness.bookkeeping import TimedDrift
from ..harness.models import mlp_workload
from ..harness.modes import MODES
from ..harness.tables import MEMORY_NOTE, MIB, TIME_NOTE, Table, Target, mebibytes, relative_time
from ..harness.timing import Spread, interleaved, spread
from ..harness.workload import Workload, step_figures
from ..options import Options

DEPTHS = (16, 64)
WIDTH = 128
ROWS = 2048
BATCHES = 4  # other data in each round
WATCHED, CLOCKED = "extrapolated", "extrapolated, drift clocked"  # the cheapest mode, where its share is largest
TIME_LIMITS = {"extrapolated": 1.40, "corrected": 1.75}
PEAK_LIMIT = 12.0  # MiB
DRIFT_LIMIT = 3.0  # percent of a step


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    depths = (4, 8) if options.quick else DEPTHS
    rows_per_batch = 128 if options.quick else ROWS
    rounds = options.rounds + 2  # the limits on time are judged here
    measuring = progress.add_task("cost", total=len(depths) * (rounds + 2) + 1)
    workloads, seconds = {}, {}
    drift = []
    for steps in depths:
        torch.manual_seed(options.seed)
        workload = mlp_workload("euler", steps, WIDTH, WIDTH, rows_per_batch, str(device), BATCHES)

        def before_round(workload: Workload = workload) -> None:
            workload.next_batch()
            progress.advance(measuring)

        clocked = TimedDrift(partial(workload.step, WATCHED), device)
        arms: dict[str, Callable[[], None]] = {**workload.steps(), CLOCKED: clocked}
        workloads[steps], seconds[steps] = workload, interleaved(arms, rounds, device, before_round)
        spent = clocked.seconds[-rounds:]  # not those of the round that warms up
        share = [100 * part / whole for part, whole in zip(spent, seconds[steps][CLOCKED], strict=True)]
        drift.append({"steps": steps, "seconds": spent, "percent": vars(spread(share))})
    rows: list[dict[str, Any]] = []
    for steps, workload in workloads.items():  # after all timing: a process in which torch's profiler ran is slower
        memories = {mode: memory.measure(partial(workload.forward, mode), device) for mode in MODES}
        progress.advance(measuring)
        rows += [{"steps": steps, **step_figures(mode, memories, seconds[steps])} for mode in MODES]
    sizes = {"scheme": "euler", "dim": WIDTH, "hidden": WIDTH, "rows": rows_per_batch, "device": "cpu"}
    jobs = [resident.Job(mlp_workload, {"steps": row["steps"], **sizes}, row["mode"]) for row in rows]
    for row, grown in zip(rows, resident.growth(jobs, device), strict=True):
        row["resident_bytes"] = grown
    progress.advance(measuring)
    return {"width": WIDTH, "batch_rows": rows_per_batch, "dtype": "float32", "rows": rows, "drift": drift}


def tables(figures: dict[str, Any]) -> list[Table]:
    shares = ", ".join(
        f"{share['percent']['median']:.1f}% ({share['percent']['low']:.1f} to {share['percent']['high']:.1f}) at "
        f"N={share['steps']}"
        for share in figures["drift"]
    )
    table = Table(
        f"Cost: MLP blocks of {figures['width']}, {figures['batch_rows']} rows, fp32, Euler",
        ["N", "mode", "peak", "held", "grown", "time"],
        note=f"{MEMORY_NOTE} {TIME_NOTE} Drift takes {shares} of an extrapolated step: median (quartiles).",
    )
    for row in figures["rows"]:
        table.rows.append(
            (
                str(row["steps"]),
                row["mode"],
                mebibytes(row["peak_bytes"]),
                mebibytes(row["held_bytes"]),
                mebibytes(row["resident_bytes"]),
                relative_time(Spread(**row["relative_time"])),
            )
        )
    return [table]


def targets(figures: dict[str, Any]) -> list[Target]:
    deepest = max(row["steps"] for row in figures["rows"])
    found = []
    for row in figures["rows"]:
        name = f"cost, N={row['steps']}, {row['mode']}:"
        if row["mode"] in TIME_LIMITS and row["steps"] == deepest:
            found.append(Target(f"{name} relative time", row["relative_time"]["median"], TIME_LIMITS[row["mode"]]))
        if row["mode"] in TIME_LIMITS:
            found.append(Target(f"{name} peak", row["peak_bytes"] / MIB, PEAK_LIMIT, unit=" MiB"))
    for share in figures["drift"]:
        if share["steps"] == deepest:
            name = f"cost, N={deepest}, {WATCHED}: share of drift"
            found.append(Target(name, share["percent"]["median"], DRIFT_LIMIT, unit="%"))
    return found


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []
