"""The paper's experiments: one quick run of all from end to end, resuming, the page, the data, and the networks."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from rich.progress import Progress

from bench.command_line import WRONG_USE
from bench.harness.tables import Target
from bench.paper import __main__ as command
from bench.paper import data, page, training
from bench.paper.experiment import EXPERIMENTS, load
from bench.paper.experiments import gradient_error, memory
from bench.paper.lab import Lab
from bench.paper.networks import Architecture
from bench.paper.options import Options, parse
from bench.paper.training import Recipe, loss_of, train
from tests.support.bench_run import run_bench

CPU = torch.device("cpu")
OFFLINE = """import socket
def refuse(*_):
    raise OSError("experiments must not reach the network")
socket.socket.connect = socket.getaddrinfo = refuse
"""
NET = Architecture(1, 10, (4,), (3,))


@pytest.fixture(scope="module")
def quick_paper(tmp_path_factory):
    """A run of all experiments without a network, and the folder that it wrote to."""
    offline, output = tmp_path_factory.mktemp("offline"), tmp_path_factory.mktemp("paper")
    (offline / "sitecustomize.py").write_text(OFFLINE)
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--output", str(output)]
    return run_bench(*arguments, module="bench.paper", PYTHONPATH=str(offline)), output


@pytest.fixture
def run_here(monkeypatch):
    """The command in this process, jobs included; its status."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.paper", "--device", "cpu", *map(str, arguments)])
        return command.main()

    return run


def strict_json(file):
    def refuse(constant):
        raise AssertionError(f"{constant} in {file.name}")

    return json.loads(file.read_text(), parse_constant=refuse)


def test_every_experiment_runs(quick_paper):
    done, output = quick_paper
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for name in EXPERIMENTS:
        record = strict_json(output / f"{name}.json")
        assert record["figures"], name
        assert record["checks"], name
        assert record["judged"] is False
        assert record["environment"]["torch"] == torch.__version__
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert record["title"] in " ".join(done.stdout.split())
    assert {file.name for file in output.iterdir() if file.suffix not in (".json", ".png")} == {page.NAME}


class Tags(HTMLParser):
    """Opening tags without an end, and all attributes that load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name == "src"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(quick_paper):
    _, output = quick_paper
    text = (output / page.NAME).read_text()
    tags = Tags(text)
    assert tags.open == []
    assert len(tags.sources) == len(EXPERIMENTS)
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert text.count("too small to be judged") == len(EXPERIMENTS)
    for name in EXPERIMENTS:
        assert page.html.escape(load(name).MUST_SHOW) in text


def test_figures_of_the_same_settings_are_not_measured_again(run_here, tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--only", "memory", "--output", tmp_path]
    assert run_here(*arguments) == 0
    before = (tmp_path / "memory.json").read_text()

    def fails(*_):
        raise RuntimeError("measured again")

    monkeypatch.setattr(memory, "measure", fails)
    assert run_here(*arguments) == 0
    assert (tmp_path / "memory.json").read_text() == before
    assert "figures of an earlier run" in " ".join(capsys.readouterr().out.split())
    assert run_here(*arguments, "--fresh") == 1
    assert "measured again" in capsys.readouterr().out
    assert run_here("--only", "memory", "--output", tmp_path) == 1  # other settings
    (tmp_path / "memory.json").write_text("half a fi")
    assert run_here(*arguments, "--only", "memory") == 1


def test_a_check_that_is_not_met_is_no_failure(run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "settings", lambda options: memory.Settings((1, 2, 3)))
    monkeypatch.setattr(memory, "checks", lambda figures: [Target("depth", math.inf, 0), Target("size", 1, 2)])
    assert run_here("--only", "memory", "--output", tmp_path) == 0
    assert "missed: depth inf" in capsys.readouterr().out
    assert re.findall(r'<li class="(\w+)">', (tmp_path / page.NAME).read_text()) == ["missed", "met"]
    assert [check["met"] for check in strict_json(tmp_path / "memory.json")["checks"]] == [False, True]


def half(number):
    """A job that fails for odd numbers, until its file is there."""
    calls.append(number)
    if number % 2:
        raise RuntimeError("odd")
    return number / 2


calls = []


def test_jobs_that_ended_are_kept_where_others_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    calls.clear()
    lab = Lab("halves", tmp_path / "kept", CPU, Progress(disable=True))
    with pytest.raises(RuntimeError, match="odd"):
        lab.results(half, [(2,), (4,), (5,)])
    assert lab.results(half, [(4,), (6,), (2,)]) == [2, 3, 1]
    assert calls == [2, 4, 5, 6]
    lab.clear()
    assert lab.results(half, [(4,)]) == [2]
    assert calls[-1] == 4


def test_help_explains_every_option_and_experiment():
    shown = " ".join(run_bench("--help", module="bench.paper").stdout.split())
    for name in Options.__dataclass_fields__:
        assert f"--{name}" in shown
    for name, what in EXPERIMENTS.items():
        assert f"{name} ({what})" in shown


@pytest.mark.parametrize("arguments", [["--quick", "--full"], ["--only", "nothing"], ["--threads", "0"], ["--seed=-1"]])
def test_options_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert "error: argument --" in capsys.readouterr().err


def test_experiments_run_in_their_own_order():
    assert parse(["--only", "memory", "linear_weights"]).only == ("linear_weights", "memory")
    assert parse([]) == Options()


@pytest.mark.parametrize("option", ["--cifar10", "--imagenet"])
def test_data_that_is_missing_is_named_and_nothing_is_measured(option, tmp_path):
    done = run_bench(option, str(tmp_path / "gone"), "--output", str(tmp_path / "out"), module="bench.paper")
    assert done.returncode == WRONG_USE
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"bench.paper: {option} ")
    assert "torchvision" in line or "nothing is downloaded" in line
    assert not (tmp_path / "out").exists()


class FakeCifar10:
    """torchvision's data set as `bench.paper.data` uses it."""

    def __init__(self, root, train, download):
        assert download is False
        if not Path(root).exists():
            raise RuntimeError("Dataset not found or corrupted.\nMore")
        self.data = numpy.full((40, 32, 32, 3), 255, dtype=numpy.uint8)
        self.targets = list(range(10)) * 4


def test_cifar10_is_read_and_never_downloaded(tmp_path, monkeypatch):
    datasets = SimpleNamespace(CIFAR10=FakeCifar10)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    with pytest.raises(
        Exception, match=r"--cifar10 must be .*nothing is downloaded: Dataset not found or corrupted\.$"
    ):
        data.Source("cifar10", str(tmp_path / "gone")).load()
    images = data.Source("cifar10", str(tmp_path)).load()
    assert (images.channels, images.classes) == (3, 10)
    batches = list(images.training(16, seed=0))
    assert [tuple(x.shape) for x, _ in batches] == [(16, 3, 32, 32)] * 2
    whitest = torch.tensor([(1 - m) / d for m, d in zip(data.CIFAR10_MEAN, data.CIFAR10_DEVIATION, strict=True)])
    torch.testing.assert_close(batches[0][0].amax((0, 2, 3)), whitest)
    assert sum(len(labels) for _, labels in images.testing(16)) == 40


@pytest.mark.parametrize("name", ["depth_sweep", "gradient_error", "untie", "ordinary_network"])
def test_full_sizes_build(name):
    options = Options(cifar10=Path("c")) if name != "ordinary_network" else Options(imagenet=Path("i"))
    settings = load(name).settings(options)
    architecture = settings.net.architecture if hasattr(settings, "net") else settings.architecture
    few = replace(
        architecture, widths=tuple(width // 8 for width in architecture.widths), steps=(1,) * len(architecture.steps)
    )
    side = 64 if architecture.classes == 1000 else 32
    assert few.build(0)(torch.randn(2, 3, side, side)).shape == (2, 1, architecture.classes)


def test_nets_side_by_side_train_as_they_would_alone():
    torch.set_default_dtype(torch.float64)
    try:
        pair, images = replace(NET, copies=2).build(0), data.Source().load()
        images = data.InMemory((images._train[0].double()[:96], images._train[1][:96]), images._test)
        alone = [NET.build(0) for _ in range(2)]
        for copy, net in enumerate(alone):
            for mine, both in zip(net.state_dict().values(), pair.state_dict().values(), strict=True):
                mine.copy_(both.chunk(2)[copy] if both.ndim else both)
        recipe = Recipe(2, 32, 0.1, (0.5,), weight_decay=1e-3, residual_rate=2.0)
        train(pair, images, recipe, seed=5)
        for copy, net in enumerate(alone):
            train(net, images, recipe, seed=5 + copy)
            for mine, both in zip(net.parameters(), pair.parameters(), strict=True):
                torch.testing.assert_close(mine, both.chunk(2)[copy], rtol=1e-9, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_loss_is_the_sum_over_nets():
    logits, labels = torch.randn(6, 2, 10), torch.randint(0, 10, (6, 2))
    each = [torch.nn.functional.cross_entropy(logits[:, copy], labels[:, copy]) for copy in range(2)]
    torch.testing.assert_close(loss_of(logits, labels), sum(each))


def test_test_errors_leave_modes_as_they_are():
    net = NET.build(0)
    net[0].eval()
    errors = training.test_errors(net, data.Source().load())
    assert len(errors) == 1
    assert 0 <= errors[0] <= 100
    assert not net[0].training
    assert net.stacks[0].training


def test_untying_keeps_the_function_and_parts_the_parameters():
    net = replace(NET, tied=True, last_norm="one").build(0).eval()
    x = torch.randn(2, 1, 8, 8)
    before, shared = net(x), len(list(net.stacks[0].parameters()))
    stack = net.untie(0)
    torch.testing.assert_close(net(x), before)
    assert len(list(stack.parameters())) == 3 * shared
    assert net[3] is net.stacks[0] is stack


def test_shallower_nets_take_the_nearest_function_before():
    stack = replace(NET, steps=(8,), last_norm="one").build(0).stacks[0]
    shallow = gradient_error.resampled(stack, 2)
    assert shallow.steps == (0.5, 0.5)
    for mine, place in zip(shallow, (0, 4), strict=True):
        torch.testing.assert_close(mine.state_dict(), stack[place].state_dict())
    assert len(gradient_error.resampled(stack, 16)) == 16


def test_rates_fall_as_the_recipe_says():
    stepped = Recipe(9, 1, 1.0, (1 / 3, 2 / 3))
    assert [stepped.rate_in(epoch) for epoch in (0, 2, 3, 8)] == pytest.approx([1, 1, 0.1, 0.01])
    assert Recipe(4, 1, 1.0, cosine=True).rate_in(2) == pytest.approx(0.5)
