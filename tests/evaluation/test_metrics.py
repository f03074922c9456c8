"""Answer extraction, scores and their errors."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import f1_score

from peftsweep.errors import InputError
from peftsweep.evaluation import metrics
from peftsweep.evaluation.metrics import Judgement
from peftsweep.study import scores as study_scores

ANSWERS = Path(__file__).with_name("written_answers.jsonl")


@pytest.mark.parametrize(
    ("prediction", "answer", "correct", "extracted"),
    [
        ("so 3+4=7\n#### 7", "... #### 7", True, "7"),
        ("#### 1,234.50 dollars", "#### 1234.5", True, "1234.5"),
        ("The answer is: $18.\nThe end 5", "#### 18", True, "18"),
        ("The answer is 3. No. The answer is 4", "#### 4", False, "3"),
        ("#### -5", "#### 5", False, "-5"),
        ("it is 7", "#### 7", False, None),
        ("#### seven", "#### 7", False, None),
        ("#### 7", "7", True, "7"),
        # the first marked answer, whichever marker it stands behind
        ("#### 5\nThe answer is 6", "#### 6", False, "5"),
        ("The answer is 5\nThe answer is: 6\nThe final answer is 5", "#### 6", False, "5"),
        ("#### 18\n\nQuestion: Ann has 2 and 3 pens.\n#### 5", "#### 18", True, "18"),
        ("#### \n#### 18", "#### 18", True, "18"),
        ("The answer is clear. The answer is 18", "#### 18", True, "18"),
        ("####18", "#### 18", True, "18"),
        ("so the answer is 18", "#### 18", True, "18"),
        ("The answer isn't 18", "#### 18", False, None),
        ("#### 18 eggs and 3 chickens", "#### 18", False, None),
        ("#### 12345678901234567891", "#### 12345678901234567890", False, "12345678901234567891"),
        ("#### 1234567891", "#### 1234567890", False, "1234567891"),
        # a reference without any mark asks for none
        ("18 dollars", "18", True, "18"),
        ("18 dollars", "#### 18", False, None),
        ("The final answer is 4", "#### 4", True, "4"),
        ("#### 7\n####", "#### 7", True, "7"),
        ("The answer is: 50%!", "#### 50", True, "50"),
        ("The answer is: 20/35", "The answer is: 0.5714285714285714", True, "0.571428571428571"),
        ("The answer is: 5/0", "#### 5", False, None),
        ("The answer is: .5", "#### 0.5", True, "0.5"),
        ("#### 1234567", "#### 1234567", True, "1234567"),
        ("#### 1234567", "#### 1234568", False, "1234567"),
        # LaTeX
        (r"so $\boxed{\frac{1}{2}}$.", "#### 0.5", True, "0.5"),
        (r"\boxed{1}, no: \boxed{\dfrac{-3}{4}}", "#### -0.75", True, "-0.75"),
        (r"\boxed{2} but the answer is 3", "#### 2", True, "2"),
        (r"The answer is: $\boxed{\$18}$. Or \boxed{5", "#### 18", False, None),
        (r"The answer is: $\boxed{\$1{,}8}$", "#### 18", False, None),
        (r"The answer is: \boxed{\$18 \text{ dollars}}", "18", True, "18"),
        (r"\boxed{18", "18", False, None),
        (r"\boxed {17}, so it is $\fbox{18}$.", r"Hence $\boxed 18$.", True, "18"),
        (r"in \boxed form: \boxed{18}", r"$\boxed{\frac{36}2}$", True, "18"),
        # answers that are no number
        ("The answer is: x+1.", "The answer is: x+1", True, "x+1"),
        ("The answer is: x+2", "The answer is: x+1", False, "x+2"),
        ("The answer is: 3", "The answer is: x+1", False, "3"),
        ("no idea", "The answer is: x+1", False, None),
        (r"The answer is: \text{Friday}", "The answer is: Friday", True, "Friday"),
        ("The answer is **Friday**.", "The answer is: Friday", True, "Friday"),
        ("**The answer is: `x*y*z`**", "#### x*y*z", True, "x*y*z"),
        (r"\boxed{\dfrac{\sqrt{3}}{2}}", r"\boxed{\frac{\sqrt{3}}{2}}", True, r"\frac{\sqrt{3}}{2}"),
        ("The answer is: x+1", "#### 1", False, None),
    ],
)
def test_numbers_are_read_after_the_marker(prediction: str, answer: str, correct: bool, extracted: str | None) -> None:
    assert metrics.number_match(prediction, answer) == Judgement(correct, extracted)


def test_the_marker_can_be_chosen() -> None:
    assert metrics.number_match("47+38=85 #85", "47+38=85 #85", markers=["#"]).correct
    assert not metrics.number_match("47+38=85", "47+38=85 #85", markers=["#"]).correct
    assert metrics.number_match(r"1 \boxed{2} 3", "2", markers=[]).correct  # none: boxes alone count


@pytest.mark.parametrize("answer", ["seven", "", "x+1", "#### ", r"\boxed{}", r"\boxed{\text{.}}", r"\boxed{x"])
def test_a_reference_without_a_number_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="holds no number"):
        metrics.number_match("#### 7", answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18 dollars", 18),
        ("$1,234.50", 1234.5),
        ("-$5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("12%", 12),
        (r"12\%", 12),
        ("3 km", 3),
        ("3km", 3),
        ("5 m", 5),
        (r"5\text{cm}", 5),
        (r"90^\circ", 90),
        (r"1,\!000", 1000),
        (r"-\frac{1}{2}", -0.5),
        ("5/2 cups", 2.5),
        ("18. So she makes 18", 18),
        ("1e3", 1000),
    ],
)
def test_a_number_may_carry_separators_units_and_latex(text: str, value: float) -> None:
    assert metrics.as_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "x+1", "3x", "3xy", "3 x", r"3\sqrt{2}", "2 pi", r"\frac{1}{2}x", "3+4i"),
        *("3 or 5", "3 million", "1,2", "2, 3", "(1,2)", "12-13", "1:2", "1/2/3", "1/0"),
    ],
)
def test_what_is_a_term_or_several_numbers_is_no_number(text: str) -> None:
    assert metrics.as_number(text) is None


@pytest.mark.parametrize(("name", "judge"), [("strict-match", "gsm8k_strict"), ("flexible-extract", "gsm8k_flexible")])
def test_gsm8k_is_judged_as_by_lm_evaluation_harness(name: str, judge: str) -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    exact_match = pytest.importorskip("lm_eval.api.metrics").exact_match_hf_evaluate
    task = yaml.safe_load((Path(extraction.__file__).parents[1] / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    steps = {entry["name"]: entry["filter"] for entry in task["filter_list"]}[name]
    assert [step["function"] for step in steps] == ["regex", "take_first"]
    regex = extraction.RegexFilter(**{key: value for key, value in steps[0].items() if key != "function"})
    options = {key: task["metric_list"][0][key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}

    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    kinds = {"right": 0, "wrong": 0, "none": 0}
    for row in rows:
        [[filtered]] = regex.apply([[row["prediction"]]], [row])
        score = exact_match(predictions=[filtered], references=[row["answer"]], **options)["exact_match"]
        found = getattr(metrics, judge)(**row)
        assert found.correct == bool(score), row
        assert (found.extracted is None) == (filtered == "[invalid]"), row
        for pattern in options["regexes_to_ignore"]:
            filtered = re.sub(pattern, "", filtered)
        assert found.extracted in (None, filtered), row
        kinds["none" if found.extracted is None else "right" if found.correct else "wrong"] += 1
    assert len(rows) == 200
    assert min(kinds.values()) >= 30, kinds


def peft_accuracy(prediction: str, answer: str) -> bool:
    """The rule of PEFT's MetaMathQA comparison, written anew with regular expressions and fractions."""

    def read(text: str) -> Fraction | str | None:
        text = re.sub(r"[.!?]+$", "", text.strip())
        for marker in (
            r"The answer is: ",
            r"The answer is ",
            r"The final answer is: ",
            r"The final answer is ",
            r"#### ",
        ):
            if found := re.findall(rf"(?s).*{marker}(.*)", text):
                line = re.sub(r"^[ .!?$%]+|[ .!?$%]+$", "", found[0].strip().split("\n")[0])
                plain = re.fullmatch(r"[-+]?\d*\.?\d+(?:e\d+)?(?:\s*/\s*[-+]?\d*\.?\d+)?", line)
                return Fraction(line.replace(" ", "")) if plain and not re.search(r"/\s*0+$", line) else line
        return None

    predicted = read(prediction)
    return predicted is not None and predicted == read(answer)


def test_peft_match_judges_as_pefts_comparison_does() -> None:
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    own: list[tuple[str, float, bool]]
    own = [("#### 5\nThe answer is 6", 6, True), ("The answer is 3. No. The answer is 4", 4, True)]
    own += [("The answer is: 20/40!", 0.5, True), ("#### 18 dollars", 18, False), ("#### 1,234", 1234, False)]
    own += [("####18", 18, False), ("the answer is 18", 18, False), ("#### 7\n####", 7, True), ("#### 18%", 18, True)]
    for text, value, right in own:
        assert metrics.peft_match(text, f"#### {value}").correct is right, text
        rows.append({"prediction": text, "answer": f"#### {value}"})
    for row in rows:
        marked = row | {"answer": row["answer"] if "#### " in row["answer"] else f"#### {row['answer']}"}
        assert metrics.peft_match(**marked).correct == peft_accuracy(**marked), row
    with pytest.raises(ValueError, match="holds no marker"):
        metrics.peft_match("#### 7", "7")


def test_the_two_gsm8k_filters_differ() -> None:
    assert metrics.gsm8k_strict("#### 7\nCheck: 3 + 4", "#### 7") == Judgement(True, "7")
    assert metrics.gsm8k_flexible("#### 7\nCheck: 3 + 4", "#### 7") == Judgement(False, "4")
    assert metrics.gsm8k_strict("It is $1,080.", "#### 1080") == Judgement(False, None)
    assert metrics.gsm8k_flexible("It is $1,080.", "#### 1080") == Judgement(True, "1080")


@pytest.mark.parametrize(
    ("prediction", "answer", "correct", "extracted"),
    [
        (r"It is $\frac{1}{2}$.", "0.5", True, r"\frac{1}{2}"),
        (r"so \boxed{(x+1)^2}", "The answer is: x^2+2x+1", True, "(x+1)^2"),
        ("The answer is: x+1", "x+1", True, "x+1"),
        (r"\boxed{x+2}", "x+1", False, "x+2"),
        ("#### 1,234", r"\$1234", True, "1,234"),
        ("#### 18 dollars", "#### 18", True, "18 dollars"),
        ("#### 18,", "#### 18", True, "18,"),
        ("#### 18\n\nQuestion: 2 + 3\n#### 5", "#### 18", True, "18"),
        ("#### 18 or 19", "#### 18", False, "18, 19"),
        ("no idea", "7", False, None),
    ],
)
def test_math_verify_compares_what_answers_mean(
    prediction: str, answer: str, correct: bool, extracted: str | None
) -> None:
    pytest.importorskip("math_verify")
    assert metrics.math_verify_match(prediction, answer) == Judgement(correct, extracted)


def test_math_verify_is_quiet_and_works_in_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(metrics.math_verify_match, r"\boxed{\frac{1}{2}}", "0.5").result()
    assert found == Judgement(True, r"\frac{1}{2}")
    assert not caplog.records


def test_math_verify_gives_up_what_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(metrics, "MATH_VERIFY_SECONDS", 1)
    assert not metrics.math_verify_match(r"\boxed{9^{9^{9^{9}}}}", "9").correct


def test_math_verify_needs_a_reference_and_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="reads nothing from the reference"):
        metrics.math_verify_match("7", "")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"^.*pip install 'peftsweep\[lm_eval\]'$"):
        metrics.math_verify_match("7", "7")


FIVE = [f"answer{n}" for n in range(1, 6)]


@pytest.mark.parametrize(
    ("prediction", "answer", "labels", "correct", "extracted"),
    [
        ("the correct answer is answer2", "the correct answer is answer2", FIVE, True, "answer2"),
        ("answer3, not answer2", "answer2", FIVE, False, "answer3"),
        ("answer10 or answer4", "answer4", FIVE, True, "answer4"),
        ("answer10", "answer1", FIVE, False, None),
        ("untrue, so false", "false", ["true", "false"], True, "false"),
        ("True", "true", ["true", "false"], True, "true"),
        ("It is ANSWER2.", "answer2", FIVE, True, "answer2"),
        ("A", "a", ["a", "A"], False, "A"),  # labels that differ by case alone
        ("very likely.", "likely", ["likely", "very likely"], False, "very likely"),
        ("a is b", "a is b", ["a", "a is b"], True, "a is b"),
        ("it is (A).", "(A)", ["(A)", "(B)"], True, "(A)"),
        ("", "true", ["true", "false"], False, None),
    ],
)
def test_the_first_label_word_is_the_answer(
    prediction: str, answer: str, labels: list[str], correct: bool, extracted: str | None
) -> None:
    assert metrics.label_match(prediction, answer, labels) == Judgement(correct, extracted)


def test_labels_may_be_read_in_any_case_or_not_and_are_given_as_listed() -> None:
    assert metrics.label_match("True", "true", ["true", "false"], case_sensitive=True) == Judgement(False, None)
    found = metrics.label_match("TRUE!", "it is True", ["true", "false"], case_sensitive=False)
    assert found == Judgement(True, "true")


@pytest.mark.parametrize("labels", [["true", "false"], []])
def test_a_reference_without_a_label_is_an_error(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="'maybe untrue'"):
        metrics.label_match("nothing", "maybe untrue", labels)


def test_the_expected_text_may_stand_anywhere() -> None:
    assert metrics.contains("It is PARIS, of course", "Paris") == Judgement(True, "Paris")
    assert metrics.contains("It is Lyon", "Paris") == Judgement(False, None)
    assert metrics.contains("H2O or water", "Water | H2O") == Judgement(True, "Water")
    assert metrics.contains("a+b", "c|a+b|") == Judgement(True, "a+b")
    with pytest.raises(ValueError, match="holds no text"):
        metrics.contains("anything", " | ")


def test_baselines_are_those_of_the_references() -> None:
    gold = ["true"] * 60 + ["false"] * 40
    found = metrics.answer_baselines(["true", None, "false", "true"], gold)
    assert found == {
        "majority": 0.6,
        "random": 0.5,
        "histogram": {"true": 2, "": 1, "false": 1},
        "degenerate": False,
    }
    assert next(iter(found["histogram"])) == "true"
    assert metrics.answer_baselines([], gold, labels=["true", "false", "maybe", "no"])["random"] == 0.25


def test_the_histogram_keeps_the_twenty_most_frequent() -> None:
    predictions = [str(n) for n in range(30) for _ in range(n + 1)]
    histogram = metrics.answer_baselines(predictions, ["1"])["histogram"]
    assert list(histogram.items())[:2] == [("29", 30), ("28", 29)]
    assert len(histogram) == 20


@pytest.mark.parametrize(
    ("predictions", "gold", "degenerate"),
    [
        (["a"] * 19 + ["b"], ["a", "b"] * 10, True),
        (["a"] * 18 + ["b"] * 2, ["a", "b"] * 10, False),  # 90% are not 95%
        (["a"] * 19, ["a", "b"] * 10, False),  # too few
        (["a"] * 20 + [None] * 30, ["a", "b"] * 25, True),  # of those that could be read
        (["a"] * 19 + [None] * 30, ["a", "b"] * 25, False),
        ([None] * 30, ["a", "b"] * 15, False),
        (["a"] * 20, ["a"] * 19 + ["b"], False),  # so are the references
        (["b"] * 20, ["a"] * 18 + ["b"] * 2, True),
    ],
)
def test_answers_that_are_nearly_all_the_same_are_degenerate(
    predictions: list[str | None], gold: list[str], degenerate: bool
) -> None:
    assert metrics.answer_baselines(predictions, gold)["degenerate"] is degenerate


def test_one_text_again_and_again_is_degenerate_though_nothing_can_be_read_in_it() -> None:
    gold = ["a", "b"] * 10
    assert metrics.answer_baselines([None] * 20, gold, written=["I do not know."] * 20)["degenerate"] is True
    assert metrics.answer_baselines([None] * 20, gold, written=[f"{n}" for n in range(20)])["degenerate"] is False
    assert metrics.answer_baselines([None] * 20, gold, written=[""] * 20)["degenerate"] is False


def test_free_answers_have_a_majority_and_chance_only_where_they_are_a_set_to_choose_from() -> None:
    numbers = [f"so\n#### {n}" for n in [7] * 30 + [*range(100, 170)]]
    judged = [metrics.number_match("#### 7", answer) for answer in numbers]
    found = metrics.generation_baselines(judged, ["#### 7"] * 100, numbers)
    assert found["majority"] == 0.3  # of what was read from the references, not of their texts
    assert "random" not in found
    assert (found["degenerate"], found["histogram"]) == (True, {"7": 100})
    words = ["yes", "no", "no", "maybe"] * 10
    judged = [metrics.exact_match("no", answer) for answer in words]
    found = metrics.generation_baselines(judged, ["no"] * 40, words)
    assert (found["majority"], found["random"]) == (0.5, 1 / 3)


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])  # two have a positive class
def test_the_baselines_of_f1_are_those_of_scikit_learn(classes: int) -> None:
    gold = [0] * 50 + [1] * 30 + ([2] * 20 if classes == 3 else [])
    average = "binary" if classes == 2 else "macro"
    found = metrics.f1_baselines(gold, classes)
    assert found["f1_majority"] == pytest.approx(f1_score(gold, [0] * len(gold), average=average))
    rng = random.Random(0)
    guesses = [f1_score(gold, [rng.randrange(classes) for _ in gold], average=average) for _ in range(300)]
    assert found["f1_random"] == pytest.approx(sum(guesses) / 300, abs=0.01)
    facts = {"majority": 0.5, "random": 0.4, **found}
    assert study_scores.baseline(facts, "f1", "majority") == found["f1_majority"]
    assert study_scores.baseline(facts, "acc_norm", "random") == 0.4
    assert study_scores.baseline(facts, "valid_fraction", "random") is None


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


@pytest.mark.parametrize("classes", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_f1_is_that_of_scikit_learn_and_its_error_that_of_a_bootstrap(classes: int) -> None:
    rng = random.Random(classes)
    gold = [rng.randrange(classes) for _ in range(400)]
    predictions = [g if rng.random() < 0.7 else rng.randrange(classes) for g in gold]
    found = metrics.classification(predictions, gold, classes)
    average = "binary" if classes == 2 else "macro"
    assert found["f1"].value == pytest.approx(f1_score(gold, predictions, average=average))
    assert found["accuracy"].value == pytest.approx(sum(s == g for s, g in zip(predictions, gold, strict=True)) / 400)
    draws = []
    for _ in range(200):
        rows = [rng.randrange(400) for _ in range(400)]
        draws.append(f1_score([gold[n] for n in rows], [predictions[n] for n in rows], average=average))
    assert found["f1"].stderr == pytest.approx(statistics.stdev(draws), rel=0.15)


def test_a_class_that_is_never_said_nor_meant_has_f1_zero() -> None:
    assert metrics.classification([0, 0], [0, 0], 2)["f1"].value == 0


def test_a_metric_of_one_s_own_gives_booleans_or_judgements() -> None:
    texts, answers = ["a", "b"], ["a", "c"]
    plain = metrics.judgements(lambda prediction, answer: prediction == answer, texts, answers)
    assert plain == [Judgement(True, "a"), Judgement(False, "b")]
    assert metrics.judgements(metrics.exact_match, texts, answers) == plain
    of_numpy: Any = lambda prediction, answer: np.bool_(prediction == answer)  # noqa: E731
    assert metrics.judgements(of_numpy, texts, answers) == plain
    share: Any = 0.5
    with pytest.raises(TypeError, match=r"must give a bool or a metrics\.Judgement, not float"):
        metrics.judgements(lambda prediction, answer: share, texts, answers)
