"""A state machine over the real scheduler with a fake model whose next token is a hash of all tokens before it.

Whatever happens around a sequence (batching, chunks, preemption, cache hits, forks, aborts of others), its tokens must
be those that the oracle computes from its prompt alone. The checks are in session.py and fake_runner.py.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from octavo.config import CacheConfig, SchedulerConfig
from octavo.errors import Reason
from property.records import PromptSpec, random_prompt
from property.session import Session

NUM_FRONTENDS = 3
MAX_MODEL_LEN = 64
DELAYS = st.sampled_from([0.001, 0.1, 1.0, 5.0])


@st.composite
def prompt_specs(draw: st.DrawFn) -> PromptSpec:
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    length = draw(st.integers(1, 40))
    usual = draw(st.booleans())
    return PromptSpec(
        tokens=random_prompt(rng, draw(st.integers(0, 2)), length),
        max_new_tokens=draw(st.integers(1, min(20, MAX_MODEL_LEN - length))),
        num_sequences=draw(st.sampled_from([1, 1, 1, 2, 3])),
        priority=draw(st.sampled_from([0, 0, 0, -1, 5])),
        salt=draw(st.sampled_from(["", "", "other"])),
        bypass=not usual and draw(st.booleans()),
        eos=draw(st.sampled_from([(), (0, 1, 2, 3, 4, 5)])),
        stop=draw(st.sampled_from([(), (5, 6, 7)])),
        deadline=None if usual else draw(st.sampled_from([None, 0.0005, 0.5, 20.0])),
        deadline_is_client=draw(st.booleans()),
        max_time=None if usual else draw(st.sampled_from([None, 0.0, 0.05, 3.0])),
        length_is_context=draw(st.booleans()),
        num_top=draw(st.sampled_from([None, None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 2])),
        lookup=draw(st.sampled_from([0, 0, 1, 3, 8])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    session: Session

    @initialize(
        depth=st.sampled_from([0, 1]),
        block_size=st.sampled_from([1, 4, 16]),
        extra_blocks=st.sampled_from([0, 1, 3, 60]),
        max_num_requests=st.sampled_from([1, 3, 8]),
        budget=st.sampled_from([8, 17, 256]),
        max_chunk_tokens=st.sampled_from([0, 1, 5]),
        prefix_caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.01, 0.2]),
    )
    def start(
        self,
        depth: int,
        block_size: int,
        extra_blocks: int,
        max_num_requests: int,
        budget: int,
        max_chunk_tokens: int,
        prefix_caching: bool,
        watermark: float,
    ) -> None:
        scheduler = SchedulerConfig(
            max_num_requests=max_num_requests,
            max_num_batched_tokens=budget,
            max_chunk_tokens=max_chunk_tokens,
            watermark=watermark,
            pipeline_depth=depth,
        )
        self.session = Session(
            num_blocks=-(-MAX_MODEL_LEN // block_size) + extra_blocks,
            max_model_len=MAX_MODEL_LEN,
            scheduler=scheduler,
            cache=CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching),
        )

    @rule(frontend=st.integers(0, NUM_FRONTENDS - 1), specs=st.lists(prompt_specs(), min_size=1, max_size=2))
    def add(self, frontend: int, specs: list[PromptSpec]) -> None:
        self.session.add(frontend, specs)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.session.step()
            self.session.now += 0.001

    @rule()
    def settle(self) -> None:
        self.session.settle()

    @rule(pick=st.integers(0, 1 << 16), several=st.booleans())
    def abort(self, pick: int, several: bool) -> None:
        """Aborts sequences in any state, ended ones and unknown keys too."""
        names = self.session.alive() if pick % 4 else list(self.session.sequences)
        if names:
            frontend, key = names[pick % len(names)]
            self.session.abort(frontend, [key, key + 1, 999_999] if several else [key])

    @rule(frontend=st.integers(0, NUM_FRONTENDS - 1))
    def frontend_dies(self, frontend: int) -> None:
        self.session.abort_frontend(frontend)

    @rule(pick=st.integers(0, 1 << 16), reason=st.sampled_from([Reason.NON_FINITE_LOGITS, Reason.INTERNAL]))
    def fail(self, pick: int, reason: Reason) -> None:
        names = self.session.alive()
        if names:
            self.session.fail(*names[pick % len(names)], reason)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.session.reset_prefix_cache()

    @rule(seconds=DELAYS)
    def time_passes(self, seconds: float) -> None:
        self.session.now += seconds

    @rule()
    def drain(self) -> None:
        self.session.drain()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "session"):
            self.session.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "session") and not self.session.broken:
            self.session.drain()
            self.session.probe()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
