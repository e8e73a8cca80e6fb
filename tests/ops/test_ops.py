"""torch.ops.resode: the specification against float64, what a kernel is handed, and what users of torch expect of ops.

The kernels themselves are tested in test_cuda_kernels.py and test_triton.py.
"""

import itertools
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import resode_cuda
from resode_cuda import ResidualStack, library, ops
from resode_cuda.layouts import is_dense, same_layout
from resode_cuda.ops import op, reference
from resode_cuda.ops import selection as backend_module
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, half_square, pretend_to_capture

STREAMS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPE_PAIRS = [(x, f) for x, f in itertools.product(STREAMS, STREAMS) if x == f or x.itemsize > f.itemsize]
SHAPES = [(), (0,), (1,), (3, 0, 5), (7,), (5, 51)]
NAMES = ("forward_step", "heun_step", "reverse_update_", "reverse_extrapolate_", "adjoint_update_")
FUNCTIONAL = NAMES[:2]
WRITTEN = {"reverse_update_": (0, 5, 6), "reverse_extrapolate_": (0, 1, 2, 8, 9), "adjoint_update_": (0,)}  # places
STAGES = {"heun_step": (1, 2), "reverse_update_": (2, 3), "reverse_extrapolate_": (3, 4)}
GPU_BACKENDS = [pytest.param(("cuda", name), marks=pytest.mark.gpu) for name in ("cuda", "triton")]


def pair_id(pair):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


def random(shape, dtype, seed, device="cpu"):
    """Normal values, the same on every device."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def operands(name, shape=(5, 3), dtypes=(torch.float32, torch.float32), device="cpu", stages=2, products=2):
    """The op's arguments, as a list; `stages` and `products` of 1 and 2, products also of 0, leave out what may be."""
    x, y, d, g, v1, v2 = (random(shape, dtypes[0], seed, device) for seed in range(6))
    k1, k2 = (random(shape, dtypes[1], seed, device) for seed in (6, 7))
    k2 = k2 if stages == 2 else None
    adjoint = [g if products else None, v1 if products else None, v2 if products == 2 else None, 0.9, 0.3]
    norms = torch.tensor([0.5, 0.25], dtype=torch.promote_types(dtypes[0], torch.float32), device=device)
    return {
        "forward_step": [x, k1, 0.1],
        "heun_step": [x, k1, k2, 0.1],
        "reverse_update_": [x, y, k1, k2, 0.1, norms, *adjoint],
        "reverse_extrapolate_": [x, y, d, k1, k2, 0.1, 1.9, 0.8, norms, *adjoint],
        "adjoint_update_": [g, v1, v2 if products == 2 else None, 0.9, 0.3],
    }[name]


VARIANTS = [
    (name, stages, products)
    for name, stages, products in itertools.product(NAMES, (1, 2), (0, 1, 2))
    if (stages == 2 or name not in FUNCTIONAL or name == "forward_step")
    and (name != "forward_step" or stages == 1)
    and (products == 0 or name not in FUNCTIONAL)
    and (name != "adjoint_update_" or (stages == 1 and products))
    and not (name == "heun_step" and stages == 1)
]


def in_float64(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def copies(values):
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]


def formula(name, values):
    """What the op returns or leaves in its operands, written once more and out of place."""
    zero = torch.zeros_like(values[0])
    if name == "forward_step":
        x, f, h = values
        return [x + h * f]
    if name == "heun_step":
        x, k1, k2, h = values
        return [x + h / 2 * (k1 + k2)]
    g, v1, v2, g_scale, v_scale = values[-5:]
    new_g = (
        None
        if g is None
        else g_scale * g + v_scale * (zero if v1 is None else v1) + v_scale * (0 if v2 is None else v2)
    )
    if name == "adjoint_update_":
        return [new_g]
    x, y = values[:2]
    k1, k2, weight = values[2:5] if name == "reverse_update_" else values[3:6]
    increment = weight * (k1 if k2 is None else k1 + k2)
    new_x = x - increment
    norms = values[-6] + torch.stack([(y - new_x).square().sum(), new_x.square().sum()])
    if name == "reverse_update_":
        return [new_x, norms, new_g]
    d, a, b = values[2], *values[6:8]
    return [new_x, new_x - (a * increment - b * d), increment, norms, new_g]


def run(name, values):
    """What the op returns or leaves in its operands."""
    result = getattr(torch.ops.resode, name)(*values)
    return [result] if name in FUNCTIONAL else [values[place] for place in WRITTEN[name]]


@pytest.fixture(params=[("cpu", "reference"), *GPU_BACKENDS], ids=lambda pair: pair[1])
def device(request):
    device, name = request.param
    with ops.using(name):
        yield device


@pytest.mark.parametrize(("name", "stages", "products"), VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=pair_id)
def test_matches_the_formula_in_float64(device, name, stages, products, dtypes):
    for shape in SHAPES:
        values = operands(name, shape, dtypes, device, stages, products)
        exact = formula(name, in_float64(values))
        with ops.using("reference"):
            own = run(name, copies(values))
        got = run(name, values)
        for result, reference_result, truth in zip(got, own, exact, strict=True):
            if truth is None or truth.numel() == 0:
                continue
            band = torch.finfo(result.dtype).eps * truth.abs().max()
            assert (result - truth).abs().max() <= 2 * ((reference_result - truth).abs().max() + band)
            # The reference is the specification, and has to be near the truth itself.
            assert (result - truth).abs().max() <= 12 * torch.finfo(dtypes[0]).eps * max(1, truth.abs().max())


def test_product_and_sum_of_a_step_are_rounded_once(device):
    x, f = random((10007,), torch.float32, 1, device), random((10007,), torch.float32, 2, device)
    h = torch.tensor(0.1).item()  # as float32 has it
    assert torch.equal(torch.ops.resode.forward_step(x, f, 0.1), (x.double() + h * f.double()).float())


class Contract:
    """A backend that demands what kernels are promised, and computes by the reference."""

    def __getattr__(self, name):
        def check_and_run(*values):
            tensors = [value for value in values if isinstance(value, torch.Tensor) and value.shape != (2,)]
            assert all(same_layout(tensor, tensors[0]) for tensor in tensors)
            assert all(is_dense(tensor) and tensor.numel() for tensor in tensors)
            k1, k2 = (values[place] for place in STAGES[name]) if name in STAGES else (None, None)
            assert k2 is None or k1.dtype == k2.dtype
            written = values[-1:] if name in FUNCTIONAL else [values[place] for place in WRITTEN[name]]
            for a, b in itertools.product(written, tensors):
                shares = a is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
                assert a is b or not shares
            if name in FUNCTIONAL:
                *values, out = values
                out.copy_(getattr(reference, name)(*values))
            else:
                getattr(reference, name)(*values)

        return check_and_run


LAYOUTS = {
    "transposed": lambda t: t.t(),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["first", "others", "all"])
def test_kernels_are_handed_dense_operands_of_one_layout(monkeypatch, name, layout, which):
    monkeypatch.setattr(op, "chosen", lambda device: Contract())
    lay = LAYOUTS[layout]

    def laid(place, value):
        wanted = {"first": place == 0, "others": place > 0, "all": True}[which]
        if not isinstance(value, torch.Tensor) or value.shape != (4, 4) or not wanted:
            return value
        if layout == "expanded" and place in WRITTEN.get(name, ()):
            return value  # an expanded operand cannot be written
        return lay(value)

    values = [laid(place, value) for place, value in enumerate(operands(name, (4, 4)))]
    expected = formula(name, in_float64(values))
    strides = [value.stride() for value in values if isinstance(value, torch.Tensor)]
    got = run(name, values)
    assert [value.stride() for value in values if isinstance(value, torch.Tensor)] == strides
    for result, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one storage"])
def test_operands_of_one_layout_are_not_copied(monkeypatch, together):
    seen = []

    class Spy:
        def reverse_update_(self, *values):
            seen.extend(value.data_ptr() for value in values if isinstance(value, torch.Tensor))

    monkeypatch.setattr(op, "chosen", lambda device: Spy())
    values = operands("reverse_update_")
    states = [place for place, value in enumerate(values) if isinstance(value, torch.Tensor) and value.ndim == 2]
    stored = torch.stack([values[place] for place in states])
    for place, state in zip(states, stored, strict=True):
        values[place] = state.t() if together else state.t().clone()
    torch.ops.resode.reverse_update_(*values)
    assert seen == [value.data_ptr() for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("has_kernel", [False, True])
def test_autograd_notices_what_was_written(monkeypatch, name, has_kernel):
    if has_kernel:  # which torch does not see writing
        monkeypatch.setattr(op, "chosen", lambda device: SimpleNamespace(**{name: lambda *values: None}))
    values = operands(name)
    loss = (torch.ones_like(values[0], requires_grad=True) * values[0]).sum()
    getattr(torch.ops.resode, name)(*values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("view", [lambda t: t, torch.t], ids=["itself", "its transpose"])
def test_what_is_read_may_share_memory_with_what_is_written(name, view):
    """As the products and outputs of blocks do that hand their input on."""
    values = operands(name, (4, 4), (torch.float64, torch.float64))
    values[-4] = view(values[-5])  # v1 of g
    if name == "reverse_extrapolate_":
        values[3] = view(values[1])  # k1 of y
    expected = formula(name, copies(values))
    for result, truth in zip(run(name, values), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)


def test_stages_of_two_dtypes_are_added_in_the_wider_one():
    x, k1, k2 = random((4, 4), torch.float32, 1), random((4, 4), torch.bfloat16, 2), random((4, 4), torch.float32, 3)
    for a, b in ((k1, k2), (k2, k1)):
        torch.testing.assert_close(torch.ops.resode.heun_step(x, a, b, 0.1), x + 0.05 * (a.float() + b.float()))


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "stages", "products"), VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=pair_id)
def test_opcheck(name, stages, products, dtypes, where):
    values = operands(name, (4, 3), dtypes, where, stages, products)
    for wants in (False, True) if name in FUNCTIONAL else (False,):
        for value in values[:-1]:
            if isinstance(value, torch.Tensor):
                value.requires_grad_(wants)
        torch.library.opcheck(getattr(torch.ops.resode, name), tuple(values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_fake_has_the_real_layout(name, layout):
    values = [LAYOUTS[layout](v) if isinstance(v, torch.Tensor) else v for v in operands(name, (4, 4))]
    torch.library.opcheck(getattr(torch.ops.resode, name), tuple(values), test_utils="test_faketensor")


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_first_and_second_gradients(name):
    *tensors, h = operands(name, (3, 2), (torch.float64, torch.float64))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    function = lambda *tensors: getattr(torch.ops.resode, name)(*tensors, h)  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=pair_id)
def test_gradients_have_their_inputs_dtype(dtypes):
    *tensors, h = (
        value.requires_grad_() if isinstance(value, torch.Tensor) else value
        for value in operands("heun_step", (5, 3), dtypes)
    )
    g = random((5, 3), dtypes[0], 3)
    torch.ops.resode.heun_step(*tensors, h).backward(g)
    assert torch.equal(tensors[0].grad, g)
    for stage in tensors[1:]:
        assert torch.equal(stage.grad, (h / 2 * g).to(stage.dtype))


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_compiles_whole(name):
    *tensors, h = operands(name)
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def loss(*tensors):
        return (getattr(torch.ops.resode, name)(tensors[0].sin(), *tensors[1:], h) ** 2).sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled_loss(*tensors), tensors), expected)


def test_vmap():
    x, k1, k2, h = operands("heun_step", (4, 3))
    got = torch.vmap(lambda x, k1: torch.ops.resode.heun_step(x, k1, k2[0], h), in_dims=(0, 1))(x, k1.t().contiguous())
    torch.testing.assert_close(got, x + h / 2 * (k1 + k2[0]))
    with pytest.raises(NotImplementedError, match=r"^adjoint_update_: torch\.vmap must not reach"):
        torch.vmap(lambda g, v: torch.ops.resode.adjoint_update_(g, v, None, 1.0, 1.0))(x, k1)


def test_autocast_does_not_cast_the_stream():
    x, f = random((4, 3), torch.float32, 1), random((4, 3), torch.bfloat16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.resode.forward_step(x, f, 0.1)
    assert torch.equal(out, x.add(f, alpha=0.1))
    assert out.dtype == torch.float32


def test_more_than_2_to_the_31_values_are_a_matter_of_shape():
    x = torch.empty(2**16 + 1, 2**16, device="meta", dtype=torch.float16)
    assert torch.ops.resode.forward_step(x, x, 0.1).shape == x.shape


X = torch.zeros(8, 64)
NORMS = torch.zeros(2)
ADJOINT = (None, None, None, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        (
            "forward_step",
            (X, X[:4], 1.0),
            ValueError,
            r"f must have x's shape, got \[4, 64\] with x \[8, 64\]; nothing is",
        ),
        (
            "forward_step",
            (X, X[0], 1.0),
            ValueError,
            r"f must have x's shape, got \[64\] with x \[8, 64\]; nothing is broad",
        ),
        (
            "forward_step",
            (X, X.to("meta"), 1.0),
            ValueError,
            "f must be on x's device, got meta with x on cpu; move f there$",
        ),
        (
            "forward_step",
            (X.int(), X, 1.0),
            TypeError,
            r"x must be one of float64, .*, bfloat16, got int32; convert x$",
        ),
        ("forward_step", (X, X.double(), 1.0), TypeError, r"f must have x's dtype or .*, got float64 with x float32"),
        (
            "heun_step",
            (X.half(), X.half(), X.bfloat16(), 1.0),
            TypeError,
            "k2 must .* got bfloat16 with x float16; convert k2",
        ),
        (
            "reverse_update_",
            (X, X.half(), X, None, 1.0, NORMS, *ADJOINT),
            TypeError,
            "y must have x's dtype, got float16",
        ),
        ("reverse_update_", (X, X[:4], X, None, 1.0, NORMS, *ADJOINT), ValueError, "y must have x's shape"),
        (
            "reverse_update_",
            (X, X, X, None, 1.0, NORMS.double(), *ADJOINT),
            TypeError,
            "norms must be float32 with x float32",
        ),
        (
            "reverse_update_",
            (X, X, X, None, 1.0, torch.zeros(3), *ADJOINT),
            ValueError,
            "norms must be two contiguous values",
        ),
        (
            "adjoint_update_",
            (X, X.half(), None, 1.0, 1.0),
            TypeError,
            "v1 must have x's dtype, got float16 with x float32",
        ),
    ],
)
@pytest.mark.parametrize("implementation", ["real", "fake"])
def test_errors_say_what_must_hold(implementation, name, values, error, message):
    call = getattr(torch.ops.resode, name) if implementation == "real" else getattr(ops, name)._fake
    with pytest.raises(error, match=f"^{name}: {message}"):
        call(*values)


# Which backend runs.


def test_backends_tell_why_not():
    found = resode_cuda.backends()
    assert set(found) == {*NAMES, "mlp_stack", "mlp_stack_adjoint", "mlp_stack_exact_adjoint"}
    if not torch.cuda.is_available():
        cause = "torch finds no CUDA device"
        assert found["forward_step"] == {"cuda": cause, "triton": cause, "reference": None}
        assert found["mlp_stack"] == {"triton": cause, "cuda": cause, "torch": None}
    assert resode_cuda.backends("cpu")["heun_step"]["cuda"] == "kernels run on CUDA devices, got cpu"


def test_a_backend_that_was_asked_for_runs_or_says_why_not():
    x = torch.zeros(3)
    with ops.using("triton"), pytest.raises(RuntimeError, match=r"got 'triton'; kernels run on CUDA devices, got cpu$"):
        torch.ops.resode.forward_step(x, x, 0.1)
    torch.ops.resode.forward_step(x, x, 0.1)
    with pytest.raises(ValueError, match=r"^using: the backend must be one of .*, got 'numpy'$"), ops.using("numpy"):
        pass


def test_the_reference_takes_over_with_one_notice(monkeypatch):
    monkeypatch.setattr(backend_module, "_cause", lambda name, device: None if name == "reference" else "it is ill")
    backend_module._first.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"^resode_cuda: plain torch computes tensors on cuda:0; cuda: it is ill; tri"
    ):
        assert backend_module.chosen(torch.device("cuda:0")) is reference
    assert backend_module.chosen(torch.device("cuda:0")) is reference
    backend_module._first.cache_clear()


@pytest.mark.parametrize("present", [True, False])
def test_why_the_library_does_not_load(monkeypatch, tmp_path, present):
    if present:
        (tmp_path / f"not_a_library{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no machine code")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "NAME", "not_a_library")
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    info = ops.build_info()
    assert not info.compiled
    if present:
        assert info.cause.startswith("not_a_library is present but does not load: ")
        assert str(tmp_path) in info.cause  # the loader's own words follow
    else:
        assert "no nvcc was found when it was installed" in info.cause
    with pytest.raises(RuntimeError, match=r"^forward_step: needs the compiled library; "):
        library.require("forward_step")


# What a training step of a stack asks of memory and of the device.


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function.overloadpacket.__name__, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


class Tanh(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def backward_calls(scheme, steps, reverse):
    stack = ResidualStack([Tanh() for _ in range(block_count(scheme, steps))], scheme, reverse=reverse)
    loss = half_square(stack(torch.randn(7, 11, requires_grad=True)))
    with Log() as log:
        loss.backward()
    return log.calls


def passes(name, args):
    """Reads and writes of whole states in memory."""
    if name in FUNCTIONAL:
        return sum(isinstance(value, torch.Tensor) for value in args) + 1
    schema = getattr(torch.ops.resode, name).default._schema
    return sum(
        1 + argument.is_write
        for argument, value in zip(schema.arguments, args, strict=True)
        if isinstance(value, torch.Tensor) and argument.name != "norms"
    )


@pytest.mark.parametrize(
    ("scheme", "reverse", "expected"),
    [
        ("euler", "corrected", {"forward_step": 3, "reverse_update_": 7}),
        ("euler", "extrapolated", {"reverse_extrapolate_": 10}),
        ("euler", "paper", {"forward_step": 3, "adjoint_update_": 3}),
        ("heun", "corrected", {"forward_step": 3 * 3, "heun_step": 4, "reverse_update_": 9}),
        ("heun", "extrapolated", {"forward_step": 2 * 3, "reverse_extrapolate_": 12}),
    ],
)
def test_a_backward_step_touches_memory_as_often_as_the_table_says(scheme, reverse, expected):
    """Two more steps make so many more passes, all of them by these ops, and no other op on whole states but tanh's."""
    found = []
    for steps in (6, 8):
        totals = {}
        for name, args, _ in backward_calls(scheme, steps, reverse):
            if name in NAMES:
                totals[name] = totals.get(name, 0) + passes(name, args)
            elif name not in (
                "tanh",
                "tanh_backward",
                "detach",
                "dot",
                "sub",
                "add_",
                "sub_",
                "mul",
                "view",
                "split",
                "unbind",
                "reshape",
                "_reshape_alias",
                "alias",
                "empty_like",
                "copy_",
                "linalg_vector_norm",
                "square_",
            ):
                totals[name] = totals.get(name, 0) + sum(
                    isinstance(value, torch.Tensor) and value.shape == (7, 11) for value in args
                )
        found.append(totals)
    few, many = found
    assert {name: (many[name] - few.get(name, 0)) / 2 for name in many if many[name] != few.get(name, 0)} == expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
def test_a_training_step_reads_nothing_back_from_the_device(monkeypatch, scheme, reverse):
    """While a graph is captured; else a GPU's host reads the drift asynchronously, and random states."""
    pretend_to_capture(monkeypatch)
    stack = ResidualStack([torch.nn.Linear(3, 3) for _ in range(block_count(scheme, 5))], scheme, reverse=reverse)
    x = torch.randn(4, 3)
    with Log() as log:
        half_square(stack(x)).backward()
    for name, args, kwargs in log.calls:
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero"), name
        assert name != "equal" or args[0].dtype == torch.uint8
        assert "device" not in kwargs or kwargs["device"] in (None, x.device)
