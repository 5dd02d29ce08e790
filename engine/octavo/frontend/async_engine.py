"""AsyncEngine: what a servicer talks to. Admission, deadlines, cancellation, draining, and delivery of updates.

A request's places are held from before its tokenization until its last sequence has ended; its handle counts as in
flight until the reader closes it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from octavo.config import ServerConfig
from octavo.errors import Reason, RequestError
from octavo.frontend.admission import Admission
from octavo.frontend.beams import num_rows
from octavo.frontend.client import EngineCoreClient
from octavo.frontend.failures import failure
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.model import FrontendModel
from octavo.frontend.output_processor import OutputProcessor
from octavo.frontend.request_handle import RequestHandle
from octavo.frontend.request_state import RequestState
from octavo.frontend.requests import Arrival, CheckedRequest, ProcessedRequest
from octavo.frontend.structured import COMPILE_SECONDS, too_slow
from octavo.frontend.validation import Violations
from octavo.ipc import AbortCause, EngineCoreOutputs, LoadReport, ToFrontend
from octavo.types import EngineInfo, EngineLoad, GenerateRequest, PromptOptions

__all__ = ["AsyncEngine", "EngineState", "RequestHandle"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

INLINE_CHARACTERS: Final = 2048
"""Texts up to this long together are tokenized on the event loop (about 1 ms); longer ones in a thread."""
MAX_TOKENIZER_CALLS: Final = 64
"""Large calls of the tokenizer's own RPCs that may wait for their thread; no request waits for them."""


class EngineState(enum.Enum):
    STARTING = "starting"
    """No core has been up yet."""
    READY = "ready"
    DRAINING = "draining"
    """New requests are refused, running ones finish. Lasts until undone, whatever the core does meanwhile."""
    RESTARTING = "restarting"
    """The core died; another one is on its way."""


_REFUSAL: Final = {
    EngineState.STARTING: Reason.ENGINE_STARTING,
    EngineState.DRAINING: Reason.DRAINING,
    EngineState.RESTARTING: Reason.ENGINE_RESTARTED,
}


class AsyncEngine:
    """One front-end's view of the engine. All methods are called on its event loop."""

    def __init__(
        self,
        model: FrontendModel,
        client: EngineCoreClient,
        config: ServerConfig,
        *,
        frontend: int = 0,
        cache_secret: bytes,
    ) -> None:
        self.model = model
        self.limits = config.limits
        self.frontend = frontend
        self.info: EngineInfo | None = None
        """None until a core was up; that of the last one while restarting."""
        self.load: EngineLoad | None = None
        self.restarts = 0
        self.state = EngineState.STARTING
        self._client = client
        self._core_is_up = False
        self._draining = False
        self._inputs = InputProcessor(model, config.limits, cache_secret=cache_secret)
        self._outputs = OutputProcessor(model.tokenizer)
        self._admission = Admission(config)
        self._handles: dict[RequestState, RequestHandle] = {}
        self._num_submitting = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._rpc_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer RPCs")
        self._grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._num_rpc_calls = 0
        self._state_callbacks: list[Callable[[EngineState], None]] = []
        self._load_callbacks: list[Callable[[EngineLoad], None]] = []
        client.on_message = self._on_message
        client.on_broken = self._on_broken

    # --- state ----------------------------------------------------------------------------------------------------

    def on_state_change(self, callback: Callable[[EngineState], None]) -> None:
        """`callback` is called with each new state."""
        self._state_callbacks.append(callback)

    def on_load(self, callback: Callable[[EngineLoad], None]) -> Callable[[], None]:
        """`callback` is called with each load report. Returns a function that ends that."""
        self._load_callbacks.append(callback)
        return lambda: self._load_callbacks.remove(callback)

    def engine_up(self, info: EngineInfo, restarts: int) -> None:
        """A core is warm and the client is connected to it."""
        self.info, self.restarts, self._core_is_up = info, restarts, True
        self._update_state()

    def engine_down(self) -> None:
        """The core is gone: every request in flight fails with UNAVAILABLE, ENGINE_RESTARTED."""
        self._core_is_up, self.load = False, None
        self.fail_all(failure(Reason.ENGINE_RESTARTED))
        self._update_state()

    def start_draining(self) -> None:
        """New requests are refused from now on."""
        self._draining = True
        self._update_state()

    def stop_draining(self) -> None:
        """Undoes start_draining."""
        self._draining = False
        self._update_state()

    def _update_state(self) -> None:
        if self._draining:
            state = EngineState.DRAINING
        elif self._core_is_up:
            state = EngineState.READY
        else:
            state = EngineState.STARTING if self.info is None else EngineState.RESTARTING
        if state is not self.state:
            self.state = state
            for callback in list(self._state_callbacks):
                callback(state)

    # --- requests -------------------------------------------------------------------------------------------------

    async def submit(
        self, request: GenerateRequest, *, tenant: str = "", deadline: float | None = None, streaming: bool
    ) -> RequestHandle:
        """Validates, tokenizes, admits and sends a request. `deadline`: the client's, monotonic seconds.

        Raises RequestError: all violations at once, or why the request cannot be admitted now.
        """
        arrival_time = time.monotonic()
        self._check_ready()
        if deadline is not None and deadline <= arrival_time:
            raise failure(Reason.CLIENT_DEADLINE)
        checked = self._inputs.check(request)
        num_sequences = len(request.prompts) * num_rows(checked.params)
        server_deadline = arrival_time + self.limits.max_request_duration
        is_client = deadline is not None and deadline < server_deadline
        arrival = Arrival(arrival_time, tenant, deadline if is_client else server_deadline, is_client)
        self._admission.acquire(tenant, num_sequences)
        self._num_submitting += 1
        self._update_idle()
        try:
            await self._compile(checked)
            token_ids = await self._tokenize(checked)
            if checked.params.token_healing:
                checked, token_ids = await self._heal(checked, token_ids, arrival)
            processed = self._inputs.finish(checked, token_ids, arrival, streaming=streaming, info=self.info)
            return self._send(processed, streaming)
        except BaseException:
            self._admission.release(tenant, num_sequences)
            raise
        finally:
            self._num_submitting -= 1
            self._update_idle()

    async def _heal(
        self, checked: CheckedRequest, token_ids: list[list[int]], arrival: Arrival
    ) -> tuple[CheckedRequest, list[list[int]]]:
        """The request with its prompts healed, which takes a step of the engine."""
        loop = asyncio.get_running_loop()
        healing = await loop.run_in_executor(self._threads, self._inputs.plan_healing, checked, token_ids, self.info)
        request = self._inputs.healing_request(healing, arrival)
        if request is None:
            return self._inputs.healed(healing, {})
        handle = self._send(request, streaming=False)
        handle.num_places = 0  # it has those of the request
        try:
            update = await handle.collect()
        finally:
            handle.close()
        return self._inputs.healed(healing, {delta.prompt_index: delta.token_ids[0] for delta in update.deltas})

    def _send(self, processed: ProcessedRequest, streaming: bool) -> RequestHandle:
        self._check_ready()
        self._admission.check_tokens(self._outputs.num_waiting_tokens, processed.num_prompt_tokens)
        state = self._outputs.add(processed)
        try:
            self._client.add(processed.core_requests)
        except RequestError as error:
            self._outputs.fail(state, error)
            raise
        handle = RequestHandle(self, state, model=self.model.name, streaming=streaming)
        self._handles[state] = handle
        return handle

    def _check_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise failure(_REFUSAL[self.state])

    async def abort_requests(self, request_ids: list[str] | None, tenant: str | None) -> list[tuple[str, int]]:
        """Ends requests in this front-end with ABORTED. Returns (request_id, requests ended), each id once and only
        those under which something ran. None: all ids; None: of every tenant."""
        wanted = None if request_ids is None else frozenset(request_ids)
        ended: dict[str, int] = {}
        keys: list[int] = []
        for handle in list(self._handles.values()):
            if wanted is not None and handle.request_id not in wanted:
                continue
            if handle.state.ended or (tenant is not None and handle.tenant != tenant):
                continue
            keys += self._outputs.fail(handle.state, failure(Reason.ABORTED_BY_OPERATOR), aborted=True)
            ended[handle.request_id] = ended.get(handle.request_id, 0) + 1
            self._changed(handle)
        self._client.abort(keys, AbortCause.OPERATOR)
        return list(ended.items())

    def fail_all(self, error: RequestError) -> None:
        """Ends every request in flight with this error."""
        keys: list[int] = []
        for handle in list(self._handles.values()):
            keys += self._outputs.fail(handle.state, error)
            self._changed(handle)
        if keys and self._core_is_up:
            self._client.abort(keys, AbortCause.CLIENT)

    def fail(self, handle: RequestHandle, error: RequestError) -> None:
        """Ends one request. Called by its handle."""
        self._client.abort(self._outputs.fail(handle.state, error), AbortCause.CLIENT)
        self._changed(handle)

    def forget(self, handle: RequestHandle) -> None:
        """The reader has closed its handle. Called by the handle."""
        self._handles.pop(handle.state, None)
        self._update_idle()

    @property
    def num_inflight(self) -> int:
        """Requests that are being submitted, or whose handle is not closed yet."""
        return len(self._handles) + self._num_submitting

    async def wait_idle(self, timeout: float | None) -> bool:
        """Waits until nothing is in flight; False if that took longer than `timeout` seconds."""
        if self._idle.is_set():  # wait_for would not look with a timeout of 0
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _update_idle(self) -> None:
        if self.num_inflight:
            self._idle.clear()
        else:
            self._idle.set()

    # --- messages of the core ----------------------------------------------------------------------------------------

    def _on_message(self, message: ToFrontend) -> None:
        if isinstance(message, EngineCoreOutputs):
            try:
                changed, aborts = self._outputs.process(message, time.monotonic())
            except Exception:
                _log.exception("a message of the engine core makes no sense")
                self._on_broken()
                return
            if aborts:
                self._client.abort(aborts, AbortCause.STOP_STRING)
            for state in changed:
                if (handle := self._handles.get(state)) is not None:
                    self._changed(handle)
        elif isinstance(message, LoadReport):
            self.load = message.load
            for callback in list(self._load_callbacks):
                callback(message.load)

    def _on_broken(self) -> None:
        """Outputs were lost, nobody knows whose."""
        self.fail_all(failure(Reason.INTERNAL))

    def _changed(self, handle: RequestHandle) -> None:
        if handle.state.ended and handle.num_places:
            self._admission.release(handle.tenant, handle.num_places)
            handle.num_places = 0
        handle.notify()

    async def _compile(self, checked: CheckedRequest) -> None:
        """Off the event loop, one at a time."""
        if self._inputs.is_compiled(checked):
            self._inputs.compile(checked)
            return
        call = asyncio.get_running_loop().run_in_executor(self._grammar_thread, self._inputs.compile, checked)
        try:
            await asyncio.wait_for(call, COMPILE_SECONDS)
        except TimeoutError:
            raise too_slow() from None

    # --- tokenizer ------------------------------------------------------------------------------------------------

    async def tokenize(self, texts: list[str], options: PromptOptions) -> list[list[int]]:
        """Exactly what `submit` would do with the texts: an empty one is the token that it would start from.

        Raises RequestError with paths from TokenizeRequest.
        """
        violations = Violations()
        for name in ("truncate_to_fit", "truncate_to_last"):
            if getattr(options, name) is not None:
                violations.add(f"prompt_options.{name}", "does not apply to Tokenize")
        violations.raise_if_any()
        self._inputs.check_texts(texts)
        if options.split_special_tokens is None:
            split = self.model.tokenizer.split_special_tokens
            options = PromptOptions(add_special_tokens=options.add_special_tokens, split_special_tokens=split)
        bos = self.model.bos_token_id
        of_nothing = [] if bos is None else [bos]
        size = sum(map(len, texts))
        found = await self._run_for_rpc(lambda: self._inputs.tokenize(texts, options), size > INLINE_CHARACTERS)
        return [token_ids or of_nothing for token_ids in found]

    async def detokenize(self, token_ids: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        """The texts of lists of ids. Raises RequestError with paths from DetokenizeRequest."""
        self._inputs.check_token_id_lists(token_ids)

        def decode() -> list[str]:
            tokenizer = self.model.tokenizer
            return [tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in token_ids]

        return await self._run_for_rpc(decode, sum(map(len, token_ids)) > INLINE_CHARACTERS)

    async def _tokenize(self, checked: CheckedRequest) -> list[list[int]]:
        if sum(map(len, checked.texts)) + sum(map(len, checked.words)) <= INLINE_CHARACTERS:
            return self._inputs.tokenize_all(checked)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._inputs.tokenize_all, checked)

    async def _run_for_rpc(self, function: Callable[[], _T], in_thread: bool) -> _T:
        if not in_thread:
            return function()
        if self._num_rpc_calls >= MAX_TOKENIZER_CALLS:
            raise failure(Reason.QUEUE_FULL)
        self._num_rpc_calls += 1
        call = asyncio.get_running_loop().run_in_executor(self._rpc_thread, function)
        call.add_done_callback(self._rpc_call_ended)
        return await call

    def _rpc_call_ended(self, call: asyncio.Future[_T]) -> None:
        self._num_rpc_calls -= 1

    # --- the rest ---------------------------------------------------------------------------------------------------

    async def reset_prefix_cache(self) -> int:
        """Blocks freed. Raises RequestError when there is no core."""
        if not self._core_is_up:
            raise failure(Reason.ENGINE_STARTING if self.info is None else Reason.ENGINE_RESTARTED)
        return await self._client.reset_prefix_cache()

    def close(self) -> None:
        """Ends the threads. Requests in flight are the caller's to end first."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._rpc_thread.shutdown(wait=False, cancel_futures=True)
        self._grammar_thread.shutdown(wait=False, cancel_futures=True)
