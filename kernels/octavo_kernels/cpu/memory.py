"""Memory for large tensors that are read at every step: in huge pages, where the system lends them on request.

Weights and cache are read in pieces of a few kilobytes, each in a page of its own that has to be looked up, in a
virtual machine twice. Many Linux systems lend huge pages (2 MiB) to those who ask ("madvise"). Measured by
bench/cpu_kernels.py, gpt2's attention takes 1.43 ms with them and 1.63 with pages of 4 KiB at 16 rows of 64 tokens,
27.3 and 28.8 at 64 rows of 300; a pass of one row over the matrices took as long with either in that run (8.3 ms), in
which the machine's memory was slow.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

HUGE_PAGE: Final = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.zeros; takes memory when it is first written, a page at a time. The pages go with the tensor.

    Raises RuntimeError, as torch does, if there is not so much memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, num_bytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.zeros(shape, dtype=dtype)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(pages, dtype=torch.uint8)
    first = -room.data_ptr() % HUGE_PAGE
    return room[first : first + num_bytes].view(dtype).view(*shape)
