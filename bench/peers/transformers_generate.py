"""transformers' `generate()`, the whole batch in one call.

Where oneDNN has no bf16 on this CPU, torch's bf16 products take tens of times as long as fp32 ones: then fp32 it is.
"""

from __future__ import annotations

import time

import torch
import worker_loop
from transformers import GPT2LMHeadModel


class Generate:
    def __init__(self, options: worker_loop.Options) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        fast = options.dtype != "bfloat16" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.dtype = options.dtype if fast else "float32"
        self._model = GPT2LMHeadModel.from_pretrained(options.checkpoint, dtype=getattr(torch, self.dtype)).eval()
        self._model.generation_config.eos_token_id = None

    def run(self, prompts: list[list[int]], new_tokens: int, mode: str) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        input_ids = torch.tensor(prompts)
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        token_ids: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        return time.perf_counter() - begin, token_ids

    def close(self) -> None:
        pass


if __name__ == "__main__":
    worker_loop.serve(Generate, "transformers", "torch")
