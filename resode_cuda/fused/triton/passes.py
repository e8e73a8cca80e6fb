"""The depth-fused ops by Triton: which kernels run, and with what.

`driver.py` says in which order. On GPUs whose copy engine adds in memory the state pass may add up the gradients of
narrow layers itself, and there is no weight-gradient pass.

Rows of more than 256 values, in float32 128, do not fit on chip: their layers are computed one by one, as `wide.py`
says. Kernels need Triton; it is imported when the first one is launched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...devices import capability_of
from ...method import Method
from ...ops import triton as triton_ops
from ...schemes import Euler, Heun
from ...stored import largest_companion
from .. import requirements, timings
from ..driver import NetworkKernels, Scratch, SlabDriver, StatePass, padded_dim, rows_apart
from ..network import Network
from ..norms import EPSILON
from ..reference import passes as reference
from ..signature import AdjointResult, ParameterGradients, SavedStates, Wanted
from ..storage import RoundingSquares, StoredIncrements
from . import arguments
from .arguments import Gradients, KernelConfig, Weights
from .stored_tiles import storing
from .tiles import LARGEST_ONE_PASS_DIM, Tile, tiles_for
from .wide import WideTile

LARGEST_DIM = {2: 256, 4: 128}
"""Largest dim whose rows are kept on chip, by the bytes of a parameter."""
COPYING = (9, 0)
"""Compute capability of the first GPUs with a copy engine for tiles."""
ADDING = (9, 10)
"""Major compute capabilities of GPUs with tiles for gradients that the copy engine adds up in memory."""
WARPS_AT_ONCE, EXACT_WARPS_AT_ONCE = 8, 12
"""Warps of a state pass that a processor has registers for, at up to 255 a thread; and of the exact one up to dim 64,
which needs no more than 168, as it holds x on its way forward and g on its way back."""
RANGES_PER_PROCESSOR = 4
"""Programs of the weight-gradient pass for each multiprocessor, where they may add to the same gradients."""


def reason(network: Network, method: Method, device: torch.device) -> str | None:
    """Why Triton's kernels can't compute this; None if they can."""
    return (
        requirements.reason("Triton's kernels", network, method, device, accelerates=is_wide(network))
        or _reason_against_bits(network, method)
        or arguments.reason_against(method.scheme.name, network.activation, network.norm)
        or triton_ops.reason(device)
    )


def _reason_against_bits(network: Network, method: Method) -> str | None:
    bits = {method.solver.bits_of(n) for n in method.stored_steps}
    if len(bits) > 1 and not is_wide(network):
        return f"Triton's kernels store all steps' increments in one number of bits, got {sorted(bits)}"
    return None


def is_wide(network: Network) -> bool:
    """Whether rows are too wide to be kept on chip."""
    return network.dim > LARGEST_DIM.get(network.weight_in.itemsize, 0)


def gradient_forms(network: Network, device: torch.device) -> tuple[str, ...]:
    """How the adjoint can be computed, the first choice first.

    "two_pass": the parameters' gradients take a pass of their own. "one_pass": the state pass adds them up. "wide":
    layer by layer.
    """
    if is_wide(network):
        return ("wide",)
    is_narrow = padded_dim(network.dim) <= LARGEST_ONE_PASS_DIM
    if is_narrow and capability_of(device)[0] in ADDING and not torch.are_deterministic_algorithms_enabled():
        return "two_pass", "one_pass"
    return ("two_pass",)


def gradient_form(network: Network, rows: int, device: torch.device) -> str:
    """The fastest form where that was measured, else the first choice."""
    possible = gradient_forms(network, device)
    if len(possible) == 1:
        return possible[0]
    times = timings.microseconds(network, rows, device)
    return min(possible, key=lambda form: times.get(f"triton {form}", math.inf))


def forward(network: Network, method: Method, x: Tensor) -> SavedStates:
    """As `forward` of `reference/passes.py`."""
    if is_wide(network):
        return reference.forward(network, method, x, kind=WideTile)
    return SlabDriver(TritonKernels).forward(network, method, x)


def adjoint(network: Network, method: Method, g: Tensor, states: SavedStates, wanted: Wanted) -> AdjointResult:
    """As `adjoint` of `reference/passes.py`; layers that fit on chip by `TritonKernels.adjoint`."""
    if is_wide(network):
        return reference.adjoint(network, method, g, states, wanted, kind=WideTile)
    return SlabDriver(TritonKernels).adjoint(network, method, g, states, wanted)


def exact_adjoint(
    network: Network, method: Method, g: Tensor, x_first: Tensor, wants_parameters: bool
) -> tuple[Tensor, ParameterGradients | None]:
    """As `exact_adjoint` of `reference/passes.py`; layers that fit on chip by `TritonKernels.exact`."""
    if is_wide(network):
        return reference.exact_adjoint(network, method, g, x_first, wants_parameters, kind=WideTile)
    return SlabDriver(TritonKernels).exact_adjoint(network, method, g, x_first, wants_parameters)


class TritonKernels(NetworkKernels):
    """Kernels with the tiles that suit a network and its GPU."""

    sums_by_dim = True

    def __init__(self, network: Network, method: Method) -> None:
        self._is_plain = network.norm is None and method.scheme is Euler
        dim, capability = padded_dim(network.dim), capability_of(network.weight_in.device)
        served = capability, dim, network.weight_in.itemsize, self._is_plain
        self.tiles = tiles_for(*served)
        if method.solver.is_stored:
            self.tiles = storing(self.tiles, *served)
        super().__init__(network, method, self.tiles.chunk, max(tile.rows for tile in self.tiles))

    def takes_two_passes(self, rows: int) -> bool:
        return gradient_form(self.network, rows, self.device) == "two_pass"

    def wave(self, is_exact: bool) -> int:
        tile, warps = self.tiles.two_pass, WARPS_AT_ONCE
        if is_exact:
            tile = self.tiles.exact
            warps = EXACT_WARPS_AT_ONCE if self._is_plain and self.dim <= 64 else WARPS_AT_ONCE
        rows = self._processors * max(1, warps // tile.warps) * tile.rows
        return max(self.unit, rows // self.unit * self.unit)

    @property
    def _processors(self) -> int:
        return triton_ops.most_programs(self.device) // triton_ops.PROGRAMS_PER_PROCESSOR

    def squares(self, rows: int) -> Tensor:
        # A part for each tile, in either form.
        tile_rows = min(self.tiles.two_pass.rows, self.tiles.one_pass.rows)
        columns = 3 if self.method.solver.is_stored else 2
        return self.schedule.new_zeros(self.whole(rows) // tile_rows, len(self.schedule), columns)

    def forward(
        self, x: Tensor, x_last: Tensor | None, increments: Tensor | None, anchored: Tensor | None, steps: int
    ) -> None:
        from .forward import forward_kernel

        tile = self.tiles.forward
        self._launch(
            forward_kernel,
            (-(-len(x) // tile.rows),),
            tile,
            *(x, x_last, increments, anchored, self.schedule, *self._weights(tile)),
            *(len(x), max(rows_apart(anchored), rows_apart(increments)), steps),
            SAVED_INCREMENTS=0 if increments is None else len(increments),
        )

    def storing_forward(
        self, x: Tensor, x_last: Tensor, anchored: Tensor | None, stored: StoredIncrements, rounding: RoundingSquares
    ) -> None:
        from .storing_forward import storing_forward_kernel

        tile, programs = self.tiles.forward, -(-len(x) // self.tiles.forward.rows)
        parts = self.schedule.new_zeros(programs, len(self.method), 2)
        self._launch(
            storing_forward_kernel,
            (programs,),
            tile,
            *(x, x_last, anchored, stored, parts, rounding.sample, self.schedule, *self._weights(tile)),
            *(len(x), rounding.shift, len(self.method)),
            LARGEST=float(largest_companion(x.dtype, self._bits)),
            BITS=self._bits,
            ROUNDED=self.method.solver.rounded_forward,
        )
        if len(rounding.squares):
            rounding.squares.add_(parts.sum(0, dtype=rounding.squares.dtype))

    @property
    def _bits(self) -> int:
        """Bits a value of all stored increments; those of the first step where none is stored."""
        return self.method.solver.bits_of((*self.method.stored_steps, 0)[0])

    def adjoint(self, state_pass: StatePass) -> None:
        if state_pass.stored is not None:
            self._stored_adjoint(state_pass, state_pass.stored)
            return
        from .adjoint import adjoint_kernel

        start, end, anchored, _, squares, scratch, steps, adds_gradients = state_pass
        tile = self.tiles.one_pass if adds_gradients else self.tiles.two_pass
        rows = len(start.g)
        self._launch(
            adjoint_kernel,
            (self.whole(rows) // tile.rows,),
            tile,
            *(start, end, anchored, squares, scratch),
            *(self._reduced(tile) if adds_gradients else Gradients(None, None, None, None)),
            *(self.schedule, *self._weights(tile)),
            *(rows, rows_apart(anchored), rows_apart(start.increments)),
            *(scratch.rows, steps.start, steps.stop, len(self.method)),
            SOLVER=self.method.solver,
        )

    def _stored_adjoint(self, state_pass: StatePass, stored: StoredIncrements) -> None:
        from .stored_adjoint import stored_adjoint_kernel

        start, end, anchored, _, squares, scratch, steps, adds_gradients = state_pass
        tile, rows = self.tiles.one_pass if adds_gradients else self.tiles.two_pass, len(start.g)
        self._launch(
            stored_adjoint_kernel,
            (self.whole(rows) // tile.rows,),
            tile,
            *(start, end, anchored, stored, squares, scratch),
            *(self._reduced(tile) if adds_gradients else Gradients(None, None, None, None)),
            *(self.schedule, *self._weights(tile)),
            *(rows, rows_apart(anchored), rows_apart(stored.scales)),
            *(scratch.rows, steps.start, steps.stop, len(self.method)),
            BITS=self._bits,
        )

    def exact(self, x: Tensor, g_last: Tensor, g_first: Tensor, scratch: Scratch, steps: range) -> None:
        from .exact import exact_kernel

        tile = self.tiles.exact
        self._launch(
            exact_kernel,
            (self.whole(len(x)) // tile.rows,),
            tile,
            *(x, g_last, g_first, scratch, self.schedule, *self._weights(tile)),
            *(len(x), scratch.rows, steps.start, steps.stop),
        )

    def add_gradients(self, scratch: Scratch, rows: int, steps: range) -> None:
        from .gradients import weight_gradient_kernel

        tile = self.tiles.weights_for(self.hidden)
        chunks, layers = self.hidden // tile.chunk, len(steps) + self.layer_calls - 1
        written = self.whole(rows)
        ranges = 1
        if not torch.are_deterministic_algorithms_enabled():
            ranges = max(1, min(-(-written // tile.rows), RANGES_PER_PROCESSOR * self._processors // (layers * chunks)))
        range_rows = -(-written // (ranges * tile.rows)) * tile.rows
        ranges = -(-written // range_rows)
        self._launch(
            weight_gradient_kernel,
            (layers * chunks, ranges),
            tile,
            *(scratch, Gradients(*self.sums)),
            *(self.schedule, *self._weights(tile)),
            *(scratch.rows, written, range_rows, steps.start, steps.stop),
            ATOMIC=ranges > 1,
        )

    def _reduced(self, tile: Tile) -> Gradients:
        """The sums as the copy engine adds to them."""
        dw1, db1, dw2, db2 = self.sums
        block = [self.dim, tile.chunk]
        w1, w2 = (_descriptor(matrix.view(-1, self.hidden), block) for matrix in (dw1, dw2))
        return Gradients(w1, db1, w2, db2)

    def _weights(self, tile: Tile) -> Weights:
        if capability_of(self.device) < COPYING:
            # There descriptors become loads of single values.
            return Weights(self.w1, self.b1, self.w2, self.b2, self.hidden)
        w1 = _descriptor(self.w1.view(-1, self.dim), [tile.chunk, self.dim])
        w2 = _descriptor(self.w2.view(-1, self.hidden), [self.dim, tile.chunk])
        return Weights(w1, self.b1, w2, self.b2, self.hidden)

    def _config(self, tile: Tile) -> KernelConfig:
        network = self.network
        return KernelConfig(
            is_heun=self.method.scheme is Heun,
            activation=network.activation,
            norm=network.norm,
            epsilon=EPSILON,
            dim=network.dim,
            padded_dim=self.dim,
            rows=tile.rows,
            chunk=tile.chunk,
            stages=tile.stages,
            precision=arguments.precision(network.dtype),
            scales_first=arguments.scales_first(network.dtype),
            approximates=arguments.approximates(network.activation, network.dtype),
        )

    def _launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, *values: Any, **constants: Any) -> None:
        with triton_ops.launch_lock, torch.cuda.device_of(self.w1):
            kernel[grid](*values, **constants, CONFIG=self._config(tile), num_warps=tile.warps)


def _descriptor(tensor: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, block)
