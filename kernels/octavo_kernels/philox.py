"""Random numbers of seeded sampling: those of PyTorch's `exponential_` on CUDA, as a function of seed, step and token.

Philox4x32-10 is counter-based, so nothing is stored and nothing depends on the batch. Which counter and word an element
gets follows from how PyTorch launches its fill (ATen/native/cuda/DistributionTemplates.h): thread t of T serves the
elements t, t + T, t + 2T, t + 3T with the four words of one call, then the next four with its next call.

Log (Triton 3.7.1; no GPU was at hand: not measured)
  log: PyTorch's fill calls `__logf`; `libdevice.fast_logf` compiles to the same lg2.approx times ln 2, 2 instructions,
  where `tl.log` is a polynomial of ~20 and is used in the interpreter only. Bit equality on a device is not measured.
  division by T: ~20 instructions a number, a third of all, and useless while a fill is not wider than T, which is so
  for at most 5 sequences of a request on 132 multiprocessors. It is behind a branch on the row's own numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

_TWO_POW_MINUS_32 = tl.constexpr(2.0**-32)
_TWO_POW_MINUS_33 = tl.constexpr(2.0**-33)
_ALMOST_ONE = tl.constexpr(1.0 - 2.0**-24)
_SMALLEST = tl.constexpr(2.0**-24)
_THREADS_PER_BLOCK = tl.constexpr(256)
_WORDS_PER_CALL = tl.constexpr(4)

LARGEST_RATIO = tl.constexpr(2.0**24)
"""1 / the smallest number: no probability p wins a race with more than p times this."""


@triton.jit
def random_words(seed, step, element, num_elements, num_threads):
    """uint32 words behind elements (int32, any shape) of fill number `step` of a tensor of num_elements numbers.

    seed: uint64. step, num_elements, num_threads: int32 scalars. num_threads: what the card runs at once, its
    multiprocessors times the threads of each, a multiple of 256.
    """
    thread = element
    turn = element * 0
    calls = 1
    if num_elements > num_threads:
        turn = element // num_threads
        thread = element - turn * num_threads
        calls = (num_elements - 1) // (num_threads * _WORDS_PER_CALL) + 1
    zero = (element * 0).to(tl.uint32)
    counter = (step * calls + turn // _WORDS_PER_CALL).to(tl.uint32)  # 64-bit counters would select another generator
    first, second, third, fourth = tl.philox(seed, counter, zero, thread.to(tl.uint32), zero)
    word = turn % _WORDS_PER_CALL
    return tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))


@triton.jit
def exponentials(words, NATIVE_LOG: tl.constexpr):
    """fp32 Exp(1) numbers of uint32 words, in [2**-24, 22.9]. NATIVE_LOG: CUDA's `__logf`."""
    u = words.to(tl.float32) * _TWO_POW_MINUS_32 + _TWO_POW_MINUS_33  # curand_uniform: (0, 1]
    if NATIVE_LOG:
        log_u = libdevice.fast_logf(u)
    else:
        log_u = tl.log(u)
    return tl.where(u >= _ALMOST_ONE, _SMALLEST, -log_u)
