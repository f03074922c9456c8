"""Log-likelihoods of answers and the scores of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peftsweep.data.batches import collate
from peftsweep.data.tokens import Tokens, tokenize_pairs, truncations
from peftsweep.evaluation.decoding import in_batches, padded_ids, padding_id, takes_a_cache
from peftsweep.models.losses import answer_losses, class_logits, last_positions
from peftsweep.models.parts import SHORT_ROWS, forget_longer_rows, rows_by_rotation
from peftsweep.training.slots import of_slot


def grouped_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Sequence[tuple[str, str]]],
    *,
    batch_size: int,
    max_length: int,
    marked: bool,
    ends: Sequence[int] = (),
) -> tuple[list[list[float]], dict[str, int]]:
    """The log-likelihood of what follows in each pair of context and following text, group by group; and what was cut.

    What the pairs of a group begin with in common is read once, where the model takes a cache. ``marked``
    contexts hold their special tokens as text, see ``tokenize_pairs``. With ``ends``, a token for each group, this
    token counts too after each text of the group.
    """
    pad_id = padding_id(tokenizer)
    limit = min(max_length, tokenizer.model_max_length) - bool(ends)
    tokens = iter(tokenize_pairs(tokenizer, [pair for group in groups for pair in group], limit, marked=marked))
    rows = [[next(tokens) for _ in group] for group in groups]
    if ends:
        rows = [[row._replace(ids=[*row.ids, end]) for row in group] for group, end in zip(rows, ends, strict=True)]
    cut = truncations([max(group, key=lambda row: (row.lost_answer, row.lost_prompt)) for group in rows])
    lengths = [len(row.ids) for group in rows for row in group]
    short = all(group == SHORT_ROWS for group in rows_by_rotation(model, lengths))
    if short and takes_a_cache(model) and all(_common_length(group) for group in rows):
        return of_slot(partial(_shared_likelihoods, model, rows, pad_id=pad_id, batch_size=batch_size)), cut
    flat = [row for group in rows for row in group]
    sums = iter(log_likelihoods(model, flat, pad_id=pad_id, batch_size=batch_size))
    return [[next(sums) for _ in group] for group in groups], cut


@torch.no_grad()
def _shared_likelihoods(
    model: nn.Module, groups: Sequence[Sequence[Tokens]], *, pad_id: int, batch_size: int, slots: int
) -> list[list[list[float]]]:
    """``log_likelihoods`` of groups of rows whose beginnings are the same, each beginning read once; of each slot."""
    device = next(model.parameters()).device
    scores: list[list[list[float]]] = [[[] for _ in groups] for _ in range(slots)]
    shared = [_common_length(group) for group in groups]

    def score(numbers: list[int]) -> None:
        every = numbers * slots
        starts = [groups[n][0].ids[: shared[n]] for n in every]
        ids, attention = padded_ids(starts, pad_id, device, left=True)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        output = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=last_positions(1, device),
        )
        owners = torch.tensor([place for place, n in enumerate(every) for _ in groups[n]], device=device)
        cache: Any = output.past_key_values
        cache.batch_select_indices(owners)
        rows = [row.ids[shared[n] :] for n in every for row in groups[n]]
        rest, present = padded_ids(rows, pad_id, device, left=False)
        after = model(
            input_ids=rest,
            attention_mask=torch.cat([attention[owners], present], dim=1),
            position_ids=positions[owners, -1:] + present.cumsum(-1),
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([output.logits[owners], after.logits[:, :-1]], dim=1)
        losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), rest, reduction="none")
        first = torch.tensor([r.answer_start - shared[n] for n in every for r in groups[n]], device=device)
        answers = present.bool() & (torch.arange(rest.shape[1], device=device) >= first[:, None])
        totals = iter((-losses * answers).sum(-1).tolist())
        for mine in scores:
            for n in numbers:
                mine[n] = [next(totals) for _ in groups[n]]

    most = max(len(group) for group in groups)
    in_batches([len(group[0].ids) for group in groups], max(1, batch_size // most), score)
    return scores


def _common_length(rows: Sequence[Tokens]) -> int:
    """How many tokens the rows begin with in common, up to the one before the first answer."""
    limit = min(row.answer_start for row in rows)
    same = [len(set(column)) == 1 for column in zip(*(row.ids[:limit] for row in rows), strict=True)]
    return same.index(False) if False in same else limit


@torch.no_grad()
def class_scores(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int) -> list[list[float]]:
    """The log-probability of every class of each row."""
    device = next(model.parameters()).device
    scores: list[list[float]] = [[] for _ in rows]

    def score(numbers: list[int]) -> None:
        batch = collate([rows[n] for n in numbers], pad_id).to(device)
        for n, found in zip(numbers, class_logits(model, batch).log_softmax(-1).tolist(), strict=True):
            scores[n] = found

    _in_batches(model, rows, batch_size, score)
    return scores


# ---- the two primitives ----------------------------------------------------------------------------


def log_likelihoods(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int = 16) -> list[float]:
    """The log-probability of each row's answer (or class) given its prompt, summed over the answer's tokens."""
    return of_slot(partial(_log_likelihoods, model, rows, pad_id=pad_id, batch_size=batch_size))


@torch.no_grad()
def _log_likelihoods(
    model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int, slots: int
) -> list[list[float]]:
    device = next(model.parameters()).device
    sums = [[0.0] * len(rows) for _ in range(slots)]

    def score(numbers: list[int]) -> None:
        batch = collate([rows[n] for n in numbers], pad_id).repeated(slots).to(device)
        losses = answer_losses(model, batch)
        totals = torch.zeros(slots * len(numbers), device=device).index_add_(0, batch.owners, -losses)
        for mine, found in zip(sums, totals.view(slots, -1).tolist(), strict=True):
            for n, total in zip(numbers, found, strict=True):
                mine[n] = total

    _in_batches(model, rows, batch_size, score)
    return sums


def _in_batches(model: nn.Module, rows: Sequence[Tokens], batch_size: int, score: Callable[[list[int]], None]) -> None:
    """``score`` the rows in batches in which no row changes what the model reads of another."""
    groups = rows_by_rotation(model, [len(row.ids) for row in rows])

    def alike(numbers: list[int]) -> None:
        if groups[numbers[0]] != SHORT_ROWS:
            forget_longer_rows(model)
        score(numbers)

    in_batches([len(row.ids) for row in rows], batch_size, alike, groups)


def mean_loss(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int) -> float:
    """The mean loss an answer token (or class), in nats."""
    return -sum(log_likelihoods(model, rows, pad_id=pad_id)) / sum(r.answer_tokens for r in rows)
