"""The names of scores in a record, which direction is better, and their baselines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# In the names of metrics of which less is better: losses, and what counts or measures errors.
LOWER = re.compile(
    r"(?<![a-z])(loss|perplexity|bits_per_byte|error|errors|err|wer|cer|mer|ter|eer|mae|mse|rmse|nll|ece|brier|toxicity)(?![a-z])",
    re.IGNORECASE,
)
NOT_SHARES = ("valid_fraction", "loss", "perplexity")  # figures that no answer can reach by being given always

# Figures of written texts, and the key of a line of predictions that holds what the row adds to each.
TEXT_PARTS = {name: name for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
TEXT_PARTS |= {name: f"{name}_part" for name in ("bleu", "chrf")}
OF_100 = ("bleu", "chrf")  # figures of 0 to 100, which are no shares of rows where they are below 1
# What describes written texts, and is neither good nor bad.
TEXT_METRICS = (
    *("length_tokens", "length_words", "length_characters", "empty_fraction", "cut_fraction"),
    *("distinct_1", "distinct_2"),
)


def is_minimized(metric: str) -> bool:
    """Whether less is better, by the metric's name, before which that of its evaluation may stand with a dot."""
    return LOWER.search(metric.rpartition(".")[2]) is not None


def baseline(facts: Mapping[str, Any], metric: str, which: str) -> float | None:
    """The ``majority`` or ``random`` baseline of a metric among the facts of its evaluation; None where it has none."""
    if metric in (*NOT_SHARES, *OF_100, *TEXT_METRICS) or metric.endswith("perplexity"):
        return None
    value = facts.get(f"f1_{which}" if metric == "f1" else which)
    return None if value is None else float(value)
