"""The depth-fused ops in CUDA C++: the operands that the kernels of `csrc/mlp` are launched with.

`driver.py` says in which order. The kernels are compiled and executed on a CPU by the tests; they have not run on a GPU
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
from ..method import Method
from ..schemes import Heun
from . import requirements
from .cuda_operands import (
    AdjointOperands,
    ExactOperands,
    ForwardOperands,
    GradientOperands,
    LaunchOperands,
    NetworkOperands,
    addresses,
)
from .driver import NetworkKernels, Scratch, SlabDriver, StatePass, padded_dim, rows_apart
from .network import Network
from .norms import EPSILON
from .signature import AdjointResult, ParameterGradients, SavedStates, Wanted

KERNELS = "kernels in CUDA C++"
LARGEST_DIM = 128
SCHEMES = ("euler", "heun")
UNIT = 32
"""Rows that every launch takes in whole blocks."""


def reason(network: Network, method: Method, device: torch.device) -> str | None:
    """Why the kernels in CUDA C++ can't compute this; None if they can."""
    if network.dim > LARGEST_DIM:
        return f"{KERNELS} keep rows of at most {LARGEST_DIM} values on chip, got dim {network.dim}"
    if method.solver.is_stored:
        return f"{KERNELS}, which are made for few rows, store no increments"
    return (
        requirements.reason(KERNELS, network, method, device)
        or library.build_info().reason
        or unknown_name(library.require('backend="cuda"'), network, method)
    )


def unknown_name(library: ModuleType, network: Network, method: Method) -> str | None:
    """Which scheme, activation or norm of a network a library's kernels lack; None if they have all of them."""
    for kind, known, name in (
        ("schemes", SCHEMES, method.scheme.name),
        ("activations", library.activation_codes, network.activation),
        ("norms", library.norm_codes, network.norm),
    ):
        if name not in known:
            return f"{KERNELS} have the {kind} {', '.join(map(str, known))}, got {name!r}"
    return None


def forward(network: Network, method: Method, x: Tensor) -> SavedStates:
    """As `reference.passes.forward`, by `CudaKernels.forward`."""
    return _driver().forward(network, method, x)


def adjoint(network: Network, method: Method, g: Tensor, states: SavedStates, wanted: Wanted) -> AdjointResult:
    """As `reference.passes.adjoint`, by `CudaKernels.adjoint`."""
    return _driver().adjoint(network, method, g, states, wanted)


def exact_adjoint(
    network: Network, method: Method, g: Tensor, x_first: Tensor, wants_parameters: bool
) -> tuple[Tensor, ParameterGradients | None]:
    """As `reference.passes.exact_adjoint`, by `CudaKernels.exact`."""
    return _driver().exact_adjoint(network, method, g, x_first, wants_parameters)


def driver_of(library: ModuleType, stream: Callable[[int], int]) -> SlabDriver:
    """The ops by a compiled library.

    Args:
        library: the installed one, or its sources compiled for the host.
        stream: maps a device's index to the address of the stream to launch on.
    """
    return SlabDriver(lambda network, method: CudaKernels(library, stream, network, method))


@functools.cache
def _driver() -> SlabDriver:
    return driver_of(library.require('backend="cuda"'), torch._C._cuda_getCurrentRawStream)


class CudaKernels(NetworkKernels):
    """A library's kernels on the addresses of tensors."""

    sums_by_dim = False

    def __init__(self, library: ModuleType, stream: Callable[[int], int], network: Network, method: Method) -> None:
        self.library = library
        self.code = library.dtype_codes[str(network.dtype).removeprefix("torch.")]
        chunk, self.warps = library.mlp_shape(padded_dim(network.dim), self.code)
        super().__init__(network, method, chunk, UNIT)
        self.stream = stream(network.weight_in.get_device())

    def _network_operands(self) -> tuple[Any, ...]:
        network = self.network
        return addresses(
            NetworkOperands(
                w1=self.w1,
                b1=self.b1,
                w2=self.w2,
                b2=self.b2,
                schedule=self.schedule,
                hidden=self.hidden,
                dim=network.dim,
                is_heun=self.method.scheme is Heun,
                activation=self.library.activation_codes[network.activation],
                norm=self.library.norm_codes[network.norm],
                epsilon=EPSILON,
            )
        )

    def step_bytes(self, two_passes: bool) -> int:
        of_squares = 2 * 4 * self.warps // self.library.mlp_group_rows
        return of_squares + super().step_bytes(two_passes)

    def squares(self, rows: int) -> Tensor:
        # A part for each warp.
        groups = self._groups(rows)
        parts = -(-rows // (groups * self.library.mlp_group_rows)) * groups * self.warps
        return self.schedule.new_empty(parts, len(self.schedule), 2)

    def forward(
        self, x: Tensor, x_last: Tensor | None, increments: Tensor | None, anchored: Tensor | None, steps: int
    ) -> None:
        operands = ForwardOperands(
            x_first=x,
            x_last=x_last,
            increments=increments,
            anchored=anchored,
            rows=len(x),
            anchored_rows=rows_apart(anchored),
            steps=steps,
            saved_increments=0 if increments is None else len(increments),
        )
        self._launch(self.library.mlp_forward, operands)

    def adjoint(self, state_pass: StatePass) -> None:
        start, end, anchored, _, squares, scratch, steps, _ = state_pass
        count, solver = len(self.method), self.method.solver
        last_increment = increment_before = None
        increments_in = start.increments
        if increments_in is not None and steps.stop == count:
            last_increment, increment_before = increments_in[0], increments_in[1] if count > 1 else None
            increments_in = None
        operands = AdjointOperands(
            x_last=start.x,
            g_last=start.g,
            x_first=end.x,
            g_first=end.g,
            last_increment=last_increment,
            increment_before=increment_before,
            increments_in=increments_in,
            increments_out=end.increments,
            anchored=anchored,
            squares=squares,
            layer_inputs=scratch.layer_inputs,
            cotangents=scratch.cotangents,
            rows=len(start.g),
            anchored_rows=rows_apart(anchored),
            scratch_rows=scratch.rows,
            first=steps.start,
            last=steps.stop,
            steps=count,
            corrections=solver.corrections,
            extrapolates=solver.extrapolates,
            reuses=solver.reuse,
        )
        self._launch(self.library.mlp_adjoint, operands)

    def exact(self, x: Tensor, g_last: Tensor, g_first: Tensor, scratch: Scratch, steps: range) -> None:
        operands = ExactOperands(
            x_first=x,
            g_last=g_last,
            g_first=g_first,
            layer_inputs=scratch.layer_inputs,
            inverse_rms=scratch.inverse_rms,
            cotangents=scratch.cotangents,
            rows=len(x),
            scratch_rows=scratch.rows,
            first=steps.start,
            last=steps.stop,
        )
        self._launch(self.library.mlp_exact, operands)

    def add_gradients(self, scratch: Scratch, rows: int, steps: range) -> None:
        dw1, db1, dw2, db2 = self.sums
        operands = GradientOperands(
            layer_inputs=scratch.layer_inputs,
            cotangents=scratch.cotangents,
            dw1=dw1,
            db1=db1,
            dw2=dw2,
            db2=db2,
            rows=rows,
            scratch_rows=scratch.rows,
            first=steps.start,
            last=steps.stop,
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        self._launch(self.library.mlp_gradients, operands)

    def _launch(
        self,
        launcher: Callable[..., None],
        operands: ForwardOperands | AdjointOperands | ExactOperands | GradientOperands,
    ) -> None:
        how = LaunchOperands(self.dim, self.code, self._groups(operands.rows), self.stream)
        with self._on_device():
            launcher(self._network_operands(), how, addresses(operands))

    def _groups(self, rows: int) -> int:
        with self._on_device():
            groups: int = self.library.mlp_groups(rows, self.dim, self.code)
        return groups

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
