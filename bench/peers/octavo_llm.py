"""octavo in process: `octavo.llm.LLM`."""

from __future__ import annotations

import time

import worker_loop
from octavo.llm import LLM
from worker_loop import NewTokens

OWN_TYPES = {
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "bound": {"dtype": "bfloat16", "cpu_cores": "auto"},
    "fp8-cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}
"""What is called a dtype here and is none of the model's."""


class InProcess:
    def __init__(self, options: worker_loop.Options) -> None:
        self.dtype = options.dtype
        model = OWN_TYPES.get(options.dtype, {"dtype": options.dtype})
        self._llm = LLM(
            str(options.checkpoint),
            device=options.device,
            num_threads=options.threads,
            enable_prefix_caching=False,
            **model,
            memory=options.kv_gib << 30,
            **({"max_num_requests": options.max_requests} if options.max_requests else {}),
        )

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        if isinstance(new_tokens, int):
            outputs = self._llm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        else:
            pairs = zip(prompts, new_tokens, strict=True)
            requests = [{"prompt": prompt, "max_new_tokens": n, "ignore_eos": True} for prompt, n in pairs]
            outputs = self._llm.generate_each(requests)
        return time.perf_counter() - begin, [list(output.token_ids) for output in outputs]

    def close(self) -> None:
        self._llm.close()


if __name__ == "__main__":
    worker_loop.serve(InProcess, "octavo", "torch")
