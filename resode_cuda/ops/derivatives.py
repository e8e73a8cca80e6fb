"""The derivatives of ops, which are those of reverse mode, and an error for all others.

Without it torch would give an op that has no formula for forward mode a tangent of zero, or none, and say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad


def is_differentiated_otherwise() -> bool:
    """Whether torch.func or forward mode may differentiate what is computed here, of which the ops know nothing."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _is_in_torch_func()


def register_derivatives(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    save: Callable[..., None] | None = None,
    *,
    way_out: str,
) -> None:
    """Register an op's derivatives, as torch.library.register_autograd, and refuse all others.

    Args:
        name: of the op in `torch.ops.resode`.
        save: keeps what backward needs, as setup_context there.
        way_out: what to use where other derivatives are wanted, for the error.
    """
    differentiated = make_autograd_impl(getattr(torch.ops.resode, name).default, Info(backward, save))

    def kernel(keys: Any, *operands: Any) -> Any:
        if is_differentiated_otherwise() and _has_other_derivatives(operands):
            raise RuntimeError(
                f"{name}: derivatives must be those of reverse mode, got a torch.func transform or forward mode; "
                f"{way_out}"
            )
        return differentiated(keys, *operands)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _has_other_derivatives(operands: Sequence[Any]) -> bool:
    """Whether an operand has a tangent, or a derivative that torch.func is to find."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if _is_in_torch_func() and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _is_in_torch_func() -> bool:
    transforms = (interpreter.key() for interpreter in get_interpreter_stack() or ())
    return any(key in (TransformType.Grad, TransformType.Jvp) for key in transforms)
