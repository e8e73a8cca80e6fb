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
    """The attributes of a module before an evaluation."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plain, containers = _sorted(module)
        self._contents = [(container, _contents(container)) for container in containers]
        self._before_replay: dict[str, Any] = {}

    def evaluated(self) -> None:
        """The evaluation has ended: keep the contents of those containers alone that it changed."""
        self._contents = [(c, before) for c, before in self._contents if not _are_same(before, _contents(c))]

    def replay(self) -> None:
        """Make them what they were, until the `restoring` around this ends, which takes off what is new then."""
        found = vars(self._module)
        self._before_replay = found.copy()
        undo_later(_make_equal, found, self._before_replay)
        plain, containers = _sorted(self._module)
        for container in containers:
            undo_later(_refill, container, _contents(container))
        for container, before in self._contents:
            undo_later(_refill, container, _contents(container))
            _refill(container, before)
        if plain == self._plain:
            return
        changed = {name: value for name, value in self._plain.items() if name not in plain or plain[name] != value}
        put([Slot(found, name) for name in changed], changed.values())
        for name in plain.keys() - self._plain.keys():
            hide(Slot(found, name))

    def left_behind(self) -> list[str]:
        """Names of the attributes in which a re-evaluation, not undone yet, has left tensors that have gradients."""
        before = self._before_replay
        return [
            f"{type(self._module).__name__}.{name}"
            for name, value in vars(self._module).items()
            if _has_gradients(value, before.get(name)) and name not in _recomputed(self._module)
        ]


def _sorted(module: nn.Module) -> tuple[dict[str, Any], list[Any]]:
    """The plain attributes among a module's, and its containers."""
    plain, containers = {}, []
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(entry) in _PLAIN for entry in value)):
            plain[name] = value
        elif kind in _CONTAINERS and name not in _TORCHS_OWN:
            containers.append(value)
    return plain, containers


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
