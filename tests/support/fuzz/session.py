"""One network's training step: what came out of it, and in which state it left the program."""

from __future__ import annotations

import random
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resode_cuda import ResidualStack
from tests.support.fuzz.backwards import WAYS
from tests.support.fuzz.contexts import CONTEXTS
from tests.support.fuzz.events import EVENTS
from tests.support.fuzz.networks import Network, PlainLoop
from tests.support.fuzz.recipe import Recipe


@dataclass
class Outcome:
    """What a training step left."""

    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    error: Exception | None = None
    failed_in: str = ""
    """"forward", "event" or "backward"."""
    progress: int = 0
    """Forward passes and events that were begun."""
    messages: list[str] = field(default_factory=list)
    """Texts of the warnings."""
    state: dict[str, Any] = field(default_factory=dict)
    """The program's state afterwards."""
    log: list[object] = field(default_factory=list)


class Session(Network):
    """A network and one training step of it, in which an event happens between the forward and the backward pass."""

    def __init__(self, recipe: Recipe, is_plain: bool) -> None:
        super().__init__(recipe, is_plain)
        self.outputs: list[Tensor] = []
        self._outputs_before: list[Tensor] = []
        self.phase, self.progress = "forward", 0
        self.stack = ExitStack()

    def forward(self, n: int) -> Tensor:
        self.phase = "forward"
        self.progress += 1
        run = CONTEXTS[self.recipe.context]
        out = run(self.model, self.inputs[n], self.given.args, self.given.kwargs)
        self.outputs.append(out)
        self._outputs_before.append(out.detach().clone())
        self.phase = "backward"
        return out

    def event(self) -> None:
        self.phase = "event"
        self.progress += 1
        EVENTS[self.recipe.event](self)
        self.phase = "backward"

    def argument_tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.given.args, self.given.kwargs)) if isinstance(leaf, Tensor)]

    def run(self) -> Outcome:
        outcome = Outcome()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if self.recipe.input_dtype == torch.float32 else torch.float64)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(self.recipe.seed)
        try:
            with self.stack, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outcome.gradients = dict(WAYS[self.recipe.way](self))
        except Exception as error:
            outcome.error, outcome.failed_in = error, self.phase
        outcome.messages = [str(warning.message) for warning in caught]
        outcome.progress = self.progress
        outcome.outputs, outcome.log = self._outputs_before, self.log
        outcome.state = self._state()
        torch.set_default_dtype(before)
        return outcome

    def _state(self) -> dict[str, Any]:
        """All that a backward pass must leave as it is."""
        state: dict[str, Any] = {"torch's generator": torch.get_rng_state(), "random": random.getstate()}
        state["numpy"] = np.random.get_state()[1].tolist()
        state["autocast"] = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        state["grad mode"], state["default dtype"] = torch.is_grad_enabled(), torch.get_default_dtype()
        for name, module in self.model.named_modules(remove_duplicate=False):
            if not isinstance(module, (PlainLoop, ResidualStack)):
                state |= {f"{name}.{key}": value for key, value in _state_of(module).items()}
        for name, parameter in self.model.named_parameters():
            state[f"parameter {name}"] = parameter.detach().clone()
            state[f"flags {name}"] = parameter.requires_grad, len(parameter._backward_hooks or ())
        for n, tensor in enumerate(self.argument_tensors()):
            state[f"argument {n}"] = tensor.detach().clone()
        state["containers"] = [len(v) for v in self.given.kwargs.values() if isinstance(v, (list, dict))]
        return state


def _state_of(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {"training": module.training}
    for name, buffer in module.named_buffers(recurse=False):
        state[f"buffer {name}"] = buffer.detach().clone()
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, (int, float, list, Tensor)):
            state[f"attribute {name}"] = value.clone() if isinstance(value, Tensor) else repr(value)
    state["hooks"] = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
    return state


def ran(recipe: Recipe, is_plain: bool) -> Outcome:
    return Session(recipe, is_plain).run()
