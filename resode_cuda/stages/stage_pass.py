"""One pass of a model's loop through a stage: what the layers were called with, until the last call runs them all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .pending import PendingState


class Running(Protocol):
    """What a pass needs of its stage."""

    path: str
    stack: Any

    @property
    def steps(self) -> Sequence[nn.Module]:
        """The layers, each as a function from state to state."""

    def ran_by_layers(self, reason: str) -> None:
        """Tell that the layers ran one by one."""


class Pass:
    """The calls of a stage's layers so far.

    Args:
        x: x_0.
    """

    def __init__(self, stage: Running, x: Tensor) -> None:
        self.stage, self.x = stage, x
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._states: list[Callable[[], PendingState | None]] = []
        self._has_run = False

    @property
    def depth(self) -> int:
        """Layers called so far."""
        return len(self.calls)

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The state after one more layer, called with these arguments beside the state."""
        self.calls.append((args, kwargs))
        if self.depth == len(self.stage.steps):
            return self._run()
        state = PendingState(self, self.depth)
        # Compiled code keeps no state for others.
        self._states.append((lambda: None) if torch.compiler.is_compiling() else weakref.ref(state))
        return state

    def compute(self, n: int) -> Tensor:
        """State n, and those before it that something still holds, layer by layer."""
        if self._has_run:
            raise RuntimeError(
                f"{self.stage.path}: the state after layer {n - 1} was used after the converted layers had run "
                "as one stack; turn that off for such a pass: resode_cuda.unconvert(model), or the model's "
                "gradient_checkpointing_disable()"
            )
        self.stage.ran_by_layers("something uses a state between its layers")
        x = self.x
        for number, (layer, (args, kwargs)) in enumerate(zip(self.stage.steps[:n], self.calls, strict=False)):
            x = layer(x, *args, **kwargs)
            state = self._states[number]()
            if state is not None:
                state._value = x
        return x

    def _run(self) -> Tensor:
        """x_N by the stack, and the states that the model's loop has collected, if it did."""
        kept: dict[int, PendingState] = {}
        for n, get in enumerate(self._states):
            state = get()
            if state is not None:
                kept[n + 1] = state
        # The last layer's input is held by its caller, whether the loop collects states or not.
        wanted = sorted(kept) if len(kept) > 1 else []
        self._has_run = True
        args, kwargs = self._arguments()
        if not wanted:
            out: Tensor = self.stage.stack(self.x, *args, **kwargs)
            return out
        out, states = self.stage.stack(self.x, *args, return_states=wanted, **kwargs)
        for n, value in zip(wanted, states, strict=True):
            kept[n]._value = value
        return out

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of all layers, or `BY_LAYER` where they differ."""
        first_args, first_kwargs = self.calls[0]
        if all(_are_same(call, self.calls[0]) for call in self.calls[1:]):
            return first_args, first_kwargs
        distinct: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        numbers = []
        for call in self.calls:
            number = next((n for n, other in enumerate(distinct) if _are_same(call, other)), len(distinct))
            if number == len(distinct):
                distinct.append(call)
            numbers.append(number)
        return (), {BY_LAYER: (distinct, numbers)}


BY_LAYER = "_arguments_by_layer"


def _are_same(call: tuple[tuple[Any, ...], dict[str, Any]], other: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    (args, kwargs), (other_args, other_kwargs) = call, other
    if len(args) != len(other_args) or kwargs.keys() != other_kwargs.keys():
        return False
    pairs = [*zip(args, other_args, strict=True), *((kwargs[name], other_kwargs[name]) for name in kwargs)]
    return all(_is_same(a, b) for a, b in pairs)


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is type(b) and isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b
