"""`make demo`: starts the server on the bundled model, streams one text, answers 32 requests at once, stops it again.

Exit status 0 only if every request succeeded and the server stopped with status 0. The numbers are those of this
machine under whatever else it does; `bench/` has the programs for numbers to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from octavo.client import AsyncClient, OctavoError

PROMPT = "I met a traveller from an antique land, who said"
PROMPTS = [
    PROMPT,
    "In the beginning",
    "Shall I compare thee to a summer's day?",
    "Of Man's first disobedience, and the fruit",
    "The king said unto his servants,",
    "Once upon a time",
    "To be, or not to be,",
    "And it came to pass in those days, that",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled, seed": {"do_sample": True, "seed": 1},
    "top_p, temperature": {"do_sample": True, "seed": 2, "top_p": 0.9, "temperature": 0.8},
    "n=2": {"do_sample": True, "seed": 3, "num_return_sequences": 2, "top_k": 40},
    "stop strings": {"stop_strings": ["."], "stop_string_output": "include"},
    "logprobs": {"logprobs": 5},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1},
    "min_p, typical_p": {"do_sample": True, "seed": 4, "min_p": 0.05, "typical_p": 0.95, "min_new_tokens": 16},
}
READY_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0


@dataclass
class Timings:
    """Times of one request, in seconds. State: belongs to the task that runs it."""

    tokens: int = 0
    first: float = 0.0
    """From sending to the first token."""
    gaps: list[float] = field(default_factory=list)
    """Between two tokens of a sequence; a message with several tokens counts as that many equal gaps."""
    reasons: list[str] = field(default_factory=list)


async def main() -> int:
    parser = argparse.ArgumentParser(description="octavo in a minute")
    parser.add_argument("--model", default="demo", help="as for `octavo serve`")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("serve", nargs="*", metavar="-- FLAG", help="more flags of `octavo serve`")
    options = parser.parse_args()
    async with server(options.model, options.serve) as (process, address):
        async with AsyncClient(address) as client:
            if not await ready(client, process):
                print(f"the server ended with status {process.returncode}", file=sys.stderr)
                return 1
            await one_stream(client, options.max_new_tokens)
            await many_at_once(client, options.requests, options.max_new_tokens)
        print("stopping the server", flush=True)
        process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
        print(f"the server ended with status {status}", flush=True)
        return 0 if status == 0 else 1


@contextlib.asynccontextmanager
async def server(model: str, flags: list[str]) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A server of its own on a free port; stopped if it is still there at the end, so that nothing of it is left."""
    address = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "octavo.cli", "serve", model, "--address", address, *flags
    )
    try:
        yield process, address
    finally:
        if process.returncode is None:
            for number in (signal.SIGTERM, signal.SIGTERM):  # the second one: at once
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
                await asyncio.sleep(0.2)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5)
        if process.returncode is None:
            process.kill()
            await process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ready(client: AsyncClient, process: asyncio.subprocess.Process) -> bool:
    """True when the server serves, False when it ended instead."""
    waiting = asyncio.ensure_future(client.wait_until_ready(READY_TIMEOUT))
    ended = asyncio.ensure_future(process.wait())
    await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        return False
    ended.cancel()
    waiting.result()
    return True


async def one_stream(client: AsyncClient, max_new_tokens: int) -> None:
    print(f"\n{PROMPT}", end="", flush=True)
    begin = time.perf_counter()
    async with client.stream(PROMPT, max_new_tokens=max_new_tokens) as stream:
        async for delta in stream:
            print(delta.text, end="", flush=True)
        tokens = (await stream.response()).usage.completion_tokens
    seconds = time.perf_counter() - begin
    print(f"\n\none stream: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s\n", flush=True)


async def many_at_once(client: AsyncClient, count: int, max_new_tokens: int) -> None:
    """`count` requests at once, every variant with every prompt in turn; prints what came of it."""
    names = list(VARIANTS)
    plan = [(PROMPTS[(i + i // len(PROMPTS)) % len(PROMPTS)], names[i % len(names)]) for i in range(count)]
    begin = time.perf_counter()
    results = await asyncio.gather(*(timed(client, prompt, VARIANTS[name], max_new_tokens) for prompt, name in plan))
    seconds = time.perf_counter() - begin
    tokens = sum(result.tokens for result in results)
    reasons = collections.Counter(reason for result in results for reason in result.reasons)
    ended = ", ".join(f"{number} by {reason}" for reason, number in sorted(reasons.items()))
    print(f"{count} requests at once ({'; '.join(names)}):")
    print(f"  {sum(reasons.values())} sequences ended: {ended}")
    print(f"  {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s")
    print(f"  time to first token   {percentiles([result.first for result in results])}")
    print(f"  inter-token latency   {percentiles([gap for result in results for gap in result.gaps])}\n", flush=True)


async def timed(client: AsyncClient, prompt: str, variant: dict[str, Any], max_new_tokens: int) -> Timings:
    """Streams one request and takes the times of its tokens."""
    result = Timings()
    last: dict[tuple[int, int], float] = {}
    begin = time.perf_counter()
    async with client.stream(prompt, max_new_tokens=max_new_tokens, **variant) as stream:
        async for delta in stream:
            now, count = time.perf_counter(), len(delta.token_ids)
            key = (delta.prompt_index, delta.output_index)
            if count:
                result.first = result.first or now - begin
                if key in last:
                    result.gaps += [(now - last[key]) / count] * count
                last[key] = now
                result.tokens += count
            if delta.finish_reason is not None:
                result.reasons.append(str(delta.finish_reason))
    return result


def percentiles(seconds: list[float]) -> str:
    """p50, p90, p99 in milliseconds."""
    if len(seconds) < 2:
        return "too few to tell"
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return "   ".join(f"p{p} {cuts[p - 1] * 1000:7.1f} ms" for p in (50, 90, 99))


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except OctavoError as error:
        sys.exit(f"octavo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
