"""What the ops of a depth-fused stack take and give, as structures.

Ops are called with flat lists of operands, as their schemas say (`ops/schemas.py`). The first thing that every
implementation does is to give them these names; the fields are the schema's, in its order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..dtypes import dtype_name
from ..method import Method
from ..reverse import Reverse
from ..schemes import SCHEMES
from .network import Network
from .storage import StoredIncrements


class StackOperands(NamedTuple):
    """Operands of `mlp_stack`."""

    x: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    activation: str
    norm: str | None
    scheme: str
    steps: Sequence[float]
    predictor: str
    corrections: int
    reuse: bool
    accelerate: bool
    bits: Sequence[int]
    rounded_forward: bool
    anchors: Sequence[int]
    gradient: str
    backend: str
    squares: Tensor | None


class StackAdjointOperands(NamedTuple):
    """Operands of `mlp_stack_adjoint`."""

    g: Tensor
    x_last: Tensor | None
    increments: Tensor
    anchored: Tensor
    companions: Tensor
    units: Tensor
    scales: Tensor
    packed: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    activation: str
    norm: str | None
    scheme: str
    steps: Sequence[float]
    predictor: str
    corrections: int
    reuse: bool
    accelerate: bool
    bits: Sequence[int]
    rounded_forward: bool
    anchors: Sequence[int]
    wants_parameters: bool
    wants_input: bool
    backend: str


KEPT = ("x_last", "increments", "anchored", *StoredIncrements._fields)
"""What the op's results keep for the adjoint, under the same names."""


class StackExactAdjointOperands(NamedTuple):
    """Operands of `mlp_stack_exact_adjoint`."""

    g: Tensor
    x: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    activation: str
    norm: str | None
    scheme: str
    steps: Sequence[float]
    wants_parameters: bool
    backend: str


class _OfNetwork(Protocol):
    @property
    def weight_in(self) -> Tensor: ...
    @property
    def bias_in(self) -> Tensor | None: ...
    @property
    def weight_out(self) -> Tensor: ...
    @property
    def bias_out(self) -> Tensor | None: ...
    @property
    def activation(self) -> str: ...
    @property
    def norm(self) -> str | None: ...


def network_of(operands: _OfNetwork) -> Network:
    """The network that an op's operands describe."""
    o = operands
    return Network(o.weight_in, o.bias_in, o.weight_out, o.bias_out, o.activation, o.norm)


def method_of(where: str, operands: StackOperands | StackAdjointOperands | StackExactAdjointOperands) -> Method:
    """The method that an op's operands describe; one that rebuilds nothing where nothing is to be rebuilt.

    Raises:
        ValueError: for an unknown scheme, or a solver that is none.
    """
    o = operands
    if o.scheme not in SCHEMES:
        raise ValueError(f"{where}: scheme must be one of {tuple(SCHEMES)}, got {o.scheme!r}")
    steps = tuple(o.steps)
    if isinstance(o, StackExactAdjointOperands) or (isinstance(o, StackOperands) and o.gradient == "checkpoint"):
        return _method(o.scheme, steps)
    solver = o.predictor, o.corrections, o.reuse, o.accelerate, _bits(tuple(o.bits)), o.rounded_forward
    return _method(o.scheme, steps, solver, tuple(o.anchors))


def _bits(bits: tuple[int, ...]) -> int | tuple[int, ...] | None:
    """As `Reverse` has them: one number for all steps, or one for each."""
    return (bits or (None,))[0] if len(bits) < 2 else bits


@functools.lru_cache(maxsize=256)
def _method(
    scheme: str,
    steps: tuple[float, ...],
    solver: tuple[Any, ...] = (),
    anchors: tuple[int, ...] = (),
) -> Method:
    return Method(SCHEMES[scheme], steps, Reverse(*solver), anchors)


def check_tensor(where: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, x: Tensor) -> None:
    """Check an operand beside a state x: kernels are given its address.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, or a device that is not x's.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{where}: {name} must be {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}; convert it")
    if tensor.shape != tuple(shape):
        raise ValueError(
            f"{where}: {name} must have shape {list(shape)} with a state {list(x.shape)}, got {list(tensor.shape)}; "
            "pass what the forward op returned"
        )
    if tensor.device != x.device:
        raise ValueError(
            f"{where}: {name} must be on the states' device, {x.device}, got {tensor.device}; move it there"
        )


class SavedStates(NamedTuple):
    """What the forward pass gives, and the backward pass that rebuilds starts from.

    Shapes [rows, dim] within a backend.
    """

    x_last: Tensor | None
    """None for a backward pass from stored increments, which ends where companions do."""
    increments: Tensor
    """[saved, *], the last ones, newest first, where the solver extrapolates; in the parameters' dtype."""
    anchored: Tensor
    """[anchors, *], the starting states of the anchored steps."""
    stored: StoredIncrements
    rounding: Tensor | None = None
    """[steps, 3], `RoundingSquares.numbers` of a forward pass that stored increments; empty after another one."""
    sample_rows: int = 1
    """Rows of a sample, one after the other, that accelerated corrections mix by one coefficient."""


class ParameterGradients(NamedTuple):
    """Gradients of the parameters, in the dtype in which they are added up; None for absent biases."""

    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None


class AdjointResult(NamedTuple):
    """What a backward pass gives."""

    g: Tensor
    """g_0."""
    gradients: ParameterGradients | None
    squares: Tensor
    """[steps, 2], float64: |y - x_n|^2 and |x_n|^2 of each step; where increments are stored |y - (c_{n+1} - Phi(y))|^2
    and the larger one of |y|^2 and |c_{n+1}|^2. Kernels add up those of a tile in float32, whose range ends with states
    of 1.8e19."""
    x: Tensor | None
    """The rebuilt x_0."""


class Wanted(NamedTuple):
    """What is wanted of a backward pass beside g_0."""

    parameters: bool
    input: bool = False
    """Whether the rebuilt x_0 is."""


class StackBackend(Protocol):
    """What computes the ops, on states of shape [rows, dim], contiguous."""

    def reason(self, network: Network, method: Method, device: torch.device) -> str | None:
        """Why the backend can't compute this; None if it can."""

    def forward(self, network: Network, method: Method, x: Tensor) -> SavedStates:
        """x_N from x_0, and what the method's solver needs beside it."""

    def adjoint(
        self, network: Network, method: Method, g: Tensor, states: SavedStates, wanted: Wanted
    ) -> AdjointResult:
        """The backward pass from g_N and x_N, which rebuilds states. Its operands are left as they are."""

    def exact_adjoint(
        self, network: Network, method: Method, g: Tensor, x_first: Tensor, wants_parameters: bool
    ) -> tuple[Tensor, ParameterGradients | None]:
        """g_0 and the gradients from g_N and x_0: rows run forward once more. Its operands are left as they are."""
