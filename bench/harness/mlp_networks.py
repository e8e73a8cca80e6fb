"""One residual MLP in several ways, all of the same weights: as one op, as a list of layers, as its products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resode_cuda import ResidualMLP, smooth_init_
from resode_cuda.fused.activations import ACTIVATIONS

from . import memory
from .modes import BASELINE, set_mode

Batch = tuple[Tensor, Tensor]
"""x_0, which requires gradients as it does after another layer, and a cotangent of x_N."""
Function = Callable[[Tensor], Tensor]
Layer = tuple[Tensor, Tensor, Tensor, Tensor]
PLAIN = (BASELINE, "checkpoint")
"""Modes in which a list of layers is trained too."""
SEGMENT = 8
"""Layers that are compiled at a time where not all of them are."""
PRODUCTS = 8
"""Matrix products that a layer's step takes at least where nothing is stored: 2 forward, 2 once more, 4 backward."""


@dataclass(frozen=True)
class Size:
    """The size of a network and of its input, and what else decides how long a step takes."""

    dim: int
    hidden: int
    depth: int
    rows: int
    dtype: torch.dtype
    activation: str

    def network(self, depth: int, seed: int, device: torch.device) -> ResidualMLP:
        """A network of that depth, with weights smooth in depth."""
        torch.manual_seed(seed)
        # Solvers are compared with how they drift, and need not be warned about.
        settings: dict[str, Any] = {"activation": self.activation, "on_drift": "ignore", "device": device}
        return smooth_init_(ResidualMLP(self.dim, self.hidden, depth, **settings)).to(self.dtype)

    @property
    def facts(self) -> dict[str, Any]:
        """The size as a result file keeps it, in which "rows" are those of a table."""
        facts = {**vars(self), "batch_rows": self.rows, "dtype": str(self.dtype).removeprefix("torch.")}
        return {name: value for name, value in facts.items() if name != "rows"}


class Step:
    """Forward and backward pass of a network; gradients of the step before are dropped first."""

    def __init__(self, function: Function, parameters: Sequence[Tensor]) -> None:
        self.function, self.parameters = function, parameters

    def __call__(self, batch: Batch) -> None:
        self.clear(batch)
        self.function(batch[0]).backward(batch[1])

    def clear(self, batch: Batch) -> None:
        for tensor in (batch[0], *self.parameters):
            tensor.grad = None


def batch_of(rows: int, mlp: ResidualMLP) -> Batch:
    """A batch of normal values, on the network's device and in its dtype."""
    like = mlp.weight_in
    x, g = (torch.randn(rows, mlp.dim, device=like.device, dtype=like.dtype) for _ in range(2))
    return x.requires_grad_(), g


class Batches:
    """A few batches in turn, so that each round has other data than the one before."""

    def __init__(self, rows: int, mlp: ResidualMLP, count: int = 4) -> None:
        self._batches = cycle([batch_of(rows, mlp) for _ in range(count)])
        self.current = next(self._batches)

    def advance(self) -> None:
        self.current = next(self._batches)

    def on_current(self, step: Callable[[Batch], object]) -> Callable[[], object]:
        return lambda: step(self.current)


def fused_step(mlp: ResidualMLP, mode: str, backend: str = "auto") -> Step:
    """A step of the network as one op."""

    def function(x: Tensor) -> Tensor:
        set_mode(mlp, mode)
        mlp.backend = backend
        x_last: Tensor = mlp(x)
        return x_last

    return Step(function, list(mlp.parameters()))


def peak_bytes(step: Step, batch: Batch, device: torch.device) -> int:
    """Peak memory of the second of two steps, over what is there before it."""
    step(batch)
    step.clear(batch)
    return memory.measure(partial(step.function, batch[0]), device, batch[1]).peak


class Layers:
    """x_{n+1} = x_n + h f_n(x_n) as one writes it, states in the parameters' dtype, for autograd to differentiate.

    Args:
        mlp: its weights are copied, each layer's into parameters of its own.
    """

    def __init__(self, mlp: ResidualMLP) -> None:
        stacked = [parameter.detach() for parameter in mlp.parameters()]
        self.layers: list[Layer] = [
            tuple(nn.Parameter(parameter[n].clone()) for parameter in stacked)  # type: ignore[misc]
            for n in range(mlp.depth)
        ]
        self.parameters = [parameter for layer in self.layers for parameter in layer]
        self.h, self.activation = mlp.steps[0], ACTIVATIONS[mlp.activation].module()

    def step(self, mode: str, compiler: str | None = None, length: int | None = None) -> Step:
        """
        Args:
            mode: "backprop", or "checkpoint": torch.utils.checkpoint around each layer.
            compiler: torch.compile's backend; None runs eagerly.
            length: so many layers are compiled at a time, all of them by the same compilation; None is all layers.
        """
        through = partial(_through, h=self.h, activation=self.activation, checkpointed=mode == "checkpoint")
        # All shapes are fixed; without saying so, a second length would be compiled for lengths and shapes that vary.
        run = through if compiler is None else torch.compile(through, backend=compiler, dynamic=False)
        length = length or len(self.layers)

        def function(x: Tensor) -> Tensor:
            for begin in range(0, len(self.layers), length):
                x = run(self.layers[begin : begin + length], x)
            return x

        return Step(function, self.parameters)

    def gradients(self) -> list[Tensor]:
        """The parameter gradients, stacked as the `ResidualMLP`'s."""
        by_name = zip(*self.layers, strict=True)
        return [torch.stack([p.grad for p in parameters if p.grad is not None]) for parameters in by_name]


def _through(layers: Sequence[Layer], x: Tensor, *, h: float, activation: nn.Module, checkpointed: bool) -> Tensor:
    for layer in layers:
        if checkpointed:
            x = checkpoint(_one, x, *layer, h, activation, use_reentrant=False)
        else:
            x = _one(x, *layer, h, activation)
    return x


def _one(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, h: float, activation: nn.Module) -> Tensor:
    f = F.linear(activation(F.linear(x, w1, b1)), w2, b2)
    # Eagerly one pass instead of two; Inductor drops the alpha of an addition to a product (pytorch/pytorch#167313).
    return x + h * f if torch.compiler.is_compiling() else torch.add(x, f, alpha=h)


class Products:
    """The matrix products of a step, forward and backward, and nothing else: no activation, no bias, no addition."""

    def __init__(self, mlp: ResidualMLP, rows: int) -> None:
        self.w1, self.w2 = mlp.weight_in.detach().unbind(), mlp.weight_out.detach().unbind()
        self.a, self.z = torch.randn(2, rows, mlp.hidden, device=self.w1[0].device, dtype=self.w1[0].dtype)
        self.out = self.a.new_empty(rows, mlp.dim)
        self.g1, self.g2 = torch.empty_like(self.w1[0]), torch.empty_like(self.w2[0])

    def __call__(self, batch: Batch) -> None:
        x, g = batch[0].detach(), batch[1]
        a, z, out = self.a, self.z, self.out
        for w1, w2 in 2 * list(zip(self.w1, self.w2, strict=True)):  # the second time to have the states again
            torch.mm(x, w1.t(), out=z)
            torch.mm(a, w2.t(), out=out)
        for w1, w2 in zip(self.w1, self.w2, strict=True):
            torch.mm(g, w2, out=z)
            torch.mm(g.t(), a, out=self.g2)
            torch.mm(z.t(), x, out=self.g1)
            torch.mm(z, w1, out=out)
