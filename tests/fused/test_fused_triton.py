"""The depth-fused ops by Triton: in Triton's interpreter, and compiled for GPUs that are not there."""

import functools
import importlib
import importlib.util
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

from resode_cuda.fused import selection
from resode_cuda.fused.activations import ACTIVATIONS
from resode_cuda.fused.norms import NORMS
from resode_cuda.fused.op import BACKENDS
from resode_cuda.fused.schedule import schedule
from resode_cuda.fused.triton import arguments
from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.method import Method
from resode_cuda.reverse import Reverse
from resode_cuda.schemes import SCHEMES, Euler
from tests.support.fused_cases import Case
from tests.support.interpreted import assert_passes
from tests.support.networks import Midpoint, pretend_to_capture, pretend_to_have_a_gpu

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
if HAS_TRITON:
    from triton.backends.nvidia.driver import make_launcher

    from tests.support import fused_compiled
    from tests.support.fused_compiled import EVERYDAY, TESTED, Configuration

    EVERY_KERNEL = [
        Configuration(90, 64, "extrapolated", gradient_form="one_pass"),
        Configuration(90, 64, "extrapolated"),
        Configuration(80, 64, "checkpoint", scheme="heun", norm="rms"),
        Configuration(90, 2048, "extrapolated", norm="layer"),
        Configuration(90, 64, "stored"),
    ]
else:
    TESTED = EVERYDAY = EVERY_KERNEL = []


pytestmark = pytest.mark.usefixtures("triton_cache")


@needs_triton
def test_in_the_interpreter():
    assert_passes("tests/fused/interpreted.py")


@needs_triton
def test_activations_in_the_interpreter():
    assert_passes("tests/fused/interpreted_activations.py")


@needs_triton
@pytest.mark.parametrize(
    "configuration",
    [pytest.param(c, id=str(c), marks=() if c in EVERYDAY else pytest.mark.machine) for c in TESTED],
)
def test_compiles_within_its_budget(configuration):
    budget = fused_compiled.budget()[str(configuration)]
    used = fused_compiled.used_by(configuration)
    assert used.keys() == budget.keys()
    above = {
        f"{kernel} {what}": figure
        for kernel, figures in used.items()
        for what, figure in figures.items()
        if figure > budget[kernel][what]
    }
    assert not above, f"above the budget {budget}; if it must be, run python -m tests.support.fused_compiled"


@needs_triton
def test_the_budget_is_of_what_is_tested():
    assert list(fused_compiled.budget()) == list(map(str, TESTED))
    assert set(EVERYDAY) <= set(TESTED)


@needs_triton
def test_the_kernels_are_not_newer_than_the_budget():
    found = json.loads(fused_compiled.BUDGET.read_text())["source"]
    assert found == fused_compiled.source(), "run python -m tests.support.fused_compiled"


@needs_triton
def test_the_presets_spill_no_registers_in_matrix_loops_on_hopper_and_later():
    """What they spill once a layer is budgeted like all that kernels take.

    "corrected" at dim 128 has one load in each of its two loops, of more than 200 instructions.
    """
    budget = fused_compiled.budget()
    allowed = {(Configuration(90, 128, "corrected"), "adjoint"): 2}
    for configuration in TESTED:
        is_tuned = configuration == Configuration(configuration.gpu, configuration.dim, configuration.reverse)
        if is_tuned and configuration.gpu >= 90:
            for kernel, used in budget[str(configuration)].items():
                assert used["inner_local"] <= allowed.get((configuration, kernel), 0), f"{configuration} {kernel}"


@needs_triton
def test_every_program_fits_in_shared_memory():
    for name, kernels in fused_compiled.budget().items():
        gpu = int(re.match(r"sm_(\d+)", name)[1])
        for kernel, used in kernels.items():
            assert used["shared"] <= fused_compiled.SHARED[gpu], f"{name} {kernel}"


@needs_triton
@pytest.mark.parametrize(
    ("configuration", "launches"),
    [
        (Configuration(90, 64, "extrapolated", gradient_form="one_pass"), ["forward", "adjoint"]),
        (Configuration(90, 128, "corrected"), ["forward", "adjoint", "weight_gradient"]),
        (Configuration(90, 64, "extrapolated", deterministic=True), ["forward", "adjoint", "weight_gradient"]),
        (Configuration(90, 64, "checkpoint"), ["exact", "weight_gradient"]),
        (Configuration(90, 64, "stored"), ["storing_forward", "stored_adjoint", "weight_gradient"]),
    ]
    if HAS_TRITON
    else [],
)
@pytest.mark.parametrize("steps", [5, 100])
def test_launches_do_not_depend_on_the_depth(monkeypatch, configuration, launches, steps):
    monkeypatch.setattr(fused_compiled, "STEPS", steps)
    assert [name.removesuffix("_kernel") for name, _ in fused_compiled.compiled(configuration)] == launches


@needs_triton
def test_bf16_products_are_warpgroup_instructions_on_hopper():
    kernels = dict(fused_compiled.compiled(Configuration(90, 64, "extrapolated")))
    for kernel in kernels.values():
        assert "wgmma.mma_async" in kernel.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("gpu", [90, 100])
@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
def test_the_copy_engine_adds_gradients_to_memory_in_one_pass(gpu, form):
    kernels = dict(fused_compiled.compiled(Configuration(gpu, 64, "extrapolated", gradient_form=form)))
    assert ("cp.reduce.async.bulk.tensor" in kernels["adjoint_kernel"].asm["ptx"]) == (form == "one_pass")
    assert ("weight_gradient_kernel" in kernels) == (form == "two_pass")


@needs_triton
@pytest.mark.parametrize("reverse", ["extrapolated", "checkpoint"])
def test_weights_come_16_bytes_at_a_time_where_there_is_no_copy_engine(reverse):
    for name, kernel in fused_compiled.compiled(Configuration(80, 64, reverse)):
        ptx = kernel.asm["ptx"]
        sizes = re.findall(r"cp\.async\.c\w\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
        assert 16 in {int(size, 0) for size in sizes}, name
        assert {int(size, 0) for size in sizes} <= {4, 16}, name  # 4: of biases
        assert not re.findall(r"ld\.global\.\w*16\b", ptx), name  # a value at a time


@needs_triton
def test_two_passes_have_no_atomics_where_they_must_repeat():
    kernels = dict(fused_compiled.compiled(Configuration(90, 64, "extrapolated", deterministic=True)))
    for name, kernel in kernels.items():
        assert not re.findall(r"\b(?:atom|red)\.", kernel.asm["ptx"]), name


@needs_triton
@pytest.mark.parametrize("reverse", ["extrapolated", "stored"])
def test_addresses_of_tiles_have_64_bits(reverse):
    for name, kernel in fused_compiled.compiled(Configuration(90, 64, reverse, deterministic=True)):
        assert re.search(r"arith\.muli %\w+, %\w+ : i64", kernel.asm["ttir"]), name


def reason_on_cuda(case, dtype, monkeypatch, capability=(9, 0), solver=None):
    pretend_to_have_a_gpu(monkeypatch, capability)
    monkeypatch.setattr(triton_passes.triton_ops, "reason", lambda device: None)
    network, *_ = case.operands(dtype)
    return triton_passes.reason(network, network.method(solver), torch.device("cuda"))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ("euler", "softplus", None),
            "Triton's kernels have the activations identity, relu, gelu, gelu_tanh, silu, tanh, got 'softplus'",
        ),
        (("heun", "silu", "batch"), "Triton's kernels have the norms None, rms, layer, got 'batch'"),
        (("midpoint", "silu", "rms"), "Triton's kernels have the schemes euler, heun, got 'midpoint'"),
    ],
)
def test_formulas_that_the_kernels_lack_are_told(monkeypatch, names, reason):
    assert arguments.reason_against(*names) == reason
    scheme, activation, norm = names
    network = replace(Case().operands(torch.float32)[0], activation=activation, norm=norm)
    method = Method({**SCHEMES, "midpoint": Midpoint}[scheme], network.steps)
    pretend_to_have_a_gpu(monkeypatch)
    monkeypatch.setattr(triton_passes.triton_ops, "reason", lambda device: None)
    assert triton_passes.reason(network, method, torch.device("cuda")) == reason


def test_the_kernels_have_every_formula_of_the_library():
    for scheme, activation, norm in itertools.product(SCHEMES, ACTIVATIONS, NORMS):
        assert arguments.reason_against(scheme, activation, norm) is None


@needs_triton
@pytest.mark.parametrize("configuration", EVERY_KERNEL, ids=str)
def test_an_equal_config_finds_the_kernel_that_was_compiled(configuration):
    first, second = (fused_compiled.launches(configuration) for _ in range(2))
    assert [launch.key for launch in first] == [launch.key for launch in second]
    for one, other in zip(first, second, strict=True):
        assert one.config == other.config
        assert one.config is not other.config
        changed = {**one.constants, "CONFIG": replace(one.config, activation="relu")}
        assert fused_compiled.key_of(one.kernel, one.values, changed, configuration.gpu) != one.key


@needs_triton
@pytest.mark.parametrize("configuration", EVERY_KERNEL, ids=str)
def test_triton_can_launch_what_it_compiles(configuration):
    """Triton 3.6 has no launcher for tensor descriptors inside of tuples, and compiles kernels that take them."""
    for name, kernel in fused_compiled.compiled(configuration):
        signature = dict(enumerate(kernel.src.signature.values()))
        launcher = make_launcher(kernel.src.constants, signature, kernel.metadata.tensordesc_meta)
        assert "cuLaunchKernelEx" in launcher, name


def test_what_triton_cannot_compute_is_told(monkeypatch):
    assert reason_on_cuda(Case(), torch.float32, monkeypatch) is None
    assert "float64" in reason_on_cuda(Case(), torch.float64, monkeypatch)
    assert reason_on_cuda(Case(dim=257), torch.float32, monkeypatch) is None
    assert "capability 8.0, got 7.5" in reason_on_cuda(Case(), torch.float32, monkeypatch, (7, 5))
    several = Reverse("stored", bits=(8, 4, 4))
    assert reason_on_cuda(Case(), torch.float32, monkeypatch, solver=several) == (
        "Triton's kernels store all steps' increments in one number of bits, got [4, 8]"
    )
    assert reason_on_cuda(Case(dim=257), torch.bfloat16, monkeypatch, solver=several) is None
    for bits in (4, (4, 4, 4)):
        assert reason_on_cuda(Case(), torch.float32, monkeypatch, solver=Reverse("stored", bits=bits)) is None
    accelerated = Reverse("step", corrections=2)
    assert "accelerate" in reason_on_cuda(Case(), torch.float32, monkeypatch, solver=accelerated)
    assert reason_on_cuda(Case(), torch.float32, monkeypatch, solver=replace(accelerated, accelerate=False)) is None
    assert reason_on_cuda(Case(dim=257), torch.float32, monkeypatch, solver=accelerated) is None


def test_products_are_as_precise_as_torch_is_told_by_either_name():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for value, told in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
            settings.fp32_precision = value
            assert arguments.precision(torch.float32) == told
            assert arguments.precision(torch.bfloat16) == "ieee"
        for value, told in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(value)
            assert arguments.precision(torch.float32) == told
    finally:
        torch.set_float32_matmul_precision("highest")
        settings.fp32_precision = before


def test_no_schedule_is_kept_on_the_device():
    there = torch.device("meta")
    method = Method(Euler, (0.5, 0.25, 0.25), Reverse("extrapolate"))
    first, second = (schedule(method, there) for _ in range(2))
    assert first.is_meta
    assert first is not second
    here = schedule(method, torch.device("cpu"))
    assert here[:, 0].tolist() == [0.5, 0.25, 0.25]
    assert here[1:, 1:3].tolist() == [[0, -1], [0, -1]]


def test_the_schedule_has_the_places_of_the_anchored_states():
    method, here = Method(Euler, (0.2,) * 5), torch.device("cpu")
    assert schedule(method, here)[:, 3].tolist() == [-1] * 5
    assert schedule(replace(method, anchors=(0, 1, 4)), here)[:, 3].tolist() == [0, 1, -1, -1, 2]


def test_the_schedule_has_the_segments_and_places_of_stored_increments():
    method, here = Method(Euler, (0.2,) * 5, Reverse("stored")), torch.device("cpu")
    assert schedule(method, here)[:, 1:].tolist() == [[0, n, -1] for n in range(5)]
    found = schedule(replace(method, anchors=(0, 3, 4)), here)[:, 1:].tolist()
    assert found == [[0, -1, 0], [0, 0, -1], [0, 1, -1], [-1, -1, 1], [-1, -1, 2]]


def test_schedules_are_kept_for_a_while_and_those_of_captured_graphs_for_ever(monkeypatch):
    module = importlib.import_module(schedule.__module__)
    monkeypatch.setattr(module, "_captured", {})
    monkeypatch.setattr(module, "_host_schedule", functools.lru_cache(maxsize=2)(module._host_schedule.__wrapped__))
    methods, there = [Method(Euler, (0.1,) * n) for n in range(1, 6)], torch.device("meta")
    for method in methods:
        schedule(method, there)
    assert module._host_schedule.cache_info().currsize == 2
    assert module._captured == {}
    pretend_to_capture(monkeypatch)
    for method in methods:
        schedule(method, there)
    assert list(module._captured) == methods
    first = module._captured[methods[0]]
    schedule(methods[0], there)  # another graph, after the cache has dropped the schedule
    assert module._captured[methods[0]] is first


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 128), (torch.bfloat16, 256), (torch.float16, 256)])
def test_wider_rows_than_fit_on_chip_go_layer_by_layer(monkeypatch, dtype, dim):
    on_chip, wide = (Case(dim=width).operands(dtype)[0] for width in (dim, dim + 1))
    assert not triton_passes.is_wide(on_chip)
    assert triton_passes.is_wide(wide)
    for norm, scheme in ((None, "euler"), ("rms", "heun")):
        is_plain = norm is None and scheme == "euler"
        for gpu in ((8, 0), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0)):
            assert triton_passes.tiles_for(gpu, dim, dtype.itemsize, is_plain).chunk >= 16
    accelerated = Reverse("step", corrections=2)
    assert reason_on_cuda(Case(dim=dim + 1), dtype, monkeypatch, solver=accelerated) is None
    assert "accelerate" in reason_on_cuda(Case(dim=dim), dtype, monkeypatch, solver=accelerated)


def test_auto_takes_triton_where_it_runs_and_torch_elsewhere(monkeypatch):
    network, x, _ = Case().operands(torch.float32)

    def taken(x):
        return selection.select("here", BACKENDS, "auto", network, network.method(), x)

    assert taken(x) == "torch"
    monkeypatch.setattr(triton_passes.triton_ops, "reason", lambda device: None)
    assert taken(x.to("meta")) == "torch"
    monkeypatch.setattr(triton_passes, "reason", lambda *_: None)
    assert taken(x) == "triton"
