"""The gallery: what its studies conclude, that its figures are those of their records, and its own readers and metrics.

The conclusions are tested on the committed results, and by `make gallery-quick` on those of a part of each study.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest

import calls
import cloze
import conversations
import publish

TOP = Path(__file__).parents[1]
GALLERY = TOP / "gallery"

STUDIES = sorted(file.parent.name for file in GALLERY.glob("*/answer.json"))
ELSEWHERE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt)/")  # a path of one machine


def folder(study: str) -> Path:
    """Where its results are: in the gallery, or in the folder whose name begins with GALLERY."""
    return TOP / f"{os.environ.get('GALLERY', 'gallery/')}{study}"


def results(study: str) -> pd.DataFrame:
    """The trials of a study."""
    return pd.read_parquet(folder(study) / "results.parquet")


# ---- conclusions -------------------------------------------------------------------------------------


def test_conclusion_every_rank_makes_the_right_answers_at_least_four_times_as_likely_as_the_base_does() -> None:
    found = results("ranks")
    score = "eval_info.perplexity.perplexity.value"
    assert (found[score] * 4 < found["eval_info.perplexity.base_perplexity.value"]).all()


def test_every_trial_of_the_ranks_answers_more_questions_than_the_base_and_the_advice_says_so() -> None:
    """Of a part of the study, with thirty questions, this is not certain."""
    found = results("ranks")
    right, error = (found[f"eval_info.arc_easy.acc_norm.{part}"] for part in ("value", "stderr"))
    assert (right - found["eval_info.arc_easy.base_acc_norm.value"] > 2 * error).all()
    assert publish.advice(GALLERY / "ranks").startswith("Use lora")


def test_conclusion_parameters_grow_with_the_rank_and_quality_by_perplexity_too() -> None:
    unquantised = results("ranks").query("`choices.quant` == 'none'").groupby("config.method.r")
    parameters = unquantised["train_info.trainable_parameters"].first()
    assert (parameters / parameters.index == parameters.iloc[0] / parameters.index[0]).all()
    perplexity = unquantised["eval_info.perplexity.perplexity.value"].mean()
    assert perplexity.loc[32] < perplexity.loc[2]


def test_conclusion_methods_at_a_rate_that_suits_them_make_the_right_answers_far_likelier_than_the_base_does() -> None:
    score = "eval_info.perplexity.perplexity.value"
    ended = results("methods").dropna(subset=[score])
    assert len(ended) >= 2
    assert (ended[score] * 3 < ended["eval_info.perplexity.base_perplexity.value"]).all()


def test_every_method_that_went_on_answers_more_questions_than_the_base_and_the_smallest_lora_is_advised() -> None:
    right, base = (f"eval_info.arc_easy.{which}acc_norm.value" for which in ("", "base_"))
    ended = results("methods").dropna(subset=[right])
    assert len(ended) == 7
    assert (ended[right] - ended[base] > 2 * ended["eval_info.arc_easy.acc_norm.stderr"]).all()
    assert publish.advice(GALLERY / "methods").startswith("Use lora")
    size = ended.groupby("choices.method")["train_info.adapter_bytes"].first()
    assert size["lora"] * 50 < size["full"]


def test_conclusion_a_classifier_learns_its_task_with_each_method() -> None:
    found = results("encoder")
    gain = found["eval_info.sst2.accuracy.value"] - found["eval_info.sst2.majority"]
    assert (gain > 2 * found["eval_info.sst2.accuracy.stderr"]).all()


def test_conclusion_the_file_of_an_adapter_is_less_than_a_fiftieth_of_the_whole_classifier() -> None:
    found = results("encoder").assign(
        label=lambda table: table["run_info.labels"].map(lambda labels: json.loads(labels)[0])
    )
    size = found.groupby("label")["train_info.adapter_bytes"].first()
    assert size["lora"] * 50 < size["full"]


def test_conclusion_training_teaches_calls_that_parse() -> None:
    found = results("chat").sort_values("eval_info.calls.accuracy.value").iloc[-1]
    assert found["eval_info.calls.valid_fraction.value"] > 0.9
    assert found["eval_info.calls.accuracy.value"] > found["eval_info.calls.base_accuracy.value"]


def test_conclusion_the_advice_on_pefts_results_is_in_a_tie_with_the_first_of_its_board() -> None:
    found = results("import").set_index("run_info.trial")
    answer = json.loads((folder("import") / "answer.json").read_text(encoding="utf-8"))
    use = next(part for part in answer["sections"] if part["name"] == "use")["facts"]
    accuracy, error = (found[f"eval_info.gsm8k.accuracy.{part}"] for part in ("value", "stderr"))
    first, advised = str(accuracy.idxmax()), str(use["trials"][0])
    assert advised != first
    assert accuracy[first] - accuracy[advised] < 2 * (error[first] ** 2 + error[advised] ** 2) ** 0.5
    size = found["train_info.adapter_bytes"]
    assert size[advised] * 10 < size[first]


# ---- what is committed -------------------------------------------------------------------------------


# In the fast tier one of trials and one that was imported.
@pytest.mark.parametrize(
    "study", [s if s in ("ranks", "import") else pytest.param(s, marks=pytest.mark.slow) for s in STUDIES]
)
def test_a_study_of_the_gallery_is_whole_and_names_no_path_of_the_machine_it_ran_on(study: str) -> None:
    place = GALLERY / study
    for name in ("run.sh", "README.md", "RESULTS.md", "answer.json", "report.html"):
        assert not ELSEWHERE.search((place / name).read_text(encoding="utf-8")), name
    for column, values in pd.read_parquet(place / "results.parquet").items():
        assert not values.astype(str).str.contains(ELSEWHERE).any(), column
    assert (GALLERY / publish.TABLES).exists()


def test_the_figures_of_the_gallery_s_pages_are_those_of_its_records() -> None:
    shown = publish.overview()
    for page, lines in ((GALLERY / "README.md", shown), (TOP / "docs" / "gallery.md", publish.unlinked(shown))):
        assert "\n".join(lines) in page.read_text(encoding="utf-8")
    for study in STUDIES:
        assert publish.published_text(GALLERY / study) in (GALLERY / study / "README.md").read_text(encoding="utf-8")


def test_the_first_table_of_the_readme_is_that_of_the_study_of_ranks() -> None:
    table = "\n".join(publish.scores(GALLERY / "ranks"))
    assert table in (TOP / "README.md").read_text(encoding="utf-8")


# ---- readers, metrics and rows -----------------------------------------------------------------------


def test_a_question_of_commonsense_170k_is_the_question_of_the_hub() -> None:
    prompt = "Please choose the correct answer to the question: {}\n\nAnswer1: salt Answer2: a cup of tea\n\n"
    row = {"instruction": prompt.format("What dissolves?") + "Answer format: answer1/answer2", "answer": "answer1"}
    hub = {"question_stem": "What dissolves?", "choices": {"text": ["salt", "a cup of tea"], "label": ["A", "B"]}}
    mine, theirs = cloze.question(row), cloze.question(hub | {"answerKey": "A"})
    assert {key: theirs[key] for key in mine} == mine
    assert mine["answer"] == "salt"


def test_a_row_without_texts_of_choices_has_no_question() -> None:
    prompt = "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false"
    assert cloze.question({"instruction": prompt, "answer": "true"})["question"] is None


CALL = '<tool_call>{"name": "timer", "arguments": {"minutes": 5}}</tool_call>'


@pytest.mark.parametrize(
    ("prediction", "parses", "right"),
    [
        (CALL, True, True),
        ('Sure: <tool_call> {"arguments": {"minutes": 5}, "name": "timer"} </tool_call> Done.', True, True),
        (CALL.replace("5", "6"), True, False),
        (CALL.replace("timer", "play"), True, False),
        (CALL.replace("5}", "5"), False, False),
        (CALL.replace("</tool_call>", ""), False, False),
        (CALL.replace('{"minutes": 5}', "5"), False, False),
        ("<tool_call>[]</tool_call>", False, False),
        ("", False, False),
    ],
)
def test_a_call_is_right_when_function_and_arguments_are(prediction: str, parses: bool, right: bool) -> None:
    judged = calls.same_call(prediction, CALL)
    assert (judged.extracted is not None, judged.correct) == (parses, right)


def test_conversations_are_made_from_their_seed_and_test_rows_name_what_no_training_row_does() -> None:
    trained, tested = (
        json.dumps(list(conversations.conversations(200, 0, None, tested=tested))) for tested in (False, True)
    )
    assert trained == json.dumps(list(conversations.conversations(200, 0, None, tested=False)))
    for name in [*conversations.CITIES, *conversations.TITLES]:
        held_out = name in [
            *conversations.CITIES[: conversations.HELD_OUT],
            *conversations.TITLES[: conversations.HELD_OUT],
        ]
        assert (f"{name}" in tested, f"{name}" in trained) == (held_out, not held_out), name


def test_the_last_turn_of_a_conversation_is_a_call_or_what_the_assistant_says() -> None:
    for last, is_call in ((2, True), (None, False)):
        for row in conversations.conversations(20, 1, last, tested=True):
            assert row["messages"][-1]["role"] == "assistant"
            assert (calls.parsed(row["messages"][-1]["content"]) is not None) == is_call
