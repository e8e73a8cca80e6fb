"""The frame that all pictures of the experiments share: panels side by side, a legend below, slopes to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatterSciNotation, NullFormatter, NullLocator

from ..harness.plots import GRID, INK
from .solvers import SOLVERS


class Panels:
    """A figure with a panel for each title.

    Args:
        shared: the panels have the same vertical axis.
    """

    def __init__(self, titles: Sequence[str], *, shared: bool = True, width: float = 4.2, height: float = 4.0) -> None:
        self.figure = Figure(figsize=(width * len(titles), height), dpi=110, layout="constrained")
        self.axes: list[Axes] = list(self.figure.subplots(1, len(titles), sharey=shared, squeeze=False)[0])
        for axis, title in zip(self.axes, titles, strict=True):
            axis.set_title(title, fontsize=10, color=INK)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(INK)
            axis.tick_params(colors=INK, labelsize=9)
            axis.grid(color=GRID, linewidth=0.7)
            axis.set_axisbelow(True)

    def save(self, path: Path, columns: int = 5) -> None:
        """Write it, with each name of the legend once, below all panels."""
        named: dict[str, Any] = {}
        for axis in self.axes:
            for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
                named.setdefault(name, handle)
        self.figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )
        self.figure.savefig(path)


def depth_axis(axis: Axes, depths: Sequence[int], name: str = "depth N, steps") -> None:
    axis.set_xscale("log", base=2)
    most = max(1, -(-len(depths) // 8))  # so that numbers keep apart
    axis.xaxis.set_major_locator(FixedLocator([float(depth) for depth in depths[::most]]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda depth, _: f"{depth:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(name, color=INK)


def error_axis(axis: Axes, name: str = "") -> None:
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(LogFormatterSciNotation())
    if name:
        axis.set_ylabel(name, color=INK)


def percent_axis(axis: Axes, name: str = "") -> None:
    """Logarithmic, with few numbers: errors of a classifier lie between 1% and 90%."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 90]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    if name:
        axis.set_ylabel(name, color=INK)


def line(axis: Axes, solver: str, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A solver's figures, in its colour and with its marker."""
    of = SOLVERS[solver]
    style = {"label": solver, "markerfacecolor": "none", "markersize": 6, "linewidth": 1.5, **style}
    axis.plot(x, y, color=of.colour, marker=of.marker, **style)


def slope(axis: Axes, depths: Sequence[int], start: float, order: int) -> None:
    """A line of error ~ N^-order from `start` on, to compare with; the legend names it."""
    ends = [start, start * (depths[0] / depths[-1]) ** order]
    dashes = (0, (6, 2 * order, 1, 2 * order))
    axis.plot([depths[0], depths[-1]], ends, color=INK, linestyle=dashes, linewidth=1, label=f"slope −{order}")
