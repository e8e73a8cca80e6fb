"""The layers of a depth-fused stack: two-layer perceptrons, their parameters stacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import DTYPES, dtype_name, dtype_names
from ..layouts import is_distributed
from ..method import Method
from .activations import ACTIVATIONS
from .norms import NORMS

FUSED_SCHEMES = ("euler", "heun")
"""Schemes whose steps are written out in the depth-fused formulas. Another one runs as a `ResidualStack`."""

PARAMETERS = ("weight_in", "bias_in", "weight_out", "bias_out")


@dataclass(frozen=True)
class Network:
    """f_n(x) = W2_n s(W1_n norm(x) + b1_n) + b2_n, which a `Method` steps through.

    Args:
        weight_in, bias_in: W1 [layers, hidden, dim], b1 [layers, hidden] or None.
        weight_out, bias_out: W2 [layers, dim, hidden], b2 [layers, dim] or None. All of one dtype, that of products.
        activation: s, of `ACTIVATIONS`.
        norm: of `NORMS`.
    """

    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    activation: str
    norm: str | None

    @property
    def layers(self) -> int:
        return self.weight_in.shape[0]

    @property
    def hidden(self) -> int:
        return self.weight_in.shape[1]

    @property
    def dim(self) -> int:
        return self.weight_in.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, and of matrix products' operands."""
        return self.weight_in.dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """Dtype of the states between layers, in which products are added up."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.weight_in, self.bias_in, self.weight_out, self.bias_out

    def check(self, where: str, method: Method, x: Tensor) -> None:
        """Check the network, the method that steps through it, and a state x that they are applied to.

        Raises:
            TypeError: for a dtype that is not one of DTYPES, parameters of several, an x that is not of the stream's;
                and for what is nested, sparse or a DTensor.
            ValueError: for unknown names, a scheme that the depth-fused formulas lack, shapes or devices that do not
                fit, steps that are not finite or too far apart, and anchors that are no steps.
        """
        for name, value, known in (
            ("scheme", method.scheme.name, FUSED_SCHEMES),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("norm", self.norm, NORMS),
        ):
            if value not in known:
                raise ValueError(f"{where}: {name} must be one of {known}, got {value!r}")
        for name, tensor in zip(("x", *PARAMETERS), (x, *self.parameters), strict=True):
            if tensor is not None:
                _check_dense(where, name, tensor)
        self._check_parameters(where)
        needed = method.scheme.blocks_per_step
        steps = self.layers + 1 - needed
        if steps < 1:
            raise ValueError(
                f"{where}: scheme={method.scheme.name!r} needs at least {needed} layers, got {self.layers}; stack the "
                "parameters of more layers"
            )
        if len(method) != steps:
            raise ValueError(f"{where}: step must give h for each of {steps} steps, got {len(method)}")
        if any(not 0 <= n < steps for n in method.anchors) or list(method.anchors) != sorted(set(method.anchors)):
            raise ValueError(
                f"{where}: anchors must be ascending numbers of the {steps} steps, got {list(method.anchors)}"
            )
        limits = torch.finfo(self.stream_dtype)
        least, most = limits.tiny, limits.max  # once: each look at them takes longer than a comparison
        for h in method.steps:
            if not least <= h <= most:
                raise ValueError(
                    f"{where}: step must be positive and finite in {dtype_name(self.stream_dtype)}, got {h}; leave it "
                    f"out for 1/{steps}"
                )
        method.check_steps(where, self.stream_dtype)
        if x.dtype != self.stream_dtype:
            raise TypeError(
                f"{where}: x must be {dtype_name(self.stream_dtype)}, the dtype of states with "
                f"{dtype_name(self.dtype)} parameters, got {dtype_name(x.dtype)}; convert x"
            )
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"{where}: x must have shape [*, {self.dim}], as weight_in {list(self.weight_in.shape)} says, got "
                f"{list(x.shape)}"
            )
        if x.device != self.weight_in.device:
            raise ValueError(
                f"{where}: x must be on the parameters' device, {self.weight_in.device}, got {x.device}; move x there"
            )

    def _check_parameters(self, where: str) -> None:
        if self.dtype not in DTYPES:
            raise TypeError(
                f"{where}: weight_in must be one of {dtype_names(DTYPES)}, got {dtype_name(self.dtype)}; convert it"
            )
        if self.weight_in.dim() != 3 or not self.weight_in.numel():
            raise ValueError(
                f"{where}: weight_in must have shape [layers, hidden, dim], none of them 0, got "
                f"{list(self.weight_in.shape)}"
            )
        shapes = {
            "bias_in": (self.bias_in, (self.layers, self.hidden)),
            "weight_out": (self.weight_out, (self.layers, self.dim, self.hidden)),
            "bias_out": (self.bias_out, (self.layers, self.dim)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(
                    f"{where}: {name} must have shape {list(shape)} with weight_in {list(self.weight_in.shape)}, got "
                    f"{list(tensor.shape)}"
                )
            if tensor.dtype != self.dtype:
                raise TypeError(
                    f"{where}: {name} must have weight_in's dtype, {dtype_name(self.dtype)}, got "
                    f"{dtype_name(tensor.dtype)}; convert {name}"
                )
            if tensor.device != self.weight_in.device:
                raise ValueError(
                    f"{where}: {name} must be on weight_in's device, {self.weight_in.device}, got {tensor.device}; "
                    f"move {name} there"
                )


def _check_dense(where: str, name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise TypeError(
            f"{where}: {name} must be dense, got a nested tensor; rows are independent, so pass its values(), or pad it"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{where}: {name} must be dense, got layout {tensor.layout}; use {name}.to_dense()")
    if is_distributed(tensor):
        raise TypeError(f"{where}: {name} must be this rank's own tensor, got a DTensor; use {name}.to_local()")
