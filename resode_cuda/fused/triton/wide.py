"""Layers too wide to keep on chip: torch's matrix products, and Triton's kernels for all that lies between them.

The tiles, the solver and the products are those of `torch_backend`; a pass over memory is what is saved. Compiled and
interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..norms import EPSILON
from ..reference.tile import Point
from ..reference.tile import RowTile as Tile

ROWS, COLUMNS = 32, 64
"""Of the tiles in which cotangents go through the activation."""
RANGE_ROWS = 128
"""Rows whose sums one program adds up: few enough for many programs, which keep memory busy."""


class WideTile(Tile):
    """`tile.Tile` with fewer passes over memory."""

    def _normalize(self, x: Tensor, point: Point) -> None:
        assert self.norm is not None
        rows, dim = x.shape
        point.r = x.new_empty(rows, 1)
        constants = {"HAS_MEAN": self.norm == "layer", "EPSILON": EPSILON, "DIM": dim, "D": _padded(dim)}
        _run("normalize_kernel", (rows,), _warps(dim), x.contiguous(), point.u, point.r, **constants)

    def _norm_vjp(self, out: Tensor, point: Point, cotangent: Tensor, scale: float) -> None:
        assert self.norm is not None
        rows, dim = out.shape
        constants = {"HAS_MEAN": self.norm == "layer", "DIM": dim, "D": _padded(dim)}
        _run("pull_back_kernel", (rows,), _warps(dim), cotangent, point.u, point.r, out, scale, **constants)

    def _activation_vjp(self, cotangent: Tensor, point: Point, bias: Tensor | None, scale: float) -> None:
        rows, hidden = cotangent.shape
        grid = -(-rows // RANGE_ROWS), -(-hidden // COLUMNS)
        sums = None if bias is None else cotangent.new_empty((grid[0], hidden), dtype=torch.float32)
        _run(
            "activation_backward_kernel",
            grid,
            4,
            *(cotangent, point.z, sums, rows, RANGE_ROWS, hidden),
            ACTIVATION=self.network.activation,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
        if bias is not None and sums is not None:
            bias.add_(sums.sum(0), alpha=scale)

    def rebuild(
        self, x: Tensor, y: Tensor, d: Tensor, d_next: Tensor, weights: tuple[float, float] | None, norms: Tensor
    ) -> tuple[Tensor, Tensor]:
        nothing: tuple[Any, ...] = (None, None, None, 1.0, 1.0)
        if weights is None:
            ops.reverse_update_(x, y, d, None, 1.0, norms, *nothing)
        else:
            ops.reverse_extrapolate_(x, y, d_next, d, None, 1.0, *weights, norms, *nothing)
        return d, d_next


def _run(name: str, grid: tuple[int, ...], warps: int, *values: Any, **constants: Any) -> None:
    with torch.cuda.device_of(values[0]):
        getattr(_source(), name)[grid](*values, **constants, num_warps=warps)


def _padded(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def _warps(dim: int) -> int:
    """16 values a thread, and no more than 16 warps."""
    return max(1, min(16, _padded(dim) // 512))


@functools.cache
def _source() -> ModuleType:
    from . import wide_kernels as wide_source  # imports Triton

    return wide_source
