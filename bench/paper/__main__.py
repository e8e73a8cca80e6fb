"""`python -m bench.paper`: runs the experiments that have no figures yet, and writes a page with all of them."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..command_line import CommandError, end_with, writable_folder
from .experiment import load
from .options import Options, parse

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ..harness.tables import Target


def main() -> int:
    options = parse()
    import torch  # not before the options, so that --help comes at once
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import page

    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.paper: --device cuda needs a CUDA device, but torch finds none; use auto or cpu", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    _check_data(options)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    writable_folder("bench.paper: --output", options.output)
    console, failed = Console(), False
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        for name in options.only:
            # One that fails must not take the others' figures with it.
            try:
                _run(name, options, device, progress)
            except KeyboardInterrupt:
                console.print(f"stopped during {name}; the same command goes on from there")
                return 1
            except CommandError:
                raise
            except Exception:
                failed = True
                console.print(f"{name} failed\n{traceback.format_exc()}", markup=False, highlight=False)
    page.write(options.output)
    console.print(f"Page: {options.output / page.NAME}", highlight=False)
    return int(failed)


def _check_data(options: Options) -> None:
    """Before anything is measured, that the folders can be read."""
    from .data import Source

    for name, folder in (("cifar10", options.cifar10), ("imagenet", options.imagenet)):
        if folder is not None:
            Source(name, str(folder)).load()


def _run(name: str, options: Options, device: torch.device, progress: Progress) -> None:
    """One experiment; its JSON and its picture."""
    from ..harness import environment
    from ..harness.results import write_json
    from .lab import Lab
    from .page import record_in

    experiment, file = load(name), options.output / f"{name}.json"
    settings = experiment.settings(options)
    lab = Lab(name, options.output / "unfinished" / name, device, progress)
    if options.fresh:
        lab.clear()
    plain = json.loads(json.dumps(asdict(settings)))
    record = None if options.fresh else record_in(file)
    was_there = record is not None and record["settings"] == plain
    if record is None or not was_there:
        begin = time.perf_counter()
        figures = json.loads(json.dumps(experiment.measure(settings, lab)))
        record = {
            "title": experiment.TITLE,
            "environment": environment.describe(device),
            "settings": plain,
            "wall_seconds": time.perf_counter() - begin,
            "figures": figures,
        }
    checks = experiment.checks(record["figures"])
    record["must_show"], record["notes"] = experiment.MUST_SHOW, experiment.notes(record["figures"])
    record["judged"] = not options.quick
    record["checks"] = [_recorded(check) for check in checks]
    experiment.draw(record["figures"], options.output / f"{name}.png")
    write_json(record, file)
    lab.clear()
    _show(name, record, was_there, progress.console)


def _recorded(check: Target) -> dict[str, Any]:
    # JSON has no infinity, which stands for a depth that there is none of, and no NaN.
    plain = {
        name: value for name, value in asdict(check).items() if not isinstance(value, float) or math.isfinite(value)
    }
    return {**plain, "met": check.met, "shown": str(check)}


def _show(name: str, record: dict[str, Any], was_there: bool, console: Console) -> None:
    spent = "figures of an earlier run" if was_there else f"{record['wall_seconds']:.0f} s"
    console.print(f"\n{name}: {record['title']} ({spent})", style="bold", highlight=False)
    for note in record["notes"]:
        console.print(f"  {note}", markup=False, highlight=False)
    for check in record["checks"] if record["judged"] else []:
        console.print(f"  {check['shown']}", style=None if check["met"] else "bold", highlight=False)


if __name__ == "__main__":
    end_with(main)
