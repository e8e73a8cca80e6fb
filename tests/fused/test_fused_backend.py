"""Which backend "auto" takes: the one that was measured to be the fastest, or the rule where nothing was timings."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import timings as timings_command
from resode_cuda.fused import selection, timings
from resode_cuda.fused.op import BACKENDS
from resode_cuda.fused.timings import Size
from resode_cuda.fused.triton import passes as triton_passes
from tests.support.fused_cases import Case
from tests.support.networks import pretend_to_have_a_gpu

GPU = torch.device("cuda")
PROCESSORS = 100


@pytest.fixture
def gpu(monkeypatch):
    """As much of one as a choice needs."""
    pretend_to_have_a_gpu(monkeypatch, processors=PROCESSORS)


@pytest.fixture
def table(gpu, monkeypatch, tmp_path):
    """Writes a table and makes it the one that is read."""
    monkeypatch.setattr(timings, "FILE", tmp_path / "timings.json")

    def forget():
        timings.sizes.cache_clear()
        timings._expected.cache_clear()

    def write(*sizes):
        timings.FILE.write_text(json.dumps({"sources": {}, "sizes": [size._asdict() for size in sizes]}))
        forget()

    forget()
    yield write
    forget()


def size(rows, dim=64, hidden=128, capability=(9, 0), itemsize=2, **times):
    return Size(
        capability, itemsize, dim, hidden, rows, {name.replace("_", " ", 1): time for name, time in times.items()}
    )


def network(dim=64, hidden=128, dtype=torch.bfloat16, **settings):
    return Case(dim=dim, hidden=hidden, rows=1, **settings).operands(dtype)[0]


def order(rows, **settings):
    return list(selection.ranking(network(**settings), rows, GPU))


def test_where_nothing_was_measured_few_rows_are_those_that_do_not_fill_the_device_once(table):
    assert order(32 * PROCESSORS) == ["cuda", "triton", "torch"]
    assert order(32 * PROCESSORS + 1) == ["triton", "cuda", "torch"]
    table(size(64, capability=(8, 0), torch=1.0), size(64, itemsize=4, torch=1.0), size(64, dim=8, torch=1.0))
    assert order(64) == ["cuda", "triton", "torch"]


def test_the_fastest_measured_comes_first_and_what_was_not_measured_last(table):
    table(size(64, torch=3.0, triton_one_pass=4.0, triton_two_pass=2.0))
    assert order(64) == ["triton", "torch", "cuda"]
    assert order(64, dim=50, hidden=100) == ["triton", "torch", "cuda"]
    assert order(64, dtype=torch.float16) == ["triton", "torch", "cuda"]


def test_times_between_numbers_of_rows_lie_on_a_power(table):
    table(size(64, cuda=1.0, torch=8.0), size(16384, cuda=256.0, torch=8.0), size(64, dim=128, torch=0.0))
    here = network()
    assert timings.microseconds(here, 1024, GPU) == {"cuda": pytest.approx(16), "torch": pytest.approx(8)}
    assert timings.microseconds(here, 0, GPU) == timings.microseconds(here, 64, GPU) == {"cuda": 1, "torch": 8}
    assert timings.microseconds(here, 10**6, GPU) == {"cuda": 256, "torch": 8}
    assert (order(400)[0], order(600)[0]) == ("cuda", "torch")


def test_triton_takes_the_gradient_form_that_was_faster(table):
    here = network()
    assert triton_passes.gradient_form(here, 64, GPU) == "two_pass"
    table(size(64, triton_one_pass=4.0, triton_two_pass=2.0), size(4096, triton_one_pass=1.0, triton_two_pass=2.0))
    assert (triton_passes.gradient_form(here, 64, GPU), triton_passes.gradient_form(here, 4096, GPU)) == (
        "two_pass",
        "one_pass",
    )
    assert triton_passes.gradient_form(network(dim=100), 4096, GPU) == "two_pass"
    assert triton_passes.gradient_form(network(dim=300), 64, GPU) == "wide"
    torch.use_deterministic_algorithms(True)
    try:
        assert triton_passes.gradient_form(here, 4096, GPU) == "two_pass"
    finally:
        torch.use_deterministic_algorithms(False)


def test_auto_passes_over_what_cannot_compute_it(table, monkeypatch):
    table(size(64, torch=3.0, triton_one_pass=2.0, cuda=1.0))
    reasons = {"cuda": "no", "triton": None, "torch": None}
    for name, module in BACKENDS.items():
        monkeypatch.setattr(module, "reason", lambda *_, name=name: reasons[name])
    x = SimpleNamespace(numel=lambda: 64 * 64, shape=(64, 64), device=GPU)
    here = network()
    assert selection.select("here", BACKENDS, "auto", here, here.method(), x) == "triton"
    assert selection.reasons(BACKENDS, here, here.method(), x) == reasons


def results(tmp_path, quick=False, **row):
    of_size = {"capability": [9, 0], "dim": 64, "hidden": 128, "depth": 10, "dtype": "bfloat16", "rows": 64, **row}
    rows = [
        {**of_size, "backend": "cuda", "seconds": [1e-3, 2e-3, 3e-3]},
        {**of_size, "backend": "triton two_pass", "seconds": None},
        {**of_size, "backend": "auto", "seconds": [1e-3]},
    ]
    environment = {**dict.fromkeys(timings_command.SOURCE, "x"), "device": "Some GPU"}
    record = {
        "environment": environment,
        "options": {"quick": quick},
        "sections": {"backends": {"sizes": {"rows": rows}}},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record))
    return path


def run(monkeypatch, path):
    monkeypatch.setattr(sys, "argv", ["bench.timings", str(path)])
    timings.sizes.cache_clear()
    return timings_command.main()


def test_the_table_is_made_from_results(table, tmp_path, monkeypatch):
    table(size(64, torch=3.0), size(64, capability=(8, 0), torch=3.0))
    assert run(monkeypatch, results(tmp_path)) == 0
    timings.sizes.cache_clear()
    assert timings.sizes() == (size(64, capability=(8, 0), torch=3.0), size(64, cuda=200.0))
    assert json.loads(timings.FILE.read_text())["sources"]["9.0"]["device"] == "Some GPU"


@pytest.mark.parametrize("settings", [{"quick": True}, {"capability": None}])
def test_no_table_is_made_from_a_quick_run_or_a_cpu(table, tmp_path, monkeypatch, capsys, settings):
    assert run(monkeypatch, results(tmp_path, **settings)) == 2
    assert "RESULTS must be of backends on a GPU" in capsys.readouterr().err
    assert not timings.FILE.exists()
