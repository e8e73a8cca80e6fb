"""An op: its schema, the checks of its operands, and how it hands them to the backend that computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..layouts import apart, is_dense, laid_out_like, same_layout
from .backend import KernelBackend
from .checks import check_squares, check_states
from .derivatives import register_derivatives
from .operands import (
    HeunStepOperands,
    ReverseExtrapolateOperands,
    ReverseUpdateOperands,
    StoreStepOperands,
    adjoint_operands,
)
from .selection import select

Operands = TypeVar("Operands", bound=NamedTuple)
TWO_STAGES = (HeunStepOperands, ReverseUpdateOperands, ReverseExtrapolateOperands, StoreStepOperands)
REVERSE_UPDATES = (ReverseUpdateOperands, ReverseExtrapolateOperands)


class Op(ABC, Generic[Operands]):
    """An op of the library `resode`. Its first operand is the stream that all others must fit.

    Args:
        schema: one of `schemas.py`.
        operands: the structure of its arguments.
        reference: the function that computes it in plain torch.
        kernel: takes from a backend the function that launches it.
        stages: names of the operands that blocks have returned, of the stream's dtype or a narrower one.
        streams: names of further operands of the stream's dtype.
    """

    def __init__(
        self,
        schema: str,
        operands: type[Operands],
        reference: Callable[[Operands], Any],
        kernel: Callable[[KernelBackend], Callable[..., None]],
        *,
        stages: Sequence[str] = (),
        streams: Sequence[str] = (),
    ) -> None:
        parsed = torch._C.parse_schema(f"resode::{schema}")
        self.schema, self.operands = schema, operands
        self._reference, self._kernel = reference, kernel
        self.qualified_name: str = parsed.name
        self.name = parsed.name.removeprefix("resode::")
        # Places among the operands, with their names where errors need them.
        fields = operands._fields
        self._stages = [(name, fields.index(name)) for name in stages]
        self._streams = [(name, fields.index(name)) for name in streams]
        self._states = [0, *(place for _, place in (*self._streams, *self._stages))]
        self._written = [place for place in self._states if parsed.arguments[place].is_write]
        self._read = [place for place in self._states if place not in self._written]

    def __call__(self, *values: Any) -> Any:
        """Call the op below autograd, whose own bookkeeping would cost as much again."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*values)

    def register(self, library: torch.library.Library) -> None:
        library.define(self.schema)
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified_name, self._fake, lib=library)
        torch.library.register_vmap(self.qualified_name, self._vmap, lib=library)
        self._overload = getattr(torch.ops.resode, self.name).default

    @abstractmethod
    def _run(self, *values: Any) -> Tensor | None: ...

    @abstractmethod
    def _fake(self, *values: Any) -> Tensor | None: ...

    @abstractmethod
    def _vmap(self, info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]: ...

    def _check(self, operands: Operands) -> Tensor:
        """The stream, once all operands fit it."""
        x: Tensor = operands[0]
        stages = [(name, operands[place]) for name, place in self._stages]
        streams = [(name, operands[place]) for name, place in self._streams]
        check_states(self.name, x, stages, streams)
        if isinstance(operands, REVERSE_UPDATES):
            check_squares(self.name, x, operands.squares)
        return x

    def _laid_out(self, operands: Operands, layout: Tensor) -> Operands:
        """The operands with both stages in one dtype and each state laid out as `layout`, a dense tensor."""
        operands = with_stages_of_one_dtype(operands)
        strides, copies = layout.stride(), {}
        for place in self._states:
            state = operands[place]
            if state is not None and state.stride() != strides:
                copies[operands._fields[place]] = laid_out_like(layout, state)
        return operands._replace(**copies) if copies else operands

    def _apart(self, operands: Operands, written: Sequence[Tensor]) -> Operands:
        """The operands with what is read copied where it shares memory with what is written."""
        copies = {}
        for place, tensor in zip(self._read, apart([operands[place] for place in self._read], written), strict=True):
            if tensor is not operands[place]:
                copies[operands._fields[place]] = tensor
        return operands._replace(**copies) if copies else operands


class FunctionalOp(Op[Operands]):
    """An op with a result, differentiable: x + h times the mean of the stages."""

    def register(self, library: torch.library.Library) -> None:
        super().register(library)
        way_out = "write the step with torch's own additions"
        register_derivatives(library, self.name, self._backward, self._save, way_out=way_out)

    def _fake(self, *values: Any) -> Tensor:
        return torch.empty_like(self._check(self.operands(*values)))

    def _run(self, *values: Any) -> Tensor:
        """The result, laid out as torch.empty_like(x)."""
        operands = self.operands(*values)
        x = self._check(operands)
        backend = select(x.device)
        if backend is None:
            result = self._reference(operands)
            if result.stride() == x.stride():
                return result
            out = torch.empty_like(x)
            return result if result.stride() == out.stride() else out.copy_(result)
        out = torch.empty_like(x)
        if out.numel():
            with torch.cuda.device_of(x):
                self._kernel(backend)(self._laid_out(operands, out), out)
        return out

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *stages, ctx.h = inputs
        ctx.stage_dtypes = [stage.dtype for stage in stages]

    def _backward(self, ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the stages and h, which has none."""
        wanted = ctx.needs_input_grad[1:-1]
        scaled = ctx.h / len(self._stages) * g if any(wanted) else g
        stages = (scaled.to(dtype) if wants else None for wants, dtype in zip(wanted, ctx.stage_dtypes, strict=True))
        return g, *stages, None

    def _vmap(self, info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
        batched = [
            value
            if not isinstance(value, Tensor)
            else value.expand(info.batch_size, *value.shape)
            if dim is None
            else value.movedim(dim, 0)
            for value, dim in zip(values, dims, strict=True)
        ]
        return getattr(torch.ops.resode, self.name)(*batched), 0


class MutatingOp(Op[Operands]):
    """An op that writes what its schema marks, wherever that lies, and returns nothing."""

    def _fake(self, *values: Any) -> None:
        self._check(self.operands(*values))

    def _run(self, *values: Any) -> None:
        given = self.operands(*values)
        x = self._check(given)
        if not x.numel():
            return
        written = [place for place in self._written if given[place] is not None]
        operands = self._apart(given, [given[place] for place in written])
        backend = select(x.device)
        if backend is None:
            self._reference(operands)
            return
        operands = _with_adjoint_of_one_layout(operands)
        operands = self._laid_out(operands, x if is_dense(x) else torch.empty_like(x))
        with torch.cuda.device_of(x):
            self._kernel(backend)(operands)
        for place in written:
            if operands[place] is not None and operands[place] is not given[place]:
                given[place].copy_(operands[place])
            torch.autograd.graph.increment_version(given[place])  # autograd does not see what kernels write

    def _vmap(self, info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
        raise NotImplementedError(
            f"{self.name}: torch.vmap must not reach an op that mutates; it is the backward step's own"
        )


def with_stages_of_one_dtype(operands: Operands) -> Operands:
    """The operands with both stages in the wider one's dtype."""
    if not isinstance(operands, TWO_STAGES) or operands.k2 is None or operands.k1.dtype == operands.k2.dtype:
        return operands
    dtype = torch.promote_types(operands.k1.dtype, operands.k2.dtype)
    changed: Any = operands._replace(k1=operands.k1.to(dtype), k2=operands.k2.to(dtype))
    return changed


def _with_adjoint_of_one_layout(operands: Operands) -> Operands:
    """The operands without an adjoint that lies in memory in another order than x, which is updated here.

    That is a launch of its own instead of two copies.
    """
    if not isinstance(operands, REVERSE_UPDATES) or operands.g is None or same_layout(operands.g, operands.x):
        return operands
    torch.ops.resode.adjoint_update_(*adjoint_operands(operands.g, operands))
    changed: Any = operands._replace(g=None, v1=None, v2=None)
    return changed
