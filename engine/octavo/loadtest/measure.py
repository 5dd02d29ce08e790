"""From records to numbers. Pure functions; definitions are those of vLLM's benchmark (vllm/benchmarks/serve.py).

TTFT: from sending to the first message that brings tokens. E2EL: to the last such message. TPOT: (E2EL - TTFT) /
(output tokens - 1), of requests with at least two tokens. ITL: the gap between two messages of a sequence that bring
tokens; a message with several tokens ends one gap, not several, and `tokens_per_message` says how many they bring.
Percentiles interpolate linearly; standard deviations are of the population. Failed requests are in none of these.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

OK: Final = "OK"
UNFINISHED: Final = "UNFINISHED"
"""Code of a request that the end of the run cut short: neither completed nor failed."""
REJECTED: Final = "RESOURCE_EXHAUSTED"
"""Code of a request that the server shed."""
SLO_METRICS: Final = ("ttft", "tpot", "e2el")
PERCENTILES: Final = (90, 95, 99)


@dataclass(slots=True)
class Record:
    """One request. Times are in seconds since the start of the point. State: belongs to the task that sends it."""

    index: int
    scheduled: float | None
    """When it should have been sent; None in a closed loop."""
    sent: float = 0.0
    ended: float = 0.0
    code: str = UNFINISHED
    """OK, UNFINISHED or the name of a gRPC status code."""
    reason: str = ""
    message: str = ""
    wanted: int = 0
    """Output tokens asked for."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    runs: list[list[tuple[float, int]]] = field(default_factory=list)
    """For each sequence, (time, tokens) of the messages that brought some."""

    @property
    def ok(self) -> bool:
        return self.code == OK

    @property
    def failed(self) -> bool:
        return self.code not in (OK, UNFINISHED)

    @property
    def output_tokens(self) -> int:
        return sum(tokens for run in self.runs for _, tokens in run)

    @property
    def ttft(self) -> float:
        return min((run[0][0] for run in self.runs), default=self.ended) - self.sent

    @property
    def e2el(self) -> float:
        return max((run[-1][0] for run in self.runs), default=self.ended) - self.sent

    @property
    def tpot(self) -> float | None:
        """None where there is no second token. Of a request with several sequences: of the mean sequence."""
        per_sequence = self.output_tokens / max(1, len(self.runs))
        return (self.e2el - self.ttft) / (per_sequence - 1) if per_sequence > 1 else None

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for run in self.runs for (earlier, _), (later, _) in itertools.pairwise(run)]

    @property
    def delay(self) -> float:
        """By how much it was sent late: 0 in a closed loop."""
        return 0.0 if self.scheduled is None else max(0.0, self.sent - self.scheduled)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one metric, in milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: tuple[float, ...]
    """Those of PERCENTILES."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution | None:
        """None of nothing."""
        if not seconds:
            return None
        values = np.asarray(seconds, np.float64) * 1e3
        percentiles = tuple(float(value) for value in np.percentile(values, PERCENTILES))
        return cls(float(values.mean()), float(np.median(values)), float(values.std()), percentiles)

    def named(self, metric: str) -> dict[str, float]:
        """With the names that vLLM's JSON has: mean_ttft_ms, p99_ttft_ms."""
        named = {"mean": self.mean, "median": self.median, "std": self.std}
        named |= {f"p{p}": value for p, value in zip(PERCENTILES, self.percentiles, strict=True)}
        return {f"{name}_{metric}_ms": value for name, value in named.items()}


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one point. Throughputs are per second of `duration`, from the start to the last answer, the tail included."""

    duration: float
    completed: int
    failed: int
    unfinished: int
    failures: dict[str, int]
    """CODE or CODE/REASON -> requests."""
    rejected: int
    total_input_tokens: int
    total_output_tokens: int
    total_cached_tokens: int
    short_outputs: int
    """Completed requests with fewer tokens than were asked for."""
    tokens_per_message: float
    request_throughput: float
    request_goodput: float | None
    """Completed requests per second within the SLO; None without one."""
    request_goodput_scheduled: float | None
    """The same with latencies that count from the scheduled time; None in a closed loop, too."""
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    """In the best second."""
    max_concurrent_requests: int
    """Most requests in flight at one instant, failed ones included."""
    in_flight_at_last_send: int
    """The last one included: near `max_concurrent_requests` where the server cannot keep up with the rate."""
    late_sends: int
    """More than LATE seconds after schedule."""
    metrics: dict[str, Distribution | None]
    """ttft, tpot, itl, e2el; of an open loop also ttft_scheduled, e2el_scheduled and send_delay; rejection."""


LATE: Final = 0.010
"""Seconds."""


def summarize(records: Sequence[Record], slo: dict[str, float], *, streamed: bool = True) -> Summary:
    """`slo`: metric -> milliseconds. Not `streamed`: there is one message, so TTFT, TPOT and ITL do not exist."""
    done = [record for record in records if record.ok]
    duration = max((record.ended for record in records), default=0.0)
    per_second = 1 / duration if duration > 0 else 0.0
    given, made = sum(record.prompt_tokens for record in done), sum(record.output_tokens for record in done)
    messages = sum(len(run) for record in done for run in record.runs)
    scheduled = any(record.scheduled is not None for record in records)
    good = sum(is_good(record, slo, 0.0) for record in done) * per_second if slo else None
    on_time = sum(is_good(record, slo, record.delay) for record in done) * per_second if slo and scheduled else None
    return Summary(
        duration=duration,
        completed=len(done),
        failed=sum(record.failed for record in records),
        unfinished=sum(record.code == UNFINISHED for record in records),
        failures=failures(records),
        rejected=sum(record.code == REJECTED for record in records),
        total_input_tokens=given,
        total_output_tokens=made,
        total_cached_tokens=sum(record.cached_tokens for record in done),
        short_outputs=sum(record.output_tokens < record.wanted for record in done),
        tokens_per_message=made / messages if messages else 0.0,
        request_throughput=len(done) * per_second,
        request_goodput=good,
        request_goodput_scheduled=on_time,
        output_throughput=made * per_second,
        total_token_throughput=(given + made) * per_second,
        max_output_tokens_per_s=best_second(done),
        max_concurrent_requests=peak_concurrency(records),
        in_flight_at_last_send=in_flight_at_last_send(records),
        late_sends=sum(record.delay > LATE for record in records),
        metrics=_metrics(records, done, scheduled=scheduled, streamed=streamed),
    )


def _metrics(
    records: Sequence[Record], done: Sequence[Record], *, scheduled: bool, streamed: bool
) -> dict[str, Distribution | None]:
    values: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": []}
    if streamed:
        values["ttft"] = [record.ttft for record in done]
        values["tpot"] = [record.tpot for record in done if record.tpot is not None]
        values["itl"] = [gap for record in done for gap in record.gaps]
    values["e2el"] = [record.e2el for record in done]
    if scheduled:
        values["ttft_scheduled"] = [record.ttft + record.delay for record in done] if streamed else []
        values["e2el_scheduled"] = [record.e2el + record.delay for record in done]
        values["send_delay"] = [record.delay for record in records]
    values["rejection"] = [record.ended - record.sent for record in records if record.code == REJECTED]
    return {name: Distribution.of(entries) for name, entries in values.items()}


def is_good(record: Record, slo: dict[str, float], delay: float) -> bool:
    """Whether a completed request is within the SLO (ms); `delay` seconds are added to TTFT and E2EL. A request with
    one token has a TPOT of 0."""
    measured = {"ttft": record.ttft + delay, "tpot": record.tpot or 0.0, "e2el": record.e2el + delay}
    return all(measured[name] * 1e3 <= limit for name, limit in slo.items())


def slo_met(summary: Summary, slo: dict[str, float]) -> bool:
    """Whether nothing failed and the 99th percentiles, counted from the schedule where there is one, are within."""
    if summary.failed or not summary.completed:
        return False
    for name, limit in slo.items():
        found = summary.metrics.get(f"{name}_scheduled") or summary.metrics[name]
        if found is not None and found.percentiles[PERCENTILES.index(99)] > limit:
            return False
    return True


def failures(records: Sequence[Record]) -> dict[str, int]:
    """CODE or CODE/REASON -> requests, most frequent first."""
    names = [f"{record.code}/{record.reason}".rstrip("/") for record in records if record.failed]
    return dict(collections.Counter(names).most_common())


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests in flight at one instant. One that ends when another is sent does not overlap it."""
    changes = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
    return int(max(np.cumsum([change for _, change in changes]), default=0))


def in_flight_at_last_send(records: Sequence[Record]) -> int:
    """Requests that were running when the last one was sent, itself included."""
    last = max((record.sent for record in records), default=0.0)
    return sum(record.sent <= last < record.ended for record in records)


def best_second(records: Sequence[Record]) -> float:
    """Most output tokens in one second, seconds counted from the first request's sending."""
    times = [(time, tokens) for record in records for run in record.runs for time, tokens in run]
    if not times:
        return 0.0
    begin = min(record.sent for record in records)
    seconds = np.asarray([time - begin for time, _ in times]).astype(np.int64)
    return float(np.bincount(seconds, weights=[tokens for _, tokens in times]).max())


def to_fields(record: Record) -> dict[str, Any]:
    """As JSON has it."""
    return dataclasses.asdict(record)


def from_fields(fields: dict[str, Any]) -> Record:
    """The inverse of to_fields, after JSON."""
    runs = [[(time, tokens) for time, tokens in run] for run in fields["runs"]]
    return Record(**{**fields, "runs": runs})
