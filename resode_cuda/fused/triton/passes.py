"""The depth-fused ops by Triton: what the kernels of `triton_*.py` are launched with.

`passes.py` says in which order. On GPUs whose copy engine adds in memory the state pass adds up the gradients of narrow
layers itself, and there is no weight-gradient pass.

Rows of more than 256 values, in float32 128, do not fit: their layers are computed one by one, as `wide.py` says.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...ops import triton as triton_kernels
from ...reverse import Reverse
from .. import timings as measured
from ..driver import Boundary as Ends
from ..driver import NetworkKernels as Kernels
from ..driver import Scratch, padded_dim, rows_apart
from ..driver import SlabDriver as Stacks
from ..network import Network
from ..norms import EPSILON
from ..reference import passes as torch_backend
from ..signature import ParameterGradients as Gradients
from .tiles import LARGEST_FUSED_DIM, Tile, tiles_for
from .wide import WideTile

LARGEST_DIM = {2: 256, 4: 128}
"""That is kept on chip, by the bytes of a parameter."""
COPYING = (9, 0)
"""Compute capability of the first GPUs with a copy engine for tiles."""
FUSING = (9, 10)
"""Major compute capabilities of GPUs with tiles for gradients that the copy engine adds up in memory."""


def reason(network: Network, method: Any, device: torch.device) -> str | None:
    """TEMPORARY"""
    return "being rewritten"


def is_wide(network: Network) -> bool:
    """Whether rows are too wide to be kept on chip."""
    return network.dim > LARGEST_DIM.get(network.weight_in.itemsize, 0)


def forms(network: Network, device: torch.device) -> tuple[str, ...]:
    """How the adjoint can be computed, the first choice first.

    "split": the parameters' gradients take a pass of their own. "fused": the state pass adds them up. "wide": layer by
    layer.
    """
    if is_wide(network):
        return ("wide",)
    is_narrow = padded_dim(network.dim) <= LARGEST_FUSED_DIM
    if is_narrow and capability_of(device)[0] in FUSING and not torch.are_deterministic_algorithms_enabled():
        return "split", "fused"
    return ("split",)


def form(network: Network, rows: int, device: torch.device) -> str:
    """The faster one where that was measured, else the first choice."""
    possible = forms(network, device)
    if len(possible) == 1:
        return possible[0]
    times = measured.microseconds(network, rows, device)
    return min(possible, key=lambda name: times.get(f"triton {name}", math.inf))


def forward(network: Network, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_backend.forward`."""
    if is_wide(network):
        return torch_backend.forward(network, *given, kind=WideTile)
    return Stacks(TritonKernels).forward(network, *given)


def adjoint(network: Network, *given: Any) -> tuple[Tensor, Gradients | None, Tensor, Tensor | None]:
    """As `torch_backend.adjoint`."""
    if is_wide(network):
        return torch_backend.adjoint(network, *given, kind=WideTile)
    return Stacks(TritonKernels).adjoint(network, *given)


def exact_adjoint(network: Network, *given: Any) -> tuple[Tensor, Gradients | None]:
    """As `torch_backend.exact_adjoint`."""
    if is_wide(network):
        return torch_backend.exact_adjoint(network, *given, kind=WideTile)
    return Stacks(TritonKernels).exact_adjoint(network, *given)


class TritonKernels(Kernels):
    """Kernels with the tiles chosen for a network and its GPU."""

    sums_by_dim = True

    def __init__(self, network: Network, extrapolates: bool) -> None:
        capability = capability_of(network.weight_in.device)
        dim, is_heun = padded_dim(network.dim), network.formulas.blocks_per_step == 2
        is_plain = network.norm is None and not is_heun
        self.tiles = tiles_for(capability, dim, network.weight_in.itemsize, is_plain)
        super().__init__(network, self.tiles.chunk, max(tile.rows for tile in self.tiles), extrapolates)

    def is_split(self, rows: int) -> bool:
        return form(self.network, rows, self.device) == "split"

    def norms(self, rows: int) -> Tensor:
        # A part for each tile of either form.
        return self.schedule.new_zeros(
            self.whole(rows) // min(self.tiles.adjoint.rows, self.tiles.fused.rows), len(self.network.steps), 2
        )

    def forward(
        self,
        x: Tensor,
        x_last: Tensor | None,
        increments: Tensor | None,
        anchored: Tensor | None,
        steps: int,
        every: int,
    ) -> None:
        tile = self.tiles.forward
        self._run(
            "forward_kernel",
            (-(-len(x) // tile.rows),),
            tile,
            *(x, x_last, increments, anchored, self.schedule, *self._weights(tile)),
            *(len(x), max(rows_apart(anchored), rows_apart(increments)), steps, every, self.hidden),
            KEPT=0 if increments is None else len(increments),
            **self._formulas,
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
        tile = self.tiles.fused if adds_gradients else self.tiles.adjoint
        x, d = ends.x_last, ends.d_last
        us, cs = scratch or (None, None)
        self._run(
            "adjoint_kernel",
            (self.whole(len(x)) // tile.rows,),
            tile,
            *(x, ends.g_last, d, ends.x_first, ends.g_first, ends.d_first, ends.anchored, norms, us, cs),
            *(self._reduced(tile) if adds_gradients else (None,) * 4),
            *(self.schedule, *self._weights(tile), len(x), rows_apart(ends.anchored), rows_apart(d)),
            *(0 if us is None else us.shape[1], first, last, norms.shape[1], anchors or 1, self.hidden),
            EXTRAPOLATES=solver.extrapolates,
            CORRECTIONS=solver.corrections,
            REUSES=solver.reuse,
            FUSED=adds_gradients,
            **self._formulas,
        )

    def exact(
        self, x: Tensor, g_last: Tensor, g_first: Tensor, rs: Tensor | None, scratch: Scratch, first: int, last: int
    ) -> None:
        tile, us = self.tiles.exact, scratch.us
        self._run(
            "exact_kernel",
            (self.whole(len(x)) // tile.rows,),
            tile,
            *(x, g_last, g_first, us, rs, scratch.cs, self.schedule, *self._weights(tile)),
            *(len(x), us.shape[1], first, last, self.hidden),
            **self._formulas,
        )

    def add_gradients(self, scratch: Scratch, rows: int, first: int, last: int) -> None:
        tile = self.tiles.weights_for(self.hidden)
        chunks, layers = self.hidden // tile.chunk, last - first + self.uses - 1
        written = self.whole(rows)
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
            *(*scratch, *self.sums, self.schedule, *self._weights(tile)[:3]),
            *(scratch.us.shape[1], written, range_rows, first, last, self.hidden),
            ATOMIC=ranges > 1,
        )

    def _reduced(self, tile: Tile) -> tuple[Any, ...]:
        """The sums as a fused kernel takes them."""
        dw1, db1, dw2, db2 = self.sums
        block = [self.dim, tile.chunk]
        return descriptor(dw1.view(-1, self.hidden), block), db1, descriptor(dw2.view(-1, self.hidden), block), db2

    def _weights(self, tile: Tile) -> tuple[Any, ...]:
        if capability_of(self.device) < COPYING:
            # There descriptors become loads of single values.
            return self.w1, self.b1, self.w2, self.b2
        w1 = descriptor(self.w1.view(-1, self.dim), [tile.chunk, self.dim])
        w2 = descriptor(self.w2.view(-1, self.hidden), [self.dim, tile.chunk])
        return w1, self.b1, w2, self.b2

    @property
    def _formulas(self) -> dict[str, Any]:
        network = self.network
        is_half = network.dtype == torch.float16
        return {"EPSILON": EPSILON, "DIM": network.dim, "NORM": network.norm, "SCALE_FIRST": not is_half}

    def _run(self, name: str, grid: tuple[int, ...], tile: Tile, *values: Any, **constants: Any) -> None:
        kernel = _kernel(name)
        with torch.cuda.device_of(self.w1):
            kernel[grid](
                *values,
                **constants,
                HEUN=self.uses == 2,
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


def descriptor(tensor: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, block)


@functools.cache
def _kernel(name: str) -> Any:
    # These modules import Triton.
    from . import adjoint as triton_adjoint
    from . import exact as triton_exact
    from . import forward as triton_forward
    from . import gradients as triton_gradients

    modules = triton_forward, triton_adjoint, triton_exact, triton_gradients
    return next(getattr(module, name) for module in modules if hasattr(module, name))
