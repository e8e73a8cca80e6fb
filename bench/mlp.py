"""A residual MLP whose depth is one op, beside plain backprop of the same network and beside its matrix products.

Everything of one size takes turns in one run: the op with every solver, a list of layers under autograd, stored or with
torch.utils.checkpoint around each layer, eagerly and by torch.compile, the step's matrix products alone, and one large
product, which is the device's ceiling. Weights are smooth in depth; each round has other inputs.
"""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from resode_cuda import ResidualMLP, smooth_init_
from resode_cuda.fused.backend import causes

from . import launches, memory
from .gradients import relative_error
from .mlp_networks import SEGMENT, Batch, Layers, Products, Step, batch_of, fused_step
from .mlp_report import OUT_OF_MEMORY, tables, targets
from .modes import BASELINE, MODES, set_mode
from .options import Options
from .timing import clock_of, interleaved, ratios

__all__ = ["measure", "tables", "targets"]

FUSED = ("extrapolated", "checkpoint", "corrected", "paper")
PLAIN = (BASELINE, "checkpoint")
BATCHES = 4  # other data in each round
STEPS_AT_A_TIME = {"cuda": 2, "cpu": 1}
"""Between two looks at the clock, so that a GPU's queue does not run dry."""
SHALLOW = 16
"""The depth that memory and launches are compared with."""
ERROR_ROWS = 256
SECONDS = 100
"""On a GPU no size is begun later than this."""


@dataclass(frozen=True)
class Job:
    """One size. `compiled`: how many layers are compiled at a time in each compiled peer; None is all of them.

    Where `is_judged`, the targets apply. Memory and launches are measured where `is_detailed`: they are the same for
    every activation.
    """

    dim: int
    hidden: int
    depth: int
    rows: int
    dtype: torch.dtype
    activation: str
    is_judged: bool = True
    is_detailed: bool = False
    compiled: tuple[int | None, ...] = (SEGMENT,)

    def network(self, depth: int, seed: int, device: torch.device) -> ResidualMLP:
        torch.manual_seed(seed)
        # Solvers are compared with how they drift, and need not be warned about.
        settings: dict[str, Any] = {"activation": self.activation, "on_drift": "ignore"}
        return smooth_init_(ResidualMLP(self.dim, self.hidden, depth, **settings)).to(device, self.dtype)


def jobs(options: Options, device: torch.device) -> list[Job]:
    """From the most to the least important."""
    if device.type != "cuda":
        found = [Job(64, 128, 64, 4096, torch.float32, "gelu", is_detailed=True, compiled=(None, SEGMENT))]
        found.append(replace(found[0], activation="silu", is_judged=False, is_detailed=False, compiled=(SEGMENT,)))
    else:
        small = Job(64, 128, 64, 262_144, torch.bfloat16, "silu", is_detailed=True, compiled=(None, SEGMENT))
        large = replace(small, dim=128, hidden=512, compiled=(SEGMENT,))
        found = [small, large]
        for activation in ("gelu_tanh", "gelu"):
            is_judged = activation != "gelu"
            settings: dict[str, Any] = {"activation": activation, "is_judged": is_judged, "is_detailed": False}
            found += [replace(job, **settings, compiled=(SEGMENT,) if is_judged else ()) for job in (small, large)]
    if options.quick:
        found = [
            replace(job, dim=job.dim // 4, hidden=job.hidden // 4, depth=2 * SEGMENT, rows=256 if index else 64)
            for index, job in enumerate(found)
        ]
    return found


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    with warnings.catch_warnings():
        # Of the compiler's own look at the inputs of a compiled segment.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        return _measure(options, device, progress)


def _measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    begin = time.perf_counter()
    # With --quick, the same graphs without the wait for code to be generated and compiled.
    compiler = "eager" if options.quick else "inductor"
    found, left_out, detailed = [], [], []
    all_jobs = jobs(options, device)
    measuring = progress.add_task("mlp", total=len(all_jobs) + 1)
    for job in all_jobs:
        if device.type == "cuda" and time.perf_counter() - begin > SECONDS:
            left_out.append(_facts(job))
        else:
            found.append(_timed(job, compiler, options, device))
            detailed += [(job, found[-1])] if job.is_detailed else []
            gc.collect()  # compiled functions are in cycles
            torch.cuda.empty_cache()
        progress.advance(measuring)
    for job, figures in detailed:  # after all timing: a process in which torch's profiler ran is slower
        figures["memory"] = _memory_and_launches(job, options, device)
    progress.advance(measuring)
    figures = {"device": device.type, "compiler": compiler, "segment": SEGMENT, "jobs": found, "left_out": left_out}
    failures = [row["cause"] for one in found for row in one["rows"] if row["cause"] not in (None, OUT_OF_MEMORY)]
    return {**figures, "failure": "\n".join(failures)} if failures else figures


def _facts(job: Job) -> dict[str, Any]:
    facts = {**vars(job), "batch_rows": job.rows, "dtype": str(job.dtype).removeprefix("torch.")}
    return {name: value for name, value in facts.items() if name != "rows"}


class Arm:
    """A call that is timed until it fails, and from then on says why."""

    def __init__(self, kind: str, mode: str, call: Callable[[], object], backend: str | None = None) -> None:
        self.kind, self.mode, self.backend, self._call = kind, mode, backend, call
        self.first_seconds: float | None = None
        self.cause: str | None = None

    def __call__(self) -> None:
        if self.cause is not None:
            return
        try:
            self._call()
            return
        except torch.OutOfMemoryError:
            self.cause = OUT_OF_MEMORY
        except Exception:
            self.cause = traceback.format_exc()
        # Not above: what the exception's frames hold can't be released there.
        gc.collect()
        torch.cuda.empty_cache()

    def first(self, clock: Callable[[], float]) -> None:
        """With whatever is compiled and tuned by it."""
        begin = clock()
        self()
        self.first_seconds = clock() - begin


def _timed(job: Job, compiler: str, options: Options, device: torch.device) -> dict[str, Any]:
    """Each arm's seconds in each round, and the gradients' errors."""
    torch.compiler.reset()  # what was compiled for another size would make this one's shapes dynamic
    mlp = job.network(job.depth, options.seed, device)
    batches = cycle([batch_of(job.rows, mlp) for _ in range(BATCHES)])
    current = [next(batches)]
    size = 256 if options.quick else 8192 if device.type == "cuda" else 1024
    arms = _arms(job, mlp, current, compiler, size)
    clock = clock_of(device)
    for arm in arms:
        arm.first(clock)
    times = STEPS_AT_A_TIME[device.type]

    def next_batch() -> None:
        current[0] = next(batches)

    calls = {str(index): _repeated(arm, times) for index, arm in enumerate(arms)}
    seconds = interleaved(calls, options.rounds + 2, device, next_batch)  # the limits on time are judged here
    by_arm = {arm: [s / times for s in seconds[str(index)]] for index, arm in enumerate(arms) if arm.cause is None}
    figures = {**_facts(job), "matmul": size, "matmul_flop": 2 * size**3}
    figures["flop"] = 8 * 2 * job.rows * job.dim * job.hidden * job.depth
    figures["rows"] = [_row(arm, by_arm) for arm in arms]
    figures["errors"] = _errors(mlp)
    return figures


def _arms(job: Job, mlp: ResidualMLP, current: list[Batch], compiler: str, size: int) -> list[Arm]:
    """All that take turns; `current` holds the round's inputs."""

    def on_current(step: Callable[[Batch], None]) -> Callable[[], None]:
        return lambda: step(current[0])

    layers = Layers(mlp)
    arms = [Arm("fused", mode, on_current(fused_step(mlp, mode)), _backend(mlp, mode)) for mode in FUSED]
    arms += [Arm("eager", mode, on_current(layers.step(mode))) for mode in PLAIN]
    for length in job.compiled:
        kind = "compiled" if length is None else f"compiled by {length}"
        arms += [Arm(kind, mode, on_current(layers.step(mode, compiler, length))) for mode in PLAIN]
    a, b = torch.randn(2, size, size, device=mlp.weight_in.device, dtype=job.dtype)
    return [
        *arms,
        Arm("bare", "products", on_current(Products(mlp, job.rows))),
        Arm("bare", "matmul", partial(torch.mm, a, b)),
    ]


def _backend(mlp: ResidualMLP, mode: str) -> str:
    """The one that "auto" takes."""
    set_mode(mlp, mode)
    solver = mlp.reverse if mlp.gradient == "adjoint" else None
    found = causes(mlp._network(), mlp.weight_in, solver)
    return next(name for name, cause in found.items() if cause is None)


def _repeated(arm: Arm, times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            arm()

    return calls


def _row(arm: Arm, by_arm: dict[Arm, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": arm.kind, "mode": arm.mode, "backend": arm.backend, "cause": arm.cause}
    row |= {"first_seconds": arm.first_seconds, "seconds": by_arm.get(arm)}
    for name, kind, mode in (("of_backprop", "eager", BASELINE), ("of_products", "bare", "products")):
        other = next((seconds for it, seconds in by_arm.items() if (it.kind, it.mode) == (kind, mode)), None)
        row[name] = vars(ratios(by_arm[arm], other)) if arm in by_arm and other is not None else None
    return row


def _errors(mlp: ResidualMLP) -> dict[str, float]:
    """Of the gradients of each mode, the worst of all parameters' and the input's, against backprop in float64.

    The same weights and inputs, rounded to the job's dtype, in both. "eager" is the list of layers, whose states are
    of the parameters' dtype; those of the op, and of its "backprop", are float32 at least.
    """
    x, g = batch_of(ERROR_ROWS, mlp)
    exact_mlp = ResidualMLP(mlp.dim, mlp.hidden, mlp.depth, activation=mlp.activation, device=x.device)
    exact_mlp.double().load_state_dict(mlp.state_dict())
    exact = _gradients(fused_step(exact_mlp, BASELINE), (x.detach().double().requires_grad_(), g.double()))
    layers = Layers(mlp)
    step = layers.step(BASELINE)
    step((x, g))
    found = {"eager": [*layers.gradients(), _gradient(x)]}
    found |= {mode: _gradients(fused_step(mlp, mode), (x, g)) for mode in MODES}
    return {
        mode: max(relative_error([a], [b]) for a, b in zip(gradients, exact, strict=True))
        for mode, gradients in found.items()
    }


def _gradients(step: Step, batch: Batch) -> list[Tensor]:
    step(batch)
    return [_gradient(tensor).clone() for tensor in (*step.parameters, batch[0])]


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _memory_and_launches(job: Job, options: Options, device: torch.device) -> list[dict[str, Any]]:
    """Of a step at two depths. What the op allocates beyond what grows with rows, which half as many rows tell, is
    scratch. Its parameter gradients, which are there at the peak, are left out; those of layers come later one by one.
    """
    rows: list[dict[str, Any]] = []
    for depth in (job.depth // 4 if options.quick else SHALLOW, job.depth):
        mlp = job.network(depth, options.seed, device)
        gradients = sum(parameter.numel() for parameter in mlp.parameters()) * torch.float32.itemsize
        whole, half = (batch_of(count, mlp) for count in (job.rows, job.rows // 2))
        layers = Layers(mlp)
        steps = [("fused", mode, fused_step(mlp, mode)) for mode in FUSED]
        steps += [("eager", mode, layers.step(mode)) for mode in PLAIN]
        for kind, mode, step in steps:
            row: dict[str, Any] = {"depth": depth, "kind": kind, "mode": mode, "state_bytes": job.rows * job.dim * 4}
            rows.append(row)
            try:
                row["peak_bytes"] = _peak(step, whole, device) - (gradients if kind == "fused" else 0)
                if kind == "fused" and device.type == "cuda":
                    half_peak = _peak(step, half, device) - gradients
                    row["scratch_bytes"] = max(0, 2 * half_peak - row["peak_bytes"])
                    row["launches"] = _launches(step, whole, device)
            except torch.OutOfMemoryError:
                row["cause"] = OUT_OF_MEMORY
            step.clear(whole)
            step.clear(half)
    return rows


def _peak(step: Step, batch: Batch, device: torch.device) -> int:
    step(batch)
    step.clear(batch)
    return memory.measure(partial(step.function, batch[0]), device, batch[1]).peak


def _launches(step: Step, batch: Batch, device: torch.device) -> dict[str, int]:
    step.clear(batch)
    out: list[Tensor] = []
    forward = launches.count(lambda: out.append(step.function(batch[0])), device)
    return {"forward": forward, "backward": launches.count(lambda: out[0].backward(batch[1]), device)}
