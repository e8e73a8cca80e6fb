"""A residual MLP whose depth is one op, beside plain backprop of the same network and beside its matrix products.

Everything of one size takes turns in one run: the op with every solver, a list of layers under autograd, stored or with
torch.utils.checkpoint around each layer, eagerly and by torch.compile, the step's matrix products alone, and one large
product, which is the device's ceiling. Weights are smooth in depth; each round has other inputs.
"""

from __future__ import annotations

import gc
import time
import warnings
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from resode_cuda import ResidualMLP

from ...harness import launches
from ...harness.arms import OUT_OF_MEMORY, Arm, described, failures, take_turns
from ...harness.fused_backends import step_by, taken_by_auto, triton_gradient_forms
from ...harness.gradients import relative_error
from ...harness.mlp_networks import (
    PLAIN,
    PRODUCTS,
    SEGMENT,
    Batch,
    Batches,
    Layers,
    Products,
    Step,
    batch_of,
    fused_step,
    peak_bytes,
)
from ...harness.modes import BASELINE, MODES, STORED
from ...harness.timing import clock_of, ratios
from ...options import Options
from .jobs import Job, jobs

FUSED = ("extrapolated", "checkpoint", "corrected", "paper")
TIMED = (*FUSED, *STORED)
"""Modes whose steps are timed: with stored increments too, whose memory grows with depth."""
STEPS_AT_A_TIME = {"cuda": 2, "cpu": 1}
"""Steps between two readings of the clock, so that a GPU's queue does not run dry."""
SHALLOW = 16
"""The depth that memory and launches are compared with."""
ERROR_ROWS = 256
SECONDS = 75
"""Time after which no size is begun on a GPU."""


def measure(options: Options, device: torch.device, progress: Progress) -> dict[str, Any]:
    # With --quick, the same graphs without the wait for code to be generated and compiled.
    compiler = "eager" if options.quick else "inductor"
    figures: dict[str, Any] = {
        "device": device.type,
        "compiler": compiler,
        "segment": SEGMENT,
        "jobs": [],
        "left_out": [],
    }
    failed = []
    with warnings.catch_warnings():
        # Of the compiler's own look at the inputs of a compiled segment.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        try:
            _measure(options, device, progress, figures)
        except KeyboardInterrupt:  # whoever stops it wants what there is
            figures["stopped"] = True
            failed.append("stopped")
    failed += failures(row for job in figures["jobs"] for row in job["rows"])
    return {**figures, "failure": "\n".join(failed)} if failed else figures


def _measure(options: Options, device: torch.device, progress: Progress, figures: dict[str, Any]) -> None:
    begin = time.perf_counter()
    compiler = figures["compiler"]
    found, left_out, detailed = figures["jobs"], figures["left_out"], []
    all_jobs = jobs(options, device)
    measuring = progress.add_task("mlp", total=len(all_jobs) + 1)
    for job in all_jobs:
        if device.type == "cuda" and time.perf_counter() - begin > SECONDS:
            left_out.append(job.facts)
            progress.advance(measuring)
            continue
        found.append(_timed(job, compiler, options, device))
        detailed += [(job, found[-1])] if job.is_detailed else []
        gc.collect()  # compiled functions are in cycles
        torch.cuda.empty_cache()
        progress.advance(measuring)
    # After all timing: a process in which torch's profiler ran is slower.
    for job, of_job in detailed:
        of_job["memory"] = _memory_and_launches(job, options, device)
    progress.advance(measuring)


def _timed(job: Job, compiler: str, options: Options, device: torch.device) -> dict[str, Any]:
    """Each arm's seconds in each round, and the gradients' errors."""
    torch.compiler.reset()  # what was compiled for another size would make this one's shapes dynamic
    mlp = job.network(job.depth, options.seed, device)
    batches = Batches(job.rows, mlp)
    size = 256 if options.quick else 8192 if device.type == "cuda" else 1024
    arms = _arms(job, mlp, batches, compiler, size)
    clock = clock_of(device)
    for arm in arms:
        arm.first(clock)
        arm.times = STEPS_AT_A_TIME[device.type]
    by_arm = take_turns(arms, options.rounds + 2, device, batches.advance)  # the limits on time are judged here
    figures = {**job.facts, "matmul": size, "matmul_flop": 2 * size**3}
    figures["flop"] = PRODUCTS * 2 * job.rows * job.dim * job.hidden * job.depth
    figures["rows"] = [_row(arm, by_arm) for arm in arms]
    figures["errors"] = _errors(mlp, job.rows)
    return figures


def _arms(job: Job, mlp: ResidualMLP, batches: Batches, compiler: str, size: int) -> list[Arm]:
    """Everything that takes turns: the op in each mode, its peers, the bare products, and one large product."""
    on_current = batches.on_current
    layers = Layers(mlp)
    taken = {mode: taken_by_auto(mlp, mode, job.rows) for mode in TIMED}
    arms = [Arm("fused", mode, on_current(fused_step(mlp, mode)), taken[mode]) for mode in TIMED]
    if taken["extrapolated"].startswith("triton"):
        arms += [
            Arm("fused", f"extrapolated, {name}", on_current(step_by(mlp, "extrapolated", name)), name)
            for name in triton_gradient_forms(mlp)
            if name != taken["extrapolated"]
        ]
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


def _row(arm: Arm, by_arm: dict[Arm, list[float]]) -> dict[str, Any]:
    row = described(arm, by_arm)
    for name, kind, mode in (("of_backprop", "eager", BASELINE), ("of_products", "bare", "products")):
        other = next((seconds for it, seconds in by_arm.items() if (it.kind, it.mode) == (kind, mode)), None)
        row[name] = vars(ratios(by_arm[arm], other)) if arm in by_arm and other is not None else None
    return row


def _errors(mlp: ResidualMLP, rows: int) -> dict[str, float]:
    """The gradients' relative error in each mode, the worst of all parameters' and the input's, against backprop in
    float64.

    The same weights and inputs, rounded to the job's dtype, in both. "eager" is the list of layers, whose states are
    of the parameters' dtype; those of the op, and of its "backprop", are float32 at least. The backends are those that
    are timed, with so many rows.
    """
    x, g = batch_of(ERROR_ROWS, mlp)
    exact_mlp = ResidualMLP(mlp.dim, mlp.hidden, mlp.depth, activation=mlp.activation, device=x.device)
    exact_mlp.double().load_state_dict(mlp.state_dict())
    exact = _gradients(fused_step(exact_mlp, BASELINE), (x.detach().double().requires_grad_(), g.double()))
    layers = Layers(mlp)
    step = layers.step(BASELINE)
    step((x, g))
    found = {"eager": [*layers.gradients(), _gradient(x)]}
    for mode in MODES:
        backend = "auto" if mode == BASELINE else taken_by_auto(mlp, mode, rows).partition(" ")[0]
        found[mode] = _gradients(fused_step(mlp, mode, backend), (x, g))
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
    """Peak memory and launches of a step at two depths. What the op allocates beyond what grows with rows, which half
    as many rows tell, is scratch. Its parameter gradients, which are there at the peak, are left out; those of layers
    come later one by one.
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
                row["peak_bytes"] = peak_bytes(step, whole, device) - (gradients if kind == "fused" else 0)
                if kind == "fused" and device.type == "cuda":
                    half_peak = peak_bytes(step, half, device) - gradients
                    row["scratch_bytes"] = max(0, 2 * half_peak - row["peak_bytes"])
                    row["launches"] = _launches(step, whole, device)
            except torch.OutOfMemoryError:
                row["reason"] = OUT_OF_MEMORY
            step.clear(whole)
            step.clear(half)
    return rows


def _launches(step: Step, batch: Batch, device: torch.device) -> dict[str, int]:
    step.clear(batch)
    out: list[Tensor] = []
    forward = launches.count(lambda: out.append(step.function(batch[0])), device)
    return {"forward": forward, "backward": launches.count(lambda: out[0].backward(batch[1]), device)}
