"""Random numbers of seeded sampling: those of PyTorch's `exponential_` on CUDA, as a function of seed, step and token.

Philox4x32-10 is counter-based, so nothing is stored and nothing depends on the batch. Which counter and word an element
gets follows from how PyTorch launches its fill (ATen/native/cuda/DistributionTemplates.h).

Log
  log: PyTorch's fill calls `__logf`; `libdevice.fast_logf` compiles to the same lg2.approx times ln 2. `tl.log` is a
  polynomial and used in the interpreter only. Equality on a device is not measured (no GPU yet).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

_TWO_POW_MINUS_32 = tl.constexpr(2.3283064365386963e-10)
_TWO_POW_MINUS_33 = tl.constexpr(1.1641532182693481e-10)
_ALMOST_ONE = tl.constexpr(0.9999999403953552)  # 1 - 2**-24
_SMALLEST = tl.constexpr(5.960464477539063e-08)  # 2**-24
_THREADS_PER_BLOCK = tl.constexpr(256)


@triton.jit
def random_words(seed, step, element, num_elements, num_threads):
    """uint32 words behind elements (int32, any shape) of fill number `step` of a tensor of num_elements numbers.

    seed: uint64. num_threads: what the card runs at once, its multiprocessors times 2048.
    """
    blocks = tl.minimum(
        (num_elements + _THREADS_PER_BLOCK - 1) // _THREADS_PER_BLOCK, num_threads // _THREADS_PER_BLOCK
    )
    threads = blocks * _THREADS_PER_BLOCK
    calls = (num_elements - 1) // (threads * 4) + 1
    turn = element // threads
    zero = (element * 0).to(tl.uint32)
    counter = (step * calls + turn // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, zero, (element - turn * threads).to(tl.uint32), zero)
    word = turn % 4
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def exponentials(words, FAST_LOG: tl.constexpr):
    """fp32 Exp(1) numbers, never 0, of uint32 words."""
    u = words.to(tl.float32) * _TWO_POW_MINUS_32 + _TWO_POW_MINUS_33
    if FAST_LOG:
        log_u = libdevice.fast_logf(u)
    else:
        log_u = tl.log(u)
    return tl.where(u >= _ALMOST_ONE, _SMALLEST, -log_u)
