"""The verdict on a recipe: its stack against the ordinary network, run by autograd alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support.fuzz.recipe import Recipe
from tests.support.fuzz.session import Outcome, ran

PREFIX = "ResidualStack: "
REFUSABLE = {
    "block=hooks_input",
    "event=cast",
    "way=batched",
    "block=leaks",
    "block=board",
    "block=integer_board",
    "block=writes_input",
    "block=writes_parameter",
    "arguments=hidden",
    "arguments=written_tensor",
    "arguments=iterator",
    "context=written_afterwards",
    "way=second_derivatives",
    "event=parameters_changed",
    "event=one_parameter_changed",
    "event=optimizer_step",
    "event=state_loaded",
    "event=float_buffers_changed",
    "event=discrete_buffers_changed",
    "event=argument_changed",
    "event=list_argument_changed",
    "event=argument_object_changed",
    "event=input_changed",
    "event=output_changed",
    "event=run_in_training_mode",
    "event=reparametrized",
}
"""Features that the library may answer with an error of its own."""
TORCHS = {"block=spoils_saved", "event=output_changed", "event=input_changed"}
"""Features with which torch's own message about a tensor that was modified in place is an answer."""

UNSERVABLE = {
    "block=forked_rng",
    "block=memoises_weight",
    "block=own_generator",
    "block=looks_at_grad_mode",
    "arguments=written_list",
    "arguments=iterator",
    "event=attributes_changed",
    "event=submodule_replaced",
    "event=module_hooked_late",
    "event=reparametrized",
    "event=argument_object_changed",
}
"""Features that no library sees before it runs a block again: there the library's warning or error is an answer."""

MEANINGLESS = [
    # Two numbers a step miss small changes and, seldom, large ones; under "checkpoint", and of stored increments after
    # the first pass, one step in turn is compared. tests/stack/test_reevaluation.py has these.
    *({feature, "reverse=stored", "is_measured=True"} for feature in UNSERVABLE),
    {"block=own_generator"},
    {"block=looks_at_grad_mode", "gradient=adjoint"},
    # torch's checkpointing keeps its own random numbers alone, and stops where it has what it needs.
    {"block=python_random", "context=checkpoint"},
    {"block=numpy_random", "context=checkpoint"},
    {"arguments=written_list", "context=checkpoint"},
    # Some of the gradients need nothing of what is spoiled.
    {"block=spoils_saved", "way=grad"},
    # A block that is stopped before it spoils anything has a right gradient.
    {"block=spoils_saved", "reverse=stored", "is_measured=True"},
    # The second forward pass, or the one that is repeated, is another network's.
    {"event=settings_changed", "way=accumulated"},
    {"event=settings_changed", "way=two_steps"},
    {"event=settings_changed", "context=checkpoint"},
    # torch's checkpointing runs blocks again, buffers and all, and compares no versions.
    {"context=checkpoint", "way=accumulated"},
    {"context=checkpoint", "way=two_steps"},
    {"context=checkpoint", "block=spoils_saved"},
    # The hooks are on the tensor that the block differentiates for inside itself.
    {"block=makes_leaves", "way=hooked"},
    # torch's checkpointing inside of the block fails where flags of its parameters change.
    *(
        {f"block={block}", f"event={event}"}
        for block in ("checkpointed", "checkpointed_state")
        for event in ("gradient_flags_off", "gradient_flags_toggled")
    ),
    # On a CPU these hooks keep the very tensors, and nothing compares their versions.
    *(
        {"context=save_on_cpu", f"event={thing}_changed"}
        for thing in ("parameters", "one_parameter", "argument", "input", "output")
    ),
    {"context=save_on_cpu", "event=optimizer_step"},
    {"context=save_on_cpu", "event=state_loaded"},
]
"""Features that together make a program of which no gradient is right."""


def is_meaningful(recipe: Recipe) -> bool:
    return not any(features <= recipe.features for features in MEANINGLESS)


def faults(recipe: Recipe) -> list[str]:
    """What is wrong with the stack's training step; nothing, for a right gradient or an answer that explains itself."""
    undisturbed = replace(
        recipe, event="nothing", context="plain" if recipe.context == "checkpoint" else recipe.context
    )
    clean = ran(undisturbed, is_plain=True)
    plain = clean if undisturbed == recipe else ran(recipe, is_plain=True)
    if clean.error is not None and "spoils_saved" not in recipe.blocks:
        return []  # No training step at all.
    got = ran(recipe, is_plain=False)
    if got.error is not None:
        return _faults_of_error(recipe, got, plain)
    if warned(got):
        # torch's checkpointing around the stack runs it again with what is there by then.
        is_late = recipe.context == "checkpoint" and recipe.event != "nothing"
        return [] if is_late or UNSERVABLE & recipe.features else [f"false alarm: {warned(got)}"]
    if clean.error is not None:
        return [f"the ordinary network fails, the stack does not: {clean.error!r}"] * bool(got.gradients)
    if recipe.context == "checkpoint" and plain.error is not None:
        return []
    found = _differing_outputs(recipe, got, plain)
    # Where autograd's own gradient changes with the event, the program is wrong, and no gradient is right.
    if plain.error is not None or plain is clean or not _wrong_gradients(recipe, plain, clean):
        found += _wrong_gradients(recipe, got, clean)
    if plain.error is None:
        found += _differing_state(recipe, got, plain)
    return found


def warned(outcome: Outcome) -> list[str]:
    """The library's warnings."""
    return [message for message in outcome.messages if message.startswith(PREFIX)]


def _faults_of_error(recipe: Recipe, got: Outcome, plain: Outcome) -> list[str]:
    described = f"{type(got.error).__name__} in {got.failed_in}: {got.error}"
    if str(got.error).startswith(PREFIX):
        is_fair = bool((REFUSABLE | UNSERVABLE) & recipe.features) or plain.error is not None
        found = [] if is_fair else [f"refused: {described}"]
    else:
        is_torchs = plain.error is not None or bool(
            {"block=spoils_saved", "event=output_changed", "event=input_changed"} & recipe.features
        )
        found = [] if is_torchs else [f"unclear: {described}"]
    is_complete = got.failed_in == "backward" and got.progress == plain.progress
    if plain.error is None and is_complete and recipe.way not in ("updated_in_backward", "two_steps"):
        found += _differing_state(recipe, got, plain)
    return found


def _differing_outputs(recipe: Recipe, got: Outcome, plain: Outcome) -> list[str]:
    return [
        f"output {n} differs by {(a.double() - b.double()).abs().max().item():.1e}"
        for n, (a, b) in enumerate(zip(got.outputs, plain.outputs, strict=False))
        if not torch.equal(a, b) and not (recipe.is_strided and torch.allclose(a, b, rtol=1e-5, atol=1e-14))
    ]


def _wrong_gradients(recipe: Recipe, got: Outcome, exact: Outcome) -> list[str]:
    largest = max((g.double().norm().item() for g in exact.gradients.values() if g is not None), default=0.0)
    found = []
    for name in sorted(exact.gradients.keys() | got.gradients.keys()):
        a, b = _dense(got.gradients.get(name)), _dense(exact.gradients.get(name))
        if a is None and b is None:
            continue
        if a is None or b is None:
            given = b if a is None else a
            if given.count_nonzero():
                found.append(f"gradient of {name} is {'None' if a is None else 'not None'}")
            continue
        if a.dtype != b.dtype or a.shape != b.shape:
            found.append(f"gradient of {name} is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}")
            continue
        error = (a.double() - b.double()).norm().item()
        bound = recipe.tolerance * b.double().norm().item() + recipe.smallest * largest
        if not error <= bound:
            found.append(f"gradient of {name} is off by {error / max(b.double().norm().item(), 1e-300):.1e}")
    return found


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _differing_state(recipe: Recipe, got: Outcome, plain: Outcome) -> list[str]:
    keys = plain.state.keys() | got.state.keys()
    if recipe.context == "checkpoint" or "checkpointed_state" in recipe.blocks:
        # torch's checkpointing runs again what it needs, and buffers with it, and stops where it has enough.
        keys = {key for key in keys if "buffer" not in key and "attribute" not in key}
    found = [f"{key} differs afterwards" for key in sorted(keys) if not _same(got.state.get(key), plain.state.get(key))]
    return found + ([] if got.error is not None or got.log == plain.log else [f"hooks ran {got.log}, not {plain.log}"])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
