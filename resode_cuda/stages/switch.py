"""The trainer's own switch: where a model is told to checkpoint its activations, its stages run as stacks instead.

transformers has `gradient_checkpointing_enable()` and `_disable()`, from version 5 on by the name of
`activation_checkpointing_enable()`, timm `set_grad_checkpointing(enable)`. On a converted model they select the stacks,
and switch their own checkpointing of those layers off, which would run the layers once more.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from .finding import stages_of
from .stage import Stage

METHODS = {
    "activation_checkpointing_enable": True,
    "activation_checkpointing_disable": False,
    "gradient_checkpointing_enable": True,
    "gradient_checkpointing_disable": False,
    "set_grad_checkpointing": True,
}
"""Methods by which models are told, and whether a call without arguments means to."""
FLAGS = "gradient_checkpointing", "grad_checkpointing"
"""Attributes by which their modules know."""
OFF = "_off_while_converted"
"""Attribute of a module: which of its flags would be on without the stages."""


class Switch:
    """A model's method, in the place of its own."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.__signature__ = inspect.signature(getattr(type(model), name).__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # transformers looks whether a model has replaced its old names, and warns of them.
        mine = {name: self.model.__dict__.pop(name) for name in METHODS if name in self.model.__dict__}
        try:
            given = getattr(self.model, self.name)(*args, **kwargs)
        finally:
            self.model.__dict__.update(mine)
        wanted = METHODS[self.name]
        if self.name == "set_grad_checkpointing":
            wanted = bool([*args, *kwargs.values(), True][0])
        stages = stages_of(self.model)
        for stage in stages:
            stage.enabled = wanted
        without_checkpointing(self.model, stages)
        return given


def install(model: nn.Module) -> None:
    """Put switches in the place of the methods of all modules that hold stages."""
    stages = stages_of(model)
    for module in _holders(model):
        for name in METHODS:
            if callable(getattr(type(module), name, None)):
                module.__dict__[name] = Switch(module, name)
    without_checkpointing(model, stages)


def remove(model: nn.Module) -> None:
    for module in model.modules():
        for name in METHODS:
            if isinstance(module.__dict__.get(name), Switch):
                del module.__dict__[name]
        for flag in module.__dict__.pop(OFF, ()):
            setattr(module, flag, True)


def without_checkpointing(model: nn.Module, stages: Sequence[Stage]) -> None:
    """Switch the checkpointing of the stages' own layers off, in the layers and in what calls them."""
    layers = {layer for stage in stages for layer in stage.layers}
    for module in model.modules():
        if module in layers or any(child in layers for child in _within(module)):
            flags = tuple(flag for flag in FLAGS if getattr(module, flag, None) is True)
            for flag in flags:
                setattr(module, flag, False)
            module.__dict__[OFF] = flags


def _within(module: nn.Module) -> list[nn.Module]:
    """What a module calls itself: its children, and the entries of its containers."""
    return [inner for child in module.children() for inner in (child, *child.children())]


def _holders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if stages_of(module)]
