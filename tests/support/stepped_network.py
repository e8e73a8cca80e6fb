"""A network of stacked perceptrons together with how tests step through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from resode_cuda import Reverse
from resode_cuda.fused.network import Network
from resode_cuda.fused.op import PARAMETERS
from resode_cuda.method import Method
from resode_cuda.schemes import SCHEMES


@dataclass(frozen=True)
class SteppedNetwork(Network):
    """The layers, and the scheme and the steps of a test."""

    scheme: str
    steps: tuple[float, ...]

    def method(self, solver: Reverse | None = None, anchors: Sequence[int] = ()) -> Method:
        """How it is stepped through; without a solver nothing is to be rebuilt."""
        return Method(SCHEMES[self.scheme], self.steps, solver or Reverse(), tuple(anchors))

    def with_parameters(self, parameters: Sequence[Tensor | None]) -> SteppedNetwork:
        return replace(self, **dict(zip(PARAMETERS, parameters, strict=True)))
