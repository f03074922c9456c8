"""Rows, examples, batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from peftsweep import InputError, data, model
from peftsweep.data import Example, Tokens
from peftsweep.schema import DatasetConfig, ModelConfig

ROWS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)]


def write(rows: list[dict[str, str]], name: str) -> Path:
    file = Path(name)
    if file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        pd.DataFrame(rows).to_csv(file, sep="\t" if file.suffix == ".tsv" else ",", index=False)
    return file


@pytest.mark.parametrize("format", [format for format in data.FORMATS if format != ".txt"])
def test_every_format_gives_the_same_rows(format: str) -> None:
    assert data.read_rows(write(ROWS, f"rows{format}")) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("rows.jsonl", '{"a": "1"}\n{"a": \n', "line 2: not JSON"),
        ("rows.jsonl", '{"a": "1"}\n\n[1]\n', "line 3: not a JSON object"),
        ("rows.json", '[{"a": "1"},\n {"a" "2"}]', "line 2: not JSON"),
        ("rows.json", '{"a": "1"}', "not a list of JSON objects"),
        ("rows.csv", "a,b\n1,2\n3\n", "line 3: not 2 columns"),
        ("rows.csv", "a,b\n1,2\n3,4,5\n", "line 3: not 2 columns"),
        ("rows.tsv", "a\tb\n1\n", "line 2: not 2 columns"),
        ("rows.parquet", "not parquet", "cannot be read"),
        ("rows.jsonl", "", "holds no rows"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name: str, text: str, problem: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(InputError, match=f"dataset.path={name}: .*{problem}".replace(".*", "(.|\n)*")):
        data.read_rows(name, "dataset.path")


def test_a_tsv_keeps_lone_quotes() -> None:
    Path("rows.tsv").write_text('sentence\tlabel\na "lone quote\t1\n')
    assert data.read_rows("rows.tsv") == [{"sentence": 'a "lone quote', "label": "1"}]


def local(**options: object) -> DatasetConfig:
    return DatasetConfig(name="file", prompt="{question}", answer="{answer}", **options)  # type: ignore[arg-type]


def test_test_rows_are_never_training_rows_and_do_not_depend_on_samples() -> None:
    path = str(write(ROWS, "rows.jsonl"))
    whole = data.load_rows(local(path=path, train_fraction=0.8), validation=True)
    few = data.load_rows(local(path=path, train_fraction=0.8, samples=5))
    assert whole.test == few.test
    assert len(whole.test) == 6
    parts = [{row["question"] for row in part} for part in (whole.train, whole.validation, whole.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert [len(part) for part in parts] == [22, 2, 6]


def test_a_test_file_is_used_whole() -> None:
    train, test = str(write(ROWS[:20], "train.jsonl")), str(write(ROWS[20:], "test.jsonl"))
    rows = data.load_rows(local(path=train, test_path=test))
    assert (rows.train, rows.test) == (ROWS[:20], ROWS[20:])


def test_too_few_rows_to_part_say_so() -> None:
    with pytest.raises(InputError, match=r"dataset.train_fraction=0.9: parts 1 rows"):
        data.load_rows(local(path=str(write(ROWS[:1], "rows.jsonl"))))


def test_templates_take_columns_and_braces() -> None:
    assert data.examples(ROWS[:1], "{{x}} {question}", "{answer}") == [Example("{x} q0", "a0")]
    with pytest.raises(InputError, match=r"dataset.prompt: row 1 has no column 'questoin'; did you mean 'question'"):
        data.examples(ROWS, "{questoin}", "{answer}")


def test_the_answer_ends_and_long_rows_lose_the_beginning_of_the_prompt() -> None:
    tokenizer = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    row = Example("Tom has 47 apples. " * 10, "47+38=85")
    (whole,) = data.tokenize(tokenizer, [row], 500)
    (cut,) = data.tokenize(tokenizer, [row], 20)
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole.ids[whole.answer_start : -1]) == "47+38=85"
    assert len(cut.ids) == 20
    assert cut.ids == whole.ids[-20:]
    assert cut.ids[cut.answer_start :] == whole.ids[whole.answer_start :]
    (short,) = data.tokenize(tokenizer, [row], 5)
    assert short == Tokens(whole.ids[whole.answer_start - 1 :][:5], 1)


def test_collate_masks_padding_and_prompts() -> None:
    batch = data.collate([Tokens([5, 6, 7, 8], 2), Tokens([9, 4], 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.answer_mask.tolist() == [[False, True, True], [True, False, False]]
    assert (batch.tokens, batch.answer_tokens, batch.answer_start) == (6, 3, 1)
    assert batch.answer_mask.sum() == batch.answer_tokens


def test_batches_cover_every_row_once_an_epoch_with_little_padding() -> None:
    lengths = torch.randint(5, 200, (333,), generator=torch.Generator().manual_seed(0)).tolist()
    epoch = list(itertools.islice(data.batch_order(lengths, 8, seed=3), 42))
    assert sorted(itertools.chain(*epoch)) == list(range(333))
    padded = sum(max(lengths[n] for n in batch) * len(batch) for batch in epoch)
    assert sum(lengths) / padded > 0.9
    first = [lengths[batch[0]] for batch in epoch]
    assert first != sorted(first)
    assert epoch == list(itertools.islice(data.batch_order(lengths, 8, seed=3), 42))
    assert epoch != list(itertools.islice(data.batch_order(lengths, 8, seed=4), 42))


def test_the_embedded_task_never_repeats_a_test_row_in_training() -> None:
    from peftsweep.tiny import task

    def numbers(rows: list[dict[str, str]]) -> set[str]:
        return {row["answer"].partition("=")[0] for row in rows}

    train, test = task.rows("train", 4000, 1), task.rows("test", 500, 0)
    assert not numbers(train) & numbers(test)
    assert task.rows("train", 50, 1) == train[:50]


def test_a_text_file_is_its_paragraphs() -> None:
    Path("book.txt").write_text("One\nline.\n\n\n  Two. \n")
    assert data.read_rows("book.txt") == [{"text": "One\nline."}, {"text": "Two."}]


def test_a_training_row_that_is_tested_on_is_left_out() -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(8)]
    train = [*rows, rows[0], {"question": " Q3 ", "answer": "other"}, {"question": "long", "answer": "x" * 99}]
    write(train, "train.jsonl")
    write([rows[3], rows[7]], "test.jsonl")
    dataset = DatasetConfig(
        name="x", path="train.jsonl", test_path="test.jsonl", prompt="{question}", answer="{answer}"
    )
    found = data.load_rows(dataset)
    assert {row["question"] for row in found.train} == {"q0", "q1", "q2", "q4", "q5", "q6", "long"}
    assert found.left_out == {"tested_rows": 3, "long_rows": 0, "duplicate_rows": 1}
    assert len(found.train) == 8
    dataset.deduplicate, dataset.max_characters = True, 50
    found = data.load_rows(dataset)
    assert [len(found.train), found.left_out["long_rows"]] == [6, 1]
    asked = data.questions(data.dataset_examples(dataset, found.train))
    assert [data.questions([Example(prompt, "")]) <= asked for prompt in (" Q1", "q3")] == [True, False]


def test_a_test_file_of_other_columns_is_left_to_its_evaluation() -> None:
    write([{"question": f"q{n}", "answer": "a"} for n in range(4)], "train.jsonl")
    write([{"text": "b"}], "test.jsonl")
    dataset = DatasetConfig(
        name="x", path="train.jsonl", test_path="test.jsonl", prompt="{question}", answer="{answer}"
    )
    assert len(data.load_rows(dataset).train) == 4
