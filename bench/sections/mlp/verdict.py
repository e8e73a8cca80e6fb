"""The tables and targets of the section `mlp`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...harness.arms import shown
from ...harness.modes import BASELINE
from ...harness.tables import MIB, Table, Target, error, mebibytes, relative_time
from ...harness.timing import Spread, ratios, spread

CPU_TIMES = {"extrapolated": 1.20, "checkpoint": 1.35, "corrected": 1.45}
"""Time of a mode, of eager backprop's, at most."""
CPU_STATES = 12
GPU_STATES = 5
"""Peak in states of rows x dim x 4 bytes, at most; on a GPU beside the scratch."""
SCRATCH = 512  # MiB
CHECKPOINT_OF_EXTRAPOLATED = 1.2
"""Time of the exact gradients, of the extrapolated solver's, at most."""
ROUNDING = 2
"""Exact gradients: at most so many times the error of backprop, and a rounding of the dtype."""


@dataclass(frozen=True)
class Limits:
    """Lower limits: times faster than the compiled peers (`hoped`, if it can be), and share of the matrix ceiling."""

    than_backprop: float
    hoped: float | None
    than_checkpoint: float | None
    of_ceiling: float
    of_ceiling_hoped: float


GPU_LIMITS = {(64, 128): Limits(3, None, 4, 0.30, 0.45), (128, 512): Limits(1.3, 1.5, None, 0.35, 0.45)}


def tables(figures: dict[str, Any]) -> list[Table]:
    found = [_times(figures, job) for job in figures["jobs"]]
    found += [_memory(job) for job in figures["jobs"] if "memory" in job]
    return [*found, _errors(figures)]


def targets(figures: dict[str, Any]) -> list[Target]:
    is_gpu = figures["device"] == "cuda"
    found = []
    for job in figures["jobs"]:
        if job["is_judged"]:
            found += _gpu_times(job) if is_gpu else _cpu_times(job)
        found += _memory_targets(job, is_gpu)
    if is_gpu:
        judged = [job for job in figures["left_out"] if job["is_judged"]]
        found += [Target(f"{_named(job)} left out for lack of time", math.nan, 0) for job in judged]
    return found


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []


def _sizes(job: dict[str, Any]) -> str:
    return f"dim {job['dim']}, hidden {job['hidden']}, {job['activation']}"


def _named(job: dict[str, Any]) -> str:
    return f"mlp, {_sizes(job)}:"


def _times(figures: dict[str, Any], job: dict[str, Any]) -> Table:
    table = Table(
        f"Residual MLP: {_sizes(job)}, N={job['depth']}, {job['batch_rows']} rows, {job['dtype']}",
        ("kind", "mode", "ms", "of backprop", "of products", "ceiling", "first s"),
    )
    for row in job["rows"]:
        kind = row["kind"] if row["backend"] is None else f"{row['kind']}, {row['backend']}"
        if row["seconds"] is None:
            table.rows.append((kind, row["mode"], shown(row["reason"]), *4 * ("–",)))
            continue
        share, of_backprop, of_products = _of_ceiling(job, row), row["of_backprop"], row["of_products"]
        if row["mode"] == "matmul":
            of_backprop = of_products = None
        table.rows.append(
            (
                *(kind, row["mode"], f"{1e3 * spread(row['seconds']).median:.2f}"),
                "–" if of_backprop is None else relative_time(Spread(**of_backprop)),
                "–" if of_products is None else f"{of_products['median']:.2f}",
                "–" if share is None else f"{100 * share.median:.1f}%",
                f"{row['first_seconds']:.1f}",
            )
        )
    matmul = _seconds(job, "bare", "matmul")
    ceiling = "" if matmul is None else f" ({job['matmul_flop'] / spread(matmul).median / 1e12:.2f} TFLOP/s)"
    segment, left_out = figures["segment"], ", ".join(map(_sizes, figures["left_out"]))
    table.note = (
        "Forward and backward pass; time relative to eager backprop's and to that of the bare products, 8 a layer, in "
        "the same round: median ± half the distance of the quartiles. Ceiling: these 8 products' arithmetic in the "
        f"whole step's time, of the rate of one {job['dtype']} product of {job['matmul']}{ceiling}. First: the first "
        f"step, with compiling. Compiled by torch.compile, {figures['compiler']}: all layers at once, or by one "
        f"compilation for {segment} layers at a time. Eager and compiled checkpoint: each layer."
    )
    table.note += f" Left out for lack of time: {left_out}." if left_out else ""
    return table


def _memory(job: dict[str, Any]) -> Table:
    table = Table(
        f"Memory and launches: {_sizes(job)}, {job['batch_rows']} rows, {job['dtype']}",
        ("N", "mode", "peak MiB", "states", "scratch MiB", "launches"),
        note="Peak over what was there before the step; of the op's, its parameter gradients are not counted. States: "
        "that peak, less the scratch, in states of 4 bytes a number. Scratch: the part that does not grow with rows. "
        "Launches: kernels, forward + backward.",
    )
    for row in job["memory"]:
        launches = row.get("launches")
        if "reason" in row:
            figures: tuple[str, ...] = (row["reason"], "–", "–", "–")
        else:
            figures = (
                *(mebibytes(row["peak_bytes"]), f"{_states(row):.2f}", mebibytes(row.get("scratch_bytes"))),
                "–" if launches is None else f"{launches['forward']} + {launches['backward']}",
            )
        table.rows.append((str(row["depth"]), f"{row['kind']} {row['mode']}", *figures))
    return table


def _errors(figures: dict[str, Any]) -> Table:
    modes = list(figures["jobs"][0]["errors"])
    table = Table(
        f"Relative error of the gradients, weights smooth in depth, {figures['jobs'][0]['dtype']}",
        ("sizes", *modes),
        labels=1,
        note="The worst of all parameters' and the input's, against backprop in float64 from the same weights. Eager: "
        "backprop with states in the parameters' dtype, which float32 at least have in all other modes.",
    )
    for job in figures["jobs"]:
        sizes = f"{job['dim']}/{job['hidden']} {job['activation']}"
        table.rows.append((sizes, *(error(job["errors"][mode]) for mode in modes)))
    return table


def _cpu_times(job: dict[str, Any]) -> list[Target]:
    found = [
        Target(f"{_named(job)} {mode}, of eager backprop's time", _median(_ratio(job, "fused", mode)), limit)
        for mode, limit in CPU_TIMES.items()
    ]
    return [*found, _exactness(job)]


def _gpu_times(job: dict[str, Any]) -> list[Target]:
    limits = next((limits for sizes, limits in GPU_LIMITS.items() if sizes == (job["dim"], job["hidden"])), None)
    if limits is None:
        return []
    named, found = _named(job), []
    extrapolated = _seconds(job, "fused", "extrapolated")
    for mode, limit, hoped in (
        (BASELINE, limits.than_backprop, limits.hoped),
        ("checkpoint", limits.than_checkpoint, None),
    ):
        peer = _fastest_compiled(job, mode)
        if limit is None or peer is None:  # the table says what happened to it
            continue
        faster = None if extrapolated is None else ratios(peer, extrapolated)
        goal = "" if hoped is None else f" (hoped for: {hoped:g})"
        what = f"{named} extrapolated, times faster than compiled {mode}{goal}"
        found.append(Target(what, _median(faster), limit, at_least=True))
    row = next(row for row in job["rows"] if (row["kind"], row["mode"]) == ("fused", "extrapolated"))
    what = f"{named} extrapolated, share of the matrix ceiling (hoped for: {limits.of_ceiling_hoped:g})"
    found.append(Target(what, _median(_of_ceiling(job, row)), limits.of_ceiling, at_least=True))
    checkpoint = _seconds(job, "fused", "checkpoint")
    slower = None if checkpoint is None or extrapolated is None else ratios(checkpoint, extrapolated)
    found.append(Target(f"{named} checkpoint, of extrapolated's time", _median(slower), CHECKPOINT_OF_EXTRAPOLATED))
    return [*found, _exactness(job)]


def _exactness(job: dict[str, Any]) -> Target:
    budget = ROUNDING * (job["errors"][BASELINE] + torch.finfo(getattr(torch, job["dtype"])).eps)
    return Target(f"{_named(job)} checkpoint, error of gradients", job["errors"]["checkpoint"], float(f"{budget:.1e}"))


def _memory_targets(job: dict[str, Any], is_gpu: bool) -> list[Target]:
    found = []
    fused = [row for row in job.get("memory", ()) if row["kind"] == "fused"]
    for row in fused:
        what = f"{_named(job)} {row['mode']}, N={row['depth']},"
        states = math.nan if "reason" in row else _states(row)
        found.append(Target(f"{what} peak", states, GPU_STATES if is_gpu else CPU_STATES, unit=" states"))
        if is_gpu and row["mode"] == "checkpoint":
            scratch = row.get("scratch_bytes", math.nan) / MIB
            found.append(Target(f"{what} scratch", scratch, SCRATCH, unit=" MiB"))
    shallow, deep = ({row["mode"]: row.get("launches") for row in fused if row["depth"] == n} for n in _depths(fused))
    for mode in shallow if is_gpu else ():
        for direction in ("forward", "backward"):
            few, many = ((math.nan if one is None else one[direction]) for one in (shallow[mode], deep[mode]))
            what = f"{_named(job)} {mode}, {direction}: launches at the larger depth, of the smaller's"
            found.append(Target(what, many / few, 1))
    return found


def _depths(rows: list[dict[str, Any]]) -> tuple[int, int]:
    depths = [row["depth"] for row in rows] or [0]
    return min(depths), max(depths)


def _states(row: dict[str, Any]) -> float:
    states: float = (row["peak_bytes"] - row.get("scratch_bytes", 0)) / row["state_bytes"]
    return states


def _seconds(job: dict[str, Any], kind: str, mode: str) -> list[float] | None:
    return next((row["seconds"] for row in job["rows"] if (row["kind"], row["mode"]) == (kind, mode)), None)


def _ratio(job: dict[str, Any], kind: str, mode: str) -> Spread | None:
    mine, backprop = _seconds(job, kind, mode), _seconds(job, "eager", BASELINE)
    return None if mine is None or backprop is None else ratios(mine, backprop)


def _fastest_compiled(job: dict[str, Any], mode: str) -> list[float] | None:
    """Seconds of the fastest compiled peer in each round, however many layers were compiled at a time."""
    peers = [
        row["seconds"]
        for row in job["rows"]
        if row["kind"].startswith("compiled") and row["mode"] == mode and row["seconds"] is not None
    ]
    return [min(times) for times in zip(*peers, strict=True)] or None


def _of_ceiling(job: dict[str, Any], row: dict[str, Any]) -> Spread | None:
    matmul = _seconds(job, "bare", "matmul")
    if matmul is None or row["seconds"] is None:
        return None
    flop = job["matmul_flop"] if row["mode"] == "matmul" else job["flop"]
    return spread([flop / job["matmul_flop"] * a / b for a, b in zip(matmul, row["seconds"], strict=True)])


def _median(values: Spread | None) -> float:
    return math.nan if values is None else values.median
