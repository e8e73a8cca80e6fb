"""Which backend computes an op, and why one can't."""

import sysconfig

import pytest
import torch

import resode_cuda
from resode_cuda import library, ops
from resode_cuda.ops import selection
from tests.support.op_cases import NAMES
from tests.support.storing_cases import OPS


def test_backends_tell_why_not():
    found = resode_cuda.backends()
    assert set(found) == {*NAMES, *OPS, "mlp_stack", "mlp_stack_adjoint", "mlp_stack_exact_adjoint"}
    if not torch.cuda.is_available():
        reason = "torch finds no CUDA device"
        assert found["forward_step"] == {"cuda": reason, "triton": reason, "torch": None}
        assert found["mlp_stack"] == {"triton": reason, "cuda": reason, "torch": None}
    on_cpu = resode_cuda.backends("cpu")["heun_step"]
    assert on_cpu["cuda"] == "kernels in CUDA C++ run on CUDA devices, got tensors on cpu"


def test_a_backend_that_was_asked_for_runs_or_says_why_not():
    x = torch.zeros(3)
    why = r"got 'triton'; Triton's kernels run on CUDA devices, got tensors on cpu$"
    with ops.using("triton"), pytest.raises(RuntimeError, match=why):
        torch.ops.resode.forward_step(x, x, 0.1)
    with ops.using("triton"), pytest.raises(RuntimeError, match=why):
        torch.ops.resode.store(x, *torch.ops.resode.start_companion(x), 4)
    torch.ops.resode.forward_step(x, x, 0.1)
    with pytest.raises(ValueError, match=r"^using: the backend must be one of .*, got 'numpy'$"), ops.using("numpy"):
        pass


def test_plain_torch_takes_over_with_one_notice(monkeypatch):
    monkeypatch.setattr(selection, "_reason", lambda name, device: None if name == "torch" else "it is ill")
    selection._first_choice.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"^resode_cuda: plain torch computes tensors on cuda:0; cuda: it is ill; tri"
    ):
        assert selection.select(torch.device("cuda:0")) is None
    assert selection.select(torch.device("cuda:0")) is None
    selection._first_choice.cache_clear()


@pytest.mark.parametrize("present", [True, False])
def test_why_the_library_does_not_load(monkeypatch, tmp_path, present):
    if present:
        (tmp_path / f"not_a_library{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no machine code")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "NAME", "not_a_library")
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    info = ops.build_info()
    assert not info.compiled
    if present:
        assert info.reason.startswith("not_a_library is present but does not load: ")
        assert str(tmp_path) in info.reason  # the loader's own words follow
    else:
        assert "no nvcc was found when it was installed" in info.reason
    with pytest.raises(RuntimeError, match=r"^forward_step: needs the compiled library; "):
        library.require("forward_step")
