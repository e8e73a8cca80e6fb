"""`ResidualMLP` as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .fused.network import FUSED_SCHEMES, Network
from .fused.op import apply
from .method import Anchors, Method, anchored_steps, checked_anchors
from .module import GRADIENTS, checked_steps, default_reverse
from .reverse import Reverse, solver_from
from .schemes import SCHEMES


def residual_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    scheme: str = "euler",
    *,
    activation: str = "gelu",
    norm: str | None = None,
    step: float | Sequence[float] | None = None,
    gradient: str = "adjoint",
    reverse: str | Reverse | None = None,
    anchors: Anchors = None,
    backend: str = "auto",
) -> Tensor:
    """x_N from x_0 by N steps of a residual network of two-layer perceptrons.

    f_n(x) = W2_n s(W1_n norm(x) + b1_n) + b2_n;  Euler: x_{n+1} = x_n + h f_n(x_n);  Heun: `ResidualStack`'s formula.

    Args:
        x: x_0, shape [*, dim], any number of rows; the parameters' dtype, or float32 with 16-bit parameters. States
            between layers are float32 at least.
        weight_in, bias_in: W1 [layers, hidden, dim] and b1 [layers, hidden] or None. float64, float32, bfloat16 or
            float16; under autocast products are computed in its dtype.
        weight_out, bias_out: W2 [layers, dim, hidden] and b2 [layers, dim] or None.
        scheme: "euler", N = layers; or "heun", N = layers - 1.
        activation: s: "identity", "relu", "gelu", "gelu_tanh" (its approximation by tanh), "silu" or "tanh".
        norm: None, "rms" or "layer", without weights, epsilon 1e-5.
        step: h, dimensionless: a number > 0, or one for each step; None is 1/N.
        gradient: "adjoint" rebuilds the states from x_N or from increments in a few bits; "checkpoint" is exact: it
            stores x_0, and only the rows that it works on have N states; "backprop" stores everything and has higher
            derivatives.
        reverse, anchors: how the adjoint comes by the states, as for `ResidualMLP`.
        backend: "torch" runs everywhere, "triton" and "cuda" on CUDA devices; "auto" takes what can run. One that is
            named runs or raises.

    Returns:
        x_N, shape and dtype of x, contiguous.

    Raises:
        TypeError: for dtypes that do not fit, or what is no tensor.
        ValueError: for shapes, devices, names or steps that do not fit, and a backend that can't compute this.
        RuntimeError: under "adjoint" and "checkpoint", for derivatives by torch.func or in forward mode, and in the
            backward pass for those of second order.

    The gradient's error under "adjoint" is that of `Reverse`. Source: Sander, Ablin and Peyré, NeurIPS 2022,
    arXiv:2205.14612; keeping the whole depth on chip, reuse and extrapolation are this library's.
    """
    where = "residual_mlp"
    for name, tensor in (("x", x), ("weight_in", weight_in), ("weight_out", weight_out)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
    for name, bias in (("bias_in", bias_in), ("bias_out", bias_out)):
        if not (bias is None or isinstance(bias, Tensor)):
            raise TypeError(f"{where}: {name} must be a tensor or None, got {type(bias).__name__}")
    if scheme not in FUSED_SCHEMES:
        raise ValueError(f"{where}: scheme must be one of {FUSED_SCHEMES}, got {scheme!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"{where}: gradient must be one of {GRADIENTS}, got {gradient!r}")
    count = (weight_in.shape[0] if weight_in.dim() else 0) + 1 - SCHEMES[scheme].blocks_per_step
    steps = checked_steps(where, step, count) if count > 0 else ()
    # Without steps, what is wrong is the parameters' shape, which `apply` tells.
    kept = anchored_steps(checked_anchors(where, anchors, count), count) if count > 0 else ()
    solver = solver_from(where, default_reverse(step, steps) if reverse is None else reverse)
    method = Method(SCHEMES[scheme], steps, solver, kept)
    network = Network(weight_in, bias_in, weight_out, bias_out, activation, norm)
    return apply(where, network, method, x, gradient, backend)
