"""`python -m bench.timings RESULTS`: makes the table by which `backend="auto"` chooses.

RESULTS is the results.json of `python -m bench --only backends` on a GPU. What the table had of the same compute
capability is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from resode_cuda.fused import timings
from resode_cuda.fused.timings import Size

from .command_line import end_with, needing
from .harness.timing import spread

SOURCE = ("device", "driver", "cuda", "torch", "triton", "resode_cuda", "commit", "date")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.timings", description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS")
    given = parser.parse_args(arguments).results
    with needing(f"bench.timings: RESULTS must be a results.json of python -m bench, got {given}"):
        results = json.loads(given.read_text())
        found = sizes_of(results)
        source = {name: results["environment"][name] for name in SOURCE} if found else {}
    if not found:
        print(f"bench.timings: RESULTS must be of backends on a GPU, not --quick, got {given}", file=sys.stderr)
        return 2
    new = {size.capability for size in found}
    sources = json.loads(timings.FILE.read_text())["sources"] if timings.FILE.exists() else {}
    sources |= {f"{major}.{minor}": source for major, minor in new}
    sizes = sorted([size for size in timings.sizes() if size.capability not in new] + found, key=lambda size: size[:-1])
    lines = ",\n".join(json.dumps(size._asdict()) for size in sizes)
    with needing(f"bench.timings: the table must be a file that can be written, got {timings.FILE}"):
        timings.FILE.write_text(f'{{"sources": {json.dumps(sources, indent=1)},\n"sizes": [\n{lines}\n]}}\n')
    print(f"{len(found)} sizes on {results['environment']['device']}: {timings.FILE}")
    return 0


def sizes_of(results: dict[str, Any]) -> list[Size]:
    """The table's rows that a run gives; none from a CPU or a quick run."""
    part = results["sections"].get("backends", {}).get("sizes")
    if part is None or results["options"]["quick"]:
        return []
    times: dict[tuple[tuple[int, int], int, int, int, int], dict[str, float]] = {}
    for row in part["rows"]:
        if row["capability"] is None or row["backend"] == "auto" or row["seconds"] is None:
            continue
        major, minor = row["capability"]
        itemsize = getattr(torch, row["dtype"]).itemsize
        microseconds = 1e6 * spread(row["seconds"]).median / row["depth"]
        size = (major, minor), itemsize, row["dim"], row["hidden"], row["rows"]
        times.setdefault(size, {})[row["backend"]] = float(f"{microseconds:.4g}")
    return [Size(*size, of_size) for size, of_size in times.items()]


if __name__ == "__main__":
    end_with(main)
