"""A plan for each stage, by one pass of the whole model: `calibrate`, with the loss that the model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adjoint.inventory import submodules
from ..adjoint.replay import protect
from ..adjoint.restoration import restoring
from ..calibration import calibrate
from .stage import Stage


class Seen(NamedTuple):
    """What a stage was given in the pass, and the cotangents of its output."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    g: Tensor


def plan_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
    tolerance: float | str | None,
) -> None:
    """Let `calibrate` choose for each stage, and measure what it keeps for a sample.

    The forward pass is exact whatever the solver, so the cotangents of a stage's output are those of the whole model's
    loss for every candidate, and one pass of the model does.

    Args:
        tolerance: None leaves the stages as they are, and measures alone.

    Raises:
        ValueError: if the model is not in train mode, or the pass does not run a stage.
    """
    if not model.training:
        raise ValueError("convert: a model that is given a batch must be in train mode; call model.train()")
    for stage, seen in zip(stages, _looked_at(model, stages, batch, loss), strict=True):
        with_g = partial(_product, seen.g)
        before = _kept_by_layers(stage, seen)
        if tolerance is None:
            kept = _kept(partial(stage.stack, seen.x, *seen.args, **seen.kwargs), stage)
        else:
            chosen = partial(calibrate, tolerance=tolerance, loss=with_g, rebuild=False)
            plan = chosen(stage.stack, seen.x, *seen.args, **seen.kwargs)
            stage.stack.apply_plan(plan)
            kept = plan.chosen.held_bytes
        samples = max(1, len(seen.x))
        stage.bytes_a_sample = before // samples, kept // samples


def _product(g: Tensor, out: Tensor) -> Tensor:
    return (out * g).sum()


def _looked_at(
    model: nn.Module, stages: Sequence[Stage], batch: Any, loss: Callable[[Any], Tensor] | None
) -> list[Seen]:
    """What each stage is given in one pass of the model, which leaves no trace."""
    given: dict[int, Any] = {}
    outputs: dict[int, Tensor] = {}

    def note(n: int, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        given[n], outputs[n] = (args, kwargs), out

    def passed() -> tuple[Tensor, ...]:
        protect(submodules((model,)), next(model.parameters()).device)
        with torch.enable_grad():
            value = _loss_of(called(model, batch), loss)
            missing = [stage.path for n, stage in enumerate(stages) if n not in outputs]
            if missing:
                passes = "; ".join(f"{stage.path}: {stage.last_pass}" for stage in stages)
                raise ValueError(f"convert: {missing[0]} must run as a stack on the batch, got {passes}")
            return torch.autograd.grad(value, [outputs[n] for n in range(len(stages))])

    noting = [stage.stack.register_forward_hook(partial(note, n), with_kwargs=True) for n, stage in enumerate(stages)]
    before = [stage.stack.gradient for stage in stages]
    try:
        for stage in stages:
            stage.stack.gradient = "checkpoint"
        cotangents = restoring(passed)
    finally:
        for stage, gradient, hook in zip(stages, before, noting, strict=True):
            stage.stack.gradient = gradient
            hook.remove()
    found = []
    for n, g in enumerate(cotangents):
        (x, *args), kwargs = given[n]
        found.append(Seen(x.detach(), tuple(args), kwargs, g))
    return found


def called(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: keywords, arguments, or one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss_of(out: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is not None:
        return loss(out)
    own = getattr(out, "loss", None)
    if isinstance(own, Tensor):
        return own
    first = out if isinstance(out, Tensor) else next(iter(out.values() if isinstance(out, Mapping) else out))
    value: Tensor = first.float().square().sum() / 2
    return value


def _kept_by_layers(stage: Stage, seen: Seen) -> int:
    def run() -> None:
        x = seen.x.clone().requires_grad_()
        for step in stage.steps:
            x = step(x, *seen.args, **seen.kwargs)

    return _kept(run, stage)


def _kept(run: Callable[[], Any], stage: Stage) -> int:
    """Bytes that autograd keeps of a forward pass beside parameters, each storage once."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.stack.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    def passed() -> Any:
        protect(submodules(stage.layers), next(stage.stack.parameters()).device)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive.append(run())

    alive: list[Any] = []
    restoring(passed)
    return sum(kept.values())
