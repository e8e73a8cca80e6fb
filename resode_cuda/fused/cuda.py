"""The depth-fused ops in CUDA C++: what the kernels of csrc/mlp_*.cu are launched with.

`passes.py` says in which order. The kernels are compiled and executed on a CPU by the tests; they have not run on a GPU
yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..reverse import Reverse
from .driver import Boundary as Ends
from .driver import NetworkKernels as Kernels
from .driver import Scratch, padded_dim, rows_apart
from .driver import SlabDriver as Stacks
from .network import Network
from .norms import EPSILON
from .signature import ParameterGradients as Gradients

LARGEST_DIM = 128
UNIT = 32
"""Rows that every launch takes in whole blocks."""


def reason(network: Network, method: Any, device: torch.device) -> str | None:
    """TEMPORARY"""
    return "being rewritten"


def forward(network: Network, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_backend.forward`."""
    return _stacks().forward(network, *given)


def adjoint(network: Network, *given: Any) -> tuple[Tensor, Gradients | None, Tensor, Tensor | None]:
    """As `torch_backend.adjoint`."""
    return _stacks().adjoint(network, *given)


def exact_adjoint(network: Network, *given: Any) -> tuple[Tensor, Gradients | None]:
    """As `torch_backend.exact_adjoint`."""
    return _stacks().exact_adjoint(network, *given)


def stacks_of(library: ModuleType, stream: Callable[[int], int]) -> Stacks:
    """The ops by a compiled library.

    Args:
        library: the installed one, or its sources compiled for the host.
        stream: from a device's index, the address of the stream to launch on.
    """
    return Stacks(lambda network, extrapolates: CudaKernels(library, stream, network, extrapolates))


@functools.cache
def _stacks() -> Stacks:
    return stacks_of(library.require('backend="cuda"'), torch._C._cuda_getCurrentRawStream)


class CudaKernels(Kernels):
    """A library's kernels on the addresses of tensors."""

    sums_by_dim = False

    def __init__(self, library: ModuleType, stream: Callable[[int], int], network: Network, extrapolates: bool) -> None:
        self.library = library
        self.code = library.dtype_codes[str(network.dtype).removeprefix("torch.")]
        chunk, self.warps = library.mlp_shape(padded_dim(network.dim), self.code)
        super().__init__(network, chunk, UNIT, extrapolates)
        self.fields = (
            *map(_address, (self.w1, self.b1, self.w2, self.b2, self.schedule)),
            self.hidden,
            network.dim,
            self.uses == 2,
            library.activation_codes[network.activation],
            library.norm_codes[network.norm],
            EPSILON,
        )
        self.stream = stream(network.weight_in.get_device())

    def step_bytes(self, is_split: bool) -> int:
        of_norms = 2 * 4 * self.warps // self.library.mlp_group_rows
        return of_norms + super().step_bytes(is_split)

    def norms(self, rows: int) -> Tensor:
        # A part for each warp.
        groups = self._groups(rows)
        parts = -(-rows // (groups * self.library.mlp_group_rows)) * groups * self.warps
        return self.schedule.new_empty(parts, len(self.network.steps), 2)

    def forward(
        self,
        x: Tensor,
        x_last: Tensor | None,
        increments: Tensor | None,
        anchored: Tensor | None,
        steps: int,
        every: int,
    ) -> None:
        kept = 0 if increments is None else len(increments)
        with self._on_device():
            self.library.mlp_forward(
                self.fields,
                self._how(len(x)),
                *map(_address, (x, x_last, increments, anchored)),
                *(len(x), rows_apart(anchored), steps, kept, every),
            )

    def adjoint(
        self,
        ends: Ends,
        norms: Tensor,
        scratch: Scratch | None,
        first: int,
        last: int,
        anchors: int | None,
        solver: Reverse,
        adds_gradients: bool,
    ) -> None:
        x, d = ends.x_last, ends.d_last
        kept: list[Tensor | None] = [None, None]
        carried = None
        if d is not None and last == len(self.network.steps):
            kept = [*d, None][:2]
        else:
            carried = d
        us, cs = scratch or (None, None)
        tensors = (
            x,
            ends.g_last,
            ends.x_first,
            ends.g_first,
            *kept,
            carried,
            ends.d_first,
            ends.anchored,
            norms,
            us,
            cs,
        )
        with self._on_device():
            self.library.mlp_adjoint(
                self.fields,
                self._how(len(x)),
                *map(_address, tensors),
                *(len(x), rows_apart(ends.anchored), 0 if us is None else us.shape[1]),
                *(first, last, len(self.network.steps), anchors or 1),
                *(solver.corrections, solver.extrapolates, solver.reuse),
            )

    def exact(
        self, x: Tensor, g_last: Tensor, g_first: Tensor, rs: Tensor | None, scratch: Scratch, first: int, last: int
    ) -> None:
        addresses = map(_address, (x, g_last, g_first, scratch.us, rs, scratch.cs))
        with self._on_device():
            self.library.mlp_exact(self.fields, self._how(len(x)), *addresses, len(x), scratch.us.shape[1], first, last)

    def add_gradients(self, scratch: Scratch, rows: int, first: int, last: int) -> None:
        with self._on_device():
            self.library.mlp_gradients(
                self.fields,
                self._how(rows),
                *map(_address, (*scratch, *self.sums)),
                *(rows, scratch.us.shape[1], first, last, torch.are_deterministic_algorithms_enabled()),
            )

    def _groups(self, rows: int) -> int:
        with self._on_device():
            groups: int = self.library.mlp_groups(rows, self.dim, self.code)
        return groups

    def _how(self, rows: int) -> tuple[int, int, int, int]:
        return self.dim, self.code, self._groups(rows), self.stream

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
