#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within ten minutes: build, test, check memory accesses, measure.
#
#   RESULTS=some/folder bench/gpu.sh        (default: bench/results/gpu)
#
# No network. Needs python3 with torch, pytest, pytest-benchmark, cmake, ninja, pybind11 and setuptools, and nvcc.
# Each stage writes $RESULTS/<stage>.log; a stage that fails does not stop the next; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
RESULTS=${RESULTS:-bench/results/gpu}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
export RESULTS PYTHONUNBUFFERED=1
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 # python3 may be the system's, and there is no network
unset RESODE_SKIP_CUDA
deadline=590
summary=()
failed=0

stage() { # stage NAME SECONDS COMMAND...: at most so many seconds, and none beyond the deadline
  local name=$1 limit=$2 begin=$SECONDS status result
  shift 2
  ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
  if ((limit <= 0)); then
    failed=1
    left_out "$name" "FAILED: no time left"
    return
  fi
  echo "== $name: $*"
  timeout --kill-after=5 "$limit" "$@" >"$RESULTS/$name.log" 2>&1
  status=$?
  case $status in
    0) result=ok ;;
    124 | 137) result="FAILED: over its $limit s" ;;
    *) result="FAILED: exit status $status" ;;
  esac
  if [ $status -ne 0 ]; then
    failed=1
    tail -n 15 "$RESULTS/$name.log"
  fi
  summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$result")")
}

left_out() { # left_out NAME REASON
  echo "== $1: left out: $2"
  summary+=("$(printf '%-12s    – s  left out: %s' "$1" "$2")")
}

if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu=yes; else gpu=no; fi
if [ $gpu = yes ] && [ -z "${RESODE_CUDA_ARCHS:-}" ]; then # this GPU's code alone
  RESODE_CUDA_ARCHS=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export RESODE_CUDA_ARCHS
fi

workers=()
if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi

stage machine 30 bash -c 'nvidia-smi; nvcc --version; cmake --version; python3 -VV; python3 -m pip list; git describe --always --dirty || true'
stage build 150 python3 -m pip install --no-build-isolation --no-deps --verbose --editable .
stage library 60 python3 -c 'from resode_cuda.ops import build_info as b; print(b()); raise SystemExit(not b().compiled)'
stage tests 240 python3 -m pytest -q -ra --durations=10 "${workers[@]}"
if [ $gpu = no ]; then
  left_out memcheck "no CUDA device"
elif ! command -v compute-sanitizer >/dev/null; then
  left_out memcheck "compute-sanitizer is not on PATH"
else
  # Without torch's caching allocator each tensor is an allocation of its own, so that an access beyond its end is seen.
  stage memcheck 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
    python3 -m pytest -q -ra tests/test_ops.py -m gpu -k 'layouts or every_16_bit or (matches and 2049)'
fi
stage overhead 90 python3 -m pytest -q bench/test_ops.py --benchmark-json="$RESULTS/overhead.json" --benchmark-max-time=0.3
if [ $gpu = no ]; then
  left_out bench "no CUDA device"
else
  stage bench $deadline python3 -m bench --device cuda --output "$RESULTS/bench"
fi

printf '%s\n' "${summary[@]}" | tee "$RESULTS/summary.txt"
exit $failed
