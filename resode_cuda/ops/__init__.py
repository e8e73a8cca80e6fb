"""The registered ops, `torch.ops.resode.*`: schemas, fakes, gradients and implementations, all on this page.

| op | computes | passes over a state in memory |
|---|---|---|
| forward_step(x, f, h) | x + h f | 3 |
| heun_step(x, k1, k2, h) | x + h/2 (k1 + k2) | 4 |
| reverse_update_ | x <- x - w (k1 + k2) and the defect's norms; g <- s g + t (v1 + v2) | 4 and 3; Heun 5 and 4 |
| reverse_extrapolate_ | the same, y <- x - (a d' - b d), d <- d' = w (k1 + k2) | 7 and 3; Heun 8 and 4 |
| adjoint_update_ | g <- s g + t (v1 + v2) | 3; Heun 4 |

The first two are functional and differentiable, to any order. The others mutate, have no gradient, and are the backward
step's own. The formulas and the names are those of `reference.py`, the specification.

A backward step outside its blocks, in passes, with k corrections:

| | predict | correct | update | in all |
|---|---|---|---|---|
| Euler, reverse step | 3 | 3 k | 7 | 10 + 3 k |
| Euler, extrapolation | 0: the step before did | 3 k | 10 | 10 + 3 k |
| Heun, reverse step | 3 + 4 | (3 + 4) k | 3 + 3 + 9 | 22 + 7 k |
| Heun, extrapolation | 0 | (3 + 4) k | 3 + 3 + 12 | 18 + 7 k |

Heun's 3 + 3 are x + h k1 and the cotangent of k1. A pass is one read or write of a tensor of the state's shape, in its
own dtype. No op reads or writes a buffer twice, which `tests/ops/test_ops.py` counts.

Results are laid out as `torch.empty_like(x)`, what is mutated stays as it lies. Kernels walk through memory: operands
that lie as x does, dense in whatever order, are taken as they are, and others are copied once into x's layout (into a
dense copy and back, where what is mutated is not dense). A tensor that is read and shares memory with one that is
written is copied first.

On CUDA the first backend runs that can (`backend.py`); other devices run the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..library import BuildInfo, build_info
from .op import Op
from .selection import causes, using

__all__ = ["BuildInfo", "backends", "build_info", "using"]

library = torch.library.Library("resode", "DEF")

forward_step = Op("forward_step(Tensor x, Tensor f, float h) -> Tensor", stages=("f",))
heun_step = Op("heun_step(Tensor x, Tensor k1, Tensor k2, float h) -> Tensor", stages=("k1", "k2"))
reverse_update_ = Op(
    "reverse_update_(Tensor(a!) x, Tensor y, Tensor k1, Tensor? k2, float weight, Tensor(b!) norms, "
    "Tensor(c!)? g, Tensor? v1, Tensor? v2, float g_scale, float v_scale) -> ()",
    stages=("k1", "k2"),
    streams=("y",),
)
reverse_extrapolate_ = Op(
    "reverse_extrapolate_(Tensor(a!) x, Tensor(b!) y, Tensor(c!) d, Tensor k1, Tensor? k2, float weight, "
    "float a, float b, Tensor(d!) norms, "
    "Tensor(e!)? g, Tensor? v1, Tensor? v2, float g_scale, float v_scale) -> ()",
    stages=("k1", "k2"),
    streams=("y", "d"),
)
adjoint_update_ = Op(
    "adjoint_update_(Tensor(a!) g, Tensor? v1, Tensor? v2, float g_scale, float v_scale) -> ()", streams=("v1", "v2")
)

_OPS = (forward_step, heun_step, reverse_update_, reverse_extrapolate_, adjoint_update_)
for _op in _OPS:
    _op.register(library)


def backends(device: torch.device | str | int | None = None) -> dict[str, dict[str, str | None]]:
    """For each op its backends, from the first choice to the last, and why one can't run; None where it can.

    Args:
        device: a CUDA device, by default the current one; or "cpu".
    """
    where = torch.device("cuda" if device is None else device)
    return {op.name: causes(where) for op in _OPS}


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *stages, ctx.h = inputs
    ctx.stage_dtypes = [stage.dtype for stage in stages]


def _gradients(ctx: Any, g: Tensor, weight: float) -> tuple[Tensor | None, ...]:
    """Of x, the stages and h; each stage had this weight in the sum."""
    wanted = ctx.needs_input_grad[1:-1]
    scaled = weight * g if any(wanted) else g
    stages = (scaled.to(dtype) if wants else None for wants, dtype in zip(wanted, ctx.stage_dtypes, strict=True))
    return g, *stages, None


for _op, _weight in ((forward_step, 1.0), (heun_step, 0.5)):
    torch.library.register_autograd(
        _op.qualified_name,
        lambda ctx, g, weight=_weight: _gradients(ctx, g, weight * ctx.h),
        setup_context=_context,
        lib=library,
    )
