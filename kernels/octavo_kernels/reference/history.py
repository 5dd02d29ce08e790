"""The specification of what depends on the tokens so far: `octavo_kernels.history` leaves the same, bit for bit.

Row by row over the same state; numbers of the steps as in `octavo_kernels.state.Feature`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.state import Bitmap, Feature, Param, SlotState
from octavo_kernels.workspace import SamplerWorkspace

BANS = Feature.NO_REPEAT_NGRAM | Feature.ENCODER_NO_REPEAT_NGRAM | Feature.BAD_WORDS
SCORES = Feature.BIAS | Feature.OUTPUT_PENALTY


def apply_history(
    logits: Tensor, state: SlotState, row_slots: Tensor, workspace: SamplerWorkspace, *, reciprocal: bool
) -> None:
    """As `octavo_kernels.history.apply_history`."""
    for row, slot in enumerate(row_slots.tolist()):
        if not 0 <= slot < state.padding_slot or state.finished[slot] != 0:
            continue
        features = Feature(int(state.params[slot, Param.FEATURES]))
        if features & BANS:
            banned = torch.zeros(state.bitmaps.shape[2] * 32, dtype=torch.bool)
            banned[[token for token in _bans(state, slot, features) if 0 <= token < state.vocab_size]] = True
            workspace.banned[row] = pack(banned).to(workspace.banned.device)
        if features & SCORES:
            x = logits[row, : state.vocab_size].float().clone()
            workspace.scores[row, : state.vocab_size] = _scores(x, state, slot, features, reciprocal)


def pack(bits: Tensor) -> Tensor:
    """bool [32 * W] as a bitmap, int32 [W]."""
    values = (bits.view(-1, 32).long() << torch.arange(32, device=bits.device)).sum(1)
    return torch.where(values >= 2**31, values - 2**32, values).int()


def unpack(bitmap: Tensor) -> Tensor:
    """int32 [W] as bool [32 * W]."""
    return (bitmap[:, None] >> torch.arange(32, device=bitmap.device) & 1).view(-1).bool()


def divide(x: Tensor, divisor: Tensor, reciprocal: bool) -> Tensor:
    """x / divisor as PyTorch divides by a Python number: CUDA multiplies by the fp32 reciprocal."""
    return x * divisor.reciprocal() if reciprocal else x / divisor


def history(state: SlotState, slot: int) -> list[int]:
    tokens: list[int] = state.hist[slot, : max(0, int(state.length[slot]))].tolist()
    return tokens


def _bans(state: SlotState, slot: int, features: Feature) -> list[int]:
    """Steps 5, 6, and 7 for words of several tokens."""
    tokens, params = history(state, slot), state.params[slot].tolist()
    bans = []
    if features & Feature.NO_REPEAT_NGRAM:
        bans += _completions(tokens, tokens, params[Param.NO_REPEAT_NGRAM_SIZE])
    if features & Feature.ENCODER_NO_REPEAT_NGRAM:
        prompt = tokens[: max(0, params[Param.PROMPT_LEN])]
        bans += _completions(prompt, tokens, params[Param.ENCODER_NO_REPEAT_NGRAM_SIZE])
    if features & Feature.BAD_WORDS:
        words = _sequences(state.bad_words[slot], params[Param.NUM_BAD_WORDS])
        bans += [last for last, _, prefix in words if _ends_with(tokens, prefix)]
    return bans


def _completions(source: list[int], tokens: list[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram of `source` whose first size - 1 tokens end the history."""
    if not 0 < size <= len(source):
        return []
    suffix = tokens[len(tokens) - (size - 1) :]
    starts = range(len(source) - size + 1)
    return [source[i + size - 1] for i in starts if source[i : i + size - 1] == suffix]


def _sequences(words: Tensor, count: int) -> list[tuple[int, int, list[int]]]:
    """(last token or index, bias by bits, the other tokens) of each sequence in a list, up to the first broken one."""
    sequences, at = [], 0
    for _ in range(count):
        if at + 3 >= len(words):
            break
        size, last, bias = words[at : at + 3].tolist()
        if not 2 <= size <= len(words) - at - 2:
            break
        sequences.append((last, bias, words[at + 3 : at + 2 + size].tolist()))
        at += size + 2
    return sequences


def _ends_with(tokens: list[int], prefix: list[int]) -> bool:
    return len(prefix) <= len(tokens) and tokens[len(tokens) - len(prefix) :] == prefix


def _scores(x: Tensor, state: SlotState, slot: int, features: Feature, reciprocal: bool) -> Tensor:
    """Steps 2, 3, 4 and 4a on fp32 [V]."""
    floats = state.params[slot].view(torch.float32)
    if features & Feature.BIAS:
        x = x + _bias(state, slot)
    for feature, bitmap, column in (
        (Feature.ENCODER_REPETITION_PENALTY, Bitmap.PROMPT_SEEN, Param.ENCODER_REPETITION_PENALTY),
        (Feature.REPETITION_PENALTY, Bitmap.SEEN, Param.REPETITION_PENALTY),
    ):
        if features & feature:
            penalized = torch.where(x < 0, x * floats[column], divide(x, floats[column], reciprocal))
            x = torch.where(unpack(state.bitmaps[slot, bitmap])[: state.vocab_size], penalized, x)
    if features & Feature.OUTPUT_PENALTY:
        num_counts = max(0, int(state.num_counts[slot]))
        for token, count in zip(
            state.count_ids[slot, :num_counts].tolist(), state.counts[slot, :num_counts].tolist(), strict=True
        ):
            if 0 <= token < state.vocab_size and count > 0:
                x[token] -= floats[Param.FREQUENCY_PENALTY] * count
                x[token] -= floats[Param.PRESENCE_PENALTY]
    return x


def _bias(state: SlotState, slot: int) -> Tensor:
    """fp32 [V] what each token gets at this step."""
    num_biases = max(0, int(state.params[slot, Param.NUM_BIASES]))
    ids = state.bias_ids[slot, :num_biases].tolist()
    sums = state.bias_values[slot, :num_biases].view(torch.float32).clone()
    tokens = history(state, slot)
    for last, bias, prefix in _sequences(state.bias_sequences[slot], int(state.params[slot, Param.NUM_BIAS_SEQUENCES])):
        if 0 <= last < len(ids) and _ends_with(tokens, prefix):
            sums[last] += torch.tensor(bias, dtype=torch.int32).view(torch.float32)
    total = torch.zeros(state.vocab_size, device=sums.device)
    for token, value in zip(ids, sums, strict=True):
        if 0 <= token < state.vocab_size:
            total[token] = value
    return total
