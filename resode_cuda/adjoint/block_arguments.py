"""The arguments that blocks get beside the state: in the forward pass the caller's own objects, copies later.

A block may change what it is given: take entries out of a list, put others in. Its re-evaluations must see what it saw,
and change nothing that the caller holds. So containers are copied, shallowly, when a block is called, and a tensor that
a block writes is an error, since its earlier value is gone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .restoration import are_equal, make_equal, undo_later

ATOMS = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Call(NamedTuple):
    """The arguments of a call of a block, beside the state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


NOTHING = Call((), {})


class Kind(NamedTuple):
    """The class of a tensor and its attributes in Python, which aliases made by torch lack."""

    type: type
    attributes: dict[str, Any]

    @classmethod
    def of(cls, tensor: Tensor) -> Kind:
        return cls(type(tensor), dict(getattr(tensor, "__dict__", {})))

    def replay(self, tensor: Tensor) -> None:
        """Give the caller's own tensor the attributes that it had, until the `restoring` around this ends."""
        found = getattr(tensor, "__dict__", None)
        if found is not None and not are_equal(found, self.attributes):
            undo_later(make_equal, found, dict(found))
            make_equal(found, self.attributes)

    def given_to(self, tensor: Tensor) -> Tensor:
        """The alias, which gets them."""
        if type(tensor) is not self.type:
            tensor.__class__ = self.type
        for name, value in self.attributes.items():
            if name not in vars(tensor):
                setattr(tensor, name, value)
        return tensor


class Given(NamedTuple):
    """What one block was given: the containers copied, and for the stack's argument tensors their places."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    places: list[tuple[int, int]]
    """For each argument tensor among the leaves, its place there and its number."""
    has_containers: bool

    def call(self, tensors: Sequence[Tensor]) -> Call:
        """The arguments with these tensors for the stack's, in containers of their own."""
        if not (self.leaves or self.has_containers):
            return NOTHING
        leaves = list(self.leaves)
        for place, number in self.places:
            leaves[place] = tensors[number]
        return Call(*pytree.tree_unflatten(leaves, self.spec))

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that are not the stack's arguments: earlier blocks have put them into a container."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


class Arguments:
    """The arguments of a stack's forward pass.

    Attributes:
        call: the caller's own objects; None once all blocks have run.
        tensors: those found in them, at any depth of lists, tuples, dicts and whatever else torch's pytrees know, each
            once. They are handed to autograd, which alone holds them until the backward pass.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call: Call | None = Call(args, kwargs)
        found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Autograd does not save what was made in inference mode, which nothing can write outside of it.
        by_identity = {id(tensor): tensor for tensor in found if not tensor.is_inference()}
        self.tensors: list[Tensor] = list(by_identity.values())
        self.kinds = [Kind.of(tensor) for tensor in self.tensors]
        self.count = len(self.tensors)
        self._cut_off: list[Tensor] | None = None
        self._numbers = {identity: number for number, identity in enumerate(by_identity)}
        self.has_containers = not all(isinstance(value, ATOMS) for value in (*args, *kwargs.values()))
        self._unchanging = None if self.has_containers else self._now()

    def cut_off(self) -> list[Tensor]:
        """The tensors, with leaves in the place of those whose gradients go on to others, or pass hooks.

        They are the same for all blocks, and share the attributes of the caller's own.
        """
        if self._cut_off is None:
            self._cut_off = [_leaf(tensor) for tensor in self.tensors]
        return self._cut_off

    def refuse_iterators(self) -> None:
        """Raise if one of the arguments, of which every block sees the next entry, can't be gone through again."""
        for path, leaf in pytree.tree_flatten_with_path(tuple(self.call or ()))[0]:
            if isinstance(leaf, Iterator) and not isinstance(leaf, io.IOBase):
                raise TypeError(
                    f"ResidualStack: {_name(path)} must not be an iterator, which cannot be gone through again, got "
                    f'{type(leaf).__name__}; pass a list, or use gradient="backprop"'
                )

    def refuse_caches(self) -> None:
        """Raise if one of the arguments is a key-value cache, to which a block that runs again would append again."""
        call = self.call or NOTHING
        for name, value in (*enumerate(call.args), *call.kwargs.items()):
            if is_cache(value):
                where = name if isinstance(name, str) else f"argument {name}"
                raise TypeError(
                    f"ResidualStack: {where} must not be a key-value cache in a pass with gradients, got a "
                    f"{type(value).__name__}, to which blocks append again when they run again; pass use_cache=False"
                )

    def given(self) -> Given:
        """What a block that is called now is given."""
        return self._unchanging or self._now()

    def release(self) -> None:
        """All blocks have run. What re-evaluations need was copied."""
        self.call, self.tensors, self._cut_off = None, [], None

    def name_of(self, tensor: Tensor) -> str:
        """An argument as a user would name it."""
        paths, _ = pytree.tree_flatten_with_path(tuple(self.call or ()))
        return next((_name(path) for path, leaf in paths if leaf is tensor), "one")

    def _now(self) -> Given:
        assert self.call is not None
        leaves, spec = pytree.tree_flatten(tuple(self.call))
        places = [(place, self._numbers[id(leaf)]) for place, leaf in enumerate(leaves) if id(leaf) in self._numbers]
        for place, _ in places:
            leaves[place] = None
        return Given(leaves, spec, places, self.has_containers)


def is_cache(value: Any) -> bool:
    """Whether it is a key-value cache, such as those of transformers, whatever their class."""
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))


def _leaf(tensor: Tensor) -> Tensor:
    if not tensor.requires_grad or (tensor.is_leaf and not tensor._backward_hooks):
        return tensor
    leaf = tensor.detach().requires_grad_()
    leaf.__class__ = type(tensor)
    if hasattr(tensor, "__dict__"):
        leaf.__dict__ = tensor.__dict__
    return leaf


def left_in(call: Call) -> bool:
    """Whether the containers of a call that was made with leaves hold tensors that are computed from others."""
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in pytree.tree_leaves(tuple(call)))


class Versions:
    """The versions of tensors that an evaluation must not write."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._before = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def written(self) -> Tensor | None:
        """The first that was written since then."""
        return next((tensor for tensor, version in self._before if tensor._version != version), None)


def _name(path: tuple[Any, ...]) -> str:
    first, rest = path[1], path[2:]
    is_keyword = isinstance(first, pytree.MappingKey)
    return (str(first.key) if is_keyword else f"argument {first.idx}") + pytree.keystr(rest)
