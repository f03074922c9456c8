"""Evaluations, each a function of (model, tokenizer, examples) named by a yaml in conf/eval/.

All rest on two primitives: ``log_likelihoods`` of given answers and ``generate``. Of a model that is a lane of a
pack, these find the answers of all lanes at once (``of_lane``), which evaluations need not know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from peftsweep import metrics
from peftsweep.data import (
    Example,
    Tokens,
    collate,
    prompt_ids,
    tokenize,
    tokenize_for_classes,
    tokenize_pairs,
    truncations,
)
from peftsweep.errors import InputError
from peftsweep.lanes import of_lane
from peftsweep.measure import out_of_memory
from peftsweep.metrics import Judgement, Score
from peftsweep.model import answer_losses, class_logits, classifies, last_positions, row_inputs
from peftsweep.probe import abilities

log = logging.getLogger(__name__)

JUDGED = 2  # the version of how answers are read and judged, under which scores of a base are kept


@dataclass(frozen=True)
class Evaluation:
    """The scores by name, a line a row for predictions/<eval>.jsonl, and what else tells how far to trust them."""

    scores: dict[str, Score]
    predictions: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


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
    return Evaluation(metrics.perplexity(sums, counts), lines, truncations(tokens))


def generation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    metric: Callable[[str, str], Judgement] = metrics.exact_match,
    beside: Mapping[str, Callable[[str, str], Judgement]] | None = None,
    stop: Sequence[str] = (),
    max_new_tokens: int = 32,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
) -> Evaluation:
    """Share of prompts that the model, decoding greedily (or by beams), completes with the right answer.

    What it writes ends before the first of the texts ``stop``. ``beside`` are further readings of the same texts
    by their names, each with its ``<name>_accuracy`` and ``<name>_valid_fraction``.
    """
    predictions = generate(
        model,
        tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=max_length,
        num_beams=num_beams,
        stop=stop,
    )
    answers = [row.answer for row in examples]
    judged = [metric(said, answer) for said, answer in zip(predictions, answers, strict=True)]
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
    scores = metrics.accuracy(judged)
    for name, other in (beside or {}).items():
        read = [other(said, answer) for said, answer in zip(predictions, answers, strict=True)]
        scores |= {f"{name}_{measured}": score for measured, score in metrics.accuracy(read).items()}
        for line, judgement in zip(lines, read, strict=True):
            line |= {f"{name}_extracted": judgement.extracted, f"{name}_correct": judgement.correct}
    facts = metrics.generation_baselines(judged, predictions, answers)
    shortest = metrics.shortest_text if getattr(metric, "func", metric) is metrics.contains else str.strip
    facts |= _room(tokenizer, examples, max_new_tokens, max_length, shortest)
    return Evaluation(scores, lines, facts)


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
        cut = truncations(rows)
        scores = _class_scores(model, rows, pad_id=_pad_id(tokenizer), batch_size=batch_size)
    else:
        pairs = [[(row.asked, row.answer.replace(row.answer.strip(), name)) for name in classes] for row in examples]
        sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "marked": _marked(examples)}
        scores, cut = _grouped_likelihoods(model, tokenizer, pairs, **sizes)
    said = [_likeliest(row) for row in scores]
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
    facts = metrics.answer_baselines([classes[n] for n in said], [classes[n] for n in gold], classes)
    facts |= metrics.f1_baselines(gold, len(classes)) | cut
    return Evaluation(metrics.classification(said, gold, len(classes)), lines, facts)


def multiple_choice(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    headline: Literal["acc", "acc_norm"] | None = None,
    batch_size: int = 16,
    max_length: int = 2048,
) -> Evaluation:
    """Share of questions whose right choice is the likeliest, as lm-evaluation-harness scores them.

    ``acc`` compares the summed log-likelihoods of the choices, ``acc_norm`` those divided by the number of characters
    of each choice. That is measured only where what is scored is the text of the choice itself: the length of a text
    that a letter stands for, or of the word before the scored end of a sentence, says nothing of the likelihood.
    ``headline`` is the one by which trials are compared; null: ``acc_norm`` where it is measured.

    Raises:
        InputError: ``headline`` is acc_norm, and something else than the choices' texts is scored.
    """
    normed = scores_texts(examples)
    if headline == "acc_norm" and not normed:
        raise InputError("headline=acc_norm: what is scored is not the text of the choices; must be acc or null")
    pairs = [[(choice.prompt, choice.answer) for choice in row.choices] for row in examples]
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "marked": _marked(examples)}
    likelihoods, cut = _grouped_likelihoods(model, tokenizer, pairs, **sizes)
    gold = [cast(int, row.gold) for row in examples]
    said = [_likeliest(row) for row in likelihoods]
    lines = [
        {
            "prompt": row.choices[right].prompt,
            "choices": [choice.text for choice in row.choices],
            "prediction": row.choices[mine].text,
            "answer": row.choices[right].text,
            "correct": mine == right,
            "log_likelihoods": found,
        }
        for row, mine, right, found in zip(examples, said, gold, likelihoods, strict=True)
    ]
    scores, facts = {"acc": _share(said, gold)}, _choice_baselines(said, examples)
    if normed:
        by_length = [_likeliest_by_length(row, found) for row, found in zip(examples, likelihoods, strict=True)]
        scores["acc_norm"] = _share(by_length, gold)
        facts |= _of_way("norm_", _choice_baselines(by_length, examples))
        for line, mine, right in zip(lines, by_length, gold, strict=True):
            line["correct_norm"] = mine == right
    return Evaluation(scores, lines, facts | cut | {"headline": headline or [*scores][-1]})


def scores_texts(examples: Sequence[Example]) -> bool:
    """Whether the likelihood that is asked for is that of the choices' own texts, but for white space around them."""
    return all(choice.answer.strip() == choice.text.strip() for row in examples for choice in row.choices)


def _likeliest_by_length(row: Example, likelihoods: Sequence[float]) -> int:
    """The choice with the highest log-likelihood a character."""
    sizes = [max(len(choice.text), 1) for choice in row.choices]
    return _likeliest([found / size for found, size in zip(likelihoods, sizes, strict=True)])


def instruction(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    ways: Sequence[str] = ("generation", "labels", "choices"),
    stop: Sequence[str] = (),
    max_new_tokens: int = 16,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
) -> Evaluation:
    """Questions in the format of commonsense_170k, judged in up to three ways, each with a metric of its own.

    ``accuracy``: the first label (answer2, true) in what the model writes, as LLM-Adapters reads it.
    ``label_acc``: the label whose sentence is likeliest. ``choice_acc`` and ``choice_acc_norm``: the choice
    whose text is, by sum and by character. Each way has its own ``histogram`` and ``degenerate``.
    """
    scores: dict[str, Score] = {}
    facts: dict[str, Any] = {}
    gold = [row.gold for row in examples]
    right = [row.choices[cast(int, row.gold)].label for row in examples]
    lines: list[dict[str, Any]] = [
        {"prompt": row.prompt, "answer": cast(int, row.gold) + 1, "label": label}
        for row, label in zip(examples, right, strict=True)
    ]
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    if "generation" in ways:
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "stop": stop}
        texts = generate(model, tokenizer, examples, **how, **sizes)
        labels = [[choice.label for choice in row.choices] for row in examples]
        judged = [metrics.label_match(t, r.answer, names) for t, r, names in zip(texts, examples, labels, strict=True)]
        scores |= metrics.accuracy(judged)
        facts |= metrics.answer_baselines([j.extracted for j in judged], right, written=texts) | _guessing(examples)
        facts |= _room(tokenizer, examples, max_new_tokens, max_length)
        for line, text, judgement in zip(lines, texts, judged, strict=True):
            line |= {"prediction": text, "extracted": judgement.extracted, "correct": judgement.correct}
    if "labels" in ways:
        pairs = [[(choice.prompt, choice.answer) for choice in row.choices] for row in examples]
        found_labels, cut = _grouped_likelihoods(model, tokenizer, pairs, marked=_marked(examples), **sizes)
        said = [_likeliest(row) for row in found_labels]
        scores["label_acc"] = _share(said, gold)
        facts = _of_way("label_", _choice_baselines(said, examples)) | cut | facts
        for line, n, row in zip(lines, said, examples, strict=True):
            line["label_prediction"] = row.choices[n].label
    if "choices" in ways and any(choice.text != choice.label for row in examples for choice in row.choices):
        found = multiple_choice(model, tokenizer, [_by_texts(row) for row in examples], **sizes)
        scores |= {f"choice_{name}": score for name, score in found.scores.items()}
        facts = _of_way("choice_", found.facts) | facts
        for line, other in zip(lines, found.predictions, strict=True):
            line["choice_prediction"] = other["prediction"]
    return Evaluation(scores, lines, facts)


def _of_way(way: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of one of several ways to judge the same questions: what was answered under names of its own."""
    own = ("histogram", "degenerate")
    return {f"{way}{name}" if name.endswith(own) else name: fact for name, fact in facts.items() if name != "headline"}


def text_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 4,
    max_length: int = 1024,
    stride: int | None = None,
) -> Evaluation:
    """Perplexity of whole texts, of any length, each token once and given at most ``max_length`` - 1 before it.

    Texts are read in windows of ``max_length`` tokens, of which the last ``stride`` are judged (null: all but
    the first, which is lm-evaluation-harness's rolling likelihood); a shorter stride gives each token more
    of what stands before it, at more cost.
    """
    size = min(max_length, tokenizer.model_max_length)
    step = min(stride or size, size - 1)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows: list[Tokens] = []
    owners: list[int] = []
    for n, row in enumerate(examples):
        ids = tokenizer(row.prompt + row.answer, add_special_tokens=False).input_ids
        if row.rendered:
            ids = row.rendered.ids[int(row.rendered.ids[0] == first) :]
        for start in range(0, len(ids), step):
            end = min(start + step, len(ids))
            context = [first, *ids[:start]] if end < size else ids[end - size : start]
            windows.append(Tokens([*context, *ids[start:end]], len(context)))
            owners.append(n)
    sums = log_likelihoods(model, windows, pad_id=_pad_id(tokenizer), batch_size=batch_size)
    lines: list[dict[str, Any]] = [
        {"prompt": "", "answer": row.prompt + row.answer, "log_likelihood": 0.0, "tokens": 0} for row in examples
    ]
    for n, window, total in zip(owners, windows, sums, strict=True):
        lines[n]["log_likelihood"] += total
        lines[n]["tokens"] += window.answer_tokens
    read = [line for line in lines if line["tokens"]]
    return Evaluation(metrics.perplexity([r["log_likelihood"] for r in read], [r["tokens"] for r in read]), lines)


def _grouped_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Sequence[tuple[str, str]]],
    *,
    batch_size: int,
    max_length: int,
    marked: bool,
) -> tuple[list[list[float]], dict[str, int]]:
    """The log-likelihood of what follows in each pair of context and following text, group by group; and what was cut.

    What the pairs of a group begin with in common is read once, where the model takes a cache. ``marked``
    contexts hold their special tokens as text, see ``tokenize_pairs``.
    """
    pad_id = _pad_id(tokenizer)
    tokens = iter(tokenize_pairs(tokenizer, [pair for group in groups for pair in group], max_length, marked=marked))
    rows = [[next(tokens) for _ in group] for group in groups]
    cut = truncations([max(group, key=lambda row: (row.lost_answer, row.lost_prompt)) for group in rows])
    if _takes_a_cache(model) and all(_common_length(group) for group in rows):
        return of_lane(partial(_shared_likelihoods, model, rows, pad_id=pad_id, batch_size=batch_size)), cut
    flat = [row for group in rows for row in group]
    sums = iter(log_likelihoods(model, flat, pad_id=pad_id, batch_size=batch_size))
    return [[next(sums) for _ in group] for group in groups], cut


@torch.no_grad()
def _shared_likelihoods(
    model: nn.Module, groups: Sequence[Sequence[Tokens]], *, pad_id: int, batch_size: int, lanes: int
) -> list[list[list[float]]]:
    """``log_likelihoods`` of groups of rows whose beginnings are the same, each beginning read once; of each lane."""
    device = next(model.parameters()).device
    scores: list[list[list[float]]] = [[[] for _ in groups] for _ in range(lanes)]
    shared = [_common_length(group) for group in groups]

    def score(numbers: list[int]) -> None:
        every = numbers * lanes
        starts = [groups[n][0].ids[: shared[n]] for n in every]
        ids, attention = _padded(starts, pad_id, device, left=True)
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
        rest, present = _padded(rows, pad_id, device, left=False)
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
    _in_batches([len(group[0].ids) for group in groups], max(1, batch_size // most), score)
    return scores


def _common_length(rows: Sequence[Tokens]) -> int:
    """How many tokens the rows begin with in common, up to the one before the first answer."""
    limit = min(row.answer_start for row in rows)
    same = [len(set(column)) == 1 for column in zip(*(row.ids[:limit] for row in rows), strict=True)]
    return same.index(False) if False in same else limit


def _padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of ``rows``, [rows, length] on ``device``."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[n, place] = torch.tensor(row)
        attention[n, place] = 1
    return ids.to(device), attention.to(device)


def _marked(examples: Sequence[Example]) -> bool:
    """Whether the prompts hold their special tokens as text, which the tokenizer then adds no more."""
    return any(row.rendered for row in examples)


def _likeliest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _share(said: Sequence[int], gold: Sequence[int | None]) -> Score:
    return metrics.proportion(sum(s == g for s, g in zip(said, gold, strict=True)), len(gold))


def _choice_baselines(said: Sequence[int], examples: Sequence[Example]) -> dict[str, Any]:
    """Baselines over the choices, by their labels where these are the same in all rows, else by place, from 1 on."""
    longest = max(len(row.choices) for row in examples)
    at_place = [{row.choices[n].label for row in examples if n < len(row.choices)} for n in range(longest)]
    labels = [next(iter(names)) for names in at_place]
    same = len(set(labels)) == longest and all(len(names) == 1 for names in at_place)
    names = labels if same else [str(n + 1) for n in range(longest)]
    gold = [names[cast(int, row.gold)] for row in examples]
    return metrics.answer_baselines([names[n] for n in said], gold, names) | _guessing(examples)


def _guessing(examples: Sequence[Example]) -> dict[str, float]:
    """The share of right answers that guessing is expected to reach, where some questions have more choices."""
    return {"random": sum(1 / len(row.choices) for row in examples) / len(examples)}


def _room(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    max_length: int,
    needed: Callable[[str], str] = str.strip,
) -> dict[str, int]:
    """How many prompts are cut, and of how many references what is ``needed`` has more tokens than may be written."""
    limit = min(max_length, tokenizer.model_max_length - max_new_tokens)
    references = tokenizer([needed(row.answer) for row in examples], add_special_tokens=False).input_ids
    return {
        "truncated_prompts": sum(len(ids) > limit for ids in prompt_ids(tokenizer, examples)),
        "long_references": sum(len(ids) > max_new_tokens for ids in references),
    }


def _by_texts(row: Example) -> Example:
    return row._replace(choices=tuple(choice._replace(answer=choice.text) for choice in row.choices))


@torch.no_grad()
def _class_scores(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int) -> list[list[float]]:
    """The log-probability of every class of each row."""
    device = next(model.parameters()).device
    scores: list[list[float]] = [[] for _ in rows]

    def score(numbers: list[int]) -> None:
        batch = collate([rows[n] for n in numbers], pad_id).to(device)
        for n, found in zip(numbers, class_logits(model, batch).log_softmax(-1).tolist(), strict=True):
            scores[n] = found

    _in_batches([len(row.ids) for row in rows], batch_size, score)
    return scores


# What each evaluation measures, by name, so that a misspelt one is found before anything is loaded.
MEASURES: dict[Callable[..., Evaluation], tuple[str, ...]] = {
    perplexity: ("perplexity", "loss"),
    text_perplexity: ("perplexity", "loss"),
    generation: ("accuracy", "valid_fraction"),
    classification: ("accuracy", "f1"),
    multiple_choice: ("acc", "acc_norm"),
}
NOT_THE_TEXTS = ("peftsweep.tasks.winogrande", "peftsweep.tasks.commonsense_qa")  # are what their readers have scored
WAYS = {  # of instruction
    "generation": ("accuracy", "valid_fraction"),
    "labels": ("label_acc",),
    "choices": ("choice_acc", "choice_acc_norm"),
}


def measures(function: Any, options: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The metrics of an evaluation with these options; None of one that is not of this module."""
    if function is instruction:
        return tuple(name for way in options.get("ways", WAYS) for name in WAYS.get(way, ()))
    known = MEASURES.get(function)
    if known and function is generation:
        return (*known, *(f"{name}_{metric}" for name in options.get("beside") or () for metric in known))
    return ("acc",) if known and options.get("reader") in NOT_THE_TEXTS else known


# ---- the two primitives ----------------------------------------------------------------------------


def log_likelihoods(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int = 16) -> list[float]:
    """The log-probability of each row's answer (or class) given its prompt, summed over the answer's tokens."""
    return of_lane(partial(_log_likelihoods, model, rows, pad_id=pad_id, batch_size=batch_size))


@torch.no_grad()
def _log_likelihoods(
    model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int, lanes: int
) -> list[list[float]]:
    device = next(model.parameters()).device
    sums = [[0.0] * len(rows) for _ in range(lanes)]

    def score(numbers: list[int]) -> None:
        batch = collate([rows[n] for n in numbers], pad_id).repeated(lanes).to(device)
        losses = answer_losses(model, batch)
        totals = torch.zeros(lanes * len(numbers), device=device).index_add_(0, batch.owners, -losses)
        for mine, found in zip(sums, totals.view(lanes, -1).tolist(), strict=True):
            for n, total in zip(numbers, found, strict=True):
                mine[n] = total

    _in_batches([len(row.ids) for row in rows], batch_size, score)
    return sums


def mean_loss(model: nn.Module, rows: Sequence[Tokens], *, pad_id: int, batch_size: int = 16) -> float:
    """The mean loss an answer token (or class), in nats."""
    return -sum(log_likelihoods(model, rows, pad_id=pad_id, batch_size=batch_size)) / sum(r.answer_tokens for r in rows)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Example],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
    stop: Sequence[str] = (),
) -> list[str]:
    """The model's continuation of each prompt (of an example, its prompt), without the prompt, up to its end mark.

    What a chat template rendered also ends where the template ends a turn. What is written ends before the first
    of the texts ``stop``, as with ``until`` of lm-evaluation-harness.
    """
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "max_length": max_length}
    return of_lane(partial(_generate, model, tokenizer, prompts, **sizes, num_beams=num_beams, stop=stop))


@torch.no_grad()
def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    max_length: int,
    num_beams: int,
    stop: Sequence[str],
    lanes: int,
) -> list[list[str]]:
    device = next(model.parameters()).device
    limit = min(max_length, tokenizer.model_max_length - max_new_tokens)
    if limit < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: the model sees {tokenizer.model_max_length} tokens at once")
    encoded = prompt_ids(tokenizer, prompts, limit)
    stops = _Stops(tokenizer, stop)
    ends = sorted({*_end_ids(model, tokenizer), *_turn_ends(prompts)})
    texts = [[""] * len(prompts) for _ in range(lanes)]
    greedy = num_beams == 1 and _takes_a_cache(model)
    batch_size = batch_size if abilities(model).padded_batches else 1

    def write(numbers: list[int]) -> None:
        # Padded on the left, as generation goes on at the right.
        ids, attention = _padded([encoded[n] for n in numbers * lanes], _pad_id(tokenizer), device, left=True)
        made = (
            _greedy(model, ids, attention, max_new_tokens, ends, stops, lanes)
            if greedy
            else _searched(model, tokenizer, ids, attention, max_new_tokens, num_beams, ends, stops)
        )
        written = map(stops.before, tokenizer.batch_decode(made, skip_special_tokens=True))
        for mine in texts:
            for n in numbers:
                mine[n] = next(written)

    _in_batches([len(ids) for ids in encoded], batch_size, write)
    return texts


class _Stops:
    """Texts that end what is written, in whatever tokens they come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = [text for text in texts if text]
        # A token holds at least a byte, but for what begins before the text.
        self._look_back = max((len(text.encode()) for text in self._texts), default=0) + 2

    def __bool__(self) -> bool:
        return bool(self._texts)

    def reached(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Whether one of the texts stands at the end of each row of tokens."""
        if not self._texts:
            return [False] * len(rows)
        ends = self._tokenizer.batch_decode([list(row[-self._look_back :]) for row in rows])
        return [any(text in end for text in self._texts) for end in ends]

    def before(self, text: str) -> str:
        """``text`` up to the first of them."""
        for stop in self._texts:
            text = text.partition(stop)[0]
        return text


class _Stopping(StoppingCriteria):
    """The same for transformers' own generation, after prompts of ``start`` tokens."""

    def __init__(self, stops: _Stops, start: int) -> None:
        self._stops, self._start = stops, start

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        return torch.tensor(self._stops.reached(input_ids[:, self._start :].tolist()), device=input_ids.device)


def _greedy(
    model: nn.Module,
    ids: torch.Tensor,
    attention: torch.Tensor,
    max_new_tokens: int,
    end: Sequence[int],
    stops: _Stops,
    lanes: int,
) -> list[list[int]]:
    """The likeliest next token again and again; a row that has ended leaves the batch, and its cache with it.

    ``ids`` and ``attention`` are [lanes * rows, length], padded on the left. Lanes stay of one size: in one that
    has ended more of its rows than another, some that have ended are read on, for nothing.
    """
    written: list[list[int]] = [[] for _ in ids]
    running = list(range(len(ids)))
    over = [False] * len(ids)  # of each that is running
    ends = torch.tensor(end, device=ids.device)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    cache: Any = None
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if step else last_positions(1, ids.device),
        )
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1)
        over = [before or now for before, now in zip(over, torch.isin(chosen, ends).tolist(), strict=True)]
        for row, token, ended in zip(running, chosen.tolist(), over, strict=True):
            if not ended:
                written[row].append(token)
        said = stops.reached([written[row] for row in running])
        over = [before or now for before, now in zip(over, said, strict=True)]
        if all(over) or step == max_new_tokens - 1:
            break
        if len(places := _unfinished(over, lanes)) < len(running):
            kept = torch.tensor(places, device=ids.device)
            cache.batch_select_indices(kept)
            running, over = [running[n] for n in places], [over[n] for n in places]
            chosen, attention, positions = chosen[kept], attention[kept], positions[kept]
        ids = chosen[:, None]
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return written


def _unfinished(over: Sequence[bool], lanes: int) -> list[int]:
    """The places that are not over; and in each lane as many others that all keep as many."""
    size = len(over) // lanes
    ordered = [sorted(range(size * n, size * (n + 1)), key=over.__getitem__) for n in range(lanes)]
    most = max(sum(not over[place] for place in mine) for mine in ordered)
    return [place for mine in ordered for place in mine[:most]]


def _searched(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    attention: torch.Tensor,
    max_new_tokens: int,
    num_beams: int,
    ends: Sequence[int],
    stops: _Stops,
) -> list[list[int]]:
    """What transformers' own generation writes: with beams, and for methods that prepare their inputs themselves."""
    made: torch.Tensor = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=attention,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        temperature=None,  # a base's own sampling defaults must not leak in
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(ends),
        stopping_criteria=StoppingCriteriaList([_Stopping(stops, ids.shape[1])] if stops else []),
        **row_inputs(model, ids),
    )
    tokens: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return tokens


def _takes_a_cache(model: nn.Module) -> bool:
    """Whether the model can be called a token at a time, on a cache that gives up the rows that have ended.

    Not with virtual tokens, nor if it reads each token twice, nor where the probe of its base has found otherwise.
    """
    config: Any = model.config
    if not getattr(config, "use_cache", True) or row_inputs(model, torch.zeros(1, 1)):
        return False
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    able = abilities(model)
    return able.padded_batches and able.row_cache


def _end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end marks of the tokenizer and of the model's generation config, such as the end of a turn."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or []
    marks = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    return sorted(int(mark) for mark in marks if mark is not None)


def _turn_ends(prompts: Sequence[str | Example]) -> set[int]:
    rendered = [prompt.rendered for prompt in prompts if isinstance(prompt, Example)]
    return {row.end for row in rendered if row is not None and row.end is not None}


def _in_batches(lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], None]) -> None:
    """Do ``work`` on the numbers of all rows in batches, longest first, so that too large a batch fails at once.

    Where memory runs out the batch is halved, and the rest goes on so.
    """
    left = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    while left:
        numbers = left[:batch_size]
        try:
            work(numbers)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if len(numbers) == 1 or not out_of_memory(error):
                raise
            numbers = []
        if numbers:
            left = left[batch_size:]
            continue
        batch_size = max(1, min(batch_size, len(left)) // 2)
        log.warning("out of memory in an evaluation; going on with batches of %d rows", batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(cast(int, tokenizer.pad_token_id))
