"""Layers too wide to keep on chip: torch's matrix products, and Triton's kernels for all that lies between them.

The tiles, the solver and the products are those of `reference/passes.py`; a pass over memory is what is saved. Executed
on a CPU, not yet on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops import triton as triton_ops
from ..norms import EPSILON
from ..reference.tile import Point, RowTile
from .arguments import WideConfig

ROWS, COLUMNS = 32, 64
"""Size of the tiles in which cotangents go through the activation."""
RANGE_ROWS = 128
"""Rows whose sums one program adds up: few enough for many programs, which keep memory busy."""


class WideTile(RowTile):
    """`RowTile` of `reference/tile.py` with fewer passes over memory."""

    def _layer_step(self, out: Tensor, layer: int, x: Tensor, point: Point, scale: float) -> None:
        if not self._needs_u:
            super()._layer_step(out, layer, x, point, scale)
            return
        # What reads x for the norm adds b2 to it: the product is then all that is left to add.
        bias = None if self.bias_out is None else self.bias_out[layer]
        point.u = point.u_memory
        self._normalize(x, point, None if bias is None and out is x else out, bias, scale)
        self._add_product(out, self._activate(layer, point).a, self.weight_out_t[layer], scale)

    def _normalize(
        self, x: Tensor, point: Point, out: Tensor | None = None, bias: Tensor | None = None, scale: float = 0.0
    ) -> None:
        """u and r of a point x; and out = x + scale bias. out may be x."""
        from .wide_kernels import normalize_kernel

        rows, dim = x.shape
        point.r = x.new_empty(rows, 1)
        self._launch(normalize_kernel, (rows,), _warps(dim), x.contiguous(), point.u, point.r, out, bias, scale)

    def _norm_vjp(self, out: Tensor, point: Point, cotangent: Tensor, scale: float) -> None:
        from .wide_kernels import norm_vjp_kernel

        rows, dim = out.shape
        self._launch(norm_vjp_kernel, (rows,), _warps(dim), cotangent, point.u, point.r, out, scale)

    def _activation_vjp(self, cotangent: Tensor, point: Point, bias: Tensor | None, scale: float) -> None:
        from .wide_kernels import activation_vjp_kernel

        rows, hidden = cotangent.shape
        grid = -(-rows // RANGE_ROWS), -(-hidden // COLUMNS)
        sums = None if bias is None else cotangent.new_empty((grid[0], hidden), dtype=torch.float32)
        self._launch(activation_vjp_kernel, grid, 4, cotangent, point.z, sums, rows, RANGE_ROWS, hidden)
        if bias is not None and sums is not None:
            bias.add_(sums.sum(0), alpha=scale)

    def store(self, x: Tensor, companion: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = ops.store(x, companion, unit, bits)
        return found

    def take_back(self, companion: Tensor, packed: Tensor, scales: Tensor, unit: Tensor, bits: int) -> Tensor:
        found: Tensor = ops.stored_step(companion, packed, scales, unit, bits)
        return found

    def rebuild(
        self, n: int, x: Tensor, y: Tensor, squares: Tensor, d: Tensor | None = None, d_next: Tensor | None = None
    ) -> None:
        from .wide_kernels import rebuild_kernel

        rows, dim = x.shape
        sums = squares.new_empty(rows, 2)
        a, b = (0.0, 0.0) if d is None or n == 0 else self.method.weights[n - 1]
        operands = x, y, d, None if n == 0 else d_next, sums, *self._last_bias(n), a, b
        self._launch(rebuild_kernel, (rows,), _warps(dim), *operands)
        squares += sums.sum(0)

    def add_square(
        self, square: Tensor, x: Tensor, minus: Tensor | None = None, increment: Tensor | None = None, n: int = 0
    ) -> None:
        from .wide_kernels import squares_kernel

        rows, dim = x.shape
        sums = square.new_empty(rows)
        bias = (None, 0.0) if increment is None else self._last_bias(n)
        self._launch(squares_kernel, (rows,), _warps(dim), x, minus, increment, sums, *bias)
        square += sums.sum()

    def _launch(self, kernel: Any, grid: tuple[int, ...], warps: int, *values: Any) -> None:
        network = self.network
        config = WideConfig(
            activation=network.activation,
            norm=network.norm,
            epsilon=EPSILON,
            dim=network.dim,
            padded_dim=_padded(network.dim),
            rows=ROWS,
            columns=COLUMNS,
        )
        with triton_ops.launch_lock, torch.cuda.device_of(values[0]):
            kernel[grid](*values, CONFIG=config, num_warps=warps)


def _padded(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def _warps(dim: int) -> int:
    """16 values a thread, and no more than 16 warps."""
    return max(1, min(16, _padded(dim) // 512))
