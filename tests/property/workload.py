"""A random workload from one seed, quicker than hypothesis: drives the same session for the seeded mutants, and by hand
to look for trouble:  `python -m property.workload FIRST_SEED COUNT [BEAMS [DRAFTS]]` in tests/.
"""

from __future__ import annotations

import random
import sys
import traceback
from dataclasses import replace

from octavo.config import CacheConfig, SchedulerConfig
from octavo.errors import Reason
from property.records import PromptSpec, random_prompt
from property.session import Session

MAX_MODEL_LEN = 64
NUM_FRONTENDS = 3


def random_session(rng: random.Random, check: bool = True, kind: type[Session] = Session) -> Session:
    block_size = rng.choice([1, 4, 4, 16])
    return kind(
        num_blocks=-(-MAX_MODEL_LEN // block_size) + rng.choice([0, 1, 3, 60]),
        max_model_len=MAX_MODEL_LEN,
        scheduler=SchedulerConfig(
            max_num_requests=rng.choice([1, 3, 8]),
            max_num_batched_tokens=rng.choice([8, 17, 256]),
            max_chunk_tokens=rng.choice([0, 0, 1, 5]),
            watermark=rng.choice([0.0, 0.01, 0.2]),
            pipeline_depth=rng.choice([0, 1]),
        ),
        cache=CacheConfig(block_size=block_size, enable_prefix_caching=rng.random() < 0.8),
        check=check,
    )


def random_spec(rng: random.Random, beams: float = 0.0, drafts: float = 0.0) -> PromptSpec:
    """`beams`: how probable a beam search is; `drafts`: the same of speculation in others."""
    length = rng.randint(1, 40)
    usual = rng.random() < 0.7
    spec = PromptSpec(
        tokens=random_prompt(rng, rng.randint(0, 2), length),
        max_new_tokens=rng.randint(1, min(20, MAX_MODEL_LEN - length)),
        num_sequences=rng.choice([1, 1, 1, 2, 3]),
        priority=rng.choice([0, 0, 0, -1, 5]),
        salt=rng.choice(["", "", "other"]),
        bypass=not usual and rng.random() < 0.3,
        eos=rng.choice([(), (0, 1, 2, 3, 4, 5)]),
        stop=rng.choice([(), (5, 6, 7)]),
        deadline=None if usual else rng.choice([None, 0.0005, 0.5, 20.0]),
        deadline_is_client=rng.random() < 0.5,
        max_time=None if usual else rng.choice([None, 0.0, 0.05, 3.0]),
        length_is_context=rng.random() < 0.5,
        num_top=rng.choice([None, None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 2]),
    )
    if beams and rng.random() < beams:  # without beams the seeds give what they always gave
        num_beams = rng.choice([2, 2, 3, 4])
        spec = replace(spec, num_beams=num_beams, num_sequences=rng.randint(1, num_beams), num_top=None)
    elif drafts and rng.random() < drafts:
        spec = replace(spec, lookup=rng.choice([1, 2, 3, 5, 8, 32]))
    return spec


def act(session: Session, rng: random.Random, beams: float = 0.0, drafts: float = 0.0) -> None:
    """One input; steps come between them."""
    kind = rng.random()
    names = session.alive() if rng.random() < 0.8 else list(session.sequences)
    if kind < 0.55:
        frontend = rng.randrange(NUM_FRONTENDS)
        specs = [random_spec(rng, beams, drafts) for _ in range(rng.choice([1, 1, 2]))]
        session.add(frontend, specs)
    elif kind < 0.75 and names:
        frontend, key = rng.choice(names)
        session.abort(frontend, [key, key + 1, 999_999] if rng.random() < 0.3 else [key])
    elif kind < 0.80 and session.alive():
        session.fail(*rng.choice(session.alive()), rng.choice([Reason.NON_FINITE_LOGITS, Reason.INTERNAL]))
    elif kind < 0.83:
        session.abort_frontend(rng.randrange(NUM_FRONTENDS))
    elif kind < 0.86:
        session.reset_prefix_cache()
    elif kind < 0.92:
        session.settle()
    else:
        session.now += rng.choice([0.001, 0.1, 1.0, 5.0, 12.0])


def run_workload(
    seed: int, num_actions: int = 40, check: bool = True, beams: float = 0.0, drafts: float = 0.0
) -> Session:
    """Inputs and steps in random order, then everything must come to its end. Without `check` the scheduler's own
    invariants are not asked. `beams`: part of the prompts that are beam searches; `drafts`: of the others, part that
    look up drafts."""
    rng = random.Random(seed)
    session = random_session(rng, check)
    for _ in range(num_actions):
        act(session, rng, beams, drafts)
        for _ in range(rng.choice([0, 0, 1, 1, 2, 6])):
            session.step()
            session.now += 0.001
    session.drain()
    session.probe()
    return session


def main() -> None:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    beams, drafts = (float(sys.argv[i]) if len(sys.argv) > i else 0.0 for i in (3, 4))
    failures: dict[str, tuple[int, list[int]]] = {}
    totals: dict[str, int] = {}
    for seed in range(first, first + count):
        try:
            session = run_workload(seed, beams=beams, drafts=drafts)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__} {where.filename.rsplit('/')[-1]}:{where.lineno} {str(error)[:60]}"
            failures.setdefault(name, (seed, []))[1].append(seed)
            continue
        for name, value in session.statistics().items():
            totals[name] = totals.get(name, 0) + value
    print(totals)
    for name, (_, seeds) in failures.items():
        print(f"{len(seeds):5d}  {name}  seeds {seeds[:5]}")


if __name__ == "__main__":
    main()
