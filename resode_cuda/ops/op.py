"""An op: its schema, the checks of its operands, and how it hands them to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts import apart, is_dense, laid_out_like, same_layout
from . import reference
from .operands import check_like, check_norms, check_stream, of_one_dtype
from .selection import chosen

# The last operands of the ops that also update the adjoint.
_PRODUCTS = ("g", "v1", "v2", "g_scale", "v_scale")


class Op:
    """An op of the library `resode`, as its schema says. The first operand is the stream that all others must fit.

    Args:
        schema: as `torch.library.Library.define` takes it. Without a result, the op writes what the schema marks.
        stages: the operands that blocks have returned, of the stream's dtype or a narrower one.
        streams: further operands of the stream's dtype, those after g excepted.
    """

    def __init__(self, schema: str, *, stages: Sequence[str] = (), streams: Sequence[str] = ()) -> None:
        parsed = torch._C.parse_schema(f"resode::{schema}")
        self.schema = schema
        self.qualified_name = parsed.name
        self.name = parsed.name.removeprefix("resode::")
        names = [argument.name for argument in parsed.arguments]
        self._has_products = names[-len(_PRODUCTS) :] == [*_PRODUCTS] and names[0] != "g"
        # Places among the operands, with their names where errors need them.
        self._stages = [(names.index(name), name) for name in stages]
        streams = (*streams, *(_PRODUCTS[:3] if self._has_products else ()))
        self._streams = [(names.index(name), name) for name in streams]
        self._norms = names.index("norms") if "norms" in names else None
        self._states = [0, *(place for place, _ in (*self._streams, *self._stages))]
        self._written = [place for place in self._states if parsed.arguments[place].is_write]
        self._read = [place for place in self._states if place not in self._written]

    def __call__(self, *values: Any) -> Any:
        """The op where nobody differentiates: autograd's own bookkeeping costs as much again."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*values)

    def register(self, library: torch.library.Library) -> None:
        library.define(self.schema)
        run = self._write if self._written else self._compute
        library.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified_name, self._fake, lib=library)
        torch.library.register_vmap(self.qualified_name, self._vmap, lib=library)
        self._overload = getattr(torch.ops.resode, self.name).default

    def _check(self, values: Sequence[Any]) -> Tensor:
        x: Tensor = values[0]
        check_stream(self.name, x, [(name, values[place]) for place, name in self._stages])
        check_like(self.name, x, [(name, values[place]) for place, name in self._streams])
        if self._norms is not None:
            check_norms(self.name, x, values[self._norms])
        return x

    def _fake(self, *values: Any) -> Tensor | None:
        x = self._check(values)
        return None if self._written else torch.empty_like(x)

    def _compute(self, *values: Any) -> Tensor:
        """The result, laid out as torch.empty_like(x)."""
        x = self._check(values)
        backend = chosen(x.device)
        if backend is reference:
            result: Tensor = getattr(reference, self.name)(*values)
            if result.stride() == x.stride():
                return result
            out = torch.empty_like(x)
            return result if result.stride() == out.stride() else out.copy_(result)
        out = torch.empty_like(x)
        if not x.numel():
            return out
        operands = list(values)
        self._to_one_dtype(operands)
        for place in self._states:
            operands[place] = laid_out_like(out, operands[place])
        with torch.cuda.device_of(x):
            getattr(backend, self.name)(*operands, out)
        return out

    def _write(self, *values: Any) -> None:
        """In place, wherever the written operands lie."""
        x = self._check(values)
        if not x.numel():
            return
        operands = list(values)
        written = [place for place in self._written if values[place] is not None]
        read = apart([values[place] for place in self._read], [values[place] for place in written])
        for place, tensor in zip(self._read, read, strict=True):
            operands[place] = tensor
        self._to_one_dtype(operands)
        backend = chosen(x.device)
        if backend is reference:
            getattr(reference, self.name)(*operands)
            return
        if self._has_products and values[-5] is not None and not same_layout(values[-5], x):
            # The adjoint lies in memory in another order: a launch of its own instead of two copies.
            torch.ops.resode.adjoint_update_(*operands[-5:])
            operands[-5:-2] = None, None, None
        layout = x if is_dense(x) else torch.empty_like(x)
        for place in self._states:
            operands[place] = laid_out_like(layout, operands[place])
        with torch.cuda.device_of(x):
            getattr(backend, self.name)(*operands)
        for place in written:
            if operands[place] is not None and operands[place] is not values[place]:
                values[place].copy_(operands[place])
            torch.autograd.graph.increment_version(values[place])  # autograd does not see what kernels write

    def _to_one_dtype(self, operands: list[Any]) -> None:
        if len(self._stages) == 2:
            (first, _), (second, _) = self._stages
            operands[first], operands[second] = of_one_dtype(operands[first], operands[second])

    def _vmap(self, info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
        if self._written:
            raise NotImplementedError(
                f"{self.name}: torch.vmap must not reach an op that mutates; it is the backward step's own"
            )
        batched = [
            value
            if not isinstance(value, Tensor)
            else value.expand(info.batch_size, *value.shape)
            if dim is None
            else value.movedim(dim, 0)
            for value, dim in zip(values, dims, strict=True)
        ]
        return getattr(torch.ops.resode, self.name)(*batched), 0
