"""A recipe's network, twice: as a stack, and as the ordinary network that it must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resode_cuda import ResidualStack, Reverse
from tests.support.fuzz.arguments import ARGUMENTS
from tests.support.fuzz.blocks import ORDINARY_BLOCKS, FuzzBlock
from tests.support.fuzz.drawing_blocks import DRAWING_BLOCKS
from tests.support.fuzz.hooked_blocks import HOOKED_BLOCKS
from tests.support.fuzz.recipe import Recipe
from tests.support.fuzz.stateful_blocks import STATEFUL_BLOCKS

NESTED_OPTIONS: list[dict[str, Any]] = [
    {"anchors": 1},
    {"gradient": "checkpoint"},
    {"gradient": "backprop"},
    {"reverse": Reverse("step", corrections=10)},
]
"""How the stacks inside of stacks train; each is exact."""


class PlainLoop(nn.Module):
    """x <- x + h f(x), or Heun's step, as autograd records it."""

    def __init__(self, blocks: Iterable[nn.Module], recipe: Recipe) -> None:
        super().__init__()
        for n, block in enumerate(blocks):
            self.add_module(str(n), block)
        self.scheme, self.hs, self.stream_dtype = recipe.scheme, recipe.hs, recipe.stream_dtype

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        def f(n: int, state: Tensor) -> Tensor:
            return self._modules[str(n)](state.to(x.dtype), *args, **kwargs)

        state = x.to(self.stream_dtype or torch.promote_types(x.dtype, torch.float32))
        for n, h in enumerate(self.hs):
            k1 = f(n, state)
            if self.scheme == "euler":
                state = state.add(k1, alpha=h)
            else:
                k2 = f(n + 1, state.add(k1, alpha=h))
                state = state.add(k1.to(state.dtype) + k2, alpha=h / 2)
        return state.to(x.dtype)


class Nested(FuzzBlock):
    """A network inside a block; a stack inside a stack. It takes no arguments but the state."""

    def __init__(self, gain: float, wrapped: Callable[[list[nn.Module]], nn.Module]) -> None:
        self.wrapped = wrapped
        nn.Module.__init__(self)
        self.gain = gain
        self.body = wrapped([BLOCKS["functional_dropout"](0.1), BLOCKS["batch_norm"](0.1), BLOCKS["counter"](0.1)])


BLOCKS: dict[str, Any] = {**ORDINARY_BLOCKS, **DRAWING_BLOCKS, **HOOKED_BLOCKS, **STATEFUL_BLOCKS, "nested": Nested}


class Network:
    """A recipe's network, its data, and its gradients' names.

    Args:
        is_plain: the ordinary network in the place of the stack.
    """

    def __init__(self, recipe: Recipe, is_plain: bool) -> None:
        self.recipe, self.is_plain = recipe, is_plain
        torch.manual_seed(recipe.seed)
        with default_dtype(torch.float64):
            blocks = self._blocks()
        self.model = self._model(blocks).to(recipe.input_dtype)
        self.model.train(recipe.is_training)
        needs_gradient = not recipe.is_input_frozen
        self.inputs = [
            torch.randn(recipe.shape, dtype=recipe.input_dtype).requires_grad_(needs_gradient) for _ in range(2)
        ]
        self.given = ARGUMENTS[recipe.arguments](recipe.input_dtype, self.inputs[0])
        self.weight = torch.randn(recipe.shape, dtype=torch.float64)
        self.log: list[object] = []

    def _blocks(self) -> list[nn.Module]:
        blocks: list[nn.Module] = []
        for name in self.recipe.blocks:
            if isinstance(name, int):
                blocks.append(blocks[name])
            elif name == "nested":
                blocks.append(Nested(self.recipe.gain, self._nested))
            else:
                block = BLOCKS[name](self.recipe.gain)
                block.join(blocks)
                blocks.append(block)
        return blocks

    def _nested(self, blocks: list[nn.Module]) -> nn.Module:
        if self.is_plain:
            return PlainLoop(blocks, Recipe())
        return ResidualStack(blocks, **NESTED_OPTIONS[self.recipe.seed % len(NESTED_OPTIONS)])

    def _model(self, blocks: list[nn.Module]) -> nn.Module:
        recipe = self.recipe
        if self.is_plain:
            return PlainLoop(blocks, recipe)
        stack = ResidualStack(
            blocks,
            recipe.scheme,
            step=recipe.step,
            gradient=recipe.gradient,
            reverse=recipe.solver,
            anchors=recipe.anchors,
            stream_dtype=recipe.stream_dtype,
            keep_input=recipe.keeps_input,
            on_drift=recipe.on_drift,
        )
        if recipe.is_measured:
            stack._monitor.unmeasured.clear()
        return stack

    def loss(self, out: Tensor) -> Tensor:
        return (out.double() * self.weight).sum() + out.double().square().sum() / 2

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that is to get a gradient."""
        found = {f"argument {name}": leaf for name, leaf in self.given.leaves.items()}
        found |= {f"input {n}": x for n, x in enumerate(self.inputs)}
        found |= dict(self.model.named_parameters())
        return {name: leaf for name, leaf in found.items() if leaf.requires_grad}


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
