"""Watching the reconstruction: the defects that the solver measures for free, and what is done about them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..devices import is_capturing
from ..method import Method
from ..squares import square_dtype, squared_norm
from .coarseness import StoredRounding, too_coarse
from .reevaluation import ROUNDING, Increments, Judge, changed_in_between, changes, not_recomputed

ON_DRIFT = ("ignore", "warn", "raise", "store", "checkpoint")
FALLBACKS = {
    "store": "8 stored bits, or checkpointing where these were not enough,",
    "checkpoint": 'gradient="checkpoint"',
}
"""What such an `on_drift` goes on with."""
MAX_DRIFT = 0.05
"""The largest defect that is accepted by default."""


class DriftError(RuntimeError):
    """A defect above `max_drift`, a state that is not finite, or a block that became another function between forward
    and backward pass, in a stack with `on_drift="raise"`; the last also with `gradient="checkpoint"`."""


class Drift(NamedTuple):
    """What the last backward pass measured of its own error.

    y is the point at which a step's vector-Jacobian product was taken and x_n the rebuilt state, so the defect
    |y - x_n| / |x_n| (2-norms over the whole batch) is a running measure of the error of y. It is 0 for steps that
    start from an anchor or that were not rebuilt because nothing before them needs a gradient.

    Where a stack's increments are stored, measuring a step takes an evaluation of its blocks to their ends, which its
    gradient does not. All steps are measured in the first pass, and in every pass with `on_drift="raise"`; else one in
    turn, and the others are as they were last measured.
    """

    defects: Tensor
    """Shape [steps], float64, on the device of the stack's input. NaN for a solver without reuse, which measures
    none."""
    maximum: Tensor
    """The largest defect, shape []."""
    reconstruction: Tensor | None = None
    """|rebuilt x_0 - x_0| / |x_0|, shape []: the true error at the end of the reconstruction. None without
    `keep_input=True`, and where the backward pass ended before x_0. With anchors it has grown since the last one."""
    changes: Tensor | None = None
    """|d_n of the backward pass - d_n of the forward pass| / |d_n|, shape [steps], estimated from two numbers: 0 where
    y was x_n and the block ran as before, 0.1 to 2 where it is another function by now. NaN for steps that were not
    evaluated again; None for a `ResidualMLP`, which has nothing to replay."""
    replayed: Tensor | None = None
    """Whether no step's change is larger than the error of y explains, shape []; None for a `ResidualMLP`."""
    gradient_error: Tensor | None = None
    """Estimated relative error of the gradient, shape []: the root mean square of the defects, times the factor between
    the two that `calibrate` measured. None before a plan was applied."""


def _host_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class DriftMonitor:
    """Squared norms of each step's defect and rebuilt state, written on the device in the backward pass.

    They are looked at without waiting for the device: at once on a CPU; elsewhere they are copied asynchronously and
    read in a later forward pass, once the copy has arrived, or when `drift` is read.
    """

    def __init__(self, where: str, steps: int, max_drift: float = MAX_DRIFT, on_drift: str = "ignore") -> None:
        self._where = where
        self.max_drift, self.on_drift = max_drift, on_drift
        self.gradient_error_per_defect: float | None = None
        self.fallback_requested = False
        """Whether on_drift="checkpoint" has found reason to."""
        self._passes = itertools.count()
        self._steps = steps
        self.unmeasured, self.turn = set(range(steps)), 0
        """Steps that have not been measured yet, and the one whose turn it is then."""
        # [steps + 1, 2]: |y - x_n|^2, |x_n|^2, and at the end the same of the input.
        self._squares: Tensor | None = None
        self._rows: tuple[Tensor, ...] = ()
        self._increments: Increments | StoredRounding | None = None
        # [steps, 6], or 8 where increments are stored: their numbers in the last forward and backward pass, with what
        # judges them. In memory that stays, as the squares do.
        self._numbers: Tensor | None = None
        self._replay_judge: Judge | None = None
        self._measured = False
        self._reached_input = False
        self._unchecked = False
        self._warned_of: set[str] = set()
        # Judgements of host copies of what was measured, each with the event of their arrival.
        self._arriving: list[tuple[Callable[[], None], Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled stack has had no backward pass, but what followed from the original's holds for it.
        settings = self._where, self._steps, self.max_drift, self.on_drift
        return _monitor, (*settings, self.gradient_error_per_defect, self.wants_fallback())

    def wants_fallback(self) -> bool:
        """`fallback_requested`, once all that was measured has been judged."""
        if self.on_drift in FALLBACKS:
            self.poll()
        return self.fallback_requested

    def settings_changed(self) -> None:
        """What was measured holds for the module as it was."""
        self.gradient_error_per_defect = None
        self.unmeasured = set(range(self._steps))

    def recomputed(self) -> int:
        """The step that is recomputed to its end, and compared, under "checkpoint" in the pass that begins."""
        return next(self._passes) % self._steps

    def measured(self, method: Method) -> Collection[int]:
        """The steps that the backward pass of the forward pass that begins measures.

        Where increments are stored that alone takes an evaluation of blocks to their ends. So once all steps have been
        measured it is one in turn, except with on_drift="raise".
        """
        if not method.solver.is_stored or self.on_drift == "raise" or is_capturing():
            return range(self._steps)
        return {*self.unmeasured} or {self.turn}

    def was_measured(self, n: int) -> None:
        """Step n was evaluated to its end in a backward pass."""
        self.unmeasured.discard(n)
        if n == self.turn:
            self.turn = (n + 1) % self._steps

    def begin(self, stream: Tensor, measures: bool, increments: Increments | StoredRounding | None = None) -> None:
        """A backward pass starts; it measures defects, or looks for NaN and Inf alone.

        Args:
            increments: those of its forward pass, where these are evaluated again, or what was rounded off them.
        """
        squares = self._prepared(stream)
        if isinstance(increments, Increments) and not increments.are_all_measured:
            # What other passes have measured stays.
            squares.masked_fill_(squares.isfinite().all(1, keepdim=True).logical_not_(), 0.0)
        else:
            squares.zero_()
        self._measured, self._reached_input = measures, False
        self._increments = increments
        self._unchecked = increments is not None

    def check_recomputed(self, index: int, first: Tensor, again: Tensor) -> None:
        """Raise if block `index`, recomputed at the same x, is another function by these numbers, shape [2] each.

        On a GPU the numbers are looked at in a later forward pass.
        """

        def judge(first: Tensor, again: Tensor) -> None:
            change = math.dist(first.tolist(), again.tolist()) / max(first.norm().item(), again.norm().item(), 1e-300)
            if change > ROUNDING and self.on_drift != "ignore":
                raise DriftError(f"{self._where}: block {index} {not_recomputed(change)}")

        if first.device.type == "cpu":
            judge(first, again)
        elif not (is_capturing() or first.is_meta):
            self._later(judge, first, again)

    def warn_of_left_behind(self, names: Mapping[str, int]) -> None:
        """Names of attributes and containers in which blocks left tensors that have gradients, with the block."""
        if not names or "left behind" in self._warned_of:
            return
        self._warned_of.add("left behind")
        name, index = next(iter(names.items()))
        warnings.warn(
            f"{self._where}: block {index} leaves a tensor that has gradients in {name}, but what a block leaves for "
            "others was computed without: return it with the increment to a stack with auxiliary=sum, ask for states "
            'with return_states=, or use gradient="checkpoint"; detach it if no gradient is meant to pass',
            RuntimeWarning,
            stacklevel=2,
        )

    def squares(self, stream: Tensor) -> Tensor:
        """Shape [steps + 1, 2], for a backward pass that fills all steps' rows at once."""
        return self._prepared(stream)

    def watch(self, node: Any, squares: Tensor, measures: bool, rounding: StoredRounding | None = None) -> None:
        """Begin and end with the backward pass of an autograd node that fills the first rows of `squares`."""

        def begin(cotangents: tuple[Tensor | None, ...]) -> None:
            if cotangents[0] is None:
                return
            if is_legacy_batchedtensor(cotangents[0]):  # is_grads_batched=True
                self.forget()
                return
            # A forward pass in between, on another device, has made others.
            self._squares, self._rows = squares, squares.unbind()
            self.begin(cotangents[0], measures, rounding)
            self._unchecked = True

        node.register_prehook(begin)
        node.register_hook(lambda *_: self.end())

    def _prepared(self, stream: Tensor) -> Tensor:
        if self._squares is None or self._squares.device != stream.device:
            self._squares = torch.zeros(self._steps + 1, 2, dtype=square_dtype(stream.device), device=stream.device)
            self._rows = self._squares.unbind()
        return self._squares

    def row(self, n: int) -> Tensor:
        """The place where the step's squared norms |y - x_n|^2 and |x_n|^2 are to be added up."""
        self._unchecked = True
        return self._rows[n]

    def record(self, n: int, x: Tensor) -> None:
        """Step n rebuilt x, and no defect was measured."""
        self._square(self.row(n)[1], x)

    def record_stored(self, n: int, defect_square: Tensor, y: Tensor, x_next: Tensor) -> None:
        """Step n, whose increment is stored, was evaluated at y.

        Its defect is relative to the larger one of y and x_{n+1}, in which what was rounded off lies. Their squares
        take all values, so that NaN and Inf show.
        """
        row = self.row(n)
        row[0].copy_(defect_square)
        row[1].copy_(torch.maximum(squared_norm(y), squared_norm(x_next)))

    def look_at(self, n: int, companion: Tensor) -> None:
        """The companion ends after step n, which is not measured. Every NaN and Inf on its way has reached it."""
        self.row(n)[1].add_(squared_norm(companion), alpha=0)

    def record_input(self, rebuilt: Tensor, x: Tensor) -> None:
        """The state that the reconstruction ended with, and the one that it started from in the forward pass."""
        self._reached_input = True
        row = self.row(self._steps)
        self._square(row[0], rebuilt - x)
        self._square(row[1], x)

    @staticmethod
    def _square(place: Tensor, vector: Tensor) -> None:
        place.copy_(squared_norm(vector))

    def end(self, increments: Increments | StoredRounding | None = None, is_batched: bool = False) -> None:
        """A backward pass rebuilt all that it will. What a CUDA graph measures on its replays is not judged.

        Args:
            increments: those of its forward pass; None takes those of the backward pass that began last.
            is_batched: it computed a batch of gradients, and measured nothing else.
        """
        increments = increments or self._increments
        if is_batched and isinstance(increments, Increments):
            squares = self._prepared(increments.first).zero_()
        elif self._squares is None or not self._unchecked:
            return
        else:
            squares = self._squares
        self._unchecked = False
        self._keep(increments)
        if is_capturing() or squares.is_meta:
            return
        tensors = [squares, *(() if increments is None else increments.numbers)]
        if squares.device.type == "cpu":
            self._judge(increments, *tensors)
        elif not self._has_warned_of_all():
            self._later(partial(self._judge, increments), *tensors)

    def _keep(self, increments: Increments | StoredRounding | None) -> None:
        """Copy the numbers of a backward pass that has ended."""
        self._increments = self._replay_judge = None
        if not isinstance(increments, Increments) or increments.again is None:
            return
        first = increments.first
        kept, width = self._numbers, first.shape[1] + increments.again.shape[1]
        if kept is None or (kept.shape[1], kept.dtype, kept.device) != (width, first.dtype, first.device):
            kept = self._numbers = first.new_full((self._steps, width), torch.nan)
        rows = torch.cat([first, increments.again], 1)
        if increments.are_all_measured:
            kept.copy_(rows)
        else:
            for n in increments.measured:
                kept[n].copy_(rows[n])
        self._replay_judge = increments.judge

    def _later(self, judge: Callable[..., None], *tensors: Tensor) -> None:
        """Have copies of the tensors judged once they have arrived on the host."""
        copies = [_host_copy(tensor) for tensor in tensors]
        arrived = torch.get_device_module(tensors[0].device).Event()
        arrived.record()
        self._arriving.append((lambda: judge(*copies), arrived))

    def poll(self) -> None:
        """Judge what has arrived by now; all there is, where the answer decides what happens next."""
        self.end()
        must_know = self.on_drift == "raise" or self.on_drift in FALLBACKS
        while self._arriving and (must_know or self._arriving[0][1].query()):
            judge, arrived = self._arriving.pop(0)
            arrived.synchronize()
            judge()

    def forget(self) -> None:
        """The next backward pass is not the adjoint's."""
        self._measured = self._reached_input = False
        self._increments = self._replay_judge = None

    def read(self) -> Drift | None:
        self.poll()
        if self._squares is None or not (self._measured or self._reached_input or self._replay_judge is not None):
            return None
        ratios = self._ratios(self._squares)
        defects = ratios[:-1] if self._measured else torch.full_like(ratios[:-1], torch.nan)
        factor = self.gradient_error_per_defect
        changed = replayed = None
        if self._replay_judge is not None and self._numbers is not None and not self._numbers.is_meta:
            rows = self._numbers.tolist()
            first, again = [row[:-4] for row in rows], [row[-4:] for row in rows]
            changed = defects.new_tensor(changes(first, again))
            is_replayed = self._replay_judge.unexplained(first, again) is None
            replayed = torch.tensor(is_replayed, device=defects.device)
        return Drift(
            defects,
            defects.max(),
            ratios[-1] if self._reached_input else None,
            changed,
            replayed,
            None if factor is None else factor * root_mean_square(defects),
        )

    def _ratios(self, squares: Tensor) -> Tensor:
        difference, scale = squares.sqrt().unbind(1)
        return torch.where(difference == 0, difference, difference / scale)

    def _has_warned_of_all(self) -> bool:
        """Whether no further finding would be reported."""
        reported = {"ignore": {"broken"}, "warn": {"replay", "broken", "drift"}}
        return self.on_drift in reported and reported[self.on_drift] <= self._warned_of

    def _judge(self, increments: Increments | StoredRounding | None, squares: Tensor, *numbers: Tensor) -> None:
        """Act on what a backward pass measured: the squares and, with increments, their numbers."""
        if self._has_warned_of_all():
            return
        broken = squares[:-1].isfinite().logical_not_().any(dim=1).nonzero()
        if len(broken):
            n = int(broken[-1])
            self._act(
                "broken",
                f"{self._where}: the reconstruction of step {n} met NaN, Inf or a norm too large to be "
                f"squared, gradients of steps 0 to {n} are wrong; "
                'use gradient="checkpoint", more corrections, anchors, or a smaller step',
            )
            return
        slack = [1.0] * self._steps if increments is None else increments.slack
        defects = self._ratios(squares)[:-1]
        excess = defects / defects.new_tensor(slack)
        worst = int(excess.argmax())
        defect = excess[worst].item() if self._measured else 0.0
        if self.on_drift == "ignore":
            return
        measured = [tensor.tolist() for tensor in numbers]
        coarse = None if increments is None or not numbers else increments.judge.coarse(*measured)
        if coarse is not None:
            n, share = coarse
            self._act("drift", f"{self._where}: the increment of step {n} {too_coarse(share)}")
        elif defect > self.max_drift:
            self._act(
                "drift",
                f"{self._where}: the defect of step {worst} must be at most max_drift={self.max_drift:g}"
                f"{'' if slack[worst] == 1 else f' times {slack[worst]:g}'}, got {defects[worst].item():.1e}, so "
                "gradients may be as far off; choose a solver with resode_cuda.calibrate, or use more corrections, "
                "more stored bits, anchors, or a smaller step",
            )
        elif defect <= MAX_DRIFT and isinstance(increments, Increments) and numbers:
            # Where states are off, so are increments.
            found = increments.judge.unexplained(*measured)
            if found is not None:
                n, change = found
                self._act("replay", f"{self._where}: {increments.blocks_of(n)} {changed_in_between(change)}")

    def _act(self, what: str, message: str) -> None:
        if self.on_drift == "raise":
            raise DriftError(message)
        is_news = what not in self._warned_of
        if self.on_drift in FALLBACKS:
            is_news, self.fallback_requested = not self.fallback_requested, True
            message += f"; {FALLBACKS[self.on_drift]} from the next step on"
        if is_news:
            self._warned_of.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _monitor(
    where: str, steps: int, max_drift: float, on_drift: str, factor: float | None, fallback_requested: bool
) -> DriftMonitor:
    monitor = DriftMonitor(where, steps, max_drift, on_drift)
    monitor.gradient_error_per_defect, monitor.fallback_requested = factor, fallback_requested
    return monitor


def root_mean_square(defects: Tensor) -> Tensor:
    return defects.square().mean().sqrt()
