"""`LLM`: offline batches. The engine in this process, called like the client, without gRPC or other processes.

from octavo.llm import LLM
llm = LLM("demo")
print(llm.generate("I met a traveller from an antique land, who said", max_new_tokens=64).text)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from octavo import checkpoint
from octavo.client.params import Call, Prompts, build
from octavo.client.results import Collector, Response, shaped
from octavo.config import CacheConfig, EngineConfig, Limits, ModelConfig, SchedulerConfig, check
from octavo.engine_core.engine_core import EngineCore, Runner
from octavo.errors import Code, Reason, RequestError
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.model import FrontendModel
from octavo.frontend.output_processor import OutputProcessor
from octavo.frontend.request_state import RequestState
from octavo.frontend.requests import Arrival, CheckedRequest, ProcessedRequest
from octavo.ipc import AbortCause, AbortSequences, AddRequests, EngineCoreOutputs
from octavo.server import convert, fields
from octavo.types import EngineInfo

_FRONTEND = 0
_FOREVER = 1e9
_MANY = 1 << 30
OFFLINE_LIMITS = Limits(max_prompts=_MANY, max_sequences=_MANY, max_prompt_bytes=_MANY, max_send_message_bytes=_MANY)


class LLM:
    """A loaded checkpoint that completes batches of prompts by continuous batching.

    Keywords are the fields of ModelConfig, CacheConfig and SchedulerConfig, such as `device`, `dtype`,
    `quantization`, `num_threads`, `cpu_cores`, `block_size`, `memory`, `kv_cache_dtype`, `max_num_requests`. With
    `cpu_cores` the calling thread is bound too, to the first of them, until `close`. Raises StartupError when the
    checkpoint or the device cannot be used, TypeError for an unknown keyword. Not thread-safe.
    """

    def __init__(self, model: str = checkpoint.DEMO, *, runner: Runner | None = None, **options: Any) -> None:
        path = checkpoint.resolve(model)
        own: list[dict[str, Any]] = []
        for config in (ModelConfig, CacheConfig, SchedulerConfig):
            names = set(config.__struct_fields__) - {"path", "name"}
            own.append({name: options.pop(name) for name in names & set(options)})
        if options:
            raise TypeError(f"unknown keyword {min(options)}")
        self._config = EngineConfig(
            model=ModelConfig(path=str(path), name=model, **own[0]),
            cache=CacheConfig(**own[1]),
            scheduler=SchedulerConfig(**{"max_queue_time": _FOREVER, **own[2]}),
        )
        check(self._config)
        self._model = FrontendModel.load(path, model, self._config.scheduler.max_model_len)
        self._inputs = InputProcessor(self._model, OFFLINE_LIMITS, cache_secret=secrets.token_bytes(32))
        self._outputs = OutputProcessor(self._model.tokenizer)
        self._core = EngineCore(self._config, runner=runner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded engine."""
        return self._core.info

    @property
    def core(self) -> EngineCore:
        """The engine core, for benchmarks and tests."""
        return self._core

    def generate(self, prompts: Prompts = None, **keywords: Any) -> Any:
        """Completes a prompt (str or token ids) or a list of prompts; keywords and results as `Client.generate`.

        Raises TypeError for an unknown keyword, ValueError naming field, limit and value for a bad one, RequestError
        for what fails while generating.
        """
        call = build(prompts, keywords)
        result = self._run([call])[0]
        if isinstance(result, RequestError):
            raise result
        return shaped(result, call.single)

    def generate_each(self, requests: Sequence[Mapping[str, Any]], *, return_errors: bool = False) -> list[Any]:
        """Completes requests with parameters of their own in one batch: each a mapping of keywords with "prompt".

        Results in order, each as `generate` would return it. What fails while generating raises when all are done, or
        with `return_errors` stands as a RequestError in the place of its result.
        """
        calls = [build(request["prompt"], {k: v for k, v in request.items() if k != "prompt"}) for request in requests]
        results = self._run(calls)
        errors = [result for result in results if isinstance(result, RequestError)]
        if errors and not return_errors:
            raise errors[0]
        return [
            result if isinstance(result, RequestError) else shaped(result, call.single)
            for result, call in zip(results, calls, strict=True)
        ]

    def close(self) -> None:
        """Frees the model and its cache."""
        self._core.close()

    def _run(self, calls: Sequence[Call]) -> list[Response | RequestError]:
        prepared = self._heal([self._prepare(call) for call in calls])
        processed = [self._finish(*request) for request in prepared]  # all checks come before any work
        states = []
        for request in processed:
            states.append(self._outputs.add(request))
            self._core.handle(AddRequests(_FRONTEND, request.core_requests))
        self._finish_all(states)
        return [
            self._response(call, request, state) for call, request, state in zip(calls, processed, states, strict=True)
        ]

    def _prepare(self, call: Call) -> tuple[CheckedRequest, list[list[int]]]:
        with _value_errors():
            checked = self._inputs.check(fields.read_request(call.message))
            self._inputs.compile(checked)
            return checked, self._inputs.tokenize_all(checked)

    def _finish(self, checked: CheckedRequest, token_ids: list[list[int]]) -> ProcessedRequest:
        with _value_errors():
            arrival = Arrival(time.monotonic())
            return self._inputs.finish(checked, token_ids, arrival, streaming=True, info=self._core.info)

    def _heal(
        self, requests: list[tuple[CheckedRequest, list[list[int]]]]
    ) -> list[tuple[CheckedRequest, list[list[int]]]]:
        """With the prompts of those that ask for token healing healed, all in one batch."""
        wanted = [i for i, (checked, _) in enumerate(requests) if checked.params.token_healing]
        with _value_errors():
            healings = {i: self._inputs.plan_healing(*requests[i], self._core.info) for i in wanted}
        states: dict[int, RequestState] = {}
        for i, healing in healings.items():
            request = self._inputs.healing_request(healing, Arrival(time.monotonic()))
            if request is not None:
                states[i] = self._outputs.add(request)
                self._core.handle(AddRequests(_FRONTEND, request.core_requests))
        self._finish_all(list(states.values()))
        for i, healing in healings.items():
            chosen: dict[int, int] = {}
            if (state := states.get(i)) is not None:
                if state.error is not None:
                    raise state.error
                update = state.take(time.monotonic())
                assert update is not None
                chosen = {delta.prompt_index: delta.token_ids[0] for delta in update.deltas}
            requests[i] = self._inputs.healed(healing, chosen)
        return requests

    def _finish_all(self, states: Sequence[RequestState]) -> None:
        """Runs the engine until it is empty."""
        try:
            while self._core.has_work:
                self._step()
        finally:
            self._abort_unfinished(states)

    def _step(self) -> None:
        for message in self._core.step().get(_FRONTEND, []):
            if isinstance(message, EngineCoreOutputs):
                _, stopped = self._outputs.process(message, time.monotonic())
                if stopped:
                    self._core.handle(AbortSequences(_FRONTEND, stopped, AbortCause.STOP_STRING))

    def _abort_unfinished(self, states: Sequence[RequestState]) -> None:
        """After an exception or an interrupt: the next call must find an empty engine."""
        interrupted = RequestError(Reason.CLIENT_CANCELLED, "the call was interrupted")
        keys = [key for state in states if not state.ended for key in self._outputs.fail(state, interrupted)]
        if keys:
            self._core.handle(AbortSequences(_FRONTEND, keys, AbortCause.CLIENT))
            while self._core.has_work:
                self._core.step()

    def _response(self, call: Call, request: ProcessedRequest, state: RequestState) -> Response | RequestError:
        if state.error is not None:
            return state.error
        update = state.take(time.monotonic())
        assert update is not None
        collector = Collector(call.request_id)
        collector.add(
            convert.generate_response(
                update, request_id=call.request_id, model=self._model.name, options=request.resolved
            )
        )
        return collector.response()


@contextmanager
def _value_errors() -> Iterator[None]:
    """A caller's mistake becomes the ValueError that a local call would raise."""
    try:
        yield
    except RequestError as error:
        if error.code is not Code.INVALID_ARGUMENT:
            raise
        problems = "; ".join(f"{v.field}: {v.description}" for v in error.violations)
        raise ValueError(problems or error.message) from error
