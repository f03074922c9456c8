"""The command: sweeps, reruns, dry runs, exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from peftsweep import cli
from peftsweep.config.compose import Trial
from peftsweep.study import atomic
from peftsweep.study.record import Result, Status
from peftsweep.trial import done, outcome, task
from tests.conftest import ALL_TARGETS, SMALL, UNWRITTEN, records, scores, start, wait_for

Command = Callable[..., tuple[int, str, str]]


def test_a_sweep_trains_every_point_once_and_a_rerun_none(command: Command) -> None:
    words = [*UNWRITTEN, "train.steps=2", "method.r=2", "quant=none,4bit", "-m"]
    code, out, _ = command(*words)
    assert code == 0
    assert "[2/2] lora, 4bit\n" in out
    assert out.splitlines()[-1] == "2 trials: 2 success  (multirun/default)"
    before = {name: result.run_info["created_at"] for name, result in records().items()}
    code, out, _ = command(*words)
    assert code == 0
    assert sum(line.startswith("done before: ") for line in out.splitlines()) == 2
    assert {name: result.run_info["created_at"] for name, result in records().items()} == before


def test_a_command_with_force_that_was_cut_off_goes_on_and_one_that_ended_begins_anew(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def at_once(trial: Trial, place: Path, observer: Any) -> Result:
        result = outcome.begin(trial, place)
        result.run_info |= {"status": "success", "error": None, "total_seconds": 1.0}
        result.train_info = {"trainable_parameters": 1, "total_parameters": 1, "steps": 1, "train_seconds": 1.0}
        result.write(place)
        ran.append(trial.config.method["r"])
        return result

    monkeypatch.setattr(task, "_run_claimed", at_once)
    words = [*UNWRITTEN, "method.r=2,4,8", "force=true"]
    assert command(*words, "hydra.launcher.workers=0", "hydra.launcher.limit=2")[0] == 3
    code, out, _ = command(*words, "dry_run=true")
    assert (code, out.splitlines()[-1].partition(";")[0]) == (0, "3 trials, 1 new")
    code, out, _ = command(*words)
    assert (code, ran) == (0, [2, 4, 8])
    assert "trials that it has forced are not run once more" in out
    code, out, _ = command(*words)
    assert (code, ran) == (0, [2, 4, 8] * 2)
    assert "run once more" not in out


def test_a_call_from_python_with_force_that_was_cut_off_goes_on_and_one_that_ended_begins_anew(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    anew: list[bool] = []

    def begun(trial: Trial, place: Path, observer: Any) -> Result:
        anew.append(done.anew(trial))
        result = outcome.begin(trial, place)
        if len(anew) < 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(task, "_run_claimed", begun)
    words = [*UNWRITTEN, "force=true"]
    for number in range(4):
        with pytest.raises(KeyboardInterrupt) if number < 2 else contextlib.nullcontext():
            cli.run_one(words)
    assert anew == [True, False, False, True]
    assert "goes on with the same command of " in capfd.readouterr().err


def test_a_failing_trial_does_not_stop_the_others(command: Command, fails_at_rank: Callable[[int], None]) -> None:
    fails_at_rank(4)
    words = [*UNWRITTEN, "train.steps=1", "eval.perplexity.samples=1", "method.r=4,2"]
    code, out, err = command(*words)
    assert code == 1
    assert "failed in train: RuntimeError: broken" in out
    assert out.splitlines()[-1] == "2 trials: 1 success, 1 failed  (multirun/default)"
    assert err == ""
    assert sorted(result.status.name for result in records().values()) == ["failed", "success"]
    code, out, _ = command(*words, "study=stop", "stop_on_failure=true")
    assert code == 1
    assert out.splitlines()[-1] == "1 trial: 1 failed, 1 not run  (multirun/stop)"
    fails_at_rank(0)  # none any more
    code, out, _ = command(*words)
    assert (code, out.count("done before")) == (0, 1)


def test_points_with_one_identity_are_trained_once_under_both_labels(command: Command) -> None:
    code, out, _ = command(*UNWRITTEN, "label=one,two")
    assert code == 0
    assert "[1/1]" in out
    (result,) = records().values()
    assert result.run_info["labels"] == ["one", "two"]


def test_a_dry_run_lists_and_trains_nothing(command: Command, trained: Callable[..., Result]) -> None:
    trained("method.r=2")
    words = [*SMALL, "method.r=2,4", "dry_run=true"]
    code, out, _ = command(*words)
    assert code == 0
    plan = json.loads(Path("multirun/default/plan.json").read_text())
    assert [row["state"] for row in plan] == ["success", "new"]
    assert plan[0]["trial"] in records()
    assert plan[1]["trainable_parameters"] == 2 * plan[0]["trainable_parameters"] == 40_960
    assert "2 trials, 1 new; nothing was trained" in out
    assert len(records()) == 1
    assert records()[plan[0]["trial"]].train_info["trainable_parameters"] == plan[0]["trainable_parameters"]


def test_a_dry_run_from_python_trains_nothing(run_small: Callable[..., Result], trained: Callable[..., Result]) -> None:
    planned = run_small("dry_run=true")
    assert planned.status is Status.planned
    assert planned.train_info["trainable_parameters"] == 81_920
    assert Path("multirun/default/plan.json").is_file()
    assert not list(Path("multirun/default").glob("*/"))
    trained()
    assert run_small("dry_run=true").status is Status.success


def test_quiet_prints_one_line(command: Command) -> None:
    _, out, err = command(*UNWRITTEN, "quiet=true")
    assert (out.count("\n"), err) == (1, "")


def test_refused_is_done_and_no_failure(command: Command) -> None:
    code, out, _ = command(*ALL_TARGETS, "method=full", "quant=4bit,none")
    assert code == 0
    assert "refused: full fine-tuning cannot train quantised weights" in out
    assert out.splitlines()[-1] == "2 trials: 1 success, 1 refused  (multirun/default)"


@pytest.mark.parametrize("launcher", ["basic"])
def test_stock_launchers_run_and_resume_too(launcher: str, command: Command) -> None:
    words = [*UNWRITTEN, "train.steps=2", "method.r=2", f"hydra/launcher={launcher}", "-m"]
    assert command(*words, "hydra.job.chdir=true")[0] == 0  # paths are relative to where the command runs all the same
    assert len(records()) == 1
    assert not list(Path("multirun/.hydra").rglob("result.json"))
    code, out, _ = command(*words)
    assert (code, out.count("done before")) == (0, 1)


@pytest.mark.slow  # starts a command; the fast tier interrupts one in this process (test_workers.py), goes on from what
# an interrupt left (training/test_checkpoint.py), and sends a signal to a command that imports (test_workers.py)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_continues_to_the_undisturbed_result(end: signal.Signals, command: Command) -> None:
    words = [*UNWRITTEN, "train.steps=4,40"]
    process = start(*words)
    assert wait_for(lambda: list(Path("multirun/default").glob("*/result.json")), process)
    assert wait_for(lambda: len(list(Path("multirun/default").glob("*/steps.jsonl"))) == 2, process)
    process.send_signal(end)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err == "interrupted; the same command continues\n"
    assert sorted(result.status.name for result in records().values()) == ["cancelled", "success"]
    code, out, _ = command(*words)
    assert (code, out.count("done before")) == (0, 1)
    command(*words, "study=undisturbed")
    assert {name: scores(result) for name, result in records().items()} == {
        name: scores(result) for name, result in records("undisturbed").items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["hydra.launcher.workers=1", "hydra.launcher.workers=0"])
def test_a_command_that_ignores_ctrl_c_is_ended_by_other_signals_as_well(place: str, end: signal.Signals) -> None:
    """As one that was started with nohup, or in the background of a script."""
    words = [*SMALL, "train.steps=2000", "train.checkpoint_every=100000", place]
    code = "from peftsweep import cli; cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN),
    )
    assert wait_for(lambda: [f for f in Path("multirun/default").glob("*/steps.jsonl") if f.stat().st_size], process)
    os.killpg(process.pid, end) if end is signal.SIGHUP else process.send_signal(end)
    _, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (130, "interrupted; the same command continues\n")
    (result,) = records().values()
    assert result.status is Status.cancelled
    assert result.folder is not None
    assert len(list(result.folder.glob("checkpoints/step-*.pt"))) == 1


def contents() -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in Path("multirun/default").rglob("*") if file.is_file()}


# One is enough in the fast tier, as all are caught in one place.
OTHER_ERRORS = [pytest.param(number, marks=pytest.mark.slow) for number in (errno.EROFS, errno.EIO)]


@pytest.mark.parametrize("number", [errno.ENOSPC, *OTHER_ERRORS])
def test_a_study_that_cannot_be_written_is_one_line_and_keeps_what_it_holds(
    number: int, command: Command, trained: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("method.r=2")
    before = contents()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "multirun/default/x")

    with monkeypatch.context() as context:
        context.setattr(atomic, "sync", full)
        code, _, err = command(*SMALL, "method.r=2,4")
    assert (code, err.count("\n")) == (2, 1)
    assert f"multirun/default/x: {os.strerror(number)}; finished trials are kept" in err
    assert (
        before.items()
        <= {file: file.read_bytes() for file in Path("multirun/default").rglob("*") if file.is_file()}.items()
    )
    assert command(*SMALL, "method.r=2,4")[0] == 0
    assert len(records()) == 2


def test_a_record_of_a_later_version_is_one_line_and_not_overwritten(
    command: Command, trained: Callable[..., Result]
) -> None:
    trained()
    (file,) = Path("multirun/default").glob("*/result.json")
    file.write_text(later := file.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    code, out, err = command(*SMALL)
    assert (code, out) == (2, "")
    assert "written by a later version of peftsweep; use another study=" in err
    assert file.read_text() == later


def test_a_record_that_was_cut_off_is_run_again(command: Command, trained: Callable[..., Result]) -> None:
    trained()
    (file,) = Path("multirun/default").glob("*/result.json")
    whole = Result.read(file.parent)
    file.write_text(file.read_text()[:200])
    assert command(*SMALL)[0] == 0
    assert scores(Result.read(file.parent)) == scores(whole)
