"""Random recipes, as hypothesis draws them: the simplest values come first, and are what a failure is reduced to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from resode_cuda.reverse import PRESETS
from resode_cuda.schemes import SCHEMES
from tests.support.fuzz.arguments import ARGUMENTS
from tests.support.fuzz.backwards import WAYS
from tests.support.fuzz.contexts import CONTEXTS
from tests.support.fuzz.events import EVENTS
from tests.support.fuzz.judge import is_meaningful
from tests.support.fuzz.known import known
from tests.support.fuzz.networks import BLOCKS
from tests.support.fuzz.recipe import DTYPES, STEPS, Recipe

MOST_STEPS = 5


def _right_today(field: str, names: Iterable[str]) -> list[str]:
    """The names that are not known to fail by themselves."""
    return [name for name in names if not known(Recipe.of(f"{field}={name}"))]


def _mostly_first(names: Iterable[str], share: int) -> st.SearchStrategy[str]:
    """The first name, and in one of `share` draws any."""
    first, *others = names
    return st.sampled_from([first] * (share - 1) * len(others) + others)


_BLOCK_KINDS = st.sampled_from(_right_today("block", BLOCKS))
_DTYPES = _mostly_first(DTYPES, 3)
_ARGUMENTS = _mostly_first(_right_today("arguments", ARGUMENTS), 2)
_CONTEXTS = _mostly_first(CONTEXTS, 4)
_WAYS = _mostly_first(WAYS, 2)
_EVENTS = _mostly_first(_right_today("event", EVENTS), 2)


@st.composite
def _blocks(draw: Any, count: int) -> tuple[str | int, ...]:
    """Blocks of three kinds at most; a number stands for another use of the block in that place."""
    kinds = draw(st.lists(_BLOCK_KINDS, min_size=1, max_size=3))
    blocks: list[str | int] = []
    for n in range(count):
        earlier = [place for place in range(n) if isinstance(blocks[place], str)]
        is_shared = n > 0 and draw(st.integers(0, 7)) == 7
        blocks.append(draw(st.sampled_from(earlier)) if is_shared else draw(st.sampled_from(kinds)))
    return tuple(blocks)


@st.composite
def recipes(draw: Any, gradient: str) -> Recipe:
    scheme = draw(st.sampled_from(list(SCHEMES)))
    steps = draw(st.integers(1, MOST_STEPS))
    anchors = draw(st.sampled_from([1, None, 2, "set"]))
    if anchors == "set":
        anchors = tuple(sorted(draw(st.sets(st.integers(0, steps - 1)))))
    recipe = Recipe(
        blocks=draw(_blocks(steps + (scheme == "heun"))),
        scheme=scheme,
        gradient=gradient,
        reverse=draw(st.sampled_from([*PRESETS, "step", "extrapolate"])),
        corrections=draw(st.integers(0, 4)),
        is_accelerated=draw(st.booleans()),
        anchors=anchors,
        steps=draw(st.sampled_from(STEPS)),
        is_tame=draw(st.booleans()),
        dtype=draw(_DTYPES),
        states=draw(st.sampled_from(["rows", "tokens", "images"])),
        is_training=draw(st.integers(0, 3)) < 3,
        is_input_frozen=draw(st.integers(0, 3)) == 3,
        keeps_input=draw(st.integers(0, 7)) == 7,
        on_drift=draw(st.sampled_from(["warn", "raise", "checkpoint"])),
        arguments=draw(_ARGUMENTS),
        context=draw(_CONTEXTS),
        way=draw(_WAYS),
        event=draw(_EVENTS),
        is_measured=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
    assume(is_meaningful(recipe) and not known(recipe))
    return recipe
