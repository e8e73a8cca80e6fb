"""`python -m bench.smoke`: each kernel once on a few rows, in a process of its own, before anything that takes long.

An illegal access ends all work of its process on a GPU, and is reported by whatever runs there next; an endless loop
takes the rest of the time. Here either costs one case, which names its kernel, and `bench/gpu.sh` leaves out what needs
a family of kernels with a failed case; which tests do, `tests/support/kernel_families.py` says. A case that had not
ended when the run was cut off counts as failed. Results are held against plain torch's on a CPU; how accurate they are
the tests judge.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from resode_cuda import ResidualMLP, ops, smooth_init_

from .command_line import end_with, needing, writable_file
from .harness.failed_kernels import ONE_PASS_FAMILY
from .harness.fused_backends import ONE_PASS, TWO_PASS, step_by, triton_gradient_forms
from .harness.gradients import relative_error
from .harness.mlp_networks import batch_of, fused_step
from .harness.results import write_json
from .sections import kernels

CPU = torch.device("cpu")
SECONDS = 60
"""A case's limit: importing torch and compiling one of Triton's kernels take up to half of it."""
WORKERS = 6
COUNT = 2053
"""Values of a pointwise op's operands: an odd number, so that the last access is a partial one."""
ROWS, DEPTH, DIM, HIDDEN = 133, 3, 64, 100
WIDE = 300, 520
"""A dim and a hidden size of which no kernel keeps rows on chip."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
OK, WRONG, LEFT_OUT, FAILED = "ok", "WRONG", "left out", "FAILED"
STATUSES = {0: OK, 3: WRONG, 4: LEFT_OUT}
"""What a case's exit status says; all others say that it failed."""

Check = Callable[[torch.device], None]


class LeftOutError(Exception):
    """A case can't run here, and why."""


class WrongError(Exception):
    """A case's results are wrong, and by how much."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case. `reason`: the end of what it printed, where that is not "ok"."""

    case: str
    outcome: str
    seconds: float
    reason: str = ""

    @property
    def family(self) -> str:
        return self.case.partition("/")[0]


def pointwise(backend: str, op: str, device: torch.device) -> None:
    """An op on each pair of dtypes; `op` as the section `kernels` names it."""
    for pair in kernels.PAIRS:
        torch.manual_seed(0)
        here = kernels.op_states(COUNT, pair, CPU)
        here[2].fill_(1.0)  # sums that an op leaves alone have a size too
        streams, stages = (tuple(tensor.to(device, copy=True) for tensor in part) for part in here[:2])
        sums = here[2].to(device, copy=True)
        expected = kernels.op_calls(*here)[op][0]()
        with ops.using(backend):
            got = kernels.op_calls(streams, stages, sums)[op][0]()
        for mine, other in zip((*streams, sums), (*here[0], here[2]), strict=True):  # what some ops write
            _compare(mine, other, TOLERANCES[pair[0]])
        if expected is not None:
            for mine, other in zip(kernels.as_tuple(got), kernels.as_tuple(expected), strict=True):
                _compare(mine, other, TOLERANCES[pair[0]])


def forward(backend: str, device: torch.device) -> None:
    """The forward pass of a residual MLP."""
    for dtype in TOLERANCES:
        here, there = _networks(dtype, device)
        with torch.no_grad():
            x = batch_of(ROWS, here)[0]
            here.backend, there.backend = "torch", backend
            _compare(there(x.to(device)), here(x), TOLERANCES[dtype])


def backward(
    backend: str, mode: str, trains: bool, device: torch.device, sizes: tuple[int, int] = (DIM, HIDDEN)
) -> None:
    """A training step of a residual MLP; one that does not train asks for the input's gradient alone."""
    for dtype in TOLERANCES:
        here, there = _networks(dtype, device, sizes)
        if " " in backend and backend not in triton_gradient_forms(there):
            raise LeftOutError(f"{backend!r} can't run on this GPU, {', '.join(triton_gradient_forms(there))} can")
        x, g = batch_of(ROWS, here)
        x_there = x.detach().to(device).requires_grad_()
        for mlp in (here, there):
            mlp.requires_grad_(trains)
        fused_step(here, mode, "torch")((x, g))
        step_by(there, mode, backend)((x_there, g.to(device)))
        _compare(_gradient(x_there), _gradient(x), TOLERANCES[dtype])
        if trains:
            for mine, other in zip(there.parameters(), here.parameters(), strict=True):
                _compare(_gradient(mine), _gradient(other), TOLERANCES[dtype])


FUSED: dict[str, Check] = {
    "fused-cuda/forward": partial(forward, "cuda"),
    "fused-cuda/adjoint": partial(backward, "cuda", "extrapolated", False),
    "fused-cuda/gradients": partial(backward, "cuda", "extrapolated", True),
    "fused-cuda/exact": partial(backward, "cuda", "checkpoint", False),
    "fused-triton/forward": partial(forward, "triton"),
    "fused-triton/adjoint": partial(backward, "triton", "extrapolated", False),
    "fused-triton/gradients": partial(backward, f"triton {TWO_PASS}", "extrapolated", True),
    f"{ONE_PASS_FAMILY}/gradients": partial(backward, f"triton {ONE_PASS}", "extrapolated", True),
    "fused-triton/exact": partial(backward, "triton", "checkpoint", False),
    "fused-triton/stored": partial(backward, "triton", "stored", True),
    "wide-triton/adjoint": partial(backward, "triton", "extrapolated", True, sizes=WIDE),
    "wide-triton/stored": partial(backward, "triton", "stored", True, sizes=WIDE),
    "torch/adjoint": partial(backward, "torch", "extrapolated", True),
}
CASES: dict[str, Check] = {
    f"pointwise-{backend}/{op.replace(' ', '-')}": partial(pointwise, backend, op)
    for backend in ("cuda", "triton")
    for op in kernels.op_calls(*kernels.op_states(1, kernels.PAIRS[0], CPU))
} | FUSED
"""Each case by its name, FAMILY/KERNEL."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.smoke",
        description="Runs each kernel once on a few rows, in a process of its own with a limit on its time. Ends with "
        "status 1 if a case failed or gave wrong results.",
    )
    parser.add_argument("case", nargs="?", choices=CASES, metavar="CASE", help="run this one alone, in this process")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--list", action="store_true", help="print the cases' names, and run none")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write each case's outcome here, as JSON")
    parser.add_argument("--failed", type=Path, metavar="FILE", help="print the families that failed in such a file")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(CASES))
        return 0
    if given.failed:
        with needing(f"bench.smoke: --failed must be a file that --output wrote, got {given.failed}"):
            families = failed_families(given.failed)
        print(" ".join(families))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("bench.smoke: --device cuda needs a CUDA device, but torch finds none; use cpu", file=sys.stderr)
        return 2
    if given.case:
        return run_here(given.case, torch.device(given.device))
    outcomes = run_all(given.device, given.output and writable_file("bench.smoke: --output", given.output))
    not_ok = [outcome for outcome in outcomes if outcome.outcome in (WRONG, FAILED)]
    for outcome in not_ok:
        print(f"\n{outcome.case}\n{outcome.reason}")
    return int(bool(not_ok))


def run_all(device: str, file: Path | None) -> list[Outcome]:
    """Each case in a process of its own, a few at a time; the file has what became of those that have ended."""
    outcomes: list[Outcome] = []
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for ended in as_completed([pool.submit(run_elsewhere, name, device) for name in CASES]):
            outcome = ended.result()
            outcomes.append(outcome)
            last_line = outcome.reason.rstrip().rpartition("\n")[2]
            print(f"{outcome.case:42} {outcome.outcome:8} {outcome.seconds:5.1f} s  {last_line}".rstrip(), flush=True)
            if file:
                write_json([asdict(outcome) for outcome in outcomes], file)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run begins no further case
    return outcomes


def runs_on_a_cpu(name: str) -> bool:
    return name.startswith("torch/")


def run_here(name: str, device: torch.device) -> int:
    """A case's exit status; what went wrong is printed."""
    try:
        if device.type == "cpu" and not runs_on_a_cpu(name):
            raise LeftOutError("needs a CUDA device")
        CASES[name](device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (LeftOutError, WrongError) as reason:
        print(reason)
        outcome = WRONG if isinstance(reason, WrongError) else LEFT_OUT
        return next(status for status, of_status in STATUSES.items() if of_status == outcome)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run_elsewhere(name: str, device: str, seconds: float = SECONDS) -> Outcome:
    """A case in a process of its own, where each launch is waited for."""
    if device == "cpu" and not runs_on_a_cpu(name):
        return Outcome(name, LEFT_OUT, 0, "needs a CUDA device")
    begin = time.perf_counter()
    command = [sys.executable, "-m", __spec__.name, name, "--device", device]
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Outcome(name, FAILED, time.perf_counter() - begin, f"took longer than {seconds:g} s")
    outcome = STATUSES.get(done.returncode, FAILED)
    printed = done.stdout.decode(errors="replace")[-4000:]
    if outcome == FAILED:
        printed = f"{printed.rstrip()}\nexit status {done.returncode}"
    return Outcome(name, outcome, time.perf_counter() - begin, "" if outcome == OK else printed)


def failed_families(file: Path) -> list[str]:
    """The families with a case that failed, in the order of `CASES`; wrong results harm nothing that comes later.

    A case that the file lacks had not ended when the run was cut off, and may be the one that hangs: it failed too. So
    did all without a file.
    """
    rows = json.loads(file.read_text()) if file.exists() else []
    outcomes = {row["case"]: Outcome(**row) for row in rows}
    found = [outcomes.get(name, Outcome(name, FAILED, 0)) for name in CASES]
    return list(dict.fromkeys(outcome.family for outcome in found if outcome.outcome == FAILED))


def _networks(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, int] = (DIM, HIDDEN)
) -> tuple[ResidualMLP, ResidualMLP]:
    """The same network on the CPU and on the device."""
    torch.manual_seed(0)
    here, there = (
        ResidualMLP(*sizes, DEPTH, activation="silu", norm="layer", on_drift="ignore").to(dtype) for _ in range(2)
    )
    smooth_init_(here)
    there.load_state_dict(here.state_dict())
    return here, there.to(device)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _compare(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = relative_error([got.cpu()], [expected])
    if not error <= tolerance:  # not a number either
        raise WrongError(f"relative error must be at most {tolerance:g}, got {error:g}")


if __name__ == "__main__":
    end_with(main)
