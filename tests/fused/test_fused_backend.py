"""Which backend "auto" takes: the one that was measured to be the fastest, or the rule where nothing was measured."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import timings as timings_command
from resode_cuda.fused import selection as backend
from resode_cuda.fused import timings as measured
from resode_cuda.fused.timings import Size
from resode_cuda.fused.triton import passes as triton_passes
from tests.support.fused_cases import Case

GPU = torch.device("cuda")
PROCESSORS = 100


@pytest.fixture
def gpu(monkeypatch):
    """As much of one as a choice needs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    facts = SimpleNamespace(multi_processor_count=PROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


@pytest.fixture
def table(gpu, monkeypatch, tmp_path):
    """Writes a table and makes it the one that is read."""
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")

    def forget():
        measured.sizes.cache_clear()
        measured._expected.cache_clear()

    def write(*sizes):
        measured.FILE.write_text(json.dumps({"sources": {}, "sizes": [size._asdict() for size in sizes]}))
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
    return list(backend._order(network(**settings), rows, GPU))


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
    assert measured.microseconds(here, 1024, GPU) == {"cuda": pytest.approx(16), "torch": pytest.approx(8)}
    assert measured.microseconds(here, 0, GPU) == measured.microseconds(here, 64, GPU) == {"cuda": 1, "torch": 8}
    assert measured.microseconds(here, 10**6, GPU) == {"cuda": 256, "torch": 8}
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
    causes = {"cuda": "no", "triton": None, "torch": None}
    monkeypatch.setattr(backend, "_cause", lambda name, *_: causes[name])
    x = SimpleNamespace(numel=lambda: 64 * 64, shape=(64, 64), device=GPU)
    assert backend.chosen("here", "auto", network(), x, None) is triton_passes
    assert backend.causes(network(), x, None) == causes


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
    measured.sizes.cache_clear()
    return timings_command.main()


def test_the_table_is_made_from_results(table, tmp_path, monkeypatch):
    table(size(64, torch=3.0), size(64, capability=(8, 0), torch=3.0))
    assert run(monkeypatch, results(tmp_path)) == 0
    measured.sizes.cache_clear()
    assert measured.sizes() == (size(64, capability=(8, 0), torch=3.0), size(64, cuda=200.0))
    assert json.loads(measured.FILE.read_text())["sources"]["9.0"]["device"] == "Some GPU"


@pytest.mark.parametrize("settings", [{"quick": True}, {"capability": None}])
def test_no_table_is_made_from_a_quick_run_or_a_cpu(table, tmp_path, monkeypatch, capsys, settings):
    assert run(monkeypatch, results(tmp_path, **settings)) == 2
    assert "RESULTS must be of backends on a GPU" in capsys.readouterr().err
    assert not measured.FILE.exists()
