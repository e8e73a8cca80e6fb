"""The plots of the sweep: a panel for each scheme, a line for each mode, named where it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .modes import BASELINE, MODES, REBUILDING, SCHEMES
from .tables import MIB

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers tell apart, and a marker for each mode besides.
STYLES = {
    "backprop": ("#000000", "s"),
    "checkpoint": ("#D55E00", "D"),
    "paper": ("#CC79A7", "^"),
    "corrected": ("#0072B2", "o"),
    "extrapolated": ("#009E73", "v"),
}
INK, GRID = "#444444", "#E4E4E4"
LABEL_GAP = 0.065  # of a panel's height, from one label to the next


@dataclass(frozen=True)
class Plot:
    file: str
    title: str
    axis: str
    modes: Sequence[str]
    value: Callable[[Row], float]
    band: Callable[[Row], tuple[float, float]] | None = None
    schemes: Sequence[str] = SCHEMES
    logarithmic: bool = True
    plain_numbers: bool = False
    """10 and 100 at a logarithmic axis, where there are no long ones."""


def draw(figures: Row, directory: Path, timed_schemes: Sequence[str]) -> list[Path]:
    """Writes a PNG for each plot, from the sweep's figures as results.json keeps them."""
    fp32 = f"MLP blocks of {figures['width']}, {figures['batch_rows']} rows, fp32"
    plots = [
        Plot(
            "memory.png",
            f"Activation memory of a training step ({fp32})",
            "peak, MiB",
            tuple(MODES),
            lambda row: row["peak_bytes"] / MIB,
            plain_numbers=True,
        ),
        Plot(
            "time.png",
            f"Time of a training step\n({fp32}; median and quartiles)",
            "time relative to backprop",
            tuple(MODES),
            lambda row: row["relative_time"]["median"],
            lambda row: (row["relative_time"]["low"], row["relative_time"]["high"]),
            schemes=timed_schemes,
            logarithmic=False,
        ),
        Plot(
            "gradient_error.png",
            "Gradient error (weights smooth in depth, float64; backprop and checkpoint are exact)",
            "relative error of the gradient",
            REBUILDING,
            lambda row: row["gradient_error"],
        ),
    ]
    return [_draw(plot, figures, directory / plot.file) for plot in plots]


def draw_costs(panels: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Gradient error against block evaluations of every candidate of `calibrate`, a panel for each network."""
    figure = Figure(figsize=(4.2 * len(panels), 4.4), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    figure.suptitle("Gradient error of each candidate against its cost", x=0.012, ha="left", fontsize=12, color=INK)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    axes[0].set_ylabel("relative error of the gradient", color=INK)
    colours = {"extrapolate": STYLES["extrapolated"][0], "step": STYLES["corrected"][0]}
    for axis, (title, candidates) in zip(axes, panels.items(), strict=True):
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel("block evaluations a step", color=INK)
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        for predictor, colour in colours.items():
            for accelerate, marker in ((False, "o"), (True, "^")):
                for anchored in (False, True):
                    points = [
                        (candidate["evaluations"], candidate["error"])
                        for candidate in candidates
                        if (candidate["predictor"], candidate["accelerate"]) == (predictor, accelerate)
                        and (candidate["anchors"] is not None) == anchored
                        and candidate["error"]
                    ]
                    if points:
                        name = f"{predictor}{', accelerated' if accelerate else ''}{', anchors' if anchored else ''}"
                        axis.plot(
                            *zip(*points, strict=True),
                            linestyle="none",
                            marker=marker,
                            color=colour,
                            markerfacecolor="none",
                            alpha=0.45 if anchored else 1.0,
                            markersize=4 if anchored else 7,
                            label=name,
                        )
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def _draw(plot: Plot, figures: Row, path: Path) -> Path:
    width = 5.7 if len(plot.schemes) == 1 else 10
    figure = Figure(figsize=(width, 4.2), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    figure.suptitle(plot.title, x=0.012, ha="left", fontsize=12, color=INK)
    panels = figure.subplots(1, len(plot.schemes), sharex=True, sharey=True, squeeze=False)[0]
    panels[0].set_ylabel(plot.axis, color=INK)
    ends: dict[str, dict[str, float]] = {}
    for scheme, panel in zip(plot.schemes, panels, strict=True):
        _frame(panel, plot, scheme, figures["depths"])
        ends[scheme] = {}
        for mode in plot.modes:
            rows = [row for row in figures["rows"] if (row["scheme"], row["mode"]) == (scheme, mode)]
            _line(panel, mode, rows, plot)
            ends[scheme][mode] = plot.value(rows[-1])
    if not plot.logarithmic:
        panels[0].set_ylim(bottom=0)
    for scheme, panel in zip(plot.schemes, panels, strict=True):  # the limits of the axes are known only now
        _label(panel, ends[scheme])
    figure.savefig(path)
    return path


def _frame(panel: Axes, plot: Plot, scheme: str, depths: Sequence[int]) -> None:
    panel.set_title(scheme.capitalize(), fontsize=11, color=INK)
    panel.set_xlabel("depth N, steps", color=INK)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator([float(steps) for steps in depths]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    if plot.logarithmic:
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        if plot.plain_numbers:
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(INK)
    panel.tick_params(colors=INK)
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)


def _line(panel: Axes, mode: str, rows: Sequence[Row], plot: Plot) -> None:
    colour, marker = STYLES[mode]
    depths = [row["steps"] for row in rows]
    # Several modes need the same memory: unfilled markers leave the lines below in sight.
    panel.plot(
        depths,
        [plot.value(row) for row in rows],
        color=colour,
        marker=marker,
        markersize=6,
        markerfacecolor="none",
        linestyle="--" if mode == BASELINE else "-",
        linewidth=1.5,
    )
    if plot.band is not None:
        low, high = zip(*map(plot.band, rows), strict=True)
        panel.fill_between(depths, low, high, color=colour, alpha=0.15, linewidth=0)


def _label(panel: Axes, ends: Mapping[str, float]) -> None:
    """The modes' names at the ends of their lines, moved apart where lines end together."""
    panel.get_ylim()  # brings the limits up to date, on which the height of a value depends
    in_panel = panel.transScale + panel.transLimits
    heights = {mode: in_panel.transform((1.0, value))[1] for mode, value in ends.items()}
    for mode, height in spread_apart(heights, LABEL_GAP).items():
        panel.annotate(
            mode,
            (1.02, height),
            xycoords="axes fraction",
            va="center",
            color=STYLES[mode][0],
            fontsize=10,
            annotation_clip=False,
        )


def spread_apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """The heights, moved as little as keeps neighbours `gap` apart: clusters are centred on their mean."""
    clusters: list[list[tuple[str, float]]] = []
    for item in sorted(heights.items(), key=lambda item: item[1]):
        clusters.append([item])
        while len(clusters) > 1 and _bottom(clusters[-1], gap) - _top(clusters[-2], gap) < gap:
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return {
        name: _bottom(cluster, gap) + place * gap for cluster in clusters for place, (name, _) in enumerate(cluster)
    }


def _bottom(cluster: Sequence[tuple[str, float]], gap: float) -> float:
    return sum(height for _, height in cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _top(cluster: Sequence[tuple[str, float]], gap: float) -> float:
    return _bottom(cluster, gap) + gap * (len(cluster) - 1)
