"""What the ranks of a process group decide together: by the worst of what each of them has measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


class WorstRank:
    """Decisions that are the same on all ranks of a group, which must come by them in the same order.

    Args:
        where: what errors begin with.
        group: None decides by this process alone.
        device: where the group's collectives take their tensors.
    """

    def __init__(self, where: str, group: distributed.ProcessGroup | None, device: torch.device) -> None:
        self._where, self._group, self._device = where, group, device

    def of(self, values: Sequence[float]) -> list[float]:
        """The largest of each value, by one collective. NaN counts as infinite. As many values on each rank."""
        if self._group is None:
            return list(values)
        finite = [math.inf if math.isnan(value) else float(value) for value in values]
        found = torch.tensor(finite, dtype=torch.float64, device=self._device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, self._group)
        worst: list[float] = found.tolist()
        return worst

    def together(self, run: Callable[[], T]) -> T:
        """run(), which fails on all ranks if it does on one.

        Raises:
            RuntimeError: if it failed on another rank; what it raises on this one is raised as it is.
        """
        found, failure = None, None
        try:
            found = run()
        except Exception as error:
            failure = error
        (has_failed,) = self.of([float(failure is not None)])
        if failure is not None:
            raise failure
        if has_failed:
            raise RuntimeError(
                f"{self._where}: all ranks of the group must be able to run it, got an error on another one; see what "
                "that rank raised"
            )
        return found  # type: ignore[return-value]
