"""The specification: every op in plain torch, on any device, what the kernels are tested and measured against.

`model` has the ops of the forward pass, `inputs` what prepares a step, `history` and `sampling` the choice of tokens.
"""

from octavo_kernels.reference.history import apply_history
from octavo_kernels.reference.inputs import apply_diffs, prepare
from octavo_kernels.reference.model import (
    ATTENTION_WORKSPACE,
    add_layer_norm,
    attention_bytes,
    copy_blocks,
    embed,
    kv_write,
    layer_norm,
    linear,
    paged_attention,
    shared_attention,
    to_fp8,
)
from octavo_kernels.reference.sampling import choose, filter_row, process_row

__all__ = [
    "ATTENTION_WORKSPACE",
    "add_layer_norm",
    "apply_diffs",
    "apply_history",
    "attention_bytes",
    "choose",
    "copy_blocks",
    "embed",
    "filter_row",
    "kv_write",
    "layer_norm",
    "linear",
    "paged_attention",
    "prepare",
    "process_row",
    "shared_attention",
    "to_fp8",
]
