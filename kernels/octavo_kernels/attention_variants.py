"""Caches for which the attention kernels are compiled without a GPU, for `compile_check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from octavo_kernels.variant import Variant

_WIDTHS: Final = {"bf16": 2, "fp16": 2, "fp32": 4, "u8": 1}
_NOT_MULTIPLES: Final = {"num_blocks", "max_blocks", "max_splits", "num_rows", "num_tokens"}
"""Integers that the launches do not specialise."""


@dataclass(frozen=True, slots=True)
class CacheKind:
    dtype: str
    """Of queries, keys and values of the step."""
    cache: str
    """Of cached numbers; "u8" are bytes of fp8."""
    heads: int
    head_size: int
    block_size: int
    fp8: str = "none"

    @property
    def itemsize(self) -> int:
        return _WIDTHS[self.cache]

    def variant(self, form: str, kernel: Any, constants: dict[str, Any], **options: Any) -> Variant:
        """constants: all constexprs but the launch's, among them pointers that are None."""
        constants = constants | {"DEPENDENT_LAUNCH": False}
        kinds = {"qkv_ptr": f"*{self.dtype}", "out_ptr": f"*{self.dtype}", "cache_ptr": f"*{self.cache}"}
        kinds |= {"partial_ptr": "*fp32", "lse_ptr": "*fp32"}
        kinds |= dict.fromkeys(("scale", "k_scale", "v_scale"), "fp32")
        signature = {
            name: "constexpr" if name in constants else kinds.get(name, "*i32" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        floats = {name for name, kind in signature.items() if kind == "fp32"}
        fp8 = f" {self.fp8}" if self.cache == "u8" else ""
        return Variant(
            name=f"paged_attention/{form} {self.dtype} {self.cache.replace('u8', 'fp8')}{fp8} "
            f"{self.heads}x{self.head_size} block{self.block_size}",
            kernel=kernel,
            signature=signature,
            constexprs=constants,
            divisible=frozenset(set(signature) - set(constants) - floats - _NOT_MULTIPLES),
            fp_fusion=True,
            min_capability=89 if self.fp8 == "hardware" else 80,
            **options,
        )


SHARING: Final = CacheKind("bf16", "bf16", 20, 64, 32)
"""Also compiled with splits that rows share."""


def cache_kinds() -> list[CacheKind]:
    """gpt2-large (20 heads of 64) by type and block size, gpt2-xl's 25 heads, the demo model's 4, other head sizes."""
    return [
        CacheKind("bf16", "bf16", 20, 64, 16),
        CacheKind("bf16", "bf16", 20, 64, 32),
        CacheKind("bf16", "bf16", 20, 64, 64),
        CacheKind("fp16", "fp16", 20, 64, 32),
        CacheKind("fp32", "fp32", 20, 64, 32),
        CacheKind("bf16", "u8", 20, 64, 16, "hardware"),
        CacheKind("bf16", "u8", 20, 64, 32, "hardware"),
        CacheKind("bf16", "u8", 20, 64, 32, "integers"),
        CacheKind("bf16", "bf16", 25, 64, 32),
        CacheKind("bf16", "bf16", 4, 64, 32),
        CacheKind("bf16", "bf16", 8, 32, 32),
        CacheKind("bf16", "bf16", 16, 80, 32),
        CacheKind("bf16", "bf16", 16, 96, 32),
        CacheKind("bf16", "bf16", 16, 128, 32),
    ]
