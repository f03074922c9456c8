"""What a command took beside its trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftsweep.study import owner, record, sweep_record
from peftsweep.study.record import Result
from tests.conftest import SMALL, records

Command = Callable[..., tuple[int, str, str]]


def ended(seconds: float) -> Result:
    return Result({"status": "success", "total_seconds": seconds}, {}, {})


def test_seconds_in_which_no_trial_runs_are_counted_once_however_many_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    sweep_record.command_begins()
    clock[0] = 103.0  # imports
    kept = sweep_record.SweepRecord(tmp_path, ["method.r=8,16"], 2)
    for now, seconds in ((110.0, 5.0), (112.0, 6.0), (120.0, 2.0)):  # 105 to 110, 106 to 112, 118 to 120
        clock[0] = now
        kept.add(ended(seconds))
    clock[0] = 121.0
    kept.write()
    (file,) = (tmp_path / "sweeps").glob("*.json")
    found = record.read_json(file)
    assert found["seconds"] == 21.0
    assert found["seconds_in_trials"] == 9.0
    assert found["seconds_outside_trials"] == 12.0
    assert (found["seconds_before_trials"], found["seconds_between_trials"]) == (5.0, 6.0)
    assert found["trials"] == {"success": 3}
    assert found["workers"] == 2
    assert sweep_record.last(tmp_path) == found


def test_a_sweep_leaves_its_record_and_one_that_had_nothing_to_do_none(command: Command) -> None:
    Path("mine").mkdir()
    words = ["--config-dir", "mine", *SMALL, "method.r=2,4", "eval=[perplexity]"]
    assert command(*(word for word in words if "tiny_math" not in word))[0] == 0
    assert command(*(word for word in words if "tiny_math" not in word))[0] == 0
    (file,) = Path("multirun/default/sweeps").glob("*.json")
    found = record.read_json(file)
    assert found["trials"] == {"success": 2}
    assert found["command"][0] == "--config-dir=mine"  # without which the others might not be understood
    assert "method.r=2,4" in found["command"]
    assert found["seconds_in_trials"] <= sum(one.run_info["total_seconds"] for one in records().values()) + 1e-6
    assert 0 < found["seconds_outside_trials"] < found["seconds"]


def test_commands_of_two_containers_with_one_number_in_one_second_keep_a_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260101-120000")
    for machine in ("a", "b"):
        monkeypatch.setattr(owner, "_machine_tag", lambda machine=machine: machine)
        kept = sweep_record.SweepRecord(tmp_path, ["method.r=8,16"], 2)
        kept.add(ended(1.0))
        kept.write()
    assert len([*(tmp_path / "sweeps").glob("*.json")]) == 2
