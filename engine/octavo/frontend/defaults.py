"""What a checkpoint's generation_config.json means for requests that leave a field unset.

A field resolves to the request's value, else the checkpoint's, else transformers' global default. A value that we
cannot honour stops the load with its name, as it would change every text without anybody asking.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import msgspec

from octavo.config import Limits
from octavo.errors import RequestError, StartupError
from octavo.frontend.param_checks import ParamChecker, check_token_rules
from octavo.frontend.validation import Violations, show
from octavo.frontend.watermarks import resolve_watermark, watermark_of_file
from octavo.generation_table import CONFIG, Ignored, Rejected
from octavo.types import (
    PARAM_NAMES,
    EarlyStopping,
    ExponentialDecay,
    GenerationParams,
    LogprobKind,
    OutputOptions,
    PromptOptions,
    SequenceBias,
    StopStringOutput,
    Watermark,
)

_log = logging.getLogger(__name__)

GLOBAL_DEFAULTS: Final = GenerationParams(
    ignore_eos=False,
    stop_string_output=StopStringOutput.TOKENS,
    stop_strings_ignore_prompt=False,
    do_sample=False,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
    typical_p=1.0,
    num_return_sequences=1,
    num_beams=1,
    length_penalty=1.0,
    early_stopping=EarlyStopping.FALSE,
    epsilon_cutoff=0.0,
    eta_cutoff=0.0,
    repetition_penalty=1.0,
    encoder_repetition_penalty=1.0,
    no_repeat_ngram_size=0,
    encoder_no_repeat_ngram_size=0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    remove_invalid_values=False,
    renormalize_logits=False,
    guidance_scale=1.0,
    token_healing=False,
    prompt_lookup_num_tokens=0,
    max_matching_ngram_size=2,
)
"""transformers 5.23's, for the fields that we support; lengths depend on the prompt and are resolved with it."""
DEFAULT_NEW_TOKENS: Final = 20
DEFAULT_STREAM_DELAY: Final = 0.1
"""Seconds."""

_EXTENSIONS: Final = frozenset(
    {
        "stop_token_ids",
        "ignore_eos",
        "stop_string_output",
        "stop_strings_ignore_prompt",
        "seed",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
        "negative_prompt",
        "structured_output",
    }
)
"""Fields of GenerationParams that a GenerationConfig does not have."""
_FILE_FIELDS: Final = PARAM_NAMES - _EXTENSIONS
_EMPTY_IS_UNSET: Final = frozenset(
    field.name for field in msgspec.structs.fields(GenerationParams) if field.default_factory is not msgspec.NODEFAULT
)
_ENCODER_DECODER: Final = frozenset({"decoder_start_token_id", "is_encoder_decoder", "forced_decoder_ids"})


def checkpoint_params(raw: dict[str, Any], vocab_size: int, n_positions: int = 1024) -> GenerationParams:
    """What generation_config.json sets, as parameters. Raises StartupError (CHECKPOINT) naming the field."""
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if value is None or (value == [] and name == "eos_token_id"):
            continue
        if name in _FILE_FIELDS:
            values[name] = _from_file(name, value)
        elif name in _ENCODER_DECODER:
            _log.info("generation_config.json: %s is of encoder-decoder models and does nothing here", name)
        elif not _is_neutral(name, value):
            raise _unusable(name, f"= {show(value)} is not implemented; remove it from the file to serve without")
    params = GenerationParams(**values)
    violations = Violations()
    ParamChecker(Limits(), vocab_size, n_positions).check(violations, params)
    if not violations:
        check_token_rules(violations, GenerationParams(), params)
    try:
        violations.raise_if_any()
    except RequestError as error:
        first = error.violations[0]
        raise _unusable(first.field.removeprefix("params."), first.description) from None
    return params


def default_params(checkpoint: GenerationParams) -> GenerationParams:
    """What applies when a request sets nothing: the checkpoint's values over the global defaults."""
    values = _set_fields(GLOBAL_DEFAULTS) | _set_fields(checkpoint)
    if "max_new_tokens" not in values and "max_length" not in values:
        values["max_new_tokens"] = DEFAULT_NEW_TOKENS
    return GenerationParams(**values)


def resolve_params(request: GenerationParams, checkpoint: GenerationParams) -> GenerationParams:
    """Every default but the lengths' filled in. No checks; lengths stay as they were set.

    Of the pairs max_new_tokens/max_length and min_new_tokens/min_length, one that the request sets replaces either of
    the checkpoint. `do_sample` is false at temperature 0, which is greedy.
    """
    own = _set_fields(request)
    inherited = _set_fields(checkpoint)
    for pair in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if any(name in own for name in pair):
            inherited = {name: value for name, value in inherited.items() if name not in pair}
    if own.get("ignore_eos"):
        inherited.pop("eos_token_id", None)
    values = _set_fields(GLOBAL_DEFAULTS) | inherited | own
    if values["temperature"] == 0:
        values["do_sample"] = False
    if "watermarking_config" in values:
        values["watermarking_config"] = resolve_watermark(values["watermarking_config"])
    return GenerationParams(**values)


def resolve_output(output: OutputOptions) -> OutputOptions:
    return OutputOptions(
        include_prompt=bool(output.include_prompt),
        return_text=output.return_text is not False,
        return_token_ids=output.return_token_ids is not False,
        return_prompt_token_ids=bool(output.return_prompt_token_ids),
        skip_special_tokens=output.skip_special_tokens is not False,
        logprobs=output.logprobs,
        logprob_kind=output.logprob_kind or LogprobKind.RAW_LOGPROB,
        logprob_token_ids=output.logprob_token_ids,
        prompt_logprobs=output.prompt_logprobs,
        stream_min_tokens=output.stream_min_tokens or 1,
        stream_max_delay=DEFAULT_STREAM_DELAY if output.stream_max_delay is None else output.stream_max_delay,
        return_resolved_options=bool(output.return_resolved_options),
    )


def resolve_prompt_options(options: PromptOptions, split_special_tokens: bool) -> PromptOptions:
    split = options.split_special_tokens
    return PromptOptions(
        add_special_tokens=options.add_special_tokens is not False,
        split_special_tokens=split_special_tokens if split is None else split,
        truncate_to_fit=bool(options.truncate_to_fit),
        truncate_to_last=options.truncate_to_last,
    )


def _set_fields(params: GenerationParams) -> dict[str, Any]:
    """An empty list is a value only where None means unset: there it clears the checkpoint's."""
    fields = msgspec.structs.asdict(params).items()
    return {name: value for name, value in fields if value is not None and (value or name not in _EMPTY_IS_UNSET)}


def _from_file(name: str, value: Any) -> Any:
    """A value in our form; what stands in lists is checked later, with everything else."""
    if name in ("eos_token_id", "forced_eos_token_id"):
        return value if isinstance(value, list) else [value]
    if name in ("suppress_tokens", "begin_suppress_tokens"):
        return _list(name, value, int)
    if name == "bad_words_ids":
        return _list(name, value, list)
    if name == "stop_strings":
        return _list(name, [value] if isinstance(value, str) else value, str)
    if name == "sequence_bias":
        pairs = _list(name, value, list)
        if not all(len(pair) == 2 and isinstance(pair[0], list) for pair in pairs):
            raise _unusable(name, "must be a list of pairs, each of token ids and a bias")
        return [SequenceBias(token_ids, bias) for token_ids, bias in pairs]
    if name == "exponential_decay_length_penalty":
        if len(_list(name, value, (int, float))) != 2:
            raise _unusable(name, f"must be a pair, not {show(value)}")
        return ExponentialDecay(*value)
    if name == "early_stopping":
        return _early_stopping(value)
    if name == "watermarking_config":
        return _watermark(value)
    return value


def _list(name: str, value: Any, kind: type | tuple[type, ...]) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        names = " or ".join(entry.__name__ for entry in (kind if isinstance(kind, tuple) else (kind,)))
        raise _unusable(name, f"must be a list of {names}, not {show(value)}")
    return value


def _early_stopping(value: Any) -> EarlyStopping:
    for known, meaning in ((False, EarlyStopping.FALSE), (True, EarlyStopping.TRUE), ("never", EarlyStopping.NEVER)):
        if value is known or value == known == "never":
            return meaning
    raise _unusable("early_stopping", f'must be true, false or "never", not {show(value)}')


def _watermark(value: Any) -> Watermark:
    try:
        return watermark_of_file(value)
    except (ValueError, RequestError) as error:
        raise _unusable("watermarking_config", str(error)) from None


def _is_neutral(name: str, value: Any) -> bool:
    """Whether the value of a field that nothing honours makes no difference."""
    entry = CONFIG.get(name)
    if entry is None or isinstance(entry, Ignored):
        return entry is not None
    return value is False or value == [] or (isinstance(entry, Rejected) and value == entry.neutral)


def _unusable(field: str, why: str) -> StartupError:
    return StartupError(StartupError.CHECKPOINT, f"generation_config.json: {field} {why}")
