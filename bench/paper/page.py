"""One self-contained HTML page: what each experiment must show, its picture, and whether it did."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from ..harness import environment
from .experiment import EXPERIMENTS

NAME = "index.html"
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>The paper's experiments</title><style>
body { font: 16px/1.5 sans-serif; color: #222; max-width: 62em; margin: 2em auto; padding: 0 1em }
img { max-width: 100%; margin: 0.5em 0 }
h2 { margin-top: 2.5em; border-top: 1px solid #ccc; padding-top: 1em }
.missed { color: #b00; font-weight: bold } .small { color: #666; font-size: 0.85em }
</style></head><body>
<h1>The paper's experiments</h1>
<p>Sander, Ablin, Peyré, “Do Residual Neural Networks discretize Neural Ordinary Differential Equations?”, NeurIPS 2022,
<a href="https://arxiv.org/abs/2205.14612">arXiv:2205.14612</a>, small enough for two CPU cores, and experiments of
resode_cuda beside them.</p>
"""


def write(directory: Path) -> Path:
    """Write the page from the JSON files and pictures of a directory."""
    parts = [HEAD]
    for name in EXPERIMENTS:
        record = record_in(directory / f"{name}.json")
        if record is not None:
            parts.append(_section(record, directory / f"{name}.png"))
    page = directory / NAME
    page.write_text("\n".join([*parts, "</body></html>\n"]))
    return page


def record_in(file: Path) -> dict[str, Any] | None:
    """What a run left of an experiment; None where there is nothing, or nothing that can be read."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"settings", "figures", "checks"} <= record.keys() else None


def _section(record: dict[str, Any], picture: Path) -> str:
    lines = [f"<h2>{html.escape(record['title'])}</h2>", f"<p>Must show: {html.escape(record['must_show'])}</p>"]
    encoded = base64.b64encode(picture.read_bytes()).decode()
    lines.append(f'<img alt="{html.escape(record["title"])}" src="data:image/png;base64,{encoded}">')
    if record["judged"]:
        lines += ["<ul>", *map(_check, record["checks"]), "</ul>"]
    else:
        lines.append("<p>A quick run: too small to be judged.</p>")
    lines += [f"<p>{html.escape(note)}</p>" for note in record["notes"]]
    where = environment.one_line(record["environment"])
    lines.append(f'<p class="small">{record["wall_seconds"]:.0f} s on {html.escape(where)}</p>')
    return "\n".join(lines)


def _check(check: dict[str, Any]) -> str:
    kind = "met" if check["met"] else "missed"
    return f'<li class="{kind}">{html.escape(check["shown"])}</li>'
