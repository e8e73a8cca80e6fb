"""Figures as people read them: tables for the terminal and for Markdown, and targets that are met or missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table as RichTable

from .timing import Spread

MIB = 2**20
MEMORY_NOTE = (
    "Activation memory in MiB: peak of a step, held between its forward and backward pass, and by which a fresh "
    "process grows in a step."
)
TIME_NOTE = "Time of a step relative to backprop's in the same round: median ± half the distance of the quartiles."


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    labels: int = 2
    """How many columns at the left hold names; the others hold figures."""
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""

    def rich(self) -> RichTable:
        table = RichTable(
            title=self.title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),  # narrow enough for a terminal of 80 columns
        )
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.labels else "right", no_wrap=True)
        for previous, row in zip([None, *self.rows], self.rows, strict=False):
            if previous is not None and previous[0] != row[0]:
                table.add_section()
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rules = ["---" if index < self.labels else "---:" for index in range(len(self.columns))]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rules, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class Target:
    what: str
    measured: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        relation = "at least" if self.at_least else "at most"
        shown = f"{self.measured:.1e}" if 0 < self.measured < 0.01 else f"{self.measured:.2f}"
        verdict = "met" if self.met else "missed"
        return f"{verdict}: {self.what} {shown}{self.unit}, {relation} {self.limit:g}{self.unit}"


def mebibytes(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / MIB:.2f}" if count < 10 * MIB else f"{count / MIB:.1f}"


def relative_time(ratio: Spread) -> str:
    """The median, and half the distance of the quartiles."""
    return f"{ratio.median:.2f} ±{(ratio.high - ratio.low) / 2:.2f}"


def error(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
