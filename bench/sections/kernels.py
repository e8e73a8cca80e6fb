"""The ops alone: on a GPU each backend's bandwidth beside a copy's, on a CPU the time beside plain torch's.

On a GPU tensors are too large for its cache, and each op is held against a copy that reads and writes as many bytes in
the same round. On a CPU states have the size of the reference job's, and what a step of a stack computes outside its
blocks is held against the same formulas in plain torch, in place where the op is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from resode_cuda import ops
from resode_cuda.ops.operands import ReverseExtrapolateOperands, ReverseUpdateOperands

from ..harness.tables import MIB, Table, Target, relative_time
from ..harness.timing import Spread, interleaved, ratios
from ..options import Options
from .cost import ROWS, WIDTH

COPY_SHARE = 0.85
"""Least bandwidth of each kernel, relative to a copy's."""
PLAIN_LIMIT = 1.0
"""Time of a step's pointwise work relative to plain torch's, at most."""
STATE_BYTES = 256 * MIB
MATMUL = 8192
REPEATS = 5
"""Calls between two readings of the clock, so that a GPU's queue never runs dry."""
PAIRS = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
"""Dtypes of the stream and of a block's output."""
STEPS = (("Euler", "corrected"), ("Euler", "extrapolated"), ("Heun", "corrected"), ("Heun", "extrapolated"))
H, WEIGHT, A, B, S, T = 0.1, 0.05, 2.0, 1.0, 0.99, 0.01
BITS = 4
"""Bits a value of stored increments."""

Arms = dict[str, Callable[[], None]]


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    if device.type != "cuda":
        return {"steps": _plain_comparison(options, device, progress)}
    state_bytes = MIB if options.quick else STATE_BYTES
    cases = [(name, pair) for pair in PAIRS for name in op_calls(*op_states(1, pair, device))]
    measuring = progress.add_task("kernels", total=len(cases) + 1)
    ceilings = _ceilings(options, device, state_bytes)
    progress.advance(measuring)
    rows: list[dict[str, Any]] = []
    for name, pair in cases:
        call, moved = op_calls(*op_states(state_bytes // pair[0].itemsize, pair, device))[name]
        rows += _beside_a_copy(name, pair, call, moved, options, device)
        progress.advance(measuring)
    return {"state_bytes": state_bytes, "ceilings": ceilings, "rows": rows}


def tables(figures: dict[str, Any]) -> list[Table]:
    if "steps" in figures:
        table = Table("Pointwise work of a step, fp32, CPU", ("scheme", "reverse", "against plain torch"))
        table.rows += [(row["scheme"], row["reverse"], _relative(row["against_plain"])) for row in figures["steps"]]
        table.note = "Time relative to plain torch's in the same round: median ± half the distance of the quartiles."
        return [table]
    ceilings = figures["ceilings"]
    table = Table(
        f"Ops on states of {figures['state_bytes'] // MIB} MiB",
        ("op", "stream, stage", "backend", "MiB moved", "ms", "GB/s", "of a copy's"),
        labels=3,
    )
    for row in figures["rows"]:
        table.rows.append(
            (
                *(row["op"], row["dtypes"], row["backend"], f"{row['bytes'] / MIB:.0f}"),
                *(f"{1e3 * row['seconds']:.3f}", f"{row['bytes'] / row['seconds'] / 1e9:.0f}"),
                _relative(row["of_copy"]),
            )
        )
    table.note = (
        f"Bandwidth relative to a copy of as many bytes in the same round. This device copies {ceilings['copy']:.0f} "
        f"GB/s (read and written) and multiplies bfloat16 matrices of {MATMUL} at {ceilings['matmul']:.0f} TFLOP/s."
    )
    return [table]


def targets(figures: dict[str, Any]) -> list[Target]:
    if "steps" in figures:
        return [
            Target(
                f"pointwise work of a step, {row['scheme']} {row['reverse']}, against plain torch",
                row["against_plain"]["median"],
                PLAIN_LIMIT,
            )
            for row in figures["steps"]
        ]
    kernels = [row for row in figures["rows"] if row["backend"] != "torch"]
    return [
        Target(
            f"{row['backend']} {row['op']} ({row['dtypes']}), of a copy's bandwidth",
            row["of_copy"]["median"],
            COPY_SHARE,
            at_least=True,
        )
        for row in kernels
    ]


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    return []


def _ceilings(options: Options, device: torch.device, state_bytes: int) -> dict[str, float]:
    """Bandwidth of a copy in GB/s, reads and writes, and of a matrix product in TFLOP/s."""
    size = 256 if options.quick else MATMUL
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    arms = {"copy": _copy(2 * state_bytes, device), "matmul": _repeated(partial(torch.mm, a, b))}
    seconds = interleaved(arms, _rounds(options), device)
    return {
        "copy": 2 * state_bytes / _call_seconds(seconds["copy"]) / 1e9,
        "matmul": 2 * size**3 / _call_seconds(seconds["matmul"]) / 1e12,
    }


def _beside_a_copy(
    name: str,
    pair: tuple[torch.dtype, torch.dtype],
    call: Callable[[], Any],
    moved: int,
    options: Options,
    device: torch.device,
) -> list[dict[str, Any]]:
    op = name.split()[0]
    runnable = [backend for backend, reason in ops.backends(device)[op].items() if reason is None]
    arms = {"copy": _copy(moved, device), **{backend: _using(backend, _repeated(call)) for backend in runnable}}
    seconds = interleaved(arms, _rounds(options), device)
    return [
        {
            "op": name,
            "dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in pair),
            "backend": backend,
            "bytes": moved,
            "seconds": _call_seconds(seconds[backend]),
            "of_copy": vars(ratios(seconds["copy"], seconds[backend])),
        }
        for backend in runnable
    ]


def _plain_comparison(options: Options, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    rows_per_batch = 128 if options.quick else ROWS
    states = tuple(torch.randn(rows_per_batch, WIDTH, device=device) for _ in range(8))
    # glibc's malloc maps and unmaps large tensors until one as large as this was freed: fresh pages cost several times
    # what the formulas do, and to either side by chance.
    torch.empty(31 * MIB, dtype=torch.uint8, device=device)
    squares = torch.zeros(2, device=device, dtype=torch.float64)
    measuring = progress.add_task("pointwise work", total=len(STEPS))
    rows = []
    for scheme, reverse in STEPS:
        arms = {
            name: _repeated(partial(_step, formulas, scheme, reverse, states, squares))
            for name, formulas in (("ops", ops), ("plain", Plain))
        }
        seconds = interleaved(arms, 10 * options.rounds, device)
        against = vars(ratios(seconds["ops"], seconds["plain"]))
        rows.append({"scheme": scheme, "reverse": reverse, "seconds": seconds, "against_plain": against})
        progress.advance(measuring)
    return rows


def op_calls(
    streams: tuple[Tensor, ...], stages: tuple[Tensor, ...], squares: Tensor
) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name, each op as a step calls it, and the bytes that it reads and writes."""
    x, y, d, g, v1, v2 = streams
    k1, k2 = stages
    resode = torch.ops.resode
    companion, unit = resode.start_companion(x)
    packed = torch.zeros(1, -(-x.numel() // 32), 4 * BITS, device=x.device, dtype=torch.uint8)
    operands: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "forward_step": (resode.forward_step, (x, k1, H)),
        "heun_step": (resode.heun_step, (x, k1, k2, H)),
        "reverse_update_ Euler": (resode.reverse_update_, (x, y, k1, None, WEIGHT, squares, g, v1, None, S, T)),
        "reverse_update_ Heun": (resode.reverse_update_, (x, y, k1, k2, WEIGHT, squares, g, v1, v2, S, T)),
        "reverse_extrapolate_ Euler": (
            resode.reverse_extrapolate_,
            (x, y, d, k1, None, WEIGHT, A, B, squares, g, v1, None, S, T),
        ),
        "reverse_extrapolate_ Heun": (
            resode.reverse_extrapolate_,
            (x, y, d, k1, k2, WEIGHT, A, B, squares, g, v1, v2, S, T),
        ),
        "adjoint_update_": (resode.adjoint_update_, (g, v1, None, S, T)),
        "store": (resode.store, (y, companion, unit, BITS)),
        "store_step Euler": (resode.store_step, (x, k1, None, WEIGHT, companion, unit, BITS)),
        "store_step Heun": (resode.store_step, (x, k1, k2, WEIGHT, companion, unit, BITS)),
        "stored_step": (resode.stored_step, (companion, packed, packed[..., 0].contiguous(), unit, BITS)),
    }
    return {name: (partial(op, *values), _moved(op, values)) for name, (op, values) in operands.items()}


def _moved(op: Any, values: tuple[Any, ...]) -> int:
    """Bytes read, and written where the schema says so, the results' among them; squares are too small to count."""
    schema = op.default._schema
    states = [
        (tensor, argument.is_write)
        for argument, tensor in zip(schema.arguments, values, strict=True)
        if isinstance(tensor, Tensor) and argument.name != "squares"
    ]
    moved = sum(tensor.nbytes * (2 if is_written else 1) for tensor, is_written in states)
    if not schema.returns:
        return moved
    results = op(*(value.to("meta") if isinstance(value, Tensor) else value for value in values))
    return moved + sum(result.nbytes for result in as_tuple(results))


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """What an op returns, one result or several."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def op_states(
    count: int, pair: tuple[torch.dtype, torch.dtype], device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    stream, stage = pair
    streams = tuple(torch.randn(count, device=device, dtype=stream) for _ in range(6))
    stages = tuple(torch.randn(count, device=device, dtype=stage) for _ in range(2))
    return streams, stages, torch.zeros(2, device=device, dtype=torch.float64)


class Plain:
    """The ops' formulas as one would write them for a step in plain torch."""

    @staticmethod
    def forward_step(x: Tensor, f: Tensor, h: float) -> Tensor:
        return x + h * f

    @staticmethod
    def heun_step(x: Tensor, k1: Tensor, k2: Tensor, h: float) -> Tensor:
        return x + 0.5 * h * (k1 + k2)

    @staticmethod
    def reverse_update_(*values: Any) -> None:
        operands = ReverseUpdateOperands(*values)
        x, y, k1, k2, weight, squares, *_ = operands
        x.sub_(k1 if k2 is None else k1 + k2, alpha=weight)
        squares[0] += (y - x).square().sum()
        squares[1] += x.square().sum()
        Plain._update_adjoint_(operands)

    @staticmethod
    def reverse_extrapolate_(*values: Any) -> None:
        operands = ReverseExtrapolateOperands(*values)
        x, y, d, k1, k2, weight, a, b, squares, *_ = operands
        increment = weight * (k1 if k2 is None else k1 + k2)
        x.sub_(increment)
        squares[0] += (y - x).square().sum()
        squares[1] += x.square().sum()
        y.copy_(x - (a * increment - b * d))
        d.copy_(increment)
        Plain._update_adjoint_(operands)

    @staticmethod
    def _update_adjoint_(operands: ReverseUpdateOperands | ReverseExtrapolateOperands) -> None:
        g, v1, v2 = operands.g, operands.v1, operands.v2
        assert g is not None
        assert v1 is not None
        g.mul_(operands.g_scale).add_(v1 if v2 is None else v1 + v2, alpha=operands.v_scale)


def _step(ops: Any, scheme: str, reverse: str, states: tuple[Tensor, ...], squares: Tensor) -> None:
    """What a step computes outside its blocks, forwards and then backwards, with one correction."""
    x, y, d, g, v1, v2, k1, k2 = states
    evaluations = ("forward", "correction") if reverse == "extrapolated" else ("forward", "prediction", "correction")
    for _ in evaluations:
        ops.forward_step(x, k1, H)
        if scheme == "Heun":
            ops.heun_step(x, k1, k2, H)
    heun: tuple[Tensor | None, Tensor | None] = (None, None)
    if scheme == "Heun":
        heun = k2, v2
        ops.forward_step(y, k1, H)
        ops.forward_step(g, v2, H)
    if reverse == "extrapolated":
        ops.reverse_extrapolate_(x, y, d, k1, heun[0], WEIGHT, A, B, squares, g, v1, heun[1], S, T)
    else:
        ops.reverse_update_(x, y, k1, heun[0], WEIGHT, squares, g, v1, heun[1], S, T)


def _copy(moved: int, device: torch.device) -> Callable[[], None]:
    """A copy that moves so many bytes: half as many, each read and written."""
    source, target = torch.randint(256, (2, moved // 2), device=device, dtype=torch.uint8)
    return _repeated(partial(target.copy_, source))


def _repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(REPEATS):
            call()

    return calls


def _using(backend: str, call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with ops.using(backend):
            call()

    return run


def _rounds(options: Options) -> int:
    return 5 * options.rounds


def _call_seconds(seconds: list[float]) -> float:
    return statistics.median(seconds) / REPEATS


def _relative(values: dict[str, float]) -> str:
    return relative_time(Spread(**values))
