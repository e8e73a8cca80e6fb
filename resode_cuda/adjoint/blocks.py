"""Calling a block: the arguments it gets, the checks on what it returns, and the parameters it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from ..dtypes import fits
from ..schemes import BlockFunction
from .replay import Replayed, Slot, submodules


class Call(NamedTuple):
    """The arguments that every block gets beside the state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Arguments:
    """The shape of the arguments that every block gets beside the state, with a place for each tensor in them.

    Tensors are found at any depth of lists, tuples and dicts. They are kept apart so that autograd alone holds them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.count = len(self._places)
        for place in self._places:
            self._leaves[place] = None
        self._constant = None if self._places else Call(args, kwargs)

    @staticmethod
    def tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    def filled(self, tensors: Iterable[Tensor]) -> Call:
        if self._constant is not None:
            return self._constant
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return Call(*pytree.tree_unflatten(leaves, self._spec))


class Block:
    """Block n of a stack during one forward pass and its backward pass.

    Args:
        dtype: of the stack's input, in which the block computes; the state around it may be wider.
    """

    def __init__(self, module: nn.Module, index: int, dtype: torch.dtype) -> None:
        self.module, self.index, self.dtype = module, index, dtype

    @cached_property
    def modules(self) -> list[nn.Module]:
        return submodules((self.module,))

    def __call__(self, x: Tensor, call: Call, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """f_n(x), in the dtype of x or a narrower one; with other parameters, by name, than the module holds."""
        args, kwargs = call
        given = x.to(self.dtype)
        version = None if torch.compiler.is_compiling() or given.is_inference() else given._version
        if parameters is None:
            out = self.module(given, *args, **kwargs)
        else:
            out = torch.func.functional_call(self.module, parameters, (given, *args), kwargs)
        self._check(given, version, out)
        return out if fits(out.dtype, x.dtype) else out.to(x.dtype)

    def function(self, call: Call) -> BlockFunction:
        return lambda x: self(x, call)

    def _check(self, given: Tensor, version: int | None, out: Any) -> None:
        where = f"ResidualStack: block {self.index}"
        if not isinstance(out, Tensor):
            raise TypeError(f"{where} must return one tensor, got {type(out).__name__}; wrap it to return that tensor")
        if out.shape != given.shape:
            raise ValueError(
                f"{where} must keep the shape of its input, got {list(given.shape)} -> {list(out.shape)}; "
                "move blocks that change the shape outside the stack"
            )
        if out.device != given.device:
            raise ValueError(
                f"{where} must keep the device of its input, got {given.device} -> {out.device}; "
                "move the stack to one device"
            )
        if out.dtype != given.dtype and out.dtype not in _autocast_dtypes(given.device.type):
            raise TypeError(
                f"{where} must keep the dtype of its input, got {given.dtype} -> {out.dtype}; "
                "cast its output, or run the whole stack under torch.autocast"
            )
        if version is not None and given._version != version:
            raise RuntimeError(
                f"{where} must not modify its input in place, which is the state itself; "
                "use inplace=False in its first operation"
            )


def _autocast_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """Dtypes other than its input's that a block may return: what autocast casts to, up or down."""
    if not torch.is_autocast_enabled(device_type):
        return ()
    return torch.float32, torch.get_autocast_dtype(device_type)


class BlockCall:
    """A block's evaluation in one step of one forward pass, run again in the backward pass as it first ran."""

    def __init__(self, block: Block, device: torch.device) -> None:
        self.block = block
        self.replayed = Replayed(block.modules, device)

    def function(self, call: Call) -> BlockFunction:
        return lambda x: self.replayed(lambda: self.block(x, call))


class HeldParameter(NamedTuple):
    """A parameter, and every place in the blocks that holds it."""

    tensor: Tensor
    slots: list[Slot]


def held_parameters(blocks: Sequence[Block]) -> list[HeldParameter]:
    """The blocks' parameters, each once.

    Raises:
        RuntimeError: for a parameter of a lazy module that has not run yet.
    """
    found: dict[Tensor, HeldParameter] = {}
    for block in blocks:
        for module in block.modules:
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if isinstance(parameter, UninitializedParameter):
                    where = f"ResidualStack: the parameters of block {block.index}"
                    raise RuntimeError(
                        f"{where} must be initialised, got a lazy {name!r}; run the stack once under torch.no_grad()"
                    )
                found.setdefault(parameter, HeldParameter(parameter, [])).slots.append(Slot(module._parameters, name))
    return list(found.values())


def modified_in_place() -> RuntimeError:
    return RuntimeError(
        "ResidualStack: between forward and backward neither the stack's output nor a parameter, an argument or a kept "
        "state may be modified in place, but one was; use y = y + z instead of y += z, and step the optimizer after "
        "backward"
    )
