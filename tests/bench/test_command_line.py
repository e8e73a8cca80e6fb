"""Command lines that are used wrongly, or whose reader goes away: a line that says so, and no traceback."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import options, smoke, tiles, timings
from bench.command_line import CLOSED_PIPE, WRONG_USE, CommandError, end_with, integer, needing, writable_folder

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def a_file(tmp_path):
    (tmp_path / "file").write_text("no JSON")
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--output", "{}"], "bench: --output must be a folder that can be written to, got {}: File exists"),
        (["bench", "--output", "{}/in"], "bench: --output must be a folder that can be written to, got {}/in: Not a d"),
        (["bench.smoke", "--device", "cpu", "--output", "{}/in"], "bench.smoke: --output must be a file that can be"),
        (["bench.smoke", "--device", "cpu", "--output", "{}/.."], "bench.smoke: --output must be a file that can be"),
        (["bench.smoke", "--failed", "{}"], "bench.smoke: --failed must be a file that --output wrote, got {}: JSOND"),
        (["bench.tiles", "--write", "{}"], "bench.tiles: --write must be a tiles.json of this command, got {}: JSOND"),
        (["bench.timings", "{}"], "bench.timings: RESULTS must be a results.json of python -m bench, got {}: JSONDec"),
        (["bench.timings", "{}.json"], "bench.timings: RESULTS must be a results.json .*, got {}.json: No such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_files_that_cannot_be_used(a_file, arguments, message):
    done = run(*(argument.format(a_file) for argument in arguments))
    assert done.returncode == WRONG_USE
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    start, _, rest = message.format(a_file).partition(".*")
    assert line.startswith(start)
    assert rest in line
    assert a_file.read_text() == "no JSON"


@pytest.mark.parametrize("content", ["[]", "{}", '[{"case": 3}]', '{"rows": [{}]}', '{"rows": 7}', "7"])
def test_files_with_other_contents(tmp_path, content):
    (tmp_path / "given.json").write_text(content)
    given = str(tmp_path / "given.json")
    with pytest.raises(CommandError, match=r"^bench\.timings: RESULTS must be a results\.json .*given\.json: \w+Error"):
        timings.main([given])
    if content != '{"rows": []}':
        with pytest.raises(CommandError, match=r"^bench\.tiles: --write must be a tiles\.json .*given\.json: \w+Error"):
            tiles.main(["--write", given])
    if content not in ("[]", "{}"):
        with pytest.raises(CommandError, match=r"^bench\.smoke: --failed must be a file .*given\.json: \w+Error"):
            smoke.main(["--failed", given])


def test_tables_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "SOURCE", tmp_path / "missing" / "tiles.py")
    (tmp_path / "tiles.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(CommandError, match=r"the table must be a file that can be written, got .*tiles\.py: No such"):
        tiles.main(["--write", str(tmp_path / "tiles.json")])


@pytest.mark.parametrize("option", ["--epochs", "--depths", "--rounds", "--seed", "--threads"])
@pytest.mark.parametrize("number", ["-1", "1e3", "2.5", "many", "9" * 30, "9" * 5000, ""])
def test_absurd_numbers_are_refused(option, number, capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse([f"{option}={number}"])
    assert f"argument {option}: must be an integer from " in capsys.readouterr().err.splitlines()[-1]


def test_numbers_at_the_limits():
    parse = integer(1, 10)
    assert [parse("1"), parse("10")] == [1, 10]
    for text in ("0", "11"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 to 10, got {text}"):
            parse(text)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [("resode_cuda",), ("resode_cuda", "--help"), ("bench", "--help"), ("bench.smoke", "--list")], ids=str
)
def test_a_reader_that_has_gone_is_no_error(arguments, unbuffered):
    command, environment = [sys.executable, "-m", *arguments], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert errors == ""
    # argparse passes over what it cannot write.
    assert process.returncode in (-signal.SIGPIPE, CLOSED_PIPE) or "--help" in arguments


def test_another_broken_pipe_is_an_error(monkeypatch, tmp_path):
    def main():
        raise BrokenPipeError("of a worker")

    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError, match="of a worker"):
            end_with(main)


def test_a_command_ends_with_its_status(capsys):
    for status in (0, 4):
        with pytest.raises(SystemExit) as ended:
            end_with(lambda status=status: status)
        assert ended.value.code == status

    def main():
        with needing("bench: it must be there"):
            Path("/no/such/file").read_text()

    with pytest.raises(SystemExit) as ended:
        end_with(main)
    assert ended.value.code == WRONG_USE
    assert capsys.readouterr().err == "bench: it must be there: No such file or directory\n"


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    assert list(writable_folder("bench: --output", tmp_path / "a" / "b").iterdir()) == []
