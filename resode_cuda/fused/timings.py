"""How long a step takes by each backend and form, where that was measured.

`timings.json` has it, as `python -m bench.timings` makes it from the results of `python -m bench --only backends` on
a GPU: for each compute capability sizes, bytes of a parameter, and microseconds of a training step (extrapolated,
Euler, SiLU) for each layer. All other settings are taken to change all backends alike.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from ..devices import capability_of
from .network import Network

FILE = Path(__file__).with_name("timings.json")
REACH = 2.0
"""Factors of two by which the dim and the hidden size measured may differ from those asked for, together."""


class Size(NamedTuple):
    """What was measured of one size on one kind of GPU. microseconds: by names as "cuda" and "triton two_pass"."""

    capability: tuple[int, int]
    itemsize: int
    dim: int
    hidden: int
    rows: int
    microseconds: dict[str, float]


@functools.cache
def sizes() -> tuple[Size, ...]:
    """All that was measured; none without the file."""
    if not FILE.exists():
        return ()
    read = (Size(**size) for size in json.loads(FILE.read_text())["sizes"])
    return tuple(size._replace(capability=(size.capability[0], size.capability[1])) for size in read)


def microseconds(network: Network, rows: int, device: torch.device) -> dict[str, float]:
    """Expected time of a step, by backend and gradient form; empty where nothing similar was measured."""
    if not sizes():
        return {}
    capability = capability_of(device)
    return _expected(capability, network.weight_in.itemsize, network.dim, network.hidden, max(1, rows))


@functools.lru_cache(maxsize=1024)
def _expected(capability: tuple[int, int], itemsize: int, dim: int, hidden: int, rows: int) -> dict[str, float]:
    """Times of the nearest size measured; between numbers of rows they lie on a power, beyond them they stay."""

    def distance(size: Size) -> float:
        return abs(math.log2(size.dim / dim)) + abs(math.log2(size.hidden / hidden))

    similar = [size for size in sizes() if (size.capability, size.itemsize) == (capability, itemsize)]
    nearest = min(similar, key=distance, default=None)
    if nearest is None or distance(nearest) > REACH:
        return {}
    ordered = sorted((size for size in similar if size[2:4] == nearest[2:4]), key=lambda size: size.rows)
    below = next((size for size in reversed(ordered) if size.rows <= rows), ordered[0])
    above = next((size for size in ordered if size.rows >= rows), ordered[-1])
    share = 0.0 if above.rows <= below.rows else math.log(rows / below.rows) / math.log(above.rows / below.rows)
    return {
        name: time * (above.microseconds[name] / time) ** share
        for name, time in below.microseconds.items()
        if name in above.microseconds
    }
