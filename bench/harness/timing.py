"""Times of things that are to be compared: taken in turns, and compared within the same turn.

A shared machine changes speed from one second to the next. What is measured one after the other within a round has
met much the same machine, so ratios are taken round by round; their median forgets the rounds that were disturbed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def interleaved(
    arms: Mapping[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    before_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, by a clock that waits for the device."""
    clock = clock_of(device)

    def timed(call: Callable[[], None]) -> float:
        begin = clock()
        call()
        return clock() - begin

    return in_turns(arms, rounds, timed, before_round)


def in_turns(
    arms: Mapping[str, Callable[[], None]],
    rounds: int,
    timed: Callable[[Callable[[], None]], float],
    before_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """What `timed` says of each arm in each round, after one round that is not counted.

    Each round starts with another arm, so that none always runs after the same one.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for count in range(rounds + 1):
        before_round()
        turn = count % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = timed(arms[name])
            if count:
                seconds[name].append(elapsed)
    return seconds


def by_events(call: Callable[[], None], times: int) -> float:
    """Seconds of a call on the current CUDA device, by its own events around so many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / times


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Time relative to the baseline's in the same round."""
    return spread([a / b for a, b in zip(seconds, baseline, strict=True)])


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that shows a time when the device is done with everything asked of it."""
    if device.type != "cuda":
        return perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return clock
