"""The environment variables by which vLLM's CPU build is configured, for both of its workers."""

from __future__ import annotations

import worker_loop


def variables(options: worker_loop.Options) -> dict[str, str]:
    found = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(options.scratch / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    if options.threads:
        cores = "0" if options.threads == 1 else f"0-{options.threads - 1}"
        found |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": cores}
    return found
