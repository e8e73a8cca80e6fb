"""`python -m bench`: runs the sections, prints tables and targets, and keeps every figure in results.json."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .options import Options, parse

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from .harness.report import Table, Target


def main() -> int:
    options = parse()
    import torch  # not before the options, so that --help comes at once
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .harness import environment, results

    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda needs a CUDA device, but torch finds none; use auto or cpu", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    options.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "environment": environment.describe(device),
        "options": {name: value for name, value in asdict(options).items() if name != "output"},
        "sections": {},
    }
    where = environment.one_line(record["environment"])
    console = Console()
    console.print(where, highlight=False)
    tables: list[Table] = []
    targets: list[Target] = []
    bar = BarColumn()
    with Progress(TextColumn("{task.description}"), bar, TimeElapsedColumn(), console=console) as progress:
        for name in options.only:
            # A section that fails must not take the others' figures with it.
            begin = time.perf_counter()
            figures: dict[str, Any] = {}
            record["sections"][name] = figures
            try:
                _run(name, options, device, progress, figures, tables, targets)
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
    for table in tables:
        console.print()
        console.print(table.rich())
        console.print(table.note, style="dim", highlight=False)
    console.print()
    if options.quick:
        console.print("Targets are not judged with --quick.")
    else:
        for target in targets:
            console.print(str(target), style=None if target.met else "bold", highlight=False)
    results.save_tables(tables, where, options.output)
    wall = ", ".join(f"{name} {figures['wall_seconds']:.0f} s" for name, figures in record["sections"].items())
    console.print(f"{wall}. Results: {options.output}", highlight=False)
    return int(any("failure" in figures for figures in record["sections"].values()))


def _run(
    name: str,
    options: Options,
    device: torch.device,
    progress: Progress,
    figures: dict[str, Any],
    tables: list[Table],
    targets: list[Target],
) -> None:
    section = importlib.import_module(f"{__package__}.sections.{name}")
    figures.update(section.measure(options, device, progress))
    tables.extend(section.tables(figures))
    targets.extend(section.targets(figures))
    if not options.quick:
        figures["targets"] = [{**asdict(target), "met": target.met} for target in section.targets(figures)]
    if hasattr(section, "draw"):
        section.draw(figures, options.output)


if __name__ == "__main__":
    sys.exit(main())
