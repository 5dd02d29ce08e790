"""Rules and defaults of `watermarking_config`: transformers' WatermarkingConfig, SynthIDTextWatermarkingConfig."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from octavo.frontend.validation import Range, Violations, check_ranges, show
from octavo.types import GreenListWatermark, SeedingScheme, SynthIdWatermark, Watermark

GREEN_LIST_DEFAULTS: Final = GreenListWatermark(
    greenlist_ratio=0.25, bias=2.0, hashing_key=15485863, seeding_scheme=SeedingScheme.LEFTHASH, context_width=1
)
_GREEN_LIST_RANGES: Final = {
    "greenlist_ratio": Range(0, 1, low_open=True, high_open=True),
    "bias": Range(-1e30, 1e30),
    "hashing_key": Range(0, 2**63 - 1, integer=True),
    "context_width": Range(1, 64, integer=True),
}
_SYNTH_ID_DEFAULTS: Final = {
    "context_history_size": 1024,
    "sampling_table_seed": 0,
    "sampling_table_size": 2**16,
    "skip_first_ngram_calls": False,
}
_SYNTH_ID_RANGES: Final = {
    "ngram_len": Range(2, 64, integer=True),
    "context_history_size": Range(1, 4096, integer=True),
    "sampling_table_seed": Range(-(2**63), 2**63 - 1, integer=True),
    "sampling_table_size": Range(1, 2**24, integer=True),
}
_KEY: Final = Range(-(2**63), 2**63 - 1, integer=True)
_MAX_KEYS: Final = 64


def check_watermark(violations: Violations, path: str, mark: Watermark) -> None:
    green, synth = mark.green_list, mark.synth_id
    if (green is None) == (synth is None):
        violations.add(path, "must have either green_list or synth_id")
    elif green is not None:
        _check_green_list(violations, f"{path}.green_list", green)
    elif synth is not None:
        _check_synth_id(violations, f"{path}.synth_id", synth)


def _check_green_list(violations: Violations, path: str, green: GreenListWatermark) -> None:
    check_ranges(violations, path, green, _GREEN_LIST_RANGES)
    if not isinstance(green.seeding_scheme, SeedingScheme | None):
        violations.add(f"{path}.seeding_scheme", f"has no value {show(green.seeding_scheme)}")


def _check_synth_id(violations: Violations, path: str, synth: SynthIdWatermark) -> None:
    check_ranges(violations, path, synth, _SYNTH_ID_RANGES)
    if not isinstance(synth.skip_first_ngram_calls, bool | None):
        violations.add(
            f"{path}.skip_first_ngram_calls", f"must be true or false, not {show(synth.skip_first_ngram_calls)}"
        )
    if not 1 <= len(synth.keys) <= _MAX_KEYS:
        violations.add(f"{path}.keys", f"has {len(synth.keys)} keys, must have 1 to {_MAX_KEYS}")
        return
    for i, key in enumerate(synth.keys):
        if (problem := _KEY.problem(key)) is not None:
            violations.add(f"{path}.keys[{i}]", problem)
            return


def resolve_watermark(mark: Watermark) -> Watermark:
    """With every default filled in."""
    if mark.green_list is not None:
        own = {name: value for name, value in msgspec.structs.asdict(mark.green_list).items() if value is not None}
        return Watermark(green_list=msgspec.structs.replace(GREEN_LIST_DEFAULTS, **own))
    if mark.synth_id is not None:
        own = {name: value for name, value in msgspec.structs.asdict(mark.synth_id).items() if value is not None}
        return Watermark(synth_id=SynthIdWatermark(**(_SYNTH_ID_DEFAULTS | own)))
    return mark


def watermark_of_file(value: Any) -> Watermark:
    """What generation_config.json says, in transformers' form. Raises ValueError with a description."""
    if not isinstance(value, dict):
        raise ValueError(f"must be an object, not {show(value)}")
    entries = {name: entry for name, entry in value.items() if not (name == "debug_mode" and entry is False)}
    if (scheme := entries.get("seeding_scheme")) is not None:
        if scheme not in ("lefthash", "selfhash"):
            raise ValueError(f"has no seeding_scheme {show(scheme)}")
        entries["seeding_scheme"] = SeedingScheme[scheme.upper()]
    try:
        if "ngram_len" in entries:
            mark = Watermark(synth_id=SynthIdWatermark(**entries))
        else:
            mark = Watermark(green_list=GreenListWatermark(**entries))
    except TypeError as error:
        raise ValueError(f"has entries of neither scheme: {error}") from None
    violations = Violations()
    check_watermark(violations, "watermarking_config", mark)
    violations.raise_if_any()
    return mark
