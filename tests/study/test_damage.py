"""Damaged files of a study: each is one line that names it, the others are read, and the next run makes it anew."""

from __future__ import annotations

import codecs
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from peftsweep import cli
from peftsweep.analysis import interchange
from peftsweep.analysis.figures import page
from peftsweep.analysis.table import table
from peftsweep.data import fingerprint
from peftsweep.study import claims, reading, record, store, sweep_record
from peftsweep.study.reading import Unreadable
from peftsweep.study.record import LaterVersion, RecordError, Result, Status
from tests.analysis.test_collect import Collect, collect_command
from tests.conftest import SMALL, records

__all__ = ["collect_command"]  # a fixture
Command = Callable[..., tuple[int, str, str]]
Way = Callable[[Path], None]
QUICK = ["eval=[perplexity]", *(word for word in SMALL if "tiny_math" not in word)]
FIRST = Path(__file__).parents[1] / "fixtures" / "first_version" / "multirun" / "ranks"


def over(text: str | bytes) -> Way:
    """Replace the whole content."""

    def damage(file: Path) -> None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def edited(change: Callable[[str], str]) -> Way:
    def damage(file: Path) -> None:
        file.write_text(change(file.read_text()))

    return damage


def folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def huge(file: Path) -> None:
    os.truncate(file, 2**40)


ANY: dict[str, Way] = {  # of a file of JSON, and of lines of it
    "no bytes": over(b""),
    "half": lambda file: over(file.read_bytes()[: file.stat().st_size // 2].rstrip(b"}\n"))(file),
    "null": over("null\n"),
    "a number": over("7\n"),
    "a list": over("[1, 2]\n"),
    "a text": over('"text"\n'),
    "an empty object": over("{}\n"),
    "garbage": over(bytes(range(256)) * 20),
    "NULs": over(b"\0" * 5000),
    "NULs behind": lambda file: over(file.read_bytes() + b"\0" * 512)(file),
    "bytes that are no UTF-8": lambda file: over(file.read_bytes().replace(b'"', b'"\xff', 3))(file),
    "UTF-16": lambda file: over(file.read_text().encode("utf-16"))(file),
    "deeply nested": over('{"step": ' + '{"a": ' * 5000 + "1" + "}" * 5001 + "\n"),
    "nested in lists": over('{"step": ' + "[" * 300 + "]" * 300 + "}\n"),
    "NaN": over('{"step": NaN, "schema_version": NaN}\n'),
    "a number without end": over('{"step": 1e999, "schema_version": 1e999}\n'),
    "a number of 5,000 digits": over('{"step": ' + "9" * 5000 + "}\n"),
    "a key without a value": over('{"step": }\n'),
    "a folder in its place": folder_in_its_place,
    "a link to itself": link_to_itself,
    "a pipe": pipe,
    "huge": huge,
}
HARMLESS: dict[str, Way] = {  # an editor's doing, which changes no value
    "a byte order mark": lambda file: over(b"\xef\xbb\xbf" + file.read_bytes())(file),
    "CRLF": lambda file: over(file.read_bytes().replace(b"\n", b"\r\n"))(file),
}


def keyed(change: Callable[[Any], Any]) -> Way:
    def damage(file: Path) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


def put(value: Any, *keys: Any) -> Way:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return keyed(change)


def without(*keys: Any) -> Way:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return keyed(change)


SCORE = ("eval_info", "perplexity", "perplexity")
OF_A_RECORD: dict[str, Way] = {
    **{f"without {key}": without(key) for key in ("schema_version", "run_info", "choices", "config")},
    **{
        f"without run_info.{key}": without("run_info", key)
        for key in ("trial", "status", "labels", "study", "created_at")
    },
    "without the value of a score": without(*SCORE, "value"),
    "a text for a score": put("0.5", *SCORE, "value"),
    "a boolean for a score": put(True, *SCORE, "value"),
    "a text for a count": put("many", *SCORE, "n"),
    "a list for a section": put([], "eval_info"),
    "a text for a section": put("lora", "config"),
    "a number for an evaluation": put(3, "eval_info", "perplexity"),
    "a text for seconds": put("90 s", "train_info", "train_seconds"),
    "a text for memory": put("1 GB", "memory", "train", "rss_peak"),
    "an unknown status": put("done", "run_info", "status"),
    "a status that is never written": put("planned", "run_info", "status"),
    "no labels": put([], "run_info", "labels"),
    "labels that are no texts": put([1], "run_info", "labels"),
    "a number for a name": put(5, "run_info", "trial"),
    "a date that is none": put(None, "run_info", "created_at"),
    "an error without its stage": put({"type": "E", "message": "m"}, "run_info", "error"),
    "a choice that is no text": put({"a": 1}, "choices", "method"),
    "a text for the seed": put("zero", "config", "seed"),
    "a text for the schema": put("1", "schema_version"),
}


@pytest.fixture
def ranks(scratch: Path) -> list[Path]:
    """The trials of a real study of four; those of the first two differ in their seed."""
    shutil.copytree(FIRST, scratch / "multirun" / "ranks")
    return sorted(file.parent for file in Path("multirun/ranks").glob("*/result.json"))


# ---- a record --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ANY | OF_A_RECORD)
def test_a_damaged_record_is_named_and_the_others_are_read(
    way: str, ranks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (ANY | OF_A_RECORD)[way](ranks[0] / "result.json")
    found = table.read(Path("multirun/ranks"))
    assert [result.trial for result in found] == [place.name for place in ranks[1:]]
    err = capsys.readouterr().err
    assert err.startswith(f"skipped: {ranks[0]}/result.json: ")
    assert err.count("\n") == 1
    assert f"{ranks[0]}/result.json: " in str(store.damage(ranks[0]))  # so that the trial is run again


@pytest.mark.parametrize("way", HARMLESS)
@pytest.mark.parametrize("name", ["result.json", "steps.jsonl", "predictions/perplexity.jsonl"])
def test_what_an_editor_adds_changes_no_value(way: str, name: str, ranks: list[Path]) -> None:
    def values() -> Any:
        read = record.read_json if name.endswith(".json") else record.read_lines
        return read(ranks[0] / name)

    before = values()
    HARMLESS[way](ranks[0] / name)
    assert values() == before
    assert store.damage(ranks[0]) is None


def test_half_a_character_in_a_record_is_shown_and_breaks_no_table(ranks: list[Path], scratch: Path) -> None:
    put("\ud83d", "config", "label")(ranks[0] / "result.json")
    found = table.trials(table.read(Path("multirun/ranks")))
    table.write_parquet(found, scratch / "table.parquet")
    assert "?" in set(found["config.label"].dropna())


@pytest.mark.parametrize("change", [{}, {"run_info": "of another kind"}])
def test_a_record_of_a_later_schema_is_never_overwritten(
    change: dict[str, Any], ranks: list[Path], command: Command
) -> None:
    file = ranks[0] / "result.json"
    keyed(lambda content: content.update({"schema_version": record.SCHEMA_VERSION + 1} | change))(file)
    before = file.read_bytes()
    with pytest.raises(LaterVersion, match="later version"):
        Result.read(ranks[0])
    for words in ([], ["dry_run=true"]):
        code, _, err = command("method.r=2,4", "seed=0,1", *SMALL, "study=ranks", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{ranks[0]}/result.json: written by a later version" in err
    assert file.read_bytes() == before


# ---- beside a record -------------------------------------------------------------------------------

LINES = {
    "a line without its step": edited(lambda text: text.replace('"step"', '"stop"', 1)),
    "a text for a loss": edited(lambda text: text.replace('"loss": ', '"loss": "high", "lost": ', 1)),
    "half a line between": edited(lambda text: text[:40] + "\n" + text),
    "a list between": edited(lambda text: "[1]\n" + text),
}
OF_PREDICTIONS = {
    "a line without its figure": edited(lambda text: text.replace('"log_likelihood"', '"likelihood"', 1)),
    "a text for a figure": edited(lambda text: text.replace('"log_likelihood": ', '"log_likelihood": "no", "x": ', 1)),
    "a boolean for a count": edited(lambda text: text.replace('"tokens": ', '"tokens": true, "x": ', 1)),
    "half a line": edited(lambda text: text[:-20]),
    "a list between": edited(lambda text: "[1]\n" + text),
}


@pytest.mark.parametrize("way", [way for way in ANY if way != "no bytes"] + list(LINES))
def test_damaged_steps_are_named_and_those_of_others_are_read(
    way: str, ranks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    results = table.read(Path("multirun/ranks"))
    whole = len(table.steps(results))
    (ANY | LINES)[way](ranks[0] / "steps.jsonl")
    found = table.steps(results)
    err = capsys.readouterr().err
    if way == "half":  # what a killed trial leaves; the lines before it are those of the trial
        assert err == ""
    else:
        assert set(found["trial"]) == {place.name for place in ranks[1:]}
        assert len(found) == whole * 3 // 4
        assert err.startswith(f"skipped: {ranks[0]}/steps.jsonl: ")
        assert err.count("\n") == 1
    assert f"{ranks[0]}/steps.jsonl: " in str(store.damage(ranks[0]))


def test_steps_without_a_line_are_damage_of_a_trial_that_has_taken_steps(ranks: list[Path]) -> None:
    steps = ranks[0] / "steps.jsonl"
    ANY["no bytes"](steps)
    assert store.damage(ranks[0]) == f"{steps}: it is empty"
    put(0, "train_info", "steps")(ranks[0] / "result.json")
    assert store.damage(ranks[0]) is None
    steps.unlink()  # deleted to save room, which is no damage
    put(4, "train_info", "steps")(ranks[0] / "result.json")
    assert store.damage(ranks[0]) is None


@pytest.mark.parametrize("way", ANY | OF_PREDICTIONS)
def test_damaged_predictions_are_named_and_read_as_none(
    way: str, ranks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (ANY | OF_PREDICTIONS)[way](ranks[0] / "predictions" / "perplexity.jsonl")
    read = table.predictions(Path("multirun/ranks"))
    if way != "an empty object":  # which is a line without any figure
        assert read(ranks[0].name, "perplexity") == []
        err = capsys.readouterr().err
        assert err.startswith(f"skipped: {ranks[0]}/predictions/perplexity.jsonl: ") or way == "no bytes"
        assert f"{ranks[0]}/predictions/perplexity.jsonl: " in str(store.damage(ranks[0]))
    assert len(read(ranks[1].name, "perplexity")) == 8


def test_weights_that_another_user_alone_may_read_are_no_damage(
    trained: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = trained().folder
    assert place is not None
    modes = {file.name: file.stat().st_mode & 0o777 for file in (place / store.ADAPTER).iterdir()}
    assert set(modes.values()) == {place.stat().st_mode & 0o666}  # safetensors writes its files for their owner alone
    monkeypatch.setattr(
        store, "damage_of_weights", lambda folder: f"{folder}: Permission denied" if folder.exists() else None
    )
    monkeypatch.setattr(store, "_damage", store._damage.__wrapped__)  # what is cached, other tests would find
    for may, damage in ((False, None), (True, f"{place / store.ADAPTER}: Permission denied")):
        monkeypatch.setattr(os, "access", lambda file, _, may=may: may)
        assert store.damage(place) == damage


@pytest.mark.parametrize("way", [way for way in ANY if way not in ("an empty object", "NaN", "huge")])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_named_and_taken_by_no_other_trial(name: str, way: str, ranks: list[Path]) -> None:
    file = ranks[0] / "adapter" / name
    training = Result.read(ranks[0]).run_info["training"]
    assert store.trained(Path("multirun/ranks"), training) is not None
    if name.endswith(".safetensors"):
        file.with_suffix(".text").write_text("{}")  # what some of the ways begin with
        os.replace(file.with_suffix(".text"), file)
    ANY[way](file)
    assert str(file) in str(store.damage(ranks[0]))
    assert store.trained(Path("multirun/ranks"), training) is None


def test_an_adapter_that_is_cut_off_or_has_no_weights_is_damaged(ranks: list[Path]) -> None:
    file = ranks[0] / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert str(file) in str(store.damage(ranks[0]))
    file.write_bytes(content)
    assert store.damage(ranks[0]) is None
    file.unlink()
    assert "holds no weights" in str(store.damage(ranks[0]))
    shutil.rmtree(file.parent)  # deleted to save room, which is no damage
    assert store.damage(ranks[0]) is None


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_to_be_scored_is_one_line(name: str, ranks: list[Path], command: Command) -> None:
    (ranks[0] / "adapter" / name).write_bytes(b"\0garbage")
    code, _, err = command(f"adapter.path={ranks[0]}", "study=again", *SMALL)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{ranks[0]}/adapter/{name}" in err
    assert not Path("multirun/again").exists()


@pytest.mark.parametrize("way", ["garbage", "without config", "without run_info.study"])
@pytest.mark.parametrize("key", ["repeat", "adapter.path"])
def test_a_damaged_record_to_be_gone_on_from_is_one_line(
    key: str, way: str, ranks: list[Path], command: Command
) -> None:
    if key == "adapter.path" and way == "without run_info.study":
        pytest.skip("nothing is read of it")
    (ANY | OF_A_RECORD)[way](ranks[0] / "result.json")
    code, _, err = command(f"{key}={ranks[0]}", *SMALL)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{ranks[0]}/result.json" in err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"../../elsewhere", b"gone", b"a\0b", b"."])
def test_a_mark_that_names_no_trial_is_none(content: bytes, ranks: list[Path]) -> None:
    training = Result.read(ranks[0]).run_info["training"]
    for folder in (".trained", ".recognised"):
        file = Path("multirun/ranks", folder, training)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    assert store.trained(Path("multirun/ranks"), training) is None
    assert store.recognised(Path("multirun/ranks"), training) is None


# ---- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [*ANY, "another hash"])
def test_a_damaged_note_of_a_hash_is_made_anew(change: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "LARGE", 10)
    (scratch / "weights").write_bytes(b"x" * 100)

    def hashed() -> str:
        fingerprint._remembered.cache_clear()
        return fingerprint.file_hash(scratch / "weights")

    expected = hashed()
    [note] = Path("multirun/.hashes").iterdir()
    damage = ANY.get(change, edited(lambda text: text.replace(expected, "0" * 64)))
    damage(note)
    assert hashed() == expected
    assert record.read_json(note)["sha256"] == expected


def test_a_damaged_note_of_a_sweep_is_named_and_the_one_before_it_is_told(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path("multirun/default/sweeps")
    record.write_json(place / "1.json", {"seconds": 2.0, "seconds_outside_trials": 1.0})
    for content in ("", "[]", '{"seconds": "2", "seconds_outside_trials": 1}', '{"seconds": 2}'):
        (place / "2.json").write_text(content)
        assert (sweep_record.last(place.parent) or {})["seconds"] == 2.0
        assert capsys.readouterr().err.startswith(f"skipped: {place}/2.json: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"[1", "JSONDecodeError"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b"\xff", "byte 1 is not UTF-8"),
        (b"[" * 20_000, "nested too deeply"),
        (b'{"b": 1}', "a is missing"),
        (b'{"a": true}', "a: a boolean, not an integer"),
        (b'{"a": 1, "c": [1, "x"]}', "c.1: a text, not an integer"),
        (b'{"a": 1, "d": "1.5"}', "d: a text, not a number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(content: bytes, message: str, scratch: Path) -> None:
    (scratch / "file.json").write_bytes(content)
    with pytest.raises(Unreadable, match=r"^[^\n]*$") as raised:
        reading.read_json(scratch / "file.json", {"a": int, "c?": [int], "d?": reading.NUMBER})
    assert str(raised.value).startswith(f"{scratch}/file.json: ")
    assert message in str(raised.value)


TWO_LINES = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.0}\n'


@pytest.mark.parametrize(
    "content",
    [
        TWO_LINES,
        b"",
        b"\n",
        TWO_LINES[:-1],
        TWO_LINES + b"\n",
        TWO_LINES + b'{"step": 3',
        TWO_LINES.replace(b"\n", b"\r\n"),
        TWO_LINES.replace(b'{"step": 2', b'  {"step": 2'),
        TWO_LINES.replace(b", ", b",\n"),  # an object in two lines
        TWO_LINES.replace(b"\n", b" ", 1),  # two objects in a line
        TWO_LINES.replace(b"}\n{", b"}{").replace(b", ", b",\n", 1),  # both: as many objects as lines
        TWO_LINES.replace(b"}", b"},"),
        b"[" + TWO_LINES.replace(b"\n", b",\n") + b"]\n",
        codecs.BOM_UTF8 + TWO_LINES,
        TWO_LINES + b"3\n",
        TWO_LINES.replace(b"2.5", b"1e999"),
        TWO_LINES.replace(b"2.5", b"NaN"),
        TWO_LINES.replace(b"2.5", b'"high"'),
        TWO_LINES.replace(b"2.5", b'"\\ud800"'),
        TWO_LINES.replace(b"2.5", b"[" * 100 + b"]" * 100),
        TWO_LINES.replace(b"2.5", b"\xff"),
        TWO_LINES.replace(b"\n", b"\0"),
        TWO_LINES.replace(b"\n", "\u2028".encode()),
        b"{" * 20_000 + b"\n",
    ],
)
@pytest.mark.parametrize("shape", [{"step": int, "*": reading.NUMBER}, {"*": object}])
def test_a_file_that_is_read_at_once_gives_what_its_lines_give_one_by_one(
    content: bytes, shape: reading.Shape, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes() -> Iterator[list[dict[str, Any]] | str]:
        for whole in (True, False):
            try:
                yield reading.read_lines(scratch / "rows.jsonl", shape, whole=whole)
            except Unreadable as error:
                yield str(error)

    (scratch / "rows.jsonl").write_bytes(content)
    at_once = [*outcomes()]
    monkeypatch.setattr(reading, "_whole_rows", lambda *_: None)
    assert at_once == [*outcomes()]


def test_collecting_opens_each_record_and_each_file_of_steps_once(
    ranks: list[Path], collect_command: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = list[Path](), reading.opened
    monkeypatch.setattr(reading, "opened", lambda file: opened.append(file) or real(file))  # type: ignore[func-returns-value]
    assert collect_command("ranks", "--no-plots")[0] == 0
    for name in ("result.json", "steps.jsonl"):
        assert sorted(file for file in opened if file.name == name) == sorted(place / name for place in ranks)


# ---- the doors -------------------------------------------------------------------------------------


def test_collect_names_every_damaged_file_and_shows_the_rest(
    ranks: list[Path], collect_command: Collect, capfd: pytest.CaptureFixture[str]
) -> None:
    put("high", *SCORE, "value")(ranks[0] / "result.json")
    ANY["NULs"](ranks[1] / "steps.jsonl")
    OF_PREDICTIONS["a line without its figure"](ranks[2] / "predictions" / "perplexity.jsonl")
    (ranks[3] / ".hydra" / "overrides.yaml").write_bytes(b"- method.r=\xff\n")
    code, out, err = collect_command("ranks", "--no-plots")
    assert code == 0
    assert "3 trials: 3 success" in out
    assert page._command(ranks[3]).startswith("# ")
    err += capfd.readouterr().err
    damaged = ("0/result.json", "1/steps.jsonl", "2/predictions/perplexity.jsonl", "3/.hydra/overrides.yaml")
    named = [f"skipped: {ranks[int(name[0])]}{name[1:]}: " for name in damaged]
    assert [any(line.startswith(name) for line in err.splitlines()) for name in named] == [True] * 4
    assert "Traceback" not in err
    assert Path("multirun/ranks/RESULTS.md").exists()
    assert collect_command("--status", "ranks")[0] == 0


def two_results_of_which_one_is(way: str) -> None:
    """Write two result files of PEFT's comparison into ``theirs``, of which b.json is damaged that way."""
    from tests.analysis.test_interchange import THEIRS

    for name in ("a", "b"):
        record.write_json(Path("theirs", f"{name}.json"), THEIRS)
    own = {
        "without train_info": without("train_info"),
        "no metrics": put(None, "train_info", "metrics"),
        "a text for a number": put("9", "train_info", "file_size"),
        "an unknown status": put("odd", "train_info", "status"),
    }
    (ANY | own)[way](Path("theirs/b.json"))


@pytest.mark.parametrize("way", [*ANY, "without train_info", "no metrics", "a text for a number", "an unknown status"])
def test_an_odd_file_of_peft_s_comparison_is_named_and_the_others_become_trials(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    two_results_of_which_one_is(way)
    study = interchange.from_peft(Path("theirs"))
    assert [Result.read(file.parent).status for file in study.glob("*/result.json")] == [Status.success]
    err = capsys.readouterr().err
    another_kind = ("null", "a number", "a list", "a text", "an empty object", "NaN", "nested in lists")
    if way not in another_kind:  # JSON of any other kind may lie there, such as an adapter_config.json
        assert err.startswith("skipped: theirs/b.json: ")
        assert err.count("\n") == 1


def test_collect_imports_the_others(collect_command: Collect) -> None:
    two_results_of_which_one_is("an unknown status")
    code, out, err = collect_command("--from-peft", "theirs", "--no-plots")
    assert code == 0
    assert "1 trial: 1 success" in out
    assert err.startswith("skipped: theirs/b.json: ")
    assert err.count("\n") == 1


def test_a_study_that_may_only_be_read_is_shown_and_written_elsewhere(
    ranks: list[Path], collect_command: Collect, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    real, study_folder = os.replace, Path("multirun").resolve()

    def read_only(source: Any, target: Any) -> None:
        if study_folder in Path(target).resolve().parents:
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", read_only)
    code, out, err = collect_command("ranks", "--no-plots", "--out", str(scratch / "table.csv"))
    assert (code, err) == (0, "multirun/ranks: nothing is written there: Read-only file system\n")
    assert "4 trials: 4 success" in out
    assert len(pd.read_csv(scratch / "table.csv")) == 4
    assert collect_command("ranks", "--no-plots")[0] == 2


@pytest.mark.parametrize("option", [[], ["--status"], ["--prune"], ["--forecast-report"]])
def test_the_folder_of_a_trial_is_no_study(option: list[str], ranks: list[Path], collect_command: Collect) -> None:
    code, out, err = collect_command(*option, str(ranks[0]))
    assert (code, out) == (2, "")
    assert err == f"peftsweep: study={ranks[0]}: is the folder of a trial; that of its study is {ranks[0].parent}\n"


def test_a_study_whose_first_trial_runs_is_shown(collect_command: Collect) -> None:
    with claims.claim(Path("multirun/new"), "0123456789"):
        assert "multirun/new: 0 trials, 1 running" in collect_command("--status")[1]
        code, out, _ = collect_command()
        assert code == 0
        assert f"multirun/new: no trial yet; running: trial-0123456789 on {record.host()}" in out


@pytest.mark.slow
def test_four_collects_at_once_leave_whole_files(ranks: list[Path]) -> None:
    door = [sys.executable, "-c", "from peftsweep import cli; cli.collect()", "ranks"]
    running = [subprocess.Popen(door, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [(*one.communicate(), one.returncode) for one in running]
    assert [(err, code) for _, err, code in ended] == [("", 0)] * 4
    drawn = [Path(name) for name in ended[0][0].splitlines()[-1].removeprefix("wrote ").split(" and ")]
    assert all(file.stat().st_size for file in drawn)
    assert list(Path("multirun/ranks").rglob("*.partial")) == []


# ---- the next run ----------------------------------------------------------------------------------


def whole(place: Path) -> bool:
    """Whether all that the trial holds is as a trial leaves it."""
    reading.read_yaml(place / ".hydra" / "overrides.yaml", [str])
    reading.read_yaml(place / ".hydra" / "config.yaml", dict)
    return store.damage(place) is None and store.result(place) is not None


@pytest.mark.slow
@pytest.mark.parametrize("way", ["no bytes", "half", "garbage", "NULs", "a folder in its place", "a link to itself"])
@pytest.mark.parametrize(
    "name",
    [
        *("result.json", "steps.jsonl", "predictions/perplexity.jsonl", "adapter/adapter_model.safetensors"),
        *("adapter/adapter_config.json", ".hydra/overrides.yaml", ".hydra/config.yaml"),
    ],
)
def test_the_next_run_makes_a_damaged_file_anew_and_leaves_the_others_alone(
    name: str, way: str, command: Command
) -> None:
    words = ["method.r=2,4", *QUICK]
    assert command(*words)[0] == 0
    [mine, other] = [Path("multirun/default", trial) for trial in sorted(records())]
    kept = {file: file.stat().st_mtime_ns for file in other.rglob("*") if file.is_file()}
    before = Result.read(mine)
    ANY[way](mine / name)
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    assert "2 trials: 2 success" in out
    assert name.startswith(".hydra") or f"as a file of it is damaged: {mine}/{name}" in out
    assert whole(mine)
    after = Result.read(mine)
    assert after.eval_info["perplexity"]["perplexity"]["value"] == pytest.approx(
        before.eval_info["perplexity"]["perplexity"]["value"], rel=1e-4
    )
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    code, out, _ = command(*words)
    assert "done before" in out
    assert "damaged" not in out


@pytest.mark.slow
@pytest.mark.parametrize("way", [*ANY, "another score"])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_scores_of_the_base_are_made_anew_where_their_files_are_damaged(ending: str, way: str) -> None:
    first = cli.run_one(["method.r=2", *QUICK])
    [file] = [file for file in Path("multirun/default/base").glob("*/*") if file.suffix == ending]
    damage = ANY.get(way, edited(lambda text: text.replace("1", "2", 1)))
    damage(file)
    second = cli.run_one(["method.r=4", *QUICK])
    value = first.eval_info["perplexity"]["base_perplexity"]["value"]
    assert second.eval_info["perplexity"]["base_perplexity"]["value"] == pytest.approx(value, rel=1e-4)
    record.read_json(file.with_suffix(".json"), record.SCORES)
    assert len(record.read_predictions(file.with_suffix(".jsonl"))) == 8


@pytest.mark.slow
def test_answers_of_the_base_that_a_finished_trial_lacks_are_made_without_training_again(scratch: Path) -> None:
    first = cli.run_one(["method.r=2", *QUICK])
    [file] = Path("multirun/default/base").glob("*/*.jsonl")
    ANY["half"](file)
    again = cli.run_one(["method.r=2", *QUICK])
    assert again.run_info["created_at"] == first.run_info["created_at"]
    assert again.train_info["train_seconds"] == first.train_info["train_seconds"]
    assert len(record.read_predictions(file)) == 8


def test_a_record_that_cannot_be_read_says_so_with_its_type(scratch: Path) -> None:
    (scratch / "result.json").write_text("{broken")
    with pytest.raises(RecordError, match="JSONDecodeError"):
        Result.read(scratch)
