"""The benchmark's own arithmetic and measurements, and one run of it, small, from end to end. Nothing here is timed."""

import json
import math
import os
import sys

import pytest
import torch

from bench import options, section
from bench.harness import gradients, memory, models, resident, timing
from bench.harness.modes import MODES, REBUILDING, SCHEMES
from bench.harness.plots import spread_apart
from bench.harness.results import save_tables
from bench.harness.tables import Table, Target
from bench.sections import digits, kernels, sweep
from resode_cuda import ops
from tests.support.bench_run import run_bench

CPU = torch.device("cpu")
MIB = 2**20


def test_a_quick_run_leaves_figures_of_every_mode(quick_default):
    done, _, results = quick_default
    assert done.stderr == ""
    assert set(results["sections"]) == set(section.DEFAULT)
    for field in ("device", "cpu", "cpu_cores", "torch", "python", "platform", "commit", "date"):
        assert field in results["environment"]
    assert results["options"]["quick"] is True
    for name, figures in results["sections"].items():
        assert "failure" not in figures
        assert {row["mode"] for row in figures["rows"]} == set(MODES)
        for row in figures["rows"]:
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


def test_a_quick_run_leaves_tables_and_plots(quick_default):
    done, output, _ = quick_default
    for name in ("memory.png", "time.png", "gradient_error.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    markdown = (output / "table.md").read_text()
    for mode in MODES:
        assert f"| euler | {mode} |" in markdown
        assert f"| 8 | {mode} |" in markdown
        assert f" {mode} " in done.stdout
    assert "Targets are not judged" in done.stdout
    assert "…" not in done.stdout  # no column was cut at 80 characters


def test_a_quick_run_of_the_ops_alone(quick_others):
    done, _, results = quick_others
    steps = results["sections"]["kernels"]["steps"]
    assert {(row["scheme"], row["reverse"]) for row in steps} == set(kernels.STEPS)
    assert all(row["against_plain"]["median"] > 0 for row in steps)
    assert "against plain torch" in done.stdout


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
    arguments = ["--quick", "--device", "cpu", "--only", "digits", "kernels", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert command.main() == 1
    figures = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert "no digits today" in figures["digits"]["failure"]
    assert len(figures["kernels"]["steps"]) == len(kernels.STEPS)
    assert "no digits today" in capsys.readouterr().out


def test_help_explains_every_option():
    shown = run_bench("--help").stdout
    for name in options.Options.__dataclass_fields__:
        assert f"--{name}" in shown
    for name in section.SECTIONS:
        assert f"{name} (" in shown


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
    jobs = [resident.Job(models.mlp_workload, arguments, mode) for mode in ("backprop", "paper")]
    backprop, paper = resident.growth(jobs, CPU)
    held = 2 * 8 * 2048 * 256 * 4
    assert held < backprop < 1.4 * held
    assert paper < backprop / 1.8


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_a_process_that_measures_resident_growth_says_why_it_failed():
    arguments = {"scheme": "leapfrog", "steps": 2, "channels": 4, "rows": 2, "device": "cpu"}
    with pytest.raises(RuntimeError, match=r"(?s)must end well, but wrote.*leapfrog"):
        resident.growth([resident.Job(models.digits_workload, arguments, "paper")], CPU)


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


def test_a_run_leaves_its_targets_beside_its_tables(tmp_path):
    table = Table("cost", ["N", "mode", "time"])
    save_tables([table], [Target("time", 1.3, 1.4), Target("peak", 13.0, 12.0)], "some CPU", tmp_path)
    written = (tmp_path / "table.md").read_text()
    assert "**Targets**\n\n- met: time 1.30, at most 1.4\n- missed: peak 13.00, at most 12\n\nMeasured on" in written
    save_tables([table], [], "some CPU", tmp_path)
    assert "Targets" not in (tmp_path / "table.md").read_text()


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
