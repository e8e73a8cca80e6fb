"""The depth-fused ops in CUDA C++: what the kernels of csrc/mlp_*.cu are launched with.

A forward pass is one launch, whatever the depth; a backward pass two for each slab of rows, the state pass and the
weight-gradient pass, between which each layer's points and cotangents wait in scratch memory. A slab has as many rows
as that holds; where a stack is too deep for that, slabs go through the depth in ranges.

The kernels are compiled and executed on a CPU by the tests; they have not run on a GPU yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from ..ops import compiled
from ..reverse import Reverse
from .network import Network
from .norms import EPSILON
from .operands import padded, schedule
from .slabs import slabs
from .tile import Gradients

SMALLEST_DIM, LARGEST_DIM = 16, 128
OLDEST = (8, 0)
"""Compute capability of the first GPUs with asynchronous copies into shared memory."""
UNIT = 32
"""Rows that every launch takes in whole blocks."""


def cause(network: Network, device: torch.device, solver: Reverse | None) -> str | None:
    """Why the kernels in CUDA C++ can't compute this; None if they can."""
    if device.type != "cuda":
        return f"kernels in CUDA C++ run on CUDA devices, got tensors on {device}"
    if network.dtype == torch.float64:
        return "kernels in CUDA C++ take parameters of float32, bfloat16 or float16, got float64"
    if network.dim > LARGEST_DIM:
        return f"kernels in CUDA C++ keep rows of at most {LARGEST_DIM} values on chip, got dim {network.dim}"
    if solver is not None and solver.accelerate:
        return (
            "kernels in CUDA C++ do not accelerate corrections, which is the default from 2 on; use "
            "Reverse(..., accelerate=False)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        needs, got = (f"{major}.{minor}" for major, minor in (OLDEST, capability))
        return (
            f"kernels in CUDA C++ need compute capability {needs}, got {got}; "
            'on this GPU backend="torch" computes all of it'
        )
    return compiled.build_info().cause


def forward(network: Network, x: Tensor, kept: int, anchors: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_backend.forward`."""
    return _on_gpus().forward(network, x, kept, anchors)


def adjoint(
    network: Network,
    solver: Reverse,
    anchors: int | None,
    g: Tensor,
    x_last: Tensor,
    increments: Tensor,
    anchored: Tensor,
    wants_parameters: bool,
    wants_input: bool,
) -> tuple[Tensor, Gradients | None, Tensor, Tensor | None]:
    """As `torch_backend.adjoint`."""
    states = g, x_last, increments, anchored
    return _on_gpus().adjoint(network, solver, anchors, *states, wants_parameters, wants_input)


def exact_adjoint(
    network: Network, g: Tensor, x_first: Tensor, wants_parameters: bool
) -> tuple[Tensor, Gradients | None]:
    """As `torch_backend.exact_adjoint`."""
    return _on_gpus().exact_adjoint(network, g, x_first, wants_parameters)


@functools.cache
def _on_gpus() -> Stacks:
    return Stacks(compiled.require('backend="cuda"'), torch._C._cuda_getCurrentRawStream)


class Stacks:
    """The ops by a compiled module.

    Args:
        kernels: the library, or its sources compiled for the host.
        stream: from a device's index, the address of the stream to launch on.
    """

    def __init__(self, kernels: ModuleType, stream: Callable[[int], int]) -> None:
        self.kernels, self.stream = kernels, stream

    def forward(self, network: Network, x: Tensor, kept: int, anchors: int | None) -> tuple[Tensor, Tensor, Tensor]:
        count = len(network.steps)
        x_last = torch.empty_like(x)
        increments = x.new_empty((kept, *x.shape), dtype=network.dtype)
        anchored = x.new_empty((0 if anchors is None else -(-count // anchors), *x.shape))
        Launch(self, network).forward(x, x_last, increments, anchored, count, anchors)
        return x_last, increments, anchored

    def adjoint(
        self,
        network: Network,
        solver: Reverse,
        anchors: int | None,
        g: Tensor,
        x_last: Tensor,
        increments: Tensor,
        anchored: Tensor,
        wants_parameters: bool,
        wants_input: bool,
    ) -> tuple[Tensor, Gradients | None, Tensor, Tensor | None]:
        launch = Launch(self, network, solver.extrapolates)
        rows, count = len(g), len(network.steps)
        g_first = torch.empty_like(g)
        x_first = torch.empty_like(g) if wants_input else None
        norms = g.new_zeros(count, 2)
        slab_rows, length = slabs(rows, count, launch.step_bytes(wants_parameters), 0, UNIT)
        scratch = launch.scratch(min(slab_rows, rows), length) if wants_parameters else (None, None)
        for begin in range(0, rows, slab_rows):
            slab = slice(begin, min(begin + slab_rows, rows))
            x, g_here = x_last[slab], g[slab]
            kept: list[Tensor] = [d[slab] for d in increments]
            carried = None
            parts = launch.norms(len(x))
            for last in range(count, 0, -length):
                first = max(0, last - length)
                # What the range of steps before this one starts from.
                x_out = torch.empty_like(x) if first else None if x_first is None else x_first[slab]
                carries = x.new_empty((2, *x.shape)) if first and solver.extrapolates else None
                launch.adjoint(
                    (x, g_here, x_out, g_first[slab]),
                    (kept, carried, carries),
                    None if anchors is None else anchored[:, slab],
                    rows,
                    parts,
                    scratch,
                    (first, last, anchors),
                    solver,
                )
                if wants_parameters:
                    launch.gradients_of(scratch, len(x), first, last)
                if x_out is not None:
                    x = x_out
                g_here, kept, carried = g_first[slab], [], carries
            norms += parts.sum(0)
        return g_first, launch.gradients() if wants_parameters else None, norms, x_first

    def exact_adjoint(
        self, network: Network, g: Tensor, x_first: Tensor, wants_parameters: bool
    ) -> tuple[Tensor, Gradients | None]:
        launch = Launch(self, network)
        rows, count = len(g), len(network.steps)
        g_first = torch.empty_like(g)
        slab_rows, length = slabs(rows, count, launch.step_bytes(True), launch.start_bytes, UNIT)
        most_rows = min(slab_rows, rows)
        us, cs = launch.scratch(most_rows, length)
        rs = None if network.norm is None else g.new_empty(us.shape[:2])
        starts = g.new_empty((-(-count // length), most_rows, network.dim)) if length < count else None
        for begin in range(0, rows, slab_rows):
            slab = slice(begin, min(begin + slab_rows, rows))
            x = x_first[slab]
            states = x[None]
            if starts is not None:
                states = starts[:, : len(x)]
                # One step beyond the last start, which is stored before it.
                launch.forward(x, None, None, starts, length * (len(starts) - 1) + 1, length, most_rows)
            g_here = g[slab]
            for k in reversed(range(len(states))):
                first, last = k * length, min((k + 1) * length, count)
                launch.exact((states[k], g_here, g_first[slab], us, rs, cs), first, last)
                if wants_parameters:
                    launch.gradients_of((us, cs), len(x), first, last)
                g_here = g_first[slab]
        return g_first, launch.gradients() if wants_parameters else None


class Launch:
    """The kernels with what all of them take of a network: its weights, padded, its schedule and its formulas."""

    def __init__(self, stacks: Stacks, network: Network, extrapolates: bool = False) -> None:
        self.kernels, self.network = stacks.kernels, network
        weight = network.weight_in
        self.device = weight.device
        self.dim = max(SMALLEST_DIM, 1 << (network.dim - 1).bit_length())
        self.code = self.kernels.dtype_codes[str(network.dtype).removeprefix("torch.")]
        chunk, self.warps = self.kernels.mlp_shape(self.dim, self.code)
        self.hidden = -(-network.hidden // chunk) * chunk
        self.uses = network.formulas.blocks_per_step
        layers, hidden, dim = network.layers, self.hidden, self.dim
        # Held here until the launches are made: the kernels get addresses.
        self.weights = (
            padded(weight, (layers, hidden, dim)),
            None if network.bias_in is None else padded(network.bias_in, (layers, hidden)),
            padded(network.weight_out, (layers, dim, hidden)),
            None if network.bias_out is None else padded(network.bias_out, (layers, dim)),
            schedule(tuple(network.steps), network.scheme, extrapolates, self.device),
        )
        self.fields = (
            *map(_address, self.weights),
            hidden,
            network.dim,
            self.uses == 2,
            self.kernels.activation_codes[network.activation],
            self.kernels.norm_codes[network.norm],
            EPSILON,
        )
        self.stream = stacks.stream(weight.get_device())
        self._sums: tuple[Tensor | None, ...] | None = None

    def step_bytes(self, wants_parameters: bool) -> int:
        """Of scratch memory for a row and step: norms, and u and c of its uses, and r."""
        of_norms = 2 * 4 * self.warps // self.kernels.mlp_group_rows
        return of_norms + wants_parameters * self.uses * (2 * self.dim * self.network.dtype.itemsize + 4)

    @property
    def start_bytes(self) -> int:
        return 4 * self.network.dim

    def scratch(self, rows: int, steps: int) -> tuple[Tensor, Tensor]:
        """For u and c of every use in a range of steps."""
        shape = steps * self.uses, -(-rows // UNIT) * UNIT, self.dim
        weight = self.network.weight_in
        return weight.new_empty(shape), weight.new_empty(shape)

    def norms(self, rows: int) -> Tensor:
        """For what each warp finds of a slab's norms."""
        block_rows = self._groups(rows) * self.kernels.mlp_group_rows
        groups = -(-rows // block_rows) * self._groups(rows)
        return self.weights[4].new_empty(groups * self.warps, len(self.network.steps), 2)

    def forward(
        self,
        x: Tensor,
        x_last: Tensor | None,
        increments: Tensor | None,
        anchored: Tensor,
        steps: int,
        anchors: int | None,
        anchored_rows: int | None = None,
    ) -> None:
        """Anchored states are so many rows apart, by default as many as x has."""
        kept = 0 if increments is None else len(increments)
        with self._on_device():
            self.kernels.mlp_forward(
                self.fields,
                self._how(len(x)),
                *map(_address, (x, x_last, increments if kept else None, None if anchors is None else anchored)),
                *(len(x), len(x) if anchored_rows is None else anchored_rows, steps, kept, anchors or 1),
            )

    def adjoint(
        self,
        states: Sequence[Tensor | None],
        increments: tuple[Sequence[Tensor], Tensor | None, Tensor | None],
        anchored: Tensor | None,
        anchored_rows: int,
        norms: Tensor,
        scratch: Sequence[Tensor | None],
        steps: tuple[int, int, int | None],
        solver: Reverse,
    ) -> None:
        """states: x_last, g_last, x_first, g_first. increments: those that the forward pass has kept, and those carried
        from and to other ranges. steps: first, last, anchors."""
        kept, carried, carries = increments
        newest, before, *_ = (*kept, None, None)
        us, cs = scratch
        x, first, last, anchors = states[0], *steps
        assert x is not None
        with self._on_device():
            self.kernels.mlp_adjoint(
                self.fields,
                self._how(len(x)),
                *map(_address, (*states, newest, before, carried, carries, anchored, norms, us, cs)),
                *(len(x), anchored_rows, 0 if us is None else us.shape[1]),
                *(first, last, norms.shape[1], anchors or 1),
                *(solver.corrections, solver.extrapolates, solver.reuse),
            )

    def exact(self, tensors: Sequence[Tensor | None], first: int, last: int) -> None:
        """tensors: x_first, g_last, g_first, us, rs, cs."""
        x, us = tensors[0], tensors[3]
        assert x is not None
        assert us is not None
        with self._on_device():
            self.kernels.mlp_exact(
                self.fields, self._how(len(x)), *map(_address, tensors), len(x), us.shape[1], first, last
            )

    def gradients_of(self, scratch: Sequence[Tensor | None], rows: int, first: int, last: int) -> None:
        """Add the gradients of the layers that a range of steps uses, from what its state pass has left of the rows."""
        us, cs = scratch
        assert us is not None
        with self._on_device():
            self.kernels.mlp_gradients(
                self.fields,
                self._how(rows),
                *map(_address, (us, cs, *self._gradient_sums())),
                *(rows, us.shape[1], first, last, torch.are_deterministic_algorithms_enabled()),
            )

    def gradients(self) -> Gradients:
        """The sums, cut to the parameters' shapes."""
        dw1, db1, dw2, db2 = self._gradient_sums()
        assert dw1 is not None
        assert dw2 is not None
        hidden, dim = self.network.hidden, self.network.dim
        return Gradients(
            dw1[:, :hidden, :dim].contiguous(),
            None if db1 is None else db1[:, :hidden].contiguous(),
            dw2[:, :hidden, :dim].mT.contiguous(),
            None if db2 is None else db2[:, :dim].contiguous(),
        )

    def _gradient_sums(self) -> tuple[Tensor | None, ...]:
        """dw1, db1, dw2 (transposed), db2, zero at first."""
        if self._sums is None:
            layers, like = self.network.layers, self.weights[4]
            self._sums = (
                like.new_zeros(layers, self.hidden, self.dim),
                None if self.network.bias_in is None else like.new_zeros(layers, self.hidden),
                like.new_zeros(layers, self.hidden, self.dim),
                None if self.network.bias_out is None else like.new_zeros(layers, self.dim),
            )
        return self._sums

    def _groups(self, rows: int) -> int:
        with self._on_device():
            groups: int = self.kernels.mlp_groups(rows, self.dim, self.code)
        return groups

    def _how(self, rows: int) -> tuple[int, int, int, int]:
        return self.dim, self.code, self._groups(rows), self.stream

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
