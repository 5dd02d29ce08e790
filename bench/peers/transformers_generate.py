"""transformers' `generate()` on left-padded batches, as large as `worker_loop.static_batches` has them.

Where oneDNN has no bf16 on this CPU, torch's bf16 products take tens of times as long as fp32 ones: then fp32 it is.
"""

from __future__ import annotations

import time

import torch
import worker_loop
from transformers import GPT2LMHeadModel
from worker_loop import NewTokens


class Generate:
    def __init__(self, options: worker_loop.Options) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        on_cpu = options.device == "cpu"
        fast = options.dtype != "bfloat16" or not on_cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.dtype = options.dtype if fast else "float32"
        self._model = GPT2LMHeadModel.from_pretrained(options.checkpoint, dtype=getattr(torch, self.dtype)).eval()
        self._model.to(options.device)
        self._model.generation_config.eos_token_id = None

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        lengths = worker_loop.lengths(prompts, new_tokens)
        token_ids: list[list[int]] = [[] for _ in prompts]
        for batch in worker_loop.static_batches(prompts, lengths):
            answers = self._run([prompts[i] for i in batch], lengths[batch[0]])
            for i, answer in zip(batch, answers, strict=True):
                token_ids[i] = answer[: lengths[i]]
        return time.perf_counter() - begin, token_ids

    def _run(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self._model.generate(
            input_ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answers: list[list[int]] = output[:, width:].tolist()
        return answers

    def close(self) -> None:
        pass


if __name__ == "__main__":
    worker_loop.serve(Generate, "transformers", "torch")
