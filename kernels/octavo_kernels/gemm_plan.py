"""Which GEMM a linear layer uses: the tiles of ours, or cuBLAS, per shape.

Until a card has been measured the default rules of `choose` hold. `bench/kernels.py` times `candidates` beside cuBLAS;
what it finds goes into MEASURED, one line per shape, and wins over the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """Tiles of one launch of the Triton GEMM."""

    tile_m: int
    """rows of x: the MMA's N side"""
    tile_o: int
    """rows of the weight: the MMA's M side"""
    tile_k: int
    splits: int = 1
    """parts of K, in fp32 partial sums that a second kernel adds in index order"""
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest plan of one shape on one card, for as many rows as the range says."""

    device: str
    """as torch.cuda.get_device_name says"""
    dtype: torch.dtype
    o: int
    k: int
    first_m: int
    last_m: int
    plan: GemmPlan | None
    """None: cuBLAS"""


MEASURED: Final[tuple[Measured, ...]] = ()
"""No card has been measured yet."""

SKINNY_ROWS: Final = 16
"""Up to so many rows the default is the Triton GEMM, beyond it cuBLAS: the MMA's smallest full tile."""
ENOUGH_PROGRAMS: Final = 96
"""Of 132 multiprocessors (H100); with fewer programs than this, weights are not read at full bandwidth."""
LONG_K: Final = 4096
"""From here on K is split where there are too few programs, which pays for the second kernel's launch."""


def choose(m: int, o: int, k: int, dtype: torch.dtype, device: str = "") -> GemmPlan | None:
    """The GEMM for x [m, k] and a weight [o, k]; None: cuBLAS. device: the card's name, for its measured lines.

    Default where nothing was measured: Triton for m <= SKINNY_ROWS, cuBLAS beyond.
    """
    measured = _measured(m, o, k, dtype, device)
    if measured is not None:
        return measured.plan
    return skinny_plan(o, k, dtype) if m <= SKINNY_ROWS else None


@lru_cache(maxsize=4096)
def _measured(m: int, o: int, k: int, dtype: torch.dtype, device: str) -> Measured | None:
    for line in MEASURED:
        if (line.device, line.dtype, line.o, line.k) == (device, dtype, o, k) and line.first_m <= m <= line.last_m:
            return line
    return None


@lru_cache(maxsize=256)
def skinny_plan(o: int, k: int, dtype: torch.dtype) -> GemmPlan:
    """Tiles for a few rows: the widest that still give ENOUGH_PROGRAMS, else narrow ones, else K is split too."""
    tile_k = 128 if dtype.itemsize == 2 else 64
    for tile_o in (64, 32):
        if -(-o // tile_o) >= ENOUGH_PROGRAMS:
            return GemmPlan(16, tile_o, tile_k)
    if k < LONG_K:
        return GemmPlan(16, 16, 2 * tile_k, num_stages=3)
    splits = min(8, -(-ENOUGH_PROGRAMS // -(-o // 32)))
    return GemmPlan(16, 32, tile_k, splits=splits)


@lru_cache(maxsize=256)
def invariant_plan(o: int, k: int, dtype: torch.dtype) -> GemmPlan:
    """The one plan of a weight for every number of rows, so that a row's sums never depend on the others.

    Never split: partial sums of a long prefill would cost more memory traffic than its weights.
    """
    if dtype.itemsize == 2:
        return GemmPlan(64, 64, 64)
    return GemmPlan(32, 32, 32, num_stages=3)  # multiplied without tensor cores: more would spill


def candidates(m: int, o: int, k: int, dtype: torch.dtype) -> list[GemmPlan]:
    """Plans worth timing for a shape, the default first."""
    plans = [skinny_plan(o, k, dtype), invariant_plan(o, k, dtype)]
    tile_m = min(128, max(16, 1 << (m - 1).bit_length()))
    for tile_o in (16, 32, 64, 128):
        for tile_k in (64, 128, 256):
            for splits in (1, 2, 4, 5, 8):
                stages = 3 if tile_k == 256 else 4
                shared = (tile_m + tile_o) * tile_k * dtype.itemsize * stages
                steps = -(-k // tile_k)
                if shared > 200 << 10 or splits > steps or (splits > 1 and -(-o // tile_o) * splits > 264):
                    continue  # does not fit a multiprocessor; empty parts; already enough programs
                warps = 8 if tile_m * tile_o >= 128 * 128 else 4
                plans.append(GemmPlan(tile_m, tile_o, tile_k, splits, warps, stages))
    return list(dict.fromkeys(plans))
