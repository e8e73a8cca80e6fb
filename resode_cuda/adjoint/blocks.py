"""Calling a block: what it gets, the checks on what it returns, and the parameters it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dtypes import DTYPES, fits
from ..layouts import is_distributed
from ..schemes import BlockFunction
from .block_arguments import Arguments, Call, Given, Versions, left_in
from .generators import Generators
from .inventory import HeldParameter, Inventories, Inventory
from .replay import Replayed
from .restoration import Slot, restoring
from .surroundings import turn_fast_path_off

Auxiliaries = list[Tensor | None]
"""What each evaluation of a block that may return a second tensor gave as one, in their order."""


class Returned(NamedTuple):
    """What blocks may return: a tensor, or with one of these also a tuple that begins with it."""

    is_state: bool = False
    """Whether it is the next state; the rest of the tuple may be None then."""
    has_auxiliary: bool = False
    """Whether a second tensor may follow."""


class Block:
    """Block n of a stack during one forward pass and its backward pass.

    Args:
        dtype: of the stack's input, in which the block computes; the state around it may be wider.
        inventories: those of the stack's blocks.
        returned: what the block may return.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        dtype: torch.dtype,
        inventories: Inventories,
        returned: Returned,
    ) -> None:
        self.module, self.index, self.dtype = module, index, dtype
        self._returned = returned
        self.has_auxiliary = returned.has_auxiliary
        self._inventories = inventories
        self._last: Inventory | None = None

    @property
    def where(self) -> str:
        return f"ResidualStack: block {self.index}"

    def inventory(self) -> Inventory:
        """What the block holds now."""
        self._last = self._inventories.of(self.module, self.index)
        return self._last

    @property
    def needs_its_tensors(self) -> bool:
        """Whether it has been seen to run only where its tensors are saved, as when it differentiates inside."""
        return self.index in self._inventories.needing_tensors

    @needs_its_tensors.setter
    def needs_its_tensors(self, needs: bool) -> None:
        (self._inventories.needing_tensors.add if needs else self._inventories.needing_tensors.discard)(self.index)

    @property
    def has_fast_path(self) -> bool:
        return (self._last or self.inventory()).has_fast_path

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
        given = x if x.dtype == self.dtype else x.to(self.dtype)
        version = None if torch.compiler.is_compiling() or given.is_inference() else given._version
        if parameters is None:
            out = self.module(given, *args, **kwargs)
        else:
            out = torch.func.functional_call(self.module, parameters, (given, *args), kwargs)
        if any(self._returned):
            out = self._first(out, auxiliaries)
        self._check(given, version, out)
        return out if fits(out.dtype, x.dtype) else out.to(x.dtype)

    def function(self, call: Call, auxiliaries: Auxiliaries) -> BlockFunction:
        return lambda x: self(x, call, auxiliaries)

    def _first(self, out: Any, auxiliaries: Auxiliaries) -> Any:
        """The first entry of a tuple. A second tensor is appended to the auxiliaries, where there may be one."""
        rest = out[1:] if isinstance(out, tuple) else ()
        given = [entry for entry in rest if entry is not None]
        is_right = len(given) <= self.has_auxiliary and (self._returned.is_state or len(rest) <= 1)
        if not (is_right and all(isinstance(entry, Tensor) and entry.is_floating_point() for entry in given)):
            shown = tuple(type(entry).__name__ for entry in out)
            first = "state" if self._returned.is_state else "increment"
            wanted = (
                f"({first}, auxiliary), floating tensors or None for the second"
                if self.has_auxiliary
                else ("one tensor, or a tuple of it and None; let the stack add up auxiliaries with auxiliary=sum")
            )
            raise TypeError(f"{self.where} must return {wanted}, got {shown}")
        if self.has_auxiliary:
            auxiliaries.append(given[0] if given else None)
        return out[0] if isinstance(out, tuple) and out else out

    def _check(self, given: Tensor, version: int | None, out: Any) -> None:
        where = self.where
        if not isinstance(out, Tensor):
            hint = "" if self.has_auxiliary else ", or let the stack add up auxiliaries with auxiliary=sum"
            raise TypeError(
                f"{where} must return one tensor, got {type(out).__name__}; wrap it to return that tensor{hint}"
            )
        if is_distributed(out):
            raise TypeError(
                f"{where} must return this rank's own tensor, got a DTensor; set use_local_output=True in its last "
                "layer, or return out.to_local()"
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
        if out.dtype != given.dtype and out.dtype not in self._other_dtypes(given.device.type):
            raise TypeError(
                f"{where} must keep the dtype of its input, got {given.dtype} -> {out.dtype}; "
                "cast its output, or run the whole stack under torch.autocast"
            )
        if version is not None and given._version != version:
            raise RuntimeError(
                f"{where} must not modify its input in place, which is the state itself; "
                "use inplace=False in its first operation"
            )

    def _other_dtypes(self, device_type: str) -> tuple[torch.dtype, ...]:
        """Dtypes other than its input's that the block may return: what autocast casts to, up or down, and for an
        increment what FSDP's policy of mixed precision does."""
        if self._last is not None and self._last.shards and not self._returned.is_state:
            return DTYPES
        if not torch.is_autocast_enabled(device_type):
            return ()
        return torch.float32, torch.get_autocast_dtype(device_type)


class BlockCall:
    """A block's evaluation in one step of one forward pass, run again in the backward pass as it first ran.

    Args:
        device: of the state.
        generators: of the forward pass.
        stage: which of the step's evaluations it is, 0 or 1.
    """

    def __init__(self, block: Block, device: torch.device, generators: Generators, stage: int) -> None:
        self.block, self._stage = block, stage
        self.inventory = block.inventory()
        self._device, self._generators = device, generators
        self._replayed: Replayed | None = None
        self.given: Given | None = None
        self.left_behind: list[str] = []
        """Names of the places where the last re-evaluation left tensors that have gradients; it took them off again."""

    @property
    def is_function(self) -> bool:
        """Whether the block drew no random numbers and wrote no buffers in the forward pass."""
        return self._replayed is not None and self._replayed.is_function

    def first(
        self, arguments: Arguments, auxiliaries: Auxiliaries, tensors: Sequence[Tensor] | None = None
    ) -> BlockFunction:
        """The block in the forward pass.

        Args:
            tensors: for those among its arguments, where its graph is kept.
        """
        return lambda x: self._record(x, arguments, auxiliaries, tensors)

    def again(self, tensors: Sequence[Tensor], auxiliaries: Auxiliaries) -> BlockFunction:
        """The block in the backward pass, with these tensors for those among its arguments."""
        given, replayed = self.given, self._replayed
        assert given is not None, "first comes first"
        assert replayed is not None

        def evaluated(x: Tensor) -> Tensor:
            call = given.call(tensors)
            out = replayed.again(lambda: self.block(x, call, auxiliaries))
            self.left_behind = list(replayed.left_behind)
            if given.has_containers and left_in(call):
                self.left_behind.append("a container among the arguments")
            return out

        return evaluated

    def _record(
        self, x: Tensor, arguments: Arguments, auxiliaries: Auxiliaries, tensors: Sequence[Tensor] | None
    ) -> Tensor:
        assert arguments.call is not None
        self.given = arguments.given()
        call = arguments.call if tensors is None else self.given.call(tensors)
        if self._stage:  # the block before it may have changed what they share
            self.inventory = self.block.inventory()
        parameters = [parameter.tensor for parameter in self.inventory.parameters]
        watched = Versions((*arguments.tensors, *self.given.tensors, *parameters))
        self._replayed = Replayed(self.inventory, self._device, self._generators)
        try:
            out = self._replayed.record(lambda: self.block(x, call, auxiliaries), takes_graphs_off=tensors is not None)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                f"{self.block.where} must enable gradients where it differentiates, since the forward pass of "
                'gradient="adjoint" runs without them; put that part of it under torch.enable_grad()'
            ) from error
        self.left_behind = list(self._replayed.left_behind)
        written = watched.written()
        if written is not None:
            self._refuse(written, arguments)
        return out

    def rewind(self) -> None:
        """Undo what the first evaluation, which was broken off, has drawn and written."""
        if self._replayed is not None:
            self._replayed.rewind()

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


class Formats(list[tuple[torch.dtype, torch.device]]):
    """Dtypes and devices of parameters, which torch converts in place, and versions of those that autograd does not
    save, since FSDP gathers them."""

    def __init__(self, held: Sequence[HeldParameter]) -> None:
        super().__init__((parameter.tensor.dtype, parameter.tensor.device) for parameter in held)
        self._held = held
        self._shards = Versions(parameter.tensor for parameter in held if parameter.shard is not None)

    def check(self) -> None:
        """Raise if a parameter was converted, or a sharded one written, since then."""
        if self._shards.written() is not None:
            raise modified_in_place()
        for parameter, (dtype, device) in zip(self._held, self, strict=True):
            tensor = parameter.tensor
            if (tensor.dtype, tensor.device) != (dtype, device):
                raise RuntimeError(
                    "ResidualStack: between forward and backward parameters must not be converted, but one of shape "
                    f"{list(tensor.shape)} was, from {dtype} on {device} to {tensor.dtype} on {tensor.device}; convert "
                    "the stack after backward"
                )


def held_parameters(calls: Sequence[BlockCall]) -> Sequence[HeldParameter]:
    """The parameters of a step's blocks, each once.

    Raises:
        RuntimeError: for a parameter of a lazy module that has not run yet, or of a module that FSDP1 shards by itself.
    """
    for call in calls:
        _check_parameters(call.block, call.inventory)
    if len(calls) == 1:
        return calls[0].inventory.parameters
    found: dict[Tensor, HeldParameter] = {}
    for held in (held for call in calls for held in call.inventory.parameters):
        before: tuple[Slot, ...] = found[held.tensor].slots if held.tensor in found else ()
        found[held.tensor] = held._replace(slots=(*before, *held.slots))
    return list(found.values())


def _check_parameters(block: Block, inventory: Inventory) -> None:
    if inventory.is_sharded_by_wrapping:
        # Its hooks put views of one flat parameter in the place of the modules' own while these run.
        raise RuntimeError(
            f"{block.where} must not be wrapped in FullyShardedDataParallel; use torch's fully_shard on it, wrap the "
            'whole model, or use gradient="backprop"'
        )
    if inventory.lazy is not None:
        raise RuntimeError(
            f"ResidualStack: the parameters of block {block.index} must be initialised, got a lazy "
            f"{inventory.lazy!r}; run the stack once under torch.no_grad()"
        )


def modified_in_place() -> RuntimeError:
    return RuntimeError(
        "ResidualStack: between forward and backward neither the stack's output nor a parameter, an argument or a kept "
        "state may be modified in place, but one was; use y = y + z instead of y += z, and step the optimizer after "
        "backward"
    )
