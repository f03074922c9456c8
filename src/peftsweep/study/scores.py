"""The names of scores in a record, their better direction, and their baselines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Words in the names of metrics for which lower is better: losses and errors.
LOWER = re.compile(
    r"(?<![a-z])(loss|perplexity|bits_per_byte|error|errors|err|wer|cer|mer|ter|eer|mae|mse|rmse|nll|ece|brier|toxicity)(?![a-z])",
    re.IGNORECASE,
)
SAYS_DIRECTION = {True: "_higher_is_better", False: "_lower_is_better"}  # ends of names, which are right for certain
NOT_SHARES = ("valid_fraction", "loss", "perplexity")  # figures without a baseline of constant answers

# Metrics of generated texts, and the key in a line of predictions that holds the part of the row.
TEXT_PARTS = {name: name for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
TEXT_PARTS |= {name: f"{name}_part" for name in ("bleu", "chrf")}
# Metrics for which higher is better, whoever judges by them.
HIGHER = ("accuracy", "acc", "acc_norm", "label_acc", "f1", "exact_match", *TEXT_PARTS, "valid_fraction")
OF_100 = ("bleu", "chrf")  # metrics from 0 to 100, which are never shares of rows
# Metrics that describe generated texts; neither high nor low is better.
TEXT_METRICS = (
    *("length_tokens", "length_words", "length_characters", "empty_fraction", "cut_fraction"),
    *("distinct_1", "distinct_2"),
)


def is_minimized(metric: str) -> bool:
    """Whether lower is better, by the name of the metric, with or without the evaluation before it."""
    name = metric.rpartition(".")[2]
    if name.endswith(tuple(SAYS_DIRECTION.values())):
        return name.endswith(SAYS_DIRECTION[False])
    return LOWER.search(name) is not None


def with_direction(name: str, *, higher_is_better: bool | None) -> str:
    """The name of a metric; with an end that says which direction is better where the name alone would say another."""
    if higher_is_better is None or is_minimized(name) is not higher_is_better:
        return name
    return name + SAYS_DIRECTION[higher_is_better]


def is_maximized(metric: str) -> bool:
    """Whether higher is better for certain: of an own metric with another name that is not known."""
    return metric.rpartition(".")[2] in HIGHER


def baseline(facts: Mapping[str, Any], metric: str, which: str) -> float | None:
    """The ``majority`` or ``random`` baseline of a metric, from the figures of its evaluation; None if it has none."""
    if metric in (*NOT_SHARES, *OF_100, *TEXT_METRICS) or metric.endswith("perplexity"):
        return None
    value = facts.get(f"f1_{which}" if metric == "f1" else which)
    return None if value is None else float(value)
