"""A request on its way through a front-end: as it came, checked, and ready for the core."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgspec

from octavo.frontend.beams import num_rows
from octavo.ipc import EngineCoreRequest
from octavo.types import GenerateRequest, GenerationParams, OutputOptions, PromptOptions, ResolvedOptions


class ProcessedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, ready for the core."""

    index: int
    """Position in the request."""
    token_ids: list[int]
    """After truncation."""
    text: str | None
    """What stands before the generated text: the prompt with include_prompt, what token healing added without."""
    seed: int | None
    """None when nothing is sampled."""
    core_request: EngineCoreRequest

    @property
    def keys(self) -> range:
        return range(self.core_request.key, self.core_request.key + self.core_request.num_sequences)


class ProcessedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that passed all checks."""

    request_id: str
    """The client's, or one made up."""
    tenant: str
    prompts: list[ProcessedPrompt]
    params: GenerationParams
    """Resolved, but for lengths that differ by prompt."""
    output: OutputOptions
    """Resolved."""
    resolved: ResolvedOptions | None
    """Set if the request asked for it."""
    arrival_time: float
    deadline: float | None
    deadline_is_client: bool

    @property
    def core_requests(self) -> list[EngineCoreRequest]:
        return [prompt.core_request for prompt in self.prompts]

    @property
    def num_sequences(self) -> int:
        """That are returned."""
        return len(self.prompts) * self.prompts[0].core_request.num_sequences

    @property
    def num_rows(self) -> int:
        """Sequences that run at once: a beam search has more than it returns."""
        return len(self.prompts) * num_rows(self.params)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a request came, from whom, and until when it may take. Monotonic seconds."""

    time: float
    tenant: str = ""
    deadline: float | None = None
    deadline_is_client: bool = False


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that is sound as far as can be told without tokens."""

    request: GenerateRequest
    params: GenerationParams
    output: OutputOptions
    prompt_options: PromptOptions
    extensions: list[str] | None = None
    """What token healing added to the text of each prompt."""

    @property
    def texts(self) -> list[str]:
        """What is to be tokenized; empty texts are not."""
        return [prompt.text for prompt in self.request.prompts if prompt.text]

    @property
    def words(self) -> list[str]:
        """Bad words: each as written, then with a space in front."""
        return [text for word in self.params.bad_words for text in (word, " " + word)]

    @property
    def negative_texts(self) -> list[str]:
        """The negative prompt, if it is a text."""
        negative = self.params.negative_prompt
        return [negative.text] if negative is not None and negative.text else []


def processed_request(
    checked: CheckedRequest, prompts: list[ProcessedPrompt], arrival: Arrival, resolved: ResolvedOptions | None
) -> ProcessedRequest:
    return ProcessedRequest(
        request_id=checked.request.request_id or f"req-{secrets.token_hex(8)}",
        tenant=arrival.tenant,
        prompts=prompts,
        params=checked.params,
        output=checked.output,
        resolved=resolved,
        arrival_time=arrival.time,
        deadline=arrival.deadline,
        deadline_is_client=arrival.deadline_is_client,
    )


def bytes_per_token(output: OutputOptions) -> int:
    """Of an answer on the wire, estimated: text 8, id 3, and 6 + 7 N for N logprobs."""
    size = 8 if output.return_text else 0
    size += 3 if output.return_token_ids else 0
    if output.logprobs is not None:
        size += 6 + 7 * output.logprobs + 4 * len(output.logprob_token_ids)
    return size
