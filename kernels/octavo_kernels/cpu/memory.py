"""Memory for large tensors that are read at every step: in huge pages, where the system lends them on request.

Weights and cache are read in pieces of a few kilobytes, each in a page of its own: looking pages up costs as much as
the reading, in a virtual machine above all. Linux' default is to give huge pages (2 MiB) to those who ask ("madvise").
Measured by bench/cpu_kernels.py, gpt2's matrices and attention in pages of 4 KiB and of 2 MiB:
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
