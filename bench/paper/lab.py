"""What experiments measure with: jobs side by side, each of which is kept once it has ended.

A training takes minutes and a run many of them, so results lie in a file each until the experiment's own JSON is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..harness import workers
from ..harness.results import write_json


class Lab:
    """The jobs of one experiment.

    Args:
        name: the experiment's, for the progress bar.
        folder: where results are kept until `clear`.
    """

    def __init__(self, name: str, folder: Path, device: torch.device, progress: Progress) -> None:
        self.device = device
        self._name, self._folder, self._progress = name, folder, progress

    def results(self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What `function` returns for the arguments of each job, in order, as JSON gives it back.

        The function is pickled, and its arguments; their `repr` tells jobs apart. What an earlier run has kept is not
        computed again.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [self._folder / f"{_digest(function, job)}.json" for job in jobs]
        missing = [(function, job, file) for job, file in zip(jobs, files, strict=True) if not file.exists()]
        bar = self._progress.add_task(self._name, total=len(jobs), completed=len(jobs) - len(missing))
        if torch.get_num_threads() == 1:  # a process that does all of it would only take longer
            for job in missing:
                _keep(*job)
                self._progress.advance(bar)
        elif missing:
            workers.results(_keep, missing, self.device, lambda _: self._progress.advance(bar))
        return [json.loads(file.read_text()) for file in files]

    def clear(self) -> None:
        """Forget what was kept."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # other experiments have kept something
            self._folder.parent.rmdir()


def _keep(function: Callable[..., Any], job: tuple[Any, ...], file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # solvers that diverge are part of the experiments
        write_json(function(*job), file)


def _digest(function: Callable[..., Any], job: tuple[Any, ...]) -> str:
    return hashlib.sha256(f"{function.__module__}.{function.__qualname__}{job!r}".encode()).hexdigest()[:16]
