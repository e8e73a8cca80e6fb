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

    add(
        "torch's message about its checkpoint",
        "event=reparametrized",
        shown_with=("gradient=checkpoint",),
    )
    add(
        "every use evaluates a parametrization, which cached() makes one",
        "block=spectral",
        "context=cached_parametrizations",
        shown_with=("scheme=heun",),
    )
    add(
        "where gradients are recorded, torch's backward hooks of a module wrap its arguments, without their attributes",
        "block=block_hooked",
        "arguments=marked",
    )
    add("recomputed tensors are not checked for writes", "gradient=checkpoint", "block=spoils_saved")
    for block in ("tied", "constant"):
        for way in ("hooked", "updated_in_backward"):
            add("hooks of parameters without a gradient are called with zeros", f"way={way}", f"block={block}")
    add(
        "hooks of arguments without a gradient are called with zeros",
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
