"""The passes of a whole stack over kernels that take a slab of rows through a range of its steps.

A forward pass is one launch, whatever the depth. A backward pass is two for each slab of rows, the state pass and the
weight-gradient pass, between which each layer's points and cotangents wait in scratch memory; or a single one, where
the state pass adds up gradients itself. `slabs.py` says how many rows a slab has, and when its way through the depth is
one of several ranges.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..reverse import Reverse
from .network import Network
from .reference.tile import Gradients
from .schedule import padded, schedule
from .slabs import slabs

SMALLEST_DIM = 16


def padded_dim(dim: int) -> int:
    """The power of two that a tile's columns are."""
    return max(SMALLEST_DIM, 1 << (dim - 1).bit_length())


class Scratch(NamedTuple):
    """Of every use of a layer in a range of steps: u, where it was taken, and the cotangent c of its output.

    Shapes [uses, rows, dim], in the parameters' dtype.
    """

    us: Tensor
    cs: Tensor


class Ends(NamedTuple):
    """What a state pass starts from, at x_last, and what it leaves, at x_first: [rows, dim] each, float32.

    d_last, d_first: two increments, [2, rows, dim], those of the steps behind, where the solver extrapolates: d_{n+2}
    before d_{n+1}. Where a pass starts from x_N they are what the forward pass has kept, newest first, in the dtype of
    the parameters, and one if there is one step. x_first, d_first: None where nobody goes on from there.
    """

    x_last: Tensor
    g_last: Tensor
    d_last: Tensor | None
    x_first: Tensor | None
    g_first: Tensor
    d_first: Tensor | None
    anchored: Tensor | None


class Kernels(ABC):
    """The kernels with what all of them take of a network: its weights, padded, its schedule and its formulas.

    Args:
        chunk: what the hidden size is padded to a multiple of.
        unit: rows that every pass over scratch memory takes in whole blocks.
    """

    def __init__(self, network: Network, chunk: int, unit: int, extrapolates: bool) -> None:
        self.network, self.unit = network, unit
        self.device = network.weight_in.device
        self.uses = network.formulas.blocks_per_step
        self.dim = padded_dim(network.dim)
        self.hidden = -(-network.hidden // chunk) * chunk
        layers, hidden, dim = network.layers, self.hidden, self.dim
        # Held here until the launches are made: kernels get addresses.
        self.w1 = padded(network.weight_in, (layers, hidden, dim))
        self.b1 = None if network.bias_in is None else padded(network.bias_in, (layers, hidden))
        self.w2 = padded(network.weight_out, (layers, dim, hidden))
        self.b2 = None if network.bias_out is None else padded(network.bias_out, (layers, dim))
        self.schedule = schedule(tuple(network.steps), network.scheme, extrapolates, self.device)

    sums_by_dim: ClassVar[bool]
    """Whether kernels add up the gradients of both matrices as [dim, hidden], or as [hidden, dim]."""

    def is_split(self, rows: int) -> bool:
        """Whether the gradients of parameters take a pass of their own."""
        return True

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        x_last: Tensor | None,
        increments: Tensor | None,
        anchored: Tensor | None,
        steps: int,
        every: int,
    ) -> None:
        """From x_0 through the first steps. anchored: the states of every so many."""

    @abstractmethod
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
        """From x_last and g_last back through the steps last - 1 to first; fills scratch, or adds gradients up."""

    @abstractmethod
    def exact(
        self, x: Tensor, g_last: Tensor, g_first: Tensor, rs: Tensor | None, scratch: Scratch, first: int, last: int
    ) -> None:
        """From x, the state before step first, forward through the steps and back. rs: [uses, rows], of norms."""

    @abstractmethod
    def add_gradients(self, scratch: Scratch, rows: int, first: int, last: int) -> None:
        """Of the layers that a range of steps uses, from what its state pass has left of the rows."""

    @abstractmethod
    def norms(self, rows: int) -> Tensor:
        """For what a state pass finds of a slab's norms, shape [parts, steps, 2]: its sum over parts is the slab's."""

    @functools.cached_property
    def sums(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """What gradients are added to, of W1, b1, W2 and b2, padded, in float32."""
        layers, zeros = self.network.layers, self.schedule.new_zeros
        matrix = (layers, self.dim, self.hidden) if self.sums_by_dim else (layers, self.hidden, self.dim)
        db1 = None if self.b1 is None else zeros(layers, self.hidden)
        db2 = None if self.b2 is None else zeros(layers, self.dim)
        return zeros(matrix), db1, zeros(matrix), db2

    def gradients(self) -> Gradients:
        """The sums, cut to the parameters' shapes."""
        dw1, db1, dw2, db2 = self.sums
        if self.sums_by_dim:
            dw1, dw2 = dw1.mT, dw2.mT
        hidden, dim = self.network.hidden, self.network.dim
        return Gradients(
            dw1[:, :hidden, :dim].contiguous(),
            None if db1 is None else db1[:, :hidden].contiguous(),
            dw2[:, :hidden, :dim].mT.contiguous(),
            None if db2 is None else db2[:, :dim].contiguous(),
        )

    def step_bytes(self, is_split: bool) -> int:
        """Of scratch memory for a row and step: u and c of its uses, and r."""
        return is_split * self.uses * (2 * self.dim * self.w1.itemsize + 4)

    def whole(self, rows: int) -> int:
        return -(-rows // self.unit) * self.unit

    def scratch(self, rows: int, steps: int) -> Scratch:
        shape = steps * self.uses, self.whole(rows), self.dim
        return Scratch(self.w1.new_empty(shape), self.w1.new_empty(shape))


class Stacks:
    """The ops, by kernels that are made for a network and whether the solver extrapolates."""

    def __init__(self, kernels: Callable[[Network, bool], Kernels]) -> None:
        self.kernels = kernels

    def forward(self, network: Network, x: Tensor, kept: int, anchors: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `torch_backend.forward`."""
        count = len(network.steps)
        x_last = torch.empty_like(x)
        increments = x.new_empty((kept, *x.shape), dtype=network.dtype)
        anchored = x.new_empty((0 if anchors is None else -(-count // anchors), *x.shape))
        if len(x):
            optional = increments if kept else None, None if anchors is None else anchored
            self.kernels(network, False).forward(x, x_last, *optional, count, anchors or 1)
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
        """As `torch_backend.adjoint`."""
        kernels = self.kernels(network, solver.extrapolates)
        rows, count = len(g), len(network.steps)
        is_split = wants_parameters and kernels.is_split(rows)
        g_first = torch.empty_like(g)
        x_first = torch.empty_like(g) if wants_input else None
        norms = g.new_zeros(count, 2)
        slab_rows, length = slabs(rows, count, kernels.step_bytes(is_split), 0, kernels.unit)
        scratch = kernels.scratch(min(slab_rows, rows), length) if is_split else None
        for begin in range(0, rows, slab_rows):
            slab = slice(begin, min(begin + slab_rows, rows))
            x, g_here, g_there = x_last[slab], g[slab], g_first[slab]
            d = increments[:, slab] if solver.extrapolates else None
            parts = kernels.norms(len(x))
            for last in range(count, 0, -length):
                first = max(0, last - length)
                # What the range of steps before this one starts from.
                x_there = torch.empty_like(x) if first else None if x_first is None else x_first[slab]
                d_there = x.new_empty((2, *x.shape)) if first and d is not None else None
                ends = Ends(x, g_here, d, x_there, g_there, d_there, None if anchors is None else anchored[:, slab])
                kernels.adjoint(ends, parts, scratch, first, last, anchors, solver, wants_parameters and not is_split)
                if scratch is not None:
                    kernels.add_gradients(scratch, len(x), first, last)
                if x_there is not None:
                    x = x_there
                g_here, d = g_there, d_there
            norms += parts.sum(0)
        return g_first, kernels.gradients() if wants_parameters else None, norms, x_first

    def exact_adjoint(
        self, network: Network, g: Tensor, x_first: Tensor, wants_parameters: bool
    ) -> tuple[Tensor, Gradients | None]:
        """As `torch_backend.exact_adjoint`."""
        kernels = self.kernels(network, False)
        rows, count = len(g), len(network.steps)
        g_first = torch.empty_like(g)
        slab_rows, length = slabs(rows, count, kernels.step_bytes(True), g.itemsize * network.dim, kernels.unit)
        most_rows = min(slab_rows, rows)
        scratch = kernels.scratch(most_rows, length)
        rs = None if network.norm is None else g.new_empty(scratch.us.shape[:2])
        starts = g.new_empty((-(-count // length), most_rows, network.dim)) if length < count else None
        for begin in range(0, rows, slab_rows):
            slab = slice(begin, min(begin + slab_rows, rows))
            x = x_first[slab]
            states = x[None]
            if starts is not None:
                states = starts[:, : len(x)]
                # One step beyond the last start, which is stored before it.
                kernels.forward(x, None, None, states, length * (len(starts) - 1) + 1, length)
            g_here, g_there = g[slab], g_first[slab]
            for k in reversed(range(len(states))):
                first, last = k * length, min((k + 1) * length, count)
                kernels.exact(states[k], g_here, g_there, rs, scratch, first, last)
                if wants_parameters:
                    kernels.add_gradients(scratch, len(x), first, last)
                g_here = g_there
        return g_first, kernels.gradients() if wants_parameters else None


def rows_apart(states: Tensor | None) -> int:
    """How many rows after a state the next one begins; 0 where there is no next one."""
    return 0 if states is None or len(states) < 2 else states.stride(0) // states.shape[-1]
