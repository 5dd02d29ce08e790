#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: tests, whether tokens are right, steps, throughput, kernels.
#
#   PYTHON=python3 bash bench/gpu.sh                 all parts, most important first; what the time is too short for is named
#   PYTHON=python3 bash bench/gpu.sh step offline    some parts: tests model gpu-tests gate step dependent-launch offline
#                                                    serve prefix speculation quality ceilings kernels
#   bash bench/gpu.sh --dry                          every part's command without a GPU, on tiny shapes: times are invented
#
# Runs on after a failure; the exit status is 1 if anything failed or was left out, 2 without a GPU. Needs a Python with a
# CUDA build of torch >= 2.11. Appends to bench/results/*.jsonl, or in OUT. LIMIT: seconds for everything. PEERS: folder
# of the peers' environments (bench/README.md); vLLM's takes a minute or two of `offline` to start.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
LIMIT="${LIMIT:-530}"
PEERS="${PEERS:-.peers}"
dry=0
if [ "${1:-}" = --dry ]; then
  dry=1 LIMIT=3600
  OUT="${OUT:-$(mktemp -d)}"
  shift
fi
OUT="${OUT:-bench/results}"
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests model gpu-tests gate step dependent-launch offline serve prefix speculation quality ceilings kernels)
export PYTHON PYTHONPATH="engine:kernels:proto:tests${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
failed=0

# part SECONDS NAME COMMAND...: runs a part with a time limit of its own, or what is left of LIMIT.
part() {
  local seconds=$1 name=$2 start=$SECONDS status=0
  shift 2
  [ $dry = 0 ] || seconds=900
  [ $((LIMIT - SECONDS)) -ge "$seconds" ] || seconds=$((LIMIT - SECONDS))
  [ "$seconds" -ge 10 ] || { echo "== $name: left out, no time"; failed=1; return; }
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
    | xargs -P 8 -I FILE "$PYTHON" -m pytest -q -p no:cacheprovider "$@" FILE
}

# Without a GPU roofline.py measures nothing, and says so once it has read its arguments.
ceilings_dry() {
  "$PYTHON" bench/roofline.py "$@" 2>&1 | grep "no CUDA device"
}
export -f kernel_tests ceilings_dry

run_part() {
  local collect=() gate=() step=() dependent=() load=() offline=() serve=() prefix=() speculation=() quality=() kernels=()
  local ceilings=("$PYTHON" bench/roofline.py)
  if [ $dry = 1 ]; then
    collect=(--collect-only)
    gate=(--device cpu --shape tiny --prompts 4 --new 8)
    step=(--device cpu --shape tiny --batches 1,2 --contexts 16 --steps 3 --threads 1)
    dependent=(--device cpu --shape tiny --batches 2 --context 16 --steps 3 --rounds 1 --threads 1)
    load=(--device cpu --shape tiny --threads 1 --repeats 1 --kv-gib 1)
    offline=(--scale 0.004 --workloads single,19/58 --contenders octavo)
    serve=(--concurrency 2 --rounds 1 --workloads 11/64)
    prefix=(--device cpu --dtype float32 --shape tiny --shared 64 --own 8 --new 4 --requests 4 --repeats 1 --threads 1)
    speculation=(--device cpu --shape tiny --batch 1 --rounds 1 --new-tokens 8 --threads 1)
    quality=(--windows 1 --prompt 8)
    kernels=(norm --interpret)
    ceilings=(bash +o pipefail -c 'ceilings_dry "$@"' ceilings)
  fi
  case $1 in
    tests) part 130 "kernels against their specification" bash -o pipefail -c 'kernel_tests "$@"' tests "${collect[@]}" ;;
    model) part 40 "the model on the kernels" \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/worker/test_gpt2_triton.py "${collect[@]}" ;;
    gpu-tests) part 70 "tests that need a GPU" "$PYTHON" -m pytest -q -m gpu tests -p no:cacheprovider "${collect[@]}" ;;
    gate) part 80 "tokens against transformers" "$PYTHON" bench/gate.py "${gate[@]}" ;;
    step) part 50 "decode steps" "$PYTHON" bench/step.py --steps 50 --out "$OUT/step.jsonl" "${step[@]}" ;;
    dependent-launch) part 50 "dependent launch, on and off" "$PYTHON" bench/dependent_launch.py --batches 1,8 \
      --steps 30 --out "$OUT/dependent_launch.jsonl" "${dependent[@]}" ;;
    offline) part 190 "offline throughput" "$PYTHON" bench/offline.py --contenders octavo,vllm --cell-seconds 4 \
      --workloads single,batch-64,batch-256,11/64,128/128,chat,prefill --peers "$PEERS" --out "$OUT/offline.jsonl" \
      "${load[@]}" "${offline[@]}" ;;
    serve) part 90 "over gRPC" "$PYTHON" bench/serve.py --contenders octavo,octavo-stream,octavo-session \
      --workloads 11/64,128/128 --rounds 4 --cell-seconds 5 --out "$OUT/serve.jsonl" "${load[@]}" "${serve[@]}" ;;
    prefix) part 60 "prefix cache" "$PYTHON" bench/prefix.py --out "$OUT/prefix.jsonl" "${prefix[@]}" ;;
    speculation) part 90 "prompt lookup, with and without" "$PYTHON" bench/speculation.py --device cuda --shape gpt2-large \
      --batch 1 8 --rounds 3 --out "$OUT/speculation.jsonl" "${speculation[@]}" ;;
    quality) part 40 "fp8 cache: perplexity, greedy tokens" "$PYTHON" bench/quality.py --a kv_cache_dtype=auto \
      --b kv_cache_dtype=fp8 --window 64 --new 32 --out "$OUT/quality.jsonl" "${quality[@]}" ;;
    ceilings) part 40 "ceilings" "${ceilings[@]}" --out "$OUT/roofline.jsonl" ;;
    kernels) part 190 "kernels" "$PYTHON" bench/kernels.py --seconds 30 --budget 170 --out "$OUT/kernels.jsonl" \
      "${kernels[@]}" ;;
    *) echo "no part $1"; failed=1 ;;
  esac
}

if [ $dry = 0 ]; then
  "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || { echo "no CUDA device"; exit 2; }
fi
for name in "${parts[@]}"; do
  run_part "$name"
done
exit $failed
