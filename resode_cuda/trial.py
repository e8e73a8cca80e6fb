"""Training steps on one batch that leave no trace, and how far their gradients are from the exact ones."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adjoint.buffers import work_on_copies
from .adjoint.drift import DriftMonitor, root_mean_square
from .adjoint.inventory import submodules
from .adjoint.replay import protect
from .adjoint.restoration import restoring
from .candidates import EXACT, Choice
from .module import AdjointModule
from .plan import Candidate

Loss = Callable[[Any], Tensor]
T = TypeVar("T")
Argument = TypeVar("Argument")


def compared(outcome: Outcome, exact: Outcome, blocks: Sequence[int]) -> Candidate:
    """The candidate with its errors; `blocks` has the block of each gradient."""
    differences = [a - b for a, b in zip(outcome.gradients, exact.gradients, strict=True)]
    by_block = [
        _ratio([d for d, of in zip(differences, blocks, strict=True) if of == block], exact.of_block(block, blocks))
        for block in sorted(set(blocks))
    ]
    input_error = None
    if outcome.input_gradient is not None and exact.input_gradient is not None:
        input_error = _ratio([outcome.input_gradient - exact.input_gradient], [exact.input_gradient])
    return replace(
        outcome.candidate,
        error=_ratio(differences, exact.gradients),
        input_error=input_error,
        layer_error=max(by_block, default=0.0),
    )


def _ratio(differences: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """|differences| / |exact|; infinite where it is no number, 0 where both are."""
    difference, scale = norm(differences), norm(exact)
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


class Outcome(NamedTuple):
    gradients: list[Tensor]
    """Those of the parameters; that of the input where there are none."""
    input_gradient: Tensor | None
    defects: list[float]
    """One for each step; none where none were measured."""
    candidate: Candidate
    """The choice and what it cost; its errors are left at 0."""

    def of_block(self, block: int, blocks: Sequence[int]) -> list[Tensor]:
        return [gradient for gradient, of in zip(self.gradients, blocks, strict=True) if of == block]


class Trial:
    """Training steps on one batch, after each of which everything is as it was before.

    Forward passes are the same for every candidate, so they share the cotangent of the output, and the loss, which may
    have effects of its own, is called once.
    """

    def __init__(self, stack: AdjointModule, x: Tensor, args: Any, kwargs: Any, loss: Loss) -> None:
        x, self.args, self.kwargs = pytree.tree_map(_without_inference, (x, args, kwargs))
        self.stack, self.x = stack, x.detach()
        self.parameters: list[Tensor] = [parameter for parameter in stack.parameters() if parameter.requires_grad]
        self.modules = submodules((stack,))
        self.held_bytes: dict[tuple[Any, ...], int] = {}
        self.loss = loss
        self.g = self._as_before(self._output_cotangents, loss)
        self.blocks_of_gradients = self._blocks_of_gradients()

    def _blocks_of_gradients(self) -> list[int]:
        """The block of each parameter that has a gradient, the first of those that share it."""
        found: dict[Tensor, int] = {}
        for index, block in enumerate(self.stack.children()):
            for parameter in block.parameters():
                found.setdefault(parameter, index)
        return [found[parameter] for parameter in self.parameters] or [0]

    def error_of_autocast(self, exact: Outcome) -> float:
        """The error of the gradient that training in bfloat16 by autocast has."""
        g = self.g
        try:
            with torch.autocast(self.x.device.type, torch.bfloat16):
                self.g = self._as_before(self._output_cotangents, self.loss)
                found = self.run(EXACT)
        finally:
            self.g = g
        return compared(found, exact, self.blocks_of_gradients).error

    def sizes_of_increments(self) -> list[float]:
        """|d_n| / |x_n| of each step; of a scheme with two blocks a step by the first one's output."""
        return self._as_before(self._sizes, self.x)

    def _sizes(self, x: Tensor) -> list[float]:
        blocks, found = set(self.stack.children()), []
        adds = getattr(self.stack, "form", "residual") == "residual"

        def measure(module: torch.nn.Module, given: Any, out: Any) -> None:
            if module in blocks:
                first = out[0] if isinstance(out, tuple) else out
                increment = first if adds else first - given[0]
                found.append(_ratio([increment], [given[0]]))

        measuring = torch.nn.modules.module.register_module_forward_hook(measure)
        try:
            with _set(self.stack, EXACT), torch.no_grad():
                self._forward(x)
        finally:
            measuring.remove()
        steps = self.stack.steps
        sizes = found[:: self.stack._method.scheme.blocks_per_step]
        return [h * size for h, size in zip(steps, sizes, strict=True)]

    def _output_cotangents(self, loss: Loss) -> list[Tensor]:
        with _set(self.stack, EXACT), torch.no_grad():
            out = self._forward(self.x)
        outputs = [tensor.detach().requires_grad_() for tensor in _as_tuple(out)]
        with _without_effects(), torch.enable_grad():
            value = loss(tuple(outputs) if isinstance(out, tuple) else outputs[0])
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise TypeError(
                    f"calibrate: loss must return a scalar tensor that depends on the output, got {value!r}"
                )
            cotangents = torch.autograd.grad(value, outputs, allow_unused=True)
        return [torch.zeros_like(out) if g is None else g for out, g in zip(outputs, cotangents, strict=True)]

    def _forward(self, x: Tensor) -> Any:
        # In containers of their own, which blocks may change.
        args, kwargs = pytree.tree_map(lambda leaf: leaf, (self.args, self.kwargs))
        return self.stack(x, *args, **kwargs)

    def run(self, choice: Choice) -> Outcome:
        return self._as_before(self._run, choice)

    def _run(self, choice: Choice) -> Outcome:
        calls = 0

        def count(module: torch.nn.Module, _: Any) -> None:
            nonlocal calls
            calls += module in blocks

        blocks = set(self.stack.children())
        with _set(self.stack, choice), torch.enable_grad():
            x = self.x.clone().requires_grad_()
            held = self._held_by(x, choice)
            counting = torch.nn.modules.module.register_module_forward_pre_hook(count)
            try:
                found, seconds = self._pass(x)
            finally:
                counting.remove()
            drift = self.stack.drift
            if choice.reverse is not None and choice.reverse.is_stored:
                # The first pass measures all steps, later ones one in turn.
                seconds = self._pass(x)[1]
            defect = math.nan if drift is None else root_mean_square(drift.defects).item()
            defects = [] if drift is None else drift.defects.tolist()
        *of_parameters, of_input = [None if g is None else g.detach() for g in found]
        wanted = zip(of_parameters or [of_input], self.parameters or [x], strict=True)
        return Outcome(
            [torch.zeros_like(tensor) if g is None else g for g, tensor in wanted],
            of_input,
            defects,
            Candidate(
                *choice,
                calls,
                seconds,
                held,
                error=0.0,
                defect=defect if math.isfinite(defect) else None,
                steps=len(self.stack.steps),
                input_error=0.0,
                layer_error=0.0,
            ),
        )

    def _pass(self, x: Tensor) -> tuple[tuple[Tensor | None, ...], float]:
        """The gradients of the parameters and x, and the seconds that they took."""
        begin = _now(x.device)
        out = _as_tuple(self._forward(x))
        found = torch.autograd.grad(out, [*self.parameters, x], self.g, allow_unused=True)
        return found, _now(x.device) - begin

    def _held_by(self, x: Tensor, choice: Choice) -> int:
        """Bytes that autograd holds after a forward pass; measured once for all solvers that hold the same.

        Apart from the pass that is timed: under these hooks parameters come back as other tensors, which blocks that
        torch.compile compiled would be compiled for again.
        """
        reverse = choice.reverse
        what = choice.gradient, reverse and reverse.extrapolates, reverse and reverse.bits, choice.anchors
        if what not in self.held_bytes:
            self.held_bytes[what] = self._as_before(self._measured, x)
        return self.held_bytes[what]

    def _measured(self, x: Tensor) -> int:
        held: dict[int, int] = {}
        mine = {tensor.untyped_storage().data_ptr() for tensor in (x, *self.parameters)}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in mine:
                held[storage.data_ptr()] = storage.nbytes()
            # A node that saved its own output and kept it as it is would be kept alive by it.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._forward(x)
        return sum(held.values())

    def _as_before(self, run: Callable[[Argument], T], argument: Argument) -> T:
        """run(argument), after which all modules and random generators are as they were."""

        def protected() -> T:
            protect(self.modules, self.x.device)
            return run(argument)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # candidates may well diverge
            return restoring(protected)


@contextmanager
def _set(stack: AdjointModule, choice: Choice | None = None) -> Iterator[None]:
    """The stack's settings for one trial (None: as they are), with a drift monitor of its own, and no recalibration."""
    before = stack.gradient, stack.reverse, stack.anchors, stack._monitor, stack._recalibration
    try:
        stack._monitor, stack._recalibration = DriftMonitor(type(stack).__name__, len(stack.steps)), None
        if choice is not None:
            stack.gradient, stack.anchors = choice.gradient, choice.anchors
            if choice.reverse is not None:
                stack.reverse = choice.reverse
        yield
    finally:
        stack.gradient, stack.reverse, stack.anchors, stack._monitor, stack._recalibration = before


@contextmanager
def _without_effects() -> Iterator[None]:
    """Whatever modules run inside, their buffers, and the settings of other stacks, are as before when the `restoring`
    around this ends, at the latest."""
    seen: set[torch.nn.Module] = set()
    with ExitStack() as restored:

        def protect_too(module: torch.nn.Module, _: Any) -> None:
            if module not in seen:
                seen.add(module)
                work_on_copies([module])
                if isinstance(module, AdjointModule):
                    restored.enter_context(_set(module))

        restored.callback(torch.nn.modules.module.register_module_forward_pre_hook(protect_too).remove)
        yield


def _as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _without_inference(value: Any) -> Any:
    """A tensor that autograd may save, for one made under torch.inference_mode(); anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def half_square(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError("calibrate: a stack with auxiliary returns a tuple, which needs a loss; pass loss=")
    return x.square().sum() / 2


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
