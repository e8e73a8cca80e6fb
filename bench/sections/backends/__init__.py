"""The backends of a residual MLP beside each other, and beside plain backprop where rows are few or layers wide."""

from .comparison import draw, tables, targets
from .parts import measure

__all__ = ["draw", "measure", "tables", "targets"]
