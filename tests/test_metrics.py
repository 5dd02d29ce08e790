"""Metrics: declared once, right with one front-end and with several."""

from pathlib import Path

from octavo.metrics import TABLE, Metrics, Source, render_table
from octavo.types import EngineInfo, EngineLoad, FinishInfo, FinishReason, GenerateUpdate, OutputDelta, Timing, Usage
from prometheus_client.parser import text_string_to_metric_families

INFO = EngineInfo(
    model="demo",
    architecture="GPT2LMHeadModel",
    weights_sha256="",
    dtype="float32",
    device="cpu",
    attention_backend="cpu",
    kv_cache_dtype="float32",
    num_parameters=1,
    vocab_size=1,
    n_positions=1,
    block_size=32,
    num_blocks=64,
    max_num_requests=1,
    max_num_batched_tokens=1,
    max_model_len=1,
    batch_invariant=True,
    start_time=0.0,
)


def value(text: bytes, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def test_every_metric_of_the_table_is_rendered_and_documented():
    text = Metrics("1").render().decode()
    table = render_table()
    for spec in TABLE:
        assert f"# TYPE {spec.full_name} {spec.kind}" in text
        assert f"`{spec.full_name}`" in table


def test_the_table_of_the_documentation_is_fresh():
    page = Path(__file__).parents[1] / "docs" / "metrics.md"
    assert render_table() in page.read_text()


def test_engine_totals_go_on_over_a_restart():
    metrics = Metrics("1")
    metrics.engine_up(INFO, 0)
    metrics.load(EngineLoad(time=0.0, generation_tokens=10, used_blocks=16, total_blocks=64))
    metrics.load(EngineLoad(time=0.0, generation_tokens=15, used_blocks=16, total_blocks=64))
    assert value(metrics.render(), "octavo_kv_cache_usage_perc") == 0.25
    metrics.engine_down()
    assert value(metrics.render(), "octavo_engine_up") == 0
    metrics.engine_up(INFO, 1)
    metrics.load(EngineLoad(time=0.0, generation_tokens=4))
    text = metrics.render()
    assert value(text, "octavo_generation_tokens_total") == 19
    assert value(text, "octavo_engine_restarts_total") == 1
    assert value(text, "octavo_build_info", version="1", device="cpu", dtype="float32") == 1


def test_front_ends_add_up_and_the_engine_is_counted_once():
    first, second = Metrics("1"), Metrics("1")
    for metrics in (first, second):
        metrics.load(EngineLoad(time=0.0, generation_tokens=10))
        metrics.rpc("s", "m", "OK", 0.2)
    second.rejected("QUEUE_FULL")
    text = first.render([second.snapshot()])
    assert value(text, "octavo_generation_tokens_total") == 10
    assert value(text, "grpc_server_handled_total", grpc_service="s", grpc_method="m", grpc_code="OK") == 2
    assert value(text, "grpc_server_handling_seconds_count", grpc_service="s", grpc_method="m") == 2
    assert value(text, "octavo_admission_rejections_total", reason="QUEUE_FULL") == 1
    assert value(first.render(), "octavo_admission_rejections_total", reason="QUEUE_FULL") is None
    assert all(spec.labels or spec.source in Source for spec in TABLE)


def test_a_request_is_measured_by_what_its_reader_got():
    metrics = Metrics("1")
    meter = metrics.request(1)
    meter.delivered(GenerateUpdate(deltas=[OutputDelta(prompt_index=0, output_index=0, token_ids=[1, 2])]))
    finish = FinishInfo(FinishReason.LENGTH, 3)
    meter.delivered(
        GenerateUpdate(
            deltas=[OutputDelta(prompt_index=0, output_index=0, token_ids=[3], finish=finish)],
            usage=Usage(5, 3, 0),
            timing=Timing(0.1, 0.2, 0.4, 0),
        )
    )
    meter.ended("CLIENT_CANCELLED")
    metrics.request(1).ended("CLIENT_CANCELLED")
    text = metrics.render()
    assert value(text, "octavo_request_success_total", finished_reason="length") == 1
    assert value(text, "octavo_request_aborted_total", cause="CLIENT_CANCELLED") == 1
    assert value(text, "octavo_time_to_first_token_seconds_sum") == 0.2
    assert value(text, "octavo_request_generation_tokens_sum") == 3
    assert value(text, "octavo_tokens_per_message_count") == 2
    assert value(text, "octavo_inter_token_latency_seconds_count") == 1
