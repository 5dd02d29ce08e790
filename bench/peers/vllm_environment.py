"""The environment variables by which vLLM is configured, for both of its workers."""

from __future__ import annotations

import worker_loop


def variables(options: worker_loop.Options) -> dict[str, str]:
    found = {
        "VLLM_CACHE_ROOT": str(options.scratch / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        # The gRPC server warms up behind its clients' backs, for minutes; the benchmark does it by itself.
        "SMG_VLLM_SERVICER_WARMUP": "off",
    }
    if options.device == "cpu":
        found["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_gib or 1)
    if options.device == "cpu" and options.threads:
        # Not bound to cores: others are free to move, and nobody else stays off a core.
        found |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return found
