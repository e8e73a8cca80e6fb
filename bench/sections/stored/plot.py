"""Error against bits a value, a panel for each network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from ...harness.plots import GRID, INK
from .errors import BITS, RIVALS

LINES = {
    "none": ("increments", "#0072B2", "o"),
    "wild": ("increments, states of wild steps kept", "#009E73", "s"),
}
COLUMNS = 3
RIVAL_MARKS = {"bf16": "D", "FP8 E4M3": "^", "int8": "v", "int4": "x"}


def draw_errors(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.8 * lines + 1.1), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, row in zip(panels, rows, strict=False):
        panel.axhline(row["amp"], color=INK, linewidth=1, linestyle="--", label="bf16 autocast itself")
        panel.axhline(row["rebuilt"], color="#CC79A7", linewidth=1, linestyle=":", label="nothing stored")
        for keeping, (label, color, marker) in LINES.items():
            errors = [row["stored"][keeping][str(bits)] for bits in BITS]
            panel.plot([bits + 0.25 for bits in BITS], errors, color=color, marker=marker, markersize=5, label=label)
        for rival, marker in RIVAL_MARKS.items():
            panel.plot(
                [RIVALS[rival]],
                [row["rivals"][rival]],
                color="#D55E00",
                marker=marker,
                linestyle="",
                label=f"states in {rival}",
            )
        panel.set_title(row["network"], fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(color=GRID)
        panel.set_axisbelow(True)
    for panel in panels[-columns:]:
        panel.set_xlabel("bits a value and step", fontsize=9)
    figure.supylabel("relative gradient error", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle("Gradients of trained networks", fontsize=11)
    figure.savefig(path, dpi=130)
    return path
