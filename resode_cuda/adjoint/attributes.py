"""What a block's modules hold beside parameters and buffers: flags, numbers, counters, lists of what they computed.

An evaluation may depend on them and may change them. Numbers, strings and the like are compared and replayed, as are
the contents of lists, dicts, sets and deques that an evaluation changed. Whatever a re-evaluation leaves on the modules
is taken off again.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn

from .block_arguments import Versions
from .restoration import Slot, are_equal, hide, make_equal, put, undo_later

_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_CONTAINERS = {list, dict, set, deque, OrderedDict, defaultdict, Counter}
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}

LARGEST = 1000
"""The most entries of a container that is looked into."""


class Attributes:
    """The attributes of a module before an evaluation.

    Attributes:
        tensors: names of those that are tensors without a gradient, which serve as buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        found = vars(module)
        self._count = len(found)
        self._plain, self.tensors, self._containers = _sorted(found)
        self._contents = {name: _contents(container) for name, container in self._containers}
        held = [entry for contents in self._contents.values() for entry in contents if isinstance(entry, Tensor)]
        self._versions = Versions(held) if held else None
        self._before_replay: dict[str, Any] = {}
        self._contents_before: dict[str, list[Any]] = {}

    def evaluated(self) -> None:
        """The evaluation has ended: keep the contents of those containers alone that it changed.

        Raises:
            RuntimeError: if it wrote a tensor in one of them.
        """
        if not self._containers:
            return
        if self._versions is not None and self._versions.written() is not None:
            raise RuntimeError(
                f"ResidualStack: a block must not write a tensor in a container among its attributes, which cannot be "
                f"run again then, but {type(self._module).__name__} did; register it as a buffer"
            )
        self._versions = None
        changed = [(n, c) for n, c in self._containers if not _are_same(self._contents[n], _contents(c))]
        self._contents = {name: self._contents[name] for name, _ in changed}

    def replay(self) -> None:
        """Make them what they were, until the `restoring` around this ends, which takes off what is new then."""
        found = vars(self._module)
        self._before_replay = found.copy()
        undo_later(make_equal, found, self._before_replay)
        if self._containers:
            self._replay_contents()
        if len(found) == self._count and all(map(operator.is_, map(found.get, self._plain), self._plain.values())):
            return
        plain, _, _ = _sorted(found)
        changed = {name: value for name, value in self._plain.items() if name not in plain or plain[name] != value}
        put([Slot(found, name) for name in changed], changed.values())
        for name in plain.keys() - self._plain.keys():
            hide(Slot(found, name))

    def _replay_contents(self) -> None:
        self._contents_before = {name: _contents(container) for name, container in self._containers}
        for name, container in self._containers:
            undo_later(_refill, container, self._contents_before[name])
            if name in self._contents:
                _refill(container, self._contents[name])

    def left_behind(self) -> list[str]:
        """Names of the attributes in which a re-evaluation, not undone yet, has left tensors that have gradients."""
        found, before = vars(self._module), self._before_replay
        names = [name for name, container in self._containers if self._has_new_gradients(name, container)]
        if not are_equal(found, before):
            recomputed = _recomputed(self._module)
            names += [
                name
                for name, value in found.items()
                if value is not before.get(name)
                and name not in _TORCHS_OWN
                and name not in recomputed
                and _has_gradient(value)
            ]
        return [f"{type(self._module).__name__}.{name}" for name in names]

    def _has_new_gradients(self, name: str, container: Any) -> bool:
        known = set(map(id, self._contents_before[name]))
        return any(id(entry) not in known and _has_gradient(entry) for entry in _contents(container))


def _sorted(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[tuple[str, Any]]]:
    """The plain ones among a module's attributes, the names of those that are tensors, and the containers by name."""
    plain, tensors, containers = {}, [], []
    for name, value in attributes.items():
        if name in _TORCHS_OWN:
            continue
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(entry) in _PLAIN for entry in value)):
            plain[name] = value
        elif kind in _CONTAINERS:
            containers += _nested(name, value)
        elif isinstance(value, Tensor) and not value.requires_grad:
            tensors.append(name)
    return plain, tensors, containers


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


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _recomputed(module: nn.Module) -> set[str]:
    """Attributes that hooks like those of torch.nn.utils.weight_norm and prune compute anew before each evaluation."""
    hooks = module._forward_pre_hooks.values()
    return {getattr(hook, name, None) for hook in hooks for name in ("name", "_tensor_name")}  # type: ignore[misc]
