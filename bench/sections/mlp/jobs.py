"""The sizes at which a residual MLP is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...harness.mlp_networks import SEGMENT, Size
from ...options import Options


@dataclass(frozen=True)
class Job(Size):
    """One size to measure. `compiled`: how many layers are compiled at a time in each compiled peer; None is all.

    Where `is_judged`, the targets apply. Memory and launches are measured where `is_detailed`: they are the same for
    every activation.
    """

    is_judged: bool = True
    is_detailed: bool = False
    compiled: tuple[int | None, ...] = (SEGMENT,)


def jobs(options: Options, device: torch.device) -> list[Job]:
    """All sizes, from the most to the least important."""
    if device.type != "cuda":
        found = [Job(64, 128, 64, 4096, torch.float32, "gelu", is_detailed=True, compiled=(None, SEGMENT))]
        found.append(replace(found[0], activation="silu", is_judged=False, is_detailed=False, compiled=(SEGMENT,)))
    else:
        small = Job(64, 128, 64, 262_144, torch.bfloat16, "silu", is_detailed=True)
        large = replace(small, dim=128, hidden=512)
        found = [small, large]
        for activation in ("gelu_tanh", "gelu"):
            is_judged = activation != "gelu"
            settings: dict[str, Any] = {"activation": activation, "is_judged": is_judged, "is_detailed": False}
            found += [replace(job, **settings, compiled=(SEGMENT,) if is_judged else ()) for job in (small, large)]
        # To compile all layers at once takes longer than all that is timed before.
        found.append(replace(small, is_judged=False, is_detailed=False, compiled=(None,)))
    if options.quick:
        found = [
            replace(job, dim=job.dim // 4, hidden=job.hidden // 4, depth=2 * SEGMENT, rows=256 if index else 64)
            for index, job in enumerate(found)
        ]
    return found
