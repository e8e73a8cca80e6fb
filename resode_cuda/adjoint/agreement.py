"""Blocks that run collectives, which all ranks have to come by in the same order.

So no rank may go on by itself with another solver, which evaluates blocks another number of times, nor stop an
evaluation where another one goes on.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from ..layouts import is_distributed


def on_any_rank(is_so: bool, parameters: Iterable[Tensor]) -> bool:
    """Whether it is so on any of the ranks that parameters are distributed over. All of them must ask."""
    meshes = dict.fromkeys(parameter.device_mesh for parameter in parameters if is_distributed(parameter))  # type: ignore[attr-defined]
    for mesh in meshes:
        found = torch.tensor(is_so, dtype=torch.int32, device=mesh.device_type)
        for group in mesh.get_all_groups():
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
        is_so = bool(found.item())
    return is_so


def collectives_so_far() -> int:
    """How many collectives this process has taken part in, in all of its groups."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    groups = distributed.distributed_c10d._world.pg_map
    return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]
