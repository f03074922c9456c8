"""(prediction, answer) -> right or wrong; answer extraction; standard errors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+")
# What a chain of thought ends with, in the order in which they are looked for.
MARKERS = ("The answer is:", "The answer is", "The final answer is:", "The final answer is", "####")


@dataclass(frozen=True)
class Score:
    """A figure with its standard error and the number of rows (or tokens) it rests on."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Judgement:
    """Whether a prediction is right, and what was read from it; None where nothing could be."""

    correct: bool
    extracted: str | None


def exact_match(prediction: str, answer: str) -> Judgement:
    """The same text, but for white space at both ends."""
    said = prediction.strip()
    return Judgement(said == answer.strip(), said or None)


def number_match(prediction: str, answer: str, markers: Sequence[str] = MARKERS) -> Judgement:
    """The same number after a marker such as ``####``.

    The rules of PEFT's MetaMathQA comparison: the text after the last occurrence of the first marker
    present, first line only. In addition thousands separators and units are passed over.

    Raises:
        ValueError: the reference answer holds no number; such a row cannot be judged.
    """
    expected = extract_number(answer, markers)
    if expected is None:
        expected = _first_number(answer)
    if expected is None:
        raise ValueError(f"the reference answer holds no number: {answer!r}")
    said = extract_number(prediction, markers)
    return Judgement(said is not None and math.isclose(said, expected), None if said is None else f"{said:g}")


def extract_number(text: str, markers: Sequence[str] = MARKERS) -> float | None:
    """The number after the last occurrence of the first of ``markers`` that ``text`` holds."""
    for marker in markers:
        if marker in text:
            return _first_number(text.rpartition(marker)[2].strip().partition("\n")[0])
    return None


def _first_number(text: str) -> float | None:
    found = NUMBER.search(text)
    return float(found.group().replace(",", "")) if found else None


def accuracy(judgements: Sequence[Judgement]) -> dict[str, Score]:
    """Share of right answers, with its binomial standard error, and of those that could be read at all."""
    n = len(judgements)
    return {
        "accuracy": proportion(sum(j.correct for j in judgements), n),
        "valid_fraction": proportion(sum(j.extracted is not None for j in judgements), n),
    }


def classification(said: Sequence[int], gold: Sequence[int], classes: int) -> dict[str, Score]:
    """Accuracy and F1 of predicted class numbers: of the last class where there are two, else the mean of all (macro).

    F1 is 2 TP / (2 TP + FP + FN), a ratio of sums over rows; its standard error is that of a ratio
    estimator, by the delta method.
    """
    n = len(gold)
    measured = [1] if classes == 2 else range(classes)
    f1, influence = 0.0, [0.0] * n  # of each row on the mean of the measured classes' F1
    for number in measured:
        hits = [2.0 * (s == g == number) for s, g in zip(said, gold, strict=True)]
        sizes = [(s == number) + (g == number) for s, g in zip(said, gold, strict=True)]
        if not (total := sum(sizes)):
            continue  # neither said nor meant anywhere: F1 is 0, as scikit-learn has it
        ratio = sum(hits) / total
        f1 += ratio / len(measured)
        influence = [
            i + (hit - ratio * size) / total / len(measured)
            for i, hit, size in zip(influence, hits, sizes, strict=True)
        ]
    stderr = math.sqrt(sum(i * i for i in influence) * n / (n - 1)) if n > 1 else None
    right = sum(s == g for s, g in zip(said, gold, strict=True))
    return {"accuracy": proportion(right, n), "f1": Score(f1, stderr, n)}


def proportion(successes: int, n: int) -> Score:
    """``successes / n`` with the standard error of a mean of n zeros and ones, sqrt(p (1 - p) / (n - 1))."""
    p = successes / n
    return Score(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None, n)


def perplexity(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> dict[str, Score]:
    """exp of the mean negative log-likelihood a token, over rows of ``tokens`` tokens each; and that mean.

    Long rows weigh more, as every token counts the same. The standard error treats rows as the
    independent units (tokens of one row are not): that of a ratio estimator, by the delta method.
    """
    rows, total = len(tokens), sum(tokens)
    loss = -sum(log_likelihoods) / total
    stderr = None
    if rows > 1:
        squares = sum((-ll - loss * t) ** 2 for ll, t in zip(log_likelihoods, tokens, strict=True))
        stderr = math.sqrt(squares * rows / (rows - 1)) / total
    value = math.exp(loss) if loss < 700 else math.inf
    return {
        "perplexity": Score(value, None if stderr is None else value * stderr, rows),
        "loss": Score(loss, stderr, rows),
    }
