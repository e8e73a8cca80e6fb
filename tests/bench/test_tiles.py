"""The choice of tiles for Triton's kernels, rehearsed with a clock that no GPU drives."""

import json

import pytest
import torch

from bench import tiles
from bench.harness import triton_tiles
from bench.harness.triton_tiles import KERNELS, candidates, entry_for, instead_of, rewritten
from resode_cuda import ResidualMLP
from resode_cuda.fused.triton import passes
from resode_cuda.fused.triton.tiles import Tile, tiles_for

HOPPER = (9, 0)
PLAIN = entry_for(HOPPER, 64, 2, is_plain=True)
ADJOINT = KERNELS[1]


def measured(entry, kernel, seconds_of, refused=()):
    """The rows of a measurement in which each tile takes its time of `seconds_of`, and those refused can't run."""
    taken = []

    def call_with(tile):
        def call():
            if tile in refused:
                raise RuntimeError("out of resource: shared memory")
            taken.append(tile)

        return call

    def timed(call, times):
        for _ in range(times):
            call()
        return seconds_of(taken[-1])

    rows = tiles.measure(entry, kernel, call_with, timed)
    for row in rows:
        row["calls"] = taken.count(Tile(*row["tile"]))
    return rows


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key", [64, 128, 256])
def test_four_to_six_tiles_are_tried_that_in_use_first(kernel, key):
    entry = entry_for(HOPPER, key, 2, is_plain=True)
    found = candidates(entry, kernel)
    assert found[0] == getattr(entry.tiles, kernel)
    assert 4 <= len(found) == len(set(found)) <= 6
    assert all(min(tile.rows, tile.chunk) >= 16 for tile in found)


def test_networks_with_a_norm_share_the_tiles_of_twice_their_dim():
    assert (PLAIN.table, PLAIN.key) == ("HOPPER", 64)
    assert entry_for(HOPPER, 64, 2, is_plain=False)[:2] == entry_for(HOPPER, 128, 2, is_plain=True)[:2]


def test_tiles_take_turns_and_what_cannot_run_says_why():
    tried = candidates(PLAIN, ADJOINT)
    rows = measured(PLAIN, ADJOINT, lambda tile: 1.0 + tried.index(tile) / 2, refused=tried[2:3])
    assert [Tile(*row["tile"]) for row in rows] == tried
    assert [row["of_baseline"] for row in rows[:4]] == [1.0, 1.5, None, 2.5]
    assert {row["baseline"] for row in rows} == {"that in use"}
    assert "shared memory" in rows[2]["reason"]
    assert rows[2]["seconds"] is None
    assert all(len(row["seconds"]) == tiles.ROUNDS for row in rows if row["reason"] is None)


def test_where_the_tile_in_use_cannot_run_the_fastest_replaces_it():
    tried = candidates(PLAIN, ADJOINT)
    rows = measured(PLAIN, ADJOINT, lambda tile: 1.0 if tile == tried[2] else 2.0, refused=tried[:1])
    assert [row["of_baseline"] for row in rows[:4]] == [None, 2.0, 1.0, 2.0]
    assert {row["baseline"] for row in rows} == {"the fastest"}
    (changed,) = tiles.fastest(rows)
    assert changed.tiles == PLAIN.tiles._replace(**{ADJOINT: tried[2]})


def test_a_tile_in_use_that_runs_for_one_network_alone_is_replaced_by_one_that_runs_for_all():
    tried = candidates(PLAIN, ADJOINT)
    times = {tried[1]: 1.0, tried[2]: 1.2}
    rows = measured(PLAIN, ADJOINT, lambda tile: times.get(tile, 0.9), refused=tried[1:2])
    rows += measured(PLAIN, ADJOINT, lambda tile: times.get(tile, 3.0), refused=(tried[0], *tried[3:]))
    (changed,) = tiles.fastest(rows)
    assert changed.tiles == PLAIN.tiles._replace(**{ADJOINT: tried[2]})


def test_where_no_tile_can_run_each_says_why():
    rows = measured(PLAIN, ADJOINT, lambda tile: 1.0, refused=candidates(PLAIN, ADJOINT))
    assert all("shared memory" in row["reason"] and row["seconds"] is None for row in rows)
    assert tiles.fastest(rows) == []


def test_a_slow_tile_gets_no_rounds():
    tried = candidates(PLAIN, ADJOINT)
    times = {tried[1]: 3.1, tried[2]: 2.9}
    rows = measured(PLAIN, ADJOINT, lambda tile: times.get(tile, 1.0))
    assert rows[1]["calls"] == 2
    assert rows[1]["reason"] == "not measured: one call took 3.1 times as long as that in use"
    assert tiles.shown(tiles.NETWORKS[0], rows[1]).endswith(rows[1]["reason"])
    assert rows[2]["calls"] == 2 + tiles.CALLS * (tiles.ROUNDS + 1)
    assert [row["of_baseline"] for row in rows[:3]] == [1.0, None, 2.9]
    assert tiles.fastest(rows) == []


def test_the_file_has_what_was_measured_and_what_was_left_out(monkeypatch, tmp_path):
    now = iter(range(0, 1000, tiles.SECONDS // 2))  # time for two kernels
    monkeypatch.setattr(tiles.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(tiles, "compile_ahead", lambda: None)
    monkeypatch.setattr(tiles.environment, "describe", lambda device: {"device": "Some GPU"})
    monkeypatch.setattr(tiles.Network, "build", lambda network: None)
    monkeypatch.setattr(tiles, "kernels_of", lambda mlp: KERNELS)
    monkeypatch.setattr(tiles, "entry_of", lambda network: PLAIN)
    rows = {kernel: measured(PLAIN, kernel, lambda tile: 1.0) for kernel in KERNELS}
    monkeypatch.setattr(tiles, "measure", lambda entry, kernel, *_: rows[kernel])
    tiles.time_all(tmp_path / "new" / "tiles.json")
    record = json.loads((tmp_path / "new" / "tiles.json").read_text())
    assert list(dict.fromkeys(row["kernel"] for row in record["rows"])) == list(KERNELS[:2])
    assert len(record["left_out"]) == len(tiles.NETWORKS) * len(KERNELS) - 2
    assert record["rows"][0]["dim"] == tiles.NETWORKS[0].dim


def test_the_table_gets_the_tile_that_is_fastest_for_all_networks_that_share_it():
    plain, other = (entry_for(HOPPER, dim, 2, dim == 128) for dim in (128, 64))
    tried = candidates(plain, ADJOINT)
    times = {tried[1]: 0.5, tried[2]: 0.7, tried[3]: 0.99}
    rows = measured(plain, ADJOINT, lambda tile: times.get(tile, 1.0))
    (changed,) = tiles.fastest(rows)
    assert changed.tiles == plain.tiles._replace(**{ADJOINT: tried[1]})
    rows += measured(other, ADJOINT, lambda tile: times.get(tile, 1.0), refused=tried[1:2])
    (changed,) = tiles.fastest(rows)
    assert changed.tiles == plain.tiles._replace(**{ADJOINT: tried[2]})


def test_a_gain_within_noise_changes_nothing():
    tried = candidates(PLAIN, ADJOINT)
    assert tiles.fastest(measured(PLAIN, ADJOINT, lambda tile: 1.0 if tile == tried[0] else 0.99)) == []


def test_the_library_takes_a_tile_only_as_long_as_it_is_tried():
    other = candidates(PLAIN, ADJOINT)[1]
    with instead_of(PLAIN, ADJOINT, other):
        assert getattr(passes.tiles_for(HOPPER, 64, 2, True), ADJOINT) == other
    assert passes.tiles_for(HOPPER, 64, 2, True) is tiles_for(HOPPER, 64, 2, True) is PLAIN.tiles


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_timed_is_a_pass_with_the_tile(monkeypatch, kernel):
    mode, _ = tiles.PASSES[kernel]
    monkeypatch.setitem(tiles.PASSES, kernel, (mode, "torch"))
    mlp, seen = ResidualMLP(8, 8, 2, on_drift="ignore"), []
    mlp.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), passes.tiles_for(HOPPER, 64, 2, True))))
    other = candidates(PLAIN, kernel)[1]
    tiles.call_of(mlp, PLAIN, kernel, other, rows=3)()
    assert seen == [(mode != "forward", PLAIN.tiles._replace(**{kernel: other}))]
    assert (mlp.weight_in.grad is not None) == (mode != "forward")


def test_the_table_is_rewritten_in_its_own_style():
    source = triton_tiles.SOURCE.read_text()
    for key in (64, 128, 256):
        entry = entry_for(HOPPER, key, 2, is_plain=True)
        assert rewritten(source, entry) == source
        changed = rewritten(source, entry._replace(tiles=entry.tiles._replace(**{ADJOINT: Tile(16, 32, 4, 2)})))
        assert changed.count("Tile(16, 32, 4, 2)") == source.count("Tile(16, 32, 4, 2)") + 1
        assert len(changed.splitlines()) == len(source.splitlines())
    with pytest.raises(ValueError, match="must have a row 96"):
        rewritten(source, PLAIN._replace(key=96))


def test_one_command_writes_the_table(tmp_path, monkeypatch, capsys):
    tried = candidates(PLAIN, ADJOINT)
    rows = measured(PLAIN, ADJOINT, lambda tile: 0.5 if tile == tried[1] else 1.0)
    (tmp_path / "tiles.json").write_text(json.dumps({"rows": rows}))
    copy = tmp_path / "tiles.py"
    copy.write_text(triton_tiles.SOURCE.read_text())
    monkeypatch.setattr(tiles, "SOURCE", copy)
    assert tiles.main(["--write", str(tmp_path / "tiles.json")]) == 0
    assert copy.read_text() == rewritten(
        triton_tiles.SOURCE.read_text(), PLAIN._replace(tiles=PLAIN.tiles._replace(**{ADJOINT: tried[1]}))
    )
    assert "HOPPER[64]" in capsys.readouterr().out


def test_it_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RESULTS", raising=False)
    assert tiles.main([]) == 2
    assert "RESULTS must name the folder" in capsys.readouterr().err
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiles.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_line_for_each_tile():
    tried = candidates(PLAIN, ADJOINT)
    rows = measured(PLAIN, ADJOINT, lambda tile: 2e-3 if tile == tried[1] else 1e-3, refused=tried[2:3])
    lines = [tiles.shown(tiles.NETWORKS[0], row) for row in rows]
    assert f"{list(tried[1])}" in lines[1]
    assert "2.000 ms  2.00 of" in lines[1]
    assert lines[2].endswith("RuntimeError: out of resource: shared memory")
