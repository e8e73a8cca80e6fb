"""The sections on stored increments and on overhead, small, from end to end."""

import math

import torch

from bench.harness import trained
from bench.sections import overhead
from bench.sections.stored.errors import BITS, KEEPING, RIVALS, _rounded


def test_a_quick_run_of_stored_increments(quick_others):
    done, output, results = quick_others
    figures = results["sections"]["stored"]
    (row,) = figures["networks"]
    for keeping in KEEPING:
        errors = [row["stored"][keeping][str(bits)] for bits in BITS]
        assert errors == sorted(errors, reverse=True)
        assert all(0 < error < 1 for error in errors)
    assert set(row["rivals"]) == set(RIVALS)
    assert row["stored"]["none"]["8"] < row["rivals"]["int8"] < row["rivals"]["FP8 E4M3"]
    assert all(math.isfinite(row["loss"]) for row in figures["trainings"])
    assert len(figures["finetuned"]) == 3
    assert (output / "stored.png").read_bytes().startswith(b"\x89PNG")
    assert "Training with stored increments" in done.stdout


def test_a_quick_run_of_overhead(quick_others):
    _, _, results = quick_others
    rows = results["sections"]["overhead"]["rows"]
    assert {row["job"] for row in rows} == set(overhead.JOBS)
    assert {row["mode"] for row in rows} >= {overhead.BASELINE, *overhead.SOLVERS}
    assert all(row["of_checkpoint"]["median"] == 1 for row in rows if row["mode"] == overhead.BASELINE)


def test_rivals_round_states():
    torch.manual_seed(0)
    x = torch.randn(4, 64, dtype=torch.float64)
    errors = {rival: ((_rounded(x, rival) - x).norm() / x.norm()).item() for rival in RIVALS}
    assert errors["bf16"] < errors["int8"] < errors["FP8 E4M3"] < errors["int4"] < 0.2


def test_held_out_data_is_not_trained_on():
    network = trained.gpt(layers=1, dim=8, length=4, rows=2, held_out=0.5)
    assert network.draw()[0].shape == network.draw_held_out()[0].shape == (2, 4)
    whole, rest = trained._split_off(torch.arange(10), 0.2)
    assert (whole.tolist(), rest.tolist()) == (list(range(8)), [8, 9])
