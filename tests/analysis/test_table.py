"""Records -> typed tables, and the files they are written to."""

from __future__ import annotations

import json
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import peftsweep
from peftsweep.analysis.table import columns, table
from peftsweep.analysis.text import words
from peftsweep.errors import InputError
from peftsweep.study import store
from peftsweep.study.record import Result
from tests.analysis.test_collect import Collect, collect_command, write

__all__ = ["collect_command"]  # the fixture

# The queries of an efficiency study, as the README shows them.
BY_STATUS = """SELECT "run_info.trial" FROM trials WHERE "run_info.status" = 'failed'"""
BY_METHOD = (
    """SELECT "run_info.trial" FROM trials WHERE "choices.method" = 'lora' ORDER BY "run_info.created_at" DESC"""
)
EXPORT = """SELECT json_group_array(json_object('trial', "run_info.trial", 'accuracy', "eval_info.task.accuracy.value"))
FROM trials WHERE "run_info.status" = 'success'"""
CURVE = """SELECT step, loss FROM steps JOIN trials ON steps.trial = trials."run_info.trial"
WHERE trials."config.method.r" = 8 ORDER BY step"""


def identified(name: str, rank: int, accuracy: float | None, place: str, identity: str, created: str) -> None:
    folder = write(name, rank, accuracy, place=place)
    result = Result.read(folder)
    result.run_info |= {"identity": identity, "created_at": created}
    result.write(folder)


def test_types_are_those_of_the_values() -> None:
    write("a", 8, 0.0, whole=1, real=1, mixed=1, flag=True, big=2**53 + 1, huge=2**70, nothing=None)
    write("b", 16, 1.0, whole=None, real=0.5, mixed="auto", flag=None, big=None, huge=None, nothing=None)
    found = peftsweep.load()
    kinds = {name: str(found[f"config.extra.{name}"].dtype) for name in ("whole", "real", "mixed", "flag", "big")}
    assert kinds == {"whole": "Int64", "real": "Float64", "mixed": "string", "flag": "boolean", "big": "Int64"}
    assert found["config.extra.big"][0] == 2**53 + 1  # which a float cannot say
    assert found["config.extra.huge"][0] == float(2**70)
    assert found["config.extra.mixed"].tolist() == ["1", "auto"]
    assert str(found["eval_info.task.accuracy.value"].dtype) == "Float64"  # also where they happen to be whole
    assert found["config.extra.nothing"].isna().all()
    assert found["config.extra.nothing"].astype(float).isna().all()


def test_a_histogram_is_one_column_whatever_was_answered(collect_command: Collect) -> None:
    for rank in (8, 16):
        folder = write(f"r{rank}", rank, 0.5)
        result = Result.read(folder)
        result.eval_info["task"] |= {"histogram": {str(rank): 3, "": 1}, "base_histogram": {"yes": 4}}
        result.write(folder)
    assert collect_command("--no-plots")[0] == 0
    found = pd.read_parquet("multirun/default/results.parquet")
    assert json.loads(found["eval_info.task.histogram"][1]) == {"16": 3, "": 1}
    assert [c for c in found if str(c).endswith("histogram")] == [
        "eval_info.task.histogram",
        "eval_info.task.base_histogram",
    ]


def test_every_row_says_where_it_comes_from() -> None:
    write("a", 8, 0.5)
    row = peftsweep.load().iloc[0]
    assert row["collected.study"] == "multirun/default"
    assert Result.read(Path(row["collected.record"]).parent).trial == "a"
    assert row["collected.by"] == f"peftsweep {peftsweep.__version__}"
    assert row["collected.at"].startswith("20")


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".json", ".jsonl"])
def test_every_format_holds_the_same_trials(ending: str, collect_command: Collect) -> None:
    write("a", 8, 0.1 + 0.2, place="first", text='he said "1,2"\n')
    write("b", 16, None, place="second")
    file = Path(f"new/all{ending}")
    assert collect_command("--out", str(file), "--no-plots")[0] == 0
    readers: dict[str, Any] = {
        ".parquet": pd.read_parquet,
        ".csv": partial(pd.read_csv, converters={"eval_info.task.accuracy.value": lambda cell: float(cell or "nan")}),
        ".json": pd.read_json,
    }
    found = pd.read_json(file, lines=True) if ending == ".jsonl" else readers[ending](file)
    assert found["run_info.trial"].tolist() == ["a", "b"]
    assert found["config.method.r"].tolist() == [8, 16]
    assert found["eval_info.task.accuracy.value"][0] == 0.1 + 0.2  # to the last bit
    assert found["config.extra.text"][0] == 'he said "1,2"\n'
    assert pd.isna(found["eval_info.task.accuracy.value"][1])
    assert [f.name for f in Path("new").iterdir()] == [file.name]  # nothing half-written is left


def test_a_database_answers_the_questions_of_a_study(collect_command: Collect) -> None:
    for rank, accuracy in ((8, 0.4), (16, 0.6), (32, None)):
        write(f"r{rank}", rank, accuracy)
    for _ in range(2):  # the second takes the first one's place
        assert collect_command("--out", "all.sqlite", "--no-plots")[0] == 0
    with sqlite3.connect("all.sqlite") as database:
        assert database.execute(BY_STATUS).fetchall() == [("r32",)]
        assert [name for (name,) in database.execute(BY_METHOD)] == ["r32", "r16", "r8"]
        [[text]] = database.execute(EXPORT)
        assert json.loads(text) == [{"trial": "r8", "accuracy": 0.4}, {"trial": "r16", "accuracy": 0.6}]
        assert database.execute(CURVE).fetchall() == [(1, 2.5), (2, 1.5)]
        for query in (BY_STATUS, BY_METHOD, 'SELECT * FROM trials WHERE "run_info.created_at" > 2026'):
            [plan] = [row[-1] for row in database.execute(f"EXPLAIN QUERY PLAN {query}") if "trials" in row[-1]]
            assert "USING INDEX" in plan


def test_a_database_holds_2000_columns(tmp_path: Path) -> None:
    wide = pd.DataFrame({f"c{n}": [n] for n in range(2001)})
    with pytest.raises(InputError, match="2,001 columns, and a database holds 2,000"):
        table.write(wide, tmp_path / "wide.db", lambda: wide)
    table.write(wide.iloc[:, 1:], tmp_path / "wide.db", lambda: wide.iloc[:, :2])


def test_of_trials_done_twice_the_newest_counts(collect_command: Collect) -> None:
    identified("old", 8, 0.4, "first", "aaa", "2026-01-01T00:00:00+00:00")
    identified("new", 8, 0.5, "second", "aaa", "2026-01-02T00:00:00+00:00")
    identified("good", 16, 0.6, "first", "bbb", "2026-01-01T00:00:00+00:00")
    identified("broken", 16, None, "second", "bbb", "2026-01-03T00:00:00+00:00")  # newer, but not done
    write("nameless", 32, 0.7, place="first")
    write("nameless", 32, 0.7, place="second")
    code, out, _ = collect_command("--out", "all.parquet", "--no-plots")
    assert code == 0
    assert "2 of 6 trials have the same configuration as another one" in out
    assert sorted(pd.read_parquet("all.parquet")["run_info.trial"]) == ["good", "nameless", "nameless", "new"]
    assert len(pd.read_parquet("multirun/first/results.parquet")) == 3  # a study keeps its own


def test_a_copied_folder_of_a_trial_is_named_and_counts_once(collect_command: Collect) -> None:
    identified("one", 8, 0.4, "first", "aaa", "2026-01-01T00:00:00+00:00")
    identified("other", 16, 0.5, "first", "bbb", "2026-01-01T00:00:00+00:00")
    shutil.copytree("multirun/first/one", "multirun/first/a copy of one")
    code, out, err = collect_command("--no-plots")
    assert code == 0
    assert err == "skipped: multirun/first/a copy of one: the same trial as multirun/first/one\n"
    assert pd.read_parquet("multirun/first/results.parquet")["run_info.trial"].tolist() == ["one", "other"]
    assert "2 trials" in out


def test_where_chooses_what_is_shown_and_handed_over_but_not_what_a_study_keeps(collect_command: Collect) -> None:
    write("a", 8, 0.25, place="first")
    write("b", 16, 0.75, place="first")
    write("c", 32, 0.85, place="second", only_here=1)
    condition = "eval_info.task.accuracy > 0.5 and config.extra.only_here is None"
    code, out, _ = collect_command("--out", "some.csv", "--where", condition, "--no-plots")
    assert code == 0
    assert pd.read_csv("some.csv")["run_info.trial"].tolist() == ["b"]
    assert len(pd.read_parquet("multirun/first/results.parquet")) == 2
    assert "0.750" in out
    assert "0.250" not in out
    assert "1 trial: 1 success (2 in the study)" in out
    code, _, err = collect_command("--where", "config.metod.r > 1", "--no-plots")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean 'config.method.r'?" in err


def test_columns_of_different_types_go_together() -> None:
    first = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": pd.array([None, None], dtype=object)})
    second = pd.DataFrame({"a": pd.array(["x"], dtype="string"), "b": pd.array([0.5], dtype="Float64"), "c": [True]})
    found = table.together([first, second])
    assert found["a"].tolist()[::2] == ["1", "x"]
    assert found["b"].tolist()[2] == 0.5
    assert found["c"].isna().tolist() == [True, True, False]
    assert [str(dtype) for dtype in found.dtypes] == ["string", "Float64", "boolean"]


def test_records_are_read_oldest_first() -> None:
    for rank in (32, 8, 16):
        write(f"r{rank}", rank, 0.5)
    assert [result.trial for result in table.read(store.find("default"))] == ["r8", "r16", "r32"]


def test_a_base_goes_by_its_file_and_no_file_outside_of_the_study_s_bases_is_read() -> None:
    for name in ("s/base/tiny-none-0/task-0.jsonl", "s/t0/predictions/task.jsonl", "other/base/x.jsonl", "x.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"correct": true}\n', encoding="utf-8")
    read = table.predictions(Path("s"))
    assert len(read("base/tiny-none-0/task-0.jsonl", "task")) == len(read("t0", "task")) == 1
    outside = ("../x.jsonl", "base/../../x.jsonl", "../other/base/x.jsonl", str(Path("x.jsonl").resolve()))
    assert [read(name, "task") for name in outside] == [[], [], [], []]


def test_no_cell_of_a_csv_is_a_formula(tmp_path: Path) -> None:
    texts = ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "plain = text"]
    frame = pd.DataFrame({"text": texts, "number": [-1.5, 2.0, 3.0, 4.0, 5.0]})
    table.write(frame, tmp_path / "x.csv", lambda: frame)
    read = pd.read_csv(tmp_path / "x.csv")
    assert read["text"].tolist() == [*(f"'{text}" for text in texts[:4]), texts[4]]
    assert read["number"].tolist() == [-1.5, 2.0, 3.0, 4.0, 5.0]


def test_no_name_in_a_record_leads_to_a_file_outside_of_its_study(tmp_path: Path) -> None:
    outside = tmp_path / "secret.jsonl"
    outside.write_text('{"prompt": "p", "answer": "a", "score": 1}\n')
    folder = tmp_path / "study"
    (folder / "a" / "predictions").mkdir(parents=True)
    read = table.predictions(folder)
    for trial, evaluation in [("..", "../secret"), ("a", "../../../secret"), (str(tmp_path), "secret"), ("a/..", "x")]:
        assert read(trial, evaluation) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "\\<img src=x onerror=alert(1)>"),
        ("[free](http://a.b) www.a.b", "\\[free\\](http\\://a.b) www\\.a.b"),
        ("`x` *y* _z_ tiny_math: 3 of 4", "\\`x\\` \\*y\\* \\_z\\_ tiny_math: 3 of 4"),
        ("two\nlines", "two lines"),
    ],
)
def test_text_in_markdown_is_text(text: str, shown: str) -> None:
    assert words.escaped(text) == shown


def test_an_adapter_that_was_trained_elsewhere_has_the_seconds_of_another_device() -> None:
    """Its record has the device that it was evaluated on, and the seconds of the trial that trained it."""
    rows = pd.DataFrame(
        {
            "run_info.trial": ["trained", "judged there", "judged elsewhere", "beside others"],
            "train_info.trained_by": pd.array([None, "trained", "trained", None], dtype="string"),
            "meta_info.torch.gpus": ['["H100"]', '["H100"]', "[]", '["H100"]'],
            "meta_info.system.processor": ["EPYC"] * 4,
            "meta_info.system.trials_at_once": pd.array([1, 1, None, 4], dtype="Int64"),
            "meta_info.packages.torch.version": ["2.9.1+cu128", "2.9.1+cu128", "2.9.1+cu128", "2.8.0+cu128"],
        }
    )
    newer = ", torch 2.9.1+cu128"
    assert columns.devices(rows).tolist() == [
        f"H100{newer}",
        f"H100{newer}",
        f"H100{newer} + EPYC{newer}",
        "H100, 4 at once, torch 2.8.0+cu128",
    ]
    assert columns.devices(rows[:2]).tolist() == ["H100", "H100"]
