"""Operands of the depth-fused kernels in CUDA C++: a tuple for each structure of `csrc/mlp`, with its fields in order.

The structures' headers say what the fields are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class NetworkOperands(NamedTuple):
    """`Network` of `csrc/mlp/network.h`."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    schedule: Tensor
    hidden: int
    dim: int
    is_heun: bool
    activation: int
    norm: int
    epsilon: float


class LaunchOperands(NamedTuple):
    """`MlpLaunch` of `csrc/mlp/network.h`."""

    padded_dim: int
    dtype: int
    groups: int
    stream: int


class ForwardOperands(NamedTuple):
    """`MlpForward` of `csrc/mlp/forward.h`."""

    x_first: Tensor
    x_last: Tensor | None
    increments: Tensor | None
    anchored: Tensor | None
    rows: int
    anchored_rows: int
    steps: int
    saved_increments: int


class AdjointOperands(NamedTuple):
    """`MlpAdjoint` of `csrc/mlp/adjoint.h`."""

    x_last: Tensor | None
    g_last: Tensor
    x_first: Tensor | None
    g_first: Tensor
    last_increment: Tensor | None
    increment_before: Tensor | None
    increments_in: Tensor | None
    increments_out: Tensor | None
    anchored: Tensor | None
    squares: Tensor
    layer_inputs: Tensor | None
    cotangents: Tensor | None
    rows: int
    anchored_rows: int
    scratch_rows: int
    first: int
    last: int
    steps: int
    corrections: int
    extrapolates: bool
    reuses: bool


class ExactOperands(NamedTuple):
    """`MlpExact` of `csrc/mlp/exact.h`."""

    x_first: Tensor
    g_last: Tensor
    g_first: Tensor
    layer_inputs: Tensor | None
    inverse_rms: Tensor | None
    cotangents: Tensor | None
    rows: int
    scratch_rows: int
    first: int
    last: int


class GradientOperands(NamedTuple):
    """`MlpGradients` of `csrc/mlp/gradients.h`."""

    layer_inputs: Tensor | None
    cotangents: Tensor | None
    dw1: Tensor
    db1: Tensor | None
    dw2: Tensor
    db2: Tensor | None
    rows: int
    scratch_rows: int
    first: int
    last: int
    is_deterministic: bool


def addresses(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands with addresses for tensors, 0 for those that are absent."""
    return tuple(value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value for value in operands)
