"""Whether transformers collects what modules inside layers compute, by hooks of its own, in the pass at hand."""

from __future__ import annotations

import sys

CAPTURING = "transformers.utils.output_capturing"


def are_outputs_captured() -> bool:
    """Whether the model was asked for attention maps or the like: they have gradients in the layers' own pass alone.

    States between layers are tensors that the layers return.
    """
    collector = getattr(sys.modules.get(CAPTURING), "_active_collector", None)
    collected = None if collector is None else collector.get()
    return any("hidden_states" not in name for name in collected or ())
