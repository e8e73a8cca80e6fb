"""What a run that is to be resumed keeps of a whole model, beside its `state_dict`: how all its stacks train by now."""

from __future__ import annotations

from typing import Any

from torch import nn

from .module import AdjointModule, check_keys
from .stages.finding import stages_of
from .stages.stage import Stage


def training_state(model: nn.Module) -> dict[str, Any]:
    """How the stacks of a model, and the stages that `convert` made of its layers, train by now, by their names in it.

    Of each it is what `ResidualStack.training_state` says, plain values; of a stage also whether it is switched on.

    Raises:
        ValueError: for a model without any.
    """
    stacks, stages = _found(model)
    states: dict[str, Any] = {name: stack.training_state() for name, stack in stacks.items()}
    for name, stage in stages.items():
        states[name] = {"enabled": stage.enabled, "stack": stage.stack.training_state()}
    return states


def load_training_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Have a model train as the one that the state is of, which was built, or converted, in the same way.

    Raises:
        ValueError: for the state of another model; nothing has changed then.
    """
    before = training_state(model)
    check_keys("load_training_state: the state", state, before)
    try:
        _load(model, state)
    except BaseException:
        _load(model, before)
        raise


def _load(model: nn.Module, state: dict[str, Any]) -> None:
    stacks, stages = _found(model)
    for name, stack in stacks.items():
        stack.load_training_state(state[name])
    for name, stage in stages.items():
        check_keys(f"load_training_state: the state of {name}", state[name], ("enabled", "stack"))
        stage.stack.load_training_state(state[name]["stack"])
        stage.enabled = bool(state[name]["enabled"])


def _found(model: nn.Module) -> tuple[dict[str, AdjointModule], dict[str, Stage]]:
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, AdjointModule)}
    stages = {f"{stage.path}.{stage.names[0]}".lstrip("."): stage for stage in stages_of(model)}
    if not (stacks or stages):
        raise ValueError(
            f"training_state: the model must hold a ResidualStack or a ResidualMLP, or be converted, got a "
            f"{type(model).__name__} without any; its state_dict is all there is"
        )
    return stacks, stages
