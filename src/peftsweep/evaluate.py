"""Evaluations, each a function of (model, tokenizer, examples) named by a yaml in conf/eval/.

All rest on two primitives: ``log_likelihoods`` of given answers and ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peftsweep import metrics
from peftsweep.data import Example, Tokens, collate, tokenize, tokenize_for_classes
from peftsweep.metrics import Judgement, Score
from peftsweep.model import answer_losses, class_logits, classifies, row_inputs


@dataclass(frozen=True)
class Evaluation:
    """The scores by name, and a line a row for predictions/<eval>.jsonl."""

    scores: dict[str, Score]
    predictions: list[dict[str, Any]]


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_length: int = 768,
) -> Evaluation:
    """Perplexity of the answers given their prompts; neither prompts nor padding count."""
    tokens = tokenize(tokenizer, examples, max_length)
    sums = log_likelihoods(model, tokens, pad_id=_pad_id(tokenizer), batch_size=batch_size)
    counts = [row.answer_tokens for row in tokens]
    lines = [
        {"prompt": row.prompt, "answer": row.answer, "log_likelihood": total, "tokens": n}
        for row, total, n in zip(examples, sums, counts, strict=True)
    ]
    return Evaluation(metrics.perplexity(sums, counts), lines)


def generation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    metric: Callable[[str, str], Judgement] = metrics.exact_match,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
) -> Evaluation:
    """Share of prompts that the model, decoding greedily (or by beams), completes with the right answer."""
    predictions = generate(
        model,
        tokenizer,
        [row.prompt for row in examples],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=max_length,
        num_beams=num_beams,
    )
    judged = [metric(said, row.answer) for said, row in zip(predictions, examples, strict=True)]
    lines = [
        {
            "prompt": row.prompt,
            "prediction": said,
            "answer": row.answer,
            "extracted": judgement.extracted,
            "correct": judgement.correct,
        }
        for row, said, judgement in zip(examples, predictions, judged, strict=True)
    ]
    return Evaluation(metrics.accuracy(judged), lines)


def classification(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    classes: Sequence[str],
    batch_size: int = 32,
    max_length: int = 512,
) -> Evaluation:
    """Share of rows whose likeliest class is the right one, and F1.

    A classifier says how likely each class is; of a language model it is asked by the probability
    of the class's name as the answer.
    """
    gold = [classes.index(row.answer.strip()) for row in examples]
    if classifies(model):
        rows = tokenize_for_classes(tokenizer, examples, max_length, classes)
        scores = _class_scores(model, rows, pad_id=_pad_id(tokenizer), batch_size=batch_size)
    else:
        named = [Example(row.prompt, row.answer.replace(row.answer.strip(), c)) for row in examples for c in classes]
        tokens = tokenize(tokenizer, named, max_length)
        sums = log_likelihoods(model, tokens, pad_id=_pad_id(tokenizer), batch_size=batch_size)
        scores = [sums[start : start + len(classes)] for start in range(0, len(sums), len(classes))]
    said = [max(range(len(classes)), key=row.__getitem__) for row in scores]
    lines = [
        {
            "prompt": row.prompt,
            "prediction": classes[mine],
            "answer": classes[right],
            "correct": mine == right,
            "log_likelihoods": score,
        }
        for row, mine, right, score in zip(examples, said, gold, scores, strict=True)
    ]
    return Evaluation(metrics.classification(said, gold, len(classes)), lines)


@torch.no_grad()
def _class_scores(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int) -> list[list[float]]:
    """The log-probability of every class of each row."""
    device = next(model.parameters()).device
    scores: list[list[float]] = [[] for _ in rows]
    for numbers in _batches_by_length([len(row.ids) for row in rows], batch_size):
        batch = collate([rows[n] for n in numbers], pad_id).to(device)
        for n, score in zip(numbers, class_logits(model, batch).log_softmax(-1).tolist(), strict=True):
            scores[n] = score
    return scores


# ---- the two primitives ----------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int = 16) -> list[float]:
    """The log-probability of each row's answer (or class) given its prompt, summed over the answer's tokens."""
    device = next(model.parameters()).device
    sums = [0.0] * len(rows)
    for numbers in _batches_by_length([len(row.ids) for row in rows], batch_size):
        batch = collate([rows[n] for n in numbers], pad_id).to(device)
        losses = answer_losses(model, batch)
        totals = torch.zeros(len(numbers), device=device).index_add_(0, batch.owners, -losses)
        for n, total in zip(numbers, totals.tolist(), strict=True):
            sums[n] = total
    return sums


def mean_loss(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int = 16) -> float:
    """The mean loss an answer token (or class), in nats."""
    return -sum(log_likelihoods(model, rows, pad_id=pad_id, batch_size=batch_size)) / sum(r.answer_tokens for r in rows)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
) -> list[str]:
    """The model's continuation of each prompt, without the prompt, up to its end mark."""
    device = next(model.parameters()).device
    encoded = [ids[-max_length:] for ids in tokenizer(list(prompts)).input_ids]
    texts = [""] * len(prompts)
    for numbers in _batches_by_length([len(ids) for ids in encoded], batch_size):
        longest = max(len(encoded[n]) for n in numbers)
        ids = torch.full((len(numbers), longest), _pad_id(tokenizer), dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for place, n in enumerate(numbers):  # padded on the left: generation goes on at the right
            ids[place, longest - len(encoded[n]) :] = torch.tensor(encoded[n])
            attention[place, longest - len(encoded[n]) :] = 1
        made = cast(Any, model).generate(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            temperature=None,  # a base's own sampling defaults must not leak in
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **row_inputs(model, ids.to(device)),
        )
        for n, text in zip(numbers, tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True), strict=True):
            texts[n] = text
    return texts


def _batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches, longest rows first, so that too large a batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(cast(int, tokenizer.pad_token_id))
