"""What a block's modules hold beside parameters and buffers: flags, numbers, counters, lists of what they computed.

An evaluation may depend on them and may change them. Numbers, strings and the like are compared and replayed, as are
the contents of lists, dicts, sets and deques that an evaluation changed. Whatever a re-evaluation leaves on the modules
is taken off again.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .block_arguments import Versions
from .restoration import Slot, hide, put, undo_later

_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_CONTAINERS = {list, dict, set, deque, OrderedDict, defaultdict, Counter}
_FUNCTIONS = FunctionType, BuiltinFunctionType, type
TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of every module that torch alone writes."""

LARGEST = 1000
"""The most entries of a container that is looked into."""


class Attributes:
    """A module's attributes at one moment, by what becomes of them.

    Attributes:
        plain: those that are compared by value and replayed.
        tensors: names of those that are tensors without a gradient, which serve as buffers.
        containers: those whose contents are replayed, by name.
        may_hold_tensors: whether one of them is a tensor, or of a kind that may lead to some.
        has_functions: whether one of them is a function other than torch's own, which may use any tensor.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.plain: dict[str, Any] = {}
        self.tensors: list[str] = []
        self.containers: list[tuple[str, Any]] = []
        self.may_hold_tensors = self.has_functions = False
        for name, value in vars(module).items():
            if name not in TORCHS_OWN:
                self._sort(name, value)

    def _sort(self, name: str, value: Any) -> None:
        if _is_plain(value):
            self.plain[name] = value
        elif type(value) in _CONTAINERS:
            self.containers.append((name, value))
            self.may_hold_tensors |= not all(map(_is_plain, _contents(value)))
        else:
            self.may_hold_tensors |= not isinstance(value, _FUNCTIONS)
            self.has_functions |= not (getattr(value, "__module__", None) or "").startswith("torch")
            if isinstance(value, Tensor) and not value.requires_grad:
                self.tensors.append(name)

    @property
    def class_name(self) -> str:
        return type(self._module).__name__

    def replay(self, held: dict[str, Any]) -> None:
        """Give the module the plain ones of then, until the `restoring` around this ends.

        Args:
            held: all attributes of then: in the place of a plain one may have been an object.
        """
        found, now = vars(self._module), Attributes(self._module).plain
        changed = {name: value for name, value in self.plain.items() if name not in now or now[name] != value}
        put([Slot(found, name) for name in changed], changed.values())
        for name in now.keys() - self.plain.keys():
            if name in held:
                put([Slot(found, name)], [held[name]])
            else:
                hide(Slot(found, name))

    def left_behind(self, before: dict[str, Any]) -> list[str]:
        """Names of attributes that were others before, and are tensors that have gradients."""
        return [f"{self.class_name}.{name}" for name in self._left(before)]

    def detach_left(self, before: dict[str, Any]) -> None:
        """Take these tensors' graphs off."""
        found = vars(self._module)
        for name in self._left(before):
            found[name] = found[name].detach()

    def _left(self, before: dict[str, Any]) -> list[str]:
        recomputed = _recomputed(self._module)
        return [
            name
            for name, value in vars(self._module).items()
            if value is not before.get(name)
            and name not in TORCHS_OWN
            and name not in recomputed
            and _has_gradient(value)
        ]


class Containers:
    """The contents of the containers among some modules' attributes, and of those inside them, at one moment."""

    def __init__(self, modules: Iterable[Attributes]) -> None:
        self._all = [
            (module.class_name, *found)
            for module in modules
            for name, container in module.containers
            for found in _nested(name, container)
        ]
        self._contents: list[list[Any] | None] = [_contents(container) for _, _, container in self._all]
        self._held = [
            (class_name, Versions(entry for entry in contents or () if isinstance(entry, Tensor)))
            for (class_name, _, _), contents in zip(self._all, self._contents, strict=True)
        ]
        self._contents_before: list[list[Any]] = []

    def evaluated(self) -> None:
        """The evaluation has ended: keep the contents of those containers alone that it changed.

        Raises:
            RuntimeError: if it wrote a tensor in one of them.
        """
        for class_name, versions in self._held:
            if versions.written() is not None:
                raise RuntimeError(
                    "ResidualStack: a block must not write a tensor in a container among its attributes, which cannot "
                    f"be run again then, but {class_name} did; register it as a buffer"
                )
        self._held = []
        for place, (_, _, container) in enumerate(self._all):
            if _are_same(self._contents[place] or [], _contents(container)):
                self._contents[place] = None

    def rewind(self) -> None:
        """Give them the contents that they had before the evaluation."""
        for (_, _, container), contents in zip(self._all, self._contents, strict=True):
            if contents is not None:  # else it has ended, and left them as they were
                _refill(container, contents)

    def replay(self) -> None:
        """Give them the contents that they had, until the `restoring` around this ends."""
        self._contents_before = [_contents(container) for _, _, container in self._all]
        for (_, _, container), contents, before in zip(self._all, self._contents, self._contents_before, strict=True):
            undo_later(_refill, container, before)
            if contents is not None:
                _refill(container, contents)

    def left_behind(self) -> list[str]:
        """Names of those in which a re-evaluation, not undone yet, has left tensors that have gradients."""
        return [
            f"{class_name}.{name}"
            for (class_name, name, container), before in zip(self._all, self._contents_before, strict=True)
            if _has_new_gradients(container, before)
        ]

    def detach_left(self) -> list[str]:
        """The same of an evaluation that has not ended; the tensors' graphs are taken off."""
        names = []
        for (class_name, name, container), before in zip(self._all, self._contents, strict=True):
            if _has_new_gradients(container, before or []):
                names.append(f"{class_name}.{name}")
                known = set(map(id, before or []))
                entries = [(entry, id(entry) not in known and _has_gradient(entry)) for entry in _contents(container)]
                _refill(container, [entry.detach() if is_left else entry for entry, is_left in entries])
        return names


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(entry) in _PLAIN for entry in value))


def _nested(name: str, container: Any) -> list[tuple[str, Any]]:
    """A container and those in it, unless there are too many entries to look into."""
    if len(container) > LARGEST:
        return []
    found = [(name, container)]
    for place, entry in enumerate(_contents(container)):
        if type(entry) in _CONTAINERS:
            found += _nested(f"{name}[{place}]", entry)
    return found


def _contents(container: Any) -> list[Any]:
    """Entries, of a dict the keys and then the values."""
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _are_same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))


def _refill(container: Any, contents: list[Any]) -> None:
    if _are_same(contents, _contents(container)):
        return
    container.clear()
    if isinstance(container, dict):
        count = len(contents) // 2
        container.update(zip(contents[:count], contents[count:], strict=True))
    else:
        (container.update if isinstance(container, set) else container.extend)(contents)


def _has_new_gradients(container: Any, before: list[Any]) -> bool:
    known = set(map(id, before))
    return any(id(entry) not in known and _has_gradient(entry) for entry in _contents(container))


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _recomputed(module: nn.Module) -> set[str]:
    """Attributes that hooks like those of torch.nn.utils.weight_norm and prune compute anew before each evaluation."""
    hooks = module._forward_pre_hooks.values()
    return {getattr(hook, name, None) for hook in hooks for name in ("name", "_tensor_name")}  # type: ignore[misc]
