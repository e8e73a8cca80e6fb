"""`python -m bench.scale`: its arithmetic against figures worked out here, and the tables of docs/scale.md."""

import os
import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest

from bench.command_line import CommandError
from bench.scale.__main__ import PAGE, main, with_tables
from bench.scale.assumptions import Assumptions
from bench.scale.methods import CHECKPOINT, FP8, METHODS, NESTED, OFFLOAD, PLAIN, REBUILD, SEGMENTS, STORED
from bench.scale.methods import depth_where_segments_win as segments_win
from bench.scale.networks import DECODER_7B, DECODER_405B, NARROW, NETWORKS, OFFLOADED, Network, perceptrons
from bench.scale.parallelism import (
    Plan,
    at_work,
    fixed_bytes,
    forward_seconds,
    gpu_seconds,
    kept_bytes,
    largest_units,
    links,
    parameter_bytes,
    plans,
    rate,
    step_seconds,
)
from bench.scale.tables import all_tables, short

GIVEN = Assumptions()
TOY = Network("toy", "row", layers=16, width=10, layer_parameters=200, inner_values=40, gradient_values=30, units=100)


def test_parameters_of_the_decoders():
    assert DECODER_7B.parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096 == 6_738_149_376
    assert DECODER_405B.parameters == pytest.approx(405.8e9, rel=1e-3)
    # Two norms' inputs and outputs, queries, attention's output; keys and values; gate, up and their product.
    assert DECODER_7B.inner_bytes == 2 * (6 * 4096 + 2 * 4096 + 3 * 11008) == 131_584
    assert DECODER_7B.layer_flops == 2 * 202_375_168 + 2 * 4096 * 8192


def test_layer_inputs_of_405b_are_504_gib():
    sequence, gib = DECODER_405B.units, 2**30
    assert sequence * CHECKPOINT.kept(DECODER_405B, 126, 1) == 504 * gib
    companion = sequence * 4 * 16384
    assert (sequence * STORED[4].kept(DECODER_405B, 126, 1) - companion) / gib == pytest.approx(134, abs=0.2)
    assert (sequence * STORED[2].kept(DECODER_405B, 126, 1) - companion) / gib == pytest.approx(71, abs=0.2)


@pytest.mark.parametrize(
    ("method", "states"),
    [
        (PLAIN, 60),  # 15 layers of 4; one is at work
        (CHECKPOINT, 16),
        (SEGMENTS, 12),  # 8 segments of 2 layers, one of whose own 4 states are at work
        (NESTED, 8),
        (OFFLOAD, 2),
        (FP8, 16 * 8.25 / 16),
        (STORED[8], 16 * 8.25 / 16 + 2),
        (STORED[4], 16 * 4.25 / 16 + 2),
        (STORED[2], 16 * 2.25 / 16 + 2),
        (REBUILD, 2),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_states_that_a_method_keeps(method, states):
    assert method.kept(TOY, 16, 1) == pytest.approx(20 * states)


def test_states_of_microbatches_in_flight():
    # A stage of 4 layers with 4 microbatches: as many inputs as 16 layers have, and a companion for each.
    assert CHECKPOINT.kept(TOY, 4, 4) == 20 * 16
    assert STORED[4].kept(TOY, 4, 4) == pytest.approx(20 * (16 * 4.25 / 16 + 4 * 2))
    assert REBUILD.kept(TOY, 4, 4) == 20 * 4 * 2
    assert PLAIN.kept(TOY, 4, 4) == 80 * 15
    assert NESTED.kept(TOY, 4, 4) == 20 * min(4 * 4 + 1, 4 * 2 + 2, 4 * 1 + 4)


@pytest.mark.parametrize("bits", STORED)
def test_depth_where_segments_win(bits):
    depth = segments_win(TOY, bits)
    assert 2 * (depth * TOY.ratio) ** 0.5 == pytest.approx(depth * (bits + 0.25) / 16)
    much_deeper = ceil(2 * depth)
    assert SEGMENTS.kept(TOY, much_deeper, 1) < STORED[bits].kept(TOY, much_deeper, 1)


@pytest.mark.parametrize(("bits", "measured"), [(8, (0.350, 0.340, 0.335)), (4, (0.226, 0.216, 0.213))])
def test_what_converted_models_held(bits, measured):
    # bench/results/models/table.md, twelve layers, of own: in float32, so a companion is one state.
    of_float32_inputs = STORED[bits].kept(TOY, 12, 1) / (12 * 4 * TOY.width)
    assert of_float32_inputs == pytest.approx((12 * (bits + 0.25) / 32 + 1) / 12)
    assert measured == pytest.approx([of_float32_inputs] * 3, rel=0.05)


def test_times_by_products():
    assert [method.time for method in (PLAIN, CHECKPOINT, STORED[4], REBUILD, NESTED)] == pytest.approx(
        [1, 4 / 3, 4 / 3, 5 / 3, 5 / 3]
    )


def test_parameters_of_each_plan():
    million = replace(TOY, layers=8, layer_parameters=10**6)
    total = 8e6
    assert parameter_bytes(Plan("", 8), million, GIVEN) == (2 * total, 2 * total, 12 * total)
    assert sum(parameter_bytes(Plan("", 8, shards="all"), million, GIVEN)) == 16 * total / 8
    assert sum(parameter_bytes(Plan("", 2, tensor=4, shards="all"), million, GIVEN)) == 16 * total / 8
    stage = total / 4
    expected = (2 * stage, 2 * stage, 12 * stage / 2)
    assert parameter_bytes(Plan("", 2, pipeline=4, shards="optimizer"), million, GIVEN) == expected
    gathered = 2 * 2e6 + 2e6
    assert fixed_bytes(Plan("", 8, shards="all"), million, GIVEN) == 16 * total / 8 + gathered
    assert [plan.gpus for gpus in (8, 64, 1024) for plan in plans(gpus)] == [8] * 4 + [64] * 4 + [1024] * 5


def test_the_largest_microbatch_fills_the_memory():
    for plan in plans(1024):
        for method in METHODS:
            units = largest_units(plan, DECODER_7B, method, GIVEN)
            unit = kept_bytes(plan, DECODER_7B, method) + at_work(plan, DECODER_7B, method)
            free = 80e9 - fixed_bytes(plan, DECODER_7B, GIVEN)
            assert units == 0 if free < 0 else units * unit <= free < (units + 1) * unit


def test_the_largest_microbatch_of_a_7b_decoder():
    # FSDP2 on 8: 16 bytes a parameter over 8, two layers and a gradient, logits; 32 inputs and a layer at work.
    fixed = 16 * 6_738_149_376 / 8 + 6 * 202_375_168 + 4096 * 32000 * 6
    token = 32 * 8192 + 131_584 + 2 * (2 * 4096 + 2 * 11008)
    assert largest_units(plans(8)[1], DECODER_7B, CHECKPOINT, GIVEN) == (80e9 - fixed) // token


def test_rates_of_groups():
    assert rate(8, 1, GIVEN) == 450e9  # a node
    assert rate(16, 1, GIVEN) == 400e9  # eight cards of each node
    assert rate(16, 8, GIVEN) == 50e9  # one of each
    assert rate(4, 2, GIVEN) == 450e9
    assert rate(1, 8, GIVEN) == 450e9


def test_links():
    million = replace(TOY, layers=8, layer_parameters=10**6)
    ring = 7 / 8 * 2 * 8e6 / 450e9
    ddp, fsdp, tensor, pipeline = plans(8)
    assert links(ddp, million, PLAIN, GIVEN).total == pytest.approx(2 * ring)
    assert links(fsdp, million, PLAIN, GIVEN).total == pytest.approx(3 * ring)
    assert links(fsdp, million, STORED[4], GIVEN) == links(fsdp, million, PLAIN, GIVEN)
    assert links(fsdp, million, NESTED, GIVEN).total == pytest.approx(4 * ring)
    # A gather and a scatter a layer and pass; checkpointing has three passes for plain's two, rebuilding four.
    once = 8 * 2 * 20 * 100 * 7 / 8 / 450e9
    passes = [links(tensor, million, method, GIVEN).layers / once for method in (PLAIN, CHECKPOINT, STORED[2], REBUILD)]
    assert passes == pytest.approx([2, 3, 3, 4])
    assert links(pipeline, million, PLAIN, GIVEN).stages == pytest.approx(32 * 2 * 100 * 20 / 50e9)


def test_context_parallelism_sends_keys_and_values():
    shared = Plan("", 1, context=8, shards="all")
    sent = 32 * 2 * (2 * 4096) * 8192 * 7 / 8
    assert links(shared, DECODER_7B, PLAIN, GIVEN).layers == pytest.approx(3 * sent / 450e9)
    assert links(shared, DECODER_7B, CHECKPOINT, GIVEN).layers == pytest.approx(4 * sent / 450e9)


def test_seconds_of_a_step():
    ddp = plans(8)[0]
    forward = 8192 * (32 * DECODER_7B.layer_flops + 2 * 32000 * 4096) / 395.6e12
    assert 8192 * forward_seconds(ddp, DECODER_7B, GIVEN) == pytest.approx(forward)
    assert gpu_seconds(ddp, DECODER_7B, PLAIN, GIVEN) == pytest.approx(3 * forward)
    assert gpu_seconds(ddp, DECODER_7B, OFFLOAD, GIVEN) == pytest.approx(4 * forward)  # nothing waits for the host
    moved = 8192 * 32 * 4096 * (20 + 2 * 4.25 / 8) / 3e12
    assert gpu_seconds(ddp, DECODER_7B, STORED[4], GIVEN) == pytest.approx(4 * forward + moved)


def test_narrow_layers_take_as_long_as_their_memory():
    ddp = plans(8)[0]
    forward = 2**18 * 256 * 2 * 640 / 3e12
    assert gpu_seconds(ddp, NARROW, PLAIN, GIVEN) == pytest.approx(3 * forward)
    copied = 2**18 * 256 * 128 / 50e9
    assert gpu_seconds(ddp, NARROW, OFFLOAD, GIVEN) == pytest.approx(copied + copied)  # each way longer than computing


def test_links_hide_or_do_not():
    pipeline = plans(8)[3]
    computed = gpu_seconds(pipeline, DECODER_7B, PLAIN, GIVEN)
    used = links(pipeline, DECODER_7B, PLAIN, GIVEN).total
    bubble = 1 + 7 / 32
    assert step_seconds(pipeline, DECODER_7B, PLAIN, GIVEN) == pytest.approx(
        (computed * bubble, (computed + used) * bubble)
    )


def test_rates_to_the_host():
    by_name = {one.name: one for one in OFFLOADED}
    resnet = by_name["ResNet-50, an image"]
    assert resnet.state_bytes == 2 * 56**2 * (3 * 256 + 4 * 512 / 4 + 6 * 1024 / 16 + 3 * 2048 / 64)
    # A rate and the speed of products at which it comes out.
    assert 46e9 / resnet.state_bytes * 8.2e9 == pytest.approx(34e12, rel=0.01)
    narrow = by_name[NARROW.name]
    assert narrow.state_bytes / narrow.flops == 128 / 32768
    assert "586 at 150 TFLOP/s" in all_tables([NARROW])["offloading"]


def test_numbers_as_they_are_shown():
    shown = [short(value) for value in (0.5794, 123.4, 999.4, 999.6, 8192, 1e6, 405.8e9)]
    assert shown == ["0.579", "123", "999", "1k", "8.19k", "1M", "406G"]


def test_the_page_has_the_tables_that_are_printed():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, all_tables()) == page, "python -m bench.scale --write"


def test_pages_without_a_place_for_each_table():
    with pytest.raises(ValueError, match=r"^places for none; needed: gains, shapes"):
        with_tables("no place", all_tables())


def test_the_command_prints_tables_of_other_assumptions(capsys):
    assert main(["--only", "narrow", "--utilisation", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "at 494 TFLOP/s" in printed
    assert "| narrow MLP | DDP, 1,024 |" in printed
    assert "405B, 128k | data" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--utilisation", "1.5"], "utilisation must be a share of the peak, at most 1, got 1.5"),
        (["--memory-bytes", "-1"], "memory_bytes must be a number above 0, got -1"),
        (["--pcie-rate", "nan"], "pcie_rate must be a number above 0, got nan"),
        (["--hbm-rate", "inf"], "hbm_rate must be a number above 0, got inf"),
        (["--only", "GPT"], "--only must name a network, got GPT; there are: ResNet-1000 stage; "),
        (["--write", "--only", "7B"], "--write takes all networks and the defaults"),
        (["--write", "--utilisation", "0.5"], "--write takes all networks and the defaults"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense(arguments, message):
    before = PAGE.read_text(encoding="utf-8")
    with pytest.raises(CommandError, match=f"^bench.scale: {message}"):
        main(arguments)
    assert PAGE.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("arguments", [["--node-gpus", "1e3"], ["--peak-flops", "many"], ["--batch", "3"]])
def test_options_that_are_none(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "python -m bench.scale: error: " in capsys.readouterr().err


def test_a_wrong_option_is_a_line():
    command = [sys.executable, "-m", "bench.scale", "--utilisation", "2"]
    done = subprocess.run(command, cwd=PAGE.parents[1], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "bench.scale: utilisation must be a share of the peak, at most 1, got 2\n"


def test_a_page_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.scale.__main__.PAGE", tmp_path / "scale.md")
    with pytest.raises(CommandError, match=r"^bench.scale: the page must be .*scale\.md: No such file"):
        main(["--write"])


def test_every_network_of_perceptrons_saves_what_its_layers_read():
    assert perceptrons("", (1, 64, 128), 1, norm=False).inner_values == 64 + 2 * 128
    assert perceptrons("", (1, 64, 128), 1, norm=True).inner_values == 2 * 64 + 2 * 128
    assert len({network.name for network in NETWORKS}) == len(NETWORKS)
