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

from .restoration import Slot, hide, put, undo_later

_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_CONTAINERS = {list, dict, set, deque, OrderedDict, defaultdict, Counter}
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}


class Attributes:
    """The attributes of a module before an evaluation.

    Attributes:
        tensors: names of those that are tensors without a gradient, which serve as buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        found = vars(module)
        self._count = len(found)
        self._plain, self.tensors, containers = _sorted(found)
        self._contents = [(container, _contents(container)) for container in containers]
        self._has_containers = bool(containers)
        self._before_replay: dict[str, Any] = {}

    def evaluated(self) -> None:
        """The evaluation has ended: keep the contents of those containers alone that it changed."""
        if self._contents:
            self._contents = [(c, before) for c, before in self._contents if not _are_same(before, _contents(c))]

    def replay(self) -> None:
        """Make them what they were, until the `restoring` around this ends, which takes off what is new then."""
        found = vars(self._module)
        self._before_replay = found.copy()
        undo_later(_make_equal, found, self._before_replay)
        if self._has_containers:
            self._replay_contents(found)
        if len(found) == self._count and all(found.get(name) is value for name, value in self._plain.items()):
            return
        plain, _, _ = _sorted(found)
        changed = {name: value for name, value in self._plain.items() if name not in plain or plain[name] != value}
        put([Slot(found, name) for name in changed], changed.values())
        for name in plain.keys() - self._plain.keys():
            hide(Slot(found, name))

    def _replay_contents(self, found: dict[str, Any]) -> None:
        for container in _sorted(found)[2]:
            undo_later(_refill, container, _contents(container))
        for container, before in self._contents:
            undo_later(_refill, container, _contents(container))
            _refill(container, before)

    def left_behind(self) -> list[str]:
        """Names of the attributes in which a re-evaluation, not undone yet, has left tensors that have gradients."""
        found, before = vars(self._module), self._before_replay
        if not self._has_containers and _are_same(list(found.values()), list(before.values())):
            return []
        return [
            f"{type(self._module).__name__}.{name}"
            for name, value in found.items()
            if name not in _TORCHS_OWN
            and _has_gradients(value, before.get(name))
            and name not in _recomputed(self._module)
        ]


def _sorted(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[Any]]:
    """The plain ones among a module's attributes, the names of those that are tensors, and the containers."""
    plain, tensors, containers = {}, [], []
    for name, value in attributes.items():
        if name in _TORCHS_OWN:
            continue
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(entry) in _PLAIN for entry in value)):
            plain[name] = value
        elif kind in _CONTAINERS:
            containers.append(value)
        elif isinstance(value, Tensor) and not value.requires_grad:
            tensors.append(name)
    return plain, tensors, containers


def _contents(container: Any) -> list[Any]:
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


def _make_equal(found: dict[str, Any], before: dict[str, Any]) -> None:
    if len(found) == len(before) and all(map(operator.is_, found.values(), before.values())):
        return
    for name in found.keys() - before.keys():
        del found[name]
    found.update(before)


def _has_gradients(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor):
        return value is not before and value.requires_grad
    if type(value) in _CONTAINERS:
        return any(isinstance(entry, Tensor) and entry.grad_fn is not None for entry in _contents(value))
    return False


def _recomputed(module: nn.Module) -> set[str]:
    """Attributes that hooks like those of torch.nn.utils.weight_norm and prune compute anew before each evaluation."""
    hooks = module._forward_pre_hooks.values()
    return {getattr(hook, name, None) for hook in hooks for name in ("name", "_tensor_name")}  # type: ignore[misc]
