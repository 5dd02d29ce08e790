"""The logits pipeline of transformers 5.23 for one row, restated: the executable specification of octavo's sampler.

`generate()` turns the logits of the last position into the distribution it samples from by running a list of
processors, then (only when sampling) a list of warpers, in the order fixed by
`GenerationMixin._get_logits_processor` (huggingface/transformers, src/transformers/generation/utils.py). This module
says the same in plain torch, one row at a time, in two forms:

* `process_logits` and `warp_exact` give the row transformers gives, bit for bit, ties included;
* `warp_interval` gives what the kernel computes: two fp32 numbers. Every warper keeps an *interval* of logit values,
  so the survivors of all of them are {lo <= x <= hi} and no per-token mask exists. The interval keeps every token tied
  with a boundary value, where top_p and top_h of transformers keep those that its (unstable) sort happens to put on
  the right side. Otherwise each warper gives the same in both forms.

The tests compare octavo's sampler with both forms, and with the processors that transformers itself builds
(`transformers_row`).

Notation: V is the vocabulary size, L the length of prompt + output so far, P the prompt length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEG_INF = -math.inf
TOP_H_CANDIDATES = 100  # TopHLogitsWarper looks at the 100 largest logits only


@dataclass(frozen=True, slots=True)
class RowParams:
    """Parameters of one row, named as in `GenerationConfig` and resolved: an unset field holds generate()'s default."""

    max_length: int
    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    num_beams: int = 1

    sequence_bias: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_length: int = 0  # counts the prompt
    min_new_tokens: int | None = None  # overrides min_length
    allowed_token_ids: Sequence[int] | None = None  # what prefix_allowed_tokens_fn returned for this step
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()

    temperature: float = 1.0
    top_h: float | None = None
    top_k: int = 50  # 0: off
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    renormalize_logits: bool = False

    @property
    def min_tokens_to_keep(self) -> int:
        """1, but one more than the number of EOS tokens (at least 2) with beams, so that a beam can continue."""
        return max(2, len(self.eos_token_ids) + 1) if self.num_beams > 1 else 1


def guide(logits: Tensor, negative_logits: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, the first step of all when `guidance_scale` is set.

    Args:
        logits: [V] fp32, the conditional branch.
        negative_logits: [V], the branch that started from the negative prompt. Not upcast by transformers: in a bf16
            model its log_softmax is rounded to bf16.
        guidance_scale: g; 1 means off (and then not even the log_softmax happens).
    """
    conditional = torch.log_softmax(logits, -1)
    unconditional = torch.log_softmax(negative_logits, -1)
    return guidance_scale * (conditional - unconditional) + unconditional


def divide(x: Tensor, divisor: float, reference_device: str = "cpu") -> Tensor:
    """`x / divisor` as PyTorch computes it for a Python number on the given device.

    A CPU divides. CUDA multiplies by the fp32 reciprocal (pytorch/pytorch,
    aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu): another last bit for about 9 % of fp32 values at divisor 0.7.
    """
    if reference_device == "cpu":
        return x / divisor
    reciprocal = torch.tensor(1.0, dtype=x.dtype) / torch.tensor(divisor, dtype=x.dtype)
    return x * reciprocal.to(x.device)


def process_logits(
    logits: Tensor, token_ids: Tensor, prompt_len: int, params: RowParams, reference_device: str = "cpu"
) -> Tensor:
    """Steps 2 to 16 of the pipeline: everything that also acts on greedy rows.

    Args:
        logits: [V] fp32. Log-probabilities when `num_beams` > 1: beam search normalises first.
        token_ids: [L] int64, prompt and output so far.
        prompt_len: P.
        reference_device: "cpu" or "cuda", see `divide`.

    Returns:
        [V] fp32, a new tensor.
    """
    x = logits.clone()
    length = token_ids.numel()
    history = token_ids.tolist()
    prompt = history[:prompt_len]
    eos = list(params.eos_token_ids)

    if params.sequence_bias:
        x = x + _sequence_bias(params.sequence_bias, history, x)
    if params.encoder_repetition_penalty != 1.0:
        x = _penalize(x, prompt, 1 / params.encoder_repetition_penalty, reference_device)
    if params.repetition_penalty != 1.0:
        x = _penalize(x, history, params.repetition_penalty, reference_device)
    if params.no_repeat_ngram_size > 0:
        x[_ngram_completions(history, history, params.no_repeat_ngram_size)] = NEG_INF
    if params.encoder_no_repeat_ngram_size > 0:
        x[_ngram_completions(prompt, history, params.encoder_no_repeat_ngram_size)] = NEG_INF
    single_eos = [(token,) for token in eos]  # transformers drops such entries
    bad_words = [tuple(word) for word in params.bad_words_ids if tuple(word) not in single_eos]
    if bad_words:
        x = x + _sequence_bias(dict.fromkeys(bad_words, NEG_INF), history, x)

    min_length = params.min_length if params.min_new_tokens is None else prompt_len + params.min_new_tokens
    if eos and length < min_length:
        x[eos] = NEG_INF
    if params.allowed_token_ids is not None:
        mask = torch.full_like(x, NEG_INF)
        mask[list(params.allowed_token_ids)] = 0.0
        # transformers decides this per beam group: the fallback needs every beam of the group to be all -inf.
        x = mask if torch.isneginf((x + mask).amax()) else x + mask
    if params.forced_bos_token_id is not None and length == 1:
        x = _force(x, [params.forced_bos_token_id])
    if params.forced_eos_token_ids and length == params.max_length - 1:
        x = _force(x, params.forced_eos_token_ids)
    if params.remove_invalid_values:
        limits = torch.finfo(x.dtype)
        x = torch.nan_to_num(x, nan=0.0, posinf=limits.max, neginf=limits.min)
    if params.exponential_decay_length_penalty is not None:
        start, factor = params.exponential_decay_length_penalty
        steps = length - (start + prompt_len)
        if steps > 0:
            growth = factor**steps - 1  # Python double, rounded to fp32 by the product
            boosted = x[eos] + x[eos].abs() * growth
            x[eos] = torch.where(torch.isfinite(x[eos]), boosted, x[eos])
    if params.suppress_tokens:
        x[list(params.suppress_tokens)] = NEG_INF
    begin = prompt_len if prompt_len > 1 or params.forced_bos_token_id is None else prompt_len + 1
    if params.begin_suppress_tokens and length == begin:
        x[list(params.begin_suppress_tokens)] = NEG_INF
    return x


def _sequence_bias(biases: Mapping[tuple[int, ...], float], history: list[int], like: Tensor) -> Tensor:
    """[V] fp32 sum of the biases whose prefix ends the history; the caller adds the sum to the scores, once.

    Single-token entries come first, then the longer ones grouped by length, groups in order of first appearance:
    the order of the fp32 additions when several entries end in the same token.
    """
    total = torch.zeros_like(like)
    by_prefix_len: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for sequence, bias in biases.items():
        if len(sequence) == 1:
            total[sequence[0]] = bias
        else:
            by_prefix_len.setdefault(len(sequence) - 1, []).append((tuple(sequence), bias))
    for prefix_len, group in by_prefix_len.items():
        if prefix_len > len(history):
            continue
        suffix = tuple(history[-prefix_len:])
        for sequence, bias in group:
            if sequence[:-1] == suffix:
                total[sequence[-1]] += bias
    return total


def _penalize(x: Tensor, tokens: Sequence[int], penalty: float, reference_device: str) -> Tensor:
    """Scales each distinct token of `tokens` once: negative scores are multiplied, the others divided."""
    index = torch.tensor(sorted(set(tokens)), dtype=torch.long)
    scores = x[index]
    x[index] = torch.where(scores < 0, scores * penalty, divide(scores, penalty, reference_device))
    return x


def _ngram_completions(source: list[int], history: list[int], n: int) -> list[int]:
    """Tokens that would complete an n-gram of `source` whose first n-1 tokens are the last n-1 of `history`."""
    if len(history) < n - 1:
        return []
    suffix = history[len(history) - (n - 1) :]
    return [source[i + n - 1] for i in range(len(source) - n + 1) if source[i : i + n - 1] == suffix]


def _force(x: Tensor, tokens: Sequence[int]) -> Tensor:
    forced = torch.full_like(x, NEG_INF)
    forced[list(tokens)] = 0.0
    return forced


@dataclass(frozen=True, slots=True)
class Warper:
    """One warper in both forms. `row` is [V] fp32 with the tokens dropped so far at -inf."""

    name: str
    dropped: Callable[[Tensor], Tensor]  # row -> [V] bool, the tokens transformers drops
    bounds: Callable[[Tensor], tuple[Tensor, Tensor]]  # row -> (lo, hi): keep lo <= row <= hi
    key: Callable[[Tensor], Tensor] = lambda row: row  # row -> [V], what the warper ranks tokens by


def warpers(params: RowParams) -> list[Warper]:
    """Steps 19 to 25 that are in use, in order. Step 18, the temperature, is `scale`."""
    keep_at_least = params.min_tokens_to_keep
    steps = []
    if params.top_h is not None:
        steps.append(_top_h(params.top_h))
    if params.top_k:
        steps.append(_top_k(max(params.top_k, keep_at_least)))
    if params.top_p < 1.0:
        steps.append(_top_p(params.top_p, keep_at_least))
    if params.min_p is not None:
        steps.append(_min_p(params.min_p, keep_at_least))
    if params.typical_p < 1.0:
        steps.append(_typical(params.typical_p, keep_at_least))
    if 0.0 < params.epsilon_cutoff < 1.0:
        steps.append(_floor("epsilon_cutoff", lambda row: params.epsilon_cutoff, keep_at_least))
    if 0.0 < params.eta_cutoff < 1.0:
        steps.append(_floor("eta_cutoff", _eta(params.eta_cutoff), keep_at_least))
    return steps


def scale(scores: Tensor, params: RowParams, reference_device: str = "cpu") -> Tensor:
    """Step 18: [V] scores over the temperature."""
    return scores if params.temperature == 1.0 else divide(scores, params.temperature, reference_device)


def warp_exact(scores: Tensor, params: RowParams, reference_device: str = "cpu") -> Tensor:
    """Steps 18 to 25, sampling only: [V] fp32 with the dropped tokens at -inf, exactly as transformers drops them.

    Each warper sees the survivors of the one before, renormalised (a softmax over a row with -inf entries).
    Among tied tokens the order of `torch.sort` decides, as it does in transformers.
    """
    row = scale(scores, params, reference_device)
    for warper in warpers(params):
        row = row.masked_fill(warper.dropped(row), NEG_INF)
    return row


def warp_interval(scores: Tensor, params: RowParams, reference_device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Steps 18 to 25 as the kernel does them: the survivors are the tokens with lo <= x <= hi.

    Returns:
        x [V] fp32, the scores over the temperature; lo and hi, fp32 scalars.
    """
    x = scale(scores, params, reference_device)
    lo, hi = torch.tensor(NEG_INF), torch.tensor(math.inf)
    for warper in warpers(params):
        step_lo, step_hi = warper.bounds(apply_interval(x, lo, hi))
        lo, hi = torch.maximum(lo, step_lo), torch.minimum(hi, step_hi)
    return x, lo, hi


def apply_interval(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """[V] fp32: x inside [lo, hi], -inf outside."""
    return torch.where((x >= lo) & (x <= hi), x, NEG_INF)


def _kth_largest(row: Tensor, k: int) -> Tensor:
    return torch.topk(row, min(k, row.numel())).values[-1]


def _from(values: Tensor, otherwise: float) -> tuple[Tensor, Tensor]:
    """The interval from the smallest of `values` up, or from `otherwise` when there is none."""
    return (values.min() if values.numel() else torch.tensor(otherwise)), torch.tensor(math.inf)


def _top_h(top_h: float) -> Warper:
    """The most likely tokens of the best 100 until their entropy terms exceed top_h of the entropy of those 100."""

    def prefix(row: Tensor):
        top = torch.topk(row, min(TOP_H_CANDIDATES, row.numel()))
        distribution = torch.distributions.Categorical(logits=top.values)
        terms = -distribution.probs * torch.log(distribution.probs)
        kept = terms.cumsum(-1) <= distribution.entropy() * top_h
        kept[0] = True
        return top, kept

    def dropped(row: Tensor) -> Tensor:
        top, kept = prefix(row)
        mask = torch.ones(row.numel(), dtype=torch.bool)
        mask[top.indices[kept]] = False
        return mask

    def bounds(row: Tensor) -> tuple[Tensor, Tensor]:
        top, kept = prefix(row)
        return _from(top.values[kept], NEG_INF)

    return Warper("top_h", dropped, bounds)


def _top_k(k: int) -> Warper:
    """The k largest and everything tied with the last of them."""
    return Warper(
        "top_k",
        dropped=lambda row: row < _kth_largest(row, k),
        bounds=lambda row: (_kth_largest(row, k), torch.tensor(math.inf)),
    )


def _top_p(top_p: float, keep_at_least: int) -> Warper:
    """Drops the least likely tokens whose cumulative probability, from below, is at most 1 - top_p (a double)."""

    def tail(row: Tensor):
        order = torch.sort(row)
        return order, order.values.softmax(-1).cumsum(-1) <= 1 - top_p

    def dropped(row: Tensor) -> Tensor:
        order, mask = tail(row)
        mask[-keep_at_least:] = False
        return torch.empty_like(mask).scatter_(0, order.indices, mask)

    def bounds(row: Tensor) -> tuple[Tensor, Tensor]:
        order, mask = tail(row)
        lo, hi = _from(order.values[~mask], math.inf)
        return torch.minimum(lo, _kth_largest(row, keep_at_least)), hi

    return Warper("top_p", dropped, bounds)


def _min_p(min_p: float, keep_at_least: int) -> Warper:
    """Drops tokens less likely than min_p times the most likely one.

    transformers fills up to `keep_at_least` by probability, the interval by logit: not the same when the runner-up's
    probability underflows to zero.
    """

    def dropped(row: Tensor) -> Tensor:
        probs = row.softmax(-1)
        mask = probs < min_p * probs.max()
        mask[torch.topk(probs, min(keep_at_least, row.numel())).indices] = False
        return mask

    def bounds(row: Tensor) -> tuple[Tensor, Tensor]:
        probs = row.softmax(-1)
        lo, hi = _from(row[~(probs < min_p * probs.max())], math.inf)
        return torch.minimum(lo, _kth_largest(row, keep_at_least)), hi

    return Warper("min_p", dropped, bounds, key=lambda row: row.softmax(-1))


def _typical(mass: float, keep_at_least: int) -> Warper:
    """The tokens whose surprise is closest to the entropy, until their probability reaches `mass`; ties kept."""

    def distances(row: Tensor):
        log_probs = torch.log_softmax(row, -1)
        entropy = -(log_probs * log_probs.exp()).nansum(-1)
        distance = (-log_probs - entropy).abs()
        order = torch.sort(distance)
        cumulative = row[order.indices].softmax(-1).cumsum(-1)
        last = min(int((cumulative < mass).sum()), row.numel() - 1)
        return distance, order, last

    def dropped(row: Tensor) -> Tensor:
        _, order, last = distances(row)
        mask = order.values > order.values[last]
        mask[:keep_at_least] = False
        return torch.empty_like(mask).scatter_(0, order.indices, mask)

    def bounds(row: Tensor) -> tuple[Tensor, Tensor]:
        distance, order, last = distances(row)
        radius = torch.maximum(order.values[last], order.values[min(keep_at_least, row.numel()) - 1])
        inside = row[~(distance > radius)]
        return inside.min(), inside.max()

    return Warper("typical_p", dropped, bounds, key=lambda row: distances(row)[0])


def _floor(name: str, floor: Callable[[Tensor], Tensor | float], keep_at_least: int) -> Warper:
    """Drops tokens whose probability is below a floor computed from the row."""

    def dropped(row: Tensor) -> Tensor:
        return (row.softmax(-1) < floor(row)) & (row < _kth_largest(row, keep_at_least))

    def bounds(row: Tensor) -> tuple[Tensor, Tensor]:
        above = ~(row.softmax(-1) < floor(row)) & (row > NEG_INF)
        lo, hi = _from(row[above], math.inf)
        return torch.minimum(lo, _kth_largest(row, keep_at_least)), hi

    return Warper(name, dropped, bounds)


def _eta(epsilon: float) -> Callable[[Tensor], Tensor]:
    """The floor of eta sampling: min(epsilon, sqrt(epsilon) * exp(-entropy)), all in fp32."""

    def floor(row: Tensor) -> Tensor:
        limit = torch.tensor(epsilon)
        entropy = torch.distributions.Categorical(logits=row).entropy()
        return torch.minimum(limit, limit.sqrt() * torch.exp(-entropy))

    return floor


def process_row(
    logits: Tensor,
    token_ids: Tensor,
    prompt_len: int,
    params: RowParams,
    reference_device: str = "cpu",
    *,
    intervals: bool = False,
) -> Tensor:
    """The whole pipeline after guidance: [V] fp32, what transformers reports as `scores` of this step.

    The caller takes argmax (first index on ties) when `do_sample` is false, else draws from its softmax.
    """
    x = process_logits(logits, token_ids, prompt_len, params, reference_device)
    if params.do_sample and intervals:
        x = apply_interval(*warp_interval(x, params, reference_device))
    elif params.do_sample:
        x = warp_exact(x, params, reference_device)
    return torch.log_softmax(x, -1) if params.renormalize_logits else x


def row_params(kwargs: dict, allowed: list[int] | None) -> RowParams:
    """The same keywords for this module: EOS ids as tuples, the constraint's answer as a list."""

    def as_tuple(value: int | list[int]) -> tuple[int, ...]:
        return (value,) if isinstance(value, int) else tuple(value)

    fields = dict(kwargs, eos_token_ids=as_tuple(kwargs["eos_token_id"]), allowed_token_ids=allowed)
    del fields["eos_token_id"]
    if "forced_eos_token_id" in fields:
        fields["forced_eos_token_ids"] = as_tuple(fields.pop("forced_eos_token_id"))
    return RowParams(**fields)


def transformers_row(model, logits: Tensor, token_ids: Tensor, prompt_len: int, kwargs: dict, allowed) -> Tensor:
    """The row from the processors that transformers builds for these keywords."""
    from transformers import GenerationConfig

    config = GenerationConfig(**kwargs)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    if config.min_new_tokens is not None:  # as GenerationMixin._prepare_generated_length
        config.min_length = prompt_len + config.min_new_tokens
    model._prepare_special_tokens(config, True, device="cpu")
    processors = model._get_logits_processor(
        config,
        input_ids_seq_length=prompt_len,
        encoder_input_ids=token_ids[None, :prompt_len],
        prefix_allowed_tokens_fn=None if allowed is None else lambda batch_id, ids: allowed,
        device="cpu",
        model_kwargs={},
    )
    rows = max(1, kwargs.get("num_beams", 1))  # a constraint sees whole beam groups
    return processors(token_ids.expand(rows, -1), logits.expand(rows, -1).clone())[0]
