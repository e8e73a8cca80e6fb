"""What a random network is given beside its state, and how its blocks depend on it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DIM = 6
Pair = namedtuple("Pair", ["first", "second"])


class Given(NamedTuple):
    """Arguments of one network, and the leaves among what they were made of."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: dict[str, Tensor]


def conditioned(out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`out` times a factor for each leaf among the arguments; what can be written, counted or drawn from is."""
    if "log" in kwargs:
        kwargs["log"].append(1.0)
        out = out * torch.tensor(float(len(kwargs["log"])), dtype=out.dtype).cos()
    if "calls" in kwargs:
        kwargs["calls"].add_(1)
    if "typed" in kwargs:
        out = out * (2 if isinstance(kwargs["typed"], nn.Parameter) else 1)
    if "one" in kwargs:
        out = out * (2 if kwargs["one"] is kwargs["other"] else 1)
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, SimpleNamespace):
            leaf = leaf.tensor
        if isinstance(leaf, Tensor):
            out = out * _factor(leaf, out)
        elif isinstance(leaf, (int, float)):
            out = out * leaf
        elif isinstance(leaf, Iterator):
            out = out * next(leaf)
    return out


def _factor(given: Tensor, out: Tensor) -> Tensor | float:
    if given.dtype == torch.bool:
        return torch.where(given, 1.0, 0.5).to(out.dtype)
    if given.ndim and given.shape[-1] != out.shape[-1]:
        given = given.mean()
    return given.to(out.dtype).cos() * getattr(given, "temperature", 1.0)


def _leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def _nothing(dtype, x):
    return Given((), {}, {})


def _tensor(dtype, x):
    scale = _leaf(dtype, DIM)
    return Given((scale,), {}, {"scale": scale})


def _tensor_without_gradient(dtype, x):
    return Given((torch.randn(DIM, dtype=dtype),), {}, {})


def _keyword(dtype, x):
    shift = _leaf(dtype, DIM)
    return Given((), {"shift": shift, "factor": 0.5, "nothing": None, "name": "text"}, {"shift": shift})


def _nested(dtype, x):
    a, b, c = _leaf(dtype, DIM), _leaf(dtype), _leaf(dtype, 1, DIM)
    more = {"list": [a, (b.sin(), 2.0)], "ordered": OrderedDict(mask=torch.arange(DIM) > 2)}
    return Given((more,), {"pair": Pair(c * 2, torch.arange(DIM))}, {"a": a, "b": b, "c": c})


def _twice(dtype, x):
    scale = _leaf(dtype, DIM)
    return Given((scale, [scale]), {"again": scale.view(1, DIM)}, {"scale": scale})


def _wide_and_strided(dtype, x):
    wide, column = _leaf(torch.float64, DIM), _leaf(dtype, DIM, 2)
    return Given((wide, column[:, 1], column[:1, 0].expand(DIM)), {}, {"wide": wide, "column": column})


def _the_state(dtype, x):
    return Given((x, x[..., :1].expand_as(x)), {}, {})


def _parameter_argument(dtype, x):
    weight = nn.Parameter(torch.randn(DIM, dtype=dtype))
    return Given((), {"weight": weight}, {"weight": weight})


def _typed(dtype, x):
    weight = nn.Parameter(torch.randn(DIM, dtype=dtype))
    return Given((), {"typed": weight}, {"weight": weight})


def _same(dtype, x):
    scale = _leaf(dtype, DIM)
    return Given((), {"one": scale, "other": scale}, {"scale": scale})


def _inference(dtype, x):
    with torch.inference_mode():
        scale = torch.randn(DIM, dtype=dtype)
    return Given((scale,), {}, {})


def _marked(dtype, x):
    scale = _leaf(dtype, DIM)
    scale.temperature = 0.3
    return Given((scale,), {}, {"scale": scale})


def _marked_without_gradient(dtype, x):
    scale = torch.randn(DIM, dtype=dtype)
    scale.temperature = 0.3
    return Given((), {"scale": scale}, {})


def _hidden_in_an_object(dtype, x):
    scale = _leaf(dtype, DIM)
    return Given((SimpleNamespace(tensor=scale),), {}, {"scale": scale})


def _hidden_without_gradient(dtype, x):
    return Given((SimpleNamespace(tensor=torch.randn(DIM, dtype=dtype)),), {}, {})


def _written_list(dtype, x):
    return Given((), {"log": []}, {})


def _written_tensor(dtype, x):
    return Given((), {"calls": torch.zeros((), dtype=torch.int64)}, {})


def _iterator(dtype, x):
    return Given((iter([0.5 + 0.01 * n for n in range(1000)]),), {}, {})


ARGUMENTS: dict[str, Callable[[torch.dtype, Tensor], Given]] = {
    "nothing": _nothing,
    "tensor": _tensor,
    "tensor_without_gradient": _tensor_without_gradient,
    "keyword": _keyword,
    "nested": _nested,
    "twice": _twice,
    "wide_and_strided": _wide_and_strided,
    "the_state": _the_state,
    "parameter": _parameter_argument,
    "typed": _typed,
    "same": _same,
    "inference": _inference,
    "marked": _marked,
    "marked_without_gradient": _marked_without_gradient,
    "hidden": _hidden_in_an_object,
    "hidden_without_gradient": _hidden_without_gradient,
    "written_list": _written_list,
    "written_tensor": _written_tensor,
    "iterator": _iterator,
}
