"""The cheapest reverse solver whose gradient error, measured on a batch, is within a tolerance.

A fresh network flatters every solver and a trained one none, so nothing is predicted here: each candidate's gradient is
computed and compared with the exact one, which checkpointing gives at one state per step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from .candidates import (
    EXACT,
    PREFERENCES,
    PROBE,
    WILD,
    Choice,
    all_choices,
    first_choices,
    has_prospect,
    sets_by_defect,
    sets_by_size,
)
from .layouts import is_distributed
from .module import AdjointModule
from .plan import Candidate, Plan, checked_tolerance
from .stored import GROUP, group_count, sample_count
from .trial import Loss, Outcome, Trial, compared, half_square, norm
from .worst_rank import WorstRank


class CalibrationError(ValueError):
    """The batch allows no comparison of gradients."""


@torch.inference_mode(False)
def calibrate(
    stack: AdjointModule,
    x: Tensor,
    /,
    *args: Any,
    tolerance: float | str = 1e-2,
    loss: Loss | None = None,
    prefer: str = "memory",
    rebuild: bool = True,
    group: distributed.ProcessGroup | None = None,
    **kwargs: Any,
) -> Plan:
    """The cheapest way of getting gradients whose error on this batch is within the tolerance.

    Candidates are all reverse solvers that rebuild (the predictors "extrapolate" and "step" with 0 to 4 corrections,
    plain and accelerated) and stored increments of 1 to 8 bits, with the states of no step kept, of the first, of those
    that a backward pass showed to be rebuilt badly, of those whose increment is large beside the state, or of every
    K-th. They are tried from the cheapest to the dearest until one meets the tolerance; what is in vain by what was
    measured before is left out. If none does, the plan is `gradient="checkpoint"`, which is exact.

    The error is |g - g_exact| / |g_exact|, 2-norms over all parameter gradients of the stack together, or of the
    input's gradient where no parameter needs one. It holds for this batch and these weights; trained further, calibrate
    again (`stack.recalibrate_every`). Nothing of the training changes: buffers, random numbers, gradients, flags and
    the stack's settings are as before. Takes about two to three training steps for each candidate tried. May be called
    under `torch.no_grad()` and `torch.inference_mode()`.

    Args:
        stack: in the mode (train or eval) in which it is to be used.
        x, *args, **kwargs: as for the stack's forward pass, a batch like those of training. A smaller one is cheaper.
        tolerance: of the relative error, > 0; or "amp", the error that training in bfloat16 by `torch.autocast` has
            itself on this batch, which is measured.
        loss: from the stack's output to a scalar, the rest of the network and its loss, for this batch. None is half
            the sum of squares of the output. Errors depend on it somewhat. It is called once; twice with "amp".
        prefer: what the cheapest is: `"memory"`, bytes held and among equals evaluations, or `"time"`, the reverse.
        rebuild: whether solvers that rebuild states are tried. Without them the plan is stored bits or checkpointing,
            whose errors change little while a network trains.
        group: of processes that train the stack together, each on a batch of its own, as under
            `DistributedDataParallel`. All of them call this with the same settings; what a candidate is judged by is
            the worst that one of them measured, so all get the same plan, with the same figures. None decides by this
            process's batch alone, which is not for blocks that compute over ranks, as `SyncBatchNorm` does.

    Raises:
        ValueError: if the tolerance is not positive and finite, or prefer is unknown; as `CalibrationError` if the
            exact gradient is not finite or is zero, of any rank of the group.
        RuntimeError: if a trial failed on another rank of the group; on that rank what it failed with.
        TypeError: for a stack that is none (pass the model's own `ResidualStack`) or whose parameters are inference
            tensors or sharded over ranks, or a loss that returns no differentiable scalar.
    """
    if prefer not in PREFERENCES:
        raise ValueError(f"calibrate: prefer must be one of {PREFERENCES}, got {prefer!r}")
    _check_stack(stack)
    if tolerance != "amp":
        tolerance = checked_tolerance("calibrate", tolerance)
    ranks = WorstRank("calibrate", group, x.device)
    trial = ranks.together(lambda: Trial(stack, x, args, kwargs, loss or half_square))
    exact = ranks.together(partial(trial.run, EXACT))
    _check_scale(norm(exact.gradients), ranks)
    measured = ranks.together(partial(trial.error_of_autocast, exact)) if tolerance == "amp" else float(tolerance)
    limit = -ranks.of([-measured])[0]  # the least: within it on every rank
    tried: list[Candidate] = []
    errors: dict[Choice, float] = {}
    for choice in _choices(trial, ranks, prefer, limit, rebuild):
        if not has_prospect(choice, errors, limit):
            continue
        candidate = _measured(choice, trial, exact, ranks)
        tried.append(candidate)
        errors[choice] = candidate.error
        if candidate.error <= limit:
            return Plan(limit, tuple(tried))
    return Plan(limit, (*tried, _agreed(exact.candidate, ranks)))


def _check_scale(scale: float, ranks: WorstRank) -> None:
    is_useless = not (math.isfinite(scale) and scale > 0)
    (is_useless_anywhere,) = ranks.of([float(is_useless)])
    if is_useless_anywhere:
        raise CalibrationError(
            "calibrate: the exact gradient must be finite and not zero, got "
            f"{f'a norm of {scale}' if is_useless else 'another one on another rank'}; scale the loss, or calibrate on "
            "another batch"
        )


def _choices(trial: Trial, ranks: WorstRank, prefer: str, tolerance: float, rebuild: bool) -> Iterator[Choice]:
    """From the cheapest on. The network is looked at once what needs no look has failed."""
    rebuilt_badly: list[tuple[int, ...]] = []
    if rebuild:
        yield from first_choices(prefer)
        defects = ranks.of(ranks.together(partial(trial.run, PROBE)).defects)
        rebuilt_badly = list(sets_by_defect(defects, tolerance))
    wild = list(sets_by_size(ranks.of(ranks.together(trial.sizes_of_increments)), WILD))
    (padding,) = ranks.of([GROUP * group_count(trial.x) * sample_count(trial.x) / max(1, trial.x.numel())])
    choices = all_choices(len(trial.stack.steps), prefer, rebuilt_badly, wild, padding)
    yield from (choice for choice in choices if rebuild or (choice.reverse and choice.reverse.is_stored))


def _measured(choice: Choice, trial: Trial, exact: Outcome, ranks: WorstRank) -> Candidate:
    def compare() -> Candidate:
        return compared(trial.run(choice), exact, trial.blocks_of_gradients)

    return _agreed(ranks.together(compare), ranks)


def _agreed(candidate: Candidate, ranks: WorstRank) -> Candidate:
    """The candidate with the worst figures of all ranks."""
    costs = candidate.evaluations, candidate.seconds, candidate.held_bytes
    # No error is the least, no defect may be one that was not finite.
    errors = [-1.0 if error is None else error for error in candidate.errors]
    evaluations, seconds, held, *worst, defect = ranks.of(
        [*costs, *errors, math.nan if candidate.defect is None else candidate.defect]
    )
    error, input_error, layer_error = worst
    return replace(
        candidate,
        evaluations=int(evaluations),
        seconds=seconds,
        held_bytes=int(held),
        error=error,
        input_error=None if input_error < 0 else input_error,
        layer_error=None if layer_error < 0 else layer_error,
        defect=defect if math.isfinite(defect) else None,
    )


def _check_stack(stack: AdjointModule) -> None:
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
    # torch.autograd.grad finds no gradients for parts of parameters, which FSDP puts on them itself.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    if any(map(is_distributed, stack.parameters())) or any(isinstance(module, fsdp) for module in stack.modules()):
        raise TypeError(
            "calibrate: the stack's parameters must be whole on each rank, got sharded ones; calibrate a copy of the "
            "stack, or before fully_shard or parallelize_module, with group= for the same plan on all ranks, and apply "
            "the plan to the sharded stack"
        )
