"""What the benchmark asks of a residual MLP's backends: which can run, which "auto" takes, and Triton's gradient forms.

All that it knows of the library's insides, beside the public names, is on this page and in `triton_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from resode_cuda import ResidualMLP
from resode_cuda.fused import selection
from resode_cuda.fused.op import BACKENDS
from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.method import Method

from .failed_kernels import ONE_PASS_FAMILY, failed_kernels
from .mlp_networks import Batch, fused_step
from .modes import set_mode

TWO_PASS, ONE_PASS = "two_pass", "one_pass"
"""Gradient forms of Triton's adjoint: gradients by a pass of their own, or added up by the state pass."""


def reasons_against(mlp: ResidualMLP, mode: str) -> dict[str, str | None]:
    """Each backend, and why it can't compute this; None where it can."""
    set_mode(mlp, mode)
    return selection.reasons(BACKENDS, mlp._network(), _method(mlp), mlp.weight_in)


def usable(mlp: ResidualMLP, mode: str) -> list[str]:
    """The backends that can compute this, always in the same order."""
    reasons = reasons_against(mlp, mode)
    return [name for name in BACKENDS if reasons[name] is None]


def triton_gradient_forms(mlp: ResidualMLP) -> list[str]:
    """The gradient forms of Triton's adjoint that can compute this, as `step_by` takes them; none that failed."""
    failed = (ONE_PASS,) if ONE_PASS_FAMILY in failed_kernels() else ()
    forms = triton_passes.gradient_forms(mlp._network(), mlp.weight_in.device)
    return [f"triton {form}" for form in forms if form not in failed]


def taken_by_auto(mlp: ResidualMLP, mode: str, rows: int) -> str:
    """The backend that "auto" takes, and after it the gradient form of Triton's adjoint."""
    set_mode(mlp, mode)
    x = mlp.weight_in.new_empty(1, 1).expand(rows, mlp.dim)
    network = mlp._network()
    name = selection.select("bench", BACKENDS, "auto", network, _method(mlp), x)
    if name != "triton" or mlp.gradient != "adjoint":
        return name
    return f"{name} {triton_passes.gradient_form(network, rows, x.device)}"


def _method(mlp: ResidualMLP) -> Method:
    """The module's; where the gradient is exact, one that rebuilds nothing."""
    return mlp._method if mlp.gradient == "adjoint" else Method(mlp._method.scheme, mlp.steps)


def step_by(mlp: ResidualMLP, mode: str, backend: str) -> Callable[[Batch], None]:
    """A step by a backend, and where that is Triton's, in the gradient form that is named after it."""
    backend, _, form = backend.partition(" ")
    step = fused_step(mlp, mode, backend)
    if not form:
        return step

    def in_form(batch: Batch) -> None:
        # Not by unittest.mock, whose patches take longer than a small step.
        library_choice = triton_passes.gradient_form
        triton_passes.gradient_form = lambda *_: form
        try:
            step(batch)
        finally:
            triton_passes.gradient_form = library_choice

    return in_form
