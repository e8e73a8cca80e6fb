"""What kernels of a depth-fused stack read of its method: the schedule of its steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..devices import is_capturing
from ..method import Method


def schedule(method: Method, device: torch.device) -> Tensor:
    """h, a, b and the place of the starting state among the kept ones (-1 where it is not kept) of each step.

    Shape [steps, 4], float32, on the device. Where increments are stored, for a and b the number of the step's segment
    and its place among the steps that are stored; of a step whose starting state is kept the segment that begins after
    it, and -1. -1 stands for a segment that there is not.

    Copied for each pass, from pinned memory, which does not make the host wait. A tensor kept on the device would come
    from the pool of the CUDA graph that is recorded when it is first needed, or be freed while a graph still reads it.
    """
    host = _host_schedule(method, device.type == "cuda")
    if is_capturing():
        # An equal one that an earlier graph copies from stays.
        host = _captured.setdefault(method, host)
    return host.to(device, non_blocking=True)


_captured: dict[Method, Tensor] = {}
"""Schedules that CUDA graphs copy from at each replay. Nothing tells when a graph is gone, so they stay."""


@functools.lru_cache(maxsize=256)
def _host_schedule(method: Method, is_pinned: bool) -> Tensor:
    weights = method.weights or ((0.0, 0.0),) * len(method)
    if method.solver.is_stored:
        weights = tuple(_stored_places(method))
    places = (method.anchor_place(n) for n in range(len(method)))
    rows = [
        (h, a, b, -1.0 if place is None else float(place))
        for h, (a, b), place in zip(method.steps, weights, places, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32, device="cpu", pin_memory=is_pinned)


def _stored_places(method: Method) -> Iterator[tuple[float, float]]:
    """The segment of each step, or the one after it, and its place among those that are stored."""
    for n in range(len(method)):
        if method.is_stored(n):
            yield method.segment_of(n), method.stored_place(n)
        else:
            yield -1 if method.ends_segment(n) else method.segment_of(n + 1), -1
