"""ROUGE, BLEU and chrF of written texts, by rouge-score and sacrebleu; the extra ``peftsweep[text]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from peftsweep.data.templates import Example
from peftsweep.errors import InputError
from peftsweep.evaluation.decoding import write
from peftsweep.evaluation.evaluate import MEASURES, Evaluation, room
from peftsweep.evaluation.text.responses import Parted, jackknife, mean, statistics_of
from peftsweep.study.scores import TEXT_PARTS

Metric = Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"]
METRICS: tuple[Metric, ...] = ("rougeL", "rouge1", "rouge2", "rougeLsum", "bleu", "chrf")
ROUGE, SACREBLEU = "rouge_score", "sacrebleu"  # modules
Parts = Callable[[Sequence[str], Sequence[str]], Parted]


def generated_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    metrics: Sequence[Metric] = METRICS,
    stemmer: bool = False,
    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a",
    word_order: int = 0,
    stop: Sequence[str] = (),
    max_new_tokens: int = 128,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
) -> Evaluation:
    """What the model, decoding greedily (or by beams), writes after each prompt, compared with the reference answer.

    ``metrics``, the first of which trials are compared by:

    - ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``: the mean over rows of rouge-score's F measure, 0 to 1;
      ``stemmer`` is its Porter stemmer. It reads a to z and digits alone.
    - ``bleu``: sacrebleu's BLEU of all texts together, 0 to 100; ``tokenize`` is its tokenizer (zh or char: Chinese).
    - ``chrf``: sacrebleu's chrF of all texts together, 0 to 100; ``word_order=2`` is chrF++.

    BLEU and chrF are no means over rows: their standard errors are the jackknife's. Statistics of the texts by
    themselves are measured too (``responses.statistics_of``), and alone where ``metrics`` is empty.

    Raises:
        InputError: a package is not installed.
    """
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "max_length": max_length}
    written = write(model, tokenizer, examples, **how, num_beams=num_beams, stop=stop)
    texts, answers = [one.text for one in written], [row.answer for row in examples]
    measured = compare(texts, answers, metrics, stemmer=stemmer, tokenize=tokenize, word_order=word_order)
    lines: list[dict[str, Any]] = [
        {"prompt": row.prompt, "prediction": one.text, "answer": row.answer, "tokens": one.tokens, "cut": one.cut}
        for row, one in zip(examples, written, strict=True)
    ]
    for name, figure in measured.items():
        for line, part in zip(lines, figure.parts, strict=True):
            line[TEXT_PARTS[name]] = part
    facts: dict[str, Any] = {"headline": metrics[0]} if metrics else {}
    facts |= {"empty_texts": sum(not text.strip() for text in texts), "cut_texts": sum(one.cut for one in written)}
    if needed(metrics) & {ROUGE}:
        facts["unread_references"] = sum(not _rouge_words(answer) for answer in answers)
    facts |= room(tokenizer, examples, max_new_tokens, max_length)
    return Evaluation({name: figure.score for name, figure in measured.items()} | statistics_of(written), lines, facts)


MEASURES[generated_text] = lambda options: tuple(options.get("metrics", METRICS))


def compare(
    texts: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[Metric],
    *,
    stemmer: bool = False,
    tokenize: str = "13a",
    word_order: int = 0,
) -> dict[str, Parted]:
    """Each of ``metrics`` of texts and their references, of which there is one a text.

    Raises:
        InputError: a package is not installed.
    """
    found: dict[str, Parted] = {}
    if names := [name for name in metrics if name.startswith("rouge")]:
        scorer = _package(ROUGE, "rouge_scorer").RougeScorer(names, use_stemmer=stemmer)
        rows = [scorer.score(answer, text) for text, answer in zip(texts, references, strict=True)]
        found |= {name: mean(row[name].fmeasure for row in rows) for name in names}
    corpus: Mapping[str, dict[str, Any]] = {"BLEU": {"tokenize": tokenize}, "CHRF": {"word_order": word_order}}
    for kind, options in corpus.items():
        if kind.lower() in metrics:
            metric = getattr(_package(SACREBLEU, "metrics"), kind)(**options)
            found[kind.lower()] = _of_corpus(metric, texts, references)
    return {name: found[name] for name in metrics}


def _of_corpus(metric: Any, texts: Sequence[str], references: Sequence[str]) -> Parted:
    """``metric.corpus_score`` of all texts, and from the counts that it adds up the score without each row."""
    counts = np.array(metric._extract_corpus_statistics(texts, [references]))  # [rows, counts]
    total = counts.sum(axis=0)
    without = [metric._compute_score_from_stats(list(total - row)).score for row in counts]
    return jackknife(float(metric.corpus_score(texts, [references]).score), without)


def _rouge_words(text: str) -> list[str]:
    words: list[str] = _package(ROUGE, "tokenize").tokenize(text, None)
    return words


def _package(module: str, part: str) -> Any:
    try:
        return import_module(f"{module}.{part}")
    except ImportError as error:
        raise InputError(f"{error}; pip install 'peftsweep[text]'") from error


def needed(metrics: Sequence[str]) -> set[str]:
    """The modules that measure ``metrics``."""
    return {ROUGE if name.startswith("rouge") else SACREBLEU for name in metrics}
