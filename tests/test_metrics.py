"""Answer extraction, scores and their errors."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from sklearn.metrics import f1_score

from peftsweep import metrics
from peftsweep.metrics import Judgement


@pytest.mark.parametrize(
    ("prediction", "answer", "correct", "extracted"),
    [
        ("so 3+4=7\n#### 7", "... #### 7", True, "7"),
        ("#### 1,234.50 dollars", "#### 1234.5", True, "1234.5"),
        ("The answer is: $18.\nThe end 5", "#### 18", True, "18"),
        ("The answer is 3. No. The answer is 4", "#### 4", True, "4"),
        ("#### -5", "#### 5", False, "-5"),
        ("it is 7", "#### 7", False, None),
        ("#### seven", "#### 7", False, None),
        ("#### 7", "7", True, "7"),
    ],
)
def test_numbers_are_read_after_the_marker(prediction: str, answer: str, correct: bool, extracted: str | None) -> None:
    assert metrics.number_match(prediction, answer) == Judgement(correct, extracted)


def test_the_marker_can_be_chosen() -> None:
    assert metrics.number_match("47+38=85 #85", "47+38=85 #85", markers=["#"]).correct
    assert not metrics.number_match("47+38=85", "47+38=85 #85", markers=["#"]).correct


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no number"):
        metrics.number_match("#### 7", "seven")


def test_exact_match_passes_over_white_space_at_the_ends() -> None:
    assert metrics.exact_match(" yes\n", "yes") == Judgement(True, "yes")
    assert metrics.exact_match("", "yes") == Judgement(False, None)


def test_accuracy_has_the_standard_error_of_a_mean_of_zeros_and_ones() -> None:
    judged = [Judgement(True, "1")] * 3 + [Judgement(False, "2")] * 4 + [Judgement(False, None)]
    scores = metrics.accuracy(judged)
    ones = [1.0] * 3 + [0.0] * 5
    variance = sum((x - 3 / 8) ** 2 for x in ones) / 7
    assert scores["accuracy"].value == 3 / 8
    assert scores["accuracy"].stderr == pytest.approx(math.sqrt(variance / 8))
    assert (scores["valid_fraction"].value, scores["valid_fraction"].n) == (7 / 8, 8)


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    scores = metrics.perplexity([-2.0, -30.0], [2, 10])
    assert scores["loss"].value == pytest.approx(32 / 12)
    assert scores["perplexity"].value == pytest.approx(math.exp(32 / 12))


def test_the_perplexity_error_matches_resampling_rows() -> None:
    import random

    rng = random.Random(0)
    tokens = [rng.randint(5, 40) for _ in range(300)]
    sums = [-sum(rng.expovariate(1 / 1.5) for _ in range(n)) * rng.uniform(0.5, 1.5) for n in tokens]
    found = metrics.perplexity(sums, tokens)["loss"].stderr
    draws = [[rng.randrange(300) for _ in range(300)] for _ in range(400)]
    losses = [-sum(sums[n] for n in draw) / sum(tokens[n] for n in draw) for draw in draws]
    mean = sum(losses) / len(losses)
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
    assert found == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("classes", [2, 4])
def test_f1_is_that_of_scikit_learn_and_its_error_that_of_a_bootstrap(classes: int) -> None:
    rng = random.Random(classes)
    gold = [rng.randrange(classes) for _ in range(400)]
    said = [g if rng.random() < 0.7 else rng.randrange(classes) for g in gold]
    found = metrics.classification(said, gold, classes)
    average = "binary" if classes == 2 else "macro"
    assert found["f1"].value == pytest.approx(f1_score(gold, said, average=average))
    assert found["accuracy"].value == pytest.approx(sum(s == g for s, g in zip(said, gold, strict=True)) / 400)
    draws = []
    for _ in range(600):
        rows = [rng.randrange(400) for _ in range(400)]
        draws.append(f1_score([gold[n] for n in rows], [said[n] for n in rows], average=average))
    assert found["f1"].stderr == pytest.approx(statistics.stdev(draws), rel=0.15)


def test_a_class_that_is_never_said_nor_meant_has_f1_zero() -> None:
    assert metrics.classification([0, 0], [0, 0], 2)["f1"].value == 0
