"""CTranslate2's Generator: batches as large as `worker_loop.static_batches` has them.

It has no continuous batching and no gRPC server.
"""

from __future__ import annotations

import json
import os
import time

import ctranslate2
import worker_loop
from worker_loop import NewTokens


class Generator:
    def __init__(self, options: worker_loop.Options) -> None:
        self.dtype = options.dtype
        converted = options.scratch / f"{options.checkpoint.name}-{options.dtype}"
        if not (converted / "model.bin").exists():
            converter = ctranslate2.converters.TransformersConverter(str(options.checkpoint))
            converter.convert(str(converted), quantization=options.dtype, force=True)
        self._generator = ctranslate2.Generator(
            str(converted),
            device=options.device,
            compute_type=options.dtype,
            intra_threads=options.threads or os.cpu_count() or 1,
        )
        vocab = json.loads((options.checkpoint / "vocab.json").read_text())
        self._names = {index: name for name, index in vocab.items()}

    def run(self, prompts: list[list[int]], new_tokens: NewTokens, mode: str) -> tuple[float, list[list[int]]]:
        named = [[self._names[token] for token in prompt] for prompt in prompts]
        lengths = worker_loop.lengths(prompts, new_tokens)
        token_ids: list[list[int]] = [[] for _ in prompts]
        begin = time.perf_counter()
        for batch in worker_loop.static_batches(prompts, lengths):
            answers = self._run([named[i] for i in batch], lengths[batch[0]])
            for i, answer in zip(batch, answers, strict=True):
                token_ids[i] = answer[: lengths[i]]
        return time.perf_counter() - begin, token_ids

    def _run(self, prompts: list[list[str]], new_tokens: int) -> list[list[int]]:
        results = self._generator.generate_batch(
            prompts,
            max_length=new_tokens,
            min_length=new_tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in results]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    worker_loop.serve(Generator, "ctranslate2")
