"""What the front-end's tests share: the demo model, requests, hand-made outputs of a core, and a core that records."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from octavo.checkpoint import resolve
from octavo.errors import RequestError
from octavo.frontend.model import FrontendModel
from octavo.ipc import AbortCause, EngineCoreOutputs, EngineCoreRequest, PromptStarted, ToFrontend
from octavo.types import EngineInfo, GenerateRequest, GenerationParams, OutputOptions, Prompt


@cache
def demo() -> FrontendModel:
    return FrontendModel.load(resolve("demo"), "demo")


@cache
def reference_tokenizer() -> Any:
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer.from_pretrained(str(resolve("demo")))


def ids_of(text: str) -> list[int]:
    return demo().tokenizer.encode([text])[0]


def request(*texts: str, output: OutputOptions | None = None, **params: Any) -> GenerateRequest:
    """Texts, or the prompt "Hello", with these parameters."""
    prompts = [Prompt(text=text) for text in texts or ("Hello",)]
    return GenerateRequest(prompts=prompts, params=GenerationParams(**params), output=output or OutputOptions())


def outputs(*entries: tuple[int, int, int], started: list[int] | None = None, **more: Any) -> EngineCoreOutputs:
    """A step's message from (key, token id, finish reason)."""
    return EngineCoreOutputs(
        step_id=1,
        keys=np.array([entry[0] for entry in entries], "<i8").tobytes(),
        token_ids=np.array([entry[1] for entry in entries], "<i4").tobytes(),
        finish=bytes(entry[2] for entry in entries),
        started=[PromptStarted(key, 1.5, 0) for key in started or []],
        **more,
    )


def engine_info(**changes: Any) -> EngineInfo:
    spec = demo().spec
    values: dict[str, Any] = {
        "model": "demo",
        "architecture": "GPT2LMHeadModel",
        "weights_sha256": "0" * 64,
        "dtype": "float32",
        "device": "cpu",
        "attention_backend": "fake",
        "kv_cache_dtype": "float32",
        "num_parameters": 1,
        "vocab_size": spec.vocab_size,
        "n_positions": spec.n_positions,
        "block_size": 16,
        "num_blocks": 256,
        "max_num_requests": 256,
        "max_num_batched_tokens": 2048,
        "max_model_len": spec.n_positions + 1,
        "batch_invariant": True,
        "start_time": 0.0,
    }
    return EngineInfo(**(values | changes))


class FakeCore:
    """An EngineCoreClient that keeps what it is sent; tests answer by `send`."""

    def __init__(self) -> None:
        self.on_message: Callable[[ToFrontend], None] = lambda message: None
        self.on_broken: Callable[[], None] = lambda: None
        self.requests: list[EngineCoreRequest] = []
        self.aborts: list[tuple[list[int], AbortCause]] = []
        self.refusal: RequestError | None = None

    def add(self, requests: list[EngineCoreRequest]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests += requests

    def abort(self, keys: list[int], cause: AbortCause) -> None:
        if keys:
            self.aborts.append((keys, cause))

    async def reset_prefix_cache(self) -> int:
        return 7

    def send(self, *entries: tuple[int, int, int], **more: Any) -> None:
        self.on_message(outputs(*entries, **more))

    @property
    def key(self) -> int:
        """Of the newest request's first sequence."""
        return self.requests[-1].key
