"""The depth-fused ops by Triton: what the kernels of `triton_*.py` are launched with.

The number of launches does not depend on the depth: one forward; backward two for each slab of rows, the state pass and
the weight-gradient pass, or a single one where gradients are reduced in memory. A slab has as many rows as the scratch
memory holds all layers' points and cotangents of. Where a stack is so deep that slabs would be too thin for a GPU, they
are taken through the depth in ranges of it, each with launches of its own.

Rows of more than 256 values do not fit: their layers are computed one by one, as `wide.py` says.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import triton_kernels
from ..reverse import Reverse
from . import torch_backend
from .network import Network
from .norms import EPSILON
from .operands import padded, schedule
from .slabs import slabs
from .tile import Gradients
from .triton_tiles import LARGEST_FUSED_DIM, Tile, tiles_for
from .wide import WideTile

SMALLEST_DIM, LARGEST_DIM = 16, 256
OLDEST = (8, 0)
FUSING = (9, 10)
"""Major compute capabilities of GPUs with tiles for gradients that the copy engine adds up in memory."""


def cause(network: Network, device: torch.device, solver: Reverse | None) -> str | None:
    """Why Triton's kernels can't compute this; None if they can."""
    if device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, got tensors on {device}"
    if network.dtype == torch.float64:
        return "Triton's kernels take parameters of float32, bfloat16 or float16, got float64"
    if solver is not None and solver.accelerate and not is_wide(network):
        return (
            "Triton's kernels do not accelerate corrections, which is the default from 2 on; use "
            "Reverse(..., accelerate=False)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"Triton's kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, got {capability[0]}.{capability[1]}"
    return triton_kernels.cause()


def is_wide(network: Network) -> bool:
    """Whether rows are too wide to be kept on chip."""
    return network.dim > LARGEST_DIM


def forward(network: Network, x: Tensor, kept: int, anchors: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_backend.forward`."""
    if is_wide(network):
        return torch_backend.forward(network, x, kept, anchors, WideTile)
    count = len(network.steps)
    x_last = torch.empty_like(x)
    increments = x.new_empty((kept, *x.shape), dtype=network.dtype)
    anchored = x.new_empty((0 if anchors is None else -(-count // anchors), *x.shape))
    if len(x):
        Launch(network).forward(x, x_last, increments, anchored, count, anchors)
    return x_last, increments, anchored


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
    if is_wide(network):
        given = g, x_last, increments, anchored, wants_parameters, wants_input
        return torch_backend.adjoint(network, solver, anchors, *given, WideTile)
    launch = Launch(network, solver.extrapolates)
    rows, count = len(g), len(network.steps)
    is_fused = wants_parameters and launch.is_fused
    is_split = wants_parameters and not is_fused
    tile = launch.tiles.fused if is_fused else launch.tiles.adjoint
    g_first = torch.empty_like(g)
    x_first = torch.empty_like(g) if wants_input else None
    norms = g.new_zeros(launch.whole(rows) // tile.rows, count, 2)
    slab_rows, length = slabs(rows, count, launch.step_bytes(is_split), 0, launch.unit)
    scratch = launch.scratch(min(slab_rows, rows), length) if is_split else (None, None)
    for begin in range(0, rows, slab_rows):
        slab = slice(begin, min(begin + slab_rows, rows))
        here, size = g_first[slab], slab.stop - begin
        x_here = None if x_first is None else x_first[slab]
        x, g_here, d, d_rows = x_last[slab], g[slab], None, 0
        if solver.extrapolates:
            # Of a single step there is no second increment, and none is used.
            d, d_rows = increments[:, slab], rows if count > 1 else 0
        for last in range(count, 0, -length):
            first = max(0, last - length)
            x_out, d_out = x_here, None
            if first:
                # What the range of steps before this one starts from.
                x_out = x.new_empty(x.shape) if x_here is None else x_here
                d_out = None if d is None else x.new_empty((2, *x.shape))
            launch.adjoint(
                (x, g_here, d, x_out, here, d_out, None if anchors is None else anchored[:, slab]),
                norms[begin // tile.rows :],
                scratch,
                (size, rows, d_rows),
                (first, last, anchors),
                solver,
                is_fused,
            )
            if is_split:
                launch.weight_gradients(scratch, size, first, last)
            x, g_here, d, d_rows = x_out if x_out is not None else x, here, d_out, size
    return g_first, launch.gradients(wants_parameters), norms.sum(0), x_first


def exact_adjoint(
    network: Network, g: Tensor, x_first: Tensor, wants_parameters: bool
) -> tuple[Tensor, Gradients | None]:
    """As `torch_backend.exact_adjoint`."""
    if is_wide(network):
        return torch_backend.exact_adjoint(network, g, x_first, wants_parameters, WideTile)
    launch = Launch(network)
    rows, count = len(g), len(network.steps)
    g_first = torch.empty_like(g)
    slab_rows, length = slabs(rows, count, launch.step_bytes(True), launch.start_bytes, launch.unit)
    us, cs = launch.scratch(min(slab_rows, rows), length)
    rs = None if network.norm is None else g.new_empty(us.shape[:2])
    starts = g.new_empty((-(-count // length), min(slab_rows, rows), network.dim)) if length < count else None
    for begin in range(0, rows, slab_rows):
        slab = slice(begin, min(begin + slab_rows, rows))
        x, size = x_first[slab], slab.stop - begin
        states = x[None]
        if starts is not None:
            states = starts[:, :size]
            # One step beyond the last start, which is stored before it.
            launch.forward(x, None, None, starts, length * (len(starts) - 1) + 1, length, starts.shape[1])
        g_here = g[slab]
        for k in reversed(range(len(states))):
            first, last = k * length, min((k + 1) * length, count)
            launch.exact((states[k], g_here, g_first[slab], us, rs, cs), size, first, last)
            if wants_parameters:
                launch.weight_gradients((us, cs), size, first, last)
            g_here = g_first[slab]
    return g_first, launch.gradients(wants_parameters)


class Launch:
    """The kernels with what all of them take of a network: its weights, padded, its schedule and its formulas."""

    def __init__(self, network: Network, extrapolates: bool = False) -> None:
        self.network = network
        weight = network.weight_in
        self.is_heun = network.formulas.blocks_per_step == 2
        self.device = weight.device
        self.dim = max(SMALLEST_DIM, 1 << (network.dim - 1).bit_length())
        capability = capability_of(self.device)
        is_plain = network.norm is None and not self.is_heun
        self.tiles = tiles_for(capability, self.dim, weight.itemsize, is_plain)
        self.unit = max(tile.rows for tile in self.tiles)
        """Rows that every pass over scratch memory takes in whole tiles."""
        self.hidden = -(-network.hidden // self.tiles.chunk) * self.tiles.chunk
        is_wanted = self.dim <= LARGEST_FUSED_DIM and not torch.are_deterministic_algorithms_enabled()
        self.is_fused = is_wanted and capability[0] in FUSING
        self.schedule = schedule(tuple(network.steps), network.scheme, extrapolates, self.device)
        layers, hidden, dim = network.layers, self.hidden, self.dim
        self.w1 = padded(weight, (layers, hidden, dim)).view(-1, dim)
        self.b1 = None if network.bias_in is None else padded(network.bias_in, (layers, hidden))
        self.w2 = padded(network.weight_out, (layers, dim, hidden)).view(-1, hidden)
        self.b2 = None if network.bias_out is None else padded(network.bias_out, (layers, dim))
        self._sums: tuple[Tensor | None, ...] | None = None

    def step_bytes(self, is_split: bool) -> int:
        """Of scratch memory for a row and step: u and c of its uses, and r."""
        uses = self.network.formulas.blocks_per_step
        return uses * (2 * self.dim * self.w1.itemsize + 4) if is_split else 0

    @property
    def start_bytes(self) -> int:
        return 4 * self.network.dim

    def whole(self, rows: int) -> int:
        return -(-rows // self.unit) * self.unit

    def scratch(self, rows: int, steps: int) -> tuple[Tensor, Tensor]:
        """For u and c of every use in a range of steps."""
        shape = steps * self.network.formulas.blocks_per_step, self.whole(rows), self.dim
        return self.w1.new_empty(shape), self.w1.new_empty(shape)

    def forward(
        self,
        x: Tensor,
        x_last: Tensor | None,
        increments: Tensor | None,
        anchored: Tensor,
        steps: int,
        anchors: int | None,
        rows: int | None = None,
    ) -> None:
        """Anchored states are so many rows apart, by default as many as x has."""
        tile = self.tiles.forward
        kept = 0 if increments is None else len(increments)
        self._run(
            "forward_kernel",
            (-(-len(x) // tile.rows),),
            tile,
            x,
            x_last,
            increments if kept else None,
            None if anchors is None else anchored,
            self.schedule,
            *self._weights(tile),
            len(x),
            len(x) if rows is None else rows,
            steps,
            anchors or 1,
            self.hidden,
            KEPT=kept,
            EPSILON=EPSILON,
            DIM=self.network.dim,
            NORM=self.network.norm,
            SCALE_FIRST=self._scales_first,
        )

    def adjoint(
        self,
        states: Sequence[Tensor | None],
        norms: Tensor,
        scratch: Sequence[Tensor | None],
        sizes: tuple[int, int, int],
        steps: tuple[int, int, int | None],
        solver: Reverse,
        is_fused: bool,
    ) -> None:
        """states: x_last, g_last, d_last, x_first, g_first, d_first, anchored. sizes: count, rows, d_last_rows. steps:
        first, last, anchors."""
        tile = self.tiles.fused if is_fused else self.tiles.adjoint
        first, last, anchors = steps
        us = scratch[0]
        self._run(
            "adjoint_kernel",
            (self.whole(sizes[0]) // tile.rows,),
            tile,
            *states,
            norms,
            *scratch,
            *(self._reduced(tile) if is_fused else (None,) * 4),
            self.schedule,
            *self._weights(tile),
            *sizes,
            0 if us is None else us.shape[1],
            first,
            last,
            norms.shape[1],
            anchors or 1,
            self.hidden,
            EXTRAPOLATES=solver.extrapolates,
            CORRECTIONS=solver.corrections,
            REUSES=solver.reuse,
            FUSED=is_fused,
            EPSILON=EPSILON,
            DIM=self.network.dim,
            NORM=self.network.norm,
            SCALE_FIRST=self._scales_first,
        )

    def exact(self, tensors: Sequence[Tensor | None], count: int, first: int, last: int) -> None:
        """tensors: x_first, g_last, g_first, us, rs, cs."""
        tile, us = self.tiles.exact, tensors[3]
        assert us is not None
        self._run(
            "exact_kernel",
            (self.whole(count) // tile.rows,),
            tile,
            *tensors,
            self.schedule,
            *self._weights(tile),
            count,
            us.shape[1],
            first,
            last,
            self.hidden,
            EPSILON=EPSILON,
            DIM=self.network.dim,
            NORM=self.network.norm,
            SCALE_FIRST=self._scales_first,
        )

    def weight_gradients(self, scratch: Sequence[Tensor | None], count: int, first: int, last: int) -> None:
        """Add the gradients of the layers that a range of steps uses, from what its state pass has left of the rows."""
        us, cs = scratch
        assert us is not None
        tile = self.tiles.weights
        chunks, layers = self.hidden // tile.chunk, last - first + self.is_heun
        written = self.whole(count)
        programs = triton_kernels.most_programs(self.device) // triton_kernels.PROGRAMS_PER_PROCESSOR
        ranges = 1
        if not torch.are_deterministic_algorithms_enabled():
            ranges = max(1, min(-(-written // tile.rows), RANGES_PER_PROCESSOR * programs // (layers * chunks)))
        range_rows = -(-written // (ranges * tile.rows)) * tile.rows
        ranges = -(-written // range_rows)
        self._run(
            "weight_gradient_kernel",
            (layers * chunks, ranges),
            tile,
            us,
            cs,
            *self._gradient_sums(),
            self.schedule,
            *self._weights(tile)[:3],
            us.shape[1],
            written,
            range_rows,
            first,
            last,
            self.hidden,
            ATOMIC=ranges > 1,
        )

    def gradients(self, wants_parameters: bool) -> Gradients | None:
        """The sums, cut to the parameters' shapes."""
        if not wants_parameters:
            return None
        dw1, db1, dw2, db2 = self._gradient_sums()
        assert dw1 is not None
        assert dw2 is not None
        network, shape = self.network, (self.network.layers, self.dim, self.hidden)
        hidden, dim = network.hidden, network.dim
        return Gradients(
            dw1.view(shape)[:, :dim, :hidden].mT.contiguous(),
            None if db1 is None else db1[:, :hidden].contiguous(),
            dw2.view(shape)[:, :dim, :hidden].contiguous(),
            None if db2 is None else db2[:, :dim].contiguous(),
        )

    def _gradient_sums(self) -> tuple[Tensor | None, ...]:
        """dw1 (transposed), db1, dw2, db2, zero at first."""
        if self._sums is None:
            layers, like = self.network.layers, self.w1
            shapes = {
                "w1": (layers * self.dim, self.hidden),
                "b1": None if self.b1 is None else (layers, self.hidden),
                "w2": (layers * self.dim, self.hidden),
                "b2": None if self.b2 is None else (layers, self.dim),
            }
            self._sums = tuple(
                None if shape is None else like.new_zeros(shape, dtype=torch.float32) for shape in shapes.values()
            )
        return self._sums

    def _reduced(self, tile: Tile) -> tuple[Any, ...]:
        """The sums as a fused kernel takes them."""
        dw1, db1, dw2, db2 = self._gradient_sums()
        block = [self.dim, tile.chunk]
        return descriptor(dw1, block), db1, descriptor(dw2, block), db2

    def _weights(self, tile: Tile) -> tuple[Any, ...]:
        w1 = descriptor(self.w1, [tile.chunk, self.dim])
        w2 = descriptor(self.w2, [self.dim, tile.chunk])
        return w1, self.b1, w2, self.b2

    @property
    def _scales_first(self) -> bool:
        return self.network.dtype != torch.float16

    def _run(self, name: str, grid: tuple[int, ...], tile: Tile, *values: Any, **constants: Any) -> None:
        kernel = _kernel(name)
        with torch.cuda.device_of(self.w1):
            kernel[grid](
                *values,
                **constants,
                HEUN=self.is_heun,
                ACTIVATION=self.network.activation,
                D=self.dim,
                ROWS=tile.rows,
                C=tile.chunk,
                STAGES=tile.stages,
                PRECISION=precision(self.network.dtype),
                num_warps=tile.warps,
            )


RANGES_PER_PROCESSOR = 4
"""Programs of the weight-gradient pass for each multiprocessor, where they may add to the same gradients."""


def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def precision(dtype: torch.dtype) -> str:
    """Of products of float32 operands, as torch is told; others ignore it."""
    # torch.get_float32_matmul_precision() raises where this has been set by name.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def descriptor(tensor: Tensor | None, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    assert tensor is not None
    return TensorDescriptor.from_tensor(tensor, block)


@functools.cache
def _kernel(name: str) -> Any:
    # These modules import Triton.
    from . import triton_adjoint, triton_exact, triton_forward, triton_gradients

    modules = triton_forward, triton_adjoint, triton_exact, triton_gradients
    return next(getattr(module, name) for module in modules if hasattr(module, name))
