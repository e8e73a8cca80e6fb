"""Successive layers of a model that train as one stack, while the model keeps calling them one after the other.

Nothing of the model changes but the layers' attribute `forward`: containers, names, parameters and hooks stay. In a
training pass each layer's `forward` notes what it was called with, and the last one runs the stack (`passes.py`). In
every other pass, and wherever single layers are needed, it is the layer's own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adjoint.inventory import submodules
from ..adjoint.replay import protect
from ..adjoint.restoration import restoring
from ..plan import told
from ..stack import ResidualStack
from .caches import holds_keys, leave_empty, refuse_left_empty, without_caches
from .hooks import has_hooks
from .pending import pass_of, value_of
from .stage_pass import BY_LAYER, Pass

STAGE = "_stage"
"""Attribute of a converted layer: its stage."""
ASKS_FOR_MORE = ("output_attentions", "output_router_logits", "output_hidden_states")
"""Keywords by which a layer is asked for more than its state."""


class LayerStep(nn.Module):
    """A layer as a block of the stack: its own forward pass, from state to state."""

    def __init__(self, layer: nn.Module, number: int) -> None:
        super().__init__()
        self.layer, self.number = layer, number
        # Of a layer whose forward something else has replaced before.
        self.replaced = layer.__dict__.get("forward")

    @property
    def own(self) -> Callable[..., Any]:
        """The layer's own forward pass."""
        return partial(type(self.layer).forward, self.layer) if self.replaced is None else self.replaced

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if BY_LAYER in kwargs:
            distinct, numbers = kwargs[BY_LAYER]
            args, kwargs = distinct[numbers[self.number]]
        return state_in(self.own(x, *args, **kwargs))


def state_in(returned: Any) -> Any:
    """The state that a layer returns, alone or in a tuple with nothing but None after it; anything else as it is."""
    return returned[0] if _is_state_alone(returned) else returned


def _is_state_alone(returned: Any) -> bool:
    return isinstance(returned, tuple) and len(returned) > 0 and all(entry is None for entry in returned[1:])


class Stage:
    """Layers of a container that train as one stack.

    Args:
        path: the container's name in the model.
        names: of the layers in it.
        layers: successive ones that keep the shape of their state.
        settings: of the stack, beside its form.

    Attributes:
        stack: the layers as the blocks of a `ResidualStack`, in the block form. It is no part of the model.
        enabled: whether training passes run it.
        last_pass: how the last training pass ran the layers.
        bytes_a_sample: what autograd kept of the layers, and what is kept now; None where it was not measured.
        states_wanted: whether the model was asked for the states between its layers.
        handle: of the hook that finds that out.
    """

    def __init__(self, path: str, names: Sequence[str], layers: Sequence[nn.Module], **settings: Any) -> None:
        self.path, self.names, self.layers = path, list(names), list(layers)
        self.steps = [LayerStep(layer, number) for number, layer in enumerate(layers)]
        self.stack = ResidualStack(self.steps, form="block", **settings)
        self.enabled = True
        self.last_pass = "none yet"
        self.bytes_a_sample: tuple[int, int] | None = None
        self.states_wanted = False
        self.handle: RemovableHandle | None = None
        self._has_warned = False
        self._looked_at: tuple[torch.dtype, bool] | None = None  # x_0's dtype and autocast, for which these hold
        self._seen: str | None = None  # why the layers can't be a stack
        self._rest: tuple[None, ...] | None = None  # of the tuples that layers return, after the state
        self._state_dtype: torch.dtype | None = None  # of the states, where the first layer widens x_0

    @property
    def plan(self) -> str:
        """How gradients are come by, in words."""
        stack = self.stack
        if not self.enabled:
            return "switched off"
        return told(stack.gradient, stack.reverse if stack.gradient == "adjoint" else None, stack.anchors)

    def install(self) -> None:
        """Put the stage's `forward` in the place of each layer's."""
        for number, layer in enumerate(self.layers):
            layer.forward = LayerForward(self, number)
            layer.__dict__[STAGE] = self

    def remove(self) -> None:
        """Give the layers their own `forward` back.

        Raises:
            RuntimeError: where something has wrapped a layer's `forward` since.
        """
        for name, layer in zip(self.names, self.layers, strict=True):
            found = layer.__dict__.get("forward")
            if not isinstance(found, LayerForward):
                raise RuntimeError(
                    f"unconvert: the forward of {self.path}.{name} must be as convert left it, but something has "
                    f"replaced it by a {type(found).__name__}; take that off first"
                )
        if self.handle is not None:
            self.handle.remove()
        for step in self.steps:
            del step.layer.__dict__[STAGE]
            if step.replaced is None:
                del step.layer.forward
            else:
                step.layer.forward = step.replaced

    def ran_by_layers(self, reason: str) -> None:
        """A training pass ran the layers one by one, so that autograd kept their activations; warns of it once."""
        self.last_pass = f"layer by layer: {reason}"
        if not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = True
            warnings.warn(
                f"converted layers of {self.path or 'the model'} ran one by one in a training pass, and autograd kept "
                f"all their activations: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass | None:
        """A pass, for a call of the first layer; None where its layers have to run one by one."""
        wants_training = torch.is_grad_enabled() and self.layers[0].training
        if not wants_training or torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
            return None
        asked = self._asked(args, kwargs) if self.enabled else "switched off"
        if asked is not None:
            self.last_pass = f"layer by layer: {asked}"
            return None
        reason = self._reason(args, kwargs)
        if reason is not None:
            self.ran_by_layers(reason)
            return None
        self.last_pass = "as a stack"
        leave_empty(args, kwargs)
        return Pass(self, args[0] if self._state_dtype is None else args[0].to(self._state_dtype))

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """By what the caller has asked for single layers."""
        if self.states_wanted:
            return "output_hidden_states=True asks for the states between its layers"
        asked = [name for name in ASKS_FOR_MORE if kwargs.get(name)]
        if asked:
            return f"{asked[0]}=True asks single layers for more than their state"
        if holds_keys(args, kwargs):
            return "it was given a key-value cache that holds keys already"
        return None

    def _reason(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the layers must run one by one, which the caller may not know."""
        if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
            return "its first layer was not given a floating tensor first"
        if any(map(has_hooks, self.layers)):
            return "a layer has forward hooks, which see single layers' states"
        x = args[0]
        now = x.dtype, torch.is_autocast_enabled(x.device.type)
        if now != self._looked_at:
            self._seen, self._looked_at = self._look(x, *without_caches(args[1:], kwargs)), now
        return self._seen

    @torch.compiler.disable
    def _look(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Run the first layer once, without a trace, to see what it returns."""
        self._state_dtype = None
        out = self._first_layer(x, args, kwargs)
        state = state_in(out)
        if not isinstance(state, Tensor):
            return f"layers return {described(out)}, not their state alone"
        if state.shape != x.shape:
            shapes = f"{list(x.shape)} to {list(state.shape)}"
            return f"layer {self.names[0]} changes the shape of its state, {shapes}"
        if state.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            # Such as Mamba's, whose states are float32 between layers of 16 bits.
            is_wider = torch.promote_types(state.dtype, x.dtype) == state.dtype
            if not (is_wider and torch.equal(state_in(self._first_layer(x.to(state.dtype), args, kwargs)), state)):
                return f"layer {self.names[0]} changes the dtype of its state, {x.dtype} to {state.dtype}"
            self._state_dtype = state.dtype
        self._rest = out[1:] if isinstance(out, tuple) else None
        return None

    def _first_layer(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def evaluated() -> Any:
            protect(submodules((self.layers[0],)), x.device)
            return self.steps[0].own(x, *args, **kwargs)

        with torch.no_grad():
            return restoring(evaluated)

    def returned(self, state: Any) -> Any:
        """A state in the form in which layers return it."""
        return state if self._rest is None else (state, *self._rest)


class LayerForward:
    """The `forward` of a layer of a stage."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage, self.number = stage, number
        self.__signature__ = inspect.signature(stage.steps[number].own)
        self._state = next(iter(self.__signature__.parameters), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self._state in kwargs:
            args = (kwargs.pop(self._state),)
        if self.number == 0:
            refuse_left_empty(args, kwargs)
        begun = self.stage.begin(args, kwargs) if self.number == 0 else pass_of(args, self.stage, self.number)
        if begun is None:
            return self.stage.steps[self.number].own(*map(value_of, args), **kwargs)
        return self.stage.returned(begun.called(*without_caches(args[1:], kwargs)))


def described(returned: Any) -> str:
    if not isinstance(returned, tuple):
        return f"a {type(returned).__name__}"
    return f"a tuple of {', '.join(type(entry).__name__ for entry in returned)}"
