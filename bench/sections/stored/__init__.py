"""Increments stored in a few bits, on trained networks of ordinary form (h = 1): how far gradients are off at so many
bits a value beside what else those bits could hold, and whether training with them ends where backprop does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ...harness import workers
from ...harness.tables import Table, Target, error
from ...options import Options
from .errors import BITS, KEEPING, NETWORKS, RIVALS, errors
from .training import EXACT, MODES, RUNS, STORED_MODES, finetune, run

SEEDS = 3
WORSE = 0.01
"""What fine-tuning may cost in loss."""


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    networks = tuple(NETWORKS)[:1] if options.quick else tuple(NETWORKS)
    runs = tuple(RUNS)[1:2] if options.quick else tuple(RUNS)
    modes = tuple(MODES)[:2] if options.quick else tuple(MODES)
    share = 0.05 if options.quick else 1.0
    seeds = range(1 if options.quick else SEEDS)
    jobs: list[tuple[Any, ...]] = [("errors", name, share, options.seed) for name in networks]
    jobs += [("train", name, mode, options.seed + seed, share) for name in runs for mode in modes for seed in seeds]
    jobs += [("finetune", mode, options.seed, share) for mode in (EXACT, "stored, 8 bits", "nothing stored")]
    task = progress.add_task("stored", total=len(jobs))
    found = workers.results(_job, jobs, torch.device("cpu"), lambda _: progress.advance(task))
    results: dict[str, list[Any]] = {"errors": [], "train": [], "finetune": []}
    for (kind, *_), result in zip(jobs, found, strict=True):
        results[kind].append(result)
    return {"networks": results["errors"], "trainings": results["train"], "finetuned": results["finetune"]}


def _job(kind: str, *arguments: Any) -> dict[str, Any]:
    functions: dict[str, Callable[..., dict[str, Any]]] = {"errors": errors, "train": run, "finetune": finetune}
    return functions[kind](*arguments)


def tables(figures: dict[str, Any]) -> list[Table]:
    names = [row["network"] for row in figures["networks"]]
    table = Table(
        "Stored increments: relative gradient error of trained networks",
        ["kept", "bits", *names],
        note="float64; bits a value and step, scales included; h = 1 where not said. Kept: exact states of no "
        "step, of those with |d|/|x| > 0.5, of the first three; or what takes their place: bfloat16 autocast's own "
        "error, corrected with nothing stored, states rounded to bf16, FP8, int8, int4.",
    )
    table.rows.append(("autocast", "bf16", *(error(row["amp"]) for row in figures["networks"])))
    table.rows.append(("corrected", "0", *(error(row["rebuilt"]) for row in figures["networks"])))
    for keeping in KEEPING:
        for bits in BITS:
            shown = (error(row["stored"][keeping][str(bits)]) for row in figures["networks"])
            table.rows.append((keeping, f"{bits}.25", *shown))
    for rival, width in RIVALS.items():
        table.rows.append((rival, f"{width:g}", *(error(r["rivals"][rival]) for r in figures["networks"])))
    runs = [name for name in RUNS if any(row["run"] == name for row in figures["trainings"])]
    losses = Table(
        "Training with stored increments: held-out loss at the end",
        ["forward", "backward", *runs],
        note="Least and greatest of the seeds.",
    )
    for mode in MODES:
        cells = [_spread(figures, name, mode) for name in runs]
        if any(cells):
            forward = "rounded" if mode.startswith("rounded") else "exact"
            losses.rows.append((forward, mode, *cells))
    tuned = Table("Fine-tuning a GPT for 40 steps: held-out loss", ["backward", "before", "after"], 1)
    tuned.rows += [(row["mode"], f"{row['before']:.3f}", f"{row['after']:.3f}") for row in figures["finetuned"]]
    return [table, losses, tuned]


def _losses(figures: dict[str, Any], name: str, mode: str) -> list[float]:
    return [row["loss"] for row in figures["trainings"] if (row["run"], row["mode"]) == (name, mode)]


def _spread(figures: dict[str, Any], name: str, mode: str) -> str:
    losses = _losses(figures, name, mode)
    return f"{min(losses):.3f} to {max(losses):.3f}" if losses else ""


def targets(figures: dict[str, Any]) -> list[Target]:
    found = []
    for row in figures["networks"]:
        name, amp = f"stored, {row['network']}", row["amp"]
        if row["network"] == "h=1/64":
            continue  # where nothing need be stored
        found.append(Target(f"{name}: error of 8 bits over autocast's", row["stored"]["none"]["8"] / amp, 1.0))
        found.append(Target(f"{name}: 4 bits, wild kept, over autocast's", row["stored"]["wild"]["4"] / amp, 1.5))
    for name in RUNS:
        exact = _losses(figures, name, EXACT)
        for mode in STORED_MODES:
            if losses := _losses(figures, name, mode):
                what = f"stored, training {name}, {mode}: loss above backprop's worst"
                found.append(Target(what, max(losses) - max(exact), max(exact) - min(exact)))
    after = {row["mode"]: row["after"] for row in figures["finetuned"]}
    return [
        *found,
        Target("stored, fine-tuning, 8 bits: loss above exact", after["stored, 8 bits"] - after[EXACT], WORSE),
    ]


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    from .plot import draw_errors

    return [draw_errors(figures["networks"], directory / "stored.png")]
