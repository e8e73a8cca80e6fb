"""Putting back what evaluations change of the program around them, also after an interrupt.

A KeyboardInterrupt may come between any two lines, also those that put things back. So a change is recorded before it
is made, by an action that undoes it and may run twice. What an interrupt leaves undone at the end of one `restoring` is
undone by the one around it, or by the next forward pass.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_MISSING = object()


class _Pending(threading.local):
    """The actions that undo this thread's changes, oldest first."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], object]] = []


_changes = _Pending()


class Slot(NamedTuple):
    """A place in a module, or another dictionary, that holds a value."""

    owner: dict[str, Any]
    name: str

    def get(self) -> Any:
        return self.owner[self.name] if self.name in self.owner else None  # noqa: SIM401 (TorchScript's dict has no get)


def restoring(run: Callable[[], T]) -> T:
    """run(); then everything that it changed by `put` or announced to `undo_later` is as it was."""
    mark = len(_changes.actions)
    try:
        return run()
    finally:
        _undo(mark)


def undo_later(action: Callable[..., object], *args: Any) -> None:
    """Have action(*args), which may run twice, undo the change that follows."""
    _changes.actions.append(partial(action, *args))


def put(slots: Iterable[Slot], values: Iterable[Any]) -> None:
    """Put each value in its slot, until the `restoring` around this ends."""
    for slot, value in zip(slots, values, strict=True):
        undo_later(_put_back, slot, slot.owner[slot.name] if slot.name in slot.owner else _MISSING)  # noqa: SIM401
        slot.owner[slot.name] = value


def hide(slot: Slot) -> None:
    """Empty a slot, until the `restoring` around this ends."""
    undo_later(_put_back, slot, slot.owner[slot.name])
    del slot.owner[slot.name]


def are_equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two dictionaries hold the same objects in the same order."""
    return list(found) == list(wanted) and all(map(operator.is_, found.values(), wanted.values()))


def make_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Give a dictionary the entries of another; may run twice."""
    if are_equal(found, wanted):
        return
    for name in found.keys() - wanted.keys():
        del found[name]
    found.update(wanted)


def undo_leftovers() -> None:
    """Undo what an interrupt kept from being undone."""
    if _changes.actions and not _is_restoring():
        _undo(0)


def _put_back(slot: Slot, value: Any) -> None:
    if value is not _MISSING:
        slot.owner[slot.name] = value
    elif slot.name in slot.owner:
        del slot.owner[slot.name]


def _undo(mark: int) -> None:
    try:
        _undo_down_to(mark)
    except BaseException:
        # An interrupt came in between. Another one will be seen to later.
        _undo_down_to(mark)
        raise


def _undo_down_to(mark: int) -> None:
    failure = None
    while len(_changes.actions) > mark:
        try:
            _changes.actions[-1]()
        except Exception as error:  # the other changes must be undone all the same
            failure = error
        _changes.actions.pop()
    if failure is not None:
        raise failure


def _is_restoring() -> bool:
    """Whether a `restoring` is at work further up the stack of this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is restoring.__code__:
            return True
        frame = frame.f_back
    return False
