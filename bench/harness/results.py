"""The files that a run leaves: results.json, with every figure, and table.md, with the targets met and missed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import Table, Target


def save(record: dict[str, Any], directory: Path) -> None:
    write_json(record, directory / "results.json")


def write_json(content: Any, file: Path) -> None:
    """Whole or not at all: an interrupted run leaves the file as it was."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(file)


def save_tables(tables: Sequence[Table], targets: Sequence[Target], where: str, directory: Path) -> None:
    parts = [table.markdown() for table in tables]
    if targets:
        parts.append("\n".join(["**Targets**", "", *(f"- {target}" for target in targets)]))
    (directory / "table.md").write_text("\n\n".join([*parts, f"Measured on {where}."]) + "\n")
