"""The cheapest reverse solver whose gradient error, measured on a batch, is within a tolerance.

A fresh network flatters every solver and a trained one none, so nothing is predicted here: each candidate's gradient is
computed and compared with the exact one, which checkpointing gives at one state per step.
"""

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
from .method import CheckedAnchors, anchored_steps
from .module import AdjointModule
from .plan import Candidate, Plan, checked_tolerance
from .reverse import Reverse

Loss = Callable[[Any], Tensor]
T = TypeVar("T")
Argument = TypeVar("Argument")
MOST_CORRECTIONS = 4


class CalibrationError(ValueError):
    """The batch allows no comparison of gradients."""


@torch.inference_mode(False)
def calibrate(
    stack: AdjointModule,
    x: Tensor,
    /,
    *args: Any,
    tolerance: float = 1e-2,
    loss: Loss | None = None,
    **kwargs: Any,
) -> Plan:
    """The cheapest reverse solver whose gradient error on this batch is within the tolerance.

    Candidates are tried from the cheapest to the dearest until one meets it: without anchors; with the first state
    kept; with the first and those that a backward pass showed to be rebuilt badly; with an anchor every sqrt(N) steps,
    every sqrt(N)/2, ...; among those by block evaluations: the predictors "extrapolate" and "step" with 0 to 4
    corrections, plain and accelerated. If none does, the plan is `gradient="checkpoint"`, which is exact.

    The error is |g - g_exact| / |g_exact|, 2-norms over all parameter gradients of the stack together, or of the
    input's gradient where no parameter needs one. It holds for this batch and these weights; trained further, calibrate
    again (`stack.recalibrate_every`). Nothing of the training changes: buffers, random numbers, gradients, flags and
    the stack's settings are as before. Takes about two to three training steps for each candidate tried. May be called
    under `torch.no_grad()` and `torch.inference_mode()`.

    Args:
        stack: in the mode (train or eval) in which it is to be used.
        x, *args, **kwargs: as for the stack's forward pass, a batch like those of training. A smaller one is cheaper.
        tolerance: of the relative error, > 0.
        loss: from the stack's output to a scalar, the rest of the network and its loss, for this batch. None is half
            the sum of squares of the output. Errors depend on it somewhat. It is called once.

    Raises:
        ValueError: if the tolerance is not positive and finite; as `CalibrationError` if the exact gradient is not
            finite or is zero.
        TypeError: for a stack that is none (pass the model's own `ResidualStack`) or whose parameters are inference
            tensors, or a loss that returns no differentiable scalar.
    """
    trial = _Trial(_checked_stack(stack), x, args, kwargs, loss or _half_square)
    tolerance = checked_tolerance("calibrate", tolerance)
    exact = trial.run(EXACT)
    scale = _norm(exact.gradients)
    if not (math.isfinite(scale) and scale > 0):
        raise CalibrationError(
            f"calibrate: the exact gradient must be finite and not zero, got a norm of {scale}; scale the loss, or "
            "calibrate on another batch"
        )
    tried: list[Candidate] = []
    for anchors in _anchors_to_try(trial, len(stack.steps), tolerance):
        for reverse in SOLVERS:
            outcome = trial.run(Choice("adjoint", reverse, anchors))
            difference = _norm([a - b for a, b in zip(outcome.gradients, exact.gradients, strict=True)])
            error = difference / scale if math.isfinite(difference) else math.inf
            tried.append(replace(outcome.candidate, error=error))
            if error <= tolerance:
                return Plan(tolerance, tuple(tried))
    return Plan(tolerance, (*tried, exact.candidate))


SOLVERS = tuple(
    sorted(
        (
            Reverse(predictor, corrections, accelerate=accelerate)
            for corrections in range(MOST_CORRECTIONS + 1)
            for predictor in ("extrapolate", "step")
            for accelerate in ((False, True) if corrections >= 2 else (False,))
        ),
        key=lambda solver: solver.evaluations,
    )
)
"""From the cheapest to the dearest."""


def _anchors_to_try(trial: _Trial, steps: int, tolerance: float) -> Iterator[CheckedAnchors]:
    """Anchors for a stack of so many steps: none, the first state, those after which a step went wrong, every K-th.

    A backward pass with the first state kept tells which steps go wrong; it is taken once the first two have failed.
    """
    yield None
    yield FIRST_STATE
    known: set[tuple[int, ...]] = {FIRST_STATE}
    for anchors in anchors_by_defect(trial.run(PROBE).defects, tolerance):
        known.add(anchors)
        yield anchors
    spacing = math.isqrt(steps)
    while spacing > 1:
        if anchored_steps(spacing, steps) not in known:
            yield spacing
        spacing //= 2


def anchors_by_defect(defects: Sequence[float], tolerance: float) -> Iterator[tuple[int, ...]]:
    """Sets of steps with large defects, the worst 1, 2, 4, ... of them, each with the first step.

    A defect is large above the tolerance. One that is not finite is the worst; it hides those of all steps before it.
    At most half of the steps join the first: with more, checkpointing is the choice.
    """
    broken = max((n for n, defect in enumerate(defects) if not math.isfinite(defect)), default=0)
    large = [n for n, defect in enumerate(defects) if n >= max(1, broken) and not defect <= tolerance]
    large.sort(key=lambda n: math.inf if n == broken else defects[n], reverse=True)
    large = large[: len(defects) // 2]
    count = 1
    while large and count < 2 * len(large):
        yield tuple(sorted({0, *large[:count]}))
        count *= 2


class Choice(NamedTuple):
    """How a stack gets its gradients."""

    gradient: str
    reverse: Reverse | None = None
    anchors: CheckedAnchors = None


EXACT = Choice("checkpoint")
FIRST_STATE = (0,)
PROBE = Choice("adjoint", Reverse("step"), FIRST_STATE)
"""Its defects tell which other states are worth keeping."""


class _Outcome(NamedTuple):
    gradients: list[Tensor]
    defects: list[float]
    """One for each step; none where none were measured."""
    candidate: Candidate
    """The choice and what it cost; its error is left at 0."""


class _Trial:
    """Training steps on one batch, after each of which everything is as it was before.

    Forward passes are the same for every candidate, so they share the cotangent of the output, and the loss, which may
    have effects of its own, is called once.
    """

    def __init__(self, stack: AdjointModule, x: Tensor, args: Any, kwargs: Any, loss: Loss) -> None:
        x, self.args, self.kwargs = pytree.tree_map(_without_inference, (x, args, kwargs))
        self.stack, self.x = stack, x.detach()
        self.parameters: list[Tensor] = [parameter for parameter in stack.parameters() if parameter.requires_grad]
        self.modules = submodules((stack,))
        self.held_bytes: dict[tuple[str, int, CheckedAnchors], int] = {}
        self.g = self._as_before(self._output_cotangents, loss)

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

    def run(self, choice: Choice) -> _Outcome:
        return self._as_before(self._run, choice)

    def _run(self, choice: Choice) -> _Outcome:
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
                begin = _now(x.device)
                out = _as_tuple(self._forward(x))
                found = torch.autograd.grad(out, self.parameters or [x], self.g, allow_unused=True)
                seconds = _now(x.device) - begin
            finally:
                counting.remove()
            drift = self.stack.drift
            defect = math.nan if drift is None else root_mean_square(drift.defects).item()
            defects = [] if drift is None else drift.defects.tolist()
        return _Outcome(
            [g.detach() for g in found if g is not None],
            defects,
            Candidate(*choice, calls, seconds, held, error=0.0, defect=defect if math.isfinite(defect) else None),
        )

    def _held_by(self, x: Tensor, choice: Choice) -> int:
        """Bytes that autograd holds after a forward pass; measured once for all solvers that hold the same.

        Apart from the pass that is timed: under these hooks parameters come back as other tensors, which blocks that
        torch.compile compiled would be compiled for again.
        """
        extrapolates = choice.reverse is not None and choice.reverse.extrapolates
        what = choice.gradient, extrapolates, choice.anchors
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


def _checked_stack(stack: AdjointModule) -> AdjointModule:
    # Only what has blocks of its own can be planned for.
    if not isinstance(stack, AdjointModule) or not hasattr(stack, "apply_plan"):
        raise TypeError(
            f"calibrate: stack must be a ResidualStack, got {type(stack).__name__}; pass the stack itself, unwrapped"
        )
    if any(tensor.is_inference() for tensor in (*stack.parameters(), *stack.buffers())):
        raise TypeError(
            "calibrate: the stack's parameters and buffers must have gradients, got inference tensors; build or load "
            "it outside torch.inference_mode()"
        )
    return stack


def _without_inference(value: Any) -> Any:
    """A tensor that autograd may save, for one made under torch.inference_mode(); anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum() / 2


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
