"""A solver that has converged, and the comparison of a stack's gradients with the plain loop's."""

from resode_cuda import ResidualStack, Reverse
from tests.support.networks import (
    gradients,
    parameters_of,
    plain,
    relative_error,
)

EXACT = Reverse("step", corrections=30)
"""Converged: what it rebuilds is exact to rounding, so gradients can be compared tightly."""

CONVERGED = Reverse("step", corrections=12)
"""Exact to rounding too, for blocks as small and steps as short as those of tests/distributed."""

TIGHT = 1e-12


def exact_stack(blocks, scheme, **options):
    return ResidualStack(blocks, scheme, reverse=options.pop("reverse", EXACT), **options)


def assert_same_gradients(blocks, scheme, x, *args, inputs=None, tolerance=TIGHT, **kwargs):
    if inputs is None:
        inputs = parameters_of(blocks) + [x] * x.requires_grad
    exact = gradients(lambda: plain(blocks, scheme, x, *args, **kwargs), inputs)
    for stack in (
        exact_stack(blocks, scheme),
        ResidualStack(blocks, scheme, anchors=1),
        ResidualStack(blocks, scheme, gradient="checkpoint"),
    ):
        assert relative_error(gradients(lambda stack=stack: stack(x, *args, **kwargs), inputs), exact) < tolerance


def errors_of(stack, x):
    """Relative error of the stack as it is set, against plain backprop."""
    parameters = list(stack.parameters())
    got = gradients(lambda: stack(x), parameters)
    before, stack.gradient = stack.gradient, "backprop"
    exact = gradients(lambda: stack(x), parameters)
    stack.gradient = before
    return relative_error(got, exact)
