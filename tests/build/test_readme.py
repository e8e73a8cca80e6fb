"""The README's examples run as printed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.harness.foreign import define_torchvision_operators
from resode_cuda import ResidualStack

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLE, CALIBRATION, CONVERSION, PERCEPTRONS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_runs(capsys):
    assert len(EXAMPLE.splitlines()) <= 12
    assert README[: README.index(EXAMPLE)].count("\n") + len(EXAMPLE.splitlines()) <= 34
    exec(compile(EXAMPLE, "README.md", "exec"), {})
    assert re.fullmatch(r"loss \d\.\d{3}, largest defect \d\.\de-\d\d\n", capsys.readouterr().out)


def test_the_calibration_runs(capsys):
    stack, head = ResidualStack([nn.Linear(8, 8) for _ in range(6)]), nn.Linear(8, 3)
    names = {"stack": stack, "head": head, "x": torch.randn(5, 8), "labels": torch.arange(5) % 3, "nn": nn}
    exec(compile(CALIBRATION, "README.md", "exec"), names)
    assert re.search(r"^tolerance 0\.\d+: ", capsys.readouterr().out, re.MULTILINE)
    assert stack.reverse == names["plan"].chosen.reverse
    assert stack.training_state()["recalibration"]["steps"] == 500


def test_the_conversion_runs(capsys):
    define_torchvision_operators()
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=5, num_heads=2, num_classes=3)
    exec(compile(CONVERSION, "README.md", "exec"), {"model": model})
    assert re.search(r"blocks.0 to 4 +Block +5 +stored, 8 bits", capsys.readouterr().out)


def test_the_perceptrons_run(capsys):
    exec(compile(PERCEPTRONS, "README.md", "exec"), {})
    said = re.fullmatch(r"largest defect (\d\.\de-\d\d)\n", capsys.readouterr().out)
    assert float(said[1]) < 1e-4
