"""The contenders of a benchmark of networks, which take turns: each is timed until it fails, and then says why."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .timing import interleaved

OUT_OF_MEMORY = "out of memory"
NO_TIME = "no time left"


class Arm:
    """A call that is timed until it fails, and from then on says why.

    Args:
        kind, mode, backend: what is called, for people.
        times: calls between two readings of the clock.
    """

    def __init__(
        self, kind: str, mode: str, call: Callable[[], object], backend: str | None = None, times: int = 1
    ) -> None:
        self.kind, self.mode, self.backend, self.times, self._call = kind, mode, backend, times, call
        self.first_seconds: float | None = None
        self.reason: str | None = None

    def __call__(self) -> None:
        if self.reason is not None:
            return
        try:
            self._call()
            return
        except torch.OutOfMemoryError:
            self.reason = OUT_OF_MEMORY
        except Exception:
            self.reason = traceback.format_exc()
        # Not above: what the exception's frames hold can't be released there.
        gc.collect()
        torch.cuda.empty_cache()

    def first(self, clock: Callable[[], float]) -> None:
        """Take the first call, which compiles and tunes whatever there is to be."""
        self.first_seconds = self._timed(clock)

    def settle(self, clock: Callable[[], float], seconds: float, most: int) -> None:
        """Take another call, and set `times` so that as many take about these seconds, but to `most` at most."""
        self.times = max(1, min(most, round(seconds / max(self._timed(clock), 1e-9))))

    def _timed(self, clock: Callable[[], float]) -> float:
        begin = clock()
        self()
        return clock() - begin


def take_turns(
    arms: Sequence[Arm], rounds: int, device: torch.device, before_round: Callable[[], None]
) -> dict[Arm, list[float]]:
    """Seconds of a call of each arm in each round, without the arms that have failed by the end."""

    def repeated(arm: Arm) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(arm.times):
                arm()

        return calls

    calls = {str(index): repeated(arm) for index, arm in enumerate(arms)}
    seconds = interleaved(calls, rounds, device, before_round)
    return {arm: [s / arm.times for s in seconds[str(index)]] for index, arm in enumerate(arms) if arm.reason is None}


def described(arm: Arm, by_arm: dict[Arm, list[float]]) -> dict[str, Any]:
    """What a result file keeps of an arm."""
    facts = {"kind": arm.kind, "mode": arm.mode, "backend": arm.backend, "reason": arm.reason}
    return {**facts, "first_seconds": arm.first_seconds, "seconds": by_arm.get(arm)}


def failures(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Reasons that are no limit of memory or time, and make a section fail."""
    return [row["reason"] for row in rows if row.get("reason") not in (None, OUT_OF_MEMORY, NO_TIME)]


def shown(reason: str) -> str:
    return reason if reason in (OUT_OF_MEMORY, NO_TIME) else "failed"
