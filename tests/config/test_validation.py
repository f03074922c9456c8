"""Validation by a metric: on which rows, and what is found before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftsweep import InputError
from peftsweep.config import evaluations
from peftsweep.config.compose import Trial
from peftsweep.data import rows as data_rows
from peftsweep.evaluation import evaluate, metrics
from peftsweep.study import record
from peftsweep.study.record import Result, Status

Compose = Callable[..., Trial]
OWN_ROWS = ["eval=[tiny_math,gsm8k]", "eval.tiny_math.samples=4", "eval.gsm8k.path=questions.jsonl"]
OWN_ROWS += ["eval.gsm8k.max_new_tokens=4", "dataset.samples=64", "dataset.validation_samples=6"]
BEST = ["train.steps=2", "train.batch_size=4", "train.eval_every=1", "train.keep_best=true"]
BEST += ["train.best_metric=gsm8k.accuracy", "adapter.check=false"]


@pytest.fixture(autouse=True)
def own_rows(questions: Path) -> Path:
    """The evaluation's own file, of 40 rows."""
    return questions


def test_an_evaluation_with_rows_of_its_own_validates_on_some_of_them(compose: Compose) -> None:
    from peftsweep.trial import task

    result: Result = task.run(compose(*OWN_ROWS, *BEST))
    assert result.status is Status.success, result.error
    assert result.folder is not None
    steps = record.read_lines(result.folder / "steps.jsonl")
    assert [row["step"] for row in steps if "validation_gsm8k.accuracy" in row] == [1, 2]
    assert result.eval_info["gsm8k"]["accuracy"]["n"] == 34
    judged = {row["prompt"] for row in record.read_lines(result.folder / "predictions" / "gsm8k.jsonl")}
    one = compose(*OWN_ROWS, *BEST)
    assert one.rows is not None
    validated = evaluations.validation_rows(one.config, "gsm8k", one.rows)
    assert validated is not None
    assert len(validated) == 6
    assert not [row for row in validated if any(row["question"] in prompt for prompt in judged)]
    assert len(judged) == 34


def test_rows_are_set_aside_only_for_a_metric_that_is_asked_for(compose: Compose) -> None:
    by_loss = compose(*OWN_ROWS, *BEST, "train.best_metric=loss")
    assert by_loss.rows is not None
    assert len(evaluations.test_rows(by_loss.config, "gsm8k", by_loss.rows)) == 40
    assert evaluations.validation_rows(by_loss.config, "gsm8k", by_loss.rows) is None
    assert evaluations.validation_rows(by_loss.config, "tiny_math", by_loss.rows) == by_loss.rows.validation
    rung = compose(*OWN_ROWS, "halving.min_steps=1", "halving.metric=gsm8k.accuracy", "train.steps=3")
    assert rung.rows is not None
    assert len(evaluations.test_rows(rung.config, "gsm8k", rung.rows)) == 34


def test_the_number_of_rows_set_aside_is_part_of_what_a_trial_is(compose: Compose) -> None:
    first, other = (compose(*OWN_ROWS, *BEST, f"dataset.validation_samples={n}") for n in (6, 5))
    assert first.training != other.training
    best_by_other_answers = compose(*OWN_ROWS, *BEST, "eval.gsm8k.max_new_tokens=8")
    assert best_by_other_answers.training != compose(*OWN_ROWS, *BEST).training
    by_loss = [*OWN_ROWS, *BEST, "train.best_metric=loss"]
    assert compose(*by_loss, "eval.gsm8k.max_new_tokens=8").training == compose(*by_loss).training


def test_rows_are_set_aside_once_and_for_all() -> None:
    rows = [{"n": n} for n in range(10)]
    chosen, left = data_rows.set_aside(rows, 3, 0, "eval.x")
    assert (len(chosen), len(left)) == (3, 7)
    assert sorted(row["n"] for row in [*chosen, *left]) == list(range(10))
    assert data_rows.set_aside(rows, 3, 0, "eval.x") == (chosen, left)
    assert len(data_rows.set_aside(rows, 64, 0, "eval.x")[0]) == 5  # at most a half
    with pytest.raises(InputError, match=r"eval.x: 1 rows are too few to set some aside"):
        data_rows.set_aside(rows[:1], 3, 0, "eval.x")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.best_metric=gsm8k.acuracy"], "train.best_metric: eval.gsm8k does not measure 'acuracy'; did you mean"),
        (["train.best_metric=tiny_math.f1"], "train.best_metric: eval.tiny_math does not measure 'f1'; there are: acc"),
        (["halving.metric=gsm8k.loss"], "halving.metric: eval.gsm8k does not measure 'loss'"),
        (["objective=eval_info.gsm8k.perplexity.value"], "objective: eval.gsm8k does not measure 'perplexity'"),
    ],
)
def test_a_wrong_metric_is_found_before_anything_is_loaded(words: list[str], line: str, compose: Compose) -> None:
    with pytest.raises(InputError, match=line):
        compose(*OWN_ROWS, *words)


def test_too_few_rows_are_found_before_anything_is_loaded(compose: Compose, own_rows: Path) -> None:
    own_rows.write_text(json.dumps({"question": "1?", "answer": "#### 1"}) + "\n")
    with pytest.raises(InputError, match=r"eval.gsm8k: 1 rows are too few to set some aside for validation"):
        compose(*OWN_ROWS, *BEST)


def test_what_an_evaluation_is_said_to_measure_is_what_it_measures() -> None:
    found = [
        (evaluate.perplexity, metrics.perplexity([-1.0], [1])),
        (evaluate.generation, metrics.accuracy([metrics.exact_match("1", "1")])),
        (evaluate.classification, metrics.classification([0], [0], 2)),
    ]
    for function, scores in found:
        assert evaluate.measures(function, {}) == tuple(scores)
    assert evaluate.measures(evaluate.instruction, {"ways": ["labels"]}) == ("label_acc",)
    assert evaluate.measures(print, {}) is None  # somebody's own
