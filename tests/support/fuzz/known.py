"""What fails today, and why. The table shall become empty: a line goes when its cause is gone.

`tests/stack/test_fuzz.py` expects every line to fail in the simplest recipe with its features, so a line that is no
longer needed makes the suite fail.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.support.fuzz.recipe import Recipe


class Known(NamedTuple):
    """Features of a recipe that may fail wherever they come together, and further ones with which they do."""

    reason: str
    features: frozenset[str]
    shown_with: frozenset[str] = frozenset()

    @property
    def example(self) -> Recipe:
        return Recipe.of(*self.features, *self.shown_with)


def _table() -> list[Known]:
    lines: list[Known] = []

    def add(reason: str, *features: str, shown_with: tuple[str, ...] = ()) -> None:
        lines.append(Known(reason, frozenset(features), frozenset(shown_with)))

    attributes = "attributes that a block changes are not replayed"
    for block in ("python_counter", "python_memory", "memoises_weight"):
        add(attributes, f"block={block}")
    add(attributes, "event=attributes_changed", shown_with=("block=reads_attributes",))

    structure = "modules and hooks that were put into a block meanwhile take part in its re-evaluation"
    for event in ("submodule_replaced", "module_hooked_late"):
        add(structure, f"event={event}")
    add(structure, "event=reparametrized", shown_with=("gradient=checkpoint",))

    for block in ("python_random", "numpy_random", "own_generator"):
        add("random numbers that are not torch's own are not replayed", f"block={block}")
    add(
        "a block that puts the generator back as it was has drawn unnoticed",
        "block=forked_rng",
        shown_with=("event=random_numbers_drawn",),
    )

    for arguments in ("written_list", "iterator"):
        add("containers among the arguments are not replayed", f"arguments={arguments}")
    add("tensors among the arguments are not replayed", "arguments=written_tensor")
    add("containers are kept, not copied", "arguments=nested", "event=list_argument_changed", "gradient=checkpoint")
    add(
        "objects among the arguments are not replayed",
        "arguments=hidden_without_gradient",
        "event=argument_object_changed",
    )
    objects = "arguments=hidden", "event=argument_object_changed", "gradient=checkpoint"
    add("objects among the arguments are not replayed", *objects)
    for arguments in ("marked", "marked_without_gradient"):
        add("the attributes of a tensor are not those of its detached alias", f"arguments={arguments}")
    add("a parameter is another object than its detached alias", "arguments=typed")
    add("one tensor in two places becomes two", "arguments=same")

    add("parameters that a block writes are not replayed", "block=writes_parameter")
    add("the forward pass of a block runs without gradients", "block=looks_at_grad_mode")
    paths = "torch's attention takes another path without gradients"
    for block in ("encoder", "attention"):
        add(paths, f"block={block}", "is_training=False", shown_with=("states=images", "anchors=1"))
        for way in ("accumulated", "two_steps"):
            toggled = f"block={block}", "event=mode_toggled", f"way={way}"
            add(paths, *toggled, shown_with=("states=images", "anchors=1"))
    add(
        "leaves that a block makes for itself are taken for foreign tensors",
        "block=makes_leaves",
        "is_input_frozen=True",
    )
    add("a hook on the state belongs to one path of it", "block=hooks_input", shown_with=("anchors=1",))

    add("discrete buffers are not checked", "event=discrete_buffers_changed", shown_with=("block=reads_buffers",))
    add("buffers that share memory are copied apart", "block=shared_buffers")
    add("buffers that a block registers when it first runs are not replayed", "block=registered_buffer")
    add("integers that another block wrote are not replayed", "block=integer_board")
    for event in ("one_mode_toggled", "run_in_eval_mode", "run_in_training_mode"):
        add("flags that a block sets in its re-evaluation stay", "block=switches_modes", f"event={event}")
    add(
        "a norm that is put into eval mode by its block is not checked",
        "block=switches_modes",
        "event=float_buffers_changed",
    )

    for context in ("functional_call", "functional_call_with_buffers"):
        add(
            "tensors with a graph stay in shared modules after functional_call",
            f"context={context}",
            "is_shared=True",
            shown_with=("block=shares_body",),
        )
    add(
        "every use evaluates a parametrization, which cached() makes one",
        "block=spectral",
        "context=cached_parametrizations",
        shown_with=("scheme=heun",),
    )
    add(
        "the default dtype is not replayed",
        "block=default_dtype",
        "event=default_dtype_changed",
        shown_with=("gradient=checkpoint",),
    )

    add("torch's message about weights of another dtype", "event=cast")
    add("torch's message about its checkpoint", "gradient=checkpoint", "event=gradient_flags_off")
    add(
        "torch's message about its checkpoint",
        "gradient=checkpoint",
        "event=gradient_flags_toggled",
        shown_with=("block=constant",),
    )
    add(
        "torch's message about its checkpoint",
        "gradient=checkpoint",
        "event=input_changed",
        shown_with=("block=parameterless",),
    )
    add("torch's message about inference tensors", "arguments=inference")
    add("recomputed tensors are not checked for writes", "gradient=checkpoint", "block=spoils_saved")
    add("gradients that are sparse have no storage to look at", "block=sparse")
    for block in (
        "noise",
        "self_seeded",
        "functional_dropout",
        "dropout",
        "nested",
        "attention",
        "reads_attributes",
        "encoder",
    ):
        add("torch's message about random numbers under vmap", "way=batched", f"block={block}")
    for block in ("tied", "constant"):
        for way in ("hooked", "updated_in_backward"):
            add("hooks of parameters without a gradient are called with None", f"way={way}", f"block={block}")
    add(
        "hooks of arguments without a gradient are called with None",
        "block=itself",
        "way=hooked",
        shown_with=("arguments=tensor",),
    )
    add(
        "graphs of arguments that no block uses are gone through",
        "block=itself",
        "arguments=nested",
        shown_with=("way=in_order",),
    )
    return lines


KNOWN = _table()


def known(recipe: Recipe) -> list[Known]:
    """The lines of the table that a recipe falls under."""
    return [line for line in KNOWN if line.features <= recipe.features]
