"""bench/gpu.sh and bench/build.sh, rehearsed with programs that stand in for Python, the compiler and a GPU."""

import gzip
import os
import re
import subprocess

import pytest

from bench.harness.failed_kernels import ONE_PASS_FAMILY
from tests.support import kernel_families
from tests.support.bench_run import ROOT

PARTS = ["tests", "offsets", "mlp", "backends", "tiles", "kernels", "overhead", "bench", "memcheck", "racecheck"]
PYTHON = """#!/usr/bin/env bash
echo "python3 $* [$FAILED_KERNELS]" >>"$CALLS"
[ -z "$BROKEN" ] || case "$*" in *$BROKEN*) exit 1 ;; esac
case "$*" in
  *cuda.is_available*) exit $NO_GPU ;;
  *mem_get_info*) exit $NO_MEMORY ;;
  *get_device_capability*) echo 90 ;;
  *sysconfig*) echo "$PWD" ;;
  *sys.executable*) echo /some/python3 ;;
  *--cmakedir*) echo /some/pybind11 ;;
  *"bench.smoke --failed"*) echo "$FAILED" ;;
  *"-m bench "*)
    mkdir -p "${@: -1}"
    echo "a table" >"${@: -1}/table.md"
    echo picture >"${@: -1}/gradient_error.png"
    ;;
esac
"""
OTHER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
if [ "$(basename "$0")" = compute-sanitizer ]; then
  shift 6
  "$@"
fi
"""


@pytest.fixture
def rehearse(tmp_path):
    """Runs a script of bench/ with stand-ins, and returns its process and the commands that it gave."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python3", "nvidia-smi", "nvcc", "cmake", "compute-sanitizer"):
        program = programs / name
        program.write_text(PYTHON if name == "python3" else OTHER)
        program.chmod(0o755)

    def run(script, *parts, **settings):
        calls = tmp_path / "calls"
        calls.write_text("")
        defaults = {"NO_GPU": "0", "NO_MEMORY": "0", "BROKEN": "", "FAILED": ""}
        environment = {**os.environ, **defaults, **settings, "CALLS": str(calls), "RESULTS": str(tmp_path / "results")}
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        for name in ("RESODE_CUDA_ARCHS", "FAILED_KERNELS"):
            environment.pop(name, None)
        done = subprocess.run(
            [ROOT / "bench" / script, *parts], env=environment, capture_output=True, text=True, timeout=60
        )
        return done, calls.read_text().splitlines()

    return run


def summary(done):
    """What became of each part."""
    return dict(line.split(maxsplit=1) for line in done.stdout.rpartition("\n\n")[2].splitlines())


def test_help_names_each_part_and_calls_that_run_them_all(rehearse):
    done, calls = rehearse("gpu.sh", "--help")
    assert done.returncode == 0
    assert calls == []
    assert re.findall(r"^  (\w+) {2,}\S", done.stdout, re.MULTILINE) == PARTS
    named = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  bench/gpu.sh ")]
    assert sorted(part for parts in named for part in parts) == sorted(PARTS)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_an_unknown_part_is_refused(rehearse):
    done, calls = rehearse("gpu.sh", "tests", "nothing")
    assert done.returncode == 2
    assert "PART must be one of tests offsets" in done.stderr
    assert calls == []


def test_every_part_runs_on_a_gpu(rehearse, tmp_path):
    done, calls = rehearse("gpu.sh")
    assert done.returncode == 0, done.stdout
    assert list(summary(done)) == ["machine", "build", "library", "smoke", *PARTS[:-1], "memcheck-mlp", "racecheck"]
    assert all(" ok" in outcome for outcome in summary(done).values())
    (tests,) = (call for call in calls if "--durations" in call)
    for option in ("-m gpu", "-W default", "--tb=short", "--maxfail=60", "-k not offsets_beyond_32_bits", "-n 12"):
        assert option in tests
    assert "--timeout=90 --timeout-method=thread" in tests
    (offsets,) = (call for call in calls if "-k offsets_beyond_32_bits" in call)
    assert "-n 12" not in offsets
    results = tmp_path / "results"
    assert sorted(path.name for path in results.iterdir() if path.is_file()) == ["gpu.log.gz", "table.md"]
    assert (results / "table.md").read_text().count("a table") == 4
    assert not list(results.glob("*/*.png"))
    assert "== racecheck: env" in gzip.decompress((results / "gpu.log.gz").read_bytes()).decode()


def test_what_needs_kernels_that_failed_is_left_out(rehearse):
    done, calls = rehearse("gpu.sh", FAILED="fused-triton pointwise-cuda")
    outcomes = summary(done)
    assert outcomes["backends"].endswith("left out: failed the smoke test: fused-triton")
    assert outcomes["kernels"].endswith("left out: failed the smoke test: pointwise-cuda")
    assert {part for part, outcome in outcomes.items() if "left out" in outcome} == {
        *("mlp", "backends", "tiles", "kernels", "overhead", "bench")
    }
    (tests,) = (call for call in calls if "--durations" in call)
    assert tests.endswith("[fused-triton pointwise-cuda]")
    checks = [call for call in calls if "--tb=short" in call and "--maxfail" not in call and call.startswith("python3")]
    assert len(checks) == 3
    assert all(call.endswith("[]") for call in checks)  # they are to tell why the kernels fail


def test_one_pass_alone_leaves_no_part_out_but_is_told_to_each(rehearse):
    done, calls = rehearse("gpu.sh", "mlp", "backends", "tiles", FAILED=ONE_PASS_FAMILY)
    assert all(outcome.endswith(" ok") for outcome in summary(done).values())
    parts = [call for call in calls if "-m bench " in call or call.startswith("python3 -m bench.tiles")]
    assert len(parts) == 3
    assert all(call.endswith(f"[{ONE_PASS_FAMILY}]") for call in parts)


def test_offsets_are_left_out_where_memory_is_short(rehearse):
    done, _ = rehearse("gpu.sh", "offsets", NO_MEMORY="1")
    assert done.returncode == 0
    assert "left out: needs 36 GB of free device memory" in summary(done)["offsets"]


def test_without_a_gpu_every_part_says_so(rehearse):
    done, calls = rehearse("gpu.sh", NO_GPU="1")
    outcomes = summary(done)
    left_out = {part for part, outcome in outcomes.items() if outcome.endswith("left out: no CUDA device")}
    assert left_out == set(PARTS) - {"overhead"}
    assert any("bench.smoke --device cpu" in call for call in calls)
    assert done.returncode == 0


def test_what_fails_does_not_stop_what_comes_next(rehearse):
    done, _ = rehearse("gpu.sh", "tests", "kernels", BROKEN="-m pytest")
    assert done.returncode == 1
    assert summary(done)["tests"].endswith("FAILED: exit status 1")
    assert summary(done)["kernels"].endswith(" ok")


def test_the_tests_that_it_names_are_there():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    named = set(re.findall(r"tests/\S+\.py", script))
    assert named
    assert all("test_on_a_gpu" in text or "test_sanitize" in text for text in map(read, named))
    with_offsets = [path for path in kernel_families.FAMILIES if "offsets_beyond_32_bits" in read(path)]
    assert len(with_offsets) == 4


def read(path):
    return (ROOT / path).read_text()


def test_the_library_is_built_by_cmake_where_pip_fails(rehearse):
    done, calls = rehearse("build.sh", BROKEN="pip install")
    assert done.returncode == 0
    configure, build = (call for call in calls if call.startswith("cmake"))
    assert f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT}/resode_cuda" in configure
    assert "-DPython_EXECUTABLE=/some/python3 -Dpybind11_DIR=/some/pybind11" in configure
    assert build == "cmake --build build/kernels"
    done, calls = rehearse("build.sh")
    assert done.returncode == 0
    assert not any(call.startswith("cmake") for call in calls)
