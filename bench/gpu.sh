#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes: tests, ceilings, kernels. Runs on after a failure; the exit status is 1
# if anything failed. Needs a Python with a CUDA build of torch (PYTHON=...), and writes bench/results/*.jsonl, or to OUT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-bench/results}"
export PYTHONPATH="engine:kernels:proto:tests${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
failed=0

# part SECONDS NAME COMMAND...: runs a part with a time limit of its own.
part() {
  local seconds=$1 name=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" || { echo "== $name: failed with $?"; failed=1; }
  echo "== $name: $((SECONDS - start)) s"
}

part 120 "kernels against their specification" "$PYTHON" -m pytest -q tests/kernels -p no:cacheprovider \
  --ignore tests/kernels/test_compile_check.py --ignore tests/kernels/test_bench_kernels.py
part 90 "tests that need a GPU" "$PYTHON" -m pytest -q -m gpu tests -p no:cacheprovider
part 40 "ceilings" "$PYTHON" bench/roofline.py --out "$OUT/roofline.jsonl"
part 220 "kernels" "$PYTHON" bench/kernels.py --seconds 34 --out "$OUT/kernels.jsonl"
exit $failed
