"""(prediction, answer) -> right or wrong; answer extraction; standard errors."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from peftsweep.errors import InputError

# What a chain of thought ends with, in the order in which they are looked for; the blanks at the end belong to
# PEFT's rule, so that a text cut off at a new "####" keeps the answer before it.
MARKERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")

# A number may be a fraction and carry a unit. What would make it another number or a term is no unit: "3 or 5",
# "3 million", "2 pi"; letters without a blank are one only where they cannot be a product ("3km", but not "3xy").
DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
NO_UNIT = r"(?:and|or|to|by|times|plus|minus|mod|pi|sqrt|hundred|thousand|million|billion|trillion)\b"
UNIT = rf"\s*%?(?:[kcm]m|[km]g|ml|mph|lbs?|hrs?)?(?:[.,;!?]?\s+(?!{NO_UNIT})[A-Za-z]{{2,}}.*|\s+[mgslhL])?"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\frac\s*\{{\s*(?P<top>-?{DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>-?{DECIMAL})\s*\}}"
    rf"|(?P<number>{DECIMAL})(?:\s*/\s*(?P<divisor>-?{DECIMAL}))?){UNIT}"
)
# LaTeX around an answer that does not change it.
LATEX = (
    (r"\\([$%])", r"\1"),
    (r"\$", ""),
    (r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[dt]frac\b", r"\\frac"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", ""),
    (r"\\!|\\left\b|\\right\b", ""),
    (r"\\[,;: ]", " "),
    ("\N{MINUS SIGN}", "-"),
)

LOWER_IS_BETTER = ("loss", "perplexity")

GSM8K_STRICT = re.compile(r"#### (-?[0-9.,]+)")
GSM8K_FLEXIBLE = re.compile(r"-?(?:[$0-9.,]{2,}|[0-9]+)")
MATH_VERIFY_SECONDS = 5  # its own default, for reading and for each comparison


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
    """The same number after a marker such as ``####``, or in a ``\\boxed{}`` where no marker is there.

    The rules of PEFT's MetaMathQA comparison: of the trimmed text, what follows the last occurrence of the first
    marker present, first line only, without blanks and ``. ! ? $ %`` at its ends; decimals and fractions a/b are
    compared as floats. In addition thousands separators, units and LaTeX are understood. An answer that is no
    number ("x+1", "Friday") must be the same text.

    Raises:
        ValueError: the reference answer is no number and holds neither marker nor box; it cannot be judged.
    """
    said, gold = _final(prediction, markers), _final(answer, markers)
    expected = as_number(answer if gold is None else gold)
    if expected is None:
        if not (wanted := _plain(gold or "")):
            raise ValueError(f"the reference answer holds no number, alone, behind a marker or in a box: {answer!r}")
        text = _plain(said or "")
        return Judgement(text == wanted, text or None)
    number = None if said is None else as_number(said)
    correct = number is not None and math.isclose(number, expected)
    return Judgement(correct, None if number is None else f"{number:.15g}")


def as_number(text: str) -> float | None:
    """The value of a text that is one number, such as ``$1,234.50``, ``18 dollars``, ``12%`` (12) or ``-3/4``."""
    found = NUMBER.fullmatch(_plain(text))
    if found is None:
        return None
    top, bottom = (
        float((part or "1").replace(",", ""))
        for part in (found["top"] or found["number"], found["bottom"] or found["divisor"])
    )
    return None if bottom == 0 else (-1 if found["sign"] == "-" else 1) * top / bottom


def _final(text: str, markers: Sequence[str]) -> str | None:
    """The part of ``text`` that is its answer, as written: behind a marker, in a box, or in a box behind a marker."""
    text = text.strip()  # a marker that the text was cut off at has lost its blank: it is none
    for marker in markers:
        if marker in text:
            behind = text.rpartition(marker)[2].strip().partition("\n")[0]
            return _trimmed(_boxed(behind) or behind)
    return _boxed(text)


def _boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` holds; None where there is none or it was cut off."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1 if box else 0
    for position, character in enumerate(rest if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return None


def _plain(text: str) -> str:
    """``text`` without the LaTeX that does not change an answer, nor what PEFT strips from its ends."""
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    return _trimmed(" ".join(text.split()))


def _trimmed(text: str) -> str:
    return text.rstrip(" .!?$%").lstrip(" !?$%")  # PEFT drops leading dots too, which makes .5 a 5


def gsm8k_strict(prediction: str, answer: str) -> Judgement:
    """The filter strict-match of lm-evaluation-harness' task gsm8k: the first number behind ``####``."""
    found = GSM8K_STRICT.findall(prediction)
    return _gsm8k(found[0] if found else None, answer)


def gsm8k_flexible(prediction: str, answer: str) -> Judgement:
    """The filter flexible-extract of lm-evaluation-harness' task gsm8k: the last text that looks like a number.

    As there, a row of dots or dollar signs is such a text: "18 ..." is read as "..".
    """
    found = GSM8K_FLEXIBLE.findall(prediction)
    return _gsm8k(found[-1] if found else None, answer)


def _gsm8k(found: str | None, answer: str) -> Judgement:
    """The task's exact match: texts compared without commas, dollars, all up to the last ``####`` and a final dot."""
    said = None if found is None else _ignoring(found)
    return Judgement(said is not None and said == _ignoring(answer), said)


def _ignoring(text: str) -> str:
    text = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", text)


def math_verify_match(prediction: str, answer: str) -> Judgement:
    """Mathematically the same answer, as the package math-verify has it: 1/2 is 0.5, and (x+1)^2 is x^2+2x+1.

    What stands behind a marker (see `number_match`) or in a box is compared, else what math-verify finds in the
    prediction and the whole reference. math-verify gives up after some seconds by a signal, which only
    the main thread can receive: elsewhere nothing stops the comparison of a prediction such as 9^{9^{9^9}}.

    Raises:
        InputError: math-verify is not installed.
        ValueError: nothing can be read from the reference answer.
    """
    try:
        library = import_module("math_verify")
    except ImportError as error:
        raise InputError("math_verify_match needs math-verify: pip install 'peftsweep[lm_eval]'") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every timeout, and of having none
    seconds = MATH_VERIFY_SECONDS if threading.current_thread() is threading.main_thread() else None

    def read(text: str, otherwise: str) -> list[Any]:
        final = _final(text, MARKERS)
        found: list[Any] = library.parse(f"\\boxed{{{final}}}" if final else otherwise, parsing_timeout=seconds)
        return found

    bare = _trimmed(answer.replace("\\$", ""))
    gold = read(answer, otherwise=answer if "$" in bare else f"\\boxed{{{bare}}}")
    said = read(prediction, otherwise=prediction)
    if not gold:
        raise ValueError(f"math-verify reads nothing from the reference answer: {answer!r}")
    correct = bool(said) and bool(library.verify(gold, said, timeout_seconds=seconds))
    return Judgement(correct, str(said[-1]) if said else None)


def label_match(prediction: str, answer: str, labels: Sequence[str], case_sensitive: bool = True) -> Judgement:
    """The same label, being the first word of either text that is one of ``labels``.

    The rule of LLM-Adapters and HiRA for the commonsense tasks ("the correct answer is answer2"), but whole words
    only: answer1 is not read from "answer10". A prediction without a label is always wrong.

    Raises:
        ValueError: the reference answer holds no label; such a row cannot be judged.
    """
    expected = _first_label(answer, labels, case_sensitive)
    if expected is None:
        raise ValueError(f"the reference answer holds none of the labels {', '.join(labels)}: {answer!r}")
    said = _first_label(prediction, labels, case_sensitive)
    return Judgement(said == expected, said)


def _first_label(text: str, labels: Sequence[str], case_sensitive: bool) -> str | None:
    longest_first = sorted(labels, key=len, reverse=True)  # of two that begin at the same place
    found = [
        (match.start(), label)
        for label in longest_first
        if (match := re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, 0 if case_sensitive else re.IGNORECASE))
    ]
    return min(found, key=lambda place: place[0])[1] if found else None


def contains(prediction: str, answer: str) -> Judgement:
    """The expected text, or one of several separated by ``|``, occurs in the prediction; case does not matter.

    The rule of the efficiency study's prompts ("The capital of France is" -> "Paris").

    Raises:
        ValueError: the reference answer is empty, which every prediction would contain.
    """
    expected = [text for part in answer.split("|") if (text := part.strip())]
    if not expected:
        raise ValueError(f"the reference answer holds no text: {answer!r}")
    said = next((text for text in expected if text.casefold() in prediction.casefold()), None)
    return Judgement(said is not None, said)


def answer_baselines(said: Sequence[str | None], gold: Sequence[str], labels: Sequence[str] = ()) -> dict[str, Any]:
    """What an accuracy over a finite set of answers is worth: the baselines, and the answers that were given.

    ``majority`` is the accuracy of always giving the most frequent reference answer, ``random`` that of guessing
    among ``labels`` (those seen in ``gold`` unless given). Predictions are ``degenerate`` if one answer makes up
    at least 95% of at least 20 that could be read, and no answer does so in ``gold``: the model ignores its input.
    ``histogram`` counts the 20 most frequent predictions; "" stands for those that could not be read.
    """
    made = Counter(answer for answer in said if answer is not None)
    references = Counter(gold)
    return {
        "majority": max(references.values()) / len(gold),
        "random": 1 / len(set(labels or gold)),
        "histogram": dict(Counter(answer or "" for answer in said).most_common(20)),
        "degenerate": made.total() >= 20 and _uniform(made) and not _uniform(references),
    }


def _uniform(counts: Counter[str]) -> bool:
    return max(counts.values()) >= 0.95 * counts.total()


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
