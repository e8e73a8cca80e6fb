"""The benchmark of residual MLPs and of their backends: its figures, its peers, and what it says of a GPU."""

import json
import math

import pytest
import torch

from bench import options
from bench.harness import arms, captured, mlp_networks
from bench.sections import backends, mlp
from bench.sections.backends import size_table
from bench.sections.mlp import measurement
from bench.sections.mlp.jobs import Job
from resode_cuda import ResidualMLP

CPU = torch.device("cpu")


@pytest.fixture
def quick_mlp(quick_others):
    done, _, results = quick_others
    return done, results["sections"]["mlp"]


@pytest.fixture
def quick_backends(quick_others):
    done, _, results = quick_others
    return done, results["sections"]["backends"]


def test_a_quick_run_of_the_residual_mlp(quick_mlp):
    done, figures = quick_mlp
    assert "…" not in done.stdout  # no column was cut at 80 characters
    judged, other = figures["jobs"]
    whole = {("compiled", mode) for mode in mlp_networks.PLAIN}
    by_segment = {(f"compiled by {figures['segment']}", mode) for mode in mlp_networks.PLAIN}
    plain = {("eager", mode) for mode in mlp_networks.PLAIN} | {("bare", "products"), ("bare", "matmul")}
    fused = {("fused", mode) for mode in measurement.TIMED}
    for job, kinds in ((judged, whole | by_segment | plain | fused), (other, by_segment | plain | fused)):
        assert {(row["kind"], row["mode"]) for row in job["rows"]} == kinds
        for row in job["rows"]:
            assert row["reason"] is None
            assert min(row["seconds"]) > 0
            assert row["backend"] == ("torch" if row["kind"] == "fused" else None)
        errors = job["errors"]
        assert max(errors[mode] for mode in ("eager", "backprop", "checkpoint")) < 1e-5
        assert all(1e-5 < errors[mode] < 1e-2 for mode in ("paper", "corrected", "extrapolated"))
    states = {
        (row["mode"], row["depth"]): row["peak_bytes"] / row["state_bytes"]
        for row in judged["memory"]
        if row["kind"] == "fused"
    }
    for mode in ("paper", "corrected", "extrapolated"):
        assert states[mode, 4] == pytest.approx(states[mode, 16], rel=0.01)


def test_targets_of_the_residual_mlp_on_a_cpu(quick_mlp):
    _, figures = quick_mlp
    targets = [target.what for target in mlp.targets(figures)]
    assert len(targets) == 3 + 1 + 2 * len(measurement.FUSED)
    for what in (
        "extrapolated, of eager",
        "checkpoint, of eager",
        "corrected, of eager",
        "checkpoint, error",
        "N=16, peak",
    ):
        assert any(what in target for target in targets)


def on_a_gpu(figures):
    """What a run on a GPU would have left, with invented times: 1 for the op, 5 compiled, 2 in segments."""
    figures = json.loads(json.dumps({**figures, "device": "cuda"}))
    job = figures["jobs"][0]
    job |= {"dim": 64, "hidden": 128, "activation": "silu", "flop": 6.0, "matmul_flop": 2.0}
    invented = {"fused": 1.0, "compiled": 5.0, f"compiled by {figures['segment']}": 2.0, "eager": 9.0, "bare": 0.1}
    for row in job["rows"]:
        row["seconds"] = [invented[row["kind"]]] * 3
    for row in job["memory"]:
        row["peak_bytes"] = 6 * row["state_bytes"]
        if row["kind"] == "fused":
            row |= {"scratch_bytes": 2 * row["state_bytes"], "launches": {"forward": 1, "backward": 2}}
    return figures


def test_targets_of_the_residual_mlp_on_a_gpu(quick_mlp):
    _, figures = quick_mlp
    figures = on_a_gpu(figures)
    found = {target.what.partition(": ")[2]: target for target in mlp.targets(figures)}
    for start, measured, is_met in (
        ("extrapolated, times faster than compiled backprop", 2.0, False),  # the faster of the two that were compiled
        ("extrapolated, times faster than compiled checkpoint", 2.0, False),
        ("extrapolated, share of the matrix ceiling", 0.3, True),
        ("checkpoint, of extrapolated's time", 1.0, True),
        ("checkpoint, N=16, peak", 4.0, True),
        ("corrected, backward: launches", 1.0, True),
    ):
        (target,) = (target for what, target in found.items() if what.startswith(start))
        assert target.measured == pytest.approx(measured)
        assert target.met == is_met
    assert "1 + 2" in "".join(table.markdown() for table in mlp.tables(figures))


def test_what_the_residual_mlp_could_not_measure_is_said(quick_mlp):
    _, figures = quick_mlp
    figures = on_a_gpu(figures)
    for row in figures["jobs"][0]["rows"]:
        if row["kind"].startswith("compiled") or (row["kind"], row["mode"]) == ("fused", "checkpoint"):
            row |= {"reason": arms.OUT_OF_MEMORY, "seconds": None, "of_backprop": None, "of_products": None}
    figures["left_out"] = [{**figures["jobs"][0], "activation": "gelu_tanh"}]
    found = [str(target) for target in mlp.targets(figures)]
    assert not any("faster than" in target for target in found)  # nothing to compare with
    assert any("missed" in target and "checkpoint, of extrapolated's time" in target for target in found)
    assert any("missed" in target and "gelu_tanh: left out" in target for target in found)
    markdown = "".join(table.markdown() for table in mlp.tables(figures))
    assert "| compiled | backprop | out of memory | – |" in markdown
    assert "Left out for lack of time: dim 64, hidden 128, gelu_tanh" in markdown


def test_an_arm_that_runs_out_of_memory_does_not_stop_the_others():
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no more")

    arm = arms.Arm("eager", "backprop", call)
    for _ in range(3):
        arm()
    assert len(calls) == 2
    assert arm.reason == arms.OUT_OF_MEMORY
    assert arms.failures([arms.described(arm, {})]) == []


def test_an_arm_is_called_as_often_as_its_time_takes():
    now = [0.0]

    def call():
        now[0] += 0.5

    arm = arms.Arm("fused", "extrapolated", call)
    arm.first(lambda: now[0])
    assert arm.first_seconds == 0.5
    for seconds, most, times in ((2.0, 20, 4), (100.0, 20, 20), (0.1, 20, 1)):
        arm.settle(lambda: now[0], seconds, most)
        assert arm.times == times


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_every_way_of_the_residual_mlp_has_the_same_gradients(activation):
    job = Job(4, 6, 5, 8, torch.float64, activation)
    net = job.network(job.depth, 0, CPU)
    assert isinstance(net, ResidualMLP)
    batch = mlp_networks.batch_of(job.rows, net)
    exact = measurement._gradients(mlp_networks.fused_step(net, "backprop"), batch)
    for mode, compiler, length in (
        ("backprop", None, None),
        ("checkpoint", None, 2),
        ("backprop", "eager", None),
        ("checkpoint", "eager", 2),
    ):
        layers = mlp_networks.Layers(net)
        layers.step(mode, compiler, length)(batch)
        for got, expected in zip([*layers.gradients(), batch[0].grad], exact, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_quick_run_of_the_backends(quick_backends):
    done, figures = quick_backends
    assert "…" not in done.stdout  # no column was cut at 80 characters
    assert backends.targets(figures) == []  # they are those of a GPU
    kinds = [(row["kind"], row["backend"]) for row in figures["few_rows"]["rows"]]
    assert kinds == [("fused", "torch"), ("auto", "torch"), ("eager", None)]
    assert [row["kind"] for row in figures["wide"]["rows"]] == ["fused", "auto", "compiled by 8", "compiled by 8"]
    assert [row["backend"] for row in figures["forward"]["rows"]] == ["torch"]
    for part in ("few_rows", "wide", "forward"):
        assert all(min(row["seconds"]) > 0 for row in figures[part]["rows"])
    shallow, deep = figures["wide"]["memory"]
    assert deep["frozen_peak_bytes"] == pytest.approx(shallow["frozen_peak_bytes"], rel=0.02)
    assert shallow["frozen_peak_bytes"] < shallow["peak_bytes"] < deep["peak_bytes"]
    rows = figures["sizes"]["rows"]
    assert [row["backend"] for row in rows] == 2 * ["torch", "auto"]
    for row in rows:
        assert row["milliseconds"] > 0
        assert {"capability", "dim", "hidden", "rows", "depth", "dtype"} <= row.keys()
        assert row["taken"] == ("torch" if row["backend"] == "auto" else None)


def test_sizes_measured_before_an_interrupt_are_kept(monkeypatch):
    measured = iter([size_table.figures_of])

    def figures_of(*arguments):
        of = next(measured, None)
        if of is None:
            raise KeyboardInterrupt
        return of(*arguments)

    monkeypatch.setattr(size_table, "figures_of", figures_of)
    figures = size_table.measure(options.parse(["--quick", "--only", "backends"]), CPU, math.inf)
    assert [row["backend"] for row in figures["rows"]] == ["torch", "auto"]
    assert len(figures["left_out"]) == 1
    assert figures["stopped"]


def test_without_a_gpu_the_backends_are_left_out():
    figures = backends.measure(options.parse(["--only", "backends"]), CPU, None)
    (table,) = backends.tables(figures)
    assert "needs a GPU" in table.markdown()
    assert backends.targets(figures) == []


def backends_on_a_gpu(figures):
    """What a run on a GPU would have left, with invented times: 1 ms by CUDA C++, 2 ms by torch, which "auto" takes."""
    figures = json.loads(json.dumps({**figures, "device": "cuda"}))
    for part in ("few_rows", "forward"):
        rows = figures[part]["rows"]
        rows.insert(0, {**rows[0], "backend": "cuda"})
        rows.append({**rows[-1], "kind": "captured eager"})
    milliseconds = {"cuda": 1, "torch": 2, "eager": 12, "captured eager": 2.5, "compiled by 8": 1.25}
    for part in ("few_rows", "forward", "wide"):
        for row in figures[part]["rows"]:
            row["seconds"] = [1e-3 * milliseconds[row["backend"] or row["kind"]]] * 3
    sizes = figures["sizes"]["rows"]
    sizes[:0] = [{**sizes[0], "backend": "cuda"}]
    for row in sizes:
        row["seconds"] = [1e-3 * milliseconds["torch" if row["backend"] == "auto" else row["backend"]]] * 3
        row["milliseconds"] = 1e3 * row["seconds"][0]
    return figures


def test_targets_of_the_backends_on_a_gpu(quick_backends):
    _, figures = quick_backends
    figures = backends_on_a_gpu(figures)
    figures["forward"]["rows"] = figures["forward"]["rows"][:2]
    found = backends.targets(figures)
    for start, measured, is_met in (
        ("few rows, best backend (cuda), times faster than eager", 12, True),
        ("few rows, best backend (cuda), times faster than the CUDA graph", 2.5, False),
        ("few rows, forward pass alone, best backend (cuda), a layer", 1000 / 16, False),
        ("wide layers, extrapolated, of compiled backprop", 1.6, False),
        ("wide layers, memory without parameter gradients, N=16 and N=8", 1, True),
        ("auto, of the best backend's time, the worst of 2 sizes (dim 16", 2, False),
    ):
        (target,) = (target for target in found if target.what.startswith(start))
        assert target.measured == pytest.approx(measured, rel=0.02)
        assert target.met == is_met
    markdown = "".join(table.markdown() for table in backends.tables(figures))
    assert "| captured eager | backprop | 2.500 | 4.80 ±0.00 | 1.00 ±0.00 |" in markdown
    assert "| 16 | 32 | 16 | 16 | 1.00 | 2.00 | 2.00 | torch | 2.00 |" in markdown


def test_what_the_backends_could_not_measure_is_said(quick_backends):
    _, figures = quick_backends
    figures = backends_on_a_gpu(figures)
    for row in figures["wide"]["rows"]:
        if row["kind"].startswith("compiled"):
            row |= {"seconds": None, "reason": arms.OUT_OF_MEMORY}
    figures["wide"]["memory"][1] = {"depth": 16, "reason": arms.OUT_OF_MEMORY}
    for row in (*figures["few_rows"]["rows"], figures["sizes"]["rows"][-1]):
        row |= {"seconds": None, "milliseconds": None, "reason": "Traceback"}
    figures["sizes"]["left_out"] = [figures["few_rows"]]
    del figures["forward"]
    found = [str(target) for target in backends.targets(figures)]
    assert not any("of compiled" in target for target in found)  # nothing to compare with
    missed = "few rows, no backend ran", "memory without", "auto, of the best", "1 sizes left out"
    assert all(any(start in target and target.startswith("missed") for target in found) for start in missed)
    markdown = "".join(table.markdown() for table in backends.tables(figures))
    figures["wide"]["rows"][-1]["reason"] = arms.NO_TIME
    assert any("of compiled checkpoint" in target.what and not target.met for target in backends.targets(figures))
    assert "| compiled by 8 | backprop | out of memory | – |" in markdown
    assert "| 16 | out of memory | – | – |" in markdown
    assert "| fused, cuda | extrapolated | failed | – | – |" in markdown
    assert "Left out for lack of time (dim/hidden rows): 16/32 32" in markdown


def test_the_table_of_sizes_holds_no_step_of_seconds():
    sizes = size_table.all_sizes(options.parse(["--only", "backends"]), torch.device("cuda"))
    assert {size.dim for size in sizes} == set(size_table.DIMS)
    assert len(set(sizes)) == len(sizes)
    for size in sizes:
        assert 8 * 2 * size.rows * size.dim * size.hidden * size.depth < 2e13
        assert 2 * size.dim * size.hidden * size.depth <= size_table.WEIGHTS


@pytest.mark.gpu
def test_a_captured_step_has_the_gradients_of_its_batch():
    net = mlp_networks.Size(16, 32, 4, 8, torch.float32, "silu").network(4, 0, torch.device("cuda"))
    first, batch = (mlp_networks.batch_of(8, net) for _ in range(2))
    eager, replayed = mlp_networks.Layers(net), mlp_networks.Layers(net)
    graph = captured.Captured(replayed.step("backprop"), first)
    graph()
    graph.load(batch)
    graph()
    eager.step("backprop")(batch)
    for got, expected in zip(replayed.gradients(), eager.gradients(), strict=True):
        torch.testing.assert_close(got, expected)
