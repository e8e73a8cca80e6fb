"""Finding the stages of a model: successive layers in a container that keep the shape of their state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .families import facts_of, is_container
from .stage import STAGE, Stage


class Found(NamedTuple):
    """A run of layers."""

    path: str
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]


class LeftAlone(NamedTuple):
    """What was not converted."""

    path: str
    reason: str


def stages_in(model: nn.Module, paths: Sequence[str] | None, min_depth: int) -> tuple[list[Found], list[LeftAlone]]:
    """The stages, and what was left alone with the reason and the way out.

    Raises:
        ValueError: for a path that the model does not have, or whose module has fewer layers.
    """
    if paths is not None:
        if len(set(paths)) < len(paths):
            raise ValueError(f"convert: stages must name each container once, got {list(paths)}")
        found = [_named(model, path, min_depth) for path in paths]
        return found, []
    found, left = [], []
    for path, module in model.named_modules():
        if not is_container(module):
            continue
        runs, reasons = _runs(path, module, min_depth)
        found += runs
        left += reasons
    return found, left


def _named(model: nn.Module, path: str, min_depth: int) -> Found:
    try:
        container = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"convert: stages must name modules of the model, got {path!r}: {error}") from error
    children = _children(container)
    if len(children) < max(1, min_depth):
        raise ValueError(
            f"convert: a stage must have at least min_depth={min_depth} layers, got {len(children)} in {path!r}; name "
            "the container of the layers, or pass a smaller min_depth"
        )
    if len(set(children.values())) < len(children):
        raise ValueError(f"convert: the layers of a stage must be different modules, got one several times in {path!r}")
    return Found(path, tuple(children), tuple(children.values()))


def _runs(path: str, container: nn.Module, min_depth: int) -> tuple[list[Found], list[LeftAlone]]:
    """Successive layers of one known class that keep their shape, and why others were left alone."""
    children = list(_children(container).items())
    found: list[Found] = []
    left: list[LeftAlone] = []
    for (kind, keeps), run in itertools.groupby(children, lambda child: _kind(child[1])):
        names, layers = zip(*run, strict=True)
        if kind is None:
            if len(layers) >= min_depth and _is_a_layer(layers[0]) and not _holds_known_layers(layers):
                left.append(LeftAlone(_spanned(path, names), _unknown(path, layers)))
        elif not keeps:
            left += [LeftAlone(_spanned(path, (name,)), "changes the shape of its state") for name in names]
        elif len(set(layers)) < len(layers):
            left.append(LeftAlone(_spanned(path, names), "one layer stands at several places"))
        elif len(layers) < min_depth:
            count = "1 layer" if len(layers) == 1 else f"{len(layers)} successive layers"
            reason = f"{count}, fewer than min_depth={min_depth}; pass a smaller one"
            left.append(LeftAlone(_spanned(path, names), reason))
        else:
            found.append(Found(path, names, layers))
    return found, left


def _children(container: nn.Module) -> dict[str, nn.Module]:
    """By name, one that stands at several places at each of them."""
    return {name: module for name, module in container._modules.items() if module is not None}


def _kind(layer: nn.Module) -> tuple[type[nn.Module] | None, bool]:
    facts = facts_of(layer)
    if facts is None:
        return None, True
    return type(layer), facts.keeps_shape(layer)


def _is_a_layer(module: nn.Module) -> bool:
    """Whether it is of several modules, not an operation of its own."""
    return any(True for _ in module.children()) and not is_container(module)


def _holds_known_layers(modules: Sequence[nn.Module]) -> bool:
    """Whether they are stages of their own, whose containers are looked at."""
    return any(facts_of(inner) is not None for module in modules for inner in module.modules())


def _unknown(path: str, layers: Sequence[nn.Module]) -> str:
    if STAGE in layers[0].__dict__:
        return "is converted already"
    return f"layers of a class that is not known, {type(layers[0]).__name__}; name them: stages=[{path!r}]"


def _spanned(path: str, names: Sequence[str]) -> str:
    first, last = (f"{path}.{name}".lstrip(".") for name in (names[0], names[-1]))
    return first if len(names) == 1 else f"{first} to {last}"


def stages_of(model: object) -> list[Stage]:
    """The stages that the model has been converted to, each once; none of what is no module."""
    if not isinstance(model, nn.Module):
        return []
    found: dict[int, Stage] = {}
    for module in model.modules():
        stage = module.__dict__.get(STAGE)
        if stage is not None:
            found.setdefault(id(stage), stage)
    return list(found.values())
