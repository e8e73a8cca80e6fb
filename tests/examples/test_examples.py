"""Each example runs in its quick size, and its table says what the example is there to show."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SECONDS = 120


def run(name, *flags, launcher=(), **environment):
    return subprocess.run(
        [sys.executable, *launcher, EXAMPLES / f"{name}.py", "--quick", "--threads", "1", *flags],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )


@functools.cache
def quick(name):
    """What an example prints; it runs once for all tests of a process."""
    done = run(name)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(text):
    """The table that has a column of memory: rows by name, numbers by column."""
    lines = text.splitlines()
    head = next(n for n, line in enumerate(lines) if "MiB held" in line)
    columns = re.split(r"  +", lines[head].strip())
    cells = [re.split(r"  +", line) for line in lines[head + 1 :]]
    return {
        name: {column: float(value) for column, value in zip(columns, values, strict=True) if value[0].isdigit()}
        for name, *values in cells
        if len(values) == len(columns)
    }


def test_gpt_text_stores_less_and_learns_the_same(tmp_path):
    picture = tmp_path / "losses.png"
    done = run("gpt_text", "--figure", str(picture))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    rows = rows_of(text)
    assert text.count("as a stack") == 3
    for way in ("8 bits", "4 bits"):
        assert rows[way]["held-out loss"] == pytest.approx(rows["plain"]["held-out loss"], abs=0.02)
    held = [rows[way]["MiB held"] for way in ("nothing stored", "4 bits", "8 bits", "plain")]
    assert held == sorted(set(held))
    assert held[-2] < held[-1] / 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "network", "column", "share"),
    [
        ("finetune_vision", "ConvNeXt, ", "last loss", 0.3),
        ("finetune_vision", "ResNet, ", "last loss", 0.6),
        ("hf_trainer", "", "held-out loss", 0.2),
        ("lora", "LoRA, ", "held-out loss", 0.2),
    ],
)
def test_converted_models_hold_less_and_learn_the_same(name, network, column, share):
    text = quick(name)
    plain, converted = (rows_of(text)[network + way] for way in ("plain", "converted"))
    assert "as a stack" in text
    assert "layer by layer" not in text
    assert converted["MiB held"] < share * plain["MiB held"]
    assert converted[column] == pytest.approx(plain[column], abs=0.02)


def test_what_the_trainer_saves_is_an_ordinary_checkpoint():
    assert re.findall(r"^(?:plain|converted) .* (yes|no) ", quick("hf_trainer"), re.MULTILINE) == ["yes", "yes"]


def test_merged_adapters_do_what_they_did():
    rows = rows_of(quick("lora"))
    for way in ("LoRA, plain", "LoRA, converted"):
        assert rows[way]["merged"] == pytest.approx(rows[way]["held-out loss"], abs=0.002)


def test_spiral_has_the_gradient_of_the_network():
    rows = rows_of(quick("spiral"))
    errors = {name: row["gradient error"] for name, row in rows.items()}
    assert errors["one block, extrapolated"] < errors["one block, corrected"] < errors["one block, odeint_adjoint"] / 5
    assert errors["one block, plain"] == errors["N blocks, plain"] == 0
    assert errors["N blocks, corrected"] < 0.01
    evaluations = [rows[f"one block, {way}"]["evaluations"] for way in ("plain", "extrapolated", "corrected")]
    assert [count // 16 for count in evaluations] == [1, 2, 3]
    for blocks in ("one block", "N blocks"):
        held = {way: rows[f"{blocks}, {way}"]["MiB held"] for way in ("plain", "corrected", "extrapolated")}
        assert max(held["corrected"], held["extrapolated"]) < held["plain"] / 10
        assert rows[f"{blocks}, corrected"]["error"] == pytest.approx(rows[f"{blocks}, plain"]["error"], abs=0.01)


def on_two_processes(*flags):
    """The table of the example that is started by torchrun."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    done = run("distributed", "--plain", *flags, launcher=launcher, GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr
    return rows_of(done.stdout)


def test_distributed_divides_weights_and_goes_on_where_it_stopped(tmp_path):
    folder = "--resume", str(tmp_path)
    on_two_processes(*folder, "--steps", "4")
    sharded, replicated = on_two_processes(*folder), on_two_processes("--parallel", "ddp")
    for way in ("plain", "stack"):
        of_each = sharded[f"{way}, fsdp"], replicated[f"{way}, ddp"]
        assert [row["from step"] for row in of_each] == [4, 0]
        assert of_each[0]["last loss"] == pytest.approx(of_each[1]["last loss"], abs=2e-4)
        assert of_each[0]["MiB of weights"] == pytest.approx(of_each[1]["MiB of weights"] / 2, abs=0.02)
    for rows, parallel in ((sharded, "fsdp"), (replicated, "ddp")):
        plain, stack = rows[f"plain, {parallel}"], rows[f"stack, {parallel}"]
        assert stack["last loss"] == pytest.approx(plain["last loss"], abs=0.02)
        assert stack["MiB held"] < 0.15 * plain["MiB held"]


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\")\n")
    done = run("lora", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    assert "peft" in done.stderr
    assert 'pip install "resode_cuda[models]"' in done.stderr
    assert "Traceback" not in done.stderr
