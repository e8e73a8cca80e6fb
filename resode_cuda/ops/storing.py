"""The ops that store increments in a few bits, and take them back. They are functional and have no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import stored
from ..dtypes import dtype_name, dtype_names
from . import schemas
from .checks import check_states


class StoringOp:
    """An op of the library `resode`, which plain torch computes everywhere.

    Args:
        schema: one of `schemas.py`.
        reference: computes it, after `check` has passed the same arguments.
        check: raises for arguments that do not fit each other.
        fake: as reference, for tensors without values; the same checks are made before.
    """

    def __init__(
        self, schema: str, reference: Callable[..., Any], check: Callable[..., None], fake: Callable[..., Any]
    ) -> None:
        self.schema, self.name = schema, schema.split("(")[0]
        self._reference, self._check, self._make_fake = reference, check, fake

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
        with torch.no_grad():
            return self._reference(*values)

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
    samples = stored.sample_count(x)
    if unit.shape != (samples,) or unit.device != x.device:
        raise ValueError(f"{op}: unit must have shape [{samples}] on {x.device}, got {list(unit.shape)}")


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


def _fake_start(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = stored.companion_dtype(x.dtype)
    return stored.empty_companion(x, dtype), x.new_empty(stored.sample_count(x), dtype=dtype)


def _fake_store(x: Tensor, companion: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, ...]:
    shape = stored.sample_count(x), stored.group_count(x)
    packed = x.new_empty((*shape, 4 * bits), dtype=torch.uint8)
    return torch.empty_like(companion), packed, x.new_empty(shape, dtype=torch.uint8)


def _fake_store_step(
    x: Tensor, k1: Tensor, k2: Tensor | None, weight: float, companion: Tensor, unit: Tensor, bits: int
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_fake_store(x, companion, unit, bits)


start_companion = StoringOp(
    schemas.START_COMPANION, stored.start, lambda x: check_states("start_companion", x, [], []), _fake_start
)
store = StoringOp(schemas.STORE, stored.store, _check_store, _fake_store)
store_step = StoringOp(schemas.STORE_STEP, _store_step, _check_store_step, _fake_store_step)
stored_step = StoringOp(
    schemas.STORED_STEP, stored.take_back, _check_stored_step, lambda companion, *_: torch.empty_like(companion)
)
STORING_OPS = (start_companion, store, store_step, stored_step)
