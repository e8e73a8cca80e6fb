"""Memory of one training step, from the allocator itself, over what was allocated before it.

On a CPU the profiler records every allocation and release that torch makes; their running sum has a peak, and a value
where the forward pass ends. Each storage counts once however many tensors view it, and releases count at once. What
oneDNN and OpenMP allocate for themselves is not seen; `resident` measures what the operating system sees. On a GPU the
caching allocator keeps the same two figures.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

_FORWARD_ENDS = "bench: forward pass ends"


@dataclass(frozen=True)
class StepMemory:
    """Bytes over what was allocated before the step."""

    peak: int
    held: int
    """Bytes of storages alive between the forward and the backward pass; the output and the loss are among them."""


def measure(forward: Callable[[], Tensor], device: torch.device, cotangent: Tensor | None = None) -> StepMemory:
    """Memory of `forward().backward(cotangent)`; forward returns the loss, or what the cotangent belongs to.

    Take a step before, so that buffers that are allocated once are there, the gradients of parameters among them.
    """
    return _measure_cuda(forward, device, cotangent) if device.type == "cuda" else _measure_cpu(forward, cotangent)


def _measure_cpu(forward: Callable[[], Tensor], cotangent: Tensor | None) -> StepMemory:
    with _without_profiler_notes(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = forward()
        with record_function(_FORWARD_ENDS):
            pass
        loss.backward(cotangent)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    now = peak = 0
    held = None
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
        elif event.name() == _FORWARD_ENDS:
            held = now
    if held is None:
        raise RuntimeError("bench.memory: the profiler must record the end of the forward pass, but did not")
    return StepMemory(peak, held)


def _measure_cuda(forward: Callable[[], Tensor], device: torch.device, cotangent: Tensor | None) -> StepMemory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = forward()
    held = torch.cuda.memory_allocated(device) - before
    loss.backward(cotangent)
    return StepMemory(torch.cuda.max_memory_allocated(device) - before, held)


@contextmanager
def _without_profiler_notes() -> Iterator[None]:
    """Some builds of torch write two lines for each profile past sys.stderr, to the file descriptor; drop those."""
    sys.stderr.flush()
    descriptor = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(descriptor, 2)
            os.close(descriptor)
            written.seek(0)
            for line in written:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)
