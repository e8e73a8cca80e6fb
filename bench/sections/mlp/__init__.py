"""A residual MLP whose depth is one op, beside plain backprop of the same network and beside its matrix products."""

from .measurement import measure
from .verdict import draw, tables, targets

__all__ = ["draw", "measure", "tables", "targets"]
