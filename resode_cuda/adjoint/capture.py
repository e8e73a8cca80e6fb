"""CUDA-graph capture: what must not happen while a training step is recorded instead of run.

A graph repeats the launches that it was captured with. Nothing may wait for the device, judge what it measured or read
its random state meanwhile, and no block may draw: each replay draws new numbers, of which no state was kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..devices import is_capturing


def draws_are_replayable() -> AbstractContextManager[Any]:
    """Raises RuntimeError in a block that draws random numbers while a graph is captured."""
    return _NoDraws() if is_capturing() else nullcontext()


class _NoDraws(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if "dropout_p" not in names or given.get("dropout_p"):  # attention has the tag without dropout too
                raise RuntimeError(
                    f"ResidualStack: blocks must not draw random numbers while a CUDA graph is captured, got {func}; "
                    'switch dropout off, capture with gradient="backprop", or run the stack outside the graph'
                )
        return func(*args, **kwargs)
