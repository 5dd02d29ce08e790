"""Programmatic dependent launch: a kernel of the step may start before the kernel in front of it has ended.

Launched so, its programs take their places on the device, compute addresses and ask for weights while the predecessor
drains, which hides most of the gap between two kernels. NVIDIA GPUs of compute capability 9.0 on; elsewhere, and in
Triton's interpreter, kernels are compiled and launched without it.

Why no order is lost. Kernels A, B, C, ... are launched one after another on one stream.

1. Every program of a kernel launched this way begins with `follow`, and touches nothing before it but weights, which no
   kernel writes. `follow` waits until the kernel in front has ended, with all its writes visible.
2. So C, which may be resident while B runs, reads and writes only after B has ended. B ended after each of its programs
   had waited for the end of A, and so on: all that was launched before C has ended by then, whether C reads what it
   wrote or overwrites what it read. One program that returned without waiting would break this chain for all that
   follow: `follow` comes before the first `return`.
3. A kernel launched without it (PyTorch's, cuBLAS's, the diffs of the state), a copy or a memset starts when all before
   it has ended, as ever, and one that never lets its dependents go counts as letting them go when it ends.
4. Weights are written when the model is loaded, before the first step.

`follow` lets the dependents go right after the wait, not before: they come when all programs of this kernel have
started, so they take no place from it, and at most two kernels of the chain are on the device.

Log
  Device: none yet. compile_check finds the wait before every access to global memory but the weights' (PTX), and in the
  machine code of sm_90 ACQBULK comes before the first load; no variant spills, registers differ by at most 2.
  Predicted: 0.7 of ~2 us per kernel boundary hidden, 15 to 20 % of a step at batch 1; nothing where the kernels are
    long, nor between cuBLAS's.
  linear layers ask L2 for four tiles of K before the wait: 32 KB for each of ~120 programs, 4 MB, about what memory
    gives in a boundary. Predicted to matter as much as the launch at batch 1, where memory idles between kernels.
  letting dependents go before the wait instead: not chosen, the whole chain would pile up on the device.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def follow():
    """First of all in a kernel, where DEPENDENT_LAUNCH: waits for what was launched before, then lets the next kernel
    start. The condition stays with the caller: in the interpreter a call costs 0.3 ms per program."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Asks L2 for the cache lines at these addresses of weights."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


def launch_options(dependent_launch: bool) -> dict[str, Any]:
    """Keywords of a launch of a kernel that begins with `follow`."""
    return {"DEPENDENT_LAUNCH": True, "launch_pdl": True} if dependent_launch else {"DEPENDENT_LAUNCH": False}
