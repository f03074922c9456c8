"""Which test rows the adapter was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftsweep import cli
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.data import rows as data_rows
from peftsweep.study.record import Result
from peftsweep.training import loop
from peftsweep.trial import seen

Compose = Callable[..., Trial]
ROWS = [{"q": f"{n}+{n}=", "a": f"{2 * n} #{2 * n}"} for n in range(40)]
LOCAL = ["dataset=file", "dataset.path=rows.jsonl", "dataset.test_path=test.jsonl", "dataset.leave_out_tested=false"]
LOCAL += ["dataset.prompt='{q}'", "dataset.answer='{a}'", "train.batch_size=4"]


@pytest.fixture(autouse=True)
def files(scratch: Path) -> None:
    write("rows.jsonl", ROWS)
    write("test.jsonl", [*ROWS[:10], {"q": "1+2=", "a": "3 #3"}])


def write(name: str, rows: list[dict[str, str]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def counts(one: Trial) -> dict[str, int | None]:
    tokenizer = build.load_tokenizer(one)
    rows = one.rows or data_rows.load_rows(one.config.dataset)
    tests = {name: build.test_examples(one, name, rows, tokenizer) for name in one.config.eval}
    found = seen.seen(one, rows, build.training_tokens(one, tokenizer, rows.train), tests, tokenizer)
    assert not any(facts[seen.SIMILAR] for facts in found.values())
    return {name: facts[seen.SEEN] for name, facts in found.items()}


def test_a_run_that_goes_through_the_rows_has_seen_those_that_are_tested(compose: Compose) -> None:
    assert counts(compose(*LOCAL, "train.steps=10", "eval=[perplexity,exact_match]")) == {
        "perplexity": 10,
        "exact_match": 10,
    }


def test_a_test_row_that_differs_from_one_trained_on_in_space_or_capitals_is_counted_apart() -> None:
    """It stays in the training, as in code they tell rows apart, but a score of such rows may be too high."""
    own = {"q": "The Cafe\u0301 costs\n3+3=", "a": "six"}
    write("rows.jsonl", [*ROWS, own])
    others = [{"q": "the CAF\u00c9  costs 3+3= ", "a": "Six"}, {"q": "the caf\u00e9 costs 3+3=", "a": "7"}]
    write("test.jsonl", [*ROWS[:10], *others])
    words = ["device=cpu", "train.steps=11", "dataset.leave_out_tested=true", "eval=[perplexity]"]
    result = cli.run_one([*LOCAL[:3], *LOCAL[4:], *words])
    assert result.train_info["tested_rows"] == 10
    assert [result.eval_info["perplexity"][key] for key in (seen.SEEN, seen.SIMILAR)] == [0, 1]
    line = "perplexity: 1 test rows differ from rows trained on in white space or capitals alone"
    assert line in result.run_info["warnings"]


def test_a_run_that_trains_nothing_has_seen_nothing(compose: Compose) -> None:
    assert counts(compose(*LOCAL, "train=none")) == {"perplexity": 0}


@pytest.mark.parametrize("long", [0, 9])
def test_a_short_run_has_seen_only_the_rows_of_its_batches(long: int, compose: Compose) -> None:
    """Also where rows are left out for their length, after which the numbers of the others are no longer the same."""
    write("rows.jsonl", [{"q": "1+" * 40, "a": f"{n}"} for n in range(long)] + ROWS)
    one = compose(*LOCAL, "train.steps=3", "seed=5", "dataset.drop_long=true", "dataset.max_length=40")
    tokenizer = build.load_tokenizer(one)
    assert one.rows is not None
    tokens = build.training_tokens(one, tokenizer, one.rows.train)
    assert len(tokens) == len(ROWS) == len(one.rows.train) - long
    batches = loop.batches(tokens, one.config.train, pad_id=0, seed=5, device=torch.device("cpu"))
    taken = [ids.tolist() for _ in range(3) for batch in next(batches) for ids in batch.input_ids]
    tested = [build.training_tokens(one, tokenizer, [row])[0].ids for row in ROWS[:10]]
    number = sum(any(ids == row[: len(ids)] for row in taken) for ids in tested)
    assert counts(one) == {"perplexity": number}
    assert 0 < number < 10


@pytest.mark.parametrize("words", [["model.task=seq_cls", "dataset.max_length=15"], ["dataset.max_length=500"]])
def test_rows_that_would_be_cut_are_left_out_of_classifiers_and_for_the_positions_of_a_model_too(
    words: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second words leave the rows to the positions of the model, which are fewer than max_length."""
    own = ["dataset=tiny_direction", "dataset.samples=50", "train.steps=3"]
    one, whole = compose(*own, "dataset.drop_long=true", *words), compose(*own, *words[:-1])
    tokenizer, rows = build.load_tokenizer(one), data_rows.load_rows(one.config.dataset).train
    lengths = [len(row.ids) for row in build.training_tokens(whole, tokenizer, rows)]
    most = 15 if len(words) > 1 else 17
    assert min(lengths) <= most < max(lengths)
    monkeypatch.setattr(tokenizer, "model_max_length", most)
    found = build.training_tokens(one, tokenizer, rows)
    assert [len(row.ids) for row in found] == [length for length in lengths if length <= most]


def test_a_test_row_is_known_again_in_another_prompt(compose: Compose) -> None:
    own = ["eval=[exact_match]", "eval.exact_match.path=test.jsonl", "+eval.exact_match.prompt='Please: {q}'"]
    assert counts(compose(*LOCAL, *own, "+eval.exact_match.answer='{a}'", "train.steps=10")) == {"exact_match": 10}


def test_rows_of_the_harness_are_not_known(compose: Compose) -> None:
    one = compose(*LOCAL, "eval=[lm_eval,perplexity]", "eval.lm_eval.tasks=[piqa]", "train.steps=10")
    assert counts(one) == {"lm_eval": None, "perplexity": 10}


def test_of_a_saved_adapter_the_rows_of_its_record_count_or_none_are_known(compose: Compose) -> None:
    trained = cli.run_one([*LOCAL, "device=cpu", "train.steps=10", "study=before", "eval=[perplexity]"])
    assert trained.eval_info["perplexity"]["seen_in_training"] == 10
    assert trained.folder is not None
    again = [f"adapter.path={trained.folder}", "eval=[perplexity]"]
    other = ["dataset=file", "dataset.path=other.jsonl", "dataset.test_path=test.jsonl"]
    other += ["dataset.prompt='{q}'", "dataset.answer='{a}'"]
    write("other.jsonl", [{"q": "9-1=", "a": "8"}])
    assert counts(compose(*again, *other)) == {"perplexity": 10}  # of the training's rows, not of these
    write("rows.jsonl", ROWS[20:])
    assert counts(compose(*again, *other)) == {"perplexity": None}  # they are not what they were
    write("rows.jsonl", ROWS)
    shutil.copytree(trained.folder / "adapter", "bare")
    assert counts(compose("adapter.path=bare", "model=tiny", *other)) == {"perplexity": None}


def test_what_was_cut_is_counted_for_training_and_tests() -> None:
    """Two tokens are one of the prompt and one of the answer."""
    result = cli.run_one([*LOCAL, "device=cpu", "train.steps=2", "dataset.max_length=2", "eval=[perplexity]"])
    assert result.train_info["truncated_answers"] == result.train_info["truncated_rows"] == 40
    assert result.eval_info["perplexity"]["truncated_answers"] == 11
    lines: list[Any] = result.run_info["warnings"]
    assert any(line.startswith("training: 40 of 40 rows lost the end of the answer") for line in lines)
    assert any(line.startswith("perplexity: 11 of 11 rows lost the end of the answer") for line in lines)
    assert result.folder is not None
    assert lines == Result.read(result.folder).run_info["warnings"]
    assert all(line in (result.folder / "trial.log").read_text() for line in lines)
