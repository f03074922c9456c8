"""A path or hub id as a model or data set is the longer command that it stands for, in every way of giving it."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from peftsweep import InputError, cli, command_line, shorthand
from peftsweep.config import fill
from peftsweep.data import files, rows
from peftsweep.models.model import TINY
from peftsweep.schema import Task

from .conftest import records

CONF = Path(fill.conf_dir())
PAIRS = [{"prompt": f"Say {n} again.", "completion": f"It is {n}."} for n in range(30)]


def meaning(*words: str) -> dict[str, Any]:
    """What Hydra reads in the words that the given ones stand for, by key."""
    shorthand.forget()
    longer = command_line.checked(shorthand.expanded(words, [CONF]), CONF)
    return {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(longer)}


def write(name: str, found: list[dict[str, Any]]) -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def checkpoint(name: str, **config: Any) -> Path:
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- models ------------------------------------------------------------------------------------------


CHECKPOINTS: list[tuple[dict[str, Any], str, Task | None]] = [
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "causal_lm", None),
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "causal_lm", None),
    ({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}, "causal_lm", None),
    ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "encoder", None),
    ({"architectures": ["ElectraForPreTraining"], "model_type": "electra"}, "encoder", None),
    ({"architectures": ["DistilBertForSequenceClassification"], "model_type": "distilbert"}, "encoder", None),
    ({"architectures": ["RobertaModel"], "model_type": "roberta"}, "encoder", None),
    ({"architectures": ["ModernBertModel"], "model_type": "modernbert"}, "encoder", None),
    ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "causal_lm", Task.seq_cls),
    ({"architectures": ["Qwen2Model"], "model_type": "qwen2"}, "causal_lm", None),
    ({"model_type": "deberta-v2"}, "encoder", None),
    ({"architectures": None, "model_type": "mistral"}, "causal_lm", None),
    ({}, "causal_lm", None),
]


@pytest.mark.parametrize(("config", "option", "task"), CHECKPOINTS)
def test_a_checkpoint_is_what_its_config_says(config: Mapping[str, Any], option: str, task: Task | None) -> None:
    assert shorthand.kind(config) == (option, task)


@pytest.mark.parametrize("kind", ["vit", "clip", "wav2vec2", "dinov2"])
def test_a_model_that_reads_no_text_is_one_line(kind: str) -> None:
    checkpoint("own", architectures=["SomeModel"], model_type=kind)
    with pytest.raises(InputError, match=f"^model=./own: model_type {kind} reads no text"):
        meaning("model=own")


@pytest.mark.parametrize("name", ["./own", "own", "own/", "deep/er/own", "./with blank", "a=b/own", "ünï/own"])
def test_a_folder_is_a_model(name: str) -> None:
    checkpoint(name, architectures=["LlamaForCausalLM"])
    expected = name if "/" in name else f"./{name}"
    assert meaning(f"model={name}") == {"model": "causal_lm", "model.name_or_path": expected}


def test_a_folder_below_home_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint("models/own", architectures=["BertForMaskedLM"])
    assert meaning("model=~/models/own") == {"model": "encoder", "model.name_or_path": "~/models/own"}


def test_an_option_wins_over_a_folder_of_its_name_unless_it_is_written_as_a_path() -> None:
    checkpoint("tiny", architectures=["BertForMaskedLM"])
    assert meaning("model=tiny") == {"model": "tiny"}
    assert meaning("model=./tiny") == {"model": "encoder", "model.name_or_path": "./tiny"}


def test_an_option_of_ones_own_wins_too() -> None:
    checkpoint("ours/small", architectures=["LlamaForCausalLM"])
    Path("mine/model/ours").mkdir(parents=True)
    Path("mine/model/ours/small.yaml").write_text("defaults: [/model/tiny]\n")
    words = ["model=ours/small"]
    assert shorthand.expanded(words, [CONF, Path("mine")]) == words
    assert shorthand.expanded(words, [CONF]) == ["model=causal_lm", "model.name_or_path=ours/small"]


def test_a_hub_id_is_a_model_and_one_of_a_preset_is_known_without_a_network() -> None:
    assert meaning("model=meta-llama/Llama-3.2-1B")["model"] == "causal_lm"
    assert meaning("model=distilbert/distilbert-base-uncased")["model"] == "encoder"


def test_the_words_of_a_person_win_over_what_a_name_stands_for() -> None:
    checkpoint("own", architectures=["LlamaForSequenceClassification"], model_type="llama")
    assert meaning("model=./own")["model.task"] == "seq_cls"
    assert meaning("model=./own", "model.task=causal_lm")["model.task"] == "causal_lm"


# ---- data sets ---------------------------------------------------------------------------------------


QUESTION = ("Question: {question}\\nAnswer:", " {answer}")
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
THEIRS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, str] | None]] = {
    "prompt/completion": ({"prompt": "a", "completion": "b"}, "file", ("{prompt}\\n", "{completion}")),
    "with blanks of their own": ({"prompt": "a ", "completion": "b"}, "file", ("{prompt}", "{completion}")),
    "question/answer": ({"question": "a", "answer": "b", "id": 3}, "file", QUESTION),
    "capitals": ({"Prompt": "a", "Response": "b"}, "file", ("{Prompt}\\n", "{Response}")),
    "query/response": ({"query": "a", "response": "b"}, "file", ("Question: {query}\\nAnswer:", " {response}")),
    "numbers as answers": ({"problem": "a", "solution": 7}, "file", ("Question: {problem}\\nAnswer:", " {solution}")),
    "text": ({"text": "a", "source_url": "b"}, "text", None),
    "messages": ({"messages": TURNS, "prompt": "Hello"}, "chat", None),
    "messages as JSON": ({"messages": json.dumps(TURNS)}, "chat", None),
    "conversations": ({"conversations": THEIRS, "id": "x"}, "chat", None),
    "text that repeats both": (
        {"prompt": "a", "completion": "b", "text": "a b"},
        "file",
        ("{prompt}\\n", "{completion}"),
    ),
    "an empty context": ({"question": "a", "answer": "b", "context": ""}, "file", QUESTION),
}


@pytest.mark.parametrize("name", ROWS)
def test_columns_say_what_rows_are(name: str) -> None:
    row, option, templates = ROWS[name]
    found = meaning(f"dataset={write('rows.jsonl', [row] * 3)}")
    assert (found["dataset"], found["dataset.path"]) == (option, "rows.jsonl")
    assert (found.get("dataset.prompt"), found.get("dataset.answer")) == (templates or (None, None))


LIKE: dict[str, dict[str, Any]] = {  # rows as their source has them, by the dataset of ours that they are of
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is ... Add. 1 and 2 ... 3"},
    "dolly": {"instruction": "Add.", "context": "", "response": "3", "category": "open_qa"},
    "gsm8k": {"question": "1 + 2?", "answer": "It is 3.\n#### 3"},
    "metamath": {"query": "1 + 2?", "response": "3", "type": "GSM_AnsAug", "original_question": "1 + 2?"},
    "boolq": {"passage": "Water is wet.", "question": "is water wet", "answer": True},
    "piqa": {"goal": "Dry it.", "sol1": "Sun.", "sol2": "Rain.", "label": 0},
    "social_i_qa": {"context": "x", "question": "y", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"},
    "hellaswag": {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d"], "label": "1"},
    "winogrande": {"sentence": "The _ is red.", "option1": "sun", "option2": "sky", "answer": "1"},
    "arc_challenge": {"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {"question_stem": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "commonsense_qa": {
        **{"question": "x", "question_concept": "y", "answerKey": "B"},
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
    },
    "commonsense_170k": {
        "instruction": "Is it?\n\nAnswer format: true/false",
        **{"input": "", "output": "the correct answer is true", "answer": "true"},
    },
    "sst2": {"sentence": "a fine film", "label": 1, "idx": 4},
}


@pytest.mark.parametrize("name", LIKE)
def test_rows_of_our_data_sets_are_read_in_any_file_as_the_data_set_reads_them(name: str) -> None:
    found = meaning(f"dataset={write('rows.jsonl', [LIKE[name]] * 3)}")
    own = yaml.safe_load((CONF / "dataset" / f"{name}.yaml").read_text())["dataset"]
    assert found["dataset"] == "file"
    for key in ("reader", "prompt", "answer", "classes"):
        value, expected = found.get(f"dataset.{key}"), own.get(key)
        if isinstance(value, str):  # of the command line, where an end of a line is written as \\n
            value, expected = value.replace("\\n", "\n"), expected.replace("\\n", "\n")
        assert value == expected


ASKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "columns of other names": ({"id": 1, "body": "a", "tag": "b"}, "{body}\\n", "{tag}"),
    "a class of a text": ({"text": "a", "label": "good"}, "{text}\\n", "{label}"),
    "a choice between answers": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "{prompt}\\n", "{chosen}"),
    "a context that would be lost": (
        {"question": "a", "answer": "b", "context": "c"},
        "{context}\\n{question}",
        "{ans",
    ),
    "a paragraph": ({"paragraph": "c", "question": "a", "answer": "b"}, "{paragraph}\\n{question}", "{answer}"),
    "code": ({"instruction": "a", "code": "x = 1", "output": "b"}, "{code}\\n{instruction}", "{output}"),
    "a text beside its question": ({"text": "c", "question": "a", "answer": "b"}, "{text}\\n{question}", "{answer}"),
    "a text and its summary": ({"text": "c", "summary": "b", "title": "t"}, "{text}\\n", "{summary}"),
    "an article and its highlights": ({"article": "c", "highlights": "b", "id": "d"}, "{article}\\n", "{highlights}"),
    "a text beside its instruction": (
        {"instruction": "a", "text": "c", "output": "b"},
        "{instruction}\\n{text}",
        "{output}",
    ),
    "judgements of sentences, as CoLA's": ({"sentence": "It is.", "label": 1, "idx": 4}, "{sentence}\\n", "{label}"),
    "two questions": ({"prompt": "a", "question": "b", "answer": "c"}, "{prompt}\\n{question}", "{answer}"),
    "two answers": ({"problem": "a", "solution": "b", "answer": "c"}, "{problem}", "{answer}"),
    "messages in place of texts": ({"prompt": TURNS[:1], "response": TURNS[1:]}, "", ""),
}


@pytest.mark.parametrize("name", ASKED)
def test_unclear_columns_are_asked_for_in_a_line_with_a_command(name: str) -> None:
    row, prompt, answer = ASKED[name]
    file = write("rows.jsonl", [row] * 3)
    with pytest.raises(InputError) as raised:
        meaning(f"dataset={file}")
    message = str(raised.value)
    assert "\n" not in message
    assert f"dataset={file} 'dataset.prompt=\"{prompt}" in message
    assert f"'dataset.answer=\"{answer}" in message
    assert all(column in message for column in row)


def test_the_command_that_is_asked_for_is_understood() -> None:
    file = write("rows.jsonl", [{"text": "a", "label": label} for label in ("good", "bad") * 3])
    with pytest.raises(InputError) as raised:
        meaning(f"dataset={file}")
    words = [word.strip("'") for word in str(raised.value).partition("such as: ")[2].split()]
    found = meaning(*words)
    assert found == {
        **{"dataset": "file", "dataset.path": "rows.jsonl", "dataset.prompt": "{text}\\n"},
        **{"dataset.answer": "{label}", "dataset.classes": ["bad", "good"]},
    }


@pytest.mark.parametrize("name", ["rows.csv", "rows.CSV", "rows.tsv", "rows.json", "rows.parquet", "rows.jsonl.gz"])
def test_every_format_is_recognised(name: str) -> None:
    table, file = pandas.DataFrame(PAIRS), Path(name)
    if file.suffix == ".parquet":
        table.to_parquet(file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(table.to_json(orient="records", lines=True).encode()))
    elif file.suffix == ".json":
        table.to_json(file, orient="records")
    else:
        table.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    assert meaning(f"dataset={name}")["dataset.prompt"] == "{prompt}\\n"


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes.TXT"])
def test_notes_are_text(name: str) -> None:
    Path(name).write_text("One.\n\nTwo.")
    assert meaning(f"dataset={name}") == {"dataset": "text", "dataset.path": name}
    assert files.read_rows(name) == [{"text": "One."}, {"text": "Two."}]


def test_a_folder_is_its_one_file_or_its_training_and_test_files() -> None:
    write("one/rows.jsonl", PAIRS)
    assert meaning("dataset=one")["dataset.path"] == "one/rows.jsonl"
    for name in ("train", "test"):
        write(f"two/{name}-00000-of-00001.jsonl", PAIRS)
    found = meaning("dataset=./two/")
    assert found["dataset.path"] == "two/train-00000-of-00001.jsonl"
    assert found["dataset.test_path"] == "two/test-00000-of-00001.jsonl"
    write("two/validation.jsonl", PAIRS)
    write("two/README.md", PAIRS)
    assert meaning("dataset=two")["dataset.test_path"] == "two/test-00000-of-00001.jsonl"
    write("clone/data/train.jsonl", PAIRS)
    write("clone/data/val_rows.jsonl", PAIRS)
    assert meaning("dataset=clone")["dataset.test_path"] == "clone/data/val_rows.jsonl"
    write("two/more.jsonl", PAIRS)
    with pytest.raises(InputError, match=r"several files .*more.jsonl.*; name the one .*dataset=two/train-00000-of"):
        meaning("dataset=two")


def test_shards_of_a_table_are_one_file() -> None:
    for number, part in enumerate((PAIRS[:1], PAIRS[1:])):
        write(f"shards/data/train-0000{number}-of-00002.jsonl", part)
    write("shards/data/test-00000-of-00001.jsonl", PAIRS[:1])
    found = meaning("dataset=shards")
    assert found["dataset.path"] == "shards/data/train-*-of-00002.jsonl"
    assert found["dataset.test_path"] == "shards/data/test-00000-of-00001.jsonl"
    assert rows.read_rows(found["dataset.path"]) == PAIRS
    named = meaning("dataset=shards/data/train-*.jsonl")
    assert named["dataset.path"] == "shards/data/train-*.jsonl"
    assert named["dataset.prompt"] == found["dataset.prompt"]
    Path("shards/data/train-00000-of-00002.jsonl").unlink()
    shorthand.forget()
    with pytest.raises(InputError, match=r"holds 1 of the 2 files train-\*-of-00002\.jsonl; copy the others, or name"):
        meaning("dataset=shards")


def test_the_beginning_of_a_large_file_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("rows.jsonl", PAIRS)
    monkeypatch.setattr(files, "BEGINNING", 200)  # bytes: in the midst of a row
    monkeypatch.setattr(files, "read_rows", lambda *args: pytest.fail("the whole file was read"))
    assert files.first_rows(file) == PAIRS[: len(files.first_rows(file))] != []


def test_a_dataset_of_the_hub_is_read_by_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[Any] = []

    def first_rows(*words: Any) -> list[dict[str, Any]]:
        requested.append(words)
        return PAIRS

    monkeypatch.setattr(rows, "first_hub_rows", first_rows)
    found = meaning("dataset=someone/rows:validation", "dataset.hub_config=en")
    assert requested == [("someone/rows", "en", "validation", None)]
    assert {key: found[f"dataset.{key}"] for key in ("path", "hub", "hub_split", "prompt")} == {
        **{"path": None, "hub": "someone/rows", "hub_split": "validation", "prompt": "{prompt}\\n"}
    }
    assert meaning("dataset=openai/gsm8k") == {"dataset": "gsm8k"}
    own = meaning("dataset=some/rows:train[:9]", 'dataset.prompt="{a}"', 'dataset.answer="{b}"')
    assert own["dataset.hub_split"] == "train[:9]"
    assert len(requested) == 1


WRONG = {
    "model=./own": "model=./own: no such folder; one of the hub is model=ORG/NAME; did you mean 'owns'?",
    "model=owns": "model=./owns: holds no config.json",
    "model=rows.jsonl/": "model=rows.jsonl/: is a file; must be the folder of a checkpoint",
    "model=https://huggingface.co/a/b": "model=https://huggingface.co/a/b: is a web address; must be model=a/b",
    "model=adapted": "model=./adapted: is an adapter: adapter.path=./adapted evaluates it",
    "dataset=row.jsonl": "dataset=row.jsonl: no such file; did you mean 'rows.jsonl'?",
    "dataset=rows.jsnl": "dataset=rows.jsnl: no such file; did you mean 'rows.jsonl'?",
    "dataset=./rows.csv": "dataset=./rows.csv: no such file; did you mean 'rows.jsonl'?",
    "dataset=rows.xlsx": "dataset=rows.xlsx: unknown format; must be a file of .json",
    "dataset=owns": "dataset=./owns: no file in this folder can be read",
    "dataset=rows.jsonl,row.jsonl": "dataset=row.jsonl: no such file; did you mean 'rows.jsonl'?",
    "dataset=rows.jsonl dataset.path=x": "dataset=rows.jsonl: dataset.path is given too and names another",
    "dataset=rows.jsonl dataset=tiny_math": "dataset=rows.jsonl: dataset is given twice",
    "dataset=rows.jsonl dataset.prompt=x": "not used where dataset.prompt is given; give both, such as: dataset=",
    "dataset=rows,1.jsonl": "dataset=rows,1.jsonl: the comma of a file's name needs quotes",
    "model=gpt2": "for your own: model=./FOLDER, or from the hub model=ORG/NAME",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_name_of_nothing_is_a_line_that_says_what_to_type(words: str) -> None:
    Path("owns").mkdir()
    Path("adapted").mkdir()
    Path("adapted/adapter_config.json").write_text("{}")
    Path("rows.xlsx").touch()
    write("rows.jsonl", PAIRS)
    write("rows,1.jsonl", PAIRS)
    with pytest.raises(InputError) as refused:
        cli._trial(*words.split())
    assert WRONG[words] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_path_in_the_defaults_of_a_yaml_is_refused_with_the_key_to_give() -> None:
    Path("mine/point").mkdir(parents=True)
    Path("mine/point/own.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: ./own\n")
    with pytest.raises(InputError, match=r"model=./own: works on the command line .*; give model.name_or_path there"):
        cli._trial("point=own", "hydra.searchpath=[mine]")


@pytest.mark.parametrize("rows", [[{"prompt": "a", "completion": None}], [{"prompt": "a"}, {"completion": "b"}]])
def test_missing_values_do_not_hide_a_layout(rows: list[dict[str, Any]]) -> None:
    assert meaning(f"dataset={write('rows.jsonl', [*rows, *PAIRS])}")["dataset.prompt"] == "{prompt}\\n"


# ---- as the longer command -----------------------------------------------------------------------------


LONGER: dict[str, list[str]] = {
    "model=./own": ["model=causal_lm", "model.name_or_path=./own"],
    'dataset="my rows, 1.jsonl"': [
        *("dataset=file", 'dataset.path="my rows, 1.jsonl"', r'dataset.prompt="{prompt}\n"'),
        'dataset.answer="{completion}"',
    ],
}


@pytest.mark.parametrize("word", LONGER)
def test_the_trial_is_that_of_the_longer_command(word: str) -> None:
    shutil.copytree(TINY, "own")
    write("my rows, 1.jsonl", PAIRS)
    short, longer = (cli._trial("device=cpu", *words) for words in ([word], LONGER[word]))
    assert (short.identity, short.choices, short.tree) == (longer.identity, longer.choices, longer.tree)


def test_names_are_swept_and_the_templates_are_printed_once(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    write("a=1.jsonl", PAIRS)
    write("b.jsonl", [{"text": f"Some {n} words.", "n": n} for n in range(30)])
    code, _, err = command("model=tiny", "dataset=a=1.jsonl,b.jsonl", "method.r=2,4", "dry_run=true")
    assert code == 0, err
    plan = json.loads(Path("multirun/default/plan.json").read_text())
    assert len(plan) == 4
    assert err.count("a=1.jsonl: columns prompt, completion: dataset.prompt='{prompt}\\n' dataset") == 1
    assert err.count("b.jsonl: columns text, n: plain text") == 1


def test_a_template_that_the_task_of_the_model_chooses_is_printed_as_text(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    write("reviews.jsonl", [{"sentence": f"film {n} .", "label": n % 2} for n in range(30)])
    code, _, err = command("dataset=reviews.jsonl", "dry_run=true")
    assert code == 0, err
    assert "negative?\\nAnswer:' (of a classifier '{sentence}') dataset.answer=' {label}'" in err
    assert "${" not in err


def test_a_thousand_points_take_little_time() -> None:
    write("rows.jsonl", PAIRS)
    begun = time.process_time()
    for rank in range(1000):
        words = shorthand.expanded([f"method.r={rank}", "dataset=rows.jsonl", "seed=1"], [CONF])
    assert len(words) == 6
    assert time.process_time() - begun < 1.0


@pytest.mark.slow
def test_names_work_with_another_launcher_and_are_recorded_as_options(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    write("rows.jsonl", PAIRS)
    write("notes/rows.jsonl", [{"text": f"Number {n}."} for n in range(30)])
    small = ["train.steps=2", "train.batch_size=2", "adapter.check=false"]
    code, _, err = command("dataset=rows.jsonl,notes", *small, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "-m")
    assert code == 0, err
    found = [(one.choices["dataset"], one.config["dataset"]["path"]) for one in records().values()]
    assert sorted(found) == [("file", "rows.jsonl"), ("text", "notes/rows.jsonl")]
