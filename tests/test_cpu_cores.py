"""`--cpu-cores`: what its lists mean, what is refused, and that threads really stay on their cores."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import grpc
import pytest
import torch
from chaos.server_under_test import ServerUnderTest, engine_config
from octavo import cpu_cores
from octavo.config import EngineConfig, ModelConfig, check
from octavo.errors import StartupError
from octavo.worker.compute_threads import ComputeThreads
from octavo_kernels.cpu import native
from octavo_proto.v1 import control_pb2, control_pb2_grpc

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no C kernels: {native.why_not()}")


@pytest.fixture
def twelve_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 to 11 may be used."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None, raising=False)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("none", []), ("3", [3]), ("0-3,8", [0, 1, 2, 3, 8]), ("8, 2-2,0-1", [8, 2, 0, 1])],
)
@pytest.mark.usefixtures("twelve_cores")
def test_a_list_is_read_in_its_order(text: str, cores: list[int]) -> None:
    assert cpu_cores.resolve(text) == cores
    assert cpu_cores.resolve(text, num_threads=len(cores)) == cores
    if cores:
        assert cpu_cores.resolve(cpu_cores.describe(cores)) == cores


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cpu_cores": ""}, '"auto", "none" or cores and ranges of them as "0-3,8", not \'\''),
        ({"cpu_cores": "0,,1"}, "not '0,,1'"),
        ({"cpu_cores": "0-3:2"}, "not '0-3:2'"),
        ({"cpu_cores": "-1"}, "not '-1'"),
        ({"cpu_cores": "3-0"}, "from the lower to the higher core, not 3-0"),
        ({"cpu_cores": "0-3,2"}, "each core once: 2 is there twice"),
        ({"cpu_cores": "10-12"}, "0-11, which this process may use: 12 is not, in '10-12'"),
        ({"cpu_cores": "0-3", "num_threads": 2}, "num_threads must be .* cpu_cores '0-3', which is 4, or 0, not 2"),
        ({"cpu_cores": "0", "device": "cuda"}, "must be none with device cuda"),
        ({"cpu_cores": "auto", "device": "interpreter"}, "must be none with device interpreter"),
    ],
)
@pytest.mark.usefixtures("twelve_cores")
def test_what_cannot_be_is_refused_by_name(fields: dict[str, object], words: str) -> None:
    model = ModelConfig(path="demo", name="demo", **fields)  # type: ignore[arg-type]
    with pytest.raises(StartupError, match=words) as caught:
        check(EngineConfig(model=model))
    assert caught.value.exit_code == StartupError.USAGE and "cpu_cores" in str(caught.value)


def test_a_platform_without_affinity_refuses_all_but_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert cpu_cores.resolve("none") == []
    with pytest.raises(StartupError, match="must be none on this platform"):
        cpu_cores.resolve("auto")


@pytest.mark.usefixtures("twelve_cores")
def test_auto_takes_one_hardware_thread_of_each_core(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(cpu_cores, "_TOPOLOGY", tmp_path)
    for core in range(8):  # of the other four nothing is known
        (tmp_path / f"cpu{core}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    assert cpu_cores.resolve("auto") == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.usefixtures("twelve_cores")
def test_front_ends_get_what_is_left_or_everything() -> None:
    assert cpu_cores.others(range(10)) == [10, 11]
    assert cpu_cores.others(range(12)) == list(range(12))


ENGINE = """
import json, os, sys, threading
from octavo import LLM
from octavo_kernels.cpu.binding import _bind

def cores():
    return {int(thread): sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}

before = set(cores())
with LLM("demo", device="cpu", dtype="float32", cpu_cores=sys.argv[1]) as llm:
    import torch
    torch.rand(500, 500) @ torch.rand(500, 500)
    first = llm.generate("one", max_new_tokens=4).token_ids
    loaded = cores()
    found = []
    def elsewhere():
        found.append(llm.generate("one", max_new_tokens=4).token_ids)
        found.append(sorted(os.sched_getaffinity(0)))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    facts = llm.info.cpu_cores, torch.get_num_threads()
print(json.dumps({
    "facts": facts, "main": loaded[os.getpid()], "new": [c for t, c in loaded.items() if t not in before],
    "same": found[0] == first, "elsewhere": found[1], "after": sorted(os.sched_getaffinity(0)),
}))
"""


@needs_affinity
@needs_kernels
def test_compute_threads_stay_on_their_cores_until_the_engine_is_closed() -> None:
    """Thread i on core i of the list, the calling one first; and so for a pool of another caller's."""
    usable = sorted(os.sched_getaffinity(0))
    cores = usable[:2][::-1]
    text = ",".join(map(str, cores))
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, text], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["facts"] == [cpu_cores.describe(cores), len(cores)]
    assert found["main"] == cores[:1]
    assert all([core] in found["new"] for core in cores[1:])
    assert found["same"] and found["elsewhere"] == cores[:1]
    assert found["after"] == usable


POOL = """
import ctypes, json, os, sys
import torch
from octavo_kernels.cpu import native
from octavo_kernels.cpu.argmax import argmax
from octavo_kernels.cpu.binding import Binding

def cores():
    return {thread: sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}

torch.set_num_threads(4)
torch.rand(500, 500) @ torch.rand(500, 500)
first, second = json.loads(sys.argv[1])
Binding([first, second, second, second])  # more threads than this test's machine may have cores
bound = cores()
empty = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: None)
ctypes.CDLL("libtorch_cpu.so").GOMP_parallel(empty, None, 2, 0)  # libgomp ends two threads
argmax(torch.rand(8, 4))
new = cores()
print(json.dumps([bound, {thread: new[thread] for thread in new if thread not in bound}]))
"""


@needs_affinity
@needs_kernels
def test_threads_that_openmp_starts_later_are_bound_too() -> None:
    """They inherit the core of the thread that starts them, where all would wait for each other."""
    usable = sorted(os.sched_getaffinity(0))
    first, second = usable[0], usable[-1]
    done = subprocess.run(
        [sys.executable, "-c", POOL, json.dumps([first, second])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    bound, new = json.loads(done.stdout)
    assert sum(cores == [second] for cores in bound.values()) >= 3
    assert list(new.values()) == [[second]] * 2


@needs_affinity
def test_without_the_c_kernels_binding_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "no compiler")
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        with pytest.raises(StartupError, match=r"cpu_cores 'auto': .* no compiler") as caught:
            ComputeThreads(ModelConfig(path="demo", name="demo", cpu_cores="auto"), torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert caught.value.exit_code == StartupError.DEVICE
    assert os.sched_getaffinity(0) == before


def test_a_gpu_that_was_chosen_by_itself_has_no_threads_to_bind() -> None:
    model = ModelConfig(path="demo", name="demo", cpu_cores="0")
    with pytest.raises(StartupError, match="must be none with device cuda"):
        ComputeThreads(model, torch.device("cuda:0"))


@needs_affinity
@needs_kernels
async def test_a_server_binds_its_engine_and_gives_its_front_ends_the_rest() -> None:
    usable = sorted(os.sched_getaffinity(0))
    server = ServerUnderTest(engine_config(cpu_cores=str(usable[0]), num_threads=0))
    try:
        await asyncio.to_thread(server.wait_until_ready)
        assert f"compute threads are bound to cores {usable[0]}" in server.stdout
        assert os.sched_getaffinity(server.core_pid) == {usable[0]}
        assert [sorted(os.sched_getaffinity(pid)) for pid in server.frontend_pids] == [usable[1:] or usable]
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            info = await stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=10)
        assert info.cpu_cores == str(usable[0])
    finally:
        server.close()
