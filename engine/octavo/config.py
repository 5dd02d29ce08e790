"""Configuration: frozen structs, one per owner, filled by the CLI's flags or by `octavo.LLM`'s keywords."""

from __future__ import annotations

import msgspec

from octavo import cpu_cores
from octavo.errors import StartupError


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """Local folder of the checkpoint (a hub id has been resolved by `checkpoint.resolve`)."""
    name: str
    """Name under which it is served."""
    device: str = "auto"
    """"auto" (CUDA when there is a GPU, else the CPU), "cpu", "cuda" or "interpreter" (the GPU's kernels on the
    CPU, for tests)."""
    dtype: str = "auto"
    """"auto" (the checkpoint's; float16 and bfloat16 become bfloat16 on the CPU), "float32", "bfloat16", "float16"."""
    quantization: str | None = None
    """None or "int8": dynamic int8 linears, CPU only."""
    cuda_graphs: bool = True
    """On a GPU, capture the launches of common steps at start and replay them."""
    dependent_launch: str = "off"
    """"auto": on GPUs of compute capability 9.0 (H100) or more, a step's kernels start while the one in front of each
    ends. "off": each waits for its launch. Off unless asked for, since no GPU has measured it yet."""
    batch_invariant: bool = False
    """The same bits for a request whatever else is in the batch, at the price of slower linear layers. Not on the CPU
    path, whose fp32 is steady enough for equal tokens but not for equal bits."""
    shared_prefix_attention: bool = True
    """On a GPU, read the KV blocks that requests in a step begin with once for several of them, where that pays. Not
    with batch_invariant, since sums depend on it."""
    num_threads: int = 0
    """OpenMP threads of the CPU path; 0: as many as cpu_cores has, else torch's own choice."""
    cpu_cores: str = cpu_cores.NONE
    """Cores that the CPU path's compute threads are bound to, a thread to each: a list in their order, as "0-3,8",
    "auto" (one hardware thread of every core that the process may use) or "none" (the system moves threads as it
    likes). Front-ends keep to the other cores where there are any."""


def shares_prefixes(config: ModelConfig) -> bool:
    """Whether decode attention may read blocks once for several requests."""
    return config.shared_prefix_attention and not config.batch_invariant


def cores_of(config: ModelConfig) -> list[int]:
    """The cores to which the CPU path's threads are bound; none if they are not. Raises StartupError (USAGE)."""
    return cpu_cores.resolve(config.cpu_cores, num_threads=config.num_threads, device=config.device)


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    block_size: int = 32
    """Tokens per KV block: 16, 32 or 64."""
    num_blocks: int = 0
    """Usable KV blocks; 0: as many as fit `memory`."""
    memory: int = 0
    """Bytes of the KV-cache; 0: on CUDA what the card has left, on the CPU 1 GiB."""
    kv_cache_dtype: str = "auto"
    """"auto" (the model's dtype) or "fp8" (e4m3): a half of the memory of bfloat16, so twice the blocks, and on a GPU
    half the bytes that attention reads, at the price of three bits of mantissa. Any device, dtype and quantization."""
    enable_prefix_caching: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    max_num_requests: int = 256
    """Requests (sequences) that may run at once."""
    max_num_batched_tokens: int = 0
    """Tokens computed in one step; at least max_num_requests. 0: 2048 on CUDA, 512 on the CPU, where a step must not
    take seconds, or max_num_requests if that is more."""
    max_chunk_tokens: int = 0
    """Most tokens that one request's prefill may take of a step; 0: no limit but the budget."""
    max_model_len: int = 0
    """Longest total length; 0: n_positions + 1, as in transformers."""
    watermark: float = 0.01
    """Part of the pool that admissions leave free, so that admit-then-preempt does not thrash."""
    max_queue_time: float = 30.0
    """Seconds in the queue after which a request that never ran fails with QUEUE_TIMEOUT."""
    pipeline_depth: int | None = None
    """Steps launched before the tokens of the oldest are read, less one: 0 or 1. Unset: 1 on a GPU, which then never
    waits for the host, 0 on the CPU, where launching is computing."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine core needs."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()


def check(config: EngineConfig) -> None:
    """Raises StartupError (USAGE) naming the first value out of range."""
    scheduler, cache = config.scheduler, config.cache
    rules = [
        ("max_num_requests", scheduler.max_num_requests, 1 <= scheduler.max_num_requests <= 65_536, "1 to 65536"),
        (
            "max_num_batched_tokens",
            scheduler.max_num_batched_tokens,
            scheduler.max_num_batched_tokens == 0 or scheduler.max_num_batched_tokens >= scheduler.max_num_requests,
            f"at least max_num_requests ({scheduler.max_num_requests}), so that every running request can decode in "
            "every step, or 0",
        ),
        ("max_chunk_tokens", scheduler.max_chunk_tokens, scheduler.max_chunk_tokens >= 0, "at least 0"),
        ("watermark", scheduler.watermark, 0 <= scheduler.watermark < 1, "at least 0 and below 1"),
        ("max_queue_time", scheduler.max_queue_time, scheduler.max_queue_time > 0, "above 0"),
        ("pipeline_depth", scheduler.pipeline_depth, scheduler.pipeline_depth in (None, 0, 1), "0 or 1"),
        ("block_size", cache.block_size, cache.block_size in (16, 32, 64), "16, 32 or 64"),
        ("num_blocks", cache.num_blocks, cache.num_blocks >= 0, "at least 0"),
        ("memory", cache.memory, cache.memory >= 0, "at least 0"),
        ("num_threads", config.model.num_threads, config.model.num_threads >= 0, "at least 0"),
    ]
    for name, value, good, rule in rules:
        if not good:
            raise StartupError(StartupError.USAGE, f"{name} must be {rule}, not {value}")
    cores_of(config.model)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on requests. Names and meanings as in model.proto's Limits; each is a flag of `octavo serve`."""

    max_prompt_bytes: int = 131_072
    max_prompts: int = 128
    max_sequences: int = 256
    max_num_return_sequences: int = 16
    max_num_beams: int = 8
    max_logprobs: int = 20
    max_logprob_token_ids: int = 128
    max_stop_strings: int = 16
    max_stop_string_bytes: int = 256
    max_stop_token_ids: int = 128
    max_token_list: int = 1024
    max_token_sequences: int = 128
    max_token_sequence_length: int = 64
    max_constraint_bytes: int = 65_536
    max_tokenize_inputs: int = 128
    max_receive_message_bytes: int = 1 << 20
    max_send_message_bytes: int = 4 << 20
    max_session_requests: int = 512
    max_queue_time: float = 30.0
    max_request_duration: float = 300.0
    # Not on the wire's Limits message: limits of the server as a whole.
    max_inflight_requests: int = 2048
    """Sequences in the server, running or waiting; divided among the front-ends."""
    max_tenant_requests: int = 512
    """The same for one tenant, when API keys are in use."""
    max_waiting_tokens: int = 262_144
    """Prompt tokens waiting for their first step; divided among the front-ends."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the front-ends and the supervisor need beyond the engine's configuration."""

    address: str = "127.0.0.1:50051"
    metrics_address: str = ""
    """host:port of HTTP /metrics and /healthz; empty: off."""
    admin_address: str = ""
    """unix:PATH or host:port of the admin port; empty: a socket in the run directory."""
    run_directory: str = ""
    """Folder (mode 0700) of the ipc sockets; empty: a fresh one under XDG_RUNTIME_DIR or the temporary folder."""
    frontend_processes: int = 0
    """Processes that serve clients, each with its part of the limits; 0: a quarter of the cores, from 1 to 4, and 1 on
    a unix socket."""
    reflection: bool = False
    health_default: str = "liveness"
    """What the health service says for the empty name: "liveness" or "readiness"."""
    drain_delay: float = 0.0
    drain_timeout: float = 30.0
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    api_keys_file: str = ""
    insecure_allow_remote: bool = False
    watchdog: float = 10.0
    """Seconds a step may take before the supervisor replaces the engine core; 0: no limit."""
    startup_timeout: float = 180.0
    limits: Limits = Limits()
