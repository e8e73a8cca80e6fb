"""A layer as a block of a stack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layer_calls import BY_LAYER


class NoStepError(BaseException):
    """A layer does not take its state to the next one; the message says what it does.

    No `Exception`, which would be taken for a failure of the layer.
    """


class OtherDtypeError(NoStepError):
    """A layer changes the dtype of its state."""

    def __init__(self, before: torch.dtype, after: torch.dtype) -> None:
        super().__init__(f"a layer changes the dtype of its state, {before} to {after}")
        self.wider = after if torch.promote_types(before, after) == after else None


@dataclass
class Look:
    """What is seen of a layer's evaluation. An object of its own, since a module's attributes are replayed."""

    is_due: bool = False
    """Whether the next evaluation checks that the layer is a step."""
    rest: tuple[None, ...] | None = None
    """What it returned after the state; None for the state alone."""


class LayerStep(nn.Module):
    """A layer's own forward pass, from state to state."""

    def __init__(self, layer: nn.Module, number: int) -> None:
        super().__init__()
        self.layer, self.number = layer, number
        # Of a layer whose forward something else has replaced before.
        self.replaced = layer.__dict__.get("forward")
        self.look = Look()

    @property
    def runs_inside(self) -> nn.Module:
        """The module whose call the step is part of, so that its hooks run around it."""
        return self.layer

    @property
    def own(self) -> Callable[..., Any]:
        """The layer's own forward pass."""
        return partial(type(self.layer).forward, self.layer) if self.replaced is None else self.replaced

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if BY_LAYER in kwargs:
            distinct, numbers = kwargs[BY_LAYER]
            args, kwargs = distinct[numbers[self.number]]
        out = self.own(x, *args, **kwargs)
        if self.look.is_due:
            self.look.is_due = False
            _check(x, out)
            self.look.rest = out[1:] if isinstance(out, tuple) else None
        return state_in(out)

    def returned(self, state: Tensor) -> Any:
        """A state in the form in which the layer has returned it."""
        return state if self.look.rest is None else (state, *self.look.rest)


def state_in(returned: Any) -> Any:
    """The state that a layer returns, alone or in a tuple with nothing but None after it; anything else as it is."""
    is_alone = isinstance(returned, tuple) and len(returned) > 0 and all(entry is None for entry in returned[1:])
    return returned[0] if is_alone else returned


def _check(x: Tensor, out: Any) -> None:
    state = state_in(out)
    if not isinstance(state, Tensor):
        entries = out if isinstance(out, tuple) else (out,)
        kinds = ", ".join(type(entry).__name__ for entry in entries)
        shown = f"a tuple of {kinds}" if isinstance(out, tuple) else f"a {kinds}"
        raise NoStepError(f"layers return {shown}, not their state alone")
    if state.shape != x.shape:
        raise NoStepError(f"a layer changes the shape of its state, {list(x.shape)} to {list(state.shape)}")
    if state.device != x.device:
        raise NoStepError(f"a layer changes the device of its state, {x.device} to {state.device}")
    if state.dtype != x.dtype:
        raise OtherDtypeError(x.dtype, state.dtype)
