"""The registered ops, `torch.ops.resode.*`: schema, fake, gradient and implementations, all on this page.

| op | computes | gradient |
|---|---|---|
| forward_step(x, f, h) | x + h f | g to x, h g to f |

Arguments, dtypes and numerics: `reference.py`. Errors: `operands.py`. The result is laid out as `torch.empty_like(x)`.
On CUDA the compiled kernel runs if the library loads, otherwise, with one notice, the reference; other devices run the
reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled, reference
from .compiled import BuildInfo, build_info
from .operands import check_stream

__all__ = ["BuildInfo", "build_info"]

library = torch.library.Library("resode", "DEF")
library.define("forward_step(Tensor x, Tensor f, float h) -> Tensor")


def _forward_step_fake(x: Tensor, f: Tensor, h: float) -> Tensor:
    check_stream("forward_step", x, f)
    return torch.empty_like(x)


def _forward_step_reference(x: Tensor, f: Tensor, h: float) -> Tensor:
    check_stream("forward_step", x, f)
    out = reference.forward_step(x, f, h)
    layout = torch.empty_like(x)
    return out if out.stride() == layout.stride() else layout.copy_(out)


def _forward_step_cuda(x: Tensor, f: Tensor, h: float) -> Tensor:
    if not compiled.available():
        compiled.notice_reference_runs()
        return _forward_step_reference(x, f, h)
    check_stream("forward_step", x, f)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        return compiled.forward_step(compiled.require("forward_step"), x, f, h, stream)


def _forward_step_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, f, ctx.h = inputs
    ctx.f_dtype = f.dtype


def _forward_step_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    return g, (ctx.h * g).to(ctx.f_dtype) if ctx.needs_input_grad[1] else None, None


library.impl("forward_step", _forward_step_reference, "CompositeExplicitAutograd")
library.impl("forward_step", _forward_step_cuda, "CUDA")
torch.library.register_fake("resode::forward_step", _forward_step_fake, lib=library)
torch.library.register_autograd(
    "resode::forward_step", _forward_step_backward, setup_context=_forward_step_context, lib=library
)
