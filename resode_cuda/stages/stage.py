"""Successive layers of a model that train as one stack, while the model's own loop calls them one after the other.

Nothing of the model changes but the layers' attribute `forward`. In a training pass each call of a layer is a step of
the adjoint, an autograd node of its own (`adjoint/node.py`), and where a layer gets the very state that the one before
it gave, their nodes belong together: the second one tells the first in the backward pass what its state was. The loop
has ordinary tensors in between, and may do with them what it likes: a layer that gets another state begins anew there.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain as joined
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..adjoint.block_arguments import Arguments, Call
from ..adjoint.blocks import Block, Returned
from ..adjoint.chain import Chain
from ..adjoint.inventory import submodules
from ..adjoint.node import evaluation_of, take
from ..adjoint.replay import protect
from ..adjoint.restoration import restoring, undo_leftovers
from ..adjoint.sharding import passed_on
from ..devices import is_capturing
from ..layouts import is_distributed
from ..method import Method
from ..plan import told
from ..stack import ResidualStack
from .caches import holds_keys, leave_empty, refuse_left_empty, without_caches
from .hooks import are_outputs_captured
from .layer_step import LayerStep, NoStepError, OtherDtypeError

STAGE = "_stage"
"""Attribute of a converted layer: its stage."""
ASKS_FOR_MORE = ("output_attentions", "output_router_logits")
"""Keywords by which a layer is asked for more than its state."""

Watch = Callable[[int, Tensor, Call, Tensor], None]


class LayerOutput(NamedTuple):
    """A state that a layer gave to the model's loop."""

    chain: Chain
    shadows: Sequence[Tensor | None]
    number: int
    """The layer's."""
    version: int


class Stage:
    """Layers of a container that train as one stack.

    Args:
        path: the container's name in the model.
        names: of the layers in it.
        layers: successive ones that keep the shape of their state.
        settings: of the stack, beside its form.

    Attributes:
        stack: the layers as the blocks of a `ResidualStack`, in the block form. It is no part of the model.
        enabled: whether training passes run layers as steps.
        bytes_a_sample: what autograd kept of the layers, and what is kept now; None where it was not measured.
        watch: is told of each step: its number, the state before, the arguments, the state after.
    """

    def __init__(self, path: str, names: Sequence[str], layers: Sequence[nn.Module], **settings: Any) -> None:
        self.path, self.names, self.layers = path, list(names), list(layers)
        self.steps = [LayerStep(layer, number) for number, layer in enumerate(layers)]
        self.stack = ResidualStack(self.steps, form="block", **settings)
        self.enabled = True
        self.bytes_a_sample: tuple[int, int] | None = None
        self.watch: Watch | None = None
        self._has_warned = False
        # Such as Mamba's first one, whose states are float32 between layers of 16 bits.
        self._wider: dict[Any, torch.dtype] = {}  # what x_n is cast to first
        self._refused: dict[Any, str] = {}  # layers that are no steps, for a dtype of x_n and autocast
        self._ran: dict[int, str | None] = {}  # by layer of the last training pass, why it ran by itself
        self._beginnings = 0
        self._given = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None, "watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._given = WeakIdKeyDictionary()

    @property
    def plan(self) -> str:
        """How gradients are come by, in words."""
        stack = self.stack
        if not self.enabled:
            return "switched off"
        return told(stack.gradient, stack.reverse if stack.gradient == "adjoint" else None, stack.anchors)

    @property
    def last_pass(self) -> str:
        """How the last training pass ran the layers."""
        if not self._ran:
            return "none yet"
        reasons = {number: reason for number, reason in self._ran.items() if reason is not None}
        taken = len(self._ran) - len(reasons)
        if not taken:
            return f"layer by layer: {next(iter(reasons.values()))}"
        found = "as a stack" if taken == len(self.layers) else f"{taken} of {len(self.layers)} layers as a stack"
        if self._beginnings > 1:
            found += f", in {self._beginnings} pieces"
        if reasons:
            number, reason = next(iter(reasons.items()))
            found += f"; layer {self.names[number]} by itself: {reason}"
        return found

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
        for step in self.steps:
            del step.layer.__dict__[STAGE]
            if step.replaced is None:
                del step.layer.forward
            else:
                step.layer.forward = step.replaced

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer returns: as a step of the stack in a training pass, else by itself."""
        own = self.steps[number].own
        if number == 0:
            refuse_left_empty(args, kwargs)
        if not torch.is_grad_enabled() or torch.compiler.is_exporting() or not self._is_training():
            return own(*args, **kwargs)
        if torch._C._are_functorch_transforms_active() or self.stack.gradient == "backprop":
            return own(*args, **kwargs)
        return self._trained(number, args, kwargs)

    def _is_training(self) -> bool:
        return any(layer.training for layer in self.layers)

    @torch.compiler.disable
    def _trained(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._ran and number <= max(self._ran):
            self._ran, self._beginnings = {}, 0
        asked = self._asked(args, kwargs) if self.enabled else "switched off"
        reason = asked or self._reason(number, args)
        if reason is None:
            call = without_caches(args[1:], kwargs)
            leave_empty(args, kwargs)
            key = self._key(number, args[0])
            x = args[0].to(self._wider.get(key, args[0].dtype))
            try:
                out = self._stepped(number, x, call)
            except OtherDtypeError as error:
                if error.wider is not None and self._is_same_in(error.wider, number, x, call):
                    self._wider[key] = error.wider
                    return self._trained(number, args, kwargs)
                reason = self._refused[key] = str(error)
            except NoStepError as error:
                reason = self._refused[key] = str(error)
            else:
                self._ran[number] = None
                return self.steps[number].returned(out)
        self._ran[number] = reason
        if asked is None:
            self._warn(reason)
        return self.steps[number].own(*args, **kwargs)

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """By what the caller has asked for the layer itself."""
        asked = [name for name in ASKS_FOR_MORE if kwargs.get(name)]
        if asked:
            return f"{asked[0]}=True asks for more than the state"
        if are_outputs_captured():
            return "the model was asked for what modules inside layers compute"
        if holds_keys(args, kwargs):
            return "it was given a key-value cache that holds keys already"
        return None

    def _reason(self, number: int, args: tuple[Any, ...]) -> str | None:
        """Why the layer has to run by itself, which the caller may not know."""
        if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
            return "a layer was not given a floating tensor first"
        if is_distributed(args[0]):
            return "a layer was given a DTensor, not this rank's own tensor (use_local_output=True)"
        return self._refused.get(self._key(number, args[0]))

    def _key(self, number: int, x: Tensor) -> Any:
        return number, x.dtype, torch.is_autocast_enabled(x.device.type)

    def _is_same_in(self, dtype: torch.dtype, number: int, x: Tensor, call: Call) -> bool:
        """Whether the layer gives the same for its state in a wider dtype, which it returns, to the last bit."""

        def evaluated(x: Tensor) -> Tensor:
            protect(submodules((self.layers[number],)), x.device)
            out: Tensor = self.steps[number](x, *call.args, **call.kwargs)
            return out

        with torch.no_grad():
            return torch.equal(*(restoring(partial(evaluated, given)) for given in (x, x.to(dtype))))

    def _stepped(self, number: int, x: Tensor, call: Call) -> Tensor:
        """The state after a layer, recorded so that the backward pass rebuilds the one before it."""
        layer, arguments = self.steps[number], Arguments(*call)
        layer.look.is_due = True
        if not any(tensor.requires_grad for tensor in joined((x,), arguments.tensors, layer.parameters())):
            untrained: Tensor = layer(x, *call.args, **call.kwargs)
            return untrained
        arguments.refuse_iterators()
        given = self._given_as(x)
        begins = given is None or given.number != number - 1 or given.version != x._version
        if given is None or begins:
            given = self._begun(number, x, call)
        chain = given.chain
        chain.renew_generators()
        block = Block(layer, number, x.dtype, self.stack._inventories, Returned(is_state=True))
        evaluation = evaluation_of(chain, [block], arguments)
        step = chain.steps[number]
        try:
            out, _, shadows = take(step, evaluation, x, given.shadows)
        except NoStepError:
            evaluation.calls[0].rewind()
            raise
        self._beginnings += begins
        arguments.release()
        chain.generators.release()
        if not step.is_last:
            self._given[out] = LayerOutput(chain, shadows, number, out._version)
        if self.watch is not None:
            self.watch(number, x, call, out)
        return out

    def _given_as(self, x: Tensor) -> LayerOutput | None:
        """What a layer has given as x, or as what FSDP has passed on as x to the next layer, whose parameters it
        shards."""
        source = passed_on(x)
        if source is None:
            return self._given.pop(x, None)
        node, place = source
        for tensor in self._given:
            if tensor.grad_fn is node and tensor.output_nr == place and tensor._version == x._version:
                return self._given.pop(tensor)
        return None

    def _begun(self, number: int, x: Tensor, call: Call) -> LayerOutput:
        """The beginning of a chain."""
        undo_leftovers()
        # A checkpoint around the layers repeats them within a backward pass.
        if torch._C._current_graph_task_id() == -1 and not is_capturing():
            self.stack._apply_pending(x, *call)
        chain = Chain(self._method(), x, self.stack._monitor, is_open=True)
        return LayerOutput(chain, chain.first_shadows, number - 1, x._version)

    def _method(self) -> Method:
        """The stack's; checkpointing is to keep every state."""
        method = self.stack._method
        return method if self.stack.gradient == "adjoint" else replace(method, anchors=tuple(range(len(self.layers))))

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"converted layers of {self.path or 'the model'} ran by themselves in a training pass, and autograd "
                f"kept all their activations: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )


class LayerForward:
    """The `forward` of a layer of a stage."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage, self.number = stage, number
        self.__signature__ = inspect.signature(stage.steps[number].own)
        self._state = next(iter(self.__signature__.parameters), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self._state in kwargs:
            args = (kwargs.pop(self._state),)
        return self.stage.call(self.number, args, kwargs)
