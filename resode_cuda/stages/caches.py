"""Key-value caches among a layer's arguments, to which one that runs again in the backward pass would append again."""

from __future__ import annotations

from typing import Any

from ..adjoint.block_arguments import Call, is_cache

LEFT_EMPTY = "_left_empty_by_convert"


def holds_keys(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one of the arguments is a cache that is not empty: the layers attend to it."""
    return any(is_cache(value) and _is_filled(value) for value in (*args, *kwargs.values()))


def leave_empty(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Mark the caches of a training pass, which layers that run as a stack do not fill."""
    for value in (*args, *kwargs.values()):
        if is_cache(value):
            setattr(value, LEFT_EMPTY, True)


def refuse_left_empty(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for a cache of an earlier training pass, which would be taken for one of no tokens."""
    for value in (*args, *kwargs.values()):
        if getattr(value, LEFT_EMPTY, False) is True:
            raise ValueError(
                f"a converted model must not be given the {type(value).__name__} of an earlier training pass, which "
                "left it empty; pass use_cache=False in training, and fill caches in eval mode or under no_grad"
            )


def _is_filled(cache: Any) -> bool:
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # It has no keys, but the states of layers such as Mamba's.
        return bool(cache.has_previous_state())


def without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The arguments with None for each cache, and then use_cache=False: a training pass has no need of them."""
    if not any(map(is_cache, (*args, *kwargs.values()))):
        return Call(args, kwargs)
    kept = {name: None if is_cache(value) else value for name, value in kwargs.items()}
    off = {"use_cache": False} if "use_cache" in kwargs else {}
    return Call(tuple(None if is_cache(value) else value for value in args), kept | off)
