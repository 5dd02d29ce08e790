"""vLLM in process, its CPU or its CUDA build, whichever is installed: `vllm.LLM`.

The engine core runs in this process; its defaults otherwise.
"""

from __future__ import annotations

import os
import time

import vllm_environment
import worker_loop
from worker_loop import NewTokens


class InProcess:
    def __init__(self, options: worker_loop.Options) -> None:
        self.dtype = options.dtype
        os.environ.update(vllm_environment.variables(options))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._llm = LLM(
            model=str(options.checkpoint),
            dtype=options.dtype,
            max_model_len=1024,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **({"kv_cache_memory_bytes": options.kv_gib << 30} if options.kv_gib and options.device == "cuda" else {}),
            **({"max_num_seqs": options.max_requests} if options.max_requests else {}),
        )

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        from vllm import SamplingParams, TokensPrompt

        lengths = worker_loop.lengths(prompts, new_tokens)
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        begin = time.perf_counter()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return seconds, [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    worker_loop.serve(InProcess, "vllm", "torch")
