"""Evaluations, each a function of (model, tokenizer, examples) named by a yaml in conf/eval/.

All rest on two primitives: ``log_likelihoods`` of given answers and ``generate``. Of a model that is a slot of a
pack, these find the answers of all slots at once (``of_slot``), which evaluations need not know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from peftsweep.data.templates import Example
from peftsweep.data.tokens import Tokens, prompt_ids, tokenize, tokenize_for_classes, truncations
from peftsweep.errors import InputError
from peftsweep.evaluation import metrics
from peftsweep.evaluation.decoding import generate, padding_id, written_texts
from peftsweep.evaluation.likelihood import class_scores, grouped_likelihoods, log_likelihoods
from peftsweep.evaluation.metrics import Judgement, Score
from peftsweep.models.parts import classifies

log = logging.getLogger(__name__)

JUDGING_VERSION = 4  # the version of how answers are read and judged, under which scores of a base are kept


@dataclass(frozen=True)
class Evaluation:
    """The scores by name, the rows of predictions/<eval>.jsonl, and facts that tell how far to trust the scores."""

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
    sums = log_likelihoods(model, tokens, pad_id=padding_id(tokenizer), batch_size=batch_size)
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
    metric: Callable[[str, str], Judgement | bool] = metrics.exact_match,
    beside: Mapping[str, Callable[[str, str], Judgement | bool]] | None = None,
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
    judged = metrics.judgements(metric, predictions, answers)
    lines = [
        {
            "prompt": row.prompt,
            "prediction": prediction,
            "answer": row.answer,
            "extracted": judgement.extracted,
            "correct": judgement.correct,
        }
        for row, prediction, judgement in zip(examples, predictions, judged, strict=True)
    ]
    scores = metrics.accuracy(judged)
    for name, other in (beside or {}).items():
        read = metrics.judgements(other, predictions, answers)
        scores |= {f"{name}_{measured}": score for measured, score in metrics.accuracy(read).items()}
        for line, judgement in zip(lines, read, strict=True):
            line |= {f"{name}_extracted": judgement.extracted, f"{name}_correct": judgement.correct}
    facts = metrics.generation_baselines(judged, predictions, answers)
    shortest = metrics.shortest_text if getattr(metric, "func", metric) is metrics.contains else str.strip
    facts |= room(tokenizer, examples, max_new_tokens, max_length, shortest)
    facts["unwritable_references"] = unwritable(tokenizer, answers, stop, partial(metrics.judgements, metric))
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
    """Share of rows whose most likely class is the right one, and F1.

    The likelihood of a class is the output of a classifier; for a language model it is the probability of the class's
    name as the answer. If one name begins with another (10 and 1), the end mark after the name counts too: the shorter
    name would otherwise always be as likely as the longer one.
    """
    gold = [classes.index(row.answer.strip()) for row in examples]
    if classifies(model):
        rows = tokenize_for_classes(tokenizer, examples, max_length, classes)
        cut = truncations(rows)
        scores = class_scores(model, rows, pad_id=padding_id(tokenizer), batch_size=batch_size)
    else:
        pairs = [
            [(row.model_prompt, row.answer.replace(row.answer.strip(), name)) for name in classes] for row in examples
        ]
        sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "marked": _marked(examples)}
        ends = [_end(tokenizer, row) for row in examples] if begin_alike(classes) else []
        scores, cut = grouped_likelihoods(model, tokenizer, pairs, **sizes, ends=ends)
    predicted = [_likeliest(row) for row in scores]
    lines = [
        {
            "prompt": row.prompt,
            "prediction": classes[mine],
            "answer": classes[right],
            "correct": mine == right,
            "log_likelihoods": score,
        }
        for row, mine, right, score in zip(examples, predicted, gold, scores, strict=True)
    ]
    facts = metrics.answer_baselines([classes[n] for n in predicted], [classes[n] for n in gold], classes)
    facts |= metrics.f1_baselines(gold, len(classes)) | cut
    return Evaluation(metrics.classification(predicted, gold, len(classes)), lines, facts)


def begin_alike(classes: Sequence[str]) -> bool:
    """Whether the name of a class begins with the whole name of another one."""
    return any(one != other and other.startswith(one) for one in classes for other in classes)


def _end(tokenizer: PreTrainedTokenizerBase, row: Example) -> int:
    """The token that ends the answer of a row in training."""
    end = row.rendered.end if row.rendered else None
    return cast(int, tokenizer.eos_token_id) if end is None else end


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
    likelihoods, cut = grouped_likelihoods(model, tokenizer, pairs, **sizes)
    gold = [cast(int, row.gold) for row in examples]
    predicted = [_likeliest(row) for row in likelihoods]
    lines = [
        {
            "prompt": row.choices[right].prompt,
            "choices": [choice.text for choice in row.choices],
            "prediction": row.choices[mine].text,
            "answer": row.choices[right].text,
            "correct": mine == right,
            "log_likelihoods": found,
        }
        for row, mine, right, found in zip(examples, predicted, gold, likelihoods, strict=True)
    ]
    scores, facts = {"acc": _share(predicted, gold)}, _choice_baselines(predicted, examples)
    if normed:
        by_length = [_likeliest_by_length(row, found) for row, found in zip(examples, likelihoods, strict=True)]
        scores["acc_norm"] = _share(by_length, gold)
        facts |= _facts_of_way("norm_", _choice_baselines(by_length, examples))
        for line, mine, right in zip(lines, by_length, gold, strict=True):
            line["correct_norm"] = mine == right
    return Evaluation(scores, lines, facts | cut | {"headline": headline or [*scores][-1]})


def scores_texts(examples: Sequence[Example]) -> bool:
    """Whether the scored texts are those of the choices, but for white space around them."""
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
        facts |= room(tokenizer, examples, max_new_tokens, max_length)
        for line, text, judgement in zip(lines, texts, judged, strict=True):
            line |= {"prediction": text, "extracted": judgement.extracted, "correct": judgement.correct}
    if "labels" in ways:
        pairs = [[(choice.prompt, choice.answer) for choice in row.choices] for row in examples]
        found_labels, cut = grouped_likelihoods(model, tokenizer, pairs, marked=_marked(examples), **sizes)
        predicted = [_likeliest(row) for row in found_labels]
        scores["label_acc"] = _share(predicted, gold)
        facts = _facts_of_way("label_", _choice_baselines(predicted, examples)) | cut | facts
        for line, n, row in zip(lines, predicted, examples, strict=True):
            line["label_prediction"] = row.choices[n].label
    if "choices" in ways and any(choice.text != choice.label for row in examples for choice in row.choices):
        found = multiple_choice(model, tokenizer, [_by_texts(row) for row in examples], **sizes)
        scores |= {f"choice_{name}": score for name, score in found.scores.items()}
        facts = _facts_of_way("choice_", found.facts) | facts
        for line, other in zip(lines, found.predictions, strict=True):
            line["choice_prediction"] = other["prediction"]
    return Evaluation(scores, lines, facts)


def _facts_of_way(way: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of one of several ways to judge the same questions, under names of that way."""
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
    sums = log_likelihoods(model, windows, pad_id=padding_id(tokenizer), batch_size=batch_size)
    lines: list[dict[str, Any]] = [
        {"prompt": "", "answer": row.prompt + row.answer, "log_likelihood": 0.0, "tokens": 0} for row in examples
    ]
    for n, window, total in zip(owners, windows, sums, strict=True):
        lines[n]["log_likelihood"] += total
        lines[n]["tokens"] += window.answer_tokens
    read = [line for line in lines if line["tokens"]]
    return Evaluation(metrics.perplexity([r["log_likelihood"] for r in read], [r["tokens"] for r in read]), lines)


def _marked(examples: Sequence[Example]) -> bool:
    """Whether the prompts hold their special tokens as text, which the tokenizer then adds no more."""
    return any(row.rendered for row in examples)


def _likeliest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _share(predicted: Sequence[int], gold: Sequence[int | None]) -> Score:
    return metrics.proportion(sum(s == g for s, g in zip(predicted, gold, strict=True)), len(gold))


def _choice_baselines(predicted: Sequence[int], examples: Sequence[Example]) -> dict[str, Any]:
    """Baselines over the choices, by their labels where these are the same in all rows, else by place, from 1 on."""
    longest = max(len(row.choices) for row in examples)
    at_place = [{row.choices[n].label for row in examples if n < len(row.choices)} for n in range(longest)]
    labels = [next(iter(names)) for names in at_place]
    same = len(set(labels)) == longest and all(len(names) == 1 for names in at_place)
    names = labels if same else [str(n + 1) for n in range(longest)]
    gold = [names[cast(int, row.gold)] for row in examples]
    return metrics.answer_baselines([names[n] for n in predicted], gold, names) | _guessing(examples)


def _guessing(examples: Sequence[Example]) -> dict[str, float]:
    """The share of right answers that guessing is expected to reach, where some questions have more choices."""
    return {"random": sum(1 / len(row.choices) for row in examples) / len(examples)}


def room(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    max_length: int,
    needed: Callable[[str], str] = str.strip,
) -> dict[str, int]:
    """The number of prompts that are cut, and of references whose ``needed`` part is longer than may be written."""
    limit = min(max_length, tokenizer.model_max_length - max_new_tokens)
    references = tokenizer([needed(row.answer) for row in examples], add_special_tokens=False).input_ids
    return {
        "truncated_prompts": sum(len(ids) > limit for ids in prompt_ids(tokenizer, examples)),
        "long_references": sum(len(ids) > max_new_tokens for ids in references),
    }


def unwritable(
    tokenizer: PreTrainedTokenizerBase,
    references: Sequence[str],
    stop: Sequence[str],
    judged: Callable[[Sequence[str], Sequence[str]], Sequence[Judgement]],
) -> int:
    """The number of ``references`` that count as wrong even where the model writes all of their tokens.

    What is written holds no special tokens and ends before a text of ``stop``; some tokenizers write small letters
    only, or have no token for a character.
    """
    ids = tokenizer(list(references), add_special_tokens=False).input_ids
    pairs = zip(written_texts(tokenizer, ids, stop), references, strict=True)
    changed = [(text, reference) for text, reference in pairs if text.strip() != reference.strip()]
    if not changed:
        return 0
    texts, expected = zip(*changed, strict=True)
    return sum(not judgement.correct for judgement in judged(texts, expected))


def _by_texts(row: Example) -> Example:
    return row._replace(choices=tuple(choice._replace(answer=choice.text) for choice in row.choices))


NOT_THE_TEXTS = (
    "peftsweep.data.tasks.winogrande",
    "peftsweep.data.tasks.commonsense_qa",
)  # are what their readers have scored
WAYS = {  # of instruction
    "generation": ("accuracy", "valid_fraction"),
    "labels": ("label_acc",),
    "choices": ("choice_acc", "choice_acc_norm"),
}


def _generation_measures(options: Mapping[str, Any]) -> tuple[str, ...]:
    readings = ["", *(f"{name}_" for name in options.get("beside") or ())]
    return tuple(f"{reading}{metric}" for reading in readings for metric in ("accuracy", "valid_fraction"))


def _choice_measures(options: Mapping[str, Any]) -> tuple[str, ...]:
    return ("acc",) if options.get("reader") in NOT_THE_TEXTS else ("acc", "acc_norm")


def _instruction_measures(options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for way in options.get("ways", WAYS) for name in WAYS.get(way, ()))


# The metrics that each evaluation measures, by its options, so that a misspelt one is found before anything is loaded.
# An evaluation of another file is put in by that file.
MEASURES: dict[Callable[..., Evaluation], Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    perplexity: lambda _: ("perplexity", "loss"),
    text_perplexity: lambda _: ("perplexity", "loss"),
    generation: _generation_measures,
    classification: lambda _: ("accuracy", "f1"),
    multiple_choice: _choice_measures,
    instruction: _instruction_measures,
}


def measures(function: Any, options: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The metrics of an evaluation with these options; None for a function that is not one of peftsweep's."""
    known = MEASURES.get(function)
    return known(options) if known else None
