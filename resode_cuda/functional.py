"""`ResidualMLP` as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from . import fused
from .adjoint.drift import DriftMonitor
from .dtypes import dtype_name
from .fused.network import Network
from .fused.reference.plain import plain
from .module import GRADIENTS, checked_anchors, checked_steps
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
    reverse: str | Reverse = "corrected",
    anchors: int | None = None,
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
        gradient: "adjoint" rebuilds the states from x_N and stores none; "checkpoint" is exact: it stores x_0, and
            only the rows that it works on have N states; "backprop" stores everything and has higher derivatives.
        reverse, anchors: how the adjoint rebuilds, as for `ResidualStack`.
        backend: "torch" runs everywhere; "triton" on CUDA devices; "auto" takes what can run. One that is named runs
            or raises.

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
    if scheme not in SCHEMES:
        raise ValueError(f"{where}: scheme must be one of {tuple(SCHEMES)}, got {scheme!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"{where}: gradient must be one of {GRADIENTS}, got {gradient!r}")
    count = (weight_in.shape[0] if weight_in.dim() else 0) + 1 - SCHEMES[scheme].blocks_per_step
    steps = checked_steps(where, step, count) if count > 0 else ()
    network = Network(weight_in, bias_in, weight_out, bias_out, steps, scheme, activation, norm)
    solver = solver_from(where, reverse)
    return apply(where, network, x, gradient, solver, checked_anchors(where, anchors), backend)


def apply(
    where: str,
    network: Network,
    x: Tensor,
    gradient: str,
    solver: Reverse,
    anchors: int | None,
    backend: str,
    monitor: DriftMonitor | None = None,
) -> Tensor:
    """`residual_mlp`, for arguments that were checked; a monitor gets the defects of the backward pass."""
    network = _autocast(network, x.device.type)
    state = x.to(_stream_dtype(where, network, x))
    network.check(where, state)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *network.parameters)
    )
    rebuilds = differentiable and gradient == "adjoint"
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    is_watched = rebuilds and monitor is not None and not is_traced
    if monitor is not None and differentiable and not is_watched:
        monitor.forget()
    if gradient == "backprop":
        if backend not in ("auto", "torch"):
            raise ValueError(
                f'{where}: gradient="backprop" is computed by plain torch, got backend={backend!r}; use backend="torch"'
            )
        return plain(network, state.contiguous()).to(x.dtype)
    if _is_differentiated_otherwise():
        if differentiable:
            raise RuntimeError(
                f"{where}: gradient={gradient!r} gives first derivatives in reverse mode only, got a torch.func "
                'transform or forward mode; use gradient="backprop"'
            )
        return plain(network, state.contiguous()).to(x.dtype)
    norms = monitor.norms(state) if is_watched and monitor is not None else None
    x_last = fused.mlp_stack(
        state,
        network,
        # Where nothing is differentiated, nothing is kept for it.
        gradient="adjoint" if rebuilds else "checkpoint",
        solver=solver,
        anchors=anchors,
        backend=backend,
        norms=None if norms is None else norms[:-1],
    )
    if norms is not None and monitor is not None:
        monitor.watch(x_last.grad_fn, norms, solver.reuse)
    return x_last.to(x.dtype)


def _is_differentiated_otherwise() -> bool:
    """Whether torch.func or forward mode differentiates what is computed here, of which the ops know nothing."""
    if torch.compiler.is_compiling():
        return False
    transforms = (interpreter.key() for interpreter in get_interpreter_stack() or ())
    return forward_ad._current_level >= 0 or any(key in (TransformType.Grad, TransformType.Jvp) for key in transforms)


def _autocast(network: Network, device_type: str) -> Network:
    """Its parameters in autocast's dtype, where that is on."""
    if not _autocasts(network, device_type):
        return network
    dtype = torch.get_autocast_dtype(device_type)
    names = ("weight_in", "bias_in", "weight_out", "bias_out")
    cast = (None if parameter is None else parameter.to(dtype) for parameter in network.parameters)
    return replace(network, **dict(zip(names, cast, strict=True)))  # type: ignore[arg-type]


def _autocasts(network: Network, device_type: str) -> bool:
    """Autocast leaves float64 alone, and what is not floating is an error."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return False
    return all(p is None or p.is_floating_point() for p in network.parameters) and network.dtype != torch.float64


def _stream_dtype(where: str, network: Network, x: Tensor) -> torch.dtype:
    """That of the network's states, if x has the parameters' dtype, the stream's, or under autocast any of 16 bits."""
    known = {network.dtype, network.stream_dtype}
    if _autocasts(network, x.device.type):
        known |= {torch.bfloat16, torch.float16}
    if x.dtype not in known:
        raise TypeError(
            f"{where}: x must have the parameters' dtype, {dtype_name(network.dtype)}, got {dtype_name(x.dtype)}; "
            "convert x or the parameters, or use torch.autocast"
        )
    return network.stream_dtype
