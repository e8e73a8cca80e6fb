"""`python -m resode_cuda`"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from resode_cuda import __main__, __version__, backends, library, ops
from resode_cuda.ops import BuildInfo

LIBRARY = BuildInfo(True, cuda="13.0.88", architectures=("80-real", "90"), compiler="nvcc 13, g++ 14")


def printed(capsys):
    __main__.main([])
    return capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu():
    done = subprocess.run([sys.executable, "-m", "resode_cuda"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout
    assert torch.__version__ in done.stdout
    assert "devices: torch finds no CUDA device" in done.stdout
    assert all(op in done.stdout for op in backends())
    assert done.stdout.count("kernels run on") == 0
    assert done.stdout.count("torch finds no CUDA device") == 1 + 2 * 2, (
        "once for each backend of a family, not for each op"
    )


def test_a_missing_library_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(ops, "build_info", lambda: BuildInfo(False, reason="no nvcc was found"))
    assert "compiled library: none; no nvcc was found" in printed(capsys)


def test_ops_that_differ_have_lines_of_their_own(monkeypatch, capsys):
    reasons = {"cuda": "it is Tuesday", "torch": None}
    monkeypatch.setattr(__main__, "backends", lambda device: {"a": reasons, "b": reasons, "c": {"torch": None}})
    lines = [line.strip() for line in printed(capsys).splitlines()]
    assert lines[lines.index("a, b") + 1 :][:4] == [
        "cuda       it is Tuesday",
        "torch      runs",
        "c",
        "torch      runs",
    ]


def test_a_gpu_and_its_kernels(monkeypatch, capsys):
    device = SimpleNamespace(
        name="Some GPU",
        major=9,
        minor=0,
        total_memory=80 * 2**30,
        multi_processor_count=132,
        max_threads_per_multi_processor=2048,
    )
    kernel = {
        "name": "step<float, half>",
        "threads": 256,
        "registers": 40,
        "static_shared": 8,
        "dynamic_shared": 64,
        "local": 0,
        "blocks_per_processor": 6,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(ops, "reasons", lambda device: {"torch": None})
    monkeypatch.setattr(ops, "build_info", lambda: LIBRARY)
    codes = {"activation_codes": {"relu": 0}, "norm_codes": {None: 0}}
    kernels = SimpleNamespace(kernel_attributes=lambda: [kernel], **codes)
    monkeypatch.setattr(library, "require", lambda where: kernels)
    text = printed(capsys)
    assert "cuda:1   Some GPU, compute capability 9.0, 80.0 GiB, 132 multiprocessors" in text
    assert "80-real 90" in text
    assert text.count("backends on cuda:") == 2
    row = next(line for line in text.splitlines() if line.startswith("  step<float, half>"))
    assert row.split()[-4:] == ["40", "0", "72", "75%"]


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["--help"])
    assert "backends" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_this_gpu(capsys):
    text = printed(capsys)
    assert torch.cuda.get_device_name(0) in text
    if ops.build_info().compiled:
        assert "kernels on " in text
