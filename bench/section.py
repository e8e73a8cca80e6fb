"""What `python -m bench` asks of a section, and which sections there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # so that --help comes at once
    import torch
    from rich.progress import Progress

    from .harness.tables import Table, Target
    from .options import Options

Figures = dict[str, Any]
"""Everything that a section measured, as results.json keeps it."""


class Section(Protocol):
    """A module of `bench.sections` with these four functions; all but `measure` see nothing but the figures."""

    def measure(self, options: Options, device: torch.device, progress: Progress) -> Figures:
        """Measure everything, and tell `progress` on the way.

        "failure" among the figures is a reason for which the section counts as failed, though it has figures; with
        "stopped" among them, no other section is begun.
        """

    def tables(self, figures: Figures) -> list[Table]:
        """The figures as people read them."""

    def targets(self, figures: Figures) -> list[Target]:
        """What the figures are held against; empty where nothing is promised."""

    def draw(self, figures: Figures, directory: Path) -> list[Path]:
        """Write the section's pictures and return their paths; empty where it has none."""


def _cost() -> Section:
    from .sections import cost

    return cost


def _digits() -> Section:
    from .sections import digits

    return digits


def _sweep() -> Section:
    from .sections import sweep

    return sweep


def _kernels() -> Section:
    from .sections import kernels

    return kernels


def _mlp() -> Section:
    from .sections import mlp

    return mlp


def _backends() -> Section:
    from .sections import backends

    return backends


def _accuracy() -> Section:
    from .sections import accuracy

    return accuracy


def _stored() -> Section:
    from .sections import stored

    return stored


def _overhead() -> Section:
    from .sections import overhead

    return overhead


def _models() -> Section:
    from .sections import models

    return models


def _finetuning() -> Section:
    from .sections import finetuning

    return finetuning


SECTIONS: dict[str, Callable[[], Section]] = {
    "cost": _cost,  # first: a process in which torch's profiler ran is slower
    "digits": _digits,
    "sweep": _sweep,
    "kernels": _kernels,
    "mlp": _mlp,
    "backends": _backends,
    "accuracy": _accuracy,
    "stored": _stored,
    "overhead": _overhead,
    "models": _models,
    "finetuning": _finetuning,
}
"""Each section by name, in the order in which they run; imported when it is asked for."""
DEFAULT = ("cost", "digits", "sweep")
"""The sections that run where none is named."""
