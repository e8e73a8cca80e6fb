"""The depth-fused backend as on a GPU that is not there: which one, and how its adjoint computes gradients."""

from contextlib import contextmanager
from unittest import mock

from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.ops import triton as triton_ops

from .launching import executing

PROGRAMS = 32
"""Programs that run at once: few, so that the weight-gradient pass has several ranges of rows."""


@contextmanager
def fused_on(gpu, gradient_form="two_pass", **how):
    """As `executing`; one_pass where the network allows it."""

    def preferred(network, rows, device):
        possible = triton_passes.gradient_forms(network, device)
        return gradient_form if gradient_form in possible else possible[0]

    with (
        mock.patch.object(triton_passes, "capability_of", return_value=divmod(gpu, 10)),
        mock.patch.object(triton_passes, "gradient_form", preferred),
        mock.patch.object(triton_ops, "most_programs", return_value=PROGRAMS),
        executing(gpu, **how) as record,
    ):
        yield record
