"""What a backend with kernels provides: a function that launches each op."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

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


class KernelBackend(Protocol):
    """The launches, by `cuda.CompiledKernels` and by the module `triton.py`.

    Kernels walk through memory: `Op` hands them operands that are dense, not empty, of one layout, with k1 and k2 of
    one dtype, on the current device. What is written shares no memory with what is read. That layout is a companion's,
    sample after sample, where increments are stored; packed, scales and units are contiguous.
    """

    def forward_step(self, operands: ForwardStepOperands, out: Tensor) -> None: ...

    def heun_step(self, operands: HeunStepOperands, out: Tensor) -> None: ...

    def reverse_update_(self, operands: ReverseUpdateOperands) -> None: ...

    def reverse_extrapolate_(self, operands: ReverseExtrapolateOperands) -> None: ...

    def adjoint_update_(self, operands: AdjointUpdateOperands) -> None: ...

    def store(self, operands: StoreOperands, out: StoreResults) -> None: ...

    def store_step(self, operands: StoreStepOperands, x_next: Tensor, out: StoreResults) -> None: ...

    def stored_step(self, operands: StoredStepOperands, out: Tensor) -> None: ...
