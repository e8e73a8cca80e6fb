#!/usr/bin/env bash
usage='Everything that needs a GPU, in parts, of which a call takes as many as fit into nine minutes:

  [RESULTS=FOLDER] bench/gpu.sh [PART...]        (default: bench/results/gpu, and all parts in this order)

  tests      the tests marked `gpu`: every kernel on hardware against the specification; at most 200 s. What has run
             goes to evidence.jsonl, which `python -m tests.support.evidence --write` takes
  offsets    those of offsets beyond 32 bits, one by one: they need 36 GB of free device memory; 60 s
  mlp        a residual MLP as one op beside backprop of the same network, eager and compiled, and beside its matrix
             products; 170 s
  backends   its backends beside each other at many sizes, and beside plain backprop where rows are few or layers
             wide; 140 s
  tiles      tiles of Triton'"'"'s kernels for residual MLPs beside each other; 150 s
  kernels    the bandwidth of every pointwise op and backend beside a copy of as many bytes; 60 s
  overhead   what a call of an op costs; 60 s
  bench      python -m bench: training modes against each other, with the time that is left
  memcheck   some of the tests under compute-sanitizer: no access beyond a tensor; 110 s
  racecheck  and no two threads at odds over shared memory; 60 s

Four calls run everything, each within nine minutes on a GPU with 40 GB of free memory:

  bench/gpu.sh tests tiles
  bench/gpu.sh mlp backends
  bench/gpu.sh offsets memcheck racecheck kernels overhead
  bench/gpu.sh bench

The first two are worth most: what is wrong, and which tiles are fastest. docs/kernels.md has what they are predicted
to give.

Before the parts, always: the machine is described, the package is built in place for its GPU alone (by pip, and where
that fails by CMake), and each kernel runs once on a few rows in a process of its own. A kernel that ends its process,
or does not end, is named, and what needs its family is left out, but for memcheck and racecheck, which are to tell
why. All this takes two to three minutes.

Needs no network, but python3 with torch, pytest, pytest-benchmark, rich, scikit-learn, matplotlib, setuptools,
pybind11, cmake and ninja, and nvcc; uses pytest-xdist and pytest-timeout where they are installed. FOLDER gets
gpu.log.gz with what all parts printed, smoke.json with what became of each kernel, table.md with all tables,
evidence.jsonl, tiles.json, and the figures of mlp/, backends/, kernels/ and bench/: at most six files by one of the
calls above. A part that fails does not stop the next; the exit status is 1 if any failed.'
set -uo pipefail
parts=(tests offsets mlp backends tiles kernels overhead bench memcheck racecheck)
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
rm -f "$RESULTS"/{table.md,smoke.json,tiles.json,evidence.jsonl,gpu.log.gz}
trap 'gzip --force "$log"' EXIT
export RESULTS PYTHONUNBUFFERED=1 NO_COLOR=1 COLUMNS=120
unset RESODE_SKIP_CUDA FAILED_KERNELS
deadline=525 # and 15 more for what does not stop at once
longest=1000000 # bytes of a part in the log
summary=()
failed=0

stage() { # stage NAME SECONDS COMMAND...: at most so many seconds, and none beyond the deadline
  local name=$1 limit=$2 begin=$SECONDS status result
  shift 2
  ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
  if ((limit <= 0)); then
    failed=1
    left_out "$name" "FAILED: no time left"
    return 1
  fi
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$log.part" 2>&1
  status=$?
  tail -c $longest "$log.part" >>"$log"
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
  return $status
}

left_out() { # left_out NAME REASON
  printf '\n== %s: left out: %s\n' "$1" "$2" | tee -a "$log"
  summary+=("$(printf '%-12s    – s  left out: %s' "$1" "$2")")
}

run_tests() { # run_tests NAME SECONDS OPTIONS...: those marked `gpu`; a newer torch may warn of what is no error
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" env RESODE_EVIDENCE="$RESULTS/evidence.jsonl" \
    python3 -m pytest -q -ra -m gpu -W default --tb=short --maxfail=60 --continue-on-collection-errors \
    "${time_limit[@]}" "$@"
}

offsets() {
  if python3 -c 'import sys, torch; sys.exit(torch.cuda.mem_get_info()[0] < 36e9)'; then
    run_tests offsets 60 -k offsets_beyond_32_bits
  else
    left_out offsets "needs 36 GB of free device memory"
  fi
}

sanitize() { # sanitize NAME SECONDS TOOL TESTS...: kernels that failed the smoke test too
  local name=$1 limit=$2 tool=$3
  shift 3
  if ! command -v compute-sanitizer >/dev/null; then
    left_out "$name" "compute-sanitizer is not on PATH"
    return
  fi
  # Without torch's caching allocator each tensor is an allocation of its own, so that an access beyond its end is seen.
  stage "$name" "$limit" env -u FAILED_KERNELS PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 \
    python3 -m pytest -q -ra -m gpu -W default --tb=short "$@"
}

memcheck() {
  sanitize memcheck 60 memcheck tests/ops/test_cuda_kernels.py tests/ops/test_cuda_storing.py -k "test_on_a_gpu or misaligned"
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

needed_by() { # needed_by PART: the families of kernels without which it can't run
  case $1 in
    mlp | tiles) echo fused-triton ;;
    backends) echo fused-cuda fused-triton wide-triton ;;
    kernels | overhead) echo pointwise-cuda pointwise-triton ;;
    bench) echo pointwise-cuda ;;
  esac
}

failed_kernels_of() { # failed_kernels_of PART: those among them that failed
  local family
  for family in $(needed_by "$1"); do
    case " $FAILED_KERNELS " in *" $family "*) echo "$family" ;; esac
  done
}

if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu=yes; else gpu=no; fi
if [ $gpu = yes ] && [ -z "${RESODE_CUDA_ARCHS:-}" ]; then
  RESODE_CUDA_ARCHS=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export RESODE_CUDA_ARCHS
fi
workers=()
if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 12 --dist worksteal); fi
time_limit=()
if python3 -c 'import pytest_timeout' 2>/dev/null; then time_limit=(--timeout=90 --timeout-method=thread); fi

# The limits of the calls that --help names stay within what there is; a part gets what those before it have not used.
stage machine 20 bash -c 'nvidia-smi; nvcc --version; python3 -m pip list; git describe --always --dirty || true'
stage build 90 bench/build.sh
stage library 40 bash -c 'python3 -m resode_cuda && python3 -c "import resode_cuda.ops as o, sys; sys.exit(not o.build_info().compiled)"'
export FAILED_KERNELS=
if [ $gpu = yes ]; then
  stage smoke 120 python3 -m bench.smoke --output "$RESULTS/smoke.json"
  FAILED_KERNELS=$(python3 -m bench.smoke --failed "$RESULTS/smoke.json")
else
  stage smoke 120 python3 -m bench.smoke --device cpu --output "$RESULTS/smoke.json"
fi
for part in "${parts[@]}"; do
  if [ $gpu = no ] && [ "$part" != overhead ]; then
    left_out "$part" "no CUDA device"
    continue
  fi
  if failed_of_part=$(failed_kernels_of "$part") && [ -n "$failed_of_part" ]; then
    left_out "$part" "failed the smoke test: ${failed_of_part//$'\n'/, }"
    continue
  fi
  case $part in
    tests) run_tests tests 200 --durations=10 -k "not offsets_beyond_32_bits" "${workers[@]}" ;;
    offsets) offsets ;;
    mlp) measure mlp 170 --only mlp ;;
    backends) measure backends 140 --only backends ;;
    tiles) stage tiles 150 python3 -m bench.tiles ;;
    memcheck) memcheck ;;
    racecheck) sanitize racecheck 60 racecheck tests/ops/test_cuda_kernels.py tests/fused/test_fused_cuda.py -k '(test_on_a_gpu and reverse) or sanitize' ;;
    kernels) measure kernels 60 --only kernels ;;
    overhead) stage overhead 60 python3 -m pytest -q -W default bench/test_ops.py --benchmark-max-time=0.3 ;;
    bench) measure bench $deadline ;;
  esac
done

printf '\n' | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
exit $failed
