"""The cheapest reverse solver whose gradient error, measured on a batch, is within a tolerance.

A fresh network flatters every solver and a trained one none, so nothing is predicted here: each candidate's gradient is
computed and compared with the exact one, which checkpointing gives at one state per step.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adjoint.drift import DriftMonitor, root_mean_square
from .adjoint.replay import buffers_untouched, submodules
from .reverse import Reverse

if TYPE_CHECKING:
    from .stack import ResidualStack

Loss = Callable[[Tensor], Tensor]
MOST_CORRECTIONS = 4


@dataclass(frozen=True)
class Candidate:
    """A way to get gradients, what it cost on the batch, and how far off it was."""

    gradient: str
    """"adjoint" or "checkpoint"."""
    reverse: Reverse | None
    """None for "checkpoint"."""
    anchors: int | None
    evaluations: int
    """Block evaluations of a training step, forward pass included."""
    seconds: float
    """Of one forward and backward pass of the stack."""
    held_bytes: int
    """Of what autograd held between the two, parameters and the input aside."""
    error: float
    """Relative error of all parameter gradients together; infinite where one was not finite."""
    defect: float | None
    """Root mean square of the defects; None without any, or where one was not finite."""

    def __post_init__(self) -> None:
        if self.gradient != ("checkpoint" if self.reverse is None else "adjoint"):
            raise ValueError(
                'Candidate: gradient must be "adjoint" with a Reverse, or "checkpoint" with None, got '
                f"{self.gradient!r} with {self.reverse!r}"
            )
        if self.anchors is not None and not (type(self.anchors) is int and self.anchors >= 1):
            raise ValueError(f"Candidate: anchors must be an integer >= 1 or None, got {self.anchors!r}")
        if not self.error >= 0:
            raise ValueError(f"Candidate: error must be >= 0, got {self.error!r}")
        if self.defect is not None and not 0 <= self.defect < math.inf:
            raise ValueError(f"Candidate: defect must be finite and >= 0, or None, got {self.defect!r}")

    def __str__(self) -> str:
        if self.reverse is None:
            return self.gradient
        name = self.reverse.predictor
        if self.reverse.corrections:
            name += f" + {self.reverse.corrections}"
        if self.reverse.accelerate:
            name += " accelerated"
        return name if self.anchors is None else f"{name}, anchors {self.anchors}"


@dataclass(frozen=True)
class Plan:
    """The cheapest candidate within the tolerance, and all that were measured on the way to it.

    `print(plan)` shows them as a table; `stack.apply_plan(plan)` sets the stack; `save` and `load` keep it as JSON.
    """

    tolerance: float
    candidates: tuple[Candidate, ...]
    """In the order in which they were tried. The last one is the plan."""

    @property
    def chosen(self) -> Candidate:
        return self.candidates[-1]

    @property
    def is_last_resort(self) -> bool:
        """Whether no reverse solver met the tolerance, so that the plan is exact checkpointing."""
        return self.chosen.reverse is None

    def within(self, tolerance: float) -> Plan:
        """The plan for a larger tolerance, from the same measurements.

        Raises:
            ValueError: if the tolerance is smaller than this plan's.
        """
        if not tolerance >= self.tolerance:
            raise ValueError(
                f"Plan.within: tolerance must be >= {self.tolerance:g}, which was measured, got {tolerance:g}; "
                "calibrate again"
            )
        count = next(i for i, candidate in enumerate(self.candidates, 1) if candidate.error <= tolerance)
        return Plan(tolerance, self.candidates[:count])

    def __str__(self) -> str:
        head = ("", "evaluations", "ms", "held MiB", "gradient error")
        lines = [
            (
                str(candidate),
                str(candidate.evaluations),
                f"{1e3 * candidate.seconds:.1f}",
                f"{candidate.held_bytes / 2**20:.3g}",
                f"{candidate.error:.1e}",
            )
            for candidate in self.candidates
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        rows = [
            "  ".join(f"{cell:<{width}}" if n == 0 else f"{cell:>{width}}" for n, (cell, width) in row)
            for row in (enumerate(zip(line, widths, strict=True)) for line in (head, *lines))
        ]
        end = f"tolerance {self.tolerance:g}: {self.chosen}"
        if self.is_last_resort:
            end += ", the last resort; no reverse solver met the tolerance"
        return "\n".join([*rows, end])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        # JSON has no infinity.
        candidates = [
            {**asdict(candidate), "error": candidate.error if math.isfinite(candidate.error) else None}
            for candidate in self.candidates
        ]
        Path(path).write_text(json.dumps({"tolerance": self.tolerance, "candidates": candidates}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan that `save` wrote.

        Raises:
            ValueError: if the file holds no plan.
        """
        try:
            record = json.loads(Path(path).read_text())
            candidates = [
                Candidate(
                    **{
                        **fields,
                        "reverse": fields["reverse"] and Reverse(**fields["reverse"]),
                        "error": math.inf if fields["error"] is None else fields["error"],
                    }
                )
                for fields in record["candidates"]
            ]
            return Plan(_checked_tolerance("Plan.load", record["tolerance"]), (candidates[0], *candidates[1:]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"Plan.load: {path} must hold a plan written by Plan.save, but does not: {error}"
            ) from error


class CalibrationError(ValueError):
    """The batch does not allow to compare gradients."""


def calibrate(
    stack: ResidualStack,
    x: Tensor,
    /,
    *args: Any,
    tolerance: float = 1e-2,
    loss: Loss | None = None,
    **kwargs: Any,
) -> Plan:
    """The cheapest reverse solver whose gradient error on this batch is within the tolerance.

    Candidates are tried from the cheapest to the dearest until one meets it: without anchors, then with an anchor every
    sqrt(N) steps, every sqrt(N)/2, ...; among those by block evaluations: the predictors "extrapolate" and "step" with
    0 to 4 corrections, plain and accelerated. If none does, the plan is `gradient="checkpoint"`, which is exact.

    The error is |g - g_exact| / |g_exact|, 2-norms over all parameter gradients of the stack together, or of the
    input's gradient where no parameter needs one. It holds for this batch and these weights; trained further, calibrate
    again (`stack.recalibrate_every`). Nothing of the training changes: buffers, random numbers, gradients, flags and
    the stack's settings are as before. Takes about two to three training steps for each candidate tried.

    Args:
        stack: in the mode (train or eval) in which it is to be used.
        x, *args, **kwargs: as for the stack's forward pass, a batch like those of training. A smaller one is cheaper.
        tolerance: of the relative error, > 0.
        loss: from the stack's output to a scalar, the rest of the network and its loss, for this batch. None is half
            the sum of squares of the output. Errors depend on it somewhat. It is called once.

    Raises:
        ValueError: if the tolerance is not positive and finite; as `CalibrationError` if the exact gradient is not
            finite or is zero.
        TypeError: for a stack that is none (pass the model's own `ResidualStack`), or a loss that returns no
            differentiable scalar.
    """
    trial = _Trial(_checked_stack(stack), x, args, kwargs, loss or _half_square)
    tolerance = _checked_tolerance("calibrate", tolerance)
    exact = trial.run("checkpoint")
    scale = _norm(exact.gradients)
    if not (math.isfinite(scale) and scale > 0):
        raise CalibrationError(
            f"calibrate: the exact gradient must be finite and not zero, got a norm of {scale}; scale the loss, or "
            "calibrate on another batch"
        )
    tried: list[Candidate] = []
    for reverse, anchors in candidates(len(stack.steps)):
        outcome = trial.run("adjoint", reverse, anchors)
        difference = _norm([a - b for a, b in zip(outcome.gradients, exact.gradients, strict=True)])
        error = difference / scale if math.isfinite(difference) else math.inf
        tried.append(outcome.as_candidate(error))
        if error <= tolerance:
            return Plan(tolerance, tuple(tried))
    return Plan(tolerance, (*tried, exact.as_candidate(0.0)))


def candidates(steps: int) -> Iterator[tuple[Reverse, int | None]]:
    """Solvers and anchors for a stack of so many steps, from the cheapest to the dearest."""
    solvers = [
        Reverse(predictor, corrections, accelerate=accelerate)
        for corrections in range(MOST_CORRECTIONS + 1)
        for predictor in ("extrapolate", "step")
        for accelerate in ((False, True) if corrections >= 2 else (False,))
    ]
    solvers.sort(key=lambda solver: solver.evaluations)
    spacing: int | None = None
    while spacing is None or spacing > 1:
        for solver in solvers:
            yield solver, spacing
        spacing = math.isqrt(steps) if spacing is None else spacing // 2


@dataclass
class _Outcome:
    gradient: str
    reverse: Reverse | None
    anchors: int | None
    gradients: Sequence[Tensor]
    evaluations: int
    seconds: float
    held_bytes: int
    defect: float | None

    def as_candidate(self, error: float) -> Candidate:
        return Candidate(
            self.gradient,
            self.reverse,
            self.anchors,
            self.evaluations,
            self.seconds,
            self.held_bytes,
            error,
            self.defect,
        )


class _Trial:
    """Training steps on one batch, after each of which everything is as it was before.

    Forward passes are the same for every candidate, so they share the cotangent of the output, and the loss, which may
    have effects of its own, is called once.
    """

    def __init__(self, stack: ResidualStack, x: Tensor, args: Any, kwargs: Any, loss: Loss) -> None:
        self.stack, self.args, self.kwargs = stack, args, kwargs
        self.x = x.detach()
        self.parameters: list[Tensor] = [parameter for parameter in stack.parameters() if parameter.requires_grad]
        self.modules = submodules(stack)
        self.held_bytes: dict[tuple[str, bool, int | None], int] = {}
        with self._as_before(), _set(stack, "checkpoint"), torch.no_grad():
            out = stack(self.x, *args, **kwargs)
        with self._as_before(), _without_effects(), torch.enable_grad():
            out = out.detach().requires_grad_()
            value = loss(out)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise TypeError(
                    f"calibrate: loss must return a scalar tensor that depends on the output, got {value!r}"
                )
            (self.g,) = torch.autograd.grad(value, out)

    def run(self, gradient: str, reverse: Reverse | None = None, anchors: int | None = None) -> _Outcome:
        calls = 0

        def count(module: torch.nn.Module, _: Any) -> None:
            nonlocal calls
            calls += module in blocks

        blocks = set(self.stack)
        with self._as_before(), _set(self.stack, gradient, reverse, anchors), torch.enable_grad():
            x = self.x.clone().requires_grad_()
            held = self._held_by(x, (gradient, reverse is not None and reverse.extrapolates, anchors))
            counting = torch.nn.modules.module.register_module_forward_pre_hook(count)
            try:
                begin = _now(x.device)
                out = self.stack(x, *self.args, **self.kwargs)
                found = torch.autograd.grad(out, self.parameters or [x], self.g, allow_unused=True)
                seconds = _now(x.device) - begin
            finally:
                counting.remove()
            drift = self.stack.drift
            defect = math.nan if drift is None else root_mean_square(drift.defects).item()
        return _Outcome(
            gradient,
            reverse,
            anchors,
            [g.detach() for g in found if g is not None],
            calls,
            seconds,
            held,
            defect if math.isfinite(defect) else None,
        )

    def _held_by(self, x: Tensor, what: tuple[str, bool, int | None]) -> int:
        """Bytes that autograd holds after a forward pass; measured once for all solvers that hold the same.

        Apart from the pass that is timed: under these hooks parameters come back as other tensors, which blocks that
        torch.compile compiled would be compiled for again.
        """
        if what not in self.held_bytes:
            held: dict[int, int] = {}
            mine = {tensor.untyped_storage().data_ptr() for tensor in (x, *self.parameters)}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in mine:
                    held[storage.data_ptr()] = storage.nbytes()
                return tensor

            with self._as_before(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                self.stack(x, *self.args, **self.kwargs)
            self.held_bytes[what] = sum(held.values())
        return self.held_bytes[what]

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        devices = [] if self.x.device.type in ("cpu", "meta") else [self.x.device]
        with (
            torch.random.fork_rng(devices, device_type=self.x.device.type if devices else "cuda"),
            buffers_untouched(self.modules),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", RuntimeWarning)  # candidates may well diverge
            yield


@contextmanager
def _set(
    stack: ResidualStack, gradient: str | None = None, reverse: Reverse | None = None, anchors: int | None = None
) -> Iterator[None]:
    """The stack's settings for one trial (None: as they are), no training step, with a drift monitor of its own."""
    before = stack.gradient, stack.reverse, stack.anchors, stack._monitor, stack._recalibration
    try:
        stack._monitor, stack._recalibration = DriftMonitor("ResidualStack", len(stack.steps)), None
        if gradient is not None:
            stack.gradient, stack.anchors = gradient, anchors
        if reverse is not None:
            stack.reverse = reverse
        yield
    finally:
        stack.gradient, stack.reverse, stack.anchors, stack._monitor, stack._recalibration = before


@contextmanager
def _without_effects() -> Iterator[None]:
    """Whatever modules run inside, their buffers, and the settings of other stacks, are as before."""
    from .stack import ResidualStack

    seen: set[torch.nn.Module] = set()
    with ExitStack() as restored:

        def protect(module: torch.nn.Module, _: Any) -> None:
            if module not in seen:
                seen.add(module)
                restored.enter_context(buffers_untouched([module]))
                if isinstance(module, ResidualStack):
                    restored.enter_context(_set(module))

        restored.callback(torch.nn.modules.module.register_module_forward_pre_hook(protect).remove)
        yield


class Recalibration:
    """When to calibrate again during training, and what it may take of the time.

    Args:
        steps: training steps from one calibration to the next.
        tolerance, loss: as for `calibrate`.
        share: of the time since the first calibration that all later ones together may take.
    """

    def __init__(self, steps: int, tolerance: float, share: float, loss: Loss | None) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs steps >= 1, got {steps!r}")
        if not 0 < share <= 1:
            raise ValueError(f"ResidualStack: recalibrate_every needs a share in (0, 1], got {share}; 0.01 is 1%")
        self.steps, self.share, self.loss = steps, share, loss
        self.tolerance = _checked_tolerance("ResidualStack: recalibrate_every", tolerance)
        self._count = 0
        self._begin: float | None = None
        self._spent = self._last = 0.0

    def plan(self, stack: ResidualStack, x: Tensor, args: Any, kwargs: Any) -> Plan | None:
        """Counts a training step; the new plan, if it is time for one. A batch that allows none is only warned of."""
        self._count += 1
        now = time.perf_counter()
        if self._begin is not None and (
            (self._count - 1) % self.steps or self._spent + self._last > self.share * (now - self._begin)
        ):
            return None
        plan = None
        try:
            plan = calibrate(stack, x, *args, tolerance=self.tolerance, loss=self.loss, **kwargs)
        except CalibrationError as error:
            warnings.warn(f"ResidualStack: recalibration is left out this time; {error}", RuntimeWarning, stacklevel=2)
        self._last = time.perf_counter() - now
        if self._begin is None:
            self._begin = time.perf_counter()
        else:
            self._spent += self._last
        return plan


def _checked_stack(stack: ResidualStack) -> ResidualStack:
    from .stack import ResidualStack

    if not isinstance(stack, ResidualStack):
        raise TypeError(
            f"calibrate: stack must be a ResidualStack, got {type(stack).__name__}; pass the stack itself, unwrapped"
        )
    return stack


def _checked_tolerance(where: str, tolerance: float) -> float:
    if not 0 < float(tolerance) < math.inf:
        raise ValueError(f"{where}: tolerance must be positive and finite, got {tolerance}; 1e-2 is a good start")
    return float(tolerance)


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum() / 2


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
