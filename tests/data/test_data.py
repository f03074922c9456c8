"""Rows, examples, batches."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import processors

from peftsweep import InputError
from peftsweep.data import batches, files, templates, tokens
from peftsweep.data import rows as data_rows
from peftsweep.data.templates import Example
from peftsweep.data.tokens import Tokens
from peftsweep.models import model
from peftsweep.schema import DatasetConfig, ModelConfig, OnMissing, ValidationConfig

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


@pytest.mark.parametrize("format", [format for format in data_rows.FORMATS if format not in files.PLAIN])
def test_every_format_gives_the_same_rows(format: str) -> None:
    assert data_rows.read_rows(write(ROWS, f"rows{format}")) == ROWS


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
        data_rows.read_rows(name, "dataset.path")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{question.__class__}", "names an attribute; an item of a column is {column[item]}"),
        ("{question[0].real}", "names an attribute"),
        ("{question:>99999999999}", "pads to more than 10000 characters"),
        ("{question:{answer}}", "or to a column"),
        ("question", """is the same text for all rows; for the column write 'dataset.prompt="{question}"'"""),
    ],
)
def test_a_template_puts_in_columns_and_no_more(template: str, problem: str) -> None:
    with pytest.raises(InputError) as refused:
        list(templates.Templates(template, "{answer}").each(ROWS))
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_column_may_have_a_dot_in_its_name() -> None:
    (made,) = templates.Templates("{a.b} {a.b[0]}", "{a.c:.1f}").each([{"a.b": ["x"], "a.c": 1.25, "a": {"b": "y"}}])
    assert made is not None
    assert (made.prompt, made.answer) == ('["x"] x', "1.2")


def test_an_item_of_a_column_may_hold_a_dot() -> None:
    (made,) = templates.Templates("{a[b.c]:>4}", "{a[d]}").each([{"a": {"b.c": "x", "d": "y"}}])
    assert made is not None
    assert (made.prompt, made.answer) == ("   x", "y")


SPANS: list[dict[str, Any]] = [
    {"answers": {"text": ["x", "y"]}},
    {"answers": {"text": []}},
    {"answers": {"text": None}},
]


def test_a_list_that_is_too_short_or_null_within_a_column_is_a_missing_value() -> None:
    for row in SPANS[1:]:
        with pytest.raises(InputError, match=r"^dataset\.answer: row 2 has no value for 'answers\[text\]\[0\]' \(null"):
            templates.examples([SPANS[0], row], "", "{answers[text][0]}")
    drop, empty = (
        templates.examples(SPANS, "", "{answers[text][0]}", missing=how) for how in (OnMissing.drop, OnMissing.empty)
    )
    assert [row.answer for row in drop] == ["x"]
    assert [row.answer for row in empty] == ["x", "", ""]


def test_an_item_is_of_a_list_or_object_that_may_be_json_text_and_never_a_character() -> None:
    rows = [{"a": json.dumps(value)} for value in (["x", "y"], {"1": "y"})]
    assert [row.answer for row in templates.examples(rows, "", "{a[1]}")] == ["y", "y"]


@pytest.mark.parametrize(
    ("answer", "value", "problem"),
    [
        ("{a[0]}", "xy", r"\{a\[0\]\} names an item of str; must be one of a list or an object"),
        ("{a[texts]}", {"text": ["x"]}, r"\{a\[texts\]\} has no item 'texts'; did you mean 'text'\?"),
        ("{a[text]}", ["x"], r"\{a\[text\]\} names the item 'text' of a list; must be a number from 0"),
        ("{a:.2f}", "high", r"\{:\.2f\} is no format of 'high'"),
    ],
)
def test_a_value_that_a_template_cannot_take_is_named_by_row(answer: str, value: Any, problem: str) -> None:
    with pytest.raises(InputError, match=rf"^dataset\.answer='.*': row 1 of rows cannot be written into it: {problem}"):
        templates.examples([{"a": value}], "", answer, file="rows")


def test_a_tsv_keeps_lone_quotes() -> None:
    Path("rows.tsv").write_text('sentence\tlabel\na "lone quote\t1\n')
    assert data_rows.read_rows("rows.tsv") == [{"sentence": 'a "lone quote', "label": "1"}]


CELLS = [{"a": "1", "b": ""}, {"a": 'say "hi", you', "b": "two\nlines"}, {"a": "NA", "b": "é" * 200_000}]


def quoted(rows: list[dict[str, str]], delimiter: str = ",", end: str = "\r\n") -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) + end for line in lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("excel.csv", quoted(CELLS).encode("utf-8-sig")),
        ("european.csv", quoted(CELLS, ";").encode()),
        ("separator.csv", ("sep=;\r\n" + quoted(CELLS, ";")).encode()),
        ("blank_first.csv", ("\n" + quoted(CELLS, ";")).encode()),
        ("UNICODE.CSV", quoted(CELLS).encode("utf-16")),
        ("utf32.csv", quoted(CELLS).encode("utf-32")),
        ("big_endian.csv", b"\xfe\xff" + quoted(CELLS).encode("utf-16-be")),
        ("packed.csv.gz", gzip.compress(quoted(CELLS).encode(), mtime=0)),
        ("index.csv", pd.DataFrame(CELLS).to_csv().encode()),
        ("trailing.csv", quoted(CELLS, end=",\n").encode()),
        ("trailing_rows.csv", quoted(CELLS, end=",\n").replace(",\n", "\n", 1).encode()),
        ("empty_rows.csv", (quoted(CELLS) + "," * (len(CELLS[0]) - 1) + "\r\n\r\n").encode()),
        ("bare.csv", ("\n" + pd.DataFrame(CELLS).to_csv(index=False)).encode()),
        ("lines.json", "\n".join(json.dumps(row) for row in CELLS).encode()),
        ("wrapped.json", json.dumps({"version": 1, "data": CELLS}).encode("utf-8-sig")),
        ("list.jsonl", json.dumps(CELLS, indent=1).encode()),
        ("Packed.JSONL.GZ", gzip.compress("\n".join(json.dumps(row) for row in CELLS).encode(), mtime=0)),
        ("wide.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in CELLS).encode("utf-16")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_are_read_as_people_have_them(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    assert data_rows.read_rows(name) == CELLS


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_names_of_columns_may_hold_what_separates_others(mark: str) -> None:
    """The first of these marks in the first line was taken, and ``long;answer`` was a column."""
    others = [one for one in (",", ";", "\t", "|") if one != mark]
    for other in others:
        long, answer = f"question{other} long", "answer"
        Path("bare.csv").write_text(f"{long}{mark}{answer}\nwhat{mark}this\na{other}b{mark}c\n")
        assert data_rows.read_rows("bare.csv") == [{long: "what", answer: "this"}, {long: f"a{other}b", answer: "c"}]
        Path("quoted.csv").write_text(f'"{long}"{mark}{answer}\n"what{other} then"{mark}this\n')
        assert data_rows.read_rows("quoted.csv") == [{long: f"what{other} then", answer: "this"}]


def test_a_file_whose_columns_two_marks_could_separate_is_an_error() -> None:
    text = "question;answer, in EUR\nhow much;1,5\nand now;2,5\n"
    Path("rows.csv").write_text(text)
    problem = "line 1: the columns may be separated by commas or semicolons; a line 'sep=,' before it says which"
    with pytest.raises(InputError, match=rf"^dataset\.path=rows\.csv: {problem}$"):
        data_rows.read_rows("rows.csv", "dataset.path")
    Path("rows.csv").write_text(f"sep=;\n{text}")
    assert data_rows.read_rows("rows.csv")[0] == {"question": "how much", "answer, in EUR": "1,5"}
    Path("rows.csv").write_text('question;answer, in EUR\nhow much;1,5\n"open;2,5\n')
    with pytest.raises(InputError, match=r"dataset\.path=rows\.csv: line 3: "):
        data_rows.read_rows("rows.csv", "dataset.path")


def test_an_encoding_can_be_given_and_a_wrong_one_is_said_with_its_line() -> None:
    Path("rows.csv").write_bytes("a\nplain\nnaïve – “so”\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"dataset\.path=rows\.csv: line 3: not utf-8 .*dataset\.encoding=cp1252"):
        data_rows.load_rows(DatasetConfig(name="x", path="rows.csv", prompt="", answer="{a}"))
    own = DatasetConfig(name="x", path="rows.csv", prompt="", answer="{a}", encoding="cp1252", train_fraction=0.5)
    found = data_rows.load_rows(own)
    assert {row["a"] for row in found.train + found.test} == {"plain", "naïve – “so”"}
    with pytest.raises(InputError, match=r"dataset\.encoding=cp1253x: no such encoding"):
        data_rows.read_rows("rows.csv", "dataset.path", "cp1253x")
    Path("rows.csv").write_bytes("a\nplain\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"zero bytes, as UTF-16 does; try dataset\.encoding=utf-16"):
        data_rows.read_rows("rows.csv", "dataset.path")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("rows.csv", "a,b,a\n1,2,3\n", "line 1: the column 'a' occurs twice"),
        ("rows.csv", "a,,b\n1,2,3\n", "line 1: column 2 has no name"),
        ("rows.csv", 'a,b\n1,"open\n2,3\n', "line 3: unexpected end of data"),
        ("rows.csv", 'a,b\n"one"two,3\n', "line 2: "),
        ("rows.csv", 'a,b\n"1\n1",2\n3\n', "line 4: not 2 columns"),
        ("rows.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: the key 'a' occurs twice"),
        ("rows.json", '[{"a": {"b": 1, "b": 2}}]', "the key 'b' occurs twice"),
        ("rows.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of rows .train, test."),
        ("rows.json", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("rows.csv.gz", "a\n1\n", "cannot be read"),
        ("rows.xlsx", "", "unknown format '.xlsx'"),
    ],
)
def test_what_would_be_read_wrongly_is_an_error(name: str, text: str, problem: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(InputError, match=f"dataset.path={name}: .*{problem}"):
        data_rows.read_rows(name, "dataset.path")


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_float_of_a_parquet_is_written_as_it_was_given(kind: str) -> None:
    """The scores of STS-B are floats of 32 bits: 3.8 was trained on as 3.799999952316284."""
    table = pa.table({"score": pa.array(np.array([3.8, 0.1, np.nan, 5.0], dtype=kind)), "text": list("abcd")})
    pyarrow.parquet.write_table(table, "rows.parquet")
    for read in (data_rows.read_rows("rows.parquet"), files.first_rows("rows.parquet")):
        assert [row["score"] for row in read] == [3.8, 0.1, None, 5.0]
    (made,) = templates.examples(read[:1], "{text}", "{score}")
    assert made.answer == "3.8"


def test_a_parquet_with_a_column_twice_is_an_error() -> None:
    pyarrow.parquet.write_table(pa.table([pa.array(["1"]), pa.array(["2"])], names=["a", "a"]), "rows.parquet")
    with pytest.raises(InputError, match="the column 'a' occurs twice"):
        data_rows.read_rows("rows.parquet")


# ---- missing values, and what is no text -----------------------------------------------------------


def missing_in(name: str) -> None:
    values = [{"question": "q0", "score": 0.5}, {"question": None, "score": 1.5}, {"question": "q2", "score": None}]
    if name.endswith(".parquet"):
        pd.DataFrame(values).astype({"score": float}).to_parquet(name)
    else:
        Path(name).write_text("\n".join(json.dumps(row).replace("null}", "NaN}") for row in values))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize(("column", "row"), [("question", 2), ("score", 3)])
def test_a_missing_value_is_an_error_that_names_row_and_column(name: str, column: str, row: int) -> None:
    missing_in(name)
    dataset = DatasetConfig(name="x", path=name, prompt="", answer=f"{{{column}}}", train_fraction=0.5)
    with pytest.raises(InputError, match=rf"dataset\.answer: row {row} of {name} has no value for '{column}'"):
        data_rows.load_rows(dataset)
    dataset.missing = OnMissing.drop
    found = data_rows.load_rows(dataset)
    assert [len(found.train) + len(found.test), found.left_out["missing_rows"]] == [2, 1]
    dataset.missing = OnMissing.empty
    found = data_rows.load_rows(dataset)
    answers = sorted(example.answer for example in templates.dataset_examples(dataset, found.train + found.test))
    assert answers == (["", "q0", "q2"] if column == "question" else ["", "0.5", "1.5"])


def test_an_empty_string_is_a_value() -> None:
    Path("rows.csv").write_text("question,answer\n,nan\n")
    assert templates.examples(data_rows.read_rows("rows.csv"), "{question}", "{answer}") == [Example("", "nan")]


def test_lists_and_objects_are_json_and_nothing_is_python() -> None:
    row = {"tags": ["a", "ü", None], "meta": {"ok": True, "rank": None}, "n": 3}
    made = templates.examples([row], "{tags} {meta} {meta[ok]}", "{n:03d} {tags[1]}")
    assert made == [Example('["a", "ü", null] {"ok": true, "rank": null} True', "003 ü")]
    with pytest.raises(InputError, match=r"row 1 has no value for 'meta\[rank\]'"):
        templates.examples([row], "{meta[rank]}", "")
    with pytest.raises(InputError, match="row 1 cannot be written into it: it holds bytes"):
        templates.examples([{"a": b"x"}], "{a}", "")


def test_half_a_surrogate_pair_is_named_by_its_row() -> None:
    Path("rows.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n{"a": "x\\ud83d"}\n')
    with pytest.raises(InputError, match=r"dataset\.answer: row 2 of rows\.jsonl holds U\+D83D, half a surrogate pair"):
        data_rows.load_rows(DatasetConfig(name="x", path="rows.jsonl", prompt="", answer="{a}"))


def test_a_reader_is_given_no_null_either() -> None:
    row = {"passage": "p", "question": "q", "answer": None}
    with pytest.raises(InputError, match=r"eval\.x\.reader: row 1 has no value for 'answer'"):
        templates.examples([row], "{passage}", "{answer}", "eval.x", reader="peftsweep.data.tasks.boolq")
    alpaca = {"instruction": "i", "input": None, "output": "o"}
    (made,) = templates.examples(
        [alpaca], "{instruction}{with_input}{input}", "{output}", reader="peftsweep.data.tasks.alpaca"
    )
    assert made == Example("i", "o")


def local(**options: object) -> DatasetConfig:
    return DatasetConfig(name="file", prompt="{question}", answer="{answer}", **options)  # type: ignore[arg-type]


def test_test_rows_are_never_training_rows_and_do_not_depend_on_samples() -> None:
    path = str(write(ROWS, "rows.jsonl"))
    whole = data_rows.load_rows(local(path=path, train_fraction=0.8), validation=True)
    few = data_rows.load_rows(local(path=path, train_fraction=0.8, samples=5))
    assert whole.test == few.test
    assert len(whole.test) == 6
    parts = [{row["question"] for row in part} for part in (whole.train, whole.validation, whole.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert [len(part) for part in parts] == [22, 2, 6]


def test_a_training_row_that_repeats_a_validation_row_is_left_out() -> None:
    """Of three copies of each row one may be held out: the loss of the validation fell as its copies were learnt."""
    path = str(write([*ROWS, *ROWS, *ROWS], "rows.jsonl"))
    test = str(write([{"question": "other", "answer": "x"}], "test.jsonl"))

    def parts(**options: object) -> tuple[list[str], list[str], data_rows.Rows]:
        options = {"path": path, "test_path": test, "validation_samples": 4} | options
        found = data_rows.load_rows(local(**options), validation=True)
        train, validation = ([row["question"] for row in part] for part in (found.train, found.validation))
        return train, validation, found

    train, validation, found = parts()
    assert len(validation) == 4
    assert not set(train) & set(validation)
    assert found.left_out["validated_rows"] == 90 - 4 - len(train) > 0
    kept, same, found = parts(leave_out_tested=False)
    assert same == validation
    assert (len(kept), found.left_out["validated_rows"]) == (86, 86 - len(train))
    write(ROWS[:5], "validation.jsonl")
    train, validation, found = parts(validation=ValidationConfig(path="validation.jsonl"))
    assert (len(train), found.left_out["validated_rows"]) == (78, 12)
    write(ROWS, "validation.jsonl")
    with pytest.raises(InputError, match=r"^train\.eval_every: all 90 training rows repeat validation rows$"):
        parts(validation=ValidationConfig(path="validation.jsonl"), validation_samples=30)


def test_a_test_file_is_used_whole() -> None:
    train, test = str(write(ROWS[:20], "train.jsonl")), str(write(ROWS[20:], "test.jsonl"))
    rows = data_rows.load_rows(local(path=train, test_path=test))
    assert (rows.train, rows.test) == (ROWS[:20], ROWS[20:])


def test_too_few_rows_to_part_say_so() -> None:
    with pytest.raises(InputError, match=r"dataset.train_fraction=0.9: leaves 1 of 1 to train and 0 to test on"):
        data_rows.load_rows(local(path=str(write(ROWS[:1], "rows.jsonl"))))


def test_templates_take_columns_and_braces() -> None:
    assert templates.examples(ROWS[:1], "{{x}} {question}", "{answer}") == [Example("{x} q0", "a0")]
    with pytest.raises(InputError, match=r"dataset.prompt: row 1 has no column 'questoin'; did you mean 'question'"):
        templates.examples(ROWS, "{questoin}", "{answer}")


def test_a_column_that_only_other_rows_have_is_missing_in_this_one() -> None:
    rows: list[dict[str, Any]] = [{"question": "a", "answer": "b", "much more": None}, {"question": "c"}]
    first = Example("a", "b")
    assert templates.examples(rows, "{question}", "{answer}", missing=OnMissing.drop) == [first]
    assert templates.examples(rows, "{question}", "{answer}", missing=OnMissing.empty) == [first, Example("c", "")]
    with pytest.raises(InputError, match=r"row 2 has no column 'answer'.*; dataset.missing=drop leaves out the rows"):
        templates.examples(rows, "{question}", "{answer}")
    with pytest.raises(InputError, match=r"row 1 has no column 'reply'; .*'dataset.answer=\S+$"):  # which no row has
        templates.examples(rows, "{question}", "{reply}", missing=OnMissing.drop)


def test_a_conversation_that_a_row_lacks_altogether_can_be_left_out() -> None:
    conversation = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows: list[dict[str, Any]] = [{"conversations": conversation, "note": None}, {"note": "none here"}]
    for reader in ("messages", "sharegpt"):
        how: dict[str, Any] = {"reader": f"peftsweep.data.tasks.{reader}", "missing": OnMissing.drop}
        (example,) = templates.examples(rows, "{prompt}", "{answer}", **how)
        assert example.answer == "b"
        with pytest.raises(InputError, match="row 2 cannot be read: it has no column messages"):
            templates.examples(rows, "{prompt}", "{answer}", reader=f"peftsweep.data.tasks.{reader}")


def test_the_answer_ends_and_long_rows_lose_the_beginning_of_the_prompt_but_for_bos() -> None:
    tokenizer = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    row = Example("Tom has 47 apples. " * 10, "47+38=85")
    (whole,) = tokens.tokenize(tokenizer, [row], 500)
    (cut,) = tokens.tokenize(tokenizer, [row], 20)
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole.ids[whole.answer_start : -1]) == "47+38=85"
    assert cut.ids == [tokenizer.bos_token_id, *whole.ids[-19:]]
    assert cut.ids[cut.answer_start :] == whole.ids[whole.answer_start :]
    (short,) = tokens.tokenize(tokenizer, [row], 5)
    assert short == Tokens([tokenizer.bos_token_id, *whole.ids[whole.answer_start :][:4]], 1, None, None, 71, 5)


def marked(begin: str, end: str) -> Any:
    """The embedded tokenizer, which puts other marks around a text."""
    made: Any = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    marks = [("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}".strip(), special_tokens=marks
    )
    return made


@pytest.mark.parametrize(("begin", "end"), [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>")])
def test_marks_of_the_tokenizer_stand_before_the_prompt_and_never_between_it_and_the_answer(
    begin: str, end: str
) -> None:
    tokenizer = marked(begin, end)
    assert tokenizer.decode(tokenizer("a b").input_ids) == f"{begin}a b{end}"
    (row,) = tokens.tokenize(tokenizer, [Example("Is it so? ", "yes")], 64)
    assert tokenizer.decode(row.ids) == f"{begin}Is it so? yes</s>"
    assert tokenizer.decode(row.ids[row.answer_start :]) == "yes</s>"
    (prompt_ids,) = tokens.prompt_ids(tokenizer, ["Is it so? "])
    assert prompt_ids == row.ids[: row.answer_start]
    (pair,) = tokens.tokenize_pairs(tokenizer, [("Is it so?", " yes")], 64)
    assert tokenizer.decode(pair.ids) == f"{begin}Is it so? yes"
    (short,) = tokens.prompt_ids(tokenizer, ["Is it so? "], 4)
    (cut,) = tokens.tokenize_pairs(tokenizer, [("Is it so?" * 9, " yes")], 6)
    kept = len(begin) // 3
    assert short == prompt_ids[:kept] + prompt_ids[kept - 4 :]
    assert tokenizer.decode(cut.ids[:kept]) == begin
    assert tokenizer.decode(cut.ids[cut.answer_start :]) == " yes"
    assert cut.lost_prompt > 0 == cut.lost_answer
    (long,) = tokens.tokenize_pairs(tokenizer, [("Is it so?", " yes" * 9)], 6)  # keeps the mark and the end
    whole = tokenizer("Is it so?" + " yes" * 9, add_special_tokens=False).input_ids
    assert long.ids[kept:] == whole[kept - 6 :]
    assert long.lost_prompt == len(tokenizer("Is it so?", add_special_tokens=False).input_ids)
    assert long.lost_prompt + long.lost_answer == kept + len(whole) - 6


def test_an_empty_prompt_is_gone_on_from_by_the_mark_before_a_text() -> None:
    tokenizer = marked("", "")
    assert tokens.prompt_ids(tokenizer, ["", "a"]) == [[tokenizer.bos_token_id], tokenizer("a").input_ids]
    (pair,) = tokens.tokenize_pairs(tokenizer, [("", "yes")], 64)
    assert pair == Tokens([tokenizer.bos_token_id, *tokenizer("yes").input_ids], 1)
    tokenizer.bos_token = None
    assert tokens.prompt_ids(tokenizer, [""]) == [[tokenizer.eos_token_id]]


def test_a_continuation_that_joins_the_last_token_of_its_context_has_tokens_of_its_own() -> None:
    tokenizer = marked("", "")
    joined, last = (tokenizer(text, add_special_tokens=False).input_ids for text in ("plums", "plum"))
    assert len(joined) <= len(last)
    (pair,) = tokens.tokenize_pairs(tokenizer, [("One plum", "s")], 64)
    assert tokenizer.decode(pair.ids) == "One plums"
    assert tokenizer.decode(pair.ids[pair.answer_start :]) == "s"
    assert pair.answer_tokens == 1
    with pytest.raises(InputError, match="the answer '' has no tokens"):
        tokens.tokenize_pairs(tokenizer, [("One", "")], 64)


def test_a_number_stands_for_a_class_by_its_place_only_where_no_class_is_a_number() -> None:
    def answer(given: Any, *classes: str) -> str:
        (example,) = templates.examples([{"label": given}], "is it?", " {label}", classes=classes)
        return example.answer

    assert [answer(n, "less", "more") for n in (0, 1)] == [" less", " more"]
    assert [answer(n, "1", "2", "3") for n in (1, 3)] == [" 1", " 3"]
    with pytest.raises(InputError, match="row 1 is '0', which is no class"):  # not the class 1, as the number 1 is
        answer(0, "1", "2", "3")
    with pytest.raises(InputError, match="row 1 is '1', which is no class"):
        answer(1, "10", "many")


def test_a_row_with_an_empty_choice_is_refused_or_left_out() -> None:
    rows = [{"goal": "Boil water", "sol1": text, "sol2": "on a stove", "label": 1} for text in ("", "in a pan")]
    how: dict[str, Any] = {"key": "eval.piqa", "reader": "peftsweep.data.tasks.piqa"}
    with pytest.raises(InputError, match=r"eval\.piqa\.answer: row 1 has an empty choice"):
        templates.examples(rows, "{goal}:", "{answer}", **how)
    assert len(templates.examples(rows, "{goal}:", "{answer}", **how, missing=OnMissing.drop)) == 1
    spaced = templates.examples(rows, "{goal}:", " {answer}", **how)  # whose space is scored
    assert [choice.answer for choice in spaced[0].choices] == [" ", " on a stove"]


def test_collate_masks_padding_and_prompts() -> None:
    batch = batches.collate([Tokens([5, 6, 7, 8], 2), Tokens([9, 4], 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.answer_mask.tolist() == [[False, True, True], [True, False, False]]
    assert (batch.tokens, batch.answer_tokens, batch.answer_start) == (6, 3, 1)
    assert batch.answer_mask.sum() == batch.answer_tokens


def test_batches_cover_every_row_once_an_epoch_with_little_padding() -> None:
    lengths = torch.randint(5, 200, (333,), generator=torch.Generator().manual_seed(0)).tolist()
    epoch = list(itertools.islice(batches.batch_order(lengths, 8, seed=3), 42))
    assert sorted(itertools.chain(*epoch)) == list(range(333))
    padded = sum(max(lengths[n] for n in batch) * len(batch) for batch in epoch)
    assert sum(lengths) / padded > 0.9
    first = [lengths[batch[0]] for batch in epoch]
    assert first != sorted(first)
    assert epoch == list(itertools.islice(batches.batch_order(lengths, 8, seed=3), 42))
    assert epoch != list(itertools.islice(batches.batch_order(lengths, 8, seed=4), 42))


def test_the_embedded_task_never_repeats_a_test_row_in_training() -> None:
    from peftsweep.tiny import task

    def numbers(rows: list[dict[str, str]]) -> set[str]:
        return {row["answer"].partition("=")[0] for row in rows}

    train, test = task.rows("train", 4000, 1), task.rows("test", 500, 0)
    assert not numbers(train) & numbers(test)
    assert task.rows("train", 50, 1) == train[:50]


def test_a_text_file_is_its_paragraphs() -> None:
    Path("book.txt").write_text("One\nline.\n\n\n  Two. \n")
    assert data_rows.read_rows("book.txt") == [{"text": "One\nline."}, {"text": "Two."}]


def test_a_training_row_that_is_tested_on_is_left_out() -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(8)]
    train = [*rows, rows[0], {"question": " Q3 ", "answer": "a3"}, {"question": "q3", "answer": "other"}]
    train += [{"question": "long", "answer": "x" * 99}]
    write(train, "train.jsonl")
    write([rows[3], rows[7]], "test.jsonl")
    dataset = DatasetConfig(
        name="x", path="train.jsonl", test_path="test.jsonl", prompt="{question}", answer="{answer}"
    )
    found = data_rows.load_rows(dataset)
    # " Q3 " and "q3" of another answer are other rows: case, space and answers count, as in code.
    assert [row["question"] for row in found.train] == ["q0", "q1", "q2", "q4", "q5", "q6", "q0", " Q3 ", "q3", "long"]
    assert found.left_out == {"tested_rows": 2, "long_rows": 0, "duplicate_rows": 1}
    dataset.deduplicate, dataset.max_characters = True, 50
    found = data_rows.load_rows(dataset)
    assert [len(found.train), found.left_out["long_rows"]] == [8, 1]
    dataset.leave_out_tested = False
    found = data_rows.load_rows(dataset)
    assert [len(found.train), found.left_out["tested_rows"]] == [10, 2]


def test_a_dataset_of_one_constant_prompt_trains() -> None:
    write([{"text": f"Story {n}."} for n in range(20)], "rows.jsonl")
    found = data_rows.load_rows(DatasetConfig(name="x", path="rows.jsonl", prompt="Tell me a story.", answer="{text}"))
    assert [len(found.train), len(found.test), found.left_out["tested_rows"]] == [18, 2, 0]


def test_a_test_file_of_other_columns_is_left_to_its_evaluation() -> None:
    write([{"question": f"q{n}", "answer": "a"} for n in range(4)], "train.jsonl")
    write([{"text": "b"}], "test.jsonl")
    dataset = DatasetConfig(
        name="x", path="train.jsonl", test_path="test.jsonl", prompt="{question}", answer="{answer}"
    )
    assert len(data_rows.load_rows(dataset).train) == 4
