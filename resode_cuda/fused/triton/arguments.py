"""What the depth-fused Triton kernels and their device functions take as structures. No Triton is needed here.

A kernel is compiled once for all equal `KernelConfig`, those of layers too wide to keep on chip for equal `WideConfig`.
Tuples of pointers reach a kernel whole. Tensor descriptors can't: Triton 3.6 compiles kernels that take them inside of
tuples, and fails to launch them. So W1 and W2 and their gradients are arguments of their own, and a kernel puts them
into `Weights` and `Gradients` for the functions that it calls. Whether there is a structure is told by its fields: a
tuple that has a None in it can't be compared with None. So it is with `Boundary` and `Scratch` of `driver.py`.

The names of schemes, activations and norms are those that the kernels have formulas of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

SCHEMES = ("euler", "heun")
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh")
"""Names that `layer.activate` has formulas of."""
APPROXIMATED = ("silu", "tanh")
"""Names of those whose value and slope by the approximate tanh are off by less, up to |z| = 8, than bfloat16 rounds off
a number of z's size and off 1: small values, of z far below zero, are lost in that. The slope of "gelu_tanh" multiplies
the error of a sigmoid near 1 by z^3."""
NORMS = (None, "rms", "layer")
"""Names that `layer.normalize` and `layer.norm_vjp` have formulas of."""


def reason_against(scheme: str, activation: str, norm: str | None) -> str | None:
    """Why Triton's kernels can't compute a network with formulas of these names; None if they can."""
    formulas: tuple[tuple[str, str | None, tuple[str | None, ...]], ...] = (
        ("schemes", scheme, SCHEMES),
        ("activations", activation, ACTIVATIONS),
        ("norms", norm, NORMS),
    )
    for kind, name, known in formulas:
        if name not in known:
            return f"Triton's kernels have the {kind} {', '.join(map(str, known))}, got {name!r}"
    return None


def precision(dtype: torch.dtype) -> str:
    """Precision of products of float32 operands, as torch is told; others ignore it."""
    # torch.get_float32_matmul_precision() raises where this has been set by name.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def scales_first(dtype: torch.dtype) -> bool:
    """Whether increments and cotangents are scaled by h before they are rounded to the parameters' dtype."""
    return dtype != torch.float16  # which would lose small ones


def approximates(activation: str, dtype: torch.dtype) -> bool:
    """Whether tanh, and sigmoids by it, are those of the special function unit."""
    return dtype == torch.bfloat16 and activation in APPROXIMATED


@dataclass(frozen=True)
class KernelConfig:
    """What a kernel is compiled for: the formulas of a network, and the tile that a program takes.

    Args:
        is_heun: whether a step is Heun's, of two layers, or Euler's, of one.
        dim, padded_dim: values of a row, and columns of its tile.
        rows, chunk, stages: as in `tiles.Tile`.
        precision, scales_first, approximates: what the functions of these names say.
    """

    is_heun: bool
    activation: str
    norm: str | None
    epsilon: float
    dim: int
    padded_dim: int
    rows: int
    chunk: int
    stages: int
    precision: str
    scales_first: bool
    approximates: bool


@dataclass(frozen=True)
class WideConfig:
    """What the kernels of `wide_kernels.py` are compiled for.

    Args:
        dim, padded_dim: values of a row, and of the power of two that a program holds.
        rows, columns: of the tiles in which cotangents go through the activation.
    """

    activation: str
    norm: str | None
    epsilon: float
    dim: int
    padded_dim: int
    rows: int
    columns: int
    approximates: ClassVar[bool] = False
    """These kernels wait for memory, not for special functions."""


class Weights(NamedTuple):
    """The padded parameters of all layers. w1, w2: descriptors, or pointers where there is no copy engine to use them.

    hidden: the padded hidden size. b1, b2: None without biases.
    """

    w1: Any
    b1: Any
    w2: Any
    b2: Any
    hidden: Any


class Gradients(NamedTuple):
    """What gradients are added to, float32, W1's transposed. dw1, dw2: descriptors where the copy engine adds."""

    dw1: Any
    db1: Any
    dw2: Any
    db2: Any


class Activated(NamedTuple):
    """s(z) and s'(z)."""

    value: Any
    slope: Any
