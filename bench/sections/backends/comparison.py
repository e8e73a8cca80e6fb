"""The tables and targets of the section `backends`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from ...harness.arms import OUT_OF_MEMORY, shown
from ...harness.modes import BASELINE
from ...harness.tables import Table, Target, mebibytes, relative_time
from ...harness.timing import ratios, spread

THAN_EAGER, THAN_GRAPH = 10, 3
"""Times faster than eager backprop and than its CUDA graph, at least, where rows are few."""
MICROSECONDS = 1.5
"""Time of a layer's forward pass alone, at most, where rows are few."""
OF_COMPILED = {BASELINE: 1.40, "checkpoint": 1.20}
"""Time of what "auto" takes, of a compiled peer's, at most, where layers are wide."""
FLAT = 1.02
"""Memory of the deeper network, of the shallower one's, at most."""
OF_BEST = 1.05
"""Time of what "auto" takes, of the best backend's, at most."""
NOTHING = "–"

Row = dict[str, Any]


def tables(figures: dict[str, Any]) -> list[Table]:
    if "left_out" in figures:
        return [Table("Backends of a residual MLP", ("not measured",), labels=1, rows=[(figures["left_out"],)])]
    kinds = (("few_rows", _few_rows), ("forward", _forward), ("wide", _wide), ("wide", _memory), ("sizes", _sizes))
    return [table(figures[name]) for name, table in kinds if name in figures]


def targets(figures: dict[str, Any]) -> list[Target]:
    if figures["device"] != "cuda":
        return []
    parts = {"few_rows": _few_rows_targets, "forward": _forward_targets, "wide": _wide_targets, "sizes": _sizes_targets}
    return [target for name, of in parts.items() if name in figures for target in of(figures[name])]


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []


def _few_rows(part: dict[str, Any]) -> Table:
    table = Table(
        _title("Few rows", part),
        ("kind", "mode", "ms", "faster than eager", "than its graph"),
        note="Forward and backward pass. Times faster than eager backprop, and than its CUDA graph, in the same round: "
        "median ± half the distance of the quartiles. Captured: replays of a CUDA graph of the whole step.",
    )
    peers = [_seconds(part["rows"], kind) for kind in ("eager", "captured eager")]
    for row in part["rows"]:
        table.rows.append(
            (_kind(row), row["mode"], *_cells(row, 2, lambda row: [_faster(row, peer) for peer in peers]))
        )
    return table


def _forward(part: dict[str, Any]) -> Table:
    table = Table(
        _title("A forward pass alone, few rows", part),
        ("kind", "mode", "ms", "µs a layer"),
        note="Without gradients.",
    )
    for row in part["rows"]:
        table.rows.append((_kind(row), row["mode"], *_cells(row, 1, lambda row: [f"{_microseconds(part, row):.2f}"])))
    return table


def _wide(part: dict[str, Any]) -> Table:
    table = Table(
        _title("Wide layers", part),
        ("kind", "mode", "ms", "of backprop", "of checkpoint", "first s"),
        note="Forward and backward pass; time relative to that of compiled backprop and of compiled checkpointing of "
        "each layer, in the same round: median ± half the distance of the quartiles. First: the first step, with "
        f"compiling. Compiled by torch.compile, {part['compiler']}, so many layers at a time.",
    )
    peers = [_compiled(part, mode)["seconds"] for mode in OF_COMPILED]

    def cells(row: Row) -> list[str]:
        relative = [NOTHING if peer is None else relative_time(ratios(row["seconds"], peer)) for peer in peers]
        return [*relative, f"{row['first_seconds']:.1f}"]

    for row in part["rows"]:
        table.rows.append((_kind(row), row["mode"], *_cells(row, 3, cells)))
    return table


def _memory(part: dict[str, Any]) -> Table:
    table = Table(
        f"Memory: dim {part['dim']}, hidden {part['hidden']}, {part['batch_rows']} rows, {part['dtype']}",
        ("N", "peak MiB", "without parameter gradients", "states"),
        labels=1,
        note="Peak over what was there before the step; of a step that asks for all gradients, and of one that asks "
        "for the input's alone. States: the latter, in states of 4 bytes a number.",
    )
    for row in part["memory"]:
        if "reason" in row:
            table.rows.append((str(row["depth"]), row["reason"], NOTHING, NOTHING))
            continue
        peaks = mebibytes(row["peak_bytes"]), mebibytes(row["frozen_peak_bytes"])
        table.rows.append((str(row["depth"]), *peaks, f"{row['frozen_peak_bytes'] / row['state_bytes']:.2f}"))
    return table


def _sizes(part: dict[str, Any]) -> Table:
    dtype = f", {part['rows'][0]['dtype']}" if part["rows"] else ""
    names = list(dict.fromkeys(row["backend"] for row in part["rows"] if row["backend"] != "auto"))
    table = Table(
        f"Backends, {part['mode']}, {part['activation']}{dtype}: ms",
        ("dim", "hidden", "rows", "N", *names, "auto", "takes", "of best"),
        labels=2,
        note='Forward and backward pass, milliseconds. Takes: the backend that "auto" takes. Of best: "auto" relative '
        "to the fastest backend in the same round, the median. –: it can't compute this.",
    )
    for rows in _by_size(part):
        first, by_backend = rows[0], {row["backend"]: row for row in rows}
        times = (_milliseconds(by_backend.get(name)) for name in (*names, "auto"))
        of_best = _of_best(rows)
        table.rows.append(
            (
                *(str(first[name]) for name in ("dim", "hidden", "rows", "depth")),
                *(*times, by_backend["auto"]["taken"]),
                NOTHING if math.isnan(of_best) else f"{of_best:.2f}",
            )
        )
    table.note += "".join(f" {reason}." for reason in part["reasons"])
    if part["left_out"]:
        sizes = (f"{size['dim']}/{size['hidden']} {size['batch_rows']}" for size in part["left_out"])
        table.note += f" Left out for lack of time (dim/hidden rows): {', '.join(sizes)}."
    return table


def _few_rows_targets(part: dict[str, Any]) -> list[Target]:
    best = _best(row for row in part["rows"] if row["kind"] == "fused")
    found = []
    for kind, named, limit in (
        ("eager", "eager backprop", THAN_EAGER),
        ("captured eager", "the CUDA graph of eager backprop", THAN_GRAPH),
    ):
        peer = _seconds(part["rows"], kind)
        faster = math.nan if best is None or peer is None else ratios(peer, best["seconds"]).median
        found.append(Target(f"few rows, {_by(best)}, times faster than {named}", faster, limit, at_least=True))
    return found


def _forward_targets(part: dict[str, Any]) -> list[Target]:
    best = _best(part["rows"])
    measured = math.nan if best is None else _microseconds(part, best)
    return [Target(f"few rows, forward pass alone, {_by(best)}, a layer", measured, MICROSECONDS, unit=" µs")]


def _wide_targets(part: dict[str, Any]) -> list[Target]:
    found = []
    auto = next(row for row in part["rows"] if row["kind"] == "auto")
    for mode, limit in OF_COMPILED.items():
        peer = _compiled(part, mode)
        if peer["reason"] == OUT_OF_MEMORY:  # as the table says, and no reason to miss the target
            continue
        is_timed = auto["seconds"] is not None and peer["seconds"] is not None
        measured = ratios(auto["seconds"], peer["seconds"]).median if is_timed else math.nan
        found.append(Target(f"wide layers, {auto['mode']}, of compiled {mode}'s time", measured, limit))
    shallow, deep = (row.get("frozen_peak_bytes", math.nan) for row in part["memory"])
    depths = " and ".join(f"N={row['depth']}" for row in reversed(part["memory"]))
    return [*found, Target(f"wide layers, memory without parameter gradients, {depths}, ratio", deep / shallow, FLAT)]


def _sizes_targets(part: dict[str, Any]) -> list[Target]:
    found = []
    ratio_of_size = [(rows[0], _of_best(rows)) for rows in _by_size(part)]
    if ratio_of_size:
        # What is not a number is the worst.
        worst, ratio = max(ratio_of_size, key=lambda one: math.inf if math.isnan(one[1]) else one[1])
        size = f"dim {worst['dim']}, hidden {worst['hidden']}, {worst['rows']} rows"
        what = f"auto, of the best backend's time, the worst of {len(ratio_of_size)} sizes ({size})"
        found.append(Target(what, ratio, OF_BEST))
    if part["left_out"]:
        found.append(Target(f"backends: {len(part['left_out'])} sizes left out for lack of time", math.nan, 0))
    return found


def _title(name: str, part: dict[str, Any]) -> str:
    sizes = f"dim {part['dim']}, hidden {part['hidden']}, {part['activation']}, N={part['depth']}"
    return f"{name}: {sizes}, {part['batch_rows']} rows, {part['dtype']}"


def _kind(row: Row) -> str:
    return row["kind"] if row["backend"] is None else f"{row['kind']}, {row['backend']}"


def _cells(row: Row, count: int, others: Any) -> list[str]:
    """Milliseconds and so many other cells, or why there are none."""
    if row["seconds"] is None:
        return [shown(row["reason"]), *count * [NOTHING]]
    return [f"{1e3 * spread(row['seconds']).median:.3f}", *others(row)]


def _faster(row: Row, peer: list[float] | None) -> str:
    return NOTHING if peer is None else relative_time(ratios(peer, row["seconds"]))


def _microseconds(part: dict[str, Any], row: Row) -> float:
    microseconds: float = 1e6 * spread(row["seconds"]).median / part["depth"]
    return microseconds


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return shown(row["reason"]) if row["milliseconds"] is None else f"{row['milliseconds']:.2f}"


def _seconds(rows: Iterable[Row], kind: str) -> list[float] | None:
    return next((row["seconds"] for row in rows if row["kind"] == kind), None)


def _compiled(part: dict[str, Any], mode: str) -> Row:
    return next(row for row in part["rows"] if row["kind"].startswith("compiled") and row["mode"] == mode)


def _best(rows: Iterable[Row]) -> Row | None:
    """The row of the least median."""
    timed = (row for row in rows if row["seconds"] is not None)
    return min(timed, key=lambda row: spread(row["seconds"]).median, default=None)


def _by(best: Row | None) -> str:
    return "no backend ran" if best is None else f"best backend ({best['backend']})"


def _by_size(part: dict[str, Any]) -> list[list[Row]]:
    return [list(rows) for _, rows in groupby(part["rows"], key=lambda row: (row["dim"], row["hidden"], row["rows"]))]


def _of_best(rows: list[Row]) -> float:
    """Time of "auto", of the fastest backend's; not a number where one of them has none."""
    auto = next(row for row in rows if row["backend"] == "auto")
    best = _best(row for row in rows if row is not auto)
    if best is None or auto["seconds"] is None:
        return math.nan
    return ratios(auto["seconds"], best["seconds"]).median
