"""The C kernels' threads share what there is to do, however little."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from octavo_kernels.cpu import native
from octavo_kernels.cpu.linear import NativeLinear
from octavo_kernels.cpu.native_attention import NativeAttention

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no C kernels: {native.why_not()}")
PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.fixture
def seconds() -> Iterator[list[list[float]]]:
    """Of the processor, by each of the threads of each call, which are Python's meanwhile."""
    taken: list[list[float]] = []

    def in_threads(body: int, data: int, num_threads: int, flags: int) -> None:
        own, start = [0.0] * num_threads, threading.Barrier(num_threads)

        def run(i: int) -> None:
            start.wait()
            BODY(body)(data)
            own[i] = time.thread_time()

        threads = [threading.Thread(target=run, args=[i]) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken.append(own)

    before, parallel = torch.get_num_threads(), PARALLEL(in_threads)
    torch.set_num_threads(2)
    native.loaded().octavo_use_threads(ctypes.cast(parallel, ctypes.c_void_p), *native._threads()[1:])
    yield taken
    native.loaded().octavo_use_threads(*native._threads())
    torch.set_num_threads(before)


def one_query() -> Callable[[], Any]:
    """Two ranges of heads; a long time each, of one block over and over."""
    kernel, cache, blocks = NativeAttention(16, 64, 32, torch.float32), torch.randn(2, 2, 16, 32, 64), 8192
    table, qkv = np.ones((1, blocks), np.int32), torch.randn(1, 48 * 64)
    slot, loc, length = np.array([63]), np.array([0, 1], np.int32), np.array([blocks * 32], np.int32)
    plan = kernel.plan(2, slot, loc, length, table, 1)
    return lambda: kernel.attend(plan, qkv, cache, 0.1)


def two_strips() -> Callable[[], Any]:
    layer, x = NativeLinear(torch.randn(96, 4096), None, None), torch.randn(4096, 4096).bfloat16()
    return lambda: layer(x)


@pytest.mark.parametrize("work", [one_query, two_strips])
def test_no_thread_takes_all_of_two_pieces(work: Callable[[], Callable[[], Any]], seconds: list[list[float]]) -> None:
    """Three times of 30: a busy machine may let a thread wait for longer than a piece takes."""
    if work is two_strips and not native.loaded().octavo_has_linear():
        pytest.skip("no AVX512_BF16")
    call, shared = work(), 0
    for _ in range(30):
        call()
        shared += min(seconds[-1]) > max(seconds[-1]) / 5
        if shared == 3:
            return
    pytest.fail(f"{shared} of 30 times")
