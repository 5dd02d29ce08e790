"""From a GenerateRequest to what the engine core takes: validation, tokenization, defaults.

Steps, so that a server can run the middle ones in a thread: `check` needs no tokens and costs well under 5 ms whatever
the request holds; `compile` and `tokenize` are pure but for caches; `finish` looks at lengths and builds the core's
requests.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import replace

import msgspec
import numpy as np

from octavo.config import Limits
from octavo.errors import Reason, RequestError
from octavo.frontend.beams import check_engine_can_search, is_beam_search
from octavo.frontend.defaults import resolve_output, resolve_params, resolve_prompt_options
from octavo.frontend.guidance import check_branches, check_engine_can_guide, is_guided
from octavo.frontend.healing import Healing, TokenHealer
from octavo.frontend.lengths import Context, LengthProblems, Lengths, resolve_lengths, truncate
from octavo.frontend.model import FrontendModel
from octavo.frontend.param_checks import END_AS_BAD_WORD, end_token_ids
from octavo.frontend.request_checks import RequestChecker
from octavo.frontend.requests import (
    Arrival,
    CheckedRequest,
    ProcessedPrompt,
    ProcessedRequest,
    bytes_per_token,
    processed_request,
)
from octavo.frontend.structured import ConstraintCompiler
from octavo.frontend.validation import Violations, check_token_ids
from octavo.ipc import EngineCoreRequest
from octavo.step import LogprobSpec
from octavo.tokenizer import TokenizerError
from octavo.types import (
    CacheOptions,
    EngineInfo,
    GenerateRequest,
    GenerationParams,
    LogprobKind,
    OutputOptions,
    Prompt,
    PromptOptions,
    ResolvedOptions,
)


class InputProcessor:
    """Validates and resolves requests. Owns the keys of this front-end's sequences."""

    def __init__(self, model: FrontendModel, limits: Limits, *, cache_secret: bytes) -> None:
        self._model = model
        self._limits = limits
        self._cache_secret = cache_secret
        self._checker = RequestChecker(model, limits)
        self._constraints = ConstraintCompiler(model.tokenizer)
        self._healer = TokenHealer(model.tokenizer)
        self._context = Context(model.spec.n_positions, model.max_model_len)
        self._next_key = 1

    def process(
        self,
        request: GenerateRequest,
        *,
        arrival_time: float,
        tenant: str = "",
        deadline: float | None = None,
        deadline_is_client: bool = False,
        streaming: bool = True,
        info: EngineInfo | None = None,
    ) -> ProcessedRequest:
        """All steps at once. Times are monotonic seconds.

        `streaming` false also estimates the size of the whole answer; `info` lets requests be refused that no empty
        KV-cache could hold. Raises RequestError with every violation that the failing step found.
        """
        checked = self.check(request)
        self.compile(checked)
        token_ids = self.tokenize_all(checked)
        arrival = Arrival(arrival_time, tenant, deadline, deadline_is_client)
        return self.finish(checked, token_ids, arrival, streaming=streaming, info=info)

    def check(self, request: GenerateRequest) -> CheckedRequest:
        """Raises RequestError: INVALID_FIELD, UNSUPPORTED_FIELD, MODEL_NOT_FOUND, REQUEST_TOO_LARGE."""
        params = self._checker.check(request)
        options = resolve_prompt_options(request.prompt_options, self._model.tokenizer.split_special_tokens)
        return CheckedRequest(request, params, resolve_output(request.output), options)

    def tokenize(self, texts: list[str], options: PromptOptions) -> list[list[int]]:
        """May run in any thread. Raises RequestError (INTERNAL) when the tokenizer fails."""
        if not texts:
            return []
        try:
            return self._model.tokenizer.encode(
                texts,
                add_special_tokens=options.add_special_tokens is not False,
                split_special_tokens=bool(options.split_special_tokens),
            )
        except TokenizerError as error:
            raise RequestError(Reason.INTERNAL, "the prompt could not be tokenized") from error

    def tokenize_all(self, checked: CheckedRequest) -> list[list[int]]:
        """Ids of `checked.texts`, `checked.words` and `checked.negative_texts`. May run in any thread; raises as
        `tokenize`."""
        options = checked.prompt_options
        plain = msgspec.structs.replace(options, add_special_tokens=False)
        words = self.tokenize(checked.words, plain)
        return self.tokenize(checked.texts, options) + words + self.tokenize(checked.negative_texts, options)

    def is_compiled(self, checked: CheckedRequest) -> bool:
        """Whether `compile` has nothing to do."""
        constraint = checked.params.structured_output
        return constraint is None or self._constraints.knows(constraint)

    def compile(self, checked: CheckedRequest) -> None:
        """May run in any thread. Raises RequestError when the structured output does not compile: INVALID_FIELD,
        CONSTRAINT_TOO_COMPLEX."""
        if checked.params.structured_output is not None:
            self._constraints.check(checked.params.structured_output)

    def finish(
        self,
        checked: CheckedRequest,
        token_ids: list[list[int]],
        arrival: Arrival,
        *,
        streaming: bool,
        info: EngineInfo | None,
    ) -> ProcessedRequest:
        """`token_ids`: from `tokenize_all`. Raises RequestError: CONTEXT_LENGTH_EXCEEDED, INVALID_FIELD,
        REQUEST_TOO_LARGE, RESPONSE_TOO_LARGE."""
        first_word, end = len(checked.texts), len(checked.texts) + len(checked.words)
        for_core = self._with_bad_words(checked, token_ids[first_word:end])
        prompts, lengths = self._prompts_and_lengths(checked, token_ids)
        negatives = self._negatives(checked, prompts, token_ids[end:]) if is_guided(checked.params) else None
        if negatives is not None:
            check_branches(prompts, lengths, negatives, self._context)
        if info is not None:
            self._check_fits_cache(lengths, info)
            if negatives is not None:
                check_engine_can_guide(prompts, lengths, negatives, info)
            if is_beam_search(checked.params):
                pairs = [(len(ids), length.total) for ids, length in zip(prompts, lengths, strict=True)]
                check_engine_can_search(checked.params, pairs, info)
        if not streaming:
            self._check_answer_size(checked, prompts, lengths)
        processed = []
        for i, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
            seed = self._seed(checked.params)
            core_request = self._core_request(for_core, ids, length, seed or 0, arrival)
            if negatives is not None:
                negative = np.asarray(negatives[i], dtype="<i4").tobytes()
                core_request = msgspec.structs.replace(core_request, negative_prompt_token_ids=negative)
            text = None if checked.extensions is None else checked.extensions[i]
            text = self._prompt_text(checked, i) if checked.output.include_prompt else text
            processed.append(ProcessedPrompt(index=i, token_ids=ids, text=text, seed=seed, core_request=core_request))
        resolved = self._resolved(checked, prompts, lengths) if checked.output.return_resolved_options else None
        return processed_request(checked, processed, arrival, resolved)

    def plan_healing(self, checked: CheckedRequest, token_ids: list[list[int]], info: EngineInfo | None) -> Healing:
        """What token_healing means for the prompts. `token_ids`: from `tokenize_all`. May run in any thread.

        Raises RequestError as `finish` for lengths.
        """
        prompts, _ = self._prompts_and_lengths(checked, token_ids)
        try:
            plans = [self._healer.plan(ids, checked.prompt_options) for ids in prompts]
        except TokenizerError as error:
            raise RequestError(Reason.INTERNAL, "the prompt could not be tokenized") from error
        healing = Healing(checked, plans, token_ids[len(checked.texts) :])
        _, lengths = self._prompts_and_lengths(*self.healed(healing, {}))
        if info is not None:
            self._check_fits_cache(lengths, info)
        return healing

    def healing_request(self, healing: Healing, arrival: Arrival) -> ProcessedRequest | None:
        """One greedy step for each prompt with something to choose; None if there is none."""
        step = replace(healing.checked, output=resolve_output(OutputOptions(return_text=False)))
        prompts = []
        for index, plan in enumerate(healing.plans):
            if not plan.candidates:
                continue
            own = GenerationParams(
                max_new_tokens=1,
                do_sample=False,
                num_return_sequences=1,
                num_beams=1,
                guidance_scale=1.0,
                logit_bias=plan.biases,
            )
            step = replace(step, params=resolve_params(own, self._model.checkpoint_params))
            ids = plan.token_ids[:-1]
            core_request = self._core_request(step, ids, Lengths(len(ids) + 1, False), 0, arrival)
            prompts.append(ProcessedPrompt(index=index, token_ids=ids, text=None, seed=None, core_request=core_request))
        return processed_request(step, prompts, arrival, None) if prompts else None

    def healed(self, healing: Healing, chosen: dict[int, int]) -> tuple[CheckedRequest, list[list[int]]]:
        """What `finish` takes: the request with healed prompts. `chosen`: by prompt, the tokens of
        `healing_request`."""
        healed = [plan.healed(chosen.get(i)) for i, plan in enumerate(healing.plans)]
        extensions = [self._healer.extension(plan, ids) for plan, ids in zip(healing.plans, healed, strict=True)]
        request = msgspec.structs.replace(healing.checked.request, prompts=[Prompt(token_ids=ids) for ids in healed])
        return replace(healing.checked, request=request, extensions=extensions), healing.others

    def check_texts(self, texts: list[str]) -> None:
        """Of a TokenizeRequest. Raises RequestError."""
        violations = Violations()
        if len(texts) > self._limits.max_tokenize_inputs:
            violations.add("texts", f"has {len(texts)} texts, the limit is {self._limits.max_tokenize_inputs}")
        else:
            self._checker.check_texts(violations, "texts", texts)
        violations.raise_if_any()

    def check_token_id_lists(self, token_ids: list[list[int]]) -> None:
        """Of a DetokenizeRequest. Raises RequestError."""
        violations = Violations()
        if len(token_ids) > self._limits.max_tokenize_inputs:
            violations.add("token_ids", f"has {len(token_ids)} lists, the limit is {self._limits.max_tokenize_inputs}")
        else:
            vocab_size, limit = self._model.spec.vocab_size, self._limits.max_prompt_bytes
            for i, ids in enumerate(token_ids):
                check_token_ids(violations, f"token_ids[{i}].ids", ids, vocab_size, limit)
        violations.raise_if_any()

    def _with_bad_words(self, checked: CheckedRequest, words: list[list[int]]) -> CheckedRequest:
        """With the bad words among `bad_words_ids`. `words`: ids of `checked.words`."""
        if not words:
            return checked
        violations = Violations()
        ends, longest = end_token_ids(checked.params), self._limits.max_token_sequence_length
        for i, token_ids in enumerate(words):
            path = f"params.bad_words[{i // 2}]"
            if not token_ids:
                violations.add(path, "has no tokens")
            elif len(token_ids) > longest:
                violations.add(path, f"has {len(token_ids)} tokens, the limit is {longest}")
            elif len(token_ids) == 1 and token_ids[0] in ends:
                violations.add(path, END_AS_BAD_WORD)
        violations.raise_if_any()
        params = checked.params
        together = [*params.bad_words_ids, *words]
        return replace(checked, params=msgspec.structs.replace(params, bad_words=[], bad_words_ids=together))

    def _prompts_and_lengths(
        self, checked: CheckedRequest, token_ids: list[list[int]]
    ) -> tuple[list[list[int]], list[Lengths]]:
        problems = LengthProblems()
        of_texts = iter(token_ids)
        prompts, lengths = [], []
        for i, prompt in enumerate(checked.request.prompts):
            if prompt.token_ids is not None:
                path, ids = f"prompts[{i}].token_ids", list(prompt.token_ids)
            else:
                path, ids = f"prompts[{i}].text", next(of_texts) if prompt.text else []
                bos = checked.params.bos_token_id
                ids = ids or ([] if bos is None else [bos])
            ids = truncate(ids, checked.params, checked.prompt_options, self._context)
            prompts.append(ids)
            lengths.append(resolve_lengths(problems, i, path, len(ids), checked.params, self._context))
        problems.raise_if_any()
        return prompts, lengths

    def _negatives(
        self, checked: CheckedRequest, prompts: list[list[int]], token_ids: list[list[int]]
    ) -> list[list[int]]:
        """What each prompt's negative branch begins with. `token_ids`: of `checked.negative_texts`."""
        negative, bos = checked.params.negative_prompt, checked.params.bos_token_id
        if negative is None:
            return [ids[-1:] for ids in prompts]
        ids = negative.token_ids if negative.token_ids is not None else token_ids[0] if token_ids else []
        return [ids or ([] if bos is None else [bos])] * len(prompts)

    def _check_fits_cache(self, lengths: list[Lengths], info: EngineInfo) -> None:
        capacity = info.num_blocks * info.block_size
        needed = max(length.total for length in lengths) - 1  # the last token is never fed back
        if needed > capacity:
            raise RequestError(
                Reason.REQUEST_TOO_LARGE,
                f"a sequence of {needed} tokens can never fit the KV-cache, which holds {capacity}",
                metadata={"max": str(capacity), "got": str(needed)},
            )

    def _check_answer_size(self, checked: CheckedRequest, prompts: list[list[int]], lengths: list[Lengths]) -> None:
        """Estimates a unary answer (api.md, section 3): refused before it is computed rather than after."""
        output, limit = checked.output, self._limits.max_send_message_bytes
        per_token = bytes_per_token(output)
        num_sequences = checked.params.num_return_sequences or 1
        size = 0
        for i, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
            size += num_sequences * per_token * (length.total - len(ids))
            if output.include_prompt:
                size += num_sequences * len(self._prompt_text(checked, i).encode())
            if output.return_prompt_token_ids:
                size += 3 * len(ids)
            if output.prompt_logprobs is not None:
                size += len(ids) * (6 + 7 * output.prompt_logprobs)
        if size > limit:
            raise RequestError(
                Reason.RESPONSE_TOO_LARGE,
                f"the answer may take {size} bytes, the limit is {limit}; stream it instead",
                metadata={"max": str(limit), "got": str(size)},
            )

    def _core_request(
        self, checked: CheckedRequest, token_ids: list[int], length: Lengths, seed: int, arrival: Arrival
    ) -> EngineCoreRequest:
        # Stop strings are matched here, on text, except those of a beam search, which goes on from other beams.
        params, output, cache = checked.params, checked.output, checked.request.cache
        num_sequences = params.num_return_sequences or 1
        key = self._next_key
        self._next_key += num_sequences
        logprobs = None
        if output.logprobs is not None:
            kind = output.logprob_kind or LogprobKind.RAW_LOGPROB
            logprobs = LogprobSpec(num_top=output.logprobs, kind=kind, token_ids=output.logprob_token_ids)
        return EngineCoreRequest(
            key=key,
            num_sequences=num_sequences,
            prompt_token_ids=np.asarray(token_ids, dtype="<i4").tobytes(),
            params=params if is_beam_search(params) else msgspec.structs.replace(params, stop_strings=[]),
            max_total_tokens=length.total,
            length_is_context=length.is_context,
            eos_token_ids=[] if params.ignore_eos else params.eos_token_id or [],
            stop_token_ids=params.stop_token_ids,
            seed=seed,
            priority=checked.request.priority,
            cache_salt=self._salt(arrival.tenant, cache.cache_salt),
            bypass_prefix_cache=bool(cache.bypass_prefix_cache),
            arrival_time=arrival.time,
            deadline=arrival.deadline,
            deadline_is_client=arrival.deadline_is_client,
            logprobs=logprobs,
            prompt_logprobs=output.prompt_logprobs,
        )

    def _seed(self, params: GenerationParams) -> int | None:
        """One per prompt; None when nothing is sampled."""
        if not params.do_sample:
            return None
        return secrets.randbits(64) if params.seed is None else params.seed

    def _salt(self, tenant: str, client_salt: str) -> str:
        """Never the client's own: one chosen by the caller alone would let it probe another tenant's cache."""
        if not tenant and not client_salt:
            return ""
        message = msgspec.json.encode([tenant, client_salt])
        return hmac.new(self._cache_secret, message, hashlib.sha256).hexdigest()

    def _prompt_text(self, checked: CheckedRequest, index: int) -> str:
        """The prompt as it was sent, before truncation."""
        prompt = checked.request.prompts[index]
        if prompt.token_ids is None:
            return prompt.text or ""
        skip = bool(checked.output.skip_special_tokens)
        return self._model.tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)

    def _resolved(self, checked: CheckedRequest, prompts: list[list[int]], lengths: list[Lengths]) -> ResolvedOptions:
        params = checked.params
        new_tokens = {length.total - len(ids) for ids, length in zip(prompts, lengths, strict=True)}
        if params.max_length is None and len(new_tokens) == 1:
            params = msgspec.structs.replace(params, max_new_tokens=new_tokens.pop())
        cache = checked.request.cache
        return ResolvedOptions(
            params=params,
            output=checked.output,
            prompt_options=checked.prompt_options,
            cache=CacheOptions(bypass_prefix_cache=bool(cache.bypass_prefix_cache), cache_salt=cache.cache_salt),
        )
