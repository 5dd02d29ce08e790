"""Logprobs and logits that requests ask to see: of chosen, most likely and requested tokens, with ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.step import Int32s, LogprobRows, LogprobSpec, PromptLogprobs
from octavo.types import LogprobKind
from octavo.worker.request_states import Float32s, Int64s

RAW: Final = (LogprobKind.RAW_LOGPROB, LogprobKind.RAW_LOGIT)
NORMALIZED: Final = (LogprobKind.RAW_LOGPROB, LogprobKind.PROCESSED_LOGPROB)
NO_IDS: Final = np.empty(0, np.int32)
NO_VALUES: Final = np.empty(0, np.float32)


def gather_logprobs(
    logits: Tensor,
    scores: Tensor,
    warped: Mapping[int, Tensor],
    rows: Int64s,
    specs: list[LogprobSpec],
    token_ids: Int32s,
) -> LogprobRows:
    """Values of some rows of a sampling step.

    Args:
        logits: [S, V] as the model left them, the raw values.
        scores: float32 [S, V], processed.
        warped: float32 [V] processed and filtered scores of the rows that sampled and want processed values.
        rows: int64 [Q] rows that asked, ascending; `specs` [Q] says for what.
        token_ids: int32 [S] chosen.
    """
    values = torch.stack(
        [_row_values(logits, scores, warped, row, s.kind) for row, s in zip(rows.tolist(), specs, strict=True)]
    )
    chosen, ranks = chosen_and_ranks(values, token_ids[rows])
    top_ids: list[Int32s] = [NO_IDS] * len(rows)
    top_values: list[Float32s] = [NO_VALUES] * len(rows)
    for num_top in sorted({spec.num_top for spec in specs} - {0}):
        members = [i for i, spec in enumerate(specs) if spec.num_top == num_top]
        ids, tops = most_likely(values[members], num_top)
        for i, member in enumerate(members):
            top_ids[member], top_values[member] = ids[i], tops[i]
    requested = [values[i, spec.token_ids].cpu().numpy() for i, spec in enumerate(specs)]
    return LogprobRows(
        rows=rows.astype(np.int32),
        chosen=chosen,
        ranks=ranks,
        top_offsets=_offsets(top_ids),
        top_token_ids=np.concatenate(top_ids),
        top_values=np.concatenate(top_values),
        requested_offsets=_offsets(requested),
        requested=np.concatenate(requested),
    )


def join_logprob_rows(parts: list[LogprobRows]) -> LogprobRows:
    """Values of different rows of one step, in order, as one."""

    def joined(column: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, column) for part in parts])

    return LogprobRows(
        rows=joined("rows"),
        chosen=joined("chosen"),
        ranks=joined("ranks"),
        top_offsets=_joined_offsets([part.top_offsets for part in parts]),
        top_token_ids=joined("top_token_ids"),
        top_values=joined("top_values"),
        requested_offsets=_joined_offsets([part.requested_offsets for part in parts]),
        requested=joined("requested"),
    )


def gather_prompt_logprobs(
    logits: Tensor, next_token_ids: Int32s, num_top: int
) -> tuple[Float32s, Int32s, Int32s, Float32s]:
    """Raw logprobs of the tokens that follow T positions of a prompt.

    Args:
        logits: [T, V].
        next_token_ids: int32 [T].

    Returns:
        chosen float32 [T], ranks int32 [T], top ids int32 [T, num_top], top values float32 [T, num_top].
    """
    values = logits.float().log_softmax(-1)
    chosen, ranks = chosen_and_ranks(values, next_token_ids)
    return chosen, ranks, *most_likely(values, num_top)


def join_prompt_logprobs(
    row: int, start: int, parts: list[tuple[Float32s, Int32s, Int32s, Float32s]]
) -> PromptLogprobs:
    """The slices of one chunk, in order, as one."""
    chosen, ranks, top_ids, top_values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return PromptLogprobs(row, start, top_ids.shape[1], chosen, ranks, top_ids, top_values)


def _row_values(logits: Tensor, scores: Tensor, warped: Mapping[int, Tensor], row: int, kind: LogprobKind) -> Tensor:
    if kind in RAW:
        values = logits[row].float()
    else:
        values = warped[row] if row in warped else scores[row]
    return values.log_softmax(-1) if kind in NORMALIZED else values


def chosen_and_ranks(values: Tensor, token_ids: Int32s) -> tuple[Float32s, Int32s]:
    """Value and rank (1 is the largest; tied tokens share the best) of one token of each row of [Q, V]."""
    index = torch.from_numpy(token_ids.astype(np.int64))[:, None].to(values.device)
    chosen = values.gather(1, index)
    ranks = (values > chosen).sum(-1) + 1
    return chosen[:, 0].cpu().numpy(), ranks.cpu().numpy().astype(np.int32)


def most_likely(values: Tensor, num_top: int) -> tuple[Int32s, Float32s]:
    """The largest of each row, falling: ids int32 [Q, num_top] and values float32 [Q, num_top]."""
    top = torch.topk(values, num_top)
    return top.indices.cpu().numpy().astype(np.int32), top.values.cpu().numpy()


def _offsets(parts: list[Int32s] | list[Float32s]) -> Int32s:
    return np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)


def _joined_offsets(parts: list[Int32s]) -> Int32s:
    return np.cumsum(np.concatenate([[0], *(np.diff(part) for part in parts)]), dtype=np.int32)
