"""The answer: the same facts in terminal, RESULTS.md, report.html and answer.json, and what a person asks of them."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pandas as pd
import pytest

from peftsweep.analysis import terminal
from peftsweep.analysis.answer import build, failures, measurements, render, structure, warned
from peftsweep.analysis.answer.structure import Decision
from peftsweep.analysis.figures import page
from peftsweep.analysis.statistics.task import study_tasks
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.table import predictions
from peftsweep.analysis.text import report, words
from peftsweep.study import record
from peftsweep.tuning import decision as tuning_decision
from peftsweep.tuning.finals import BaseScore, Judged
from tests import tables
from tests.analysis.test_collect import collect_command as collect_command
from tests.analysis.test_report import ranks, table_of, trial

SCHEMA = Path(__file__).parents[2] / "docs" / "answer.schema.json"
STUDY = Path("multirun/default")


def answered(*rows: dict[str, Any], steps: pd.DataFrame | None = None) -> tuple[dict[str, Any], str]:
    """What answer.json and RESULTS.md hold of a study of these trials."""
    held, text, _ = reported(*rows, steps=steps)
    return held, text


def reported(*rows: dict[str, Any], steps: pd.DataFrame | None = None) -> tuple[dict[str, Any], str, structure.Answer]:
    """``answered``, and the answer that both are written from."""
    keep_words(*rows)
    logged = pd.DataFrame() if steps is None else steps
    file, answer = report.write(STUDY, table_of(STUDY, *rows), logged, (), predictions(STUDY))
    return json.loads((STUDY / "answer.json").read_text()), file.read_text(), answer


def keep_words(*rows: dict[str, Any]) -> None:
    """Write the words that each of the trials was run with."""
    for row in rows:
        file = STUDY / row["run_info.trial"] / ".hydra" / "overrides.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"- method=lora\n- label={row['run_info.trial']}\n")


def answer_alone(*rows: dict[str, Any]) -> dict[str, Any]:
    """What answer.json holds of a study of these trials, for tests that do not read RESULTS.md: in half the time."""
    keep_words(*rows)
    table = table_of(STUDY, *rows)
    answer = build.answer(STUDY, table, study_tasks(table, predictions(STUDY)), pd.DataFrame())
    structure.write(answer, STUDY, render.plain)
    return dict(json.loads((STUDY / "answer.json").read_text()))


def section(answer: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in answer["sections"] if one["name"] == name]
    return dict(found)


def study() -> list[dict[str, Any]]:
    """Ranks 8, 16, 32 with two seeds each, one trial out of memory and two that diverged."""
    facts = {"eval_info.task.majority": 0.3, "memory.predicted.peak_bytes": 3e8}
    good = [row | facts for row in ranks(40, 80, 81, seeds=2)]
    oom = trial(20, None, **{"config.method.r": 64}) | {
        "run_info.status": "oom",
        "run_info.error.message": "no memory left for 2.00 GiB more; try train.batch_size=2 train.accumulation=2",
    }
    nan = "the training loss is nan at step {}; lower train.learning_rate"
    wild = [
        trial(21 + n, None, **{"config.method.r": 128 + n})
        | {"run_info.error.type": "FloatingPointError", "run_info.error.message": nan.format(10 + n)}
        for n in range(2)
    ]
    return [*good, oom, *wild]


def test_twenty_questions_are_read_off_the_files() -> None:
    answer, text = answered(*study())
    use, sure = section(answer, "use")["facts"], section(answer, "certainty")["facts"]
    choice = section(answer, "choices")["facts"]["factors"][0]
    costs = {one["name"]: one for one in section(answer, "costs")["facts"]["costs"]}
    failed = section(answer, "failures")["facts"]["causes"]
    rows = section(answer, "table")["tables"][0]["rows"]
    judged, by_level = sure["scores"][0], {one["level"]: one for one in choice["comparisons"]}
    lookups = {
        "which configuration is to be used?": (use["configuration"], "lora, r=16"),
        "how good is it?": (use["score"]["value"], pytest.approx(0.805)),
        "what is the score?": (use["score"]["name"], "task accuracy"),
        "is more of it better?": (use["score"]["better"], "higher"),
        "what command trains it?": (use["command"], "peftsweep method=lora label=t2"),
        "where does it lie?": (use["folder"], "multirun/default/t2"),
        "which trials are its seeds?": (use["trials"], ["t2", "t3"]),
        "what rank has it?": (use["settings"]["config.method.r"], 16),
        "what is in a tie with the best?": (judged["ties"], ["lora, r=16"]),
        "which figure is the best?": (judged["best"], "lora, r=32"),
        "how many seeds?": (sure["seeds"], 2),
        "what does the untouched base score?": (judged["base"]["value"], pytest.approx(0.1)),
        "what does the most frequent answer score?": (judged["majority"], pytest.approx(0.3)),
        "which choice was made?": (choice["factor"], "rank"),
        "what was the smallest rank worth?": (by_level["8"]["difference"], pytest.approx(-0.41)),
        "what memory is needed, measured or not?": (
            (costs["predicted memory"]["value"], costs["predicted memory"]["source"]),
            (pytest.approx(3e8), "predicted"),
        ),
        "how long does it train?": (costs["training time"]["value"], pytest.approx(12.5)),
        "how many trials diverged, and how many ran out of memory?": (
            {one["status"]: one["count"] for one in failed},
            {"failed": 2, "oom": 1},
        ),
        "what is to be changed?": (
            [one["change"] for one in failed],
            ["Lower train.learning_rate", "Try train.batch_size=2 train.accumulation=2"],
        ),
        "what do all configurations score?": (
            {row["configuration"]: row["eval_info.task.accuracy.value"] for row in rows if row["seeds"]},
            {"lora, r=8": pytest.approx(0.405), "lora, r=16": pytest.approx(0.805), "lora, r=32": pytest.approx(0.815)},
        ),
    }
    assert len(lookups) == 20
    for question, (found, wanted) in lookups.items():
        assert found == wanted, question
    assert use["score"]["low"] < use["score"]["value"] < use["score"]["high"]
    assert "**Use `lora, r=16`**: 0.805" in text


def test_the_four_outputs_hold_the_same_sentences_in_the_same_order() -> None:
    rows = study()
    record.write_json(STUDY / "league.json", {"lines": ["league by task accuracy:", "1. lora, r_x=*16*: 0.8"]})
    held, text, answer = reported(*rows)
    table = pd.DataFrame(rows).convert_dtypes()
    opened = page.write(table, tables.steps(table), STUDY, predictions(STUDY), answer).read_text(encoding="utf-8")
    shown = re.sub(r"<[^>]+>", "", opened.partition("</head>")[2].partition('id="trial')[0])
    printed = "\n".join(render.lines(answer))
    sentences = [sentence for part in held["sections"] for sentence in part["sentences"]]
    assert [part["name"] for part in held["sections"]][:6] == [
        "use",
        "league",
        "certainty",
        "choices",
        "costs",
        "failures",
    ]
    for output in (printed, render.plain(text), html.unescape(shown)):
        places = [output.find(sentence) for sentence in sentences]
        assert -1 not in places
        assert places == sorted(places)


def _meaning(schema: Any) -> Any:
    """A schema without what versions of pydantic write or leave out, which is no rule or implied anyway."""
    if isinstance(schema, dict):
        implied = [("additionalProperties", True), ("enum", [schema.get("const", schema)])]
        return {
            key: _meaning(part) for key, part in schema.items() if key != "description" and (key, part) not in implied
        }
    return [_meaning(part) for part in schema] if isinstance(schema, list) else schema


def test_answer_json_is_as_its_published_schema_says() -> None:
    published = json.loads(SCHEMA.read_text(encoding="utf-8"))
    made = structure.schema()  # by: python -m peftsweep.analysis.answer.structure > docs/answer.schema.json
    assert _meaning(published) == _meaning(made)
    check = jsonschema.Draft202012Validator(published)
    for rows in ([trial(0, None)], ranks(5, 6, seeds=1), study()):
        check.validate(wrong := answer_alone(*rows))
    section(wrong, "use")["facts"]["verdict"] = "perhaps"
    assert not check.is_valid(wrong)
    section(wrong, "use")["facts"]["verdict"] = "use"
    del section(wrong, "certainty")["facts"]["seeds"]
    assert not check.is_valid(wrong)


def test_nothing_is_used_where_nothing_beats_the_base_and_one_trial_is_the_only_one() -> None:
    verdicts = {
        "none": [row | {"eval_info.task.base_accuracy.value": 0.9} for row in ranks(40, 80)],
        "only one": [trial(0, 80)],
        "nothing succeeded": [trial(0, None)],
        "not judged": [{k: v for k, v in row.items() if not k.startswith("eval_info")} for row in ranks(40, 80)],
        "use": ranks(40, 80),
    }
    for verdict, rows in verdicts.items():
        use = section(answer_alone(*rows), "use")["facts"]
        assert use["verdict"] == verdict
        assert (use["configuration"] is None) == (verdict not in ("use", "only one"))


def test_the_command_is_the_same_in_every_output_whatever_its_words_hold() -> None:
    overrides = ["dataset.prompt='{q}  **{a}** `x`'", "dataset.answer='é\n\tb'", "label=it's"]
    kept = STUDY / "t0" / ".hydra" / "overrides.yaml"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(overrides), encoding="utf-8")
    command = build.command(STUDY / "t0")
    assert command is not None
    assert "\n" not in command
    shell = ["bash", "-c", f"printf '%s\\0' {command}"]
    assert subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[1:-1] == overrides
    sentence = f"{render.TRAIN}{words.code(command, exact=True)}"
    assert render.plain(sentence) == f"{render.TRAIN}{command}"
    assert html.unescape(render.inline(sentence)) == f"{render.TRAIN}<code>{command}</code>"


# ---- what failed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "message", "change"),
    [
        ("failed", "FloatingPointError", "weights are not finite after step 3", "train.learning_rate"),
        ("failed", "OSError", "[Errno 28] No space left on device", "disk space"),
        ("failed", "TimeoutError", "it took longer than hydra.launcher.timeout, 60 seconds", "hydra.launcher.timeout"),
        ("failed", "ModuleNotFoundError", "No module named 'math_verify'", "Install"),
        ("failed", "FileNotFoundError", "[Errno 2] No such file or directory: 'rows.jsonl'", "path"),
        ("failed", "WorkerDied", "the worker died: SIGSEGV", "retries=1"),
        ("failed", "TerminatedWorkerError", "A worker process was unexpectedly terminated {SIGKILL(-9)}", "retries=1"),
        ("failed", "UncompletedJobError", "Job not requeued because: timed-out too many times.", "timeout_min"),
        ("failed", "RuntimeError", "CUDA error: device-side assert triggered", "workers=1"),
        ("failed", "KeyError", "'x'", "trial.log"),
        ("oom", "OutOfMemoryError", "no memory left", "train.batch_size"),
        (
            "failed",
            "FloatingPointError",
            "the loss is nan at step 3; take train.autocast=bfloat16",
            "Take train.autocast",
        ),
        ("failed", "FloatingPointError", "nan; model.dtype=float16 overflows above 65504", "model.dtype=float16 over"),
        ("failed", "InputError", "dataset.path=x: holds no row", "Correct the key"),
        (
            "failed",
            "WorkerFailed",
            "peftsweep.errors.InputError: model.name_or_path=./x: no such folder",
            "Correct the",
        ),
        (
            "failed",
            "InputError",
            "r=4: its rows have changed since; run the same command again",
            "Run the same command",
        ),
        ("oom", "OutOfMemoryError", "no memory left; try quant=4bit, or a smaller model", "Try quant=4bit"),
        ("refused", "Oversized", "predicted to need 20.0 GB, there are 8.0 GB", "Raise memory_limit"),
        ("refused", "Refused", "oft on a 4-bit base: trains nothing", "Leave this combination out"),
        ("cancelled", "KeyboardInterrupt", "", "same command"),
    ],
)
def test_each_cause_comes_with_what_to_change(status: str, kind: str, message: str, change: str) -> None:
    row = {"run_info.trial": "t", "run_info.status": status, "run_info.error.stage": "train"}
    table = pd.DataFrame([row | {"run_info.error.type": kind, "run_info.error.message": message}])
    found = failures.section(table)
    assert found is not None
    (cause,) = found.facts.causes  # type: ignore[union-attr]
    assert change in (cause.change or "")
    assert cause.status == status


def test_failures_of_one_cause_are_one_whatever_their_numbers() -> None:
    rows = [
        {
            "run_info.trial": f"t{n}",
            "run_info.status": "failed",
            "run_info.error.stage": stage,
            "run_info.error.type": "FloatingPointError",
            "run_info.error.message": f"the training loss is nan at step {n}\nmore",
        }
        for n, stage in enumerate(["train", "train", "eval"])
    ]
    found = failures.section(pd.DataFrame(rows))
    assert found is not None
    assert [(c.count, c.stage, c.trials) for c in found.facts.causes] == [  # type: ignore[union-attr]
        (2, "train", ["t0", "t1"]),
        (1, "eval", ["t2"]),
    ]


# ---- tables that fit ---------------------------------------------------------------------------------


def printed(table: pd.DataFrame, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> list[str]:
    """The lines of the table of these trials in a terminal of so many characters."""
    monkeypatch.setenv("COLUMNS", str(width))
    named = table.assign(**{columns.CALLED: columns.named_trials(table)})
    capsys.readouterr()
    terminal.show("title", terminal._columns(named, all_good=False), terminal.console())
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("tests", [1, 9])
def test_a_printed_table_fits_the_terminal_and_breaks_no_number(
    width: int, tests: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"commonsense_{n}" for n in range(tests)]
    table = tables.trials(
        {"choices.method": ["lora", "dora"], "config.method.r": [8, 128], "config.train.learning_rate": [1e-4, 2e-3]},
        evaluations=[*names, "perplexity"],
    )
    lines = printed(table, width, capsys, monkeypatch)
    grid = [line for line in lines if line.startswith(("│", "┃"))]
    assert max(map(len, grid)) <= width
    body = [[cell.strip() for cell in line.strip("│").split("│")] for line in grid if line.startswith("│")]
    assert len(body) == len(table)  # no row is folded
    assert len(body[0]) <= 12
    assert "…" not in "\n".join(lines)
    shown = {cell for line in body for cell in line}
    assert {"8", "128"} <= shown
    assert any("." in cell and cell.count(".") in (1, 2) for cell in shown)
    left = next((line for line in lines if line.startswith("Not shown: ")), "")
    assert left or width > 60
    assert not left or width < 200
    titles = [
        " ".join(part) for part in zip(*[line.strip("┃").split("┃") for line in grid if "┃" in line], strict=True)
    ]
    assert not [title for title in titles if len(title.strip()) == 1]  # no column of one letter


def test_many_settings_are_told_by_the_name_of_the_trial(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "alpha_pattern", "rank_pattern")
    draw = np.random.default_rng(0)
    rows = [trial(n, 50, **{f"config.method.{key}": int(draw.integers(3)) for key in keys}) for n in range(8)]
    lines = printed(pd.DataFrame(rows).convert_dtypes(), 80, capsys, monkeypatch)
    assert "trial" in "".join(line for line in lines if line.startswith("┃"))
    assert max(len(line) for line in lines if line.startswith(("│", "┃"))) <= 80


def matrix_rows(**others: Any) -> list[dict[str, Any]]:
    scores = {"boolq": (60, 70), "piqa": (50, 90)}
    rows = []
    for number in range(2):
        row = trial(number, None, **{"config.method.r": 8 << number}) | {"run_info.status": "success"}
        row = {key: value for key, value in row.items() if not key.startswith("eval_info.task")}
        for name, values in scores.items():
            share = values[number] / 100
            row |= {
                f"eval_info.{name}.accuracy.value": share,
                f"eval_info.{name}.accuracy.stderr": math.sqrt(share * (1 - share) / 99),
                f"eval_info.{name}.accuracy.n": 100,
                f"eval_info.{name}.base_accuracy.value": 0.4,
                f"eval_info.{name}.majority": 0.5,
                f"eval_info.{name}.random": 0.25,
                f"eval_info.{name}.valid_fraction.value": 0.9 + number / 20,
            }
        rows.append(row | others)
    return rows


def test_several_tests_make_a_matrix_with_average_base_chance_and_readable_answers() -> None:
    answer, text = answered(*matrix_rows())
    found = section(answer, "table")["tables"][1]
    rows = {row["configuration"]: row for row in found["rows"]}
    assert [column["title"] for column in found["columns"]] == [
        "configuration",
        "average",
        "boolq",
        "piqa",
    ]
    assert rows["lora, r=16"]["average"] == pytest.approx(0.8)
    assert rows["lora, r=8"]["average"] == pytest.approx(0.55)
    assert list(rows)[:2] == ["lora, r=16", "lora, r=8"]
    assert rows["untouched base"]["average"] == pytest.approx(0.4)
    assert rows["always the most frequent answer"]["average"] == pytest.approx(0.5)
    assert rows["guessing"]["average"] == pytest.approx(0.25)
    assert rows["answers that can be read"]["eval_info.boolq.accuracy.value"] == pytest.approx(0.95)
    assert "**Scores by test, accuracy**" in text


@pytest.mark.parametrize(("what", "key"), [("dataset", "path"), ("model", "name_or_path")])
def test_trials_of_rows_or_a_base_that_were_changed_since_are_named(what: str, key: str) -> None:
    table = tables.trials({"config.method.r": [8, 16, 32]})
    table[f"config.{what}.{key}"] = "here"
    table[f"meta_info.{what}_sha"] = ["before", "after", "after"]
    [found] = warned.section(study_tasks(table, None))
    assert found.sentences[0].startswith(f"The {what} was changed after these trials had run: ")
    facts: Any = found.facts
    [warning] = facts["warnings"]
    assert [name for name in ("8", "16", "32") if any(name in label for label in warning["configurations"])] == ["8"]
    table[f"config.{what}.revision"] = ["a", "b", "b"]  # chosen, and no change behind the same name
    assert [*warned.section(study_tasks(table, None))] == []


def test_what_a_terminal_leaves_out_of_a_long_section_is_counted() -> None:
    part = structure.Section("certainty", "How sure that is", [f"sentence {n}." for n in range(12)])
    answer = structure.Answer(1, "0", "", "s", "s", {}, 0, [part])
    lines = render.lines(answer)
    assert lines[0] == "How sure that is:"
    assert lines[-1] == "  4 more sentences on this are in RESULTS.md."
    assert len(lines) == 10


def test_an_average_over_tests_is_missing_where_one_of_them_is() -> None:
    rows = matrix_rows()
    rows[0]["eval_info.piqa.accuracy.value"] = None
    found = section(answer_alone(*rows), "table")["tables"][1]["rows"]
    assert [row["average"] for row in found if row["configuration"] == "lora, r=8"] == [None]


# ---- nothing that was measured is hidden -------------------------------------------------------------


def test_all_that_was_measured_has_a_section() -> None:
    rows = study()[:6]
    profile = "train_info.profile.torch."
    for n, row in enumerate(rows):
        row |= {
            f"{profile}forward_seconds": 0.25 + n,
            f"{profile}utilisation": 0.5,
            f"{profile}top_operators_by_cpu_time": "aten::mm",
            "memory.train.reserved_mean": 7e9,
            "memory.train.reserved_p99": 8e9,
            "memory.load.reserved_mean": 2e9,
            "train_info.published_train_seconds": 1234.0,
            "eval_info.task.truncated_prompts": 3,
            "eval_info.task.valid_fraction.value": 0.75,
            "generation_info.short.base.seconds_p50": 0.5,
            "generation_info.short.adapted.seconds_p50": 0.6,
            "generation_info.short.adapted.time_to_first_token_p50": 0.02,
            "generation_info.short.adapted.batch_16.tokens_per_second": 4321.0,
            "generation_info.short.adapted.overhead.value": 1.25,
            "generation_info.short.adapted.overhead.low": 1.2,
            "generation_info.short.adapted.overhead.high": 1.31,
        }
    logged = [
        {"trial": "t2", "step": step, "learning_rate": 1e-3 / step, "validation_loss": loss}
        for step, loss in ((1, 3.0), (2, 1.0), (4, 2.0))
    ]
    answer, text = answered(*rows, steps=pd.DataFrame(logged))
    speed = next(row for row in section(answer, "inference")["tables"][0]["rows"] if row["model"] == "adapted")
    assert (speed["category"], speed["seconds_p50"], speed["batch_16.tokens_per_second"]) == ("short", 0.6, 4321.0)
    assert (speed["overhead"], speed["overhead.low"]) == (pytest.approx(0.25), pytest.approx(0.2))
    (course,) = section(answer, "validation")["tables"][0]["rows"]
    assert [course[f"validation_loss.{k}"] for k in ("first", "best", "step", "last")] == [3.0, 1.0, 2.0, 2.0]
    for told in (
        "+25.0% [+20.0%, +31.0%]",
        "aten::mm",
        "75.0%",
        "7.0 GB",
        "8.0 GB",
        "21 min",
        "4,321",
        "20 ms",
        "50.0%",
    ):
        assert told in text.partition("## Methodology")[2], told
    assert "| lora, r=16    | task       |                 3 |" in text


def test_a_speed_up_has_the_interval_of_the_logged_steps() -> None:
    eager, compiled = [0.2, 0.21, 0.19, 0.2, 0.22, 0.2, 0.18, 0.2], [0.1, 0.1, 0.11, 0.09, 0.1, 0.1, 0.1, 0.1]
    low, high = measurements.speed_up_interval(eager, compiled)
    assert low is not None
    assert high is not None
    assert low <= 1.0 <= high  # twice as fast: 100% more
    assert high - low < 0.5
    assert measurements.speed_up_interval(eager[:5], compiled) == (None, None)


@pytest.mark.parametrize(
    ("name", "unit"),
    [("forward_seconds", "seconds"), ("load_seconds_mean", "seconds"), ("peak_bytes_above_start", "bytes"),
     ("device_busy_share", "share"), ("flops_per_step", "count"), ("padding_fraction", "share")],
)  # fmt: skip
def test_a_figure_s_unit_follows_from_its_name(name: str, unit: str) -> None:
    assert measurements.unit(name) == unit


def test_cells_are_in_the_unit_that_suits_them() -> None:
    row = {"a": 1.5e9, "b": 0.0123, "c": 0.25, "d": 0.1, "d.low": -0.05, "d.high": 0.2, "e": None, "f": 1234567}
    kinds = {"a": "bytes", "b": "seconds", "c": "share", "d": "change", "e": "bytes", "f": "count"}
    cells = [render.cell(row, structure.Column(key, key, unit)) for key, unit in kinds.items()]  # type: ignore[arg-type]
    assert cells == ["1.5 GB", "12.3 ms", "25.0%", "+10.0% [−5.0%, +20.0%]", "", "1,234,567"]


# ---- --json ------------------------------------------------------------------------------------------


def test_collect_prints_the_answer_as_json_and_nothing_else(collect_command: Callable[..., Any]) -> None:
    from tests.analysis.test_collect import write

    write("a", 8, 0.5)
    write("b", 16, 0.7)
    write("c", 8, 0.6, place="other")
    code, out, err = collect_command("--no-plots", "--json", "default")
    assert code == 0
    held = json.loads(Path("multirun/default/answer.json").read_text())
    assert {key: value for key, value in json.loads(out).items() if key != "created_at"} == {
        key: value for key, value in held.items() if key != "created_at"
    }
    assert "wrote multirun/default/RESULTS.md" in err
    _, out, _ = collect_command("--no-plots", "--json")
    assert [one["study"] for one in json.loads(out)] == ["default", "other"]
    _, out, _ = collect_command("--no-plots", "--json", "default", "--where", "config.method.r < 10")
    assert section(json.loads(out), "use")["facts"]["configuration"] == "lora, r=8"
    _, out, _ = collect_command("--status", "--json", "default")
    assert json.loads(out)["trials"] == {"success": 2}


def test_a_dry_run_prints_its_plan_as_json_and_nothing_else(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = command("method.r=2", "--json")
    assert (code, out) == (2, "")
    assert "--json: only with dry_run=true" in err
    code, out, _ = command("method.r=2,8", "dry_run=true", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == ["lora, r=2", "lora, r=8"]
    assert json.loads(out) == json.loads(Path("multirun/default/plan.json").read_text())


# ---- what a search decided, and what was kept --------------------------------------------------------


def judged_on_rows(right: Sequence[int], seeds: int = 3) -> list[dict[str, Any]]:
    """Finalists and their base, of which each row of the base is known; of ranks 8, 16 ..."""
    (STUDY / "base").mkdir(parents=True, exist_ok=True)
    lines = [{"prompt": str(n), "answer": "x", "correct": n < BASE_RIGHT} for n in range(100)]
    record.write_lines(STUDY / "base" / "task.jsonl", lines)
    stderr = math.sqrt(BASE_RIGHT * (100 - BASE_RIGHT) / 99) / 100
    base: dict[str, Any] = {
        "base_accuracy.value": BASE_RIGHT / 100,
        "base_accuracy.stderr": stderr,
        "base_accuracy.n": 100,
    }
    base |= {"base_predictions": "base/task.jsonl"}
    return [row | {f"eval_info.task.{key}": value for key, value in base.items()} for row in ranks(*right, seeds=seeds)]


BASE_RIGHT = 60


def tuned(rows: Sequence[dict[str, Any]]) -> Decision:
    """What a tuning decides of finalists with these rows, written into its file as sweep=tune does."""
    finals: dict[str, dict[int, Judged]] = {}
    for row in rows:
        right = round(row["eval_info.task.accuracy.value"] * 100)
        base = BaseScore("base/task.jsonl", BASE_RIGHT / 100, row["eval_info.task.base_accuracy.stderr"], 100, [
            {"prompt": str(n), "answer": "x", "correct": n < BASE_RIGHT} for n in range(100)
        ])  # fmt: skip
        lines = [{"prompt": str(n), "answer": "x", "correct": n < right} for n in range(100)]
        one = Judged(row["run_info.trial"], right / 100, row["eval_info.task.accuracy.stderr"], 100, lines, base)
        finals.setdefault(f"r{row['config.method.r']}", {})[row["config.seed"]] = one
    order = sorted(finals, key=lambda name: -sum(one.value for one in finals[name].values()))
    column = "eval_info.task.accuracy.value"
    found = tuning_decision.tuned_decision(
        column, finals, order, {name: f"lora, lr=0.001, {name}" for name in finals}, []
    )
    found = dataclasses.replace(found, not_tried=["lora: r=64"])
    facts = {"lines": [tuning_decision.sentence(found), "not tried of lora: r=64"], "command": ["sweep=tune"]}
    record.write_json(STUDY / "tune.json", facts | {"decision": tuning_decision.facts(found)})
    return found


# In the fast tier a gain and what may be chance; of the third the base is the better one.
@pytest.mark.parametrize(
    ("right", "verdict"),
    [((66, 80), "use"), ((58, 62), "none"), pytest.param((40, 45), "none", marks=pytest.mark.slow)],
)
def test_a_tuning_and_the_report_test_the_gain_over_the_base_alike(right: tuple[int, int], verdict: str) -> None:
    rows = judged_on_rows(right)
    found = tuned(rows)
    general = answer_alone(*rows)
    assert found.base is not None
    held = section(general, "certainty")["facts"]["scores"][0]["base"]
    for key in ("value", "gain", "low", "high", "p"):
        assert getattr(found.base, key) == pytest.approx(held[key]), key
    assert found.verdict == verdict
    assert tuning_decision.sentence(found).startswith("Use " if verdict == "use" else "No gain shown by ")


def test_what_a_tuning_decided_comes_first_and_nothing_contradicts_it() -> None:
    rows = judged_on_rows((80, 81))
    assert section(answer_alone(*rows), "use")["facts"]["configuration"] == "lora, r=8"  # the smaller one of a tie
    decided = tuned(rows)
    held, text = answered(*rows)
    use, search = section(held, "use")["facts"], section(held, "tune")
    assert [part["name"] for part in held["sections"]][:3] == ["use", "tune", "certainty"]
    assert (use["configuration"], use["decided_by"]) == ("lora, r=16", "tune")  # the best mean, as it decided
    assert use["trials"] == search["facts"]["trials"] == ["t3", "t4", "t5"]
    assert search["sentences"] == [tuning_decision.sentence(decided), "not tried of lora: r=64"]
    assert search["facts"]["not_tried"] == ["lora: r=64"]
    assert search["facts"]["command"] == "peftsweep sweep=tune"
    assert "chose it, over 3 seeds; it is not told apart from r8; the untouched base scores 0.600, against it: " in text
    jsonschema.Draft202012Validator(structure.schema()).validate(held)


@pytest.mark.parametrize(
    ("first", "second", "verdict", "sentence"),
    [  # in the fast tier a rival that was not beaten, and one that was
        ("r16", "r8", "tie", "; it is a tie with r8; the untouched"),
        pytest.param("r8", "r16", "open", "; it is not told apart from r8; the untouched", marks=pytest.mark.slow),
        pytest.param("r16", "r8", "better", "3 seeds; the untouched", marks=pytest.mark.slow),
        ("r8", "r16", "worse", "3 seeds; the untouched"),
    ],
)
def test_what_a_tuning_chose_is_said_with_the_rivals_it_did_not_beat(
    first: str, second: str, verdict: Any, sentence: str
) -> None:
    rows = judged_on_rows((80, 81))
    decided = dataclasses.replace(
        tuned(rows), between=[structure.Between(first, second, 0.01, -0.02, 0.04, 3, verdict)]
    )
    record.write_json(STUDY / "tune.json", {"lines": ["Use x"], "decision": tuning_decision.facts(decided)})
    assert sentence in section(answer_alone(*rows), "use")["sentences"][0]


def test_where_a_tuning_shows_no_gain_nothing_is_recommended() -> None:
    rows = judged_on_rows((58, 62))
    tuned(rows)
    held, text = answered(*rows)
    use = section(held, "use")
    assert (use["facts"]["verdict"], use["facts"]["needs"], use["facts"]["decided_by"]) == ("none", [], "tune")
    assert use["sentences"][0].startswith("Use none of these: the best that sweep=tune found, lora, r=16, is not shown")
    assert "**Use `" not in text
    assert "## Recommendations" not in text


def test_trials_that_a_tuning_did_not_judge_may_say_more() -> None:
    rows = judged_on_rows((66, 70, 95))
    decided = tuned([row for row in rows if row["config.method.r"] < 32])
    use = section(answer_alone(*rows), "use")
    assert (use["facts"]["configuration"], use["facts"]["decided_by"]) == ("lora, r=32", None)
    assert use["sentences"][0].endswith(
        "(sweep=tune, which did not judge all of these trials, "
        f"{'decided for' if decided.verdict == 'use' else 'had shown no gain by'} lora, r=16.)"
    )


def test_a_choice_by_validation_alone_is_called_so() -> None:
    stopped = {"run_info.status": "stopped", "eval_info.task.accuracy.value": None}
    rows = [row | stopped for row in ranks(40, 80, seeds=1)]
    rows = [{key: value for key, value in row.items() if "eval_info" not in key} for row in rows]
    facts = tuning_decision.facts(Decision(None, "by validation", "lora, lr=0.001, r=16", ["t1"], "validation_loss"))
    record.write_json(STUDY / "tune.json", {"lines": ["By validation alone: x."], "decision": facts})
    held = answer_alone(*rows)
    use = section(held, "use")
    assert (use["facts"]["verdict"], use["facts"]["configuration"]) == ("by validation", "lora, r=16")
    assert use["sentences"][0].startswith("Use lora, r=16, by validation alone: ")
    jsonschema.Draft202012Validator(structure.schema()).validate(held)


def test_a_file_of_an_earlier_version_has_its_sentences_alone() -> None:
    rows = ranks(40, 80)
    record.write_json(
        STUDY / "tune.json", {"lines": ["Use lora, lr=0.1_0: task *accuracy* 0.8."], "command": ["a=b c"]}
    )
    held = answer_alone(*rows)
    found = section(held, "tune")
    assert found["sentences"] == ["Use lora, lr=0.1_0: task *accuracy* 0.8."]
    assert (found["facts"]["verdict"], found["facts"]["command"]) == (None, "peftsweep 'a=b c'")
    assert section(held, "use")["facts"]["decided_by"] is None


def test_the_placebo_of_a_league_is_part_of_how_sure_it_is() -> None:
    placebo = structure.Placebo("lora", 7, 9, "tie", 0.02, None)
    finalist = structure.Finalist("dora", "dora, lr=0.001", 0.8, ["t3"], 1)
    found = Decision(None, "ranked", finalist.configuration, ["t3"], "c", [finalist], placebo=placebo)
    record.write_json(STUDY / "league.json", {"lines": ["1. dora"], "decision": tuning_decision.facts(found)})
    held = answer_alone(*ranks(40, 80))
    sure = section(held, "certainty")
    assert sure["facts"]["placebo"] == dataclasses.asdict(placebo)
    assert sure["sentences"][-1].startswith("What luck is worth: lora under another name won 7 of 9 pairs of seeds")
    assert section(held, "league")["facts"]["finalists"] == [dataclasses.asdict(finalist)]
    jsonschema.Draft202012Validator(structure.schema()).validate(held)


@pytest.mark.parametrize("other", [1, 2])
def test_the_advice_beside_a_league_names_what_the_league_does_not_tell_apart(other: int) -> None:
    """A report counts the placebo's seeds as its method's, so that it may tell more apart than the league does."""
    finalists = [
        structure.Finalist(name, f"{name}, r={rank}", 0.8, trials, place)
        for name, rank, trials, place in (("lora", 16, ["t3", "t4"], 1), ("ia3", 8, ["t0", "t1"], other))
    ]
    found = Decision(None, "ranked", finalists[0].configuration, finalists[0].trials, "c", finalists)
    record.write_json(STUDY / "league.json", {"lines": ["1. lora"], "decision": tuning_decision.facts(found)})
    sentence = section(answer_alone(*ranks(40, 80)), "use")["sentences"][0]
    beside = "(sweep=league, over 2 seeds of each, does not tell apart: lora, ia3.)"
    assert sentence.endswith(beside) == (other == 1)
    assert ("league" in sentence) == (other == 1)


def test_what_was_kept_is_in_all_four_outputs() -> None:
    curve = [{"scale": 0.5, "eval": "task", "role": "target", "metric": "accuracy", "value": 0.79, "stderr": 0.02}]
    old = {"eval": "old", "role": "retention", "metric": "perplexity", "stderr": 0.1}
    curve += [{"scale": scale, "value": value} | old for scale, value in ((0.25, 5.1), (0.5, 5.3))]
    scales = {"train_info.scales": json.dumps(curve), "eval_info.old.perplexity.value": 7.0}
    rows = [row | (scales if row["run_info.trial"] == "t1" else {}) for row in ranks(40, 80, seeds=1)]
    held, text, answer = reported(*rows)
    found = section(held, "retention")
    (sentence,), (trial_,) = found["sentences"], found["facts"]["trials"]
    assert trial_["keeps_most"] == {"old": 0.5}
    assert [point["scale"] for point in trial_["curves"][1]["points"]] == [0.25, 0.5, 1.0]
    assert trial_["curves"][1]["better"] == "lower"
    half = next(row for row in found["tables"][0]["rows"] if row["scale"] == 0.5)
    assert half["old perplexity (retention)"] == 5.3
    assert half["old perplexity (retention).high"] == pytest.approx(5.3 + 1.96 * 0.1, abs=1e-3)
    table = pd.DataFrame(rows).convert_dtypes()
    opened = page.write(table, tables.steps(table), STUDY, predictions(STUDY), answer).read_text(encoding="utf-8")
    assert "  " + sentence in render.lines(answer)
    assert sentence in render.plain(text)
    assert "5.300 [5.104, 5.496]" in text
    assert "5.300 [5.104, 5.496]" in opened
    assert sentence in html.unescape(opened)
    jsonschema.Draft202012Validator(structure.schema()).validate(held)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method.r=8", "train.eval_every=10", "halving.min_steps=10", "halving.rung=2", "force=false"], True),
        (["method.r=8", "halving.min_steps=10", "halving.rung=1"], True),
        (["method.r=8", "halving.resource=rows", "halving.min_fraction=0.1", "dataset.fraction=0.1"], False),
    ],
)
def test_the_command_of_a_trial_of_a_search_trains_it_without_the_search(words: list[str], told: bool) -> None:
    """A search validates at its rungs: with as many steps between validations the trial is the same one."""
    kept = STUDY / "t0" / ".hydra" / "overrides.yaml"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(words), encoding="utf-8")
    command = build.command(STUDY / "t0")
    assert command == ("peftsweep method.r=8 train.eval_every=10" if told else f"peftsweep {' '.join(words)}")
