"""A state between two layers of a stage, which is computed only if something asks for it.

A model's own loop calls one layer after the other. While a stage trains as one stack, each layer but the last returns
such a state, and the last one runs the stack. Whatever is done to a state in between, by a module, a torch function or
a method, computes it first, layer by layer, so that it always is what the layers alone would have given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

OF_THE_INPUT = frozenset(("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_mps", "is_xpu", "is_quantized"))
"""Attributes that a state has from x_0, since layers keep them."""


class Computing(Protocol):
    """What a pending state needs of the pass that it belongs to."""

    stage: Any
    x: Tensor

    def compute(self, n: int) -> Tensor:
        """State n."""


class PendingState:
    """State n of a pass through a stage."""

    def __init__(self, of: Computing, n: int) -> None:
        self._pass, self._n = of, n
        self._value: Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_computed(args), **_computed(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in OF_THE_INPUT:
            return getattr(self._pass.x, name)
        # What copies and pickles look for; and what tells caches apart, which compilers ask of whatever is called.
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(value_of(self), name)

    def size(self, *dimensions: int) -> Any:
        return self._pass.x.size(*dimensions)

    def dim(self) -> int:
        return self._pass.x.dim()

    def is_floating_point(self) -> bool:
        return True

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself, where that is where it is already."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        x = self._pass.x
        is_there = device in (None, x.device) and dtype in (None, x.dtype) and not kwargs.get("copy")
        return self if is_there else value_of(self).to(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._pass.x)


def value_of(state: Any) -> Any:
    """The tensor of a pending state; anything else is its own value.

    Raises:
        RuntimeError: if the stage has run as one stack since, which kept no state between its layers.
    """
    if not isinstance(state, PendingState):
        return state
    if state._value is None:
        state._value = state._pass.compute(state._n)
    return state._value


def pass_of(args: tuple[Any, ...], stage: object, n: int) -> Any:
    """The pass that goes on with layer n, whose first argument is the state before it; None if none does."""
    state = args[0] if args else None
    if not isinstance(state, PendingState) or state._value is not None:
        return None
    return state._pass if state._pass.stage is stage and state._n == n else None


def _computed(values: Any) -> Any:
    return pytree.tree_map_only(PendingState, value_of, values)


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: PendingState, *args: Any) -> Any:
        return getattr(value_of(self), name)(*_computed(args))

    return method


# Operators are looked up on the class, past __getattr__.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        setattr(PendingState, _operator, _delegated(_operator))
_OTHERS = "neg", "abs", "getitem", "setitem", "iter", "lt", "le", "gt", "ge", "eq", "ne", "bool", "float", "int"
for _operator in (*_OTHERS, "reduce_ex"):
    setattr(PendingState, f"__{_operator}__", _delegated(f"__{_operator}__"))
PendingState.__hash__ = object.__hash__  # type: ignore[method-assign]
del _name, _operator, _OTHERS
