"""`peftsweep-data show`: what is printed of a row is what training takes of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsweep import cli
from peftsweep.config import build
from peftsweep.data import rows as data_rows
from peftsweep.data.tokens import Tokens
from peftsweep.use import show_rows
from tests.data.test_chat import CHATML, TALK, TOOLS, tokenizer, tokens

Row = dict[str, Any]
Show = Callable[..., tuple[int, str, str]]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLED = [TALK[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, TALK[3]]


@pytest.fixture
def show(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    """Run `peftsweep-data show` on rows: exit code, stdout, stderr."""

    def run(rows: list[Row], *words: str) -> tuple[int, str, str]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr("sys.argv", ["peftsweep-data", "show", "rows.jsonl", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.data()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def text(made: Any, row: Tokens) -> str:
    return show_rows.marked(show_rows.pieces(made, row.ids, show_rows.trained(row)), in_colour=False)


def test_every_turn_of_the_assistant_is_in_brackets_with_its_end_mark() -> None:
    made = tokenizer(CHATML)
    system = [{"role": "system", "content": "Be kind."}, *TALK]
    assert text(made, tokens(made, {"messages": system})) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nTom has 3 pens.<|im_end|>\n<|im_start|>assistant\n[[Three, then.<|im_end|>]]\n"
        "<|im_start|>user\nAnd 4 more?<|im_end|>\n<|im_start|>assistant\n[[\nSeven 😀 pens. <|im_end|>]]\n"
    )


def test_the_layouts_of_sharegpt_and_openai_are_the_same_text() -> None:
    made = tokenizer(CHATML)
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TALK]
    assert text(made, tokens(made, {"conversations": shared})) == text(made, tokens(made, {"messages": TALK}))


def test_tool_calls_are_in_brackets_and_what_tools_answer_is_not() -> None:
    made = tokenizer(TOOLS)
    shown = text(made, tokens(made, {"messages": CALLED, "tools": [TOOL]}))
    assert '[[<call>add{"a": 1}</call><|im_end|>]]' in shown
    assert "<|im_start|>tool\n3<|im_end|>\n" in shown
    assert shown.startswith('<|im_start|>tools\n[{"type": "function"')


def test_what_is_marked_is_what_the_loss_is_on() -> None:
    """The first token of a row is predicted from nothing, also where all of a text is trained on."""
    row = Tokens([5, 6, 7], 0)
    assert show_rows.trained(row) == [False, True, True]
    assert sum(show_rows.trained(row)) == row.answer_tokens
    parts = Tokens([5, 6, 7, 8], 1, trained=[False, True, False, True])
    assert show_rows.trained(parts) == parts.trained


def test_the_parts_of_a_text_are_its_whole_where_tokens_are_bytes() -> None:
    made = tokenizer(CHATML)
    text = "wé😀 end"
    ids = made(text, add_special_tokens=False).input_ids
    cuts = [n for n in range(1, len(ids)) if "\ufffd" not in made.decode(ids[:n])]  # between two characters
    assert len(cuts) > 2
    for cut in cuts:
        mask = [n >= cut for n in range(len(ids))]
        (first, _), (second, learned) = show_rows.pieces(made, ids, mask)
        assert (first + second, learned) == (text, True)


def test_colours_end_at_each_line() -> None:
    assert show_rows.marked([("a", False), ("b\nc", True)], in_colour=True) == "a\x1b[32mb\x1b[0m\n\x1b[32mc\x1b[0m"


def test_control_characters_of_a_row_do_not_reach_the_terminal() -> None:
    assert show_rows.marked([("a\x1b[2J\tb\n", False)], in_colour=True) == "a\\x1b[2J\tb\n"


def test_instructions_are_shown_in_the_tokens_of_their_training(show: Show) -> None:
    """One row is enough; the ids are those that a training of the same words gets."""
    rows = [{"question": "1 + 1?", "answer": "2"}]
    code, out, _ = show(rows, "--tokens")
    assert code == 0
    head, _, rest = out.partition("\n")
    assert rest.startswith("<s>Question: 1 + 1?\nAnswer:[[ 2</s>]]\n")
    words = ["dataset=rows.jsonl", "dataset.test_path=rows.jsonl", "dataset.leave_out_tested=false", "model=tiny"]
    one = cli._trial("device=cpu", *words)
    (row,) = build.training_tokens(one, build.load_tokenizer(one), rows)
    table = [line.split(maxsplit=3) for line in rest.splitlines()[2:]]
    assert [int(line[2]) for line in table] == row.ids
    assert [int(line[1]) for line in table] == [int(n >= row.answer_start) for n in range(len(row.ids))]
    assert head == f"---- row 1: {len(row.ids)} tokens, {row.answer_tokens} trained on"


def test_a_row_longer_than_the_model_is_told_by_its_cut_alone(
    show: Show, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    code, out, _ = show([{"prompt": "x " * 4000, "completion": "y"}])  # the model sees 2048 tokens
    assert (code, "cut off at its beginning" in out) == (0, True)
    assert "indexing errors" not in caplog.text


def test_rows_are_those_of_the_file_in_its_order_and_cuts_are_told(show: Show) -> None:
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(6)]
    code, out, _ = show(rows, "--rows", "2", "dataset.max_length=10")
    assert code == 0
    whole = len(tokenizer(CHATML)("Question: What is 0?\nAnswer: 0", add_special_tokens=False).input_ids) + 2
    assert [line for line in out.splitlines() if line.startswith("----")] == [
        f"---- row {n}: 10 tokens, 3 trained on, {whole - 10} cut off at its beginning" for n in (1, 2)
    ]
    assert [f"{n}</s>]]" in out for n in range(3)] == [True, True, False]


def test_a_row_without_a_value_is_told_where_it_is_left_out(show: Show) -> None:
    rows = [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": None}]
    assert "---- row 2: left out, as it lacks a value" in show(rows, "dataset.missing=drop")[1]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (TALK[:1], "row 2 of rows.jsonl cannot be read: a conversation must end with the assistant's turn"),
        ([{"content": "a"}, TALK[1]], "row 2 of rows.jsonl cannot be read: a turn is not an object with a role"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TALK[1]],
            "row 2 of rows.jsonl cannot be read: a part of type 'image' is not text",
        ),
        ([TALK[0], {"role": "assistant", "content": None}], "row 2 of rows.jsonl has no value"),
    ],
)
def test_a_wrong_row_is_one_line_that_names_it(show: Show, messages: list[Row], message: str) -> None:
    code, out, err = show([{"messages": TALK}, {"messages": messages}], "dataset.chat=false")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows: must be a whole number, at least 1, not 0"),
        (["dataset"], "dataset: must be KEY=VALUE"),
        (["dataset.turns=last,all"], "peftsweep-data show takes one trial"),
        (["--model", "./nowhere"], "model=./nowhere: no such folder"),
    ],
)
def test_a_wrong_option_is_one_line(show: Show, words: list[str], message: str) -> None:
    code, _, err = show([{"question": "1?", "answer": "1"}], *words)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_name_that_needs_quotes_is_one_file() -> None:
    Path("a=b, c.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    options = show_rows.parser().parse_intermixed_args(["a=b, c.jsonl"])
    assert cli._trial("device=cpu", *show_rows.overrides(options)).config.dataset.path == "a=b, c.jsonl"


def test_a_classifiers_rows_have_their_class_and_no_loss_on_text(show: Show) -> None:
    rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
    templates = ['dataset.prompt="{text}"', 'dataset.answer="{label}"', "dataset.classes=[no,yes]"]
    code, out, err = show(rows, "model.task=seq_cls", "eval=classification", *templates)
    assert code == 0, err
    assert "[[" not in out
    assert [line.rpartition(", ")[2] for line in out.splitlines() if line.startswith("----")] == [
        "class yes",
        "class no",
    ]


def test_one_row_of_a_hub_dataset_or_of_a_folder_is_enough(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is set aside to test on, which a part such as ``test[:1]`` has no row for."""
    held = [{"question": "1 + 1?", "answer": "2"}]
    monkeypatch.setattr(data_rows, "first_hub_rows", lambda *where: held)
    monkeypatch.setattr(data_rows, "hub_rows", lambda *where: held)
    Path("folder").mkdir()
    Path("folder", "rows.jsonl").write_text(json.dumps(held[0]) + "\n")
    for name in ("someone/rows:test[:1]", "folder"):
        monkeypatch.setattr("sys.argv", ["peftsweep-data", "show", name])
        with pytest.raises(SystemExit) as ended:
            cli.data()
        assert (ended.value.code, "Question: 1 + 1?\nAnswer:[[ 2</s>]]" in capfd.readouterr().out) == (0, True), name
