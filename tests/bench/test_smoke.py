"""The smoke test of the kernels: its own logic, and what it leaves out of the tests afterwards."""

import json
import re
import sys

import pytest
import torch

from bench import smoke
from tests.support import kernel_families
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
    assert [row["case"] for row in json.loads(file.read_text())] == list(smoke.CASES)
    assert smoke.main(["--failed", str(file)]) == 0
    assert capsys.readouterr().out == "fused-cuda\n"  # what is only wrong harms nothing that comes later
    outcomes.clear()
    assert smoke.main(["--device", "cpu"]) == 0
    assert smoke.failed_families(tmp_path / "none.json") == []


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
    assert {family for needed in kernel_families.FAMILIES.values() for family in needed} <= set(FAMILIES)


def test_tests_of_a_family_that_failed_are_left_out(monkeypatch):
    path = "tests/ops/test_cuda_kernels.py"
    monkeypatch.delenv(kernel_families.FAILED, raising=False)
    assert kernel_families.reason_to_skip(path) is None
    monkeypatch.setenv(kernel_families.FAILED, "pointwise-cuda fused-triton")
    assert "pointwise-cuda fail" in kernel_families.reason_to_skip(path)
    assert kernel_families.reason_to_skip("tests/ops/test_triton.py") is None
