"""Forward passes that are recorded to run elsewhere, and so must consist of ordinary torch operations."""

from __future__ import annotations

import torch


def wants_plain(where: str, gradient: str, differentiable: bool) -> bool:
    """Whether torch.jit.trace or torch.onnx.export records this forward pass, or torch.export without its gradients.

    Args:
        differentiable: whether it would be recorded by autograd.

    Raises:
        RuntimeError: for torch.jit.trace of what has a backward pass of its own.
    """
    if torch.jit.is_tracing():
        if differentiable and gradient != "backprop" and not torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"{where}: torch.jit.trace records no backward pass but autograd's own, got gradient={gradient!r}; "
                'trace under torch.no_grad(), or use gradient="backprop"'
            )
        return True
    return torch.compiler.is_exporting() and (not differentiable or torch.onnx.is_in_onnx_export())
