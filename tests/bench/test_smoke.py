"""The smoke test of the kernels: its own logic, and what it leaves out of the tests afterwards."""

import json
import re
import sys
import threading
import time

import pytest
import torch

from bench import smoke
from bench.harness import results
from bench.harness.failed_kernels import ONE_PASS_FAMILY, VARIABLE
from bench.harness.fused_backends import ONE_PASS, TWO_PASS, triton_gradient_forms
from resode_cuda import ResidualMLP
from resode_cuda.fused.triton import passes as triton_passes
from tests.support import fused_cases, kernel_families
from tests.support.bench_run import ROOT

CPU = torch.device("cpu")
FAMILIES = list(dict.fromkeys(name.partition("/")[0] for name in smoke.CASES))


@pytest.mark.parametrize("case", [name for name in smoke.CASES if name.startswith("pointwise-cuda")])
def test_a_pointwise_op_is_held_against_plain_torch(case):
    _, op = smoke.CASES[case].args
    smoke.pointwise("torch", op, CPU)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_wrong_results_are_told(factor):
    with pytest.raises(smoke.WrongError, match="relative error must be at most"):
        smoke._compare(factor * torch.ones(3), torch.ones(3), 1e-4)


@pytest.mark.parametrize("mode", ["extrapolated", "checkpoint"])
@pytest.mark.parametrize("trains", [False, True])
def test_a_training_step_is_held_against_plain_torch(mode, trains):
    smoke.backward("torch", mode, trains, CPU)
    smoke.forward("torch", CPU)


def test_wrong_gradients_are_told(monkeypatch):
    exact = smoke.step_by
    monkeypatch.setattr(smoke, "step_by", lambda mlp, mode, backend: exact(mlp, "paper", backend))
    with pytest.raises(smoke.WrongError):
        smoke.backward("torch", "checkpoint", True, CPU)


def test_a_form_that_this_gpu_lacks_is_left_out(monkeypatch):
    monkeypatch.setattr(smoke, "triton_gradient_forms", lambda mlp: ["triton slow"])
    with pytest.raises(smoke.LeftOutError, match="'triton fast' can't run on this GPU, triton slow can"):
        smoke.backward("triton fast", "extrapolated", True, CPU)


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        ("", smoke.OK, ""),
        ("import sys; print('off'); sys.exit(3)", smoke.WRONG, "off"),
        ("import sys; print('no GPU'); sys.exit(4)", smoke.LEFT_OUT, "no GPU"),
        ("raise RuntimeError('illegal access')", smoke.FAILED, "illegal access\nexit status 1"),
        ("import os; os.abort()", smoke.FAILED, "exit status -6"),
        ("import time; time.sleep(60)", smoke.FAILED, "took longer than 0.5 s"),
    ],
)
def test_what_ends_a_process_costs_one_case(monkeypatch, script, outcome, reason):
    run, seen = smoke.subprocess.run, {}

    def instead(command, **settings):
        seen.update(settings["env"])
        return run([sys.executable, "-c", script], **settings)

    monkeypatch.setattr(smoke.subprocess, "run", instead)
    seconds = 0.5 if "sleep" in script else 30
    found = smoke.run_elsewhere("fused-cuda/exact", "cuda", seconds)
    assert (found.family, found.outcome) == ("fused-cuda", outcome)
    assert reason in found.reason
    assert seen["CUDA_LAUNCH_BLOCKING"] == "1"


def test_a_run_says_what_became_of_each_case_and_names_the_families_that_failed(monkeypatch, tmp_path, capsys):
    outcomes = {"fused-cuda/exact": smoke.FAILED, "fused-triton/exact": smoke.WRONG}

    def run_elsewhere(name, device):
        return smoke.Outcome(name, outcomes.get(name, smoke.OK), 0.1, "why" if name in outcomes else "")

    monkeypatch.setattr(smoke, "run_elsewhere", run_elsewhere)
    file = tmp_path / "smoke.json"
    assert smoke.main(["--device", "cpu", "--output", str(file)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"fused-cuda/exact +FAILED +0.1 s  why", printed)
    assert sorted(row["case"] for row in json.loads(file.read_text())) == sorted(smoke.CASES)
    assert smoke.main(["--failed", str(file)]) == 0
    assert capsys.readouterr().out == "fused-cuda\n"  # what is only wrong harms nothing that comes later
    outcomes.clear()
    assert smoke.main(["--device", "cpu"]) == 0


def test_a_case_of_a_run_that_was_cut_off_failed_if_it_had_not_ended(monkeypatch, tmp_path):
    file, first = tmp_path / "smoke.json", next(iter(smoke.CASES))
    seen, done = [], threading.Event()

    def run_elsewhere(name, device):
        if name == first:  # this one hangs until all others are in the file
            assert done.wait(30)
        return smoke.Outcome(name, smoke.OK, 0.1)

    def write_json(rows, file):
        results.write_json(rows, file)
        if len(rows) == len(smoke.CASES) - 1:
            seen.extend(smoke.failed_families(file))
            done.set()

    monkeypatch.setattr(smoke, "run_elsewhere", run_elsewhere)
    monkeypatch.setattr(smoke, "write_json", write_json)
    assert smoke.main(["--device", "cpu", "--output", str(file)]) == 0
    assert seen == [first.partition("/")[0]]
    assert smoke.failed_families(file) == []
    assert smoke.failed_families(tmp_path / "none.json") == FAMILIES


def test_an_interrupted_run_begins_no_further_case(monkeypatch, tmp_path):
    begun = []

    def run_elsewhere(name, device):
        begun.append(name)
        time.sleep(0.2)
        return smoke.Outcome(name, smoke.OK, 0.1)

    def interrupt(rows, file):
        raise KeyboardInterrupt

    monkeypatch.setattr(smoke, "WORKERS", 1)
    monkeypatch.setattr(smoke, "run_elsewhere", run_elsewhere)
    monkeypatch.setattr(smoke, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        smoke.run_all("cpu", tmp_path / "smoke.json")
    assert len(begun) <= 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "smoke.json"
    results.write_json(["before"], file)
    with pytest.raises(TypeError):
        results.write_json([object()], file)
    assert json.loads(file.read_text()) == ["before"]
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_gpu_the_cases_that_need_one_say_so(capsys):
    assert smoke.run_elsewhere("fused-cuda/exact", "cpu").reason == "needs a CUDA device"
    assert smoke.main(["fused-cuda/exact", "--device", "cpu"]) == 4
    assert capsys.readouterr().out == "needs a CUDA device\n"
    assert smoke.main(["torch/adjoint", "--device", "cpu"]) == 0
    assert smoke.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(smoke.CASES)


def test_every_file_with_tests_on_a_gpu_says_which_kernels_they_launch():
    marked = {
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/*/*.py") if "pytest.mark.gpu" in path.read_text()
    }
    own = "tests/bench/test_smoke.py"
    assert marked - {own} == set(kernel_families.FAMILIES)
    apart = kernel_families.FAMILIES_OF_TESTS
    assert all(f"\ndef {test}(" in (ROOT / path).read_text() for path, test in apart)
    needs = (*kernel_families.FAMILIES.values(), *apart.values())
    assert {family for needed in needs for family in needed} <= set(FAMILIES)


def test_tests_of_a_family_that_failed_are_left_out(monkeypatch):
    path = "tests/ops/test_cuda_kernels.py"
    monkeypatch.delenv(VARIABLE, raising=False)
    assert kernel_families.reason_to_skip(path, "test_on_a_gpu") is None
    monkeypatch.setenv(VARIABLE, "pointwise-cuda fused-triton")
    assert "pointwise-cuda fail" in kernel_families.reason_to_skip(path, "test_on_a_gpu")
    assert kernel_families.reason_to_skip("tests/ops/test_triton.py", "test_on_a_gpu") is None


def test_kernels_that_only_some_tests_of_a_file_need_leave_the_others_in(monkeypatch):
    path = "tests/fused/test_fused_gpu.py"
    monkeypatch.setenv(VARIABLE, "wide-triton one-pass-triton")
    assert kernel_families.reason_to_skip(path, "test_sizes_and_presets") is None
    assert "wide-triton fail" in kernel_families.reason_to_skip(path, "test_wide_layers")
    (memory,) = (test for _, test in kernel_families.FAMILIES_OF_TESTS if "five_states" in test)
    assert "one-pass-triton fail" in kernel_families.reason_to_skip(path, memory)


def test_without_its_kernel_one_pass_is_neither_measured_nor_preferred(monkeypatch):
    mlp = ResidualMLP(8, 8, 2, on_drift="ignore")
    monkeypatch.setattr(triton_passes, "gradient_forms", lambda network, device: (TWO_PASS, ONE_PASS))
    for failed, forms in (("fused-cuda", [TWO_PASS, ONE_PASS]), ("one-pass-triton", [TWO_PASS])):
        monkeypatch.setenv(VARIABLE, failed)
        assert triton_gradient_forms(mlp) == [f"triton {form}" for form in forms]
        fused_cases.prefer_one_pass(monkeypatch)
        assert triton_passes.gradient_form(mlp._network(), 1, CPU) == forms[-1]


def test_one_pass_is_no_part_of_the_families_of_its_peers():
    (case,) = (name for name, check in smoke.FUSED.items() if f"triton {ONE_PASS}" in check.args)
    assert [name for name in smoke.CASES if name.startswith(f"{ONE_PASS_FAMILY}/")] == [case]
