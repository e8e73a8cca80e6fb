"""The pointwise ops `torch.ops.resode.*`: each is declared here, with its reference and the kernels that compute it.

`schemas.py` has every schema and says what each op computes; `pointwise.py` checks operands and lays them out;
`selection.py` picks the backend: on CUDA the first that can run there, on other devices plain torch.

Results are laid out as `torch.empty_like(x)`, what is mutated stays as it lies. Operands that lie as x does, dense in
whatever order, are taken as they are, and others are copied once into x's layout (into a dense copy and back, where
what is mutated is not dense). A tensor that is read and shares memory with one that is written is copied first.
"""

from __future__ import annotations

import torch

from ..library import BuildInfo, build_info
from . import reference, schemas
from .operands import (
    AdjointUpdateOperands,
    ForwardStepOperands,
    HeunStepOperands,
    ReverseExtrapolateOperands,
    ReverseUpdateOperands,
)
from .pointwise import FunctionalOp, MutatingOp
from .selection import reasons, using
from .storing import STORING_OPS, start_companion, store, store_step, stored_step

__all__ = ["BuildInfo", "backends", "build_info", "start_companion", "store", "store_step", "stored_step", "using"]

library = torch.library.Library("resode", "DEF")

forward_step = FunctionalOp(
    schemas.FORWARD_STEP,
    ForwardStepOperands,
    reference.forward_step,
    lambda backend: backend.forward_step,
    stages=("f",),
)
heun_step = FunctionalOp(
    schemas.HEUN_STEP,
    HeunStepOperands,
    reference.heun_step,
    lambda backend: backend.heun_step,
    stages=("k1", "k2"),
)
reverse_update_ = MutatingOp(
    schemas.REVERSE_UPDATE_,
    ReverseUpdateOperands,
    reference.reverse_update_,
    lambda backend: backend.reverse_update_,
    stages=("k1", "k2"),
    streams=("y", "g", "v1", "v2"),
)
reverse_extrapolate_ = MutatingOp(
    schemas.REVERSE_EXTRAPOLATE_,
    ReverseExtrapolateOperands,
    reference.reverse_extrapolate_,
    lambda backend: backend.reverse_extrapolate_,
    stages=("k1", "k2"),
    streams=("y", "d", "g", "v1", "v2"),
)
adjoint_update_ = MutatingOp(
    schemas.ADJOINT_UPDATE_,
    AdjointUpdateOperands,
    reference.adjoint_update_,
    lambda backend: backend.adjoint_update_,
    streams=("v1", "v2"),
)

_OPS = (forward_step, heun_step, reverse_update_, reverse_extrapolate_, adjoint_update_)
for _op in (*_OPS, *STORING_OPS):
    _op.register(library)


def backends(device: torch.device | str | int | None = None) -> dict[str, dict[str, str | None]]:
    """Backends of each op with kernels, from the first choice to the last, and why one can't run; None where it can.

    Args:
        device: a CUDA device, by default the current one; or "cpu".
    """
    where = torch.device("cuda" if device is None else device)
    names = [*(op.name for op in _OPS), *(op.name for op in STORING_OPS if op.has_kernels)]
    return {name: reasons(where) for name in names}
