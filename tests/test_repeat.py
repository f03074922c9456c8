"""A trial run again from its record, and what is said of the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsweep import repeat
from peftsweep.record import Result, read_json, write_json
from tests.conftest import SMALL, scores

Run = Callable[..., Result]
Command = Callable[..., tuple[int, str, str]]


def made(
    name: str = "before", accuracy: float = 0.5, loss: float = 1.25, status: str = "success", **meta: Any
) -> Result:
    """A record on a CPU."""
    folder = Path("multirun/default") / name
    result = Result(
        run_info={"trial": name, "labels": [name], "study": "default", "status": status, "created_at": "2026-01-01"}
        | {"error": None if status == "success" else {"type": "E", "message": "m", "stage": "train"}},
        choices={"method": "lora"},
        config={"seed": 0, "device": "auto", "train": {"steps": 4}},
        train_info={"final_loss": loss, "train_seconds": 2.0, "steps": 4},
        memory={"train": {"rss_peak": 10**9}},
        eval_info={"task": {"accuracy": {"value": accuracy, "stderr": 0.03, "n": 200}}},
        meta_info={"packages": {"torch": {"version": "2.13.0"}}, "torch": {"gpus": [], "threads": 2}} | meta,
    )
    result.write(folder)
    (folder / "steps.jsonl").write_text(f'{{"step": 2, "loss": 2.0}}\n{{"step": 4, "loss": {loss}}}\n')
    return result


def test_the_same_numbers_are_equal_to_the_bit() -> None:
    found = repeat.compare(made(), made("after"))
    assert (found.equal, found.same, found.changed) == (True, True, {})
    assert found.lines()[0] == "changed: nothing; the same versions, device and code"
    assert found.lines()[-1] == "equal to the bit: 3 figures, 2 logged losses"


def test_on_a_cpu_with_the_same_versions_any_difference_counts() -> None:
    found = repeat.compare(made(), made("after", loss=1.2500001))
    assert not found.same
    assert found.lines()[-1] == "not the same: on a CPU with the same versions every bit should be"
    assert "logged losses: different from step 4 on" in found.lines()
    changed_code = made("after", accuracy=0.505)
    changed_code.run_info["git_commit"] = "abc"
    found = repeat.compare(made(), changed_code)
    assert "changed: run_info.git_commit: not recorded -> abc" in found.lines()
    assert not found.same  # as changed code is what is to be found out


@pytest.mark.parametrize(
    "meta",
    [
        {"packages": {"torch": {"version": "2.14.0"}}},
        {"torch": {"gpus": [], "threads": 4}},
        {"torch": {"gpus": ["NVIDIA L40S"], "threads": 2}},
        {"packages": {}},  # a record of an older version
    ],
)
def test_other_versions_or_devices_may_differ_by_two_standard_errors(meta: dict[str, Any]) -> None:
    close = repeat.compare(made(), made("after", accuracy=0.55, loss=1.3, **meta))
    assert close.same
    assert not close.equal
    assert close.changed
    assert "task.accuracy: 0.5 -> 0.55 (+0.05, 1.2 standard errors)" in close.lines()
    assert close.lines()[-1] == "the same within 2 standard errors, not to the bit"
    far = repeat.compare(made(), made("after", accuracy=0.6, **meta))
    assert not far.same
    assert far.lines()[-1] == "not the same: task.accuracy by more than 2 standard errors"


def test_two_runs_on_a_gpu_need_not_agree_to_the_bit() -> None:
    gpu: dict[str, Any] = {"torch": {"gpus": ["NVIDIA L40S"], "threads": 2}}
    found = repeat.compare(made(**gpu), made("after", accuracy=0.505, **gpu))
    assert (found.same, found.equal, found.changed) == (True, False, {})


def test_a_score_that_is_gone_and_another_end_are_not_the_same() -> None:
    without = made("after")
    without.eval_info = {}
    found = repeat.compare(made(), without)
    assert not found.same
    assert "task.accuracy: 0.5 -> not recorded" in found.lines()
    found = repeat.compare(made(), made("after", status="failed"))
    assert not found.same
    assert found.lines()[-1] == "not the same: success before, failed now"


def test_a_trial_is_run_again_from_its_record_alone(run_small: Run, command: Command) -> None:
    words = [
        "quant=4bit",
        "method=ia3",
        "+train.optimizer_kwargs.amsgrad=true",
        "seed=3",
        "label=mine",
        "study=one",
    ]
    before = run_small(
        *words, "eval=[tiny_math,perplexity]", "eval.tiny_math.samples=6", "dataset.prompt='Q {question}'"
    )
    assert before.folder is not None
    original = (before.folder / "result.json").read_bytes()
    code, out, err = command(f"repeat={before.folder}")
    assert (code, err) == (0, "")
    [place] = Path("multirun/one-repeat").glob("*/result.json")
    after = Result.read(place.parent)
    assert after.run_info["identity"] == before.run_info["identity"]
    assert after.choices == before.choices
    assert scores(after) == scores(before)
    assert "equal to the bit: " in out
    assert "and the adapter's weights" in out
    assert read_json(place.parent / repeat.FILE)["equal_to_the_bit"] is True
    assert (before.folder / "result.json").read_bytes() == original

    content = json.loads(original)  # the check can fail: a record that says something else
    content["eval_info"]["perplexity"]["perplexity"]["value"] += 1e-9
    del content["config"]["train"]["compile_dynamic"], content["config"]["adapter"]  # as of an older version
    content["config"]["train"]["of_another_version"] = 1
    write_json(before.folder / "result.json", content)
    code, out, _ = command(f"repeat={before.folder}")
    assert code == 1
    assert "not the same: on a CPU with the same versions every bit should be" in out
    assert "changed: config.adapter.save: not recorded -> True" in out
    assert "changed: config.train.of_another_version: 1 -> not recorded" in out


@pytest.mark.slow
def test_what_the_command_says_beats_the_record(run_small: Run, command: Command) -> None:
    before = run_small("train=none")
    code, _, _ = command(
        f"repeat={before.folder}", "study=mine", "eval.tiny_math.samples=4", "dry_run=true", "seed=1,2"
    )
    assert code == 0
    plan = read_json(Path("multirun/mine/plan.json"))
    assert [row["label"][-2:] for row in plan] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "repeat=gone: no folder of a trial; it holds no result.json"),
        ("{", "repeat=gone: gone/result.json: JSONDecodeError"),
        ('{"schema_version": 99}', "repeat=gone: gone/result.json: written by a later version of peftsweep"),
        ("imported", "repeat=gone: not a trial of peftsweep but read from theirs.json"),
        ("held", "study=default holds the original, which is kept; take another"),
    ],
)
def test_a_bad_folder_is_one_line(content: str | None, problem: str, command: Command) -> None:
    Path("gone").mkdir()
    words = ["repeat=gone"]
    if content == "imported":
        result = made()
        result.run_info["imported_from"] = "theirs.json"
        result.write(Path("gone"))
    elif content == "held":
        made()
        words = ["repeat=multirun/default/before", "study=default"]
    elif content is not None:
        Path("gone/result.json").write_text(content)
    code, _, err = command(*words, *SMALL)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err
