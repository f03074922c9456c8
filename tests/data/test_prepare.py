"""Datasets -> files to train and to test on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsweep import cli
from peftsweep.config.compose import Trial
from peftsweep.data import rows as data_rows
from peftsweep.data import templates as data_templates
from peftsweep.errors import InputError
from peftsweep.study.record import Status
from tests import schemas

Data = Callable[..., tuple[int, str, str]]
Row = dict[str, Any]


@pytest.fixture
def data_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Data:
    """Run `peftsweep-data`: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["peftsweep-data", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.data()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def write(rows: list[Row], name: str = "source.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def written() -> list[Row]:
    return read("out.jsonl") + read("out.test.jsonl")


def hint(out: str) -> list[str]:
    """The words of the command that is printed last."""
    program, *words = shlex.split(out.partition("to train on them:\n")[2])
    assert program == "peftsweep"
    return words


def test_raw_keeps_the_columns_of_the_source(data_command: Data) -> None:
    path = write(schemas.SCHEMAS["alpaca"])
    code, out, err = data_command("alpaca", "--path", path, "--out", "out.jsonl")
    assert (code, err) == (0, "")
    assert "out.jsonl: 11 rows\nout.test.jsonl: 1 rows\nleft out: 0 duplicates, 0 not sampled" in out
    assert sorted(map(str, written())) == sorted(map(str, schemas.SCHEMAS["alpaca"]))
    assert out.count('{"instruction"') == 3
    assert hint(out) == ["dataset=alpaca", "dataset.path=out.jsonl", "dataset.test_path=out.test.jsonl"]


def test_alpaca_takes_the_columns_where_they_are(data_command: Data) -> None:
    path = write([row | {"id": n} for n, row in enumerate(schemas.SCHEMAS["alpaca"])])
    code, out, _ = data_command("alpaca", "--path", path, "--out", "out.jsonl", "--format", "alpaca")
    assert code == 0
    assert sorted(map(str, written())) == sorted(map(str, schemas.SCHEMAS["alpaca"]))
    assert "dataset=alpaca" in hint(out)


def test_alpaca_fills_the_prompt_where_they_are_not(data_command: Data) -> None:
    code, _, _ = data_command(
        *("gsm8k", "--path", write(schemas.SCHEMAS["gsm8k"]), "--out", "out.jsonl", "--format", "alpaca")
    )
    assert code == 0
    prompt = "Question: What is 3+1? Think step by step.\nAnswer: "
    assert {"instruction": prompt, "input": "", "output": "3+1=4\n#### 4"} in written()


def test_chatml_is_a_turn_and_its_answer(data_command: Data) -> None:
    path = write(schemas.SCHEMAS["gsm8k"])
    assert data_command("gsm8k", "--path", path, "--out", "out.jsonl", "--format", "chatml")[0] == 0
    prompt = "Question: What is 3+1? Think step by step.\nAnswer: "
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "3+1=4\n#### 4"}]
    assert {"messages": turns} in written()


def test_a_conversation_keeps_its_turns(data_command: Data) -> None:
    conversation = [("system", "Be kind."), ("human", "Hi."), ("gpt", "Hello."), ("human", "How?"), ("gpt", "Well.")]
    rows = [{"conversations": [{"from": who, "value": f"{text} {n}"} for who, text in conversation]} for n in range(4)]
    words = ("chat", "--path", write(rows), "--out", "out.jsonl", "--split", "0.5", "--format")
    assert data_command(*words, "chatml")[0] == 0
    assert [turn["role"] for turn in written()[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    code, _, err = data_command(*words, "alpaca", "--force")
    assert (code, err.count("\n")) == (2, 1)
    assert "--format=alpaca: a conversation of several turns" in err


def test_tools_and_their_calls_are_kept(data_command: Data) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    turns = [{"role": "user", "content": "Add."}, {"role": "assistant", "tool_calls": [call]}]
    beside: dict[str, Any] = {"tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}}
    rows = [{"messages": [{"role": "system", "content": str(n)}, *turns]} | beside for n in range(4)]
    words = ("chat", "--path", write(rows), "--out", "out.jsonl", "--split", "0.5", "--format", "chatml")
    assert data_command(*words)[0] == 0
    assert sorted(row["messages"][0]["content"] for row in written()) == list("0123")
    assert all((row["messages"][1:], row["tools"]) == (turns, tools) for row in written())
    assert all(row["chat_template_kwargs"] == {"enable_thinking": False} for row in written())


def test_rows_of_one_constant_prompt_are_parted_and_another_encoding_is_read(data_command: Data) -> None:
    Path("source.csv").write_bytes(b"text\n" + "".join(f"née {n}\n" for n in range(8)).encode("cp1252"))
    words = ("file", "--path", "source.csv", "--prompt", "Say.", "--answer", "{text}", "--out", "out.jsonl")
    code, _, err = data_command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "--path=source.csv: line 2: not utf-8 (byte 0xe9); the file may be in the encoding of Windows: --enc" in err
    assert data_command(*words, "--encoding", "cp1252")[0] == 0
    assert sorted(row["text"] for row in written()) == [f"née {n}" for n in range(8)]


def test_a_text_without_a_prompt_is_no_conversation(data_command: Data) -> None:
    path = write(schemas.SCHEMAS["text"])
    code, _, err = data_command("text", "--path", path, "--out", "out.jsonl", "--format", "chatml")
    assert (code, err.count("\n")) == (2, 1)
    assert "--format=chatml: a row without a prompt" in err


# Each kind of row and each format in the fast tier, and one kind in two formats.
WRITTEN = {("alpaca", "alpaca"), ("alpaca", "raw"), ("chat", "chatml"), ("gsm8k", "raw"), ("piqa", "chatml")}
WRITTEN |= {("text", "raw")}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(n, f, marks=[] if (n, f) in WRITTEN else pytest.mark.slow)
        for n in sorted(schemas.SCHEMAS)
        for f in ("alpaca", "chatml", "raw")
        if (n, f) != ("text", "chatml")
    ],
)
def test_what_is_written_is_read_as_the_same_prompts(
    name: str, format: str, data_command: Data, compose: Callable[..., Trial]
) -> None:
    path = write(schemas.SCHEMAS[name], "a source.jsonl")
    words = ["--path", path, "--out", "an out.jsonl", "--split", "0.5", "--format", format]
    code, out, err = data_command(name, *words)
    assert code == 0, err
    dataset = compose(*hint(out), "eval=[perplexity]").config.dataset
    rows = data_rows.load_rows(dataset)
    assert sum(rows.left_out.values()) == 0
    assert [len(rows.train), len(rows.test)] == [len(read("an out.jsonl")), len(read("an out.test.jsonl"))]
    source = compose(f"dataset={name}", "dataset.path='a source.jsonl'", "eval=[perplexity]").config.dataset
    before = {example.answer for example in data_templates.dataset_examples(source, data_rows.read_rows(path))}
    after = {example.answer for example in data_templates.dataset_examples(dataset, rows.train + rows.test)}
    assert after == before


def test_own_templates_are_in_the_hint(data_command: Data, questions: Path, compose: Callable[..., Trial]) -> None:
    templates = ("--prompt", 'Say "{question}"\n', "--answer", "{answer}\\")
    code, out, _ = data_command("file", "--path", str(questions), "--out", "out.jsonl", *templates)
    assert code == 0
    dataset = compose(*hint(out)).config.dataset
    assert (dataset.prompt, dataset.answer) == ('Say "{question}"\n', "{answer}\\")


def test_a_table_is_read(data_command: Data) -> None:
    Path("rows.csv").write_text("question,answer\n" + "".join(f"q{n},a{n}\n" for n in range(10)))
    assert data_command("gsm8k", "--path", "rows.csv", "--out", "out.jsonl")[0] == 0
    assert {"question": "q3", "answer": "a3"} in written()


def test_rows_made_from_a_seed_are_written_too(data_command: Data) -> None:
    assert data_command("tiny_math", "--samples", "20", "--out", "out.jsonl", "--format", "chatml")[0] == 0
    assert len(written()) <= 20


# ---- the sample and its parts ----------------------------------------------------------------------


def test_the_seed_decides_the_sample_and_its_parts(data_command: Data, questions: Path) -> None:
    def parts(seed: int) -> tuple[str, str]:
        words = ["gsm8k", "--path", str(questions), "--out", "out.jsonl", "--force"]
        assert data_command(*words, "--samples", "20", "--split", "0.8", "--seed", str(seed))[0] == 0
        return Path("out.jsonl").read_text(), Path("out.test.jsonl").read_text()

    train, test = parts(1)
    assert [train.count("\n"), test.count("\n")] == [16, 4]
    assert not set(train.splitlines()) & set(test.splitlines())
    assert parts(1) == (train, test)
    assert parts(2) != (train, test)


def test_more_samples_than_rows_are_all(data_command: Data, questions: Path) -> None:
    words = ("--path", str(questions), "--out", "out.jsonl", "--samples", "1000")
    assert "left out: 0 duplicates, 0 not sampled" in data_command("gsm8k", *words)[1]
    assert len(written()) == 40


def test_duplicates_are_left_out_and_one_prompt_is_in_one_part(data_command: Data) -> None:
    rows = [{"question": f"What is {n}?", "answer": str(answer)} for n in range(20) for answer in (1, 2, 2)]
    rows += [{"question": f"what  is {n}?", "answer": "3"} for n in range(20)]
    code, out, _ = data_command("gsm8k", "--path", write(rows), "--out", "out.jsonl", "--split", "0.5")
    assert code == 0
    assert "left out: 20 duplicates" in out
    assert len(written()) == 60
    train, test = ({" ".join(row["question"].lower().split()) for row in read(f"out{s}.jsonl")} for s in ("", ".test"))
    assert train | test == {f"what is {n}?" for n in range(20)}
    assert not train & test


# ---- wrong input -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], str]] = {
    "an unknown dataset": (["nope"], "NAME: must be one of alpaca"),
    "two datasets": (["alpaca,dolly"], "not alpaca,dolly"),
    "a split above 1": (["gsm8k", "--split", "1.5"], "--split=1.5: must lie between 0 and 1"),
    "a split of 0": (["gsm8k", "--split", "0"], "--split=0.0: must lie between 0 and 1"),
    "no number": (["gsm8k", "--split", "half"], "--split: must be a number, not half"),
    "a split that leaves nothing to test": (["gsm8k", "--split", "0.99"], "--split=0.99: splits 40 rows into 40"),
    "no samples": (["gsm8k", "--samples", "0"], "--samples=0: must be at least 1"),
    "an unknown format": (["gsm8k", "--format", "xml"], "--format: must be one of alpaca, chatml, raw, not xml"),
    "an unknown option": (["gsm8k", "--sample-size", "3"], "--sample-size: no such option; did you mean '--samples'?"),
    "another suffix": (["gsm8k", "--out", "out.csv"], "--out=out.csv: must end in .jsonl"),
    "the source itself": (["gsm8k", "--out", "questions.jsonl", "--force"], "must differ from the file of --path"),
    "a file as folder": (["gsm8k", "--out", "questions.jsonl/o.jsonl"], "must lie in a writable folder"),
    "no such file": (["gsm8k", "--path", "none.jsonl"], "--path=none.jsonl: no such file"),
    "no template": (["file"], "--prompt: dataset=file needs a template"),
    "a missing column": (["alpaca"], "--answer: row 1 of questions.jsonl has no column 'output'"),
    "a folder": (["gsm8k", "--path", "."], "--path=.: is a folder; must be a file"),
    "a device": (["gsm8k", "--path", "/dev/null"], "--path=/dev/null: is a pipe or a device; must be a file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name: str, data_command: Data, questions: Path) -> None:
    words, problem = WRONG[name]
    before = questions.read_text()
    code, out, err = data_command("--path", questions.name, "--out", "out.jsonl", *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert problem in err
    assert questions.read_text() == before
    assert [file.name for file in Path().iterdir()] == [questions.name]


def test_a_file_or_the_hub_must_be_there(data_command: Data) -> None:
    code, _, err = data_command("chat", "--out", "out.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert "--path: dataset=chat needs a local file" in err


def test_the_hub_out_of_reach_is_one_line(data_command: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> list[Row]:
        raise InputError("dataset.hub=x: cannot be loaded; local rows can be given instead")

    monkeypatch.setattr(data_rows, "hub_rows", offline)
    code, _, err = data_command("alpaca", "--out", "out.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert "by --path=FILE" in err


def test_the_hub_is_asked_for_what_the_yaml_names(data_command: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def rows(*words: object) -> list[Row]:
        requested.append(words)
        return schemas.SCHEMAS["gsm8k"]

    monkeypatch.setattr(data_rows, "hub_rows", rows)
    assert data_command("gsm8k", "--out", "out.jsonl")[0] == 0
    assert requested == [("openai/gsm8k", "main", "train", "740312a", "dataset.hub")]


def test_files_are_replaced_only_by_force(data_command: Data, questions: Path) -> None:
    Path("out.test.jsonl").write_text("mine")
    words = ("gsm8k", "--path", str(questions), "--out", "out.jsonl")
    code, _, err = data_command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "--out=out.jsonl: out.test.jsonl exists already; --force replaces it" in err
    assert Path("out.test.jsonl").read_text() == "mine"
    assert data_command(*words, "--force")[0] == 0
    assert len(written()) == 40


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), TypeError("bytes are not JSON")])
def test_what_cannot_be_written_is_one_line(
    error: Exception, data_command: Data, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("peftsweep.study.record.write_lines", fail)
    code, out, err = data_command("gsm8k", "--path", str(questions), "--out", "new/out.jsonl")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot be written" in err


# ---- what it is for --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["alpaca", pytest.param("raw", marks=pytest.mark.slow)])
def test_a_written_file_trains(format: str, data_command: Data, questions: Path) -> None:
    words = ["gsm8k", "--path", str(questions), "--out", "new/out.jsonl", "--samples", "20", "--format", format]
    code, out, _ = data_command(*words)
    assert code == 0
    if format == "raw":
        columns = ["dataset=file", 'dataset.prompt="{question} "', 'dataset.answer="{answer}"', "eval=[perplexity]"]
        words = [*columns, *hint(out)[1:]]
    else:
        words = hint(out)
        assert "dataset=file" in words
    result = cli.run_one([*words, "device=cpu", "train.steps=2", "train.batch_size=2"])
    assert result.status is Status.success, result.error
    assert result.train_info["training_rows"] == 18
    assert result.eval_info["perplexity"]["perplexity"]["n"] == 2


def test_a_row_without_a_value_is_an_error_in_the_options_of_this_command_or_left_out(data_command: Data) -> None:
    file = write([{"q": f"{n}?", "a": None if n == 3 else f"{n}."} for n in range(12)])
    words = ["file", "--path", file, "--out", "out.jsonl", "--prompt", "{q} ", "--answer", "{a}"]
    code, _, err = data_command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "--answer: row 4 of source.jsonl has no value for 'a'" in err
    assert "--missing=drop leaves such rows out" in err
    assert "dataset." not in err
    assert "left out: 1 without a value, 0 duplicates, 0 not sampled" in data_command(*words, "--missing", "drop")[1]
    assert len(read("out.jsonl") + read("out.test.jsonl")) == 11
    out = data_command(*words, "--missing", "empty", "--force")[1]
    assert "dataset.missing=empty" in hint(out)
    assert len(read("out.jsonl") + read("out.test.jsonl")) == 12


def test_it_starts_without_torch() -> None:
    code = "import sys; from peftsweep.data import prepare; assert not {'torch', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
