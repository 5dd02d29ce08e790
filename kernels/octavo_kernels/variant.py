"""One compiled form of a kernel: what compile_check.py builds without a GPU and checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants one launch of the engine gives it.

    signature names every argument of the kernel in order: "*bf16", "*i32", "i32", "i64", "fp32" ... or
    "constexpr" for those in constexprs. divisible names the arguments that the JIT would mark as divisible by
    16: pointers of PyTorch allocations and strides of 16 elements; 16-byte loads depend on it.
    """

    name: str  # unique over all families: "paged_attention/decode fma bf16 block32"
    kernel: Any  # a triton JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # per thread, `maxnreg` of the launch
    fp_fusion: bool = True
    wide_loads: bool = True  # 16-byte loads from global memory are expected
    mma: str | None = None  # tensor cores expected: "mma" everywhere, or "wgmma" on sm_90 (mma elsewhere)
    early_loads: int = 0  # of weights, before the wait of a dependent launch, in instructions
    min_capability: int = 80  # 89 where the engine launches it only on GPUs that convert fp8

    @property
    def dependent(self) -> bool:
        """Compiled for dependent launch, see dependent_launch.py."""
        return bool(self.constexprs.get("DEPENDENT_LAUNCH"))

    def __post_init__(self) -> None:
        """Raises ValueError where the fields do not fit the kernel or each other."""
        if self.mma not in (None, "mma", "wgmma"):
            raise ValueError(f"mma: {self.mma!r} is not None, 'mma' or 'wgmma'")
        constants = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constants != set(self.constexprs):
            raise ValueError(f"constexprs: {self.name}: differ from signature: {constants ^ set(self.constexprs)}")
        arguments = list(getattr(self.kernel, "arg_names", self.signature))
        if set(arguments) != set(self.signature):
            raise ValueError(f"signature: {self.name}: differs from kernel: {set(arguments) ^ set(self.signature)}")
        if not self.divisible <= set(self.signature) - constants:
            raise ValueError(f"divisible: {self.name}: not arguments: {self.divisible - set(self.signature)}")
