"""A training step as a CUDA graph: its launches without what the host does to make them."""

from __future__ import annotations

import gc

import torch

from .mlp_networks import Batch, Step

WARM_UPS = 3
"""Steps before capture, in which whatever is compiled or allocated once is."""


class Captured:
    """Forward and backward pass, captured by the first call and replayed by each.

    Args:
        step: its network should serve nothing else, since the gradients stay in the graph's memory.
        batch: copied, and read from there by every replay.
    """

    def __init__(self, step: Step, batch: Batch) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        x, g = batch
        self._batch = x.detach().clone().requires_grad_(), g.clone()

    def load(self, batch: Batch) -> None:
        with torch.no_grad():
            for mine, given in zip(self._batch, batch, strict=True):
                mine.copy_(given)

    def __call__(self) -> None:
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self._step(self._batch)
        torch.cuda.current_stream().wait_stream(beside)
        self._step.clear(self._batch)
        gc.collect()  # what is in cycles may hold gradient accumulators of the other stream
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(self._batch)
        return graph
