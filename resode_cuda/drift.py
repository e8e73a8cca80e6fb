"""Watching the reconstruction: the defects that the solver measures for free, and states that are not finite."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Drift(NamedTuple):
    """Defects of the last backward pass, |y - x_n| / |x_n| for each step n (2-norms over the whole batch).

    y is the point at which the step's vector-Jacobian product was taken and x_n the rebuilt state, so the defect is a
    running measure of the error of y. It is 0 for steps that start from an anchor or that were not rebuilt because
    nothing before them needs a gradient.
    """

    defects: Tensor
    """Shape [steps], on the device of the stack's input; float64 for a float64 stream, else float32."""
    maximum: Tensor
    """The largest defect, shape []."""


class DriftMonitor:
    """Norms of each step's defect and rebuilt state, written on the device in the backward pass.

    They are looked at without waiting for the device: at once on a CPU; elsewhere they are copied asynchronously and
    read in a later forward pass, once the copy has arrived, or when `drift` is read.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._norms: Tensor | None = None  # [2, steps]: |y - x_n|, |x_n|
        self._squared = False  # whether their squares are kept instead
        self._places: tuple[Tensor, ...] = ()  # each of them
        self._measured = False
        self._unchecked = False
        self._warned = False
        self._arriving: list[tuple[Tensor, Any]] = []  # host copies of the norms, each with the event of its arrival

    def __reduce__(self) -> tuple[type[DriftMonitor], tuple[int]]:
        # A copied or unpickled stack has had no backward pass.
        return DriftMonitor, (self._steps,)

    def begin(self, stream: Tensor, measures: bool) -> None:
        """A backward pass starts; it measures defects, or looks for NaN and Inf alone."""
        dtype = torch.promote_types(stream.dtype, torch.float32)
        if self._norms is None or self._norms.device != stream.device or self._norms.dtype != dtype:
            self._norms = torch.zeros(2, self._steps, dtype=dtype, device=stream.device)
            self._places = self._norms.view(-1).unbind()
        else:
            self._norms.zero_()
        # On a CPU a dot product takes half the time of a norm.
        self._squared = stream.is_cpu and stream.dtype == dtype
        self._measured = measures

    def record(self, n: int, y: Tensor, x: Tensor) -> None:
        """Step n took its vector-Jacobian product at y and rebuilt x. Where defects are measured, y is overwritten."""
        vectors: tuple[tuple[int, Tensor], ...] = ((self._steps + n, x),)
        if self._measured:
            # The same call as rebuilt x: after a block has run, another one's code is cold, which on a CPU costs more
            # than the pass over memory.
            vectors = (n, torch.sub(y, x, out=y)), *vectors
        for place, vector in vectors:
            if self._squared:
                # States are results of elementwise operations, so dense, in whatever order.
                flat = vector.view(-1) if vector.is_contiguous() else vector.as_strided((vector.numel(),), (1,))
                torch.dot(flat, flat, out=self._places[place])
            else:
                torch.linalg.vector_norm(vector, dtype=self._places[place].dtype, out=self._places[place])
        self._unchecked = True

    def end(self) -> None:
        """A backward pass rebuilt all that it will."""
        if self._norms is None or not self._unchecked:
            return
        self._unchecked = False
        if self._norms.device.type == "cpu":
            self._warn_if_not_finite(self._norms)
        elif not self._warned:
            host = torch.empty(self._norms.shape, dtype=self._norms.dtype, pin_memory=True)
            host.copy_(self._norms, non_blocking=True)
            arrived = torch.get_device_module(self._norms.device).Event()
            arrived.record()
            self._arriving.append((host, arrived))

    def look(self) -> None:
        """Check what has arrived by now."""
        self.end()
        while self._arriving and self._arriving[0][1].query():
            self._warn_if_not_finite(self._arriving.pop(0)[0])

    def read(self) -> Drift | None:
        self.look()
        if self._norms is None or not self._measured:
            return None
        difference, scale = self._norms.sqrt() if self._squared else self._norms
        defects = torch.where(difference == 0, difference, difference / scale)
        return Drift(defects, defects.max())

    def _warn_if_not_finite(self, norms: Tensor) -> None:
        broken = norms.isfinite().logical_not_().any(dim=0).nonzero()
        if len(broken) and not self._warned:
            self._warned = True
            n = int(broken[-1])
            warnings.warn(
                f"ResidualStack: the reconstruction of step {n} met NaN or Inf, gradients of steps 0 to {n} are wrong; "
                'use gradient="checkpoint", more corrections, anchors, or a smaller step',
                RuntimeWarning,
                stacklevel=2,
            )
