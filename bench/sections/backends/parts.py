"""The backends of a residual MLP beside each other, and beside plain backprop where rows are few or layers wide.

Parts, each under a time budget of its own: few rows, where launches and latency decide; a forward pass alone; wide
layers, whose matrix products are torch's; and a table of sizes, from which to choose a backend. Where nothing else is
said, a step is a forward and a backward pass with the extrapolated solver.
"""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress

from ...harness.arms import failures
from ...options import Options
from . import few_rows, size_table, wide_layers
from .backend_arms import MODE, size_of
from .compile_ahead import compile_ahead

Part = Callable[[Options, torch.device, float], dict[str, Any]]
SECONDS = 110
"""Time after which no size of the table is begun."""
PARTS: dict[str, tuple[Part, float]] = {
    "few_rows": (few_rows.measure_training, 20),
    "forward": (few_rows.measure_forward, 10),
    "wide": (wide_layers.measure, 40),
    "sizes": (size_table.measure, SECONDS),
}
"""Each part and the seconds after which it begins nothing more, from the most to the least important."""


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    if device.type != "cuda" and not options.quick:
        return {"device": device.type, "left_out": "needs a GPU: on a CPU there is one backend only"}
    until = time.perf_counter() + SECONDS
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    figures: dict[str, Any] = {"device": device.type, "capability": capability}
    failed = []
    measuring = progress.add_task("backends", total=len(PARTS) + 1)
    if device.type == "cuda" and not options.quick:
        dims = (dim for dim in size_table.DIMS if dim <= size_table.LARGEST_ON_CHIP)
        sizes = [size_of(dim, 2 * dim, 16, rows, device) for dim in dims for rows in (16, 16384)]
        compile_ahead([*sizes, few_rows.forward_size(options, device)], MODE, device)
    progress.advance(measuring)
    for name, (part, seconds) in PARTS.items():
        try:
            with warnings.catch_warnings():
                # Of the compiler's own look at the inputs of a compiled segment.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                figures[name] = part(options, device, min(until, time.perf_counter() + seconds))
            failed += failures(figures[name]["rows"])
            figures["stopped"] = figures[name].get("stopped", False)
        except Exception:
            # A part that fails must not take the others' figures with it.
            failed.append(f"{name}: {traceback.format_exc()}")
        except KeyboardInterrupt:  # whoever stops it wants what there is
            figures["stopped"] = True
        if figures.get("stopped"):
            failed.append(f"stopped during {name}")
            break
        gc.collect()  # compiled functions are in cycles
        torch.cuda.empty_cache()
        progress.advance(measuring)
    return {**figures, "failure": "\n".join(failed)} if failed else figures
