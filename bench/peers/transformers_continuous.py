"""transformers' continuous batching, the engine below `generate_batch`: its manager, kept from batch to batch.

On the CPU its pool is cut to a few blocks: sized by itself it takes most of the memory, and a minute to clear.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import worker_loop
from transformers import ContinuousBatchingConfig, GenerationConfig, GPT2LMHeadModel
from worker_loop import NewTokens

CPU_POOL: dict[str, Any] = {"num_blocks": 64, "max_batch_tokens": 512}
PAGE_SIZE = 256
PATIENCE = 240.0


class Continuous:
    def __init__(self, options: worker_loop.Options) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        on_cpu = options.device == "cpu"
        fast = options.dtype != "bfloat16" or not on_cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.dtype = options.dtype if fast else "float32"
        model = GPT2LMHeadModel.from_pretrained(options.checkpoint, dtype=getattr(torch, self.dtype)).eval()
        pool = dict(CPU_POOL) if on_cpu else {}
        if options.kv_gib:
            config = model.config
            token_bytes = 2 * config.n_layer * config.n_embd * model.dtype.itemsize
            pool["num_blocks"] = max(8, (options.kv_gib << 30) // (PAGE_SIZE * token_bytes))
        if options.max_requests:
            pool["max_requests_per_batch"] = options.max_requests
        self._manager = model.to(options.device).init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024),
            continuous_batching_config=ContinuousBatchingConfig(page_size=PAGE_SIZE, allow_block_sharing=False, **pool),
        )
        self._manager.warmup()
        self._manager.start()

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        lengths = worker_loop.lengths(prompts, new_tokens)
        begin = time.perf_counter()
        order = {}
        for i, prompt in enumerate(prompts):
            order[self._manager.add_request(prompt, max_new_tokens=lengths[i])] = i
        token_ids: list[list[int]] = [[] for _ in prompts]
        deadline = begin + PATIENCE
        left = len(prompts)
        while left:
            result = self._manager.get_result(timeout=1.0)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                token_ids[order[result.request_id]] = list(result.generated_tokens)
                left -= 1
            elif time.perf_counter() > deadline or not self._manager.is_running():
                raise RuntimeError(f"{left} of {len(prompts)} requests got no answer")
        return time.perf_counter() - begin, token_ids

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10.0)


if __name__ == "__main__":
    worker_loop.serve(Continuous, "transformers", "torch")
