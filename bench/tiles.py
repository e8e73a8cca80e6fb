"""`RESULTS=FOLDER python -m bench.tiles`: tiles of Triton's kernels for residual MLPs beside each other, on a GPU.

`--write FOLDER/tiles.json` then puts the fastest of each kernel into the tables of `resode_cuda/fused/triton/tiles.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resode_cuda import ResidualMLP, smooth_init_
from resode_cuda.fused.triton.tiles import Tile

from .command_line import end_with, needing, writable_folder
from .harness import environment
from .harness.fused_backends import ONE_PASS, TWO_PASS, step_by, triton_gradient_forms
from .harness.mlp_networks import batch_of, fused_step
from .harness.results import write_json
from .harness.timing import by_events, in_turns, ratios
from .harness.triton_tiles import KERNELS, SOURCE, Entry, candidates, entry_at, entry_for, instead_of, rewritten
from .harness.workers import run_within

ROWS, DEPTH = 262_144, 64
"""Rows and depth of so much work that the device takes longer over a call than the host."""
ROUNDS, CALLS = 9, 3
"""Rounds in which all tiles take turns, and calls between two events."""
WORKERS, COMPILING = 15, 60
"""Processes that compile ahead, and the seconds after which what is not compiled is compiled when it is needed."""
SECONDS = 125
"""Time after which no kernel is begun."""
GAIN = 0.98
"""Time of another tile, of that in use, at most, for which the table is changed."""
SLOWEST = 3.0
"""Time of a tile's first call after it is compiled, of that of the tile in use, from which on it is not measured."""
IN_USE, FASTEST = "that in use", "the fastest"

Timed = Callable[[Callable[[], None], int], float]
"""Seconds of a call, over so many."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """What tiles are tried on."""

    dim: int
    hidden: int
    scheme: str = "euler"
    norm: str | None = None

    @property
    def is_plain(self) -> bool:
        return self.scheme == "euler" and self.norm is None

    def build(self) -> ResidualMLP:
        torch.manual_seed(0)
        mlp = ResidualMLP(
            *(self.dim, self.hidden, DEPTH, self.scheme),
            activation="silu",
            norm=self.norm,
            on_drift="ignore",
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
        )
        return smooth_init_(mlp)


NETWORKS = (Network(64, 128), Network(128, 512), Network(64, 128, "heun", "rms"))
"""The networks, from the most to the least important; the last shares its tiles with the second."""
PASSES: dict[str, tuple[str, str]] = dict(
    zip(
        KERNELS,
        (
            ("forward", "triton"),
            ("extrapolated", f"triton {TWO_PASS}"),
            ("extrapolated", f"triton {ONE_PASS}"),
            ("checkpoint", "triton"),
            ("extrapolated", f"triton {TWO_PASS}"),
        ),
        strict=True,
    )
)
"""Mode and backend of the training step that is timed for each kernel; "forward" is a forward pass alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tiles",
        description="Times four to six tiles of each of Triton's kernels for residual MLPs on a GPU, by its own "
        "events, in turns; writes tiles.json to the folder that the environment variable RESULTS names.",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="RESULT",
        help=f"time nothing, but put the fastest tiles of such a file into the tables of {SOURCE.name}",
    )
    given = parser.parse_args(arguments)
    if given.write:
        with needing(f"bench.tiles: --write must be a tiles.json of this command, got {given.write}"):
            entries = fastest(json.loads(given.write.read_text())["rows"])
        with needing(f"bench.tiles: the table must be a file that can be written, got {SOURCE}"):
            write(entries)
        return 0
    if not os.environ.get("RESULTS"):
        print("bench.tiles: the environment variable RESULTS must name the folder for tiles.json", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("bench.tiles: needs a CUDA device, but torch finds none", file=sys.stderr)
        return 2
    time_all(Path(os.environ["RESULTS"]) / "tiles.json")
    return 0


def time_all(file: Path) -> None:
    """Time the tiles of every network's kernels; the file has what there is after each kernel."""
    writable_folder("bench.tiles: RESULTS", file.parent)
    until = time.perf_counter() + SECONDS
    compile_ahead()
    record: Row = {"environment": environment.describe(torch.device("cuda")), "rows": [], "left_out": []}
    for network in NETWORKS:
        mlp = network.build()
        for kernel in kernels_of(mlp):
            if time.perf_counter() > until:
                record["left_out"].append({**asdict(network), "kernel": kernel})
            else:
                entry = entry_of(network)
                rows = measure(entry, kernel, partial(call_of, mlp, entry, kernel), by_events)
                record["rows"] += [{**asdict(network), **row} for row in rows]
                print("\n".join(shown(network, row) for row in rows), flush=True)
            write_json(record, file)


def write(entries: Sequence[Entry]) -> None:
    """Put rows into the library's tables, and say which."""
    source = SOURCE.read_text()
    for entry in entries:
        source = rewritten(source, entry)
        print(f"{entry.table}[{entry.key}]: {entry.tiles}")
    SOURCE.write_text(source)


def measure(entry: Entry, kernel: str, call_with: Callable[[Tile], Callable[[], None]], timed: Timed) -> list[Row]:
    """Each candidate's seconds in each round, and relative to the tile in use; or why it has none.

    Where the tile in use can't be launched, the others are compared with the fastest of them.
    """
    tried = {str(index): (tile, call_with(tile)) for index, tile in enumerate(candidates(entry, kernel))}
    once: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, (_, call) in tried.items():
        try:
            call()  # compiles it
            once[name] = timed(call, 1)
        except Exception:  # most often it needs more shared memory than there is
            reasons[name] = traceback.format_exc(limit=-1)
    kind = IN_USE if "0" in once else FASTEST
    shortest = once.get("0", min(once.values(), default=math.inf))
    for name, elapsed in once.items():
        if elapsed > SLOWEST * shortest:  # one whose registers spill would take the time of all others
            reasons[name] = f"not measured: one call took {elapsed / shortest:.1f} times as long as {kind}"
    running = {name: call for name, (_, call) in tried.items() if name not in reasons}
    seconds = in_turns(running, ROUNDS, lambda call: timed(call, CALLS)) if running else {}
    baseline = seconds.get("0") or min(seconds.values(), key=statistics.median, default=[])
    return [
        {
            "table": entry.table,
            "key": entry.key,
            "kernel": kernel,
            "tile": list(tile),
            "seconds": seconds.get(name),
            "baseline": kind,
            "of_baseline": ratios(seconds[name], baseline).median if name in seconds else None,
            "reason": reasons.get(name),
        }
        for name, (tile, _) in tried.items()
    ]


def fastest(rows: Sequence[Row]) -> list[Entry]:
    """The rows of the tables that change. Where networks share one, a tile's time is the mean over all of them.

    The first tile of each kernel is that in use.
    """
    changed: dict[tuple[str, int], Entry] = {}
    for table, key, kernel in dict.fromkeys((row["table"], row["key"], row["kernel"]) for row in rows):
        relative: dict[tuple[int, ...], list[float]] = {}
        for row in rows:
            if (row["table"], row["key"], row["kernel"]) == (table, key, kernel):
                # What can't be launched for one network is not taken for another.
                relative.setdefault(tuple(row["tile"]), []).append(row["of_baseline"] or math.inf)
        means = {tile: statistics.geometric_mean(times) for tile, times in relative.items()}
        in_use, best = next(iter(means)), min(means, key=lambda tile: means[tile])
        if means[best] < math.inf and means[best] <= GAIN * means[in_use]:
            entry = changed.get((table, key)) or entry_at(table, key)
            changed[table, key] = entry._replace(tiles=entry.tiles._replace(**{kernel: Tile(*best)}))
    return list(changed.values())


def shown(network: Network, row: Row) -> str:
    """A line for people."""
    name = f"{network.dim}/{network.hidden} {network.scheme} {network.norm or 'no norm'} {row['kernel']}"
    if row["reason"] is not None:
        figures = row["reason"].strip().rpartition("\n")[2]
    else:
        of_baseline = f"{row['of_baseline']:.2f} of the time of {row['baseline']}"
        figures = f"{1e3 * statistics.median(row['seconds']):8.3f} ms  {of_baseline}"
    return f"{name:36} {row['tile']!s:18} {figures}"


def entry_of(network: Network) -> Entry:
    return entry_for(torch.cuda.get_device_capability(), network.dim, torch.bfloat16.itemsize, network.is_plain)


def kernels_of(mlp: ResidualMLP) -> list[str]:
    """The kernels that can run for a network on this GPU."""
    return [kernel for kernel, (_, backend) in PASSES.items() if backend in ("triton", *triton_gradient_forms(mlp))]


def call_of(mlp: ResidualMLP, entry: Entry, kernel: str, tile: Tile, rows: int = ROWS) -> Callable[[], None]:
    """The pass that is timed for a kernel, with this tile."""
    mode, backend = PASSES[kernel]
    batch = batch_of(rows, mlp)
    step = step_by(mlp, "extrapolated" if mode == "forward" else mode, backend)

    def call() -> None:
        with instead_of(entry, kernel, tile), torch.set_grad_enabled(mode != "forward"):
            if mode == "forward":
                fused_step(mlp, "extrapolated", backend).function(batch[0])
            else:
                step(batch)

    return call


def compile_ahead() -> None:
    """Compile all candidates, those of each network and kernel in a process of its own, into Triton's cache."""
    run_within(COMPILING, _compile, [(network, kernel) for network in NETWORKS for kernel in KERNELS], WORKERS)


def _compile(network: Network, kernel: str) -> None:
    mlp = network.build()
    if kernel in kernels_of(mlp):
        entry = entry_of(network)
        for tile in candidates(entry, kernel):
            try:
                call_of(mlp, entry, kernel, tile, rows=1024)()
            except Exception:  # the measurement says why
                continue


if __name__ == "__main__":
    end_with(main)
