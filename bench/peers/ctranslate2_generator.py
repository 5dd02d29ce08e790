"""CTranslate2's Generator: the whole batch in one call. It has no continuous batching and no gRPC server."""

from __future__ import annotations

import json
import os
import time

import ctranslate2
import worker_loop


class Generator:
    def __init__(self, options: worker_loop.Options) -> None:
        self.dtype = options.dtype
        converted = options.scratch / f"{options.checkpoint.name}-{options.dtype}"
        if not (converted / "model.bin").exists():
            converter = ctranslate2.converters.TransformersConverter(str(options.checkpoint))
            converter.convert(str(converted), quantization=options.dtype, force=True)
        self._generator = ctranslate2.Generator(
            str(converted), compute_type=options.dtype, intra_threads=options.threads or os.cpu_count() or 1
        )
        vocab = json.loads((options.checkpoint / "vocab.json").read_text())
        self._names = {index: name for name, index in vocab.items()}

    def run(self, prompts: list[list[int]], new_tokens: int, mode: str) -> tuple[float, list[list[int]]]:
        named = [[self._names[token] for token in prompt] for prompt in prompts]
        begin = time.perf_counter()
        results = self._generator.generate_batch(
            named,
            max_length=new_tokens,
            min_length=new_tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - begin, [list(result.sequences_ids[0]) for result in results]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    worker_loop.serve(Generator, "ctranslate2")
