"""CONTRIBUTING's lists of files, held against the code: what must be touched to add an activation, a scheme, an op."""

import io
import re
import tokenize
from pathlib import Path

import pytest
import torch
from torch import nn

from resode_cuda import ResidualMLP
from resode_cuda.fused.activations import ACTIVATIONS
from resode_cuda.fused.norms import NORMS
from resode_cuda.fused.triton import arguments
from resode_cuda.perceptron import Perceptron

ROOT = Path(__file__).parents[2]


def listed(heading):
    """The files that a section names, one at the beginning of each item."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^- `([^`]+)`", section, re.MULTILINE))


def code_of(path):
    """Without comments; in Python without docstrings, too, unless they are asked for."""
    text = path.read_text()
    if path.suffix != ".py":
        return re.sub(r"//.*", "", text)
    kept, last = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        starts_line = last in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if token.type != tokenize.COMMENT and not (token.type == tokenize.STRING and starts_line):
            kept.append(token.string)
        last = token.type if token.type != tokenize.COMMENT else last
    return " ".join(kept)


def mentioning(pattern, *folders, text_of=code_of):
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cu", ".cpp") and re.search(pattern, text_of(path))
    }


def test_every_file_is_there():
    for heading in ("Adding an activation", "Adding a scheme", "Adding a pointwise op"):
        assert len(listed(heading)) > 5
        assert [name for name in sorted(listed(heading)) if not (ROOT / name).exists()] == []


def test_an_activation_is_in_every_file_of_its_list_and_in_no_other():
    assert mentioning("gelu_tanh|GeluTanh", "resode_cuda", "csrc", text_of=Path.read_text) == listed(
        "Adding an activation"
    )


def test_a_scheme_is_in_every_file_of_its_list_and_in_no_other():
    formulas = mentioning(r"is_heun|\bHeun\b|\"heun\"", "resode_cuda/fused", "csrc/mlp")
    documented = mentioning(r"\"euler\".*\"heun\"", "resode_cuda", text_of=Path.read_text)
    assert formulas | documented | {"resode_cuda/schemes.py"} == listed("Adding a scheme")


def test_an_op_is_in_every_file_of_its_list():
    found = mentioning(
        "reverse_extrapolate_|ReverseExtrapolate|REVERSE_EXTRAPOLATE",
        "resode_cuda/ops",
        "csrc",
        "tests/support",
        "bench",
    ) | {"tests/budgets/pointwise.json"}
    # Its formula rides on a kernel of another name, and the two classes of ops know no op by name.
    assert found - listed("Adding a pointwise op") <= {"resode_cuda/ops/pointwise.py"}
    kernels = {"resode_cuda/ops/triton_kernels.py", "csrc/pointwise/reverse_update.cu"}
    assert listed("Adding a pointwise op") - found <= kernels


def names_in(path, table):
    declared = re.search(rf"{table}\[\] = {{(.*?)}}", (ROOT / path).read_text())[1]
    return [None if name == "nullptr" else name.strip('"') for name in re.split(r",\s*", declared)]


def test_every_table_has_every_activation_and_norm():
    assert tuple(ACTIVATIONS) == arguments.ACTIVATIONS == tuple(names_in("csrc/mlp/network.h", "kActivationNames"))
    assert NORMS == arguments.NORMS == tuple(names_in("csrc/mlp/network.h", "kNormNames"))
    kernel = (ROOT / "resode_cuda/fused/triton/layer.py").read_text()
    assert set(re.findall(r'CONFIG\.activation == "(\w+)"', kernel)) == set(ACTIVATIONS)
    codes = re.search(r"enum class Activation : int {(.*?)}", (ROOT / "csrc/mlp/network.h").read_text())[1]
    cases = (ROOT / "csrc/mlp/activation.h").read_text()
    for code in re.findall(r"k\w+", codes):
        assert len(re.findall(rf"Activation::{code}\b", cases)) >= 2, code


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_with_it_is_read_back(activation):
    mlp = ResidualMLP(4, 6, 2, activation=activation)
    assert Perceptron.of(0, mlp.to_blocks()[0]).activation == activation
    assert isinstance(ACTIVATIONS[activation].module(), nn.Module)
    assert not ACTIVATIONS[activation].module()(torch.zeros(3)).any()
