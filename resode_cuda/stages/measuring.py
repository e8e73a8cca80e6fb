"""A plan for each stage, by one pass of the whole model: `calibrate`, with the loss that the model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adjoint.block_arguments import Call
from ..adjoint.inventory import submodules
from ..adjoint.replay import protect
from ..adjoint.restoration import restoring
from ..calibration import calibrate
from .layer_calls import in_one_call
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
    passes: list[list[tuple[Tensor, Call, Tensor]]] = [[] for _ in stages]

    def note(seen: list[tuple[Tensor, Call, Tensor]], number: int, x: Tensor, call: Call, out: Tensor) -> None:
        seen.append((x.detach(), call, out))

    def passed() -> tuple[Tensor, ...]:
        protect(submodules((model,)), next(model.parameters()).device)
        with torch.enable_grad():
            value = _loss_of(called(model, batch), loss)
            for stage, seen in zip(stages, passes, strict=True):
                if stage.last_pass != "as a stack" or len(seen) != len(stage.layers):
                    raise ValueError(
                        f"convert: {stage.path or 'the model'} must run as one stack on the batch, got a pass that ran "
                        f"it {stage.last_pass}; leave batch out, or the stage"
                    )
            return torch.autograd.grad(value, [seen[-1][2] for seen in passes])

    before = [stage.stack.gradient for stage in stages]
    try:
        for stage, seen in zip(stages, passes, strict=True):
            stage.stack.gradient, stage.watch = "checkpoint", partial(note, seen)
        cotangents = restoring(passed)
    finally:
        for stage, gradient in zip(stages, before, strict=True):
            stage.stack.gradient, stage.watch = gradient, None
    found = []
    for seen, g in zip(passes, cotangents, strict=True):
        args, kwargs = in_one_call([call for _, call, _ in seen])
        found.append(Seen(seen[0][0], args, kwargs, g))
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
