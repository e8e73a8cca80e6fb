"""`python -m bench`: runs the sections, prints tables and targets, and keeps every figure in results.json."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .command_line import end_with, writable_folder
from .options import Options, parse
from .section import SECTIONS, Figures

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .harness.tables import Table, Target


def main() -> int:
    options = parse()
    import torch  # not before the options, so that --help comes at once
    from rich.console import Console

    from .harness import environment, results

    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda needs a CUDA device, but torch finds none; use auto or cpu", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    writable_folder("bench: --output", options.output)
    record: dict[str, Any] = {
        "environment": environment.describe(device),
        "options": {name: value for name, value in asdict(options).items() if name != "output"},
        "sections": {},
    }
    where = environment.one_line(record["environment"])
    console = Console()
    console.print(where, highlight=False)
    tables, targets = _run_sections(options, device, record, console)
    _show(tables, targets, options, console)
    results.save_tables(tables, [] if options.quick else targets, where, options.output)
    wall = ", ".join(f"{name} {figures['wall_seconds']:.0f} s" for name, figures in record["sections"].items())
    console.print(f"{wall}. Results: {options.output}", highlight=False)
    return int(any("failure" in figures for figures in record["sections"].values()))


def _run_sections(
    options: Options, device: torch.device, record: dict[str, Any], console: Console
) -> tuple[list[Table], list[Target]]:
    """The tables and targets of all sections; the record gets each section's figures, and is saved after each."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .harness import results

    tables: list[Table] = []
    targets: list[Target] = []
    bar = BarColumn()
    with Progress(TextColumn("{task.description}"), bar, TimeElapsedColumn(), console=console) as progress:
        for name in options.only:
            begin = time.perf_counter()
            figures: Figures = {}
            record["sections"][name] = figures
            # A section that fails must not take the others' figures with it.
            try:
                section = SECTIONS[name]()
                figures.update(section.measure(options, device, progress))
                tables += section.tables(figures)
                found = section.targets(figures)
                targets += found
                if not options.quick:
                    figures["targets"] = [{**asdict(target), "met": target.met} for target in found]
                section.draw(figures, options.output)
            except Exception:
                figures["failure"] = traceback.format_exc()
                console.print(f"{name} failed\n{figures['failure']}", markup=False, highlight=False)
            except KeyboardInterrupt:
                figures |= {"failure": "stopped", "stopped": True}
            figures["wall_seconds"] = time.perf_counter() - begin
            results.save(record, options.output)
            if figures.get("stopped"):
                console.print(f"stopped during {name}")
                break
    return tables, targets


def _show(tables: Sequence[Table], targets: Sequence[Target], options: Options, console: Console) -> None:
    for table in tables:
        console.print()
        console.print(table.rich())
        console.print(table.note, style="dim", highlight=False)
    console.print()
    if options.quick:
        console.print("Targets are not judged with --quick.")
        return
    for target in targets:
        console.print(str(target), style=None if target.met else "bold", highlight=False)


if __name__ == "__main__":
    end_with(main)
