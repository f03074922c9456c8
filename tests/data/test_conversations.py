"""Conversations in the layouts that files have: right tokens, or one line that names the row."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from omegaconf import OmegaConf

from peftsweep import InputError
from peftsweep.config import identity
from peftsweep.config.fill import conf_dir
from peftsweep.data import hub, layouts, templates
from peftsweep.data import rows as data_rows
from peftsweep.data import tokens as data_tokens
from peftsweep.data.conversations import reader, trees
from peftsweep.schema import DatasetConfig, OnMissing
from tests import schemas
from tests.data.test_chat import CHATML, GENERATION, LLAMA, SCHEMA, TOOLS, read, tokenizer, tokens, trained

Row = dict[str, Any]
USER, REPLY = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "Seven."}
HUMAN = {"from": "human", "value": "3+4?"}
SYSTEM = {"role": "system", "content": "Count."}
ADD = {"name": "add", "arguments": {"a": 3}}


def calling(*calls: Any, **more: Any) -> list[Row]:
    turn = {"role": "assistant", "tool_calls": [*calls]} if calls else {"role": "assistant"}
    return [USER, turn | more, {"role": "tool", "content": "7"}, REPLY]


def call(**function: Any) -> Row:
    return {"type": "function", "function": ADD | function}


def messages(row: Row) -> list[Row]:
    (made,) = read(row)
    assert made.conversation is not None
    return made.conversation.messages


# ---- other layouts of the same conversation --------------------------------------------------------

PLAIN: Row = {"messages": [SYSTEM, USER, REPLY]}
CALLED: Row = {"messages": calling(call()), "tools": [SCHEMA]}
SAME: list[tuple[str, Row, Row]] = [
    ("a column of another name", {"conversation": PLAIN["messages"]}, PLAIN),
    (
        "ShareGPT",
        {
            "conversations": [
                {"from": "system", "value": "Count."},
                {"from": "human", "value": "3+4?"},
                {"from": "gpt", "value": "Seven."},
            ]
        },
        PLAIN,
    ),
    ("roles in capitals", {"messages": [SYSTEM, USER | {"role": "User"}, REPLY | {"role": "Assistant"}]}, PLAIN),
    ("a system's prompt in a column", {"messages": [USER, REPLY], "system": "Count."}, PLAIN),
    ("the same system's prompt twice", PLAIN | {"system_prompt": "Count."}, PLAIN),
    ("an empty column of the system", PLAIN | {"system": None, "system_prompt": " "}, PLAIN),
    ("content null beside value", {"messages": [SYSTEM, HUMAN | {"content": None}, REPLY]}, PLAIN),
    ("turns after the last trained one", {"messages": [*PLAIN["messages"], USER, REPLY | {"weight": 0}]}, PLAIN),
    ("lists of prompt and completion", {"prompt": [SYSTEM, USER], "completion": [REPLY]}, PLAIN),
    ("lists as JSON text", {"prompt": json.dumps([SYSTEM, USER]), "completion": json.dumps([REPLY])}, PLAIN),
    ("arguments as JSON text", {"messages": calling(call(arguments='{"a": 3}')), "tools": [SCHEMA]}, CALLED),
    ("OpenAI's former calls and functions",
     {"messages": calling(function_call=ADD, content=None), "functions": [SCHEMA["function"]]}, CALLED),
    *(
        (
            f"a call as a turn called {role}",
            {
                "conversations": [
                    {"from": "human", "value": "3+4?"},
                    {"from": role, "value": json.dumps(ADD)},
                    {"from": result, "value": "7"},
                    {"from": "gpt", "value": "Seven."},
                ],
                "tools": tools,
            },
            CALLED,
        )
        for role, result, tools in (
            ("function_call", "observation", json.dumps([SCHEMA])),
            ("tool_call", "tool_response", [SCHEMA]),
        )
    ),
    ("tools without the key function", CALLED | {"tools": [SCHEMA["function"]]}, CALLED),
    ("tools with Anthropic's key",
     CALLED | {"tools": [{"name": "add", "input_schema": {"type": "object", "properties": {}}}]}, CALLED),
    *(
        (
            f"arguments under {name}",
            CALLED | {"messages": calling({"type": "function", "function": {"name": "add", name: {"a": 3}}})},
            CALLED,
        )
        for name in ("parameters", "input", "args")
    ),
    ("content that is one part",
     {"messages": [SYSTEM, USER, REPLY | {"content": {"type": "text", "text": "Seven."}}]}, PLAIN),
]  # fmt: skip


@pytest.mark.parametrize(("row", "same"), [one[1:] for one in SAME], ids=[one[0] for one in SAME])
def test_a_conversation_has_the_same_tokens_in_every_layout(row: Row, same: Row) -> None:
    made = tokenizer(TOOLS)
    assert tokens(made, row) == tokens(made, same)


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}])
def test_a_call_without_arguments_has_the_empty_object(arguments: Row) -> None:
    now = {"type": "function", "function": {"name": "now"} | arguments}
    made = tokenizer(TOOLS)
    assert trained(made, tokens(made, {"messages": calling(now)}))[0] == "<call>now{}</call><|im_end|>"
    as_text = tokenizer(TOOLS.replace("call.function.arguments | tojson", "'=' + call.function.arguments"))
    assert trained(as_text, tokens(as_text, {"messages": calling(now)}))[0] == "<call>now={}</call><|im_end|>"


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["by prefixes", "by marks of generation"])
def test_a_turn_with_the_weight_0_is_not_trained_on(template: str) -> None:
    made = tokenizer(template)
    turns: list[Row] = [
        USER,
        REPLY,
        USER,
        REPLY | {"content": "Eight.", "weight": 0},
        USER,
        REPLY | {"content": "Nine.", "weight": 1},
    ]
    plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    weighted, whole = tokens(made, {"messages": turns}), tokens(made, {"messages": plain})
    assert weighted.ids == whole.ids
    assert [text[:5] for text in trained(made, weighted)] == ["Seven", "Nine."]
    assert [text[:5] for text in trained(made, whole)] == ["Seven", "Eight", "Nine."]


@pytest.mark.parametrize("key", ["train", "training", "trainable", "train_on_turn", "loss", "loss_mask"])
@pytest.mark.parametrize("no", [False, 0])
def test_false_under_any_name_of_the_weight_leaves_a_turn_out_of_the_training(key: str, no: Any) -> None:
    made = tokenizer(CHATML)
    other = {"loss" if key == "train" else "train": True}  # false under one name is enough
    row = {"messages": [USER, REPLY | {key: no} | other, USER, REPLY | {"content": "Eight.", key: True}]}
    assert trained(made, tokens(made, row)) == ["Eight.<|im_end|>"]


@pytest.mark.parametrize("columns", [("instruction", "output"), ("instruction", "response"), ("dialogue", "summary")])
def test_lists_in_the_columns_of_a_named_dataset_are_not_taken_for_its_texts(columns: tuple[str, str]) -> None:
    prompt, answer = columns
    assert layouts.recognise([{prompt: "Say it.", answer: "It."}]) is not None
    assert layouts.recognise([{prompt: "Say it.", answer: ["It.", "That."]}]) is None
    assert layouts.recognise([{prompt: {"a": 1}, answer: "It."}]) is None


def test_a_column_conversation_of_plain_text_is_no_list_of_turns() -> None:
    assert layouts.recognise([{"conversation": "Ann: Hi.", "abstract": "A greeting."}]) is None
    assert layouts.recognise([{"conversation": json.dumps([USER, REPLY])}]) == layouts.Layout("chat")
    assert layouts.recognise([{"prompt": [USER], "completion": [REPLY]}]) == layouts.Layout("chat")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 1}, {"train": True}])
def test_a_row_that_is_tested_too_is_left_out_whichever_of_its_turns_are_trained_on(mark: Row, tmp_path: Path) -> None:
    marked = {"messages": [USER, REPLY | mark, USER, REPLY]}
    files = {"train": [marked, PLAIN], "test": [{"messages": [USER, REPLY, USER, REPLY]}]}
    for name, rows in files.items():
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = DatasetConfig(name="x", path=f"{tmp_path}/train.jsonl", test_path=f"{tmp_path}/test.jsonl")
    own.prompt, own.answer, own.reader = "{prompt}", "{answer}", "peftsweep.data.tasks.messages"
    found = data_rows.load_rows(own)
    assert found.train == [PLAIN]
    assert found.left_out["tested_rows"] == 1


@pytest.mark.parametrize("form", [lambda turns: turns, json.dumps])
def test_prompts_and_completions_of_turns_are_conversations_in_lists_and_in_json_text(form: Any) -> None:
    row = {"prompt": form([SYSTEM, USER]), "completion": form([REPLY])}
    assert layouts.recognise([row, row | {"id": 1}]) == layouts.Layout("chat")
    for other in ("[1] is a list", "[]", '["Seven."]'):
        assert layouts.recognise([row | {"prompt": "3+4?", "completion": other}] * 2) != layouts.Layout("chat")


def test_only_the_completion_of_a_conversation_is_trained_on() -> None:
    made = tokenizer(CHATML)
    row = {"prompt": [USER, REPLY, USER], "completion": [REPLY | {"content": "Seven!"}]}
    assert trained(made, tokens(made, row)) == ["Seven!<|im_end|>"]


# ---- trees of messages -----------------------------------------------------------------------------


def message(name: str, parent: str | None, role: str, rank: int | None = None, **more: Any) -> Row:
    row = {"message_id": name, "parent_id": parent, "user_id": "u", "text": name, "role": role, "lang": "en"}
    return row | {"rank": rank, "deleted": False, "message_tree_id": "q", "tree_state": "ready_for_export"} | more


TREE = [
    message("q", None, "prompter"),
    message("worse", "q", "assistant", 1),
    message("best", "q", "assistant", 0),
    message("gone", "q", "assistant", -1, deleted=True),
    message("more?", "best", "prompter"),
    message("unranked", "more?", "assistant"),
    message("thanks", "unranked", "prompter"),
    message("alone", None, "prompter"),
    message("lost", "of another file", "assistant", 0),
]


def test_a_tree_of_messages_is_the_conversation_of_the_best_replies(tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in TREE))
    (row,) = data_rows.read_rows(file)
    best = [("user", "q"), ("assistant", "best"), ("user", "more?"), ("assistant", "unranked")]
    assert [(turn["role"], turn["content"]) for turn in messages(row)] == best
    layout = layouts.recognise(TREE)
    assert layout is not None
    assert layout.option == "chat"


def test_a_row_that_is_a_whole_tree_is_the_same_conversation() -> None:
    def nested(name: str) -> Row:
        (own,) = [row for row in TREE if row["message_id"] == name]
        return own | {"replies": [nested(row["message_id"]) for row in TREE if row["parent_id"] == name]}

    row = {"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": nested("q")}
    (joined,) = trees.joined(TREE)
    assert messages(row) == messages(joined)
    assert layouts.recognise([row]) == layouts.Layout("chat")


# ---- what is refused, by row -----------------------------------------------------------------------

WRONG: list[tuple[str, Row, str]] = [
    ("an unknown role", {"messages": [USER | {"role": "narrator"}, REPLY]}, r"unknown role 'narrator'.*\(turn 1\)"),
    ("a role that is no text", {"messages": [USER | {"role": 1}, REPLY]}, r"not an object with a role \(turn 1\)"),
    ("a turn that is text", {"messages": ["3+4?", "Seven."]}, r"not an object with a role \(turn 1\)"),
    ("no turns", {"messages": []}, "must end with the assistant's turn"),
    ("only a system's turn", {"messages": [SYSTEM]}, "must end with the assistant's turn"),
    ("only the assistant", {"messages": [REPLY]}, "must end with the assistant's turn, after another"),
    ("no conversation", {"messages": None}, "no value for 'messages'"),
    ("a row of another layout", {"prompt": "3+4?", "completion": "Seven."}, "it has: prompt, completion"),
    ("a row of text", {"text": "3+4?"}, "it has no column messages or conversations or conversation; it has: text"),
    ("an empty row", {}, "it has: none"),
    ("JSON text that is cut", {"messages": '[{"role": "user"'}, "its messages are text, but not JSON"),
    ("an object for a list", {"messages": {"role": "user"}}, "its messages are not a list"),
    ("null content", {"messages": [USER | {"content": None}, REPLY]}, r"no value for 'messages\[0\]\.content'"),
    ("no content", {"messages": [USER, {"role": "assistant"}]}, r"no value for 'messages\[1\]\.content'"),
    ("an image part", {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REPLY]},
     r"a part of type 'image_url' is not text \(turn 1\)"),
    ("a text part without text", {"messages": [USER | {"content": [{"type": "text"}]}, REPLY]}, "'text' is not text"),
    ("a call of no function", {"messages": calling({"id": "1"})}, r"names no function \(turn 2\)"),
    ("a call that is text", {"messages": calling("add(3)")}, r"names no function \(turn 2\)"),
    ("a call's name that is no text", {"messages": calling({"function": {"name": None}})}, "names no function"),
    ("arguments in a list", {"messages": calling({"function": ADD | {"arguments": [3]}})},
     r"arguments of a tool call are neither an object nor JSON text of one \(turn 2\)"),
    ("a former call that is no JSON", {"conversations": [HUMAN, {"from": "function_call", "value": "add(3)"}]},
     r"a function_call is text, but not JSON .*\(turn 2\)"),
    ("calls that are no list", {"messages": [USER, REPLY | {"tool_calls": ADD}]}, "tool_calls are not a list"),
    ("a weight of a half", {"messages": [USER, REPLY | {"weight": 0.5}]}, r"weight 0\.5; must be 0 or 1 \(turn 2\)"),
    ("nothing trained on", {"messages": [USER, REPLY | {"weight": 0}]}, "all have the weight 0"),
    ("two systems", PLAIN | {"system": "Be kind."}, "two different system prompts"),
    ("tools that are text", PLAIN | {"tools": "add"}, "its tools are text, but not JSON"),
    ("tools that are numbers", PLAIN | {"tools": [1]}, "its tools are not JSON schemas of functions"),
    ("a weight that is text", {"messages": [USER, REPLY | {"weight": "0"}]}, r"weight '0'; must be 0 or 1 \(turn 2\)"),
    ("a flag of text", {"messages": [USER, REPLY | {"train": "no"}]}, r"'no' under 'train'; must be true or false"),
    ("a mask", {"messages": [USER, REPLY | {"mask": True}]}, r"the key 'mask', which has no common meaning"),
    ("tools of another kind", PLAIN | {"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "not JSON schemas"),
    ("names of tools", PLAIN | {"tools": ["add"]}, "its tools are not JSON schemas of functions"),
    ("arguments that are JSON text of JSON text", {"messages": calling(call(arguments='"{}"'))}, "neither an object"),
    ("arguments that are JSON text of a list", {"messages": calling(call(arguments="[3]"))}, "neither an object"),
    ("a list of texts", {"messages": [USER, REPLY | {"content": ["Seven."]}]}, r"a list of texts; must .*\(turn 2\)"),
    ("images in a column", PLAIN | {"images": ["a.png"]}, "its column 'images' holds something else than text"),
    ("images in a turn", {"messages": [USER | {"images": ["a.png"]}, REPLY]}, r"its 'images' are not text \(turn 1\)"),
    ("an answer that is not wanted", {"prompt": [USER], "completion": [REPLY], "label": False}, "its label is false"),
    ("variables in a list", PLAIN | {"chat_template_kwargs": [1]}, "its chat_template_kwargs are not an object"),
    ("variables that are tools", PLAIN | {"chat_template_kwargs": {"tools": []}}, "hold 'tools', which is no variable"),
    ("half a surrogate", {"messages": [USER | {"content": "\ud83d"}, REPLY]}, "half a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), [one[1:] for one in WRONG], ids=[one[0] for one in WRONG])
def test_a_row_that_is_no_conversation_is_one_line_with_its_number(row: Row, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^dataset\.reader: row 2 of rows\.jsonl .*{reason}") as error:
        read(PLAIN, row, PLAIN)
    assert "\n" not in str(error.value)


LEFT_OUT = [{"messages": [USER]}, {"messages": []}, {"messages": None}, {"messages": [USER, REPLY | {"weight": 0}]}]


@pytest.mark.parametrize("row", LEFT_OUT)
def test_a_conversation_without_an_answer_is_left_out_if_so_wished(row: Row) -> None:
    assert len(read(PLAIN, row, PLAIN, missing=OnMissing.drop)) == 2
    with pytest.raises(InputError, match=r"row 1 of rows\.jsonl .*dataset\.missing=drop leaves it out"):
        read(row, missing=OnMissing.empty)


REFUSED = [
    ("a system's turn", LLAMA.replace("Roles must alternate.", "System role not supported."), PLAIN, "System role not"),
    ("arguments that are no JSON", TOOLS, {"messages": calling({"function": ADD | {"arguments": "{a:"}})},
     "the arguments of a tool call are not JSON"),
    ("tools", CHATML, CALLED, "does not write the tool call of turn 2"),
    ("a role", CHATML.replace("{{ m.role }}", "{{ {'user': 'U', 'assistant': 'A'}[m.role].lower() }}"),
     {"messages": [USER, {"role": "tool", "content": "7"}, REPLY]}, "no attribute"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "row", "reason"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_a_row_that_the_template_refuses_is_one_line_with_its_number(template: str, row: Row, reason: str) -> None:
    rows = read({"messages": [USER, REPLY]}, row)
    with pytest.raises(InputError, match=rf"^dataset: row 2 of rows\.jsonl .*{reason}") as error:
        data_tokens.through_chat_template(tokenizer(template), rows, file="rows.jsonl")
    assert "\n" not in str(error.value)


# ---- files -----------------------------------------------------------------------------------------

LINES = "".join(json.dumps(row) + "\n" for row in (PLAIN, {"messages": [USER, REPLY]}))
AS_CSV = (
    'messages,id\n"[{""role"": ""user"", ""content"": ""a\\nb""},\n {""role"": ""assistant"", ""content"": ""c""}]",1\n'
)
GOOD_FILES: list[tuple[str, bytes, int]] = [
    ("lines.jsonl", LINES.encode(), 2),
    ("mark.jsonl", codecs.BOM_UTF8 + LINES.encode(), 2),
    ("wide.jsonl", LINES.encode("utf-16"), 2),
    ("windows.jsonl", LINES.replace("\n", "\r\n").encode(), 2),
    ("blank.jsonl", b"\n" + LINES.replace("\n", "\n\n").encode(), 2),
    ("one.json", json.dumps([PLAIN]).encode(), 1),
    ("within.json", json.dumps({"version": 1, "data": [PLAIN, PLAIN]}).encode(), 2),
    ("lines.json", LINES.encode(), 2),
    ("newlines.csv", AS_CSV.encode(), 1),
    ("tabs.csv", AS_CSV.replace(",id", "\tid").replace('",1', '"\t1').encode(), 1),
    ("bars.csv", AS_CSV.replace(",id", "|id").replace('",1', '"|1').encode(), 1),
    ("packed.jsonl", gzip.compress(LINES.encode()), 2),
]


@pytest.mark.parametrize(("name", "content", "count"), GOOD_FILES, ids=[one[0] for one in GOOD_FILES])
def test_a_file_is_known_as_one_of_conversations(name: str, content: bytes, count: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    rows = data_rows.read_rows(tmp_path / name)
    layout = layouts.recognise(rows)
    assert layout is not None
    assert layout.option == "chat"
    assert len(read(*rows)) == count


BROKEN = LINES.encode()
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", "holds no rows"),
    ("blank.jsonl", b" \n\n", "holds no rows"),
    ("mark.jsonl", codecs.BOM_UTF8, "holds no rows"),
    ("empty.json", b"[]", "not a list of JSON objects"),
    ("empty.csv", b"messages\n", "holds no rows"),
    ("bytes.jsonl", BROKEN[:-8] + b"\xff" + BROKEN[-7:], r"line 2: not utf-8 \(byte 0xff\)"),
    ("cut.jsonl", BROKEN[:-8], "line 2: not JSON"),
    ("list.jsonl", BROKEN + b"[1]\n", "line 3: not a JSON object"),
    ("zeros.jsonl", LINES.encode("utf-16-le"), "zero bytes"),
    ("deep.jsonl", BROKEN + b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 3: JSON with too many lists"),
    ("open.csv", AS_CSV.replace(']",1', "]").encode(), "line 3: unexpected end of data"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES, ids=[one[0] for one in BAD_FILES])
def test_a_file_that_cannot_be_read_is_one_line_with_its_place(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^dataset\.path=.*{name}: .*{reason}") as error:
        data_rows.read_rows(tmp_path / name, "dataset.path")
    assert "\n" not in str(error.value)


def test_empty_turns_and_lists_of_parts_are_written_as_they_are() -> None:
    made = tokenizer(CHATML)
    parts = [{"type": "text", "text": "3+4?"}]
    assert tokens(made, {"messages": [USER | {"content": parts}, REPLY]}) == tokens(made, {"messages": [USER, REPLY]})
    empty = tokens(made, {"messages": [USER | {"content": ""}, REPLY, USER, REPLY | {"content": ""}]})
    assert trained(made, empty) == ["Seven.<|im_end|>", "<|im_end|>"]


def test_a_file_of_two_layouts_is_read_row_by_row() -> None:
    shared = {"conversations": [{"from": "human", "value": "3+4?"}, {"from": "gpt", "value": "Seven."}]}
    mixed = [{"messages": [USER, REPLY]}, shared, {"prompt": [USER], "completion": [REPLY]}]
    made = tokenizer(CHATML)
    assert len({tuple(tokens(made, row).ids) for row in mixed}) == 1


# ---- named data sets -------------------------------------------------------------------------------

NAMED = {file.stem: yaml.safe_load(file.read_text())["dataset"] for file in Path(conf_dir()).glob("dataset/*.yaml")}


def dataset(name: str, **keys: Any) -> DatasetConfig:
    own = NAMED[name] | ({"prompt": "{sentence}"} if name == "sst2" else {}) | keys
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DatasetConfig), own))
    assert isinstance(made, DatasetConfig)
    return made


@pytest.mark.parametrize("name", [name for name in sorted(schemas.SCHEMAS) if "hub" in NAMED[name]])
def test_a_named_dataset_of_the_hub_has_the_examples_of_a_local_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[Any] = []

    def load(*where: Any, **how: Any) -> Any:
        requested.append((*where, how["split"], how["revision"]))
        return datasets.Dataset.from_list(schemas.SCHEMAS[name])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "problem", lambda: None)
    own = dataset(name)
    rows = data_rows.hub_rows(own.hub or "", own.hub_config, own.hub_split, own.revision, "dataset.hub")
    assert requested == [(own.hub, own.hub_config, own.hub_split, own.revision)]
    file = schemas.write(name, tmp_path)
    local = templates.dataset_examples(dataset(name, path=str(file)), data_rows.read_rows(file))
    assert templates.dataset_examples(own, rows) == local
    assert len(local) == len(schemas.SCHEMAS[name]) // (3 if name == "oasst1" else 1)


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("dialogsum", "#Person2#: Good.\n\nSummary:", " #Person1# has 0 pens."),
        ("samsum", "\r\nJerry: Sure!\n\nSummary:", " Amanda baked 0."),
        ("e2e_nlg", "Meaning: name[The Vaults], near[Café 0]\nText:", " The Vaults is by Café 0."),
        ("oasst1", '[{"role": "user", "content": "Say 0."}]', "0"),
        ("tulu_sft", '[{"content": "Say 0.", "role": "user"}]', "0"),
        ("wizard_evol", '[{"role": "user", "content": "Say 0."}]', "0"),
        ("sharegpt", '[{"role": "user", "content": "Say 0."}]', "0"),
    ],
)
def test_a_file_of_a_named_datasets_columns_is_known(name: str, prompt: str, answer: str, tmp_path: Path) -> None:
    rows = data_rows.read_rows(schemas.write(name, tmp_path))
    first = templates.dataset_examples(dataset(name, path="rows"), rows)[0]
    assert (first.prompt[-len(prompt) :], first.answer) == (prompt, answer)
    layout = layouts.recognise(schemas.SCHEMAS[name])
    assert layout is not None
    assert layout.named == name or (layout.option == "chat" and NAMED[name]["chat"])


def test_shared_conversations_begin_with_a_person_and_end_with_an_answer() -> None:
    greeting, reply = {"from": "gpt", "value": "Hi!"}, {"from": "gpt", "value": "Seven."}
    shared: list[Row] = [
        {"conversations": [greeting, HUMAN, reply, HUMAN]},
        {"conversations": [{"from": "system", "value": "Count."}, HUMAN, reply]},
        {"conversations": [greeting]},
        {"conversations": []},
        {"conversations": [HUMAN]},
    ]
    made = templates.dataset_examples(dataset("sharegpt", path="rows"), shared)
    roles = [[turn["role"] for turn in row.conversation.messages] for row in made if row.conversation]
    assert roles == [["user", "assistant"], ["system", "user", "assistant"]]
    wrong = [{"conversations": [HUMAN, {"from": "narrator", "value": "?"}, reply]}]
    with pytest.raises(InputError, match=r"row 1 cannot be read: a turn has the unknown role 'narrator'"):
        templates.dataset_examples(dataset("sharegpt", path="rows"), wrong)


PASSED_OVER: list[Row] = [
    PLAIN | {"messages": [USER, REPLY], "system": "Count."},
    {"messages": [USER, REPLY | {"weight": 0}, USER, REPLY]},
    {"messages": calling(function_call=ADD, content="")},
    {"messages": [USER, REPLY], "functions": [SCHEMA["function"]]},
    {"messages": [USER, {"role": "bot", "content": "Hm."}, REPLY]},
]


READ_OTHERWISE_SINCE: list[Row] = [
    {"messages": [USER, REPLY | {"train": False}, USER, REPLY]},
    CALLED | {"tools": [SCHEMA["function"]]},
    {"messages": calling({"name": "add", "parameters": {"a": 3}})},
]


OWN_VARIABLES = "{% if note is defined %}<|im_start|>system\n{{ note }}<|im_end|>\n{% endif %}" + CHATML.replace(
    "assistant\n{% endif %}", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("template", [OWN_VARIABLES, OWN_VARIABLES.partition("{% for")[0] + GENERATION])
def test_a_row_s_own_variables_are_given_to_the_template(template: str) -> None:
    made, variables = tokenizer(template), {"note": "Hm.", "enable_thinking": False}
    row: Row = {"messages": [USER, REPLY, USER, REPLY], "chat_template_kwargs": variables | {"tools_of": None}}
    found = tokens(made, row)
    assert found.ids == made.apply_chat_template(row["messages"], tokenize=True, **variables)["input_ids"]
    assert [piece.partition(".")[0] for piece in trained(made, found)] == ["Seven", "Seven"]
    assert found == tokens(made, row | {"chat_template_kwargs": json.dumps(variables)})
    (rendered,) = data_tokens.through_chat_template(made, read(row))
    options: Row = {"add_generation_prompt": True, "tokenize": False}
    assert rendered.model_prompt == made.apply_chat_template(row["messages"][:-1], **options, **variables)
    assert read(row)[0].written != read({"messages": row["messages"]})[0].written  # they are no duplicates
    assert (reader.version(row), reader.version(row | {"chat_template_kwargs": {}})) == (4, 1)


@pytest.mark.parametrize("row", READ_OTHERWISE_SINCE)
def test_rows_that_the_version_before_read_otherwise_have_another_identity(row: Row) -> None:
    own = dataset("chat", path="rows")
    assert identity._dataset_identity(own, data_rows.Rows([row]))["conversations"] == 3
    assert reader.version(PLAIN | {"messages": [USER, REPLY], "system": "Count."}) == 2  # as it was


def test_only_conversations_that_earlier_versions_read_otherwise_have_another_identity() -> None:
    own = dataset("chat", path="rows")

    def keys(*rows: Row) -> set[str]:
        return set(identity._dataset_identity(own, data_rows.Rows([*rows])))

    before = keys(PLAIN, CALLED, {"messages": None}, {"messages": []}, PLAIN | {"system": "Count.", "weight": 0})
    assert "conversations" not in before
    for row in PASSED_OVER:
        assert keys(PLAIN, row) - before == {"conversations"}
