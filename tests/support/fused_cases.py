"""What a backend of the depth-fused ops with kernels is asked in tests, in the interpreter and on a GPU alike.

Results are held against the specification in float64. The budget of each is twice the specification's own error in the
parameters' dtype, and an epsilon of that dtype.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch

from bench.harness.failed_kernels import ONE_PASS_FAMILY, failed_kernels
from resode_cuda import stored
from resode_cuda.fused.op import PARAMETERS
from resode_cuda.fused.reference import passes as reference
from resode_cuda.fused.signature import SavedStates, Wanted
from resode_cuda.fused.storage import StoredIncrements
from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.fused.triton.wide import WideTile
from resode_cuda.reverse import PRESETS, Reverse
from tests.support.stepped_network import SteppedNetwork

LARGE = 2**24
"""Products of a sum over a case's layers from which its references are computed where the kernels run."""


@dataclass(frozen=True)
class Case:
    """A network, a batch and a solver. `two_passes`: gradients by a pass of their own, in a fixed order."""

    scheme: str = "euler"
    activation: str = "silu"
    norm: str | None = None
    bias: bool = True
    reverse: str | Reverse = "corrected"
    anchors: tuple[int, ...] = ()
    steps: int = 3
    dim: int = 16
    hidden: int = 24
    rows: int = 21
    two_passes: bool = False

    def __str__(self):
        changed = [value for name, value in vars(self).items() if value != getattr(Case, name)]
        return (
            "-".join(f"{v.predictor}+{v.corrections}" if isinstance(v, Reverse) else str(v) for v in changed)
            or "default"
        )

    @property
    def solver(self):
        return self.reverse if isinstance(self.reverse, Reverse) else PRESETS[self.reverse]

    def operands(self, dtype):
        """The network, x_0 and g_N, in the dtype of the parameters and of the stream."""
        layers = self.steps + (self.scheme == "heun")
        shapes = (
            (layers, self.hidden, self.dim),
            (layers, self.hidden),
            (layers, self.dim, self.hidden),
            (layers, self.dim),
        )
        parameters = [torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
        if not self.bias:
            parameters[1] = parameters[3] = None
        lengths = tuple(0.2 + 0.03 * n for n in range(self.steps))
        parameters = [None if p is None else p.to(dtype) for p in parameters]
        network = SteppedNetwork(*parameters, self.activation, self.norm, self.scheme, lengths)
        x, g = (torch.randn(self.rows, self.dim).to(network.stream_dtype) for _ in range(2))
        return network, x, g


REBUILDING = [name for name, solver in PRESETS.items() if not solver.is_stored]
CASES = [
    *(Case(scheme, reverse=reverse) for scheme, reverse in itertools.product(("euler", "heun"), REBUILDING)),
    *(Case(scheme, reverse="extrapolated", two_passes=True) for scheme in ("euler", "heun")),
    *(Case(activation=activation, bias=False) for activation in ("identity", "relu", "gelu", "gelu_tanh", "tanh")),
    *(Case(norm=norm, dim=24) for norm in ("rms", "layer")),
    *(Case("heun", norm=norm, two_passes=True, dim=24) for norm in ("rms", "layer")),
    Case(reverse=Reverse("step", corrections=2, accelerate=False)),
    Case("heun", reverse=Reverse("extrapolate", corrections=1)),
    Case(reverse="extrapolated", anchors=(0, 2, 4), steps=5),
    Case(reverse="extrapolated", anchors=(1, 2), steps=5, two_passes=True),
    Case("heun", anchors=(0, 2), two_passes=True),
    *(Case(reverse="extrapolated", steps=steps, two_passes=True) for steps in (1, 2)),
    *(Case(rows=rows, two_passes=two_passes) for rows in (0, 1, 16) for two_passes in (False, True)),
    Case(dim=5, hidden=3, norm="layer"),
    Case(bias=False, two_passes=True),
]

STORED_CASES = [
    *(Case(scheme, reverse="stored", dim=dim) for scheme in ("euler", "heun") for dim in (16, 32, 65)),
    *(Case(reverse=Reverse("stored", bits=bits), dim=40, two_passes=True) for bits in (1, 2, 3, 4, 6)),
    *(
        Case(scheme, reverse=Reverse("stored", bits=3, rounded_forward=True), norm=norm, dim=33, two_passes=True)
        for scheme, norm in (("euler", "rms"), ("heun", "layer"))
    ),
    *(Case(reverse="stored", anchors=anchors, steps=5) for anchors in ((0,), (0, 1, 4), (2,), (4,), tuple(range(5)))),
    Case("heun", reverse=Reverse("stored", bits=4, rounded_forward=True), anchors=(0, 2), steps=4, two_passes=True),
    *(Case(reverse="stored", rows=rows) for rows in (0, 1, 16)),
    Case(reverse="stored", dim=1, hidden=3, steps=1, bias=False),
]


class Wide:
    """The backend for wide layers, at sizes that are not."""

    forward = staticmethod(partial(reference.forward, kind=WideTile))
    adjoint = staticmethod(partial(reference.adjoint, kind=WideTile))
    exact_adjoint = staticmethod(partial(reference.exact_adjoint, kind=WideTile))


def prefer_one_pass(monkeypatch):
    """Triton's adjoint then adds gradients up in its state pass, except where a case is to be split.

    Where that kernel failed `bench/smoke.py`, the first form is taken.
    """
    place = 0 if ONE_PASS_FAMILY in failed_kernels() else -1

    def preferred(network, rows, device):
        return triton_passes.gradient_forms(network, device)[place]

    monkeypatch.setattr(triton_passes, "gradient_form", preferred)


def moved(network, dtype, device):
    cast = [None if p is None else p.to(device, dtype) for p in network.parameters]
    return network.with_parameters(cast)


def mapped(states, function):
    """What a forward pass gave, with the function of each tensor."""
    stored = StoredIncrements(*map(function, states.stored))
    return SavedStates(*map(function, states[:3]), stored, function(states.rounding))


def results_of(backend, case, network, x, g, states):
    """All that the ops give: by name, tensors on the CPU. `states`: what the forward pass gave."""
    method = network.method(case.solver, case.anchors)
    forward = backend.forward(network, method, x)
    named = dict(zip(("x_last", "increments", "anchored"), forward, strict=False))
    if case.solver.is_stored:
        _check_what_is_stored(network, method, x, forward, reference.forward(network, method, x))
    if case.solver.rounded_forward:
        # A state that is rounded otherwise by its last bit is rounded to another whole number.
        named = {}
    found = backend.adjoint(network, method, g, states, Wanted(parameters=True, input=True))
    exact_g, exact_gradients = backend.exact_adjoint(network, network.method(), g, x, True)
    frozen = backend.adjoint(network, method, g, states, Wanted(parameters=False))
    assert frozen.gradients is None
    assert frozen.x is None
    named |= {"adjoint g": found.g, "exact g": exact_g, "frozen g": frozen.g}
    for kind, gradients in (("adjoint", found.gradients), ("exact", exact_gradients)):
        for name, gradient in zip(PARAMETERS, gradients, strict=True):
            if gradient is not None:
                named[f"{kind} {name}"] = gradient
    named |= {"squares": found.squares, "x_first": found.x}
    return {name: tensor.to("cpu", copy=True) for name, tensor in named.items()}


def check(backend, case, dtype, device="cpu"):
    network, x, g = case.operands(dtype)
    # A CPU takes minutes for the large ones. The small ones stay there, or compute-sanitizer would slow them down.
    where = device if case.rows * case.dim * case.hidden * case.steps > LARGE else "cpu"
    network, x, g = moved(network, dtype, where), x.to(where), g.to(where)
    wide = moved(network, torch.float64, where)
    # All start the way back from the same states, as they would be kept.
    states = reference.forward(network, network.method(case.solver, case.anchors), x)
    in_float64 = mapped(states, lambda state: state.double() if state.is_floating_point() else state)
    exact = results_of(reference, case, wide, x.double(), g.double(), in_float64)
    own = results_of(reference, case, network, x, g, states)
    x_there, g_there, states_there = x.to(device), g.to(device), mapped(states, lambda state: state.to(device))
    inputs = [x_there, g_there, *states_there[:3], *states_there.stored]
    copies = [tensor.clone() for tensor in inputs]
    there = moved(network, dtype, device)
    before = torch.are_deterministic_algorithms_enabled()
    # Besides choosing two passes, it fills memory that is not initialised with NaN.
    torch.use_deterministic_algorithms(case.two_passes)
    try:
        results = results_of(backend, case, there, x_there, g_there, states_there)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True)), "an operand was written"
    assert results.keys() == exact.keys()
    eps = torch.finfo(dtype).eps
    given = {"x_last": x, "anchored": x, "x_first": states.x_last, "adjoint g": g, "exact g": g, "frozen g": g}
    for name, expected in exact.items():
        assert results[name].shape == expected.shape, name
        assert results[name].dtype == own[name].dtype, name
        if name == "squares":
            _check_squares(results[name].double(), own[name].double(), expected, eps)
            continue
        scale = expected.norm()
        error, own_error = ((tensor.double() - expected).norm() for tensor in (results[name], own[name]))
        assert error <= 2 * (own_error + eps * scale), (
            f"{name}: error {error:.2e}, the specification's own {own_error:.2e}, norm {scale:.2e}"
        )
        if dtype != torch.float32:
            _check_that_roundings_cancel(name, results[name], own[name], expected, given.get(name), eps)


def _check_that_roundings_cancel(name, result, own, expected, given, eps):
    """Numbers rounded to the nearest are as often too large as too small, so that a result is not longer or shorter.

    With operands that were cut off instead, what is added to a state is shorter by 0.5 to 1.2 eps, and is within the
    budget of errors nevertheless. Rounded, it was within 0.21 eps in all cases.
    """
    change = expected if given is None else expected - given.cpu().double()
    square = change.square().sum()
    if square > 0:
        longer, own_longer = (((t.double() - expected) * change).sum() / square for t in (result, own))
        assert longer.abs() <= eps / 4 + own_longer.abs(), f"{name}: longer by {longer / eps:.2f} eps"


def _check_what_is_stored(network, method, x, found, expected):
    """The companion comes back to where it started, and nearly all that is stored is the specification's: roundings of
    states decide between neighbouring numbers, in 16 bits of many."""
    zeros = torch.zeros_like(x)
    found, expected = (mapped(states, lambda state: state.to(x.device)) for states in (found, expected))
    for one, other in zip(found.stored, expected.stored, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if one.numel() and network.dtype == torch.float32:
            assert (one == other).double().mean() > 0.97
    for column, tolerance in enumerate(_rounding_tolerances(network.dtype, x.numel())):
        found_here, expected_here = found.rounding[:, column], expected.rounding[:, column]
        torch.testing.assert_close(found_here, expected_here, rtol=tolerance, atol=1e-12)
    back = reference.adjoint(network, method, zeros, found, Wanted(parameters=False, input=True)).x
    if method.is_anchored(0):
        assert torch.equal(back, x)
    elif x.numel():
        unit = found.stored.units[0].repeat_interleave(stored.GROUP, 1)[:, : x.shape[1]]
        assert ((back - x).abs() <= unit / 2).all()


def _rounding_tolerances(dtype, values):
    """Relative, of a step's squares of what rounding leaves and of what it is given, and of a typical state.

    In 16 bits states differ by more than increments are rounded to, so that what is left of them is as good as random:
    its squares are spread by 0.9 of their mean, and both sums of so many of them may be off by five of their spreads.
    """
    if dtype == torch.float32 or not values:
        return 0.02, 0.02, 0.02
    eps = torch.finfo(dtype).eps
    return 5 * 0.9 * (2 / values) ** 0.5, max(0.02, 8 * eps), max(0.02, 8 * eps)


def _check_squares(squares, own, exact, eps):
    """Defects are differences of states, off by roundings of states, which decide all of a defect that is small."""
    exact_size = exact[:, 1].sqrt()
    error, own_error = ((found.sqrt() - exact.sqrt()).abs() for found in (squares, own))
    assert (error <= 2 * (own_error + eps * exact_size[:, None])).all(), f"{error / exact_size[:, None]}"


def check_that_gradients_are_repeated(backend, case):
    """In deterministic mode a GPU adds up the gradients in one order, bit by bit the same each time."""
    network, x, g = case.operands(torch.bfloat16)
    network, x, g = moved(network, torch.bfloat16, "cuda"), x.cuda(), g.cuda()
    method, wanted = network.method(), Wanted(parameters=True)
    torch.use_deterministic_algorithms(True)
    try:
        states = backend.forward(network, method, x)
        first, *others = (backend.adjoint(network, method, g, states, wanted).gradients for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    for gradients in others:
        assert all(torch.equal(a, b) for a, b in zip(gradients, first, strict=True))
