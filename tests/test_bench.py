"""The benchmark's own arithmetic and measurements, and one run of it, small, from end to end. Nothing here is timed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import (
    arms,
    backends,
    backends_sizes,
    captured,
    digits,
    gradients,
    kernels,
    memory,
    mlp,
    mlp_networks,
    models,
    options,
    resident,
    sweep,
    timing,
)
from bench.modes import MODES, REBUILDING, SCHEMES
from bench.plots import spread_apart
from bench.report import Table, Target
from resode_cuda import ResidualMLP, ops

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MIB = 2**20


def run_bench(*arguments):
    # One thread: small tensors gain nothing from a second, and wait long for it where tests run side by side.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    done = run_bench("--quick", "--device", "cpu", "--threads", "1", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return done, output, json.loads((output / "results.json").read_text())


def test_a_quick_run_leaves_figures_of_every_mode(quick_run):
    done, _, results = quick_run
    assert done.stderr == ""
    assert set(results["sections"]) == set(options.DEFAULT)
    for field in ("device", "cpu", "cpu_cores", "torch", "python", "platform", "commit", "date"):
        assert field in results["environment"]
    assert results["options"]["quick"] is True
    for name, section in results["sections"].items():
        assert "failure" not in section
        assert {row["mode"] for row in section["rows"]} == set(MODES)
        for row in section["rows"]:
            assert 0 < row["held_bytes"] <= row["peak_bytes"]
            if name == "sweep" and row["scheme"] not in sweep.TIMED_SCHEMES:
                assert "seconds" not in row
                continue
            assert len(row["seconds"]) >= 1
            assert row["relative_time"]["low"] <= row["relative_time"]["median"] <= row["relative_time"]["high"]
    rows = results["sections"]["digits"]["rows"]
    assert [(row["scheme"], row["mode"]) for row in rows] == [(s, m) for s in SCHEMES for m in MODES]
    for row in rows:
        rebuilt = row["mode"] in REBUILDING
        assert (row["gradient_error_at_start"] > 0) == (row["gradient_error_trained"] > 0) == rebuilt
        assert 0 <= row["test_accuracy"] <= 100
    for share in results["sections"]["cost"]["drift"]:
        assert 0 < share["percent"]["median"] < 100


def test_a_quick_run_leaves_tables_and_plots(quick_run):
    done, output, _ = quick_run
    for name in ("memory.png", "time.png", "gradient_error.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    markdown = (output / "table.md").read_text()
    for mode in MODES:
        assert f"| euler | {mode} |" in markdown
        assert f"| 8 | {mode} |" in markdown
        assert f" {mode} " in done.stdout
    assert "Targets are not judged" in done.stdout
    assert "…" not in done.stdout  # no column was cut at 80 characters


def test_a_quick_run_of_the_ops_alone(tmp_path):
    done = run_bench("--quick", "--only", "kernels", "--device", "cpu", "--threads", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "results.json").read_text())["sections"]["kernels"]["steps"]
    assert {(row["scheme"], row["reverse"]) for row in steps} == set(kernels.STEPS)
    assert all(row["against_plain"]["median"] > 0 for row in steps)
    assert "against plain torch" in done.stdout


@pytest.fixture(scope="module")
def quick_mlp(tmp_path_factory):
    output = tmp_path_factory.mktemp("mlp")
    done = run_bench("--quick", "--only", "mlp", "--device", "cpu", "--threads", "1", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads((output / "results.json").read_text())["sections"]["mlp"]


def test_a_quick_run_of_the_residual_mlp(quick_mlp):
    done, figures = quick_mlp
    assert "…" not in done.stdout  # no column was cut at 80 characters
    judged, other = figures["jobs"]
    whole = {("compiled", mode) for mode in mlp.PLAIN}
    by_segment = {(f"compiled by {figures['segment']}", mode) for mode in mlp.PLAIN}
    plain = {("eager", mode) for mode in mlp.PLAIN} | {("bare", "products"), ("bare", "matmul")}
    fused = {("fused", mode) for mode in mlp.FUSED}
    for job, kinds in ((judged, whole | by_segment | plain | fused), (other, by_segment | plain | fused)):
        assert {(row["kind"], row["mode"]) for row in job["rows"]} == kinds
        for row in job["rows"]:
            assert row["cause"] is None
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
    assert len(targets) == 3 + 1 + 2 * len(mlp.FUSED)
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
            row |= {"cause": arms.OUT_OF_MEMORY, "seconds": None, "of_backprop": None, "of_products": None}
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
    assert arm.cause == arms.OUT_OF_MEMORY
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
    job = mlp.Job(4, 6, 5, 8, torch.float64, activation)
    net = job.network(job.depth, 0, CPU)
    assert isinstance(net, ResidualMLP)
    batch = mlp_networks.batch_of(job.rows, net)
    exact = mlp._gradients(mlp_networks.fused_step(net, "backprop"), batch)
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


@pytest.fixture(scope="module")
def quick_backends(tmp_path_factory):
    output = tmp_path_factory.mktemp("backends")
    done = run_bench("--quick", "--only", "backends", "--device", "cpu", "--threads", "1", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads((output / "results.json").read_text())["sections"]["backends"]


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
    measured = iter([backends_sizes.figures_of])

    def figures_of(*arguments):
        of = next(measured, None)
        if of is None:
            raise KeyboardInterrupt
        return of(*arguments)

    monkeypatch.setattr(backends_sizes, "figures_of", figures_of)
    figures = backends_sizes.measure(options.parse(["--quick", "--only", "backends"]), CPU, math.inf)
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
            row |= {"seconds": None, "cause": arms.OUT_OF_MEMORY}
    figures["wide"]["memory"][1] = {"depth": 16, "cause": arms.OUT_OF_MEMORY}
    for row in (*figures["few_rows"]["rows"], figures["sizes"]["rows"][-1]):
        row |= {"seconds": None, "milliseconds": None, "cause": "Traceback"}
    figures["sizes"]["left_out"] = [figures["few_rows"]]
    del figures["forward"]
    found = [str(target) for target in backends.targets(figures)]
    assert not any("of compiled" in target for target in found)  # nothing to compare with
    missed = "few rows, no backend ran", "memory without", "auto, of the best", "1 sizes left out"
    assert all(any(start in target and target.startswith("missed") for target in found) for start in missed)
    markdown = "".join(table.markdown() for table in backends.tables(figures))
    figures["wide"]["rows"][-1]["cause"] = arms.NO_TIME
    assert any("of compiled checkpoint" in target.what and not target.met for target in backends.targets(figures))
    assert "| compiled by 8 | backprop | out of memory | – |" in markdown
    assert "| 16 | out of memory | – | – |" in markdown
    assert "| fused, cuda | extrapolated | failed | – | – |" in markdown
    assert "Left out for lack of time (dim/hidden rows): 16/32 32" in markdown


def test_the_table_of_sizes_holds_no_step_of_seconds():
    sizes = backends_sizes.all_sizes(options.parse(["--only", "backends"]), torch.device("cuda"))
    assert {size.dim for size in sizes} == set(backends_sizes.DIMS)
    assert len(set(sizes)) == len(sizes)
    for size in sizes:
        assert 8 * 2 * size.rows * size.dim * size.hidden * size.depth < 2e13
        assert 2 * size.dim * size.hidden * size.depth <= backends_sizes.WEIGHTS


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


def test_plain_formulas_of_the_benchmark_are_those_of_the_ops():
    def left_by(formulas, scheme, reverse):
        torch.manual_seed(0)
        states, norms = torch.randn(8, 4, 3, dtype=torch.float64).unbind(), torch.zeros(2, dtype=torch.float64)
        kernels._step(formulas, scheme, reverse, states, norms)
        return [*states, norms]

    for scheme, reverse in kernels.STEPS:
        for got, expected in zip(*(left_by(f, scheme, reverse) for f in (kernels.Plain, ops)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_section_that_fails_leaves_the_others_figures(tmp_path, monkeypatch, capsys):
    import bench.__main__ as command

    def fails(*_):
        raise RuntimeError("no digits today")

    monkeypatch.setattr(digits, "measure", fails)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench",
            "--quick",
            "--device",
            "cpu",
            "--only",
            "digits",
            "sweep",
            "--depths",
            "2",
            "--output",
            str(tmp_path),
        ],
    )
    assert command.main() == 1
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert "no digits today" in sections["digits"]["failure"]
    assert len(sections["sweep"]["rows"]) == len(SCHEMES) * len(MODES)
    assert "no digits today" in capsys.readouterr().out


def test_help_explains_every_option():
    shown = run_bench("--help").stdout
    for name in options.Options.__dataclass_fields__:
        assert f"--{name}" in shown
    for section in options.SECTIONS:
        assert f"{section} (" in shown


def test_options_that_make_no_sense_are_refused(capsys):
    for arguments in (["--rounds", "0"], ["--depths", "-8"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            options.parse(arguments)
        assert arguments[0] in capsys.readouterr().err


def test_memory_counts_a_storage_once_and_a_release_at_once():
    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.zeros(1)

    def forward():
        block = torch.rand(3 * MIB // 4)
        # Both products save the block, one of them as a view; each product is gone once it is summed.
        return (weight * block).sum() + (weight * block.view(3, -1)).sum()

    forward().backward()
    measured = memory.measure(forward, CPU)
    assert measured.held == pytest.approx(3 * MIB, abs=1024)
    assert measured.peak == pytest.approx(6 * MIB, abs=1024)


def test_memory_of_backpropagation_is_what_it_saves():
    steps, rows, dim, hidden = 6, 512, 32, 64
    workload = models.mlp_workload("euler", steps, dim, hidden, rows, "cpu")
    workload.step("backprop")
    measured = memory.measure(lambda: workload.forward("backprop"), CPU)
    # A block saves its input and its tanh. The first input was there before; the loss saves one tensor of that size.
    assert measured.held == pytest.approx(4 * rows * steps * (dim + hidden), abs=1024)


def test_memory_of_the_adjoint_does_not_grow_with_depth():
    def held_and_peak(steps):
        workload = models.mlp_workload("euler", steps, 32, 32, 512, "cpu")
        workload.step("extrapolated")
        measured = memory.measure(lambda: workload.forward("extrapolated"), CPU)
        return measured.held, measured.peak

    assert held_and_peak(24) == pytest.approx(held_and_peak(6), rel=0.01)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_resident_growth_sees_what_backpropagation_holds():
    arguments = {"scheme": "euler", "steps": 8, "dim": 256, "hidden": 256, "rows": 2048, "device": "cpu"}
    jobs = [resident.Job("mlp_workload", arguments, mode) for mode in ("backprop", "paper")]
    backprop, paper = resident.growth(jobs, CPU)
    held = 2 * 8 * 2048 * 256 * 4
    assert held < backprop < 1.4 * held
    assert paper < backprop / 1.8


def test_ratios_compare_within_a_round():
    # Rounds of very different speed, the same ratio of 2 in each but one.
    ratio = timing.ratios([2.0, 20.0, 0.2, 4.0, 9.0], [1.0, 10.0, 0.1, 2.0, 3.0])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0)


def test_interleaved_rounds_start_with_each_arm_in_turn():
    order = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timing.interleaved(arms, 2, CPU, lambda: order.append("|"))
    assert "".join(order) == "|abc|bca|cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_relative_error_is_over_all_tensors_together():
    exact = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    got = [torch.tensor([3.0]), torch.tensor([[0.5, 4.0]])]
    assert gradients.relative_error(got, exact) == pytest.approx(0.1)
    assert gradients.relative_error(exact, exact) == 0


def test_gradient_error_of_one_linear_step_in_closed_form():
    # x1 = (1 + w) x0 with loss (x1 - y)^2 / 2: the paper's solver takes the gradient x0 (x1 - y) at (1 - w) x1 instead.
    workload = models.smooth_mlp_workload("euler", 1, 1, 1, 1, "cpu", torch.float64, seed=0)
    w = 0.25
    block = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(block.weight, w)
    setattr(workload.stack, "0", block)
    assert gradients.errors(workload, ["paper"])["paper"] == pytest.approx(w**2)
    assert gradients.errors(workload, ["backprop", "checkpoint"]) == {"backprop": 0, "checkpoint": 0}


def test_fitted_order_of_a_power():
    depths = [8, 16, 32, 64]
    assert gradients.fitted_order(depths, [1.0, *(5 * n**-3 for n in depths[1:])]) == pytest.approx(3)
    assert gradients.fitted_order(depths[:2], [1.0, 0.5]) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stacks_of_all_depths_sample_the_same_weights(scheme):
    def weights(steps):
        stack = models.smooth_mlp_workload(scheme, steps, 3, 5, 2, "cpu", torch.float64, seed=1).stack
        return [list(block.parameters()) for block in stack]

    coarse, fine = weights(4), weights(8)
    assert len(coarse) == models.block_count(scheme, 4)
    for n, block in enumerate(coarse):
        for a, b in zip(block, fine[2 * n], strict=True):
            torch.testing.assert_close(a, b)


def test_weight_curve_is_smooth():
    curve = models.weight_curve((4, 9), torch.Generator().manual_seed(0))

    def second_difference(h):
        return ((curve(0.5 + h) - 2 * curve(0.5) + curve(0.5 - h)).norm() / h**2).item()

    # Of a smooth function they tend to the second derivative.
    assert second_difference(1e-2) == pytest.approx(second_difference(1e-3), rel=1e-3)


def test_the_digits_split_is_fixed_and_in_proportion():
    one, other = digits.load(CPU), digits.load(CPU)
    assert torch.equal(one.test_images, other.test_images)
    assert len(one.train_labels) + len(one.test_labels) == 1797
    shares = torch.bincount(one.test_labels) / torch.bincount(torch.cat([one.train_labels, one.test_labels]))
    torch.testing.assert_close(shares, torch.full((10,), digits.TEST_SHARE), atol=0.01, rtol=0)


def test_trainings_of_a_scheme_start_alike():
    start = digits.Start(steps=3, seed=5)
    torch.rand(7)  # whatever was drawn before
    one, other = start.net("heun"), start.net("heun")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_targets_say_met_or_missed():
    assert str(Target("time", 1.3, 1.4)) == "met: time 1.30, at most 1.4"
    assert str(Target("accuracy", 96.5, 97, at_least=True, unit="%")) == "missed: accuracy 96.50%, at least 97%"
    assert not Target("time", math.nan, 1.4).met


def test_table_in_markdown():
    table = Table("T", ["name", "kind", "figure"], rows=[("a", "b", "1")], note="Note.")
    assert table.markdown().splitlines() == [
        "**T**",
        "",
        "| name | kind | figure |",
        "| --- | --- | ---: |",
        "| a | b | 1 |",
        "",
        "Note.",
    ]


def test_labels_keep_apart_and_near_their_lines():
    placed = spread_apart({"low": 0.1, "a": 0.50, "b": 0.51, "c": 0.52}, gap=0.1)
    assert placed == pytest.approx({"low": 0.1, "a": 0.41, "b": 0.51, "c": 0.61})
