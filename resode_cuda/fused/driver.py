"""The passes of a whole stack, over kernels that take a slab of rows through a range of its steps.

A forward pass is one launch, whatever the depth. A backward pass is two for each slab of rows, the state pass and the
weight-gradient pass, between which each layer's inputs and cotangents wait in scratch memory; or a single one, where
the state pass adds up gradients itself. `slabs.py` says how many rows a slab has, and when its way through the depth is
one of several ranges.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..method import Method
from ..squares import square_dtype
from ..stored import GROUP
from .network import Network
from .schedule import schedule
from .signature import AdjointResult, ParameterGradients, SavedStates, Wanted
from .slabs import slabs
from .storage import RoundingSquares, StoredIncrements, defect_squares, unfilled, unmeasured

SMALLEST_DIM = 16


def padded_dim(dim: int) -> int:
    """The power of two that a tile's columns are."""
    return max(SMALLEST_DIM, 1 << (dim - 1).bit_length())


class Scratch(NamedTuple):
    """What each call of a layer in a range of steps leaves for its gradients.

    Shapes [layer calls, rows, dim], in the parameters' dtype. A step calls one layer, with Heun two.
    """

    layer_inputs: Tensor | None
    """u, after the norm."""
    inverse_rms: Tensor | None
    """r of the norm, [layer calls, rows], float32, which the exact adjoint takes back from here; else None."""
    cotangents: Tensor | None
    """c, of the layer's output; whether with the factor h or h/2, the kernels agree among themselves."""

    @property
    def rows(self) -> int:
        return 0 if self.layer_inputs is None else self.layer_inputs.shape[1]


NO_SCRATCH = Scratch(None, None, None)
"""Scratch of a state pass that adds up gradients itself, or of which none are wanted."""


class Boundary(NamedTuple):
    """A slab's states where a range of steps begins or ends: [rows, dim] each, float32."""

    x: Tensor | None
    """c_n where increments are stored. None where it is not wanted: the first range of a pass may leave no x_0; and
    after the last step of those, where a companion ends."""
    g: Tensor
    increments: Tensor | None
    """[2, rows, dim], where the solver extrapolates: d_{n+2} and d_{n+1} between the steps n and n + 1. At x_N the ones
    that the forward pass has saved: newest first, in the parameters' dtype, and one if there is one step."""


class StatePass(NamedTuple):
    """A slab's way back through a range of steps."""

    start: Boundary
    """After the last of the steps."""
    end: Boundary
    """Before the first one: to be filled."""
    anchored: Tensor | None
    """[anchors, rows, dim], the starting states of all anchored steps of the stack."""
    stored: StoredIncrements | None
    """The slab's, where increments are stored: the integers are [stored steps, rows, bytes]."""
    squares: Tensor
    """From `NetworkKernels.squares`, to be filled."""
    scratch: Scratch
    """To be filled, unless the pass adds gradients up itself."""
    steps: range
    adds_gradients: bool


class NetworkKernels(ABC):
    """The kernels, with what all of them take of a network and a method: weights, padded, and the schedule.

    Args:
        chunk: the hidden size is padded to a multiple of it.
        unit: rows that every pass over scratch memory takes in whole blocks.
    """

    def __init__(self, network: Network, method: Method, chunk: int, unit: int) -> None:
        self.network, self.unit = network, unit
        self.device = network.weight_in.device
        self.layer_calls = method.scheme.blocks_per_step
        self.dim = max(padded_dim(network.dim), GROUP if method.solver.is_stored else 0)
        self.hidden = -(-network.hidden // chunk) * chunk
        layers, hidden, dim = network.layers, self.hidden, self.dim
        # Held here until the launches are made: kernels get addresses.
        self.w1 = padded(network.weight_in, (layers, hidden, dim))
        self.b1 = None if network.bias_in is None else padded(network.bias_in, (layers, hidden))
        self.w2 = padded(network.weight_out, (layers, dim, hidden))
        self.b2 = None if network.bias_out is None else padded(network.bias_out, (layers, dim))
        self.follow(method)

    def follow(self, method: Method) -> None:
        """Take the steps, weights and anchors of this method from now on. Its scheme and solver are those of before."""
        self.method, self.schedule = method, schedule(method, self.device)

    sums_by_dim: ClassVar[bool]
    """Whether kernels add up the gradients of both matrices as [dim, hidden], or as [hidden, dim]."""

    def takes_two_passes(self, rows: int) -> bool:
        """Whether the gradients of parameters take a pass of their own."""
        return True

    def wave(self, is_exact: bool) -> int:
        """Rows that the state pass, or the exact one, takes at once on the GPU, a multiple of the unit; a unit where
        the kernels' slabs need not be whole waves."""
        return self.unit

    @abstractmethod
    def forward(
        self, x: Tensor, x_last: Tensor | None, increments: Tensor | None, anchored: Tensor | None, steps: int
    ) -> None:
        """Take x_0 through the first steps, and fill what is given."""

    def storing_forward(
        self, x: Tensor, x_last: Tensor, anchored: Tensor | None, stored: StoredIncrements, rounding: RoundingSquares
    ) -> None:
        """Take x_0 through all steps, and fill what is given. Kernels that store no increments say so beforehand."""
        raise NotImplementedError

    @abstractmethod
    def adjoint(self, state_pass: StatePass) -> None:
        """Go back through the steps, rebuilding the states."""

    @abstractmethod
    def exact(self, x: Tensor, g_last: Tensor, g_first: Tensor, scratch: Scratch, steps: range) -> None:
        """Take x, the first step's starting state, forward through the steps and back, and fill scratch."""

    @abstractmethod
    def add_gradients(self, scratch: Scratch, rows: int, steps: range) -> None:
        """Add up the gradients of the layers that these steps call, from what their state pass has left of the rows."""

    @abstractmethod
    def squares(self, rows: int) -> Tensor:
        """Memory for a state pass' squared norms of a slab, shape [parts, steps, 2], to be summed over parts; 3 as in
        `storage.defect_squares` where increments are stored."""

    @functools.cached_property
    def sums(self) -> ParameterGradients:
        """What gradients are added to, padded, in float32."""
        layers, zeros = self.network.layers, self.schedule.new_zeros
        matrix = (layers, self.dim, self.hidden) if self.sums_by_dim else (layers, self.hidden, self.dim)
        bias_in = None if self.b1 is None else zeros(layers, self.hidden)
        bias_out = None if self.b2 is None else zeros(layers, self.dim)
        return ParameterGradients(zeros(matrix), bias_in, zeros(matrix), bias_out)

    def gradients(self) -> ParameterGradients:
        """The sums, cut to the parameters' shapes."""
        weight_in, bias_in, weight_out, bias_out = self.sums
        if self.sums_by_dim:
            weight_in, weight_out = weight_in.mT, weight_out.mT
        hidden, dim = self.network.hidden, self.network.dim
        return ParameterGradients(
            weight_in[:, :hidden, :dim].contiguous(),
            None if bias_in is None else bias_in[:, :hidden].contiguous(),
            weight_out[:, :hidden, :dim].mT.contiguous(),
            None if bias_out is None else bias_out[:, :dim].contiguous(),
        )

    def step_bytes(self, two_passes: bool) -> int:
        """Bytes of scratch memory for a row and step: input and cotangent of its layer calls, and r."""
        return two_passes * self.layer_calls * (2 * self.dim * self.w1.itemsize + 4)

    def whole(self, rows: int) -> int:
        return -(-rows // self.unit) * self.unit

    def scratch(self, rows: int, steps: int) -> Scratch:
        shape = steps * self.layer_calls, self.whole(rows), self.dim
        return Scratch(self.w1.new_empty(shape), None, self.w1.new_empty(shape))


class SlabDriver:
    """The ops, by kernels that are made for a network and a method."""

    def __init__(self, kernels: Callable[[Network, Method], NetworkKernels]) -> None:
        self.kernels = kernels

    def forward(self, network: Network, method: Method, x: Tensor) -> SavedStates:
        """As `reference.passes.forward`."""
        x_last = torch.empty_like(x)
        increments = x.new_empty((method.kept_increments, *x.shape), dtype=network.dtype)
        anchored = x.new_empty((method.anchor_count, *x.shape))
        stored, rounding = unfilled(method, x), unmeasured(method, x)
        if len(x):
            kernels, wanted_states = self.kernels(network, method), anchored if method.anchor_count else None
            if method.solver.is_stored:
                kernels.storing_forward(x, x_last, wanted_states, stored, rounding)
            else:
                wanted_increments = increments if method.kept_increments else None
                kernels.forward(x, x_last, wanted_increments, wanted_states, len(method))
        return SavedStates(x_last, increments, anchored, stored, rounding.numbers(len(x)))

    def adjoint(
        self, network: Network, method: Method, g: Tensor, states: SavedStates, wanted: Wanted
    ) -> AdjointResult:
        """As `reference.passes.adjoint`."""
        kernels = self.kernels(network, method)
        rows, count = len(g), len(method)
        two_passes = wanted.parameters and kernels.takes_two_passes(rows)
        g_first = torch.empty_like(g)
        x_first = torch.empty_like(g) if wanted.input else None
        squares = g.new_zeros(count, 3 if method.solver.is_stored else 2, dtype=square_dtype(g.device))
        step_bytes, wave = kernels.step_bytes(two_passes), kernels.wave(is_exact=False)
        slab_rows, length = slabs(rows, count, step_bytes, 0, kernels.unit, wave)
        scratch = kernels.scratch(min(slab_rows, rows), length) if two_passes else NO_SCRATCH
        for begin in range(0, rows, slab_rows):
            slab = slice(begin, min(begin + slab_rows, rows))
            x = None if states.x_last is None or method.solver.is_stored else states.x_last[slab]
            stored = states.stored.of_rows(slab) if method.solver.is_stored else None
            anchored = states.anchored[:, slab] if method.anchor_count else None
            start = Boundary(x, g[slab], states.increments[:, slab] if method.extrapolates else None)
            rows_of_slab = len(g[slab])
            parts = kernels.squares(rows_of_slab)
            for last in range(count, 0, -length):
                steps = range(max(0, last - length), last)
                end = Boundary(None if x_first is None else x_first[slab], g_first[slab], None)
                if steps.start:
                    d = None if start.increments is None else g.new_empty((2, *g[slab].shape))
                    end = Boundary(torch.empty_like(g[slab]), g_first[slab], d)
                adds_gradients = wanted.parameters and not two_passes
                kernels.adjoint(StatePass(start, end, anchored, stored, parts, scratch, steps, adds_gradients))
                if two_passes:
                    kernels.add_gradients(scratch, rows_of_slab, steps)
                start = end
            squares += parts.sum(0, dtype=squares.dtype)
        return AdjointResult(
            g_first, kernels.gradients() if wanted.parameters else None, defect_squares(squares), x_first
        )

    def exact_adjoint(
        self, network: Network, method: Method, g: Tensor, x_first: Tensor, wants_parameters: bool
    ) -> tuple[Tensor, ParameterGradients | None]:
        """As `reference.passes.exact_adjoint`."""
        kernels = self.kernels(network, method)
        rows, count = len(g), len(method)
        g_first = torch.empty_like(g)
        step_bytes, start_bytes = kernels.step_bytes(True), g.itemsize * network.dim
        slab_rows, length = slabs(rows, count, step_bytes, start_bytes, kernels.unit, kernels.wave(is_exact=True))
        most_rows = min(slab_rows, rows)
        scratch = kernels.scratch(most_rows, length)
        if network.norm is not None:
            inverse_rms = g.new_empty(length * kernels.layer_calls, scratch.rows)
            scratch = scratch._replace(inverse_rms=inverse_rms)
        begins = tuple(range(0, count, length))
        starts = g.new_empty((len(begins), most_rows, network.dim)) if len(begins) > 1 else None
        kernels.follow(replace(method, anchors=begins))
        for begin in range(0, rows, slab_rows):
            slab = slice(begin, min(begin + slab_rows, rows))
            x = x_first[slab]
            states = x[None]
            if starts is not None:
                states = starts[:, : len(x)]
                # One step beyond the last start, which is stored before it.
                kernels.forward(x, None, None, states, begins[-1] + 1)
            g_here, g_there = g[slab], g_first[slab]
            for state, first in reversed(list(zip(states, begins, strict=True))):
                steps = range(first, min(first + length, count))
                kernels.exact(state, g_here, g_there, scratch, steps)
                if wants_parameters:
                    kernels.add_gradients(scratch, len(x), steps)
                g_here = g_there
        return g_first, kernels.gradients() if wants_parameters else None


def padded(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """The parameter, contiguous and aligned; a copy filled up with zeros where it is smaller than the shape."""
    parameter = parameter.detach()
    if parameter.shape == tuple(shape):
        parameter = parameter.contiguous()
        return parameter if parameter.data_ptr() % 16 == 0 else parameter.clone()
    out = parameter.new_zeros(tuple(shape))
    out[tuple(slice(size) for size in parameter.shape)] = parameter
    return out


def rows_apart(states: Tensor | None) -> int:
    """How many rows after a state the next one begins; 0 where there is no next one."""
    return 0 if states is None or len(states) < 2 else states.stride(0) // states.shape[-1]
