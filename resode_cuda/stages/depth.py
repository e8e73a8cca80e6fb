"""The depth of a model's stages: deepened, tied and untied, as the paper's networks are before they are fine-tuned."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..initialize import deepen
from ..stack import ResidualStack
from .finding import stages_of
from .layer_step import state_in
from .stage import Stage

NUMBERS = "layer_idx", "layer_id", "layer_index"
"""Attributes by which layers of transformers know their place."""


class ScaledForward:
    """The `forward` of a layer that takes a step h < 1: x + h (layer(x) - x)."""

    def __init__(self, layer: nn.Module, h: float) -> None:
        self.layer, self.h = layer, h
        self.__signature__ = inspect.signature(partial(type(layer).forward, layer))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = type(self.layer).forward(self.layer, x, *args, **kwargs)
        moved = x + self.h * (state_in(out) - x)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved


def step_of(layer: nn.Module) -> float:
    """The h of a layer: 1, or what `deepen_stage` has made of it."""
    forward = layer.__dict__.get("forward")
    return forward.h if isinstance(forward, ScaledForward) else 1.0


def deepen_stage(model: nn.Module, path: str, steps: int) -> nn.Module:
    """Make a stage of a converted model deeper, in place; returns the model.

    Layers x + f_n(x) are read as steps of size 1 along one flow, over as long a time as there are layers. The new ones
    take smaller steps through the same time, x + h f(x), h = layers / steps, with parameters interpolated linearly
    between those of the old layers (`resode_cuda.deepen`). The model then computes nearly the same function, and can
    be fine-tuned at its new depth.

    Parameters are new objects: make the optimizer afterwards. The names in `state_dict` are numbered on. A `config`
    of the model with as many layers as the stage had is told of the new number; h is no parameter and no part of a
    `state_dict`, so a model that loads it has to be deepened in the same way first.

    Args:
        model: converted by `convert`, with all layers of the container in one stage.
        path: of the stage's container, as `conversion(model)` shows it.
        steps: layers of the new stage, at least as many as there are.

    Raises:
        ValueError: for a path without a stage, a stage that is part of its container, fewer steps, or layers whose
            parameters differ in names or shapes.
    """
    stage = _stage("deepen_stage", model, path)
    container = model.get_submodule(path)
    if len(container._modules) != len(stage.layers):
        raise ValueError(
            f"deepen_stage: a stage must be all of its container, got {len(stage.layers)} of "
            f"{len(container._modules)} layers of {path!r}; build the model with a container of its own for them"
        )
    _check_owner(model, path, stage)
    stage.remove()
    old = ResidualStack(stage.layers, step=[step_of(layer) for layer in stage.layers])
    try:
        deeper = deepen(old, steps)
    except BaseException:
        stage.install()
        raise
    layers = list(deeper)
    for number, (layer, h) in enumerate(zip(layers, deeper.steps, strict=True)):
        _number(layer, number)
        layer.__dict__.pop("forward", None)
        if h != 1:
            layer.forward = ScaledForward(layer, h)
    container._modules.clear()
    for number, layer in enumerate(layers):
        container.add_module(str(number), layer)
    _tell_config(model, path, len(stage.layers), steps)
    _renewed(stage, layers).install()
    return model


def tie_stage(model: nn.Module, path: str) -> nn.Module:
    """Give all layers of a stage the same parameters, the means of theirs, in place; returns the model.

    The parameters of the first layer are kept as objects. Buffers, such as running statistics, stay each layer's own.

    Raises:
        ValueError: for a path without a stage, or layers whose parameters differ in names or shapes.
    """
    layers = _stage("tie_stage", model, path).layers
    held = [dict(layer.named_parameters(remove_duplicate=False)) for layer in layers]
    for other in held[1:]:
        if {name: p.shape for name, p in other.items()} != {name: p.shape for name, p in held[0].items()}:
            raise ValueError(f"tie_stage: layers must have the same parameters, got others in {path!r}")
    for name, shared in held[0].items():
        with torch.no_grad():
            shared.copy_(torch.stack([parameters[name] for parameters in held]).mean(0))
        for layer in layers[1:]:
            _set(layer, name, shared)
    return model


def untie_stage(model: nn.Module, path: str) -> nn.Module:
    """Give each layer of a stage parameters of its own, in place, where layers share them; returns the model.

    They are equal to begin with. Make the optimizer afterwards.

    Raises:
        ValueError: for a path without a stage.
    """
    seen: set[int] = set()
    for layer in _stage("untie_stage", model, path).layers:
        memo: dict[int, Any] = {}  # what one layer holds twice it goes on to hold twice
        for name, parameter in list(layer.named_parameters(remove_duplicate=False)):
            if id(parameter) in seen:
                _set(layer, name, copy.deepcopy(parameter, memo))
        seen |= {id(parameter) for parameter in layer.parameters()}
    return model


def _stage(where: str, model: nn.Module, path: str) -> Stage:
    stages = {stage.path: stage for stage in stages_of(model)}
    if path not in stages:
        raise ValueError(f"{where}: path must be that of a converted stage, one of {sorted(stages)}, got {path!r}")
    return stages[path]


def _renewed(stage: Stage, layers: list[nn.Module]) -> Stage:
    """A stage of other layers, which trains as this one."""
    anchors = stage.stack.anchors
    settings = {
        "gradient": stage.stack.gradient,
        "reverse": stage.stack.reverse,
        "anchors": anchors if isinstance(anchors, int) else None,
        "max_drift": stage.stack.max_drift,
        "on_drift": stage.stack.on_drift,
    }
    renewed = Stage(stage.path, [str(n) for n in range(len(layers))], layers, **settings)
    renewed.enabled = stage.enabled
    return renewed


def _number(layer: nn.Module, number: int) -> None:
    for module in layer.modules():
        for name in NUMBERS:
            if isinstance(module.__dict__.get(name), int):
                setattr(module, name, number)


def _check_owner(model: nn.Module, path: str, stage: Stage) -> None:
    """Check that more layers of the stage are as good as these to what calls them.

    Raises:
        ValueError: where layers differ by their place, or something has replaced their `forward`.
    """
    config = getattr(model.get_submodule(path.rpartition(".")[0]), "config", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ValueError(f"deepen_stage: layers must be of one kind, got {sorted(kinds)} in turn in {path!r}")
    for name, step in zip(stage.names, stage.steps, strict=True):
        if step.replaced is not None and not isinstance(step.replaced, ScaledForward):
            raise ValueError(
                f"deepen_stage: the forward of {path}.{name} must be its class's, got one put in its place"
            )


def _tell_config(model: nn.Module, path: str, before: int, after: int) -> None:
    owner = model.get_submodule(path.rpartition(".")[0])
    config = getattr(owner, "config", None)
    if config is not None and getattr(config, "num_hidden_layers", None) == before:
        config.num_hidden_layers = after
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            config.layer_types = [kinds[0]] * after


def _set(layer: nn.Module, name: str, parameter: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(layer.get_submodule(owner), last, parameter)
