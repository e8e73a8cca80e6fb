"""How tests/support/cuda_host executes CUDA kernels: as a GPU does, and so that what would go wrong there shows."""

import sysconfig

import pybind11
import pytest
import torch

from tests.support.host_build import ROOT, run

NONE, READS_TOO_EARLY, OVERWRITES_TOO_EARLY, DIVERGENT_BARRIER, FORGETS_TO_WAIT = range(5)
"""Faults, numbered as in harness.h."""
BLOCK = 128


@pytest.fixture(params=[False, True], ids=["round-robin", "greedy"])
def greedy(request):
    return request.param


def block_sums(kernels, fault, greedy, blocks=3, rounds=4):
    """What the kernel makes of random values, and what it should."""
    kernels.host_schedule(greedy, True)
    values = torch.randint(-9, 9, (blocks, rounds * BLOCK)).float()  # whose sums are exact in any order
    out = torch.full((blocks, BLOCK), torch.nan)
    kernels.harness_sum(fault, values.data_ptr(), out.data_ptr(), blocks, rounds)
    return out, values.sum(1, keepdim=True).expand(blocks, BLOCK)


def test_threads_of_a_block_meet_at_barriers(kernels, greedy):
    got, expected = block_sums(kernels, NONE, greedy)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("fault", [READS_TOO_EARLY, OVERWRITES_TOO_EARLY])
def test_a_forgotten_barrier_shows(kernels, fault):
    shown = []
    for greedy in (False, True):
        got, expected = block_sums(kernels, fault, greedy)
        shown.append(not torch.equal(got, expected))
    assert any(shown)


def test_a_barrier_that_some_threads_never_reach_is_a_deadlock(kernels, greedy):
    with pytest.raises(RuntimeError, match=r"^deadlock: thread \d+ waits for others at the barrier of the block$"):
        block_sums(kernels, DIVERGENT_BARRIER, greedy)


def copied(kernels, fault, greedy, late):
    """What the copy kernel makes of random values, and what it should: each thread takes what its neighbour copied."""
    kernels.host_schedule(greedy, late)
    # Shared memory is 16-byte aligned, so must be the tensor.
    values = torch.randn(2, BLOCK, 4)
    out = torch.full_like(values, torch.nan)
    kernels.harness_copy(fault, values.data_ptr(), out.data_ptr())
    return out, values.roll(-1, 1)


@pytest.mark.parametrize("late", [False, True])
def test_asynchronous_copies_land_when_waited_for(kernels, greedy, late):
    got, expected = copied(kernels, NONE, greedy, late)
    assert torch.equal(got, expected)


def test_a_copy_that_no_thread_waits_for_shows_when_it_is_late(kernels, greedy):
    got, expected = copied(kernels, FORGETS_TO_WAIT, greedy, late=True)
    assert not torch.equal(got, expected)
    got, expected = copied(kernels, FORGETS_TO_WAIT, greedy, late=False)
    assert torch.equal(got, expected)


def test_matrix_fragments_lie_as_on_a_device(kernels, greedy):
    kernels.host_schedule(greedy, True)
    a, b = torch.randint(-9, 9, (16, 16)).float(), torch.randint(-9, 9, (16, 8)).float()
    d = torch.full((16, 8), torch.nan)
    kernels.harness_product(a.data_ptr(), b.data_ptr(), d.data_ptr())
    assert torch.equal(d, a @ b)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "why"),
    [
        (2**31, 32, 0, "must fit in 2147483647 blocks, got 2147483648"),
        (0, 32, 0, "the kernel launch failed: invalid configuration argument"),
        (1, 1025, 0, "the kernel launch failed: invalid configuration argument"),
        (1, 0, 0, "the kernel launch failed: invalid configuration argument"),
        (1, 32, 228 << 10, "233472 bytes of shared memory were refused: invalid argument"),
    ],
)
def test_what_a_device_refuses_is_refused(kernels, blocks, threads, shared, why):
    with pytest.raises(RuntimeError, match=f"^nothing: .*{why}"):
        kernels.harness_nothing(blocks, threads, shared)


def test_as_much_as_a_device_takes(kernels, greedy):
    kernels.host_schedule(greedy, True)
    kernels.harness_nothing(3, 1024, 227 << 10)


def test_bindings_need_no_cuda_compiler():
    """A C++ compiler that knows nothing of device code compiles them."""
    csrc = ROOT / "csrc"
    for source in sorted(csrc.rglob("*.cpp")):
        includes = (f"-I{folder}" for folder in (csrc, pybind11.get_include(), sysconfig.get_path("include")))
        assert "device.h" not in run("c++", "-std=c++17", "-M", *includes, source), source
