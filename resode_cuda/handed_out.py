"""Blocks that a stack has handed out, by iteration or by index, and that something else calls.

A model that takes a stack for a list of layers calls them one by one. It computes the same, and trains by backprop,
with all activations kept; without a word nobody would notice.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

TOLD = (
    "ResidualStack: its blocks were called from outside, one by one, and not by the stack, so that autograd keeps "
    "their activations; call stack(x), or leave the model its list of layers and use resode_cuda.convert(model)"
)


def warn_of_training(stack: nn.Module, blocks: Iterable[nn.Module]) -> RemovableHandle | None:
    """Warn, once, when a gradient arrives at one of the blocks' parameters, unless the stack has run itself by then.

    Returns:
        what ends the watch; None where no parameter gets gradients.
    """
    watched = next((parameter for block in blocks for parameter in block.parameters() if parameter.requires_grad), None)
    if watched is None or not watched.is_leaf or not torch.is_grad_enabled():
        return None
    giver = weakref.ref(stack)

    def arrived(parameter: Tensor) -> None:
        handle.remove()
        if not getattr(giver(), "_has_run", True):
            warnings.warn(TOLD, RuntimeWarning, stacklevel=2)

    handle = watched.register_post_accumulate_grad_hook(arrived)
    return handle
