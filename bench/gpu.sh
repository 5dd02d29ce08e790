#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes: tests, ceilings, kernels. Runs on after a failure; the exit status is 1
# if anything failed. Needs a Python with a CUDA build of torch (PYTHON=...), and writes bench/results/*.jsonl, or to OUT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-bench/results}"
export PYTHON PYTHONPATH="engine:kernels:proto:tests${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
failed=0

# part SECONDS NAME COMMAND...: runs a part with a time limit of its own.
part() {
  local seconds=$1 name=$2 start=$SECONDS status=0
  shift 2
  echo "== $name"
  timeout -k 5 "$seconds" "$@" || status=$?
  case $status in
    0) ;;
    124 | 137) echo "== $name: not done in $seconds s"; failed=1 ;;
    *) echo "== $name: failed with $status"; failed=1 ;;
  esac
  echo "== $name: $((SECONDS - start)) s"
}

# Each file in a process of its own, several at once: most of the time goes into compiling.
kernel_tests() {
  ls tests/kernels/test_*.py | grep -v -e test_compile_check -e test_bench_kernels \
    | xargs -P 8 -I FILE "$PYTHON" -m pytest -q -p no:cacheprovider FILE
}
export -f kernel_tests

"$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || { echo "no CUDA device"; exit 2; }
part 150 "kernels against their specification" bash -o pipefail -c kernel_tests
part 40 "the model on the kernels" "$PYTHON" -m pytest -q -p no:cacheprovider tests/worker/test_gpt2_triton.py
part 60 "tests that need a GPU" "$PYTHON" -m pytest -q -m gpu tests -p no:cacheprovider
part 40 "ceilings" "$PYTHON" bench/roofline.py --out "$OUT/roofline.jsonl"
part 180 "kernels" "$PYTHON" bench/kernels.py --seconds 30 --budget 160 --out "$OUT/kernels.jsonl"
exit $failed
