"""Blocks that run collectives, which all ranks have to come by in the same order.

So no rank may go on by itself with another solver, which evaluates blocks another number of times, nor stop an
evaluation where another one goes on.
"""

from __future__ import annotations

import math

import torch
from torch import distributed, nn

from ..layouts import is_distributed
from ..worst_rank import WorstRank


def on_any_rank(is_so: bool, module: nn.Module, device: torch.device) -> bool:
    """Whether it is so on any of the ranks that a module's parameters are distributed over, or that its batch norms
    synchronise with in train mode. All of them must ask.

    Args:
        device: of the states, where the ranks' collectives take their tensors.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return is_so
    meshes = [parameter.device_mesh for parameter in module.parameters() if is_distributed(parameter)]  # type: ignore[attr-defined]
    norms = [inner for inner in module.modules() if isinstance(inner, nn.SyncBatchNorm) and inner.training]
    groups = [group for mesh in dict.fromkeys(meshes) for group in mesh.get_all_groups()]
    for group in dict.fromkeys([*groups, *(norm.process_group or distributed.group.WORLD for norm in norms)]):
        is_so = any(WorstRank("ResidualStack", group, device).of([float(is_so)]))
    return is_so


def collectives_so_far() -> float:
    """How many collectives this process has taken part in, in all of its groups; NaN, which equals no other number, if
    a group does not count them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    groups = distributed.distributed_c10d._world.pg_map
    try:
        return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]
    except RuntimeError:
        return math.nan
