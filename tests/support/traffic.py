"""What the backend for wide layers reads and writes of memory, counted while it runs in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.support.traffic   prints what the table of docs/kernels.md is made of

A unit is 4 bytes for each value of [rows, dim] (a state in float32) or of [rows, hidden]. Torch's operators are taken
by their schemas: each operand is read once, each result written once. Of Triton's kernels every load and store is
counted as it is executed. Parameters, rows and what has one value a row are left out. Counted, not measured: a cache
may hold some of it, and a matrix product may read an operand more than once.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from resode_cuda import squares
from resode_cuda.fused.reference import passes as reference
from resode_cuda.fused.reference import tile
from resode_cuda.fused.signature import Wanted
from resode_cuda.fused.triton.wide import WideTile
from resode_cuda.reverse import PRESETS
from tests.support.fused_cases import Case

ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_"}
OVERWRITING = {"copy_", "zero_", "fill_"}
"""Operators that do not read what they write to."""
PRODUCTS = {"mm", "addmm", "addmm_"}


@dataclass(frozen=True)
class Units:
    """Memory read and written: of tensors like a state, and of those like the hidden activations."""

    states: float
    hidden: float

    def __sub__(self, other):
        return Units(self.states - other.states, self.hidden - other.hidden)


class Traffic(TorchDispatchMode):
    """Counts all that runs within it; `only_products` leaves out what is no matrix product."""

    def __init__(self, case, only_products=False):
        super().__init__()
        self.sizes = {case.rows * case.dim: "states", case.rows * case.hidden: "hidden"}
        assert len(self.sizes) == 2
        self.only_products = only_products
        self.bytes = {"states": 0, "hidden": 0}
        self.launched = []

    @property
    def units(self):
        states, hidden = self.sizes
        return Units(self.bytes["states"] / (4 * states), self.bytes["hidden"] / (4 * hidden))

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        enter = self.patches.enter_context
        launch, load, store = (
            WideTile._launch,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )

        def watched_launch(wide_tile, kernel, grid, warps, *values):
            self.launched = [value for value in values if isinstance(value, torch.Tensor)]
            launch(wide_tile, kernel, grid, warps, *values)

        def watched_load(builder, pointers, mask, *rest):
            self._count_access(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def watched_store(builder, pointers, value, mask, *rest):
            self._count_access(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        enter(mock.patch.object(WideTile, "_launch", watched_launch))
        enter(mock.patch.object(InterpreterBuilder, "create_masked_load", watched_load))
        enter(mock.patch.object(InterpreterBuilder, "create_masked_store", watched_store))
        # The CPU stands for a GPU, which adds 16-bit products to float32 and whose squares are taken in float64.
        enter(mock.patch.object(tile, "adds_to_wider", return_value=True))
        enter(mock.patch.object(squares, "READ_FREELY", ()))
        return super().__enter__()

    def __exit__(self, *details):
        super().__exit__(*details)
        self.patches.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = _as_on_a_gpu(function, args, kwargs)
        self._count_operator(function, args, kwargs, result)
        return result

    def _count_operator(self, function, args, kwargs, result):
        schema, name = function._schema, function.overloadpacket.__name__
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
        if is_view or name in ALLOCATIONS or (self.only_products and name not in PRODUCTS):
            return
        read, written = [], []
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if not isinstance(value, torch.Tensor):
                continue
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written:
                written.append(value)
            is_ignored = argument.name == "self" and kwargs.get("beta") == 0
            if not is_ignored and not (is_written and (argument.kwarg_only or name in OVERWRITING)):
                read.append(value)
        results = result if isinstance(result, (tuple, list)) else (result,)
        fresh = [out for out, declared in zip(results, schema.returns, strict=False) if declared.alias_info is None]
        once = {(value.data_ptr(), value.numel()): value for value in read}
        for value in (*once.values(), *written, *fresh):
            if isinstance(value, torch.Tensor) and value.numel() in self.sizes:
                self.bytes[self.sizes[value.numel()]] += value.numel() * value.itemsize

    def _count_access(self, pointers, mask):
        """An access by a kernel, attributed by its first address."""
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data, bool)]
        if self.only_products or not addresses.size:
            return
        for value in self.launched:
            if value.data_ptr() <= addresses.flat[0] < value.data_ptr() + value.nbytes and value.numel() in self.sizes:
                self.bytes[self.sizes[value.numel()]] += addresses.size * value.itemsize
                return


def _as_on_a_gpu(function, args, kwargs):
    """The result of an operator, also of one that torch has on GPUs alone."""
    if function is torch.ops.aten.addmm.dtype_out:
        acc, a, b, dtype = args
        return kwargs["out"].copy_(acc * kwargs.get("beta", 1) + kwargs["alpha"] * (a.to(dtype) @ b.to(dtype)))
    return function(*args, **kwargs)


def per_step(mode, reverse="corrected", norm="rms", dtype=torch.float32, only_products=False):
    """Units of an Euler step of the "forward" pass, the "adjoint" or the "exact" adjoint."""

    def count(steps):
        case = Case(reverse=reverse, norm=norm, steps=steps, dim=40, hidden=56, rows=12)
        network, x, g = case.operands(dtype)
        method = network.method(case.solver)
        states = reference.forward(network, method, x, kind=WideTile)
        wanted = Wanted(parameters=True)
        with Traffic(case, only_products) as traffic:
            if mode == "forward":
                reference.forward(network, method, x, kind=WideTile)
            elif mode == "adjoint":
                reference.adjoint(network, method, g, states, wanted, kind=WideTile)
            else:
                reference.exact_adjoint(network, method, g, x, True, kind=WideTile)
        return traffic.units

    return count(5) - count(4)  # the first and the last steps differ, and cancel


MODES = (
    ("forward", "corrected"),
    ("forward", "stored"),
    *(("adjoint", preset) for preset in PRESETS),
    ("exact", "corrected"),
)


def main():
    for dtype, norm, (mode, reverse) in itertools.product((torch.float32, torch.float16), ("rms", None), MODES):
        found, least = (per_step(mode, reverse, norm, dtype, only_products) for only_products in (False, True))
        print(f"{dtype!s:13} {norm or 'no norm':8} {mode:8} {reverse:13}", end="")
        print(f"{found.states:5} of states {found.hidden:5} of hidden; products {least.states:5} {least.hidden:5}")


if __name__ == "__main__":
    main()
