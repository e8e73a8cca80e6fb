"""Who wants to see the states of single layers: forward hooks on them, and loops that were asked for hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

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


class Watched(Protocol):
    """What the hook needs of a stage."""

    path: str
    states_wanted: bool


class StatesWanted:
    """A pre-hook of the module whose loop calls a stage's layers, in models of transformers: whether it was asked for
    the states, which its loop then collects."""

    def __init__(self, stage: Watched) -> None:
        self.stage = stage

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_hidden_states")
        self.stage.states_wanted = bool(
            getattr(module.config, "output_hidden_states", False) if asked is None else asked
        )


def watch_for_states(model: nn.Module, stage: Watched) -> RemovableHandle | None:
    """Hook the module that holds the stage's container, where it has a configuration."""
    owner = model.get_submodule(stage.path.rpartition(".")[0])
    if not hasattr(owner, "config"):
        return None
    return owner.register_forward_pre_hook(StatesWanted(stage), with_kwargs=True)
