#!/usr/bin/env bash
usage='Everything that needs a GPU, as much of it as fits into nine minutes. Three commands do all of it well:

  bench/gpu.sh tests kernels overhead
  bench/gpu.sh mlp memcheck racecheck
  bench/gpu.sh backends bench

  [RESULTS=FOLDER] bench/gpu.sh [PART...]        (FOLDER: by default bench/results/gpu; PART: by default all, in this order)

  tests      the tests marked `gpu`: every kernel on hardware against the specification
  mlp        a residual MLP as one op beside backprop of the same network, eager and compiled, and its matrix products
  backends   its backends beside each other at many sizes, and beside plain backprop where rows are few or layers wide
  memcheck   some of the tests under compute-sanitizer: no access beyond a tensor
  racecheck  and no two threads at odds over shared memory
  kernels    the bandwidth of every op and backend beside a copy of as many bytes
  overhead   what a call of an op costs
  bench      python -m bench: training modes against each other, with the time that is left

Before them, always: the machine is described, and the package built in place for its GPU alone.

Needs no network, but python3 with torch, pytest, pytest-benchmark, rich, scikit-learn, matplotlib, setuptools, pybind11,
cmake and ninja, and nvcc. FOLDER gets gpu.log with what all parts printed, table.md with all tables, and the figures of
mlp/, backends/, kernels/ and bench/, eight files in all. A part that fails does not stop the next; the exit status is 1
if any failed.'
set -uo pipefail
parts=(tests mlp backends memcheck racecheck kernels overhead bench)
for part in "$@"; do
  case " ${parts[*]} " in
    *" $part "*) ;;
    *)
      [ "$part" = --help ] || [ "$part" = -h ] || echo "gpu.sh: PART must be one of ${parts[*]}, got $part" >&2
      [ "$part" = --help ] || [ "$part" = -h ] || exit 2
      echo "$usage"
      exit
      ;;
  esac
done
[ $# -eq 0 ] || parts=("$@")

cd "$(dirname "$0")/.." || exit
RESULTS=${RESULTS:-bench/results/gpu}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
log=$RESULTS/gpu.log
: >"$log"
rm -f "$RESULTS/table.md"
export RESULTS PYTHONUNBUFFERED=1 NO_COLOR=1 COLUMNS=120
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 # python3 may be the system's
unset RESODE_SKIP_CUDA
deadline=525 # and 15 more for what does not stop at once
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
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$log.part" 2>&1
  status=$?
  cat "$log.part" >>"$log"
  case $status in
    0) result=ok ;;
    124 | 137) result="FAILED: over its $limit s" ;;
    *) result="FAILED: exit status $status" ;;
  esac
  if [ $status -ne 0 ]; then
    failed=1
    tail -n 25 "$log.part"
  fi
  rm "$log.part"
  summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$result")")
}

left_out() { # left_out NAME REASON
  printf '\n== %s: left out: %s\n' "$1" "$2" | tee -a "$log"
  summary+=("$(printf '%-12s    – s  left out: %s' "$1" "$2")")
}

sanitize() { # sanitize NAME SECONDS TOOL TESTS...
  local name=$1 limit=$2 tool=$3
  shift 3
  if ! command -v compute-sanitizer >/dev/null; then
    left_out "$name" "compute-sanitizer is not on PATH"
    return
  fi
  # Without torch's caching allocator each tensor is an allocation of its own, so that an access beyond its end is seen.
  stage "$name" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 \
    python3 -m pytest -q -ra -m gpu "$@"
}

memcheck() {
  sanitize memcheck 60 memcheck tests/ops/test_cuda_kernels.py -k "test_on_a_gpu or misaligned"
  sanitize memcheck-mlp 50 memcheck tests/fused/test_fused_gpu.py tests/fused/test_fused_cuda.py -k sanitize
}

measure() { # measure NAME SECONDS OPTIONS...: python -m bench; all tables go to one file
  local name=$1 limit=$2 folder=$RESULTS/$1
  shift 2
  rm -f "$folder/table.md"
  stage "$name" "$limit" python3 -m bench --device cuda "$@" --output "$folder"
  rm -f "$folder/gradient_error.png" # the same on every device
  [ -f "$folder/table.md" ] || return
  printf '# %s\n\n%s\n\n' "$name" "$(cat "$folder/table.md")" >>"$RESULTS/table.md"
  rm "$folder/table.md"
}

if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu=yes; else gpu=no; fi
if [ $gpu = yes ] && [ -z "${RESODE_CUDA_ARCHS:-}" ]; then
  RESODE_CUDA_ARCHS=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export RESODE_CUDA_ARCHS
fi
workers=()
if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 12 --dist worksteal); fi

# The limits of the commands above stay within what there is; a part gets what those before it have not used.
stage machine 20 bash -c 'nvidia-smi; nvcc --version; python3 -m pip list; git describe --always --dirty || true'
stage build 90 python3 -m pip install --no-build-isolation --no-deps --verbose --editable .
stage library 40 bash -c 'python3 -m resode_cuda && python3 -c "import resode_cuda.ops as o, sys; sys.exit(not o.build_info().compiled)"'
for part in "${parts[@]}"; do
  if [ $gpu = no ] && [ "$part" != overhead ]; then
    left_out "$part" "no CUDA device"
    continue
  fi
  case $part in
    tests) stage tests 200 python3 -m pytest -q -ra -m gpu --continue-on-collection-errors --durations=10 "${workers[@]}" ;;
    mlp) measure mlp 170 --only mlp ;;
    backends) measure backends 140 --only backends ;;
    memcheck) memcheck ;;
    racecheck) sanitize racecheck 60 racecheck tests/ops/test_cuda_kernels.py tests/fused/test_fused_cuda.py -k '(test_on_a_gpu and reverse) or sanitize' ;;
    kernels) measure kernels 60 --only kernels ;;
    overhead) stage overhead 60 python3 -m pytest -q bench/test_ops.py --benchmark-max-time=0.3 ;;
    bench) measure bench $deadline ;;
  esac
done

printf '\n' | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
exit $failed
