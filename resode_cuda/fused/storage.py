"""What a depth-fused stack keeps of increments that it stores, and how it lies in memory.

A sample of `stored.py` is a row here. Rows have groups of 32 neighbours, of which the last may be short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..adjoint.reevaluation import SAMPLE
from ..method import Method
from ..squares import square_dtype
from ..stored import GROUP

PackedSteps = Sequence[Tensor]
"""The integers of each step whose increment is stored, [rows, groups, 4 bits]: parts of one tensor."""


class StoredIncrements(NamedTuple):
    """What a forward pass keeps of increments in a few bits. All are empty where none is stored."""

    companions: Tensor
    """[segments, *], the companion where each segment of `Method.segments` ends."""
    units: Tensor
    """[segments, rows, groups], in the companions' dtype."""
    scales: Tensor
    """[stored steps, rows, groups], uint8."""
    packed: Tensor
    """uint8, the integers of one stored step after the other."""

    def steps(self, method: Method) -> PackedSteps:
        """Each stored step's part of `packed`."""
        _, rows, groups = self.scales.shape
        bits = [method.solver.bits_of(n) for n in method.stored_steps]
        parts = self.packed.split([rows * groups * 4 * b for b in bits])
        return [part.view(rows, groups, 4 * b) for part, b in zip(parts, bits, strict=True)]

    def of_rows(self, rows: slice) -> StoredIncrements:
        """Those of a part of the rows, where all steps have as many bits: `packed` is [stored steps, rows, bytes]."""
        steps, count, _ = self.scales.shape
        packed = self.packed.view(steps, count, self.packed.numel() // max(1, steps * count))
        return StoredIncrements(self.companions[:, rows], self.units[:, rows], self.scales[:, rows], packed[:, rows])


def formats(method: Method, x: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field, for states like x [*, dim], whose dtype is wide enough for companions."""
    dim, segments, steps = x.shape[-1], len(method.segments), method.stored_steps
    rows, groups = math.prod(x.shape[:-1]), -(-dim // GROUP)
    size = sum(4 * method.solver.bits_of(n) for n in steps) * rows * groups
    return {
        "companions": ((segments, *x.shape), x.dtype),
        "units": ((segments, rows, groups), x.dtype),
        "scales": ((len(steps), rows, groups), torch.uint8),
        "packed": ((size,), torch.uint8),
    }


def unfilled(method: Method, x: Tensor) -> StoredIncrements:
    """Memory for the increments of states like x."""
    return StoredIncrements(*(x.new_empty(shape, dtype=dtype) for shape, dtype in formats(method, x).values()))


def defect_squares(sums: Tensor) -> Tensor:
    """[steps, 2] as `AdjointResult` has them, from [steps, 3] with |y|^2 and |c_{n+1}|^2 apart; others as they are."""
    if sums.shape[1] == 2:
        return sums
    return torch.stack([sums[:, 0], torch.maximum(sums[:, 1], sums[:, 2])], 1)


class RoundingSquares(NamedTuple):
    """What a forward pass measures of the rounding, as `adjoint.coarseness` judges it.

    `sample` is a part of a state: x_{n+1} of the first step n that is stored, in every 2^shift-th row.
    """

    squares: Tensor
    """[steps, 2]: |x_{n+1} - c_{n+1}|^2 and |x_{n+1} - c_n|^2, added to."""
    sample: Tensor
    """[sampled rows, dim], to be filled."""
    shift: int

    def numbers(self, rows: int) -> Tensor:
        """[steps, 3]: the squares, and that of a state all of whose values are typical: as large as the median."""
        typical = self.sample.abs().median() if len(self.sample) else self.sample.new_zeros(())
        size = rows * self.sample.shape[-1]
        of_all = typical.to(self.squares.dtype).square().mul(size).expand(len(self.squares), 1)
        return torch.cat([self.squares, of_all], 1)


def rounding_shape(method: Method) -> tuple[int, int]:
    """Shape of `RoundingSquares.numbers`."""
    return len(method) if method.segments else 0, 3


def unmeasured(method: Method, x: Tensor) -> RoundingSquares:
    """Memory for what is measured of states [rows, dim]."""
    rows, dim = x.shape
    steps, _ = rounding_shape(method)
    shift = (max(1, -(-rows * dim // SAMPLE)) - 1).bit_length()
    squares = x.new_zeros(steps, 2, dtype=square_dtype(x.device))
    return RoundingSquares(squares, x.new_empty(-(-rows >> shift) if steps else 0, dim), shift)
