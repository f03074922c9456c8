"""(prediction, answer) -> right or wrong; answer extraction; standard errors."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import import_module
from typing import Any

import numpy as np

from peftsweep.errors import InputError
from peftsweep.evaluation.text.numerals import as_number as as_number
from peftsweep.evaluation.text.numerals import in_digits, same_number, without_markup

# What an answer stands behind, in the order in which PEFT's rule looks for them; the blanks at the end belong to that
# rule, in which a text cut off at a new "####" keeps the answer before it.
MARKERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")

GSM8K_STRICT = re.compile(r"#### (-?[0-9.,]+)")
GSM8K_FLEXIBLE = re.compile(r"-?(?:[$0-9.,]{2,}|[0-9]+)")
DEGENERATE = 0.95  # if one answer has at least this share of all answers, the model is taken to ignore the prompt
MIN_ANSWERS = 20  # answers, below which a share says nothing
MAX_LABELS = 20  # different reference answers at most, if it is a set to choose from
SHOWN_ANSWER = 60  # characters of an answer in a histogram
MATH_VERIFY_SECONDS = 5  # its own default, for reading and for each comparison


@dataclass(frozen=True)
class Score:
    """A figure with its standard error and the number of rows (or tokens) it rests on."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Judgement:
    """Whether a prediction is right, and what was read from it; None where nothing could be.

    ``expected`` is what was read from the reference, where that is not its whole text.
    """

    correct: bool
    extracted: str | None
    expected: str | None = field(default=None, compare=False)


def judgements(
    metric: Callable[[str, str], Judgement | bool], predictions: Sequence[str], answers: Sequence[str]
) -> list[Judgement]:
    """The judgement of ``metric`` on each prediction; a user's metric may return plain booleans.

    Raises:
        TypeError: it gives something else, such as a share.
    """
    judged = []
    for prediction, answer in zip(predictions, answers, strict=True):
        found: Any = metric(prediction, answer)
        if isinstance(found, bool | np.bool_):
            found = Judgement(bool(found), prediction)
        if not isinstance(found, Judgement):
            named = getattr(metric, "func", metric)  # of a partial
            name = getattr(named, "__name__", type(named).__name__)
            raise TypeError(f"the metric {name} must give a bool or a metrics.Judgement, not {type(found).__name__}")
        judged.append(found)
    return judged


def exact_match(prediction: str, answer: str) -> Judgement:
    """The same text, but for white space at both ends."""
    extracted = prediction.strip()
    return Judgement(extracted == answer.strip(), extracted or None)


BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?P<unbraced>[^\s${}][^\n$]*)\$)")


def number_match(prediction: str, answer: str, markers: Sequence[str] = MARKERS) -> Judgement:
    """Whether the prediction has the reference's number behind a marker such as ``####``, or in its last ``\\boxed{}``.

    Of what stands behind a marker the first line counts, and a box in it before the rest. Numbers are read by
    `numerals.as_number`; whole ones are compared exactly, others as floats. Where there is neither marker nor box,
    markers in other capitals count, and where the reference has none of them either, a prediction that is all
    a number. An answer that is no number ("x+1", "Friday") must be the same text.

    Raises:
        ValueError: the reference answer is no number and holds neither marker nor box; it cannot be judged.
    """
    gold = _marked(answer, markers)
    candidates = _marked(prediction, markers) or ([] if gold else prediction.strip().splitlines()[:1])
    expected = as_number(gold[-1] if gold else answer)
    if expected is None:
        if not (wanted := _plain(gold[-1] if gold else "")):
            raise ValueError(f"the reference answer holds no number, alone, behind a marker or in a box: {answer!r}")
        text = _plain(candidates[0]) if candidates else ""
        return Judgement(text == wanted, text or None, wanted)
    number = next((found for text in candidates if (found := as_number(text)) is not None), None)
    correct = number is not None and same_number(number, expected)
    return Judgement(correct, None if number is None else in_digits(number), in_digits(expected))


def _marked(text: str, markers: Sequence[str]) -> list[str]:
    """The answers in ``text``, as written: what stands behind markers, else in the last box."""
    text = text.strip()
    boxed = _boxed(text)
    return _behind(text, markers) or ([boxed] if boxed else _behind(text, markers, re.IGNORECASE))


def _behind(text: str, markers: Sequence[str], flags: int = 0) -> list[str]:
    """What stands on the line behind each marker, or in a box there, in the order of the text; nothing empty."""
    longest_first = sorted((marker.rstrip() for marker in markers if marker.strip()), key=len, reverse=True)
    if not longest_first:
        return []
    pattern = "|".join(re.escape(marker) + (r"(?!\w)" if marker[-1].isalnum() else "") for marker in longest_first)
    lines = [text[found.end() :].strip().partition("\n")[0] for found in re.finditer(pattern, text, flags)]
    return [answer for line in lines if (answer := _trimmed(_boxed(line) or line))]


def _boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` or ``\\fbox{}`` holds; None where there is none or it was cut off.

    Rows of MATH also have ``$\\boxed 2$``.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    last = boxes[-1]
    if last["unbraced"]:
        return last["unbraced"]
    depth = 1
    for position, character in enumerate(rest := text[last.end() :]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return None


def _plain(text: str) -> str:
    """``text`` without the LaTeX and markdown that do not change an answer, nor marks of punctuation at its ends."""
    return _trimmed(without_markup(text), "*_")  # of emphasis that begins before the marker, one half is left


def _trimmed(text: str, further: str = "") -> str:
    return text.rstrip(f" .!?$%{further}").lstrip(f" !?$%{further}")


def peft_match(prediction: str, answer: str) -> Judgement:
    """As PEFT's MetaMathQA comparison reads answers, to the letter: `parse_answer` and `get_accuracy` of its utils.py.

    Of the trimmed text, what follows the last occurrence of the first marker of `MARKERS` that is there, first
    line only, without blanks and ``. ! ? $ %`` at its ends. Decimals and fractions a/b are compared as floats,
    anything else ("1,234", "18 dollars") as text. PEFT looks through the prompt too; here only what was written.

    Raises:
        ValueError: the reference answer holds no marker.
    """
    extracted, gold = _peft_answer(prediction), _peft_answer(answer)
    if gold is None:
        raise ValueError(f"the reference answer holds no marker of PEFT's comparison: {answer!r}")
    correct = extracted is not None and _peft_value(extracted) == _peft_value(gold)
    return Judgement(correct, extracted or None, gold)


def _peft_answer(text: str) -> str | None:
    text = text.strip().rstrip(".!?")
    marker = next((marker for marker in MARKERS if marker in text), None)
    if marker is None:
        return None
    return text.rpartition(marker)[2].strip().partition("\n")[0].strip(" .!?$%")


def _peft_value(text: str) -> float | str:
    parts = text.split("/")
    try:
        top, bottom = (Decimal(part.strip()) for part in (*parts, "1")[:2])
        return text if len(parts) > 2 or bottom == 0 else float(top / bottom)
    except (ArithmeticError, ValueError):  # no decimal, or none that is a float
        return text


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
    extracted = None if found is None else _ignoring(found)
    return Judgement(extracted is not None and extracted == _ignoring(answer), extracted)


def _ignoring(text: str) -> str:
    text = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", text)


def math_verify_match(prediction: str, answer: str) -> Judgement:
    """Mathematically the same answer, as the package math-verify has it: 1/2 is 0.5, and (x+1)^2 is x^2+2x+1.

    The first answer behind a marker (see `number_match`) or that in a box is compared, else what math-verify finds in
    the prediction and the whole reference. Two that say a number each (`numerals.as_number`) are compared by it,
    whatever math-verify reads in "18 dollars". math-verify gives up after some seconds by a signal, which only
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

    def read(final: str, otherwise: str) -> list[Any]:
        found: list[Any] = library.parse(f"\\boxed{{{final}}}" if final else otherwise, parsing_timeout=seconds)
        return found

    final, expected = (_marked(prediction, MARKERS) or [""])[0], (_marked(answer, MARKERS) or [""])[-1]
    bare = _trimmed(answer.replace("\\$", ""))
    gold = read(expected, otherwise=answer if "$" in bare else f"\\boxed{{{bare}}}")
    parsed = read(final, otherwise=prediction)
    if not gold:
        raise ValueError(f"math-verify reads nothing from the reference answer: {answer!r}")
    number, right = as_number(final), as_number(expected or answer)
    if number is not None and right is not None:
        correct = same_number(number, right)
    else:
        correct = bool(parsed) and bool(library.verify(gold, parsed, timeout_seconds=seconds))
    extracted = str(parsed[-1]) if parsed else None if number is None else in_digits(number)
    return Judgement(correct, extracted, str(gold[-1]))


def label_match(prediction: str, answer: str, labels: Sequence[str], case_sensitive: bool | None = None) -> Judgement:
    """The same label, being the first word of either text that is one of ``labels``.

    The rule of LLM-Adapters and HiRA for the commonsense tasks ("the correct answer is answer2"), but whole words
    only: answer1 is not read from "answer10". A prediction without a label is always wrong. Capitals do not count,
    unless labels differ by them alone ("a" and "A") or ``case_sensitive`` says so.

    Raises:
        ValueError: the reference answer holds no label; such a row cannot be judged.
    """
    if case_sensitive is None:
        case_sensitive = len({label.casefold() for label in labels}) < len(set(labels))
    expected = _first_label(answer, labels, case_sensitive)
    if expected is None:
        raise ValueError(f"the reference answer holds none of the labels {', '.join(labels)}: {answer!r}")
    found_label = _first_label(prediction, labels, case_sensitive)
    return Judgement(found_label == expected, found_label, expected)


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
    if not (expected := _alternatives(answer)):
        raise ValueError(f"the reference answer holds no text: {answer!r}")
    match = next((text for text in expected if text.casefold() in prediction.casefold()), None)
    return Judgement(match is not None, match)


def _alternatives(answer: str) -> list[str]:
    return [text for part in answer.split("|") if (text := part.strip())]


def shortest_text(answer: str) -> str:
    """The shortest of the texts that `contains` looks for."""
    return min(_alternatives(answer), key=len, default="")


def answer_baselines(
    predicted: Sequence[str | None], gold: Sequence[str], labels: Sequence[str] = (), written: Sequence[str] = ()
) -> dict[str, Any]:
    """Baselines for a share of right answers, and the histogram of the answers.

    ``majority`` is the share that always giving the most frequent reference answer would reach, ``random`` that of
    guessing among ``labels`` (those seen in ``gold`` unless given). Predictions are ``degenerate`` if one answer makes
    up at least 95% of at least 20 that could be read (or one text 95% of all that was ``written``), and no answer
    does so in ``gold``: the model ignores its input. ``histogram`` counts the 20 most frequent predictions; "" stands
    for those that could not be read.
    """
    made = Counter(answer for answer in predicted if answer is not None)
    references = Counter(gold)
    constant = _uniform(made) or _uniform(Counter(text.strip() for text in written if text.strip()))
    return {
        "majority": max(references.values()) / len(gold),
        "random": 1 / len(set(labels or gold)),
        "histogram": dict(Counter(_shown(answer or "") for answer in predicted).most_common(20)),
        "degenerate": constant and max(references.values()) < DEGENERATE * len(gold),
    }


def generation_baselines(
    judgements: Sequence[Judgement], written: Sequence[str], gold: Sequence[str]
) -> dict[str, Any]:
    """``answer_baselines`` of texts ``written`` freely; ``random`` only where the references are a set to choose from.

    ``gold`` are the reference texts, each of which counts as what its judgement read from it.
    """
    references = [j.expected or text.strip() for j, text in zip(judgements, gold, strict=True)]
    found = answer_baselines([j.extracted for j in judgements], references, written=written)
    different = len(set(references))
    if different > MAX_LABELS or 2 * different > len(references):
        del found["random"]
    return found


def f1_baselines(gold: Sequence[int], classes: int) -> dict[str, float]:
    """The F1 of `classification` for always the most frequent class, and what guessing evenly is expected to reach.

    A class that is guessed at a rate q and right in a share p of the rows has 2 p q / (p + q).
    """
    counts = Counter(gold)
    majority = classification([max(counts, key=counts.__getitem__)] * len(gold), gold, classes)["f1"].value
    measured = [1] if classes == 2 else range(classes)
    shares = [counts[number] / len(gold) for number in measured]
    guessed = [2 * share / classes / (share + 1 / classes) for share in shares]
    return {"f1_majority": majority, "f1_random": sum(guessed) / len(guessed)}


def _shown(answer: str) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= SHOWN_ANSWER else f"{line[: SHOWN_ANSWER - 1]}…"


def _uniform(counts: Counter[str]) -> bool:
    total = counts.total()
    return total >= MIN_ANSWERS and max(counts.values()) >= DEGENERATE * total


def accuracy(judgements: Sequence[Judgement]) -> dict[str, Score]:
    """Share of right answers, with its binomial standard error, and of those that could be read at all."""
    n = len(judgements)
    return {
        "accuracy": proportion(sum(j.correct for j in judgements), n),
        "valid_fraction": proportion(sum(j.extracted is not None for j in judgements), n),
    }


def classification(predicted: Sequence[int], gold: Sequence[int], classes: int) -> dict[str, Score]:
    """Accuracy and F1 of predicted class numbers: of the last class where there are two, else the mean of all (macro).

    F1 is 2 TP / (2 TP + FP + FN), a ratio of sums over rows; its standard error is that of a ratio
    estimator, by the delta method.
    """
    n = len(gold)
    measured = [1] if classes == 2 else range(classes)
    f1, influence = 0.0, [0.0] * n  # of each row on the mean of the measured classes' F1
    for number in measured:
        hits = [2.0 * (s == g == number) for s, g in zip(predicted, gold, strict=True)]
        sizes = [(s == number) + (g == number) for s, g in zip(predicted, gold, strict=True)]
        if not (total := sum(sizes)):
            continue  # the class is neither predicted nor right in any row: F1 is 0, as in scikit-learn
        ratio = sum(hits) / total
        f1 += ratio / len(measured)
        influence = [
            i + (hit - ratio * size) / total / len(measured)
            for i, hit, size in zip(influence, hits, sizes, strict=True)
        ]
    stderr = math.sqrt(sum(i * i for i in influence) * n / (n - 1)) if n > 1 else None
    right = sum(s == g for s, g in zip(predicted, gold, strict=True))
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
