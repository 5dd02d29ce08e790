"""Every metric of octavo, declared once: name, kind, labels, buckets, help. The docs table is rendered from here.

A front-end process has one `Metrics`. ENGINE metrics describe the engine core, as told by its load reports, and are the
same in every front-end; FRONTEND metrics count what this front-end did and add up over the front-ends. Names and
suffixes follow vLLM's, with the prefix `octavo_`. No label is taken from a request.
"""

from __future__ import annotations

import enum
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from octavo.types import EngineInfo, EngineLoad, GenerateUpdate

PREFIX = "octavo_"
SECONDS: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)
TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Source(enum.Enum):
    ENGINE = "engine core"
    FRONTEND = "front-ends"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    name: str
    """Without the prefix."""
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Source = Source.FRONTEND
    prefixed: bool = True

    @property
    def full_name(self) -> str:
        return PREFIX + self.name if self.prefixed else self.name


def _engine(name: str, kind: Literal["gauge", "counter"], text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, kind, text, labels, source=Source.ENGINE)


def _histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> MetricSpec:
    return MetricSpec(name, "histogram", text, buckets=buckets)


TABLE: Final[tuple[MetricSpec, ...]] = (
    _engine("num_requests_running", "gauge", "Sequences in the running batch."),
    _engine("num_requests_waiting", "gauge", "Sequences in the queue, preempted ones included."),
    _engine("kv_cache_usage_perc", "gauge", "Part of the KV blocks that running sequences use, 0 to 1."),
    _engine("engine_up", "gauge", "1 while an engine core is warm."),
    _engine("draining", "gauge", "1 while the server refuses new requests and finishes the running ones."),
    _engine("cache_config_info", "gauge", "Always 1.", "block_size", "num_gpu_blocks", "cache_dtype"),
    _engine("build_info", "gauge", "Always 1.", "version", "device", "dtype"),
    _engine("prompt_tokens_total", "counter", "Prompt tokens computed."),
    _engine("generation_tokens_total", "counter", "Tokens generated."),
    _engine("num_preemptions_total", "counter", "Sequences preempted to free KV blocks."),
    _engine("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache."),
    _engine("prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache."),
    _engine("spec_decode_num_draft_tokens_total", "counter", "Tokens drafted by prompt lookup."),
    _engine("spec_decode_num_accepted_tokens_total", "counter", "Drafted tokens that were right."),
    _engine("engine_restarts_total", "counter", "Times that the engine core was replaced."),
    MetricSpec("request_success_total", "counter", "Sequences that ended, by finish reason.", ("finished_reason",)),
    MetricSpec("request_aborted_total", "counter", "Admitted requests that failed or were cancelled.", ("cause",)),
    MetricSpec("admission_rejections_total", "counter", "Requests that were not admitted.", ("reason",)),
    _histogram("time_to_first_token_seconds", "From a request's arrival to its first token."),
    _histogram("inter_token_latency_seconds", "Between two deliveries to one reader."),
    _histogram("request_time_per_output_token_seconds", "Decode time of a request per token of a sequence."),
    _histogram("e2e_request_latency_seconds", "From a request's arrival to its end."),
    _histogram("request_queue_time_seconds", "From a request's arrival to its first step."),
    _histogram("request_prefill_time_seconds", "From a request's first step to its first token."),
    _histogram("request_decode_time_seconds", "From a request's first token to its end."),
    _histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS),
    _histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS),
    _histogram("request_params_n", "Sequences of a request.", COUNTS),
    _histogram("tokens_per_message", "Tokens delivered to a reader at once.", COUNTS),
    MetricSpec(
        "grpc_server_handled_total",
        "counter",
        "RPCs that ended.",
        ("grpc_service", "grpc_method", "grpc_code"),
        prefixed=False,
    ),
    MetricSpec(
        "grpc_server_handling_seconds",
        "histogram",
        "Duration of RPCs.",
        ("grpc_service", "grpc_method"),
        buckets=SECONDS,
        prefixed=False,
    ),
)


class PlainHistogram(Collector):
    """A histogram without labels, lock and checks: there are two observations per message to a reader."""

    def __init__(self, spec: MetricSpec) -> None:
        self._spec = spec
        self._bounds = spec.buckets
        self._counts = [0] * (len(spec.buckets) + 1)
        """Observations up to each bound and above the one before."""
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Family]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._spec.full_name, self._spec.help, buckets, self._sum)


class Metrics:
    """The values of one front-end process. All methods on one thread."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, PlainHistogram] = {}
        for spec in TABLE:
            arguments = (spec.full_name, spec.help, spec.labels)
            if spec.kind == "gauge":
                self._gauges[spec.name] = Gauge(*arguments, registry=self._registry)
            elif spec.kind == "counter":
                self._counters[spec.name] = Counter(*arguments, registry=self._registry)
            elif spec.labels:
                self._rpc_seconds = Histogram(*arguments, buckets=spec.buckets, registry=self._registry)
            else:
                self._histograms[spec.name] = PlainHistogram(spec)
                self._registry.register(self._histograms[spec.name])
        self._last: dict[str, float] = {}
        """Totals of the present engine core as last reported."""

    # --- the engine core

    def engine_up(self, info: EngineInfo, restarts: int) -> None:
        self._gauges["engine_up"].set(1)
        self._gauges["cache_config_info"].clear()
        cache = (str(info.block_size), str(info.num_blocks), info.kv_cache_dtype)
        self._gauges["cache_config_info"].labels(*cache).set(1)
        self._gauges["build_info"].clear()
        self._gauges["build_info"].labels(self._version, info.device, info.dtype).set(1)
        self._last.clear()  # a new process counts from zero
        restarts_counter = self._counters["engine_restarts_total"]
        restarts_counter.reset()
        restarts_counter.inc(restarts)

    def engine_down(self) -> None:
        for name in ("engine_up", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            self._gauges[name].set(0)

    def draining(self, value: bool) -> None:
        self._gauges["draining"].set(int(value))

    def load(self, load: EngineLoad) -> None:
        self._gauges["num_requests_running"].set(load.running_requests)
        self._gauges["num_requests_waiting"].set(load.waiting_requests)
        self._gauges["kv_cache_usage_perc"].set(load.used_blocks / load.total_blocks if load.total_blocks else 0.0)
        self._grew("prompt_tokens_total", load.prompt_tokens)
        self._grew("generation_tokens_total", load.generation_tokens)
        self._grew("num_preemptions_total", load.preemptions)
        self._grew("prefix_cache_queries_total", load.prefix_cache_queries)
        self._grew("prefix_cache_hits_total", load.prefix_cache_hits)
        self._grew("spec_decode_num_draft_tokens_total", load.drafted_tokens)
        self._grew("spec_decode_num_accepted_tokens_total", load.accepted_tokens)

    def _grew(self, name: str, total: float) -> None:
        self._counters[name].inc(max(0.0, total - self._last.get(name, 0.0)))
        self._last[name] = total

    # --- requests and RPCs

    def rejected(self, reason: str) -> None:
        """A request was not admitted; `reason` is a `Reason`."""
        self._counters["admission_rejections_total"].labels(reason).inc()

    def aborted(self, cause: str) -> None:
        """An admitted request failed; `cause` is a `Reason`."""
        self._counters["request_aborted_total"].labels(cause).inc()

    def request(self, num_sequences: int) -> RequestMeter:
        """A request was admitted."""
        self._histograms["request_params_n"].observe(num_sequences)
        return RequestMeter(self, num_sequences)

    def histogram(self, name: str) -> PlainHistogram:
        """That of this name, for who observes often."""
        return self._histograms[name]

    def observe(self, name: str, value: float) -> None:
        """One value of the histogram of this name."""
        self._histograms[name].observe(value)

    def finished(self, reason: str) -> None:
        """A sequence ended; `reason` is a FinishReason's name in lower case."""
        self._counters["request_success_total"].labels(reason).inc()

    def rpc(self, service: str, method: str, code: str, seconds: float) -> None:
        """An RPC ended. `method` must be one that exists; `code` as in "OK"."""
        self._counters["grpc_server_handled_total"].labels(service, method, code).inc()
        self._rpc_seconds.labels(service, method).observe(seconds)

    # --- reading

    def snapshot(self) -> str:
        """The FRONTEND samples as JSON, for another front-end's `render`."""
        engine = {spec.full_name.removesuffix("_total") for spec in TABLE if spec.source is Source.ENGINE}
        samples = [
            _Sample(family.name, sample.name, sample.labels, sample.value)
            for family in self._families()
            if family.name not in engine
            for sample in family.samples
        ]
        return msgspec.json.encode(samples).decode()

    def render(self, others: Iterable[str] = ()) -> bytes:
        """The text format of Prometheus, with the `snapshot`s of the other front-ends added."""
        families = {family.name: family for family in self._families()}
        for text in others:
            for other in msgspec.json.decode(text, type=list[_Sample]):
                if (family := families.get(other.family)) is not None:
                    _add(family, other)
        return generate_latest(_Collected(list(families.values())))

    def _families(self) -> Iterator[Family]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class RequestMeter:
    """Measures one admitted request by what its reader is given."""

    def __init__(self, metrics: Metrics, num_sequences: int) -> None:
        self._metrics = metrics
        self._num_sequences = num_sequences
        self._tokens_per_message = metrics.histogram("tokens_per_message")
        self._inter_token_latency = metrics.histogram("inter_token_latency_seconds")
        self._last_delivery: float | None = None
        self._ended = False

    def delivered(self, update: GenerateUpdate) -> None:
        metrics = self._metrics
        tokens = sum(len(delta.token_ids) for delta in update.deltas)
        if tokens:
            self.delivered_tokens(tokens, time.monotonic())
        for delta in update.deltas:
            if delta.finish is not None:
                metrics.finished(delta.finish.reason.name.lower())
        if update.usage is not None and update.timing is not None:
            self._ended = True
            usage, timing = update.usage, update.timing
            decode = timing.total - timing.time_to_first_token
            steps = max(1.0, usage.completion_tokens / max(1, self._num_sequences) - 1)
            metrics.observe("request_prompt_tokens", usage.prompt_tokens)
            metrics.observe("request_generation_tokens", usage.completion_tokens)
            metrics.observe("time_to_first_token_seconds", timing.time_to_first_token)
            metrics.observe("request_queue_time_seconds", timing.queue)
            metrics.observe("request_prefill_time_seconds", max(0.0, timing.time_to_first_token - timing.queue))
            metrics.observe("request_decode_time_seconds", decode)
            metrics.observe("request_time_per_output_token_seconds", decode / steps)
            metrics.observe("e2e_request_latency_seconds", timing.total)

    def delivered_tokens(self, tokens: int, now: float) -> None:
        """A message with so many tokens and nothing else went to the reader; `now` is monotonic."""
        self._tokens_per_message.observe(tokens)
        if self._last_delivery is not None:
            self._inter_token_latency.observe(now - self._last_delivery)
        self._last_delivery = now

    def ended(self, cause: str) -> None:
        """The request is over: counts as aborted with this Reason unless its last update was delivered. Idempotent."""
        if not self._ended:
            self._ended = True
            self._metrics.aborted(cause)


class _Sample(msgspec.Struct, frozen=True, array_like=True):
    family: str
    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class _Collected:
    """What generate_latest needs of a registry."""

    families: Sequence[Family]

    def collect(self) -> Sequence[Family]:
        return self.families


def _add(family: Family, other: _Sample) -> None:
    for i, sample in enumerate(family.samples):
        if sample.name == other.name and sample.labels == other.labels:
            family.samples[i] = sample._replace(value=sample.value + other.value)
            return
    family.add_sample(other.name, other.labels, other.value)


def render_table() -> str:
    """The table of the documentation, in Markdown."""
    lines = ["| metric | kind | labels | of | meaning |", "|---|---|---|---|---|"]
    for spec in TABLE:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        lines.append(f"| `{spec.full_name}` | {spec.kind} | {labels} | {spec.source.value} | {spec.help} |")
    return "\n".join(lines) + "\n"
