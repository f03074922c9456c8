"""Warnings about a trial's scores, each as one line with its count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

LEAST_VALID = 0.5  # a score means little if a smaller share of the answers can be read
# Counts of rows in the figures of a training or an evaluation, and the sentence about these rows.
CUT = {
    "truncated_prompts": "lost a part of the prompt, which is longer than max_length leaves room for",
    "truncated_answers": "lost the end of the answer, which is longer than max_length leaves room for",
    "long_references": "have a reference answer of more tokens than max_new_tokens, so it is never generated in full",
    "unwritable_references": "have a reference that counts as wrong even as the tokenizer writes it (special tokens, "
    "capitals, characters without a token, a text of stop)",
    "empty_texts": "got an empty text",
    "cut_texts": "got a text that max_new_tokens cut off",
    "unread_references": "have a reference without a to z and 0 to 9, which are all that ROUGE reads: use eval=chrf",
}


def cautions(
    train_info: Mapping[str, Any], eval_info: Mapping[str, Mapping[str, Any]], generation_info: Mapping[str, Any]
) -> list[str]:
    """The warnings for the sections of a record; an empty list if there are none."""
    lines = list(_cut("training", train_info, train_info.get("training_rows")))
    for name, facts in eval_info.items():
        lines += _evaluation_cautions(name, facts)
    for name, facts in generation_info.items():
        if isinstance(facts, Mapping) and facts.get("cut_prompts"):
            lines.append(f"inference {name}: {facts['cut_prompts']} prompts lost their beginning to fit the model")
    return lines


def _evaluation_cautions(name: str, facts: Mapping[str, Any]) -> Iterator[str]:
    count = next((score["n"] for score in facts.values() if isinstance(score, Mapping) and "n" in score), None)
    yield from _cut(name, facts, count)
    for metric, score in facts.items():
        own = metric.endswith("valid_fraction") and not metric.startswith("base_") and isinstance(score, Mapping)
        if own and score["value"] is not None and score["value"] < LEAST_VALID:
            unread = round((1 - score["value"]) * score["n"])
            yield f"{name}: no answer could be read in {unread} of {score['n']} texts ({metric} {score['value']:.3f})"
    for flag, constant in facts.items():
        if constant is True and flag.endswith("degenerate") and not flag.startswith("base_"):
            yield f"{name}: {_constant(flag.removesuffix('degenerate'), facts)} for different prompts"
    if (worse := _worse_than_base(facts)) is not None:
        yield f"{name}: {worse}; the steps may be too large: lower train.learning_rate"
    if seen := facts.get("seen_in_training"):
        yield f"{name}: {seen} test rows were trained on"
    if similar := facts.get("similar_in_training"):
        yield f"{name}: {similar} test rows differ from rows trained on in white space or capitals alone"


def _worse_than_base(facts: Mapping[str, Any]) -> str | None:
    """A sentence if training has raised the perplexity by more than twice the standard error of the difference."""
    after, before = facts.get("perplexity"), facts.get("base_perplexity")
    if not isinstance(after, Mapping) or not isinstance(before, Mapping) or None in (after["value"], before["value"]):
        return None
    error = math.hypot(after.get("stderr") or 0.0, before.get("stderr") or 0.0)
    rose = after["value"] - before["value"] > 2 * error
    return f"perplexity {after['value']:.4g} is worse than the untouched base's {before['value']:.4g}" if rose else None


def _constant(way: str, facts: Mapping[str, Any]) -> str:
    """The most frequent answer and its count, for one way of scoring."""
    histogram = facts.get(f"{way}histogram") or {"": 0}
    answer, times = max(histogram.items(), key=lambda entry: entry[1])
    how = f" by {way.strip('_').replace('_', ' ')}" if way else ""
    answer_text = f"'{answer}'" if answer else "a text without an answer"
    return f"nearly always the same answer{how}, {times} of {sum(histogram.values())} times {answer_text}"


def _cut(name: str, facts: Mapping[str, Any], count: int | None) -> Iterator[str]:
    for fact, what in CUT.items():
        if rows := facts.get(fact):
            yield f"{name}: {rows} of {count} rows {what}" if count else f"{name}: {rows} rows {what}"
