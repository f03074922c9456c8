"""result.json."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from peftsweep.study import record
from peftsweep.study.record import Result, Status


def result() -> Result:
    about = {"trial": "t", "status": "success", "labels": ["t"], "study": "s", "created_at": record.now()}
    return Result(about, {}, {"a": [1, {"b": None}]}, train_info={"loss": math.nan})


def test_a_record_comes_back(tmp_path: Path) -> None:
    result().write(tmp_path)
    again = Result.read(tmp_path)
    assert (again.trial, again.status, again.config) == ("t", Status.success, {"a": [1, {"b": None}]})
    assert again.train_info == {"loss": None}  # JSON has no NaN
    assert again.folder == tmp_path


def test_a_writer_that_dies_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result().write(tmp_path)
    before = (tmp_path / "result.json").read_bytes()

    def die(*_: object) -> None:
        raise OSError("power")

    monkeypatch.setattr(os, "replace", die)
    changed = result()
    changed.config = {"other": 1}
    with pytest.raises(OSError, match="power"):
        changed.write(tmp_path)
    assert (tmp_path / "result.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_the_stamp_has_versions_and_of_the_environment_only_what_chooses_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    stamp = json.dumps(record.environment())
    assert "hf_secret" not in stamp
    assert record.environment()["torch"]["kernel_switches"]["MKL_CBWR"] == "COMPATIBLE"  # which changes sums
    assert record.environment()["torch"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert record.environment()["packages"]["torch"]["version"]


@pytest.mark.parametrize(
    ("status", "done", "good"),
    [
        ("success", True, True),
        ("refused", True, True),
        ("stopped", True, True),
        ("oom", True, False),
        ("failed", False, False),
        ("cancelled", False, False),
    ],
)
def test_what_a_status_means_for_a_rerun_and_the_exit_code(status: str, done: bool, good: bool) -> None:
    assert (Status(status).done, Status(status).good) == (done, good)
