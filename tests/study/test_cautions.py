"""What makes scores say less than they seem to: in the record, on the terminal, in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from peftsweep import cli
from peftsweep.analysis.table import columns, table
from peftsweep.observe import display
from peftsweep.study.cautions import cautions
from peftsweep.study.record import Result, write_json
from tests import schemas
from tests.analysis.test_report import trial, written


def score(value: float, n: int = 300) -> dict[str, float]:
    return {"value": value, "stderr": 0.01, "n": n}


FACTS: dict[str, Any] = {
    "base_accuracy": score(0.1),
    "base_degenerate": True,
    "accuracy": score(0.5),
    "valid_fraction": score(0.4),
    "number_valid_fraction": score(0.9),
    "majority": 0.5,
    "random": 0.25,
    "degenerate": False,
    "label_degenerate": True,
    "label_histogram": {"solution2": 300},
    "truncated_prompts": 7,
    "truncated_answers": 0,
    "long_references": 12,
    "seen_in_training": None,
}
WARNINGS = [
    "piqa: 7 of 300 rows lost a part of the prompt, which is longer than max_length leaves room for",
    "piqa: 12 of 300 rows have a reference answer of more tokens than max_new_tokens, so it is never generated in full",
    "piqa: no answer could be read in 180 of 300 texts (valid_fraction 0.400)",
    "piqa: nearly always the same answer by label, 300 of 300 times 'solution2' for different prompts",
]


def test_each_fact_that_spoils_a_score_is_a_line_with_its_count() -> None:
    assert cautions({}, {"piqa": FACTS}, {}) == WARNINGS
    trained = {"truncated_answers": 3, "training_rows": 64}
    assert cautions(trained, {}, {"overall": {}, "long": {"cut_prompts": 2}}) == [
        "training: 3 of 64 rows lost the end of the answer, which is longer than max_length leaves room for",
        "inference long: 2 prompts lost their beginning to fit the model",
    ]
    fine = {"accuracy": score(0.5), "valid_fraction": score(0.5), "degenerate": False, "seen_in_training": 0}
    assert cautions({"truncated_prompts": 0}, {"piqa": fine}, {}) == []
    assert cautions({}, {"piqa": fine | {"seen_in_training": 3}}, {}) == ["piqa: 3 test rows were trained on"]


def result(facts: dict[str, Any], config: dict[str, Any] | None = None) -> Result:
    sizes = {"trainable_parameters": 1, "total_parameters": 10, "steps": 2, "train_seconds": 1.0}
    about = {"status": "success", "trial": "t", "labels": ["t"], "study": "s", "created_at": "2026-01-01"}
    return Result(about, {}, config or {}, train_info=sizes, eval_info={"piqa": facts})


def test_the_terminal_shows_baselines_beside_every_metric_and_the_cautions_below() -> None:
    facts = FACTS | {"headline": "acc_norm", "acc": score(0.6), "acc_norm": score(0.7), "f1": score(0.3)}
    lines = display.summary(result(facts | {"f1_majority": 0.0, "f1_random": 0.333}))
    assert lines[0].startswith("piqa: acc_norm 0.700 ± 0.010 (majority 0.500, chance 0.250), accuracy 0.500 ± 0.010 ")
    assert "(base 0.100, majority 0.500, chance 0.250)" in lines[0]
    assert "f1 0.300 ± 0.010 (majority 0.000, chance 0.333)" in lines[0]
    assert "valid_fraction" not in lines[0]
    assert lines[-4:] == [f"warning: {line}" for line in WARNINGS]


def test_the_report_lists_each_warning_once_with_the_configurations_that_it_concerns(tmp_path: Path) -> None:
    rows = [
        trial(n, 60 + n, **{"config.method.r": 2 ** (n + 1)})
        | {"run_info.warnings": json.dumps([f"task: no answer could be read in {n + 1} of 5 texts", "task: the same"])}
        for n in range(3)
    ]
    part = written(tmp_path, *rows).partition("## Warnings\n\n")[2].partition("##")[0]
    first, second = part.strip().splitlines()
    assert first.startswith("- task: no answer could be read in 1 of 5 texts (`lora, r=2`; with other figures: 2 conf")
    assert second == "- task: the same (`lora, r=2`, `lora, r=4`, `lora, r=8`)."
    assert "## Warnings" not in written(tmp_path, trial(0, 60))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("metric", ["acc_norm", pytest.param("acc", marks=SLOW), pytest.param("label_acc", marks=SLOW)])
def test_the_report_has_chance_and_majority_beside_every_headline(metric: str, tmp_path: Path) -> None:
    def row(n: int, right: int) -> dict[str, Any]:
        made = trial(n, right, **{"config.method.r": 2 ** (n + 1)})
        named = {key.replace("task.accuracy", f"task.{metric}"): value for key, value in made.items()}
        return named | {"eval_info.task.majority": 0.62, "eval_info.task.random": 0.5}

    always = "lways giving the most frequent answer scores 0.620, guessing 0.500."
    assert f"- A{always}" in written(tmp_path, row(0, 95), row(1, 97))
    assert f"- **Chance level**: a{always}" in written(tmp_path, row(0, 60), row(1, 62))


# ---- records of earlier versions -------------------------------------------------------------------


OLD = {"acc": score(0.5), "acc_norm": score(0.99), "base_acc": score(0.5), "base_acc_norm": score(0.99)}


@pytest.mark.parametrize(
    ("reader", "headline", "kept"),
    [
        ("winogrande", "acc", False),
        ("commonsense_qa", "acc", False),
        ("boolq", "acc", True),
        ("social_i_qa", "acc", True),
        ("piqa", "acc_norm", True),
    ],
)
def test_an_old_record_is_judged_by_the_tasks_headline_and_without_a_norm_of_unscored_texts(
    reader: str, headline: str, kept: bool, tmp_path: Path
) -> None:
    node = {"_target_": "peftsweep.evaluation.evaluate.multiple_choice", "reader": f"peftsweep.data.tasks.{reader}"}
    before = result(dict(OLD) | {"degenerate": True}, {"eval": {"piqa": node}})
    write_json(tmp_path / "t" / "result.json", vars(before) | {"folder": None})
    (read,) = table.read(tmp_path)
    assert ("acc_norm" in read.eval_info["piqa"]) == ("base_acc_norm" in read.eval_info["piqa"]) == kept
    assert len(read.run_info["warnings"]) == 1
    found = table.trials([read])
    assert columns.main_scores(found) == [f"eval_info.piqa.{headline}.value"]
    read.eval_info["piqa"] = dict(OLD) | {"headline": "acc"}  # a record of today says it itself
    assert columns.main_scores(table.trials([read])) == ["eval_info.piqa.acc.value"]


def test_trials_that_disagree_on_the_headline_are_judged_as_before() -> None:
    rows = {"eval_info.x.acc.value": [0.1, 0.2], "eval_info.x.acc_norm.value": [0.3, 0.4]}
    both = pd.DataFrame(rows | {"eval_info.x.headline": ["acc", "acc_norm"]})
    assert columns.main_scores(both) == ["eval_info.x.acc_norm.value"]


def test_the_report_says_which_trials_were_judged_by_the_rules_of_an_earlier_version(tmp_path: Path) -> None:
    rows = [
        trial(n, 60 + n, **{"config.method.r": 2 ** (n + 1), "eval_info.task.valid_fraction.value": 1.0})
        | ({"run_info.judged": 2} if n else {})
        for n in range(3)
    ]
    assert "- an earlier version read these answers by other rules" in (text := written(tmp_path, *rows))
    assert "evaluates them again (`lora, r=2`)." in text
    assert "## Warnings" not in written(tmp_path, *rows[1:])
    assert "## Warnings" not in written(tmp_path, rows[0])


def test_a_headline_that_is_asked_for_later_is_that_of_the_record() -> None:
    words = ["eval=[piqa]", "eval.piqa.path=piqa.jsonl", "train.steps=1", "dataset.samples=32", "device=cpu"]
    Path("piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in schemas.SCHEMAS["piqa"]))
    assert cli.run_one(words).eval_info["piqa"]["headline"] == "acc_norm"
    assert cli.run_one([*words, "eval.piqa.headline=acc"]).eval_info["piqa"]["headline"] == "acc"
    (read,) = table.read(Path("multirun/default"))
    assert columns.main_scores(table.trials([read])) == ["eval_info.piqa.acc.value"]
