"""Compute threads bound to cores: those of torch's OpenMP pool, which the C kernels share, and the caller of both."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import numpy as np
import torch

from octavo_kernels.cpu import native


class BindingError(Exception):
    """Threads cannot be bound to these cores."""


class Binding:
    """From now on thread i of torch's runs on core `cores[i]` only, the calling one is thread 0; until `release`.

    There is one binding in a process, the newest. Threads that the caller starts meanwhile inherit its core. Needs the
    C kernels, through which threads bind themselves, also those that OpenMP starts later.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        """Raises BindingError."""
        if native.library() is None:
            raise BindingError(f"threads are bound by the CPU's own kernels, which are not there: {native.why_not()}")
        self._before = os.sched_getaffinity(0)
        if _bind([[core] for core in cores]) < torch.get_num_threads():
            self.release()
            raise BindingError(f"OpenMP or the system does not let {len(cores)} threads run on these cores")

    def release(self) -> None:
        """The pool and the caller run where they did before."""
        _bind([self._before])


def _bind(places: Sequence[Collection[int]]) -> int:
    """Thread i on the cores of `places[i % len(places)]`. Returns how many threads of torch's pool took theirs."""
    words = max(map(max, places)) // 64 + 1
    masks = np.zeros((len(places), words), np.uint64)
    for mask, cores in zip(masks, places, strict=True):
        for core in cores:
            mask[core // 64] |= np.uint64(1) << np.uint64(core % 64)
    num_bound: int = native.loaded().octavo_bind(masks.ctypes.data, len(places), 8 * words, torch.get_num_threads())
    return num_bound
