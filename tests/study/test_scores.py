"""Which direction of a score is better, by its name."""

from __future__ import annotations

import pytest

from peftsweep.study.scores import is_minimized
from peftsweep.training import run


@pytest.mark.parametrize(
    "metric",
    ["loss", "perplexity", "tasks.word_perplexity", "bits_per_byte", "speech.wer", "mse", "brier_score", "error_rate"],
)
def test_errors_and_losses_are_better_when_less_whoever_asks(metric: str) -> None:
    assert is_minimized(metric)
    assert run.as_loss({metric: 0.25}, metric) == 0.25


@pytest.mark.parametrize("metric", ["accuracy", "rougeL", "answer.f1", "glossary", "power", "mercury"])
def test_other_scores_are_better_when_more(metric: str) -> None:
    assert not is_minimized(metric)
    assert run.as_loss({metric: 0.25}, metric) == -0.25
