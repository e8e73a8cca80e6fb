"""The ways of training that the benchmark compares, as data."""

from __future__ import annotations

from resode_cuda import ResidualMLP, ResidualStack

BASELINE = "backprop"
MODES = {
    BASELINE: {"gradient": "backprop"},
    "checkpoint": {"gradient": "checkpoint"},
    "paper": {"gradient": "adjoint", "reverse": "paper"},
    "corrected": {"gradient": "adjoint", "reverse": "corrected"},
    "extrapolated": {"gradient": "adjoint", "reverse": "extrapolated"},
}
STORED = {"stored": {"gradient": "adjoint", "reverse": "stored"}}
"""A way for networks whose states nothing rebuilds, apart from the comparison of those that are."""
REBUILDING = tuple(mode for mode, settings in MODES.items() if settings["gradient"] == "adjoint")
SCHEMES = ("euler", "heun")


def set_mode(stack: ResidualStack | ResidualMLP, mode: str) -> None:
    for name, value in (MODES | STORED)[mode].items():
        setattr(stack, name, value)
