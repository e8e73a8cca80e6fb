"""One layer of a `ResidualMLP` as an ordinary module: `nn.Sequential(norm, nn.Linear, activation, nn.Linear)`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .fused.activations import ACTIVATIONS
from .fused.norms import EPSILON


@dataclass(frozen=True)
class Perceptron:
    """What such a module computes, and with which parameters."""

    activation: str
    norm: str | None
    inner: nn.Linear
    outer: nn.Linear

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Its parameters in the order of `ResidualMLP`'s: weight_in, bias_in, weight_out, bias_out."""
        return self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias

    @property
    def facts(self) -> str:
        """What all layers of a stack must have in common, in words."""
        sizes = f"{self.inner.in_features} -> {self.inner.out_features} -> {self.outer.out_features}"
        biases = f"biases {self.inner.bias is not None} and {self.outer.bias is not None}"
        frozen = [parameter is not None and not parameter.requires_grad for parameter in self.parameters]
        weight = self.inner.weight
        return (
            f"{sizes}, {biases}, {self.activation}, norm {self.norm}, {weight.dtype}, {weight.device}, frozen {frozen}"
        )

    def module(self) -> nn.Sequential:
        norm = [_norm(self.norm, self.inner.in_features)] if self.norm is not None else []
        return nn.Sequential(*norm, self.inner, ACTIVATIONS[self.activation].module(), self.outer)

    @classmethod
    def of(cls, n: int, module: nn.Module) -> Perceptron:
        """Read block n of a stack.

        Raises:
            ValueError: if it is not such a module.
        """
        parts = list(module) if isinstance(module, nn.Sequential) else []
        if parts and isinstance(parts[0], (nn.LayerNorm, nn.RMSNorm)):
            norm_module = parts.pop(0)
            norm = "rms" if isinstance(norm_module, nn.RMSNorm) else "layer"
        else:
            norm_module, norm = None, None
        if len(parts) == 3 and isinstance(parts[0], nn.Linear) and isinstance(parts[2], nn.Linear):
            inner, between, outer = parts
            activation = _activation_name(between)
            assert isinstance(inner, nn.Linear)
            assert isinstance(outer, nn.Linear)
            has_biases = {inner.bias is not None, outer.bias is not None}
            is_residual = inner.in_features == outer.out_features and inner.out_features == outer.in_features
            if activation is not None and len(has_biases) == 1 and is_residual and _is_plain(norm_module, inner):
                return cls(activation, norm, inner, outer)
        raise ValueError(
            f"ResidualMLP: block {n} must be nn.Sequential([norm,] Linear(dim, hidden), activation, Linear(hidden, "
            f"dim)), both with a bias or neither, the norm without weights and with epsilon {EPSILON:g}, the "
            f"activation one of {tuple(ACTIVATIONS)}, got {module}"
        )


def _norm(name: str, dim: int) -> nn.Module:
    kind = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[name]
    return kind(dim, eps=EPSILON, elementwise_affine=False)


def _activation_name(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    kinds = {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
    return kinds.get(type(module))


def _is_plain(norm: nn.Module | None, inner: nn.Linear) -> bool:
    if norm is None:
        return True
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    return norm.normalized_shape == (inner.in_features,) and norm.eps == EPSILON and not norm.elementwise_affine
