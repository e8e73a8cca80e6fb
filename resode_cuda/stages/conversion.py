"""`convert`: an existing model trains its layers as residual stacks, in one call; `unconvert`; `conversion`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..method import Anchors
from ..reverse import Reverse
from ..text_table import aligned
from . import switch
from .families import facts_of
from .finding import Found, LeftAlone, stages_in, stages_of
from .measuring import plan_stages
from .stage import Stage

LEFT = "_left_by_convert"
"""Attribute of a converted model: what was left alone."""


@dataclass(frozen=True)
class Converted:
    """A stage of a converted model."""

    path: str
    layers: str
    steps: int
    plan: str
    bytes_before: int | None
    """Activations that autograd kept for a sample by the model's own loop; None if no batch was given."""
    bytes_after: int | None
    """What is kept for a sample now."""
    note: str
    last_pass: str
    """How the last training pass ran it."""
    defect: float | None
    """The largest defect of its last backward pass, dimensionless (`ResidualStack.drift`); None before the first."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` made of a model. `print(conversion)` shows it as a table."""

    stages: tuple[Converted, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        head = ("stage", "layers", "steps", "plan", "KiB a sample before", "after", "defect", "last training pass")
        rows = [
            (
                stage.path,
                stage.layers,
                str(stage.steps),
                stage.plan,
                *("-" if size is None else f"{size / 1024:.0f}" for size in (stage.bytes_before, stage.bytes_after)),
                "-" if stage.defect is None else f"{stage.defect:.1e}",
                stage.last_pass,
            )
            for stage in self.stages
        ]
        notes = [f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(stage.note for stage in self.stages) if note]
        left = [f"{place.path} left alone: {place.reason}." for place in self.left_alone]
        return "\n".join([*aligned([head, *rows]), *notes, *left])


def convert(
    model: nn.Module,
    stages: Sequence[str] | None = None,
    *,
    tolerance: float | str = "amp",
    batch: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    form: str | None = None,
    reverse: str | Reverse | None = None,
    anchors: Anchors = None,
    min_depth: int = 4,
) -> nn.Module:
    """Train the layers of an existing model without storing their activations. Returns the model, changed in place.

    Successive layers that keep the shape of their state become the steps of a stack, each of which runs when the
    model's own loop calls it. Nothing else changes: containers, classes, names, parameters, `state_dict`, outputs to
    the last bit. In a training pass (train mode, gradients on) increments are stored in place of activations; in eval
    mode, under `no_grad`, with a key-value cache that holds keys and where attention maps are asked for, layers run as
    before, and so does a layer that returns more than its state, which is warned of once. What the model's own switch
    says (`gradient_checkpointing_enable()` and `_disable()` of transformers, `set_grad_checkpointing()` of timm) turns
    the stacks on and off. `conversion(model)` shows what was converted, how, and how the last training pass ran it.

    Args:
        model: layers of known classes of transformers, timm and torchvision are found.
        stages: names of the containers of layers (`"encoder.layers"`), of any class; None finds them.
        tolerance: of each stage's relative gradient error, as of `calibrate`, if a batch is given.
        batch: what the model is called with in training: a dictionary of keywords, a tuple of arguments, or one.
            `calibrate` then chooses for each stage, by the whole model's loss: how many bits are stored, which states
            are kept, or checkpointing. The model must be in train mode. Without a batch 8 bits are stored.
        loss: from the model's output to a scalar. None takes the output's `loss`, or half the sum of its squares.
        form: None or `"block"`: layers add the state themselves.
        reverse, anchors: as of `ResidualStack`, for all stages, instead of what would be chosen. States are rebuilt
            (`"corrected"` and its like) only if asked for here: what a batch says of that does not hold for long.
        min_depth: the least number of layers worth a stage.

    Raises:
        ValueError: if nothing is found, with what was left alone and why; for a path that the model does not have,
            another form, or a model that is converted already.
    """
    if form not in (None, "block"):
        raise ValueError(
            f'convert: form must be "block" or None, got {form!r}; layers that a model calls itself add the state'
        )
    if stages_of(model):
        raise ValueError("convert: the model must not be converted already; call unconvert(model) before")
    if isinstance(stages, str):
        stages = [stages]
    found, left = stages_in(model, stages, min_depth)
    if not found:
        raise ValueError(f"convert: no stage was found in a {type(model).__name__}{_listed(left)}")
    made = [_stage(run, reverse, anchors) for run in found]
    for stage in made:
        stage.install()
    try:
        if batch is not None:
            plan_stages(model, made, batch, loss, None if reverse is not None else tolerance)
    except BaseException:
        for stage in made:
            stage.remove()
        raise
    model.__dict__[LEFT] = tuple(left)
    switch.install(model)
    return model


def _stage(found: Found, reverse: str | Reverse | None, anchors: Anchors) -> Stage:
    return Stage(found.path, found.names, found.layers, reverse=reverse or "stored", anchors=anchors)


def unconvert(model: nn.Module) -> nn.Module:
    """Make a converted model what it was. Returns the model; one that is not converted stays as it is."""
    switch.remove(model)
    for stage in stages_of(model):
        stage.remove()
    model.__dict__.pop(LEFT, None)
    return model


def conversion(model: nn.Module) -> Conversion:
    """What `convert` made of a model, and how its last training pass went.

    Raises:
        ValueError: for a model that is not converted.
    """
    stages = stages_of(model)
    if not stages:
        raise ValueError("conversion: the model must be converted, got one that is not; call convert(model)")
    return Conversion(tuple(map(_described, stages)), model.__dict__.get(LEFT, ()))


def _described(stage: Stage) -> Converted:
    first = stage.layers[0]
    facts = facts_of(first)
    before, after = stage.bytes_a_sample or (None, None)
    drift = stage.stack.drift
    return Converted(
        path=f"{stage.path}.{stage.names[0]} to {stage.names[-1]}".lstrip("."),
        layers=type(first).__name__,
        steps=len(stage.layers),
        plan=stage.plan,
        bytes_before=before,
        bytes_after=after,
        note="" if facts is None else facts.note,
        last_pass=stage.last_pass,
        defect=None if drift is None else drift.maximum.item(),
    )


def _listed(left: Sequence[LeftAlone]) -> str:
    if not left:
        return "; name the containers of its layers: stages=[...]"
    return ": " + "; ".join(f"{place.path}: {place.reason}" for place in left)
