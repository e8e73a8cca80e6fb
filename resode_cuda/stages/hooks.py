"""Forward hooks on layers, which see single layers' states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

CAPTURING = "transformers.utils.output_capturing"
"""Its hooks stay on the layers once a pass has been asked for hidden states or attention maps."""


def has_hooks(layer: nn.Module) -> bool:
    """Whether a hook on the layer wants its state in this pass."""
    return bool(layer._forward_pre_hooks) or not all(map(_is_idle, layer._forward_hooks.values()))


def _is_idle(hook: Callable[..., Any]) -> bool:
    """Whether it is one by which transformers collects outputs, in a pass that collects none."""
    if getattr(hook, "__module__", None) != CAPTURING:
        return False
    collector = getattr(hook, "__globals__", {}).get("_active_collector")
    return collector is not None and not collector.get()
