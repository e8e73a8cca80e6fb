"""An op: its schema, the checks of its operands, and how it hands them to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import chosen
from .operands import apart, check_like, check_norms, check_stream, is_dense, laid_out_like, of_one_dtype, same_layout

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
        self.names = [argument.name for argument in parsed.arguments]
        self.written = [
            argument.name for argument in parsed.arguments if argument.is_write and argument.name != "norms"
        ]
        self.has_products = self.names[-len(_PRODUCTS) :] == [*_PRODUCTS] and self.names[0] != "g"
        self.stages = tuple(stages)
        self.streams = (*streams, *(("g", "v1", "v2") if self.has_products else ()))

    def register(self, library: torch.library.Library) -> None:
        library.define(self.schema)
        run = self._write if self.written else self._compute
        library.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified_name, self._fake, lib=library)
        torch.library.register_vmap(self.qualified_name, self._vmap, lib=library)

    def _check(self, operands: dict[str, Any]) -> Tensor:
        x: Tensor = operands[self.names[0]]
        check_stream(self.name, x, **{name: operands[name] for name in self.stages})
        check_like(self.name, x, **{name: operands[name] for name in self.streams})
        if "norms" in operands:
            check_norms(self.name, x, operands["norms"])
        return x

    def _fake(self, *values: Any) -> Tensor | None:
        x = self._check(dict(zip(self.names, values, strict=True)))
        return None if self.written else torch.empty_like(x)

    def _compute(self, *values: Any) -> Tensor:
        """The result, laid out as torch.empty_like(x)."""
        operands = dict(zip(self.names, values, strict=True))
        x = self._check(operands)
        out = torch.empty_like(x)
        if not x.numel():
            return out
        backend = chosen(x.device)
        if backend is reference:
            result: Tensor = getattr(reference, self.name)(*values)
            return result if result.stride() == out.stride() else out.copy_(result)
        self._one_dtype(operands)
        for name in (self.names[0], *self.stages):
            operands[name] = laid_out_like(out, operands[name])
        with torch.cuda.device_of(x):
            getattr(backend, self.name)(*operands.values(), out)
        return out

    def _write(self, *values: Any) -> None:
        """In place, wherever the written operands lie."""
        operands = dict(zip(self.names, values, strict=True))
        x = self._check(operands)
        if not x.numel():
            return
        written = {name: operands[name] for name in self.written if operands[name] is not None}
        states = [name for name in (self.names[0], *self.streams, *self.stages) if operands[name] is not None]
        read = [name for name in states if name not in written]
        operands.update(zip(read, apart([operands[name] for name in read], list(written.values())), strict=True))
        self._one_dtype(operands)
        backend = chosen(x.device)
        if backend is reference:
            getattr(reference, self.name)(*operands.values())
            return
        if self.has_products and operands["g"] is not None and not same_layout(operands["g"], x):
            # The adjoint lies in memory in another order: a launch of its own instead of two copies.
            torch.ops.resode.adjoint_update_(*(operands[name] for name in _PRODUCTS))
            for name in ("g", "v1", "v2"):
                operands[name] = None
            written.pop("g")
        layout = x if is_dense(x) else torch.empty_like(x)
        for name in states:
            operands[name] = laid_out_like(layout, operands[name])
        with torch.cuda.device_of(x):
            getattr(backend, self.name)(*operands.values())
        for name, tensor in written.items():
            if operands[name] is not tensor:
                tensor.copy_(operands[name])

    def _one_dtype(self, operands: dict[str, Any]) -> None:
        if len(self.stages) == 2:
            operands["k1"], operands["k2"] = of_one_dtype(operands["k1"], operands["k2"])

    def _vmap(self, info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
        if self.written:
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
