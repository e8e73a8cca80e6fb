"""The pointwise ops in CUDA C++: the compiled launchers, called with addresses, sizes, dtype codes and a stream."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .. import stored
from .operands import (
    AdjointUpdateOperands,
    ForwardStepOperands,
    HeunStepOperands,
    ReverseExtrapolateOperands,
    ReverseUpdateOperands,
    StoredStepOperands,
    StoreOperands,
    StoreResults,
    StoreStepOperands,
)


class CompiledKernels:
    """The `KernelBackend` of a compiled module, whose launchers `csrc/bindings.cpp` defines under the ops' names.

    Args:
        kernels: the library, or its sources compiled for the host.
        stream: maps a device's index to the address of the stream to launch on.
    """

    def __init__(self, kernels: ModuleType, stream: Callable[[int], int]) -> None:
        self._kernels, self._stream = kernels, stream
        self._code = {getattr(torch, name): code for name, code in kernels.dtype_codes.items()}

    def forward_step(self, operands: ForwardStepOperands, out: Tensor) -> None:
        x, f, h = operands
        self._kernels.forward_step(
            x.data_ptr(), f.data_ptr(), h, out.data_ptr(), out.numel(), *self._codes(x, f), self._stream(x.get_device())
        )

    def heun_step(self, operands: HeunStepOperands, out: Tensor) -> None:
        x, k1, k2, h = operands
        self._kernels.heun_step(
            *(x.data_ptr(), k1.data_ptr(), k2.data_ptr(), h, out.data_ptr()),
            *(out.numel(), *self._codes(x, k1), self._stream(x.get_device())),
        )

    def reverse_update_(self, operands: ReverseUpdateOperands) -> None:
        x, y, k1, k2, weight, squares, g, v1, v2, g_scale, v_scale = operands
        partial_squares = self._partial_squares(squares)
        self._kernels.reverse_update_(
            *(x.data_ptr(), y.data_ptr(), k1.data_ptr(), _address(k2), weight, squares.data_ptr()),
            *(_address(g), _address(v1), _address(v2), g_scale, v_scale),
            *(_address(partial_squares), x.numel(), *self._codes(x, k1), self._stream(x.get_device())),
        )

    def reverse_extrapolate_(self, operands: ReverseExtrapolateOperands) -> None:
        x, y, d, k1, k2, weight, a, b, squares, g, v1, v2, g_scale, v_scale = operands
        partial_squares = self._partial_squares(squares)
        self._kernels.reverse_extrapolate_(
            *(x.data_ptr(), y.data_ptr(), d.data_ptr(), k1.data_ptr(), _address(k2), weight, a, b, squares.data_ptr()),
            *(_address(g), _address(v1), _address(v2), g_scale, v_scale),
            *(_address(partial_squares), x.numel(), *self._codes(x, k1), self._stream(x.get_device())),
        )

    def adjoint_update_(self, operands: AdjointUpdateOperands) -> None:
        g, v1, v2, g_scale, v_scale = operands
        self._kernels.adjoint_update_(
            *(g.data_ptr(), _address(v1), _address(v2), g_scale, v_scale),
            *(g.numel(), self._code[g.dtype], self._stream(g.get_device())),
        )

    def store(self, operands: StoreOperands, out: StoreResults) -> None:
        x, companion, unit, bits = operands
        self._kernels.store(
            *(x.data_ptr(), companion.data_ptr(), unit.data_ptr(), stored.largest_companion(companion.dtype, bits)),
            *(*stored.sizes(companion), bits, *(result.data_ptr() for result in out)),
            *(self._code[x.dtype], self._stream(x.get_device())),
        )

    def store_step(self, operands: StoreStepOperands, x_next: Tensor, out: StoreResults) -> None:
        x, k1, k2, weight, companion, unit, bits = operands
        self._kernels.store_step(
            *(x.data_ptr(), k1.data_ptr(), _address(k2), weight, companion.data_ptr(), unit.data_ptr()),
            *(stored.largest_companion(companion.dtype, bits), *stored.sizes(companion), bits, x_next.data_ptr()),
            *(*(result.data_ptr() for result in out), *self._codes(x, k1), self._stream(x.get_device())),
        )

    def stored_step(self, operands: StoredStepOperands, out: Tensor) -> None:
        companion, packed, scales, unit, bits = operands
        self._kernels.stored_step(
            *(companion.data_ptr(), packed.data_ptr(), scales.data_ptr(), unit.data_ptr(), *stored.sizes(companion)),
            *(bits, out.data_ptr(), self._code[companion.dtype], self._stream(companion.get_device())),
        )

    def _codes(self, x: Tensor, k: Tensor) -> tuple[int, int]:
        return self._code[x.dtype], self._code[k.dtype]

    def _partial_squares(self, squares: Tensor) -> Tensor | None:
        """Room for each block's squares where they must be added up in a fixed order."""
        if not torch.are_deterministic_algorithms_enabled():
            return None
        # The stream's order keeps the memory from being given away before the kernels are done with it.
        return squares.new_empty(2 * self._kernels.most_reverse_blocks())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
