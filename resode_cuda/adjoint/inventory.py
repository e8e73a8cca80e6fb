"""What a block's modules hold: read once, and compared at a glance from then on.

A pass asks four times a step whether a block's modules are as they were. Reading them takes as long as a small block
does; to compare the objects in their dictionaries with those of the last reading takes a tenth of that.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..layouts import is_distributed
from .attributes import TORCHS_OWN, Attributes
from .restoration import Slot, make_equal
from .sharding import Shards, is_sharded_by_wrapping, sharded, stand_in, whole
from .surroundings import has_fast_path


def submodules(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks and all modules inside them, each once. (`Module.modules` builds every name on the way.)"""
    found: dict[nn.Module, None] = {}
    pending = list(blocks)
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = None
            pending.extend(child for child in module._modules.values() if child is not None)
    return list(found)


class Entries:
    """The attributes of some modules at one moment, without those that torch's own machinery keeps there."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._dictionaries = [vars(module) for module in modules]
        self.copies = [dict(dictionary) for dictionary in self._dictionaries]
        self._counts = [*map(len, self.copies)]
        self._names = [_looked_at(copy) for copy in self.copies]
        self._values = self._looked_up()

    def _looked_up(self) -> list[Any]:
        held = zip(self._dictionaries, self._names, strict=True)
        return [value for dictionary, names in held for value in map(dictionary.__getitem__, names)]

    def are_current(self) -> bool:
        """Whether they are the same objects now."""
        if [*map(len, self._dictionaries)] != self._counts:
            return False
        try:
            return all(map(operator.is_, self._looked_up(), self._values))
        except KeyError:
            return False

    def restore(self) -> None:
        """Give the modules these attributes again; may run twice."""
        if not self.are_current():
            for dictionary, copy in zip(self._dictionaries, self.copies, strict=True):
                make_equal(dictionary, copy)


def _looked_at(attributes: dict[str, Any]) -> list[str]:
    # A traced module keeps its members elsewhere.
    return [name for name in attributes if name not in TORCHS_OWN or name in ("_modules", "_parameters", "_buffers")]


class Members:
    """The modules, parameters and buffers that some modules have at one moment."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        held: list[Any] = [held for of in modules for held in (of._modules, of._parameters, of._buffers)]
        # TorchScript's modules have members of another kind, which can't change.
        self._held: list[dict[str, Any]] = [members for members in held if isinstance(members, dict)]
        self._names, self._values = self._now()

    def _now(self) -> tuple[list[str], list[Any]]:
        return [*chain.from_iterable(self._held)], [*chain.from_iterable(map(dict.values, self._held))]

    def are_current(self) -> bool:
        """Whether they have the same ones now, by the same names."""
        names, values = self._now()
        return names == self._names and all(map(operator.is_, values, self._values))


class HeldParameter(NamedTuple):
    """A parameter, and every place in the blocks that holds it."""

    tensor: Tensor
    slots: tuple[Slot, ...]
    shard: Any = None
    """FSDP's record of it, if FSDP gathers it by the block. The tensor is this rank's part of it then."""

    @property
    def for_node(self) -> Tensor:
        """What a step's node gets: the parameter, or what stands in for one that FSDP gathers."""
        return self.tensor if self.shard is None else stand_in(self.tensor)

    @property
    def in_place(self) -> Tensor:
        """What its slots hold while the block runs."""
        return self.tensor if self.shard is None else whole(self.shard)


class Inventory:
    """A block's modules, their parameters and attributes, at one moment.

    Attributes:
        modules: the block and all modules inside it.
        attributes: of each of them.
        entries: the same attributes, to be compared with.
        parameters: each once.
        lazy: the name of a parameter that is not initialised yet; None where all are.
        has_state: whether they hold tensors beside parameters, or containers, whose contents must be looked at too.
        has_fast_path: whether torch may compute one of them by other kernels where no gradient is asked for.
        is_scripted: whether one of them is TorchScript's, which nothing can leave before its end.
        shards: what `fully_shard` holds of the parameters, where it was applied to one of the modules.
        is_sharded_by_wrapping: whether FSDP1 was.
        keeps_alive: whether, while it is kept, it may keep alive what the modules have let go of, such as states.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = submodules((module,))
        self.attributes = [Attributes(module) for module in self.modules]
        self.entries, self._members = Entries(self.modules), Members(self.modules)
        # Its hooks run around the step, not in it: they gather its parameters themselves.
        outside = getattr(module, "runs_inside", None)
        self._called = [inner for inner in self.modules if inner is not outside]
        self.shards = Shards(self._called)
        self.is_sharded_by_wrapping = is_sharded_by_wrapping(self.modules)
        self.parameters, self.lazy = _parameters(self.modules, self.shards)
        has_buffers = any(module._buffers for module in self.modules)
        self.has_state = has_buffers or any(of.tensors or of.containers for of in self.attributes)
        self.has_fast_path = has_fast_path(self.modules)
        self.is_scripted = any(isinstance(module, torch.jit.ScriptModule) for module in self.modules)
        tensors = [parameter.tensor for parameter in self.parameters]
        are_leaves = all(type(tensor) is nn.Parameter or is_distributed(tensor) for tensor in tensors)
        self.keeps_alive = not are_leaves or any(attributes.may_hold_tensors for attributes in self.attributes)
        has_functions = any(attributes.has_functions for attributes in self.attributes)
        is_known = not (self.keeps_alive or has_buffers or has_functions)
        self._uses_parameters_alone = is_known and all(map(_is_torchs_own, self.modules))
        self._classes = [*map(type, self.modules)]

    @property
    def may_use_strangers(self) -> bool:
        """Whether an evaluation may use tensors with gradients that are neither parameters nor given to it."""
        if not self._uses_parameters_alone or torch.nn.modules.module._has_any_global_hook():
            return True
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.modules)

    @property
    def has_forward_hooks(self) -> bool:
        """Whether something is called after one of the modules has run, and must be."""
        if torch.nn.modules.module._global_forward_hooks:
            return True
        hooks = chain.from_iterable(module._forward_hooks.values() for module in self._called)
        return any(not self.shards.own(hook) for hook in hooks)

    def is_current(self) -> bool:
        """Whether the modules have the same classes, attributes, parameters, buffers and modules now."""
        are_same = all(map(operator.is_, map(type, self.modules), self._classes))
        return are_same and self.entries.are_current() and self._members.are_current()


class Inventories:
    """The last inventory of each block of a stack. Copies and pickles of it have none."""

    def __init__(self) -> None:
        self._last: dict[int, Inventory] = {}
        self.needing_tensors: set[int] = set()
        """The blocks that have been seen to run only where their tensors are saved."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Inventories, ()

    def of(self, module: nn.Module, index: int) -> Inventory:
        """What block `index` holds now."""
        last = self._last.get(index)
        if last is not None and last.module is module and last.is_current():
            return last
        self._last.pop(index, None)
        made = Inventory(module)
        if not made.keeps_alive:
            self._last[index] = made
        return made


def _parameters(modules: Iterable[nn.Module], shards: Shards) -> tuple[list[HeldParameter], str | None]:
    """Each parameter with its slots, and the name of one that is not initialised."""
    slots: dict[Tensor, list[Slot]] = {}
    records: dict[Tensor, Any] = {}
    lazy = None
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(parameter, UninitializedParameter):
                lazy = lazy or name
            record = shards.of(module, name)
            tensor = parameter if record is None else sharded(record)
            records[tensor] = record
            slots.setdefault(tensor, []).append(Slot(module._parameters, name))
    return [HeldParameter(tensor, tuple(places), records[tensor]) for tensor, places in slots.items()], lazy


def _is_torchs_own(module: nn.Module) -> bool:
    forward = getattr(module.forward, "__func__", None)
    names = type(module).__module__, getattr(forward, "__module__", "")
    return all(name.startswith("torch.nn.modules.") for name in names)
