"""The ops that store increments in a few bits, and take them back. They are functional and have no gradient.

On CUDA devices kernels compute them, in one pass over memory, but for `start_companion`: once in a forward pass, it is
left to plain torch everywhere. Kernels walk through samples in the companion's order in memory; what lies otherwise is
copied once, and results that must lie otherwise are too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import stored
from ..dtypes import dtype_name, dtype_names
from ..layouts import laid_out_like
from . import schemas
from .backend import KernelBackend
from .checks import check_states
from .operands import StoredStepOperands, StoreOperands, StoreResults, StoreStepOperands
from .pointwise import with_stages_of_one_dtype
from .selection import select

MOST_GROUPS = 2**31 - 2**16
"""Kernels count groups in 32 bits, to the end of a launch's last tile. Unless they are short, these are 256 GiB."""


class StoringOp:
    """An op of the library `resode`. Its first operand is the tensor whose device and shape are those of all others.

    Args:
        schema: one of `schemas.py`.
        reference: computes it in plain torch, after `check` has passed the same arguments.
        check: raises for arguments that do not fit each other.
        fake: as reference, for tensors without values; the same checks are made before.
        by_kernel: as reference, by the kernels of a backend; None if there are none.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        check: Callable[..., None],
        fake: Callable[..., Any],
        by_kernel: Callable[..., Any] | None = None,
    ) -> None:
        self.schema, self.name = schema, schema.split("(")[0]
        self._reference, self._check, self._make_fake = reference, check, fake
        self._by_kernel = by_kernel

    @property
    def has_kernels(self) -> bool:
        return self._by_kernel is not None

    def __call__(self, *values: Any) -> Any:
        """Call the op below autograd, whose own bookkeeping would cost as much again."""
        if torch.compiler.is_compiling():
            return self._overload(*values)
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*values)

    def register(self, library: torch.library.Library) -> None:
        library.define(self.schema)
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resode::{self.name}", self._fake, lib=library)
        self._overload = getattr(torch.ops.resode, self.name).default

    def _run(self, *values: Any) -> Any:
        self._check(*values)
        backend = None if self._by_kernel is None else select(values[0].device)
        with torch.no_grad():
            if backend is None or self._by_kernel is None:
                return self._reference(*values)
            with torch.cuda.device_of(values[0]):
                return self._by_kernel(backend, *values)

    def _fake(self, *values: Any) -> Any:
        self._check(*values)
        return self._make_fake(*values)


def _store_step(
    x: Tensor, k1: Tensor, k2: Tensor | None, weight: float, companion: Tensor, unit: Tensor, bits: int
) -> tuple[Tensor, ...]:
    x_next = x.add(k1 if k2 is None else k1.to(x.dtype).add(k2), alpha=weight)
    return x_next, *stored.store(x_next, companion, unit, bits)


def _check_companion(op: str, x: Tensor, companion: Tensor, unit: Tensor, bits: int) -> None:
    if bits not in stored.BITS:
        raise ValueError(f"{op}: bits must be among {stored.BITS}, got {bits}")
    dtype = stored.companion_dtype(x.dtype)
    if companion.dtype != dtype or unit.dtype != dtype:
        raise TypeError(
            f"{op}: companion and unit must be {dtype_name(dtype)} for states in {dtype_name(x.dtype)}, got "
            f"{dtype_name(companion.dtype)} and {dtype_name(unit.dtype)}; make them by stored.start"
        )
    if companion.shape != x.shape or companion.device != x.device:
        raise ValueError(
            f"{op}: companion must have the shape and device of x, got {list(companion.shape)} on {companion.device} "
            f"with x {list(x.shape)} on {x.device}"
        )
    if not stored.is_companion_layout(companion):
        raise ValueError(
            f"{op}: companion must lie in memory sample after sample, as start_companion lays it out, got strides "
            f"{list(companion.stride())} for shape {list(companion.shape)}"
        )
    groups = stored.sample_count(x), stored.group_count(x)
    if unit.shape != groups or unit.device != x.device:
        raise ValueError(f"{op}: unit must have shape {list(groups)} on {x.device}, got {list(unit.shape)}")


def _check_store(x: Tensor, companion: Tensor, unit: Tensor, bits: int) -> None:
    check_states("store", x, [], [])
    _check_companion("store", x, companion, unit, bits)


def _check_store_step(
    x: Tensor, k1: Tensor, k2: Tensor | None, weight: float, companion: Tensor, unit: Tensor, bits: int
) -> None:
    check_states("store_step", x, [("k1", k1), ("k2", k2)], [])
    _check_companion("store_step", x, companion, unit, bits)


def _check_stored_step(companion: Tensor, packed: Tensor, scales: Tensor, unit: Tensor, bits: int) -> None:
    if companion.dtype not in stored.UNITS:
        raise TypeError(
            f"stored_step: companion must be one of {dtype_names(stored.UNITS)}, got {dtype_name(companion.dtype)}"
        )
    _check_companion("stored_step", companion, companion, unit, bits)
    scales_shape = stored.sample_count(companion), stored.group_count(companion)
    for name, tensor, shape in (("packed", packed, (*scales_shape, 4 * bits)), ("scales", scales, scales_shape)):
        if tensor.shape != shape or tensor.dtype != torch.uint8 or tensor.device != companion.device:
            raise ValueError(
                f"stored_step: {name} must be uint8 of shape {list(shape)} on {companion.device}, got "
                f"{dtype_name(tensor.dtype)} of shape {list(tensor.shape)} on {tensor.device}"
            )


def _check_start(x: Tensor, x_next: Tensor | None = None) -> None:
    check_states("start_companion", x, [], [("x_next", x_next)])


def _fake_start(x: Tensor, x_next: Tensor | None = None) -> tuple[Tensor, Tensor]:
    dtype = stored.companion_dtype(x.dtype)
    shape = stored.sample_count(x), stored.group_count(x)
    return stored.empty_companion(x, dtype), x.new_empty(shape, dtype=dtype)


def _empty_increment(x: Tensor, companion: Tensor, unit: Tensor, bits: int) -> StoreResults:
    shape = stored.sample_count(x), stored.group_count(x)
    packed = x.new_empty((*shape, 4 * bits), dtype=torch.uint8)
    return StoreResults(torch.empty_like(companion), packed, x.new_empty(shape, dtype=torch.uint8))


def _empty_step(
    x: Tensor, k1: Tensor, k2: Tensor | None, weight: float, companion: Tensor, unit: Tensor, bits: int
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_empty_increment(x, companion, unit, bits)


def _store_by_kernel(
    backend: KernelBackend, x: Tensor, companion: Tensor, unit: Tensor, bits: int
) -> tuple[Tensor, ...]:
    dense = _dense_companion("store", companion)
    out = _empty_increment(x, dense, unit, bits)
    if x.numel():
        backend.store(StoreOperands(_like(dense, x), dense, unit.contiguous(), bits), out)
    return _restored(companion, out.companion), out.packed, out.scales


def _store_step_by_kernel(backend: KernelBackend, *values: Any) -> tuple[Tensor, ...]:
    given = StoreStepOperands(*values)
    operands = with_stages_of_one_dtype(given)
    dense = _dense_companion("store_step", given.companion)
    out = _empty_increment(given.x, dense, given.unit, given.bits)
    x_next = torch.empty_like(dense, dtype=given.x.dtype)
    if dense.numel():
        k2 = None if operands.k2 is None else _like(dense, operands.k2)
        operands = operands._replace(x=_like(dense, given.x), k1=_like(dense, operands.k1), k2=k2)
        operands = operands._replace(companion=dense, unit=given.unit.contiguous())
        backend.store_step(operands, x_next, out)
    return _restored(given.x, x_next), _restored(given.companion, out.companion), out.packed, out.scales


def _stored_step_by_kernel(
    backend: KernelBackend, companion: Tensor, packed: Tensor, scales: Tensor, unit: Tensor, bits: int
) -> Tensor:
    dense = _dense_companion("stored_step", companion)
    out = torch.empty_like(dense)
    if dense.numel():
        operands = StoredStepOperands(dense, packed.contiguous(), scales.contiguous(), unit.contiguous(), bits)
        backend.stored_step(operands, out)
    return _restored(companion, out)


def _dense_companion(op: str, companion: Tensor) -> Tensor:
    """The companion as kernels take it, copied where it does not lie sample after sample, in its own order."""
    groups = stored.sample_count(companion) * stored.group_count(companion)
    if groups > MOST_GROUPS:
        raise ValueError(
            f"{op}: all samples must have {MOST_GROUPS} groups of {stored.GROUP} values at most, got {groups}; "
            "split them"
        )
    if stored.is_companion_layout(companion):
        return companion
    return stored.empty_companion(companion, companion.dtype).copy_(companion)


def _like(layout: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, copied where its strides are not those of `layout`, a dense tensor."""
    same: Any = laid_out_like(layout, tensor)
    return same


def _restored(given: Tensor, result: Tensor) -> Tensor:
    """The result, laid out as torch.empty_like(given)."""
    return result if result.stride() == given.stride() else torch.empty_like(given).copy_(result)


start_companion = StoringOp(schemas.START_COMPANION, stored.start, _check_start, _fake_start)
store = StoringOp(schemas.STORE, stored.store, _check_store, _empty_increment, _store_by_kernel)
store_step = StoringOp(schemas.STORE_STEP, _store_step, _check_store_step, _empty_step, _store_step_by_kernel)
stored_step = StoringOp(
    schemas.STORED_STEP,
    stored.take_back,
    _check_stored_step,
    lambda companion, *_: torch.empty_like(companion),
    _stored_step_by_kernel,
)
STORING_OPS = (start_companion, store, store_step, stored_step)
