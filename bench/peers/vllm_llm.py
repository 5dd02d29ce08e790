"""vLLM's CPU build in process: `vllm.LLM`, with the engine core in this process and its defaults otherwise."""

from __future__ import annotations

import os
import time

import vllm_environment
import worker_loop


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
        )

    def run(self, prompts: list[list[int]], new_tokens: int, mode: str) -> tuple[float, list[list[int]]]:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        begin = time.perf_counter()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return seconds, [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    worker_loop.serve(InProcess, "vllm", "torch")
