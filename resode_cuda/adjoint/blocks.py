"""Calling a block: what it gets, the checks on what it returns, and the parameters it holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..dtypes import fits
from ..schemes import BlockFunction
from .block_arguments import Arguments, Call, Given, Versions, left_in
from .generators import Generators
from .replay import Replayed, submodules
from .restoration import Slot, restoring
from .surroundings import has_fast_path, turn_fast_path_off

Auxiliaries = list[Tensor | None]
"""What each evaluation of a block that may return a second tensor gave as one, in their order."""


class Block:
    """Block n of a stack during one forward pass and its backward pass.

    Args:
        dtype: of the stack's input, in which the block computes; the state around it may be wider.
        has_auxiliary: whether the block may return a second tensor.
    """

    def __init__(self, module: nn.Module, index: int, dtype: torch.dtype, has_auxiliary: bool = False) -> None:
        self.module, self.index, self.dtype, self.has_auxiliary = module, index, dtype, has_auxiliary

    @property
    def where(self) -> str:
        return f"ResidualStack: block {self.index}"

    @cached_property
    def modules(self) -> list[nn.Module]:
        return submodules((self.module,))

    @cached_property
    def has_fast_path(self) -> bool:
        return has_fast_path(self.modules)

    def __call__(
        self, x: Tensor, call: Call, auxiliaries: Auxiliaries, parameters: dict[str, Tensor] | None = None
    ) -> Tensor:
        """f_n(x), in the dtype of x or a narrower one; with other parameters, by name, than the module holds.

        What the block returns beside it is appended to the auxiliaries.
        """
        if not torch.compiler.is_compiling() and self.has_fast_path:
            return restoring(lambda: self._call_without_fast_path(x, call, auxiliaries))
        return self._call(x, call, auxiliaries, parameters)

    def _call_without_fast_path(self, x: Tensor, call: Call, auxiliaries: Auxiliaries) -> Tensor:
        turn_fast_path_off()
        return self._call(x, call, auxiliaries, None)

    def _call(self, x: Tensor, call: Call, auxiliaries: Auxiliaries, parameters: dict[str, Tensor] | None) -> Tensor:
        args, kwargs = call
        given = x.to(self.dtype)
        version = None if torch.compiler.is_compiling() or given.is_inference() else given._version
        if parameters is None:
            out = self.module(given, *args, **kwargs)
        else:
            out = torch.func.functional_call(self.module, parameters, (given, *args), kwargs)
        if self.has_auxiliary:
            out = self._without_auxiliary(out, auxiliaries)
        self._check(given, version, out)
        return out if fits(out.dtype, x.dtype) else out.to(x.dtype)

    def function(self, call: Call, auxiliaries: Auxiliaries) -> BlockFunction:
        return lambda x: self(x, call, auxiliaries)

    def _without_auxiliary(self, out: Any, auxiliaries: Auxiliaries) -> Any:
        if not isinstance(out, tuple):
            auxiliaries.append(None)
            return out
        if len(out) == 2 and out[1] is None:
            auxiliaries.append(None)
            return out[0]
        if len(out) != 2 or not (isinstance(out[1], Tensor) and out[1].is_floating_point()):
            shown = tuple(type(entry).__name__ for entry in out)
            raise TypeError(
                f"{self.where} must return (increment, auxiliary), floating tensors or None for the second, got {shown}"
            )
        auxiliaries.append(out[1])
        return out[0]

    def _check(self, given: Tensor, version: int | None, out: Any) -> None:
        where = self.where
        if not isinstance(out, Tensor):
            hint = "" if self.has_auxiliary else ", or let the stack add up auxiliaries with auxiliary=sum"
            raise TypeError(
                f"{where} must return one tensor, got {type(out).__name__}; wrap it to return that tensor{hint}"
            )
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

    def __init__(self, block: Block, device: torch.device, generators: Generators) -> None:
        self.block = block
        self.replayed = Replayed(block.modules, device, generators)
        self.given: Given | None = None
        self.left_behind: list[str] = []
        """Names of the places where the last re-evaluation left tensors that have gradients; it took them off again."""

    def first(self, arguments: Arguments, auxiliaries: Auxiliaries) -> BlockFunction:
        """The block in the forward pass."""
        return lambda x: self._record(x, arguments, auxiliaries)

    def again(self, tensors: Sequence[Tensor], auxiliaries: Auxiliaries) -> BlockFunction:
        """The block in the backward pass, with these tensors for those among its arguments."""
        assert self.given is not None, "first comes first"
        given = self.given

        def evaluated(x: Tensor) -> Tensor:
            call = given.call(tensors)
            out = self.replayed.again(lambda: self.block(x, call, auxiliaries))
            self.left_behind = list(self.replayed.left_behind)
            if given.has_containers and left_in(call):
                self.left_behind.append("a container among the arguments")
            return out

        return evaluated

    def _record(self, x: Tensor, arguments: Arguments, auxiliaries: Auxiliaries) -> Tensor:
        assert arguments.call is not None
        self.given, call = arguments.given(), arguments.call
        watched = Versions((*arguments.tensors, *self.given.tensors, *_parameters(self.block.modules)))
        try:
            out = self.replayed.record(lambda: self.block(x, call, auxiliaries))
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                f"{self.block.where} must enable gradients where it differentiates, since the forward pass of "
                'gradient="adjoint" runs without them; put that part of it under torch.enable_grad()'
            ) from error
        written = watched.written()
        if written is not None:
            self._refuse(written, arguments)
        return out

    def _refuse(self, written: Tensor, arguments: Arguments) -> None:
        """Raise for a tensor that the block has written, whose value before is lost to its re-evaluation."""
        for name, parameter in self.block.module.named_parameters():
            if parameter is written:
                raise RuntimeError(
                    f"{self.block.where} must not write its parameters in its forward pass, which cannot be run again "
                    f'then, but it wrote {name!r}; make it a buffer, or use gradient="backprop"'
                )
        raise RuntimeError(
            f"{self.block.where} must not write a tensor among its arguments, which cannot be run again then, but it "
            f'wrote {arguments.name_of(written)}; let it work on a copy, make it a buffer, or use gradient="backprop"'
        )


def _parameters(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [parameter for module in modules for parameter in module._parameters.values() if parameter is not None]


class HeldParameter(NamedTuple):
    """A parameter, and every place in the blocks that holds it."""

    tensor: Tensor
    slots: list[Slot]
    dtype: torch.dtype
    device: torch.device

    def check(self) -> None:
        """Raise if the parameter was converted since then, which torch does to the tensor itself."""
        if (self.tensor.dtype, self.tensor.device) != (self.dtype, self.device):
            raise RuntimeError(
                "ResidualStack: between forward and backward parameters must not be converted, but one of shape "
                f"{list(self.tensor.shape)} was, from {self.dtype} on {self.device} to {self.tensor.dtype} on "
                f"{self.tensor.device}; convert the stack after backward"
            )


def held_parameters(blocks: Sequence[Block]) -> list[HeldParameter]:
    """The blocks' parameters, each once.

    Raises:
        RuntimeError: for a parameter of a lazy module that has not run yet, or of a module that is sharded by itself.
    """
    found: dict[Tensor, HeldParameter] = {}
    for block in blocks:
        _refuse_shards(block)
        for module in block.modules:
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if isinstance(parameter, UninitializedParameter):
                    where = f"ResidualStack: the parameters of block {block.index}"
                    raise RuntimeError(
                        f"{where} must be initialised, got a lazy {name!r}; run the stack once under torch.no_grad()"
                    )
                found.setdefault(parameter, HeldParameter(parameter, [], parameter.dtype, parameter.device))
                found[parameter].slots.append(Slot(module._parameters, name))
    return list(found.values())


def _refuse_shards(block: Block) -> None:
    """Raise for modules whose hooks put other parameters in the place of their own while they run."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    sharded = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    if any(isinstance(module, sharded) for module in block.modules):
        raise RuntimeError(
            f"{block.where} must not be sharded by itself (fully_shard, FullyShardedDataParallel), whose hooks swap "
            'its parameters while it runs; shard the stack or the whole model, or use gradient="backprop"'
        )


def modified_in_place() -> RuntimeError:
    return RuntimeError(
        "ResidualStack: between forward and backward neither the stack's output nor a parameter, an argument or a kept "
        "state may be modified in place, but one was; use y = y + z instead of y += z, and step the optimizer after "
        "backward"
    )
