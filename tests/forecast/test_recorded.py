"""What a trial notes of its time as it runs: what was predicted of it, what was measured, its FLOPs and their share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftsweep.forecast import duration, history, speed, timing
from peftsweep.study import store
from peftsweep.study.record import Result
from peftsweep.trial import foreseen

RunSmall = Callable[..., Result]
PLANNED = {"decided_by": "speed", "train_seconds": 123.0, "uncorrected_train_seconds": 120.0}


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> speed.Device:
    """A device whose speed is kept on the disk, as an earlier dry run left it; nothing is measured."""
    kept = speed.Speed({"float32": 1e10, "bfloat16": 2e10}, 1e9, 1e-6, lap_seconds=1e-3)
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [1e-3] * 4)
    monkeypatch.setattr(speed.Device, "kept", lambda self: dataclasses.replace(kept))
    monkeypatch.setattr(speed, "measure", lambda meter: pytest.fail("a trial measured its device"))
    monkeypatch.setattr(speed.Meter, "operation", lambda self, one: pytest.fail("a trial timed an operation"))
    device = speed.Device(torch.device("cpu"), folder=tmp_path / "speed")
    monkeypatch.setattr(timing, "device_of", lambda where, threads: device)
    return device


def test_a_trial_records_what_was_predicted_and_what_it_took(run_small: RunSmall, known: speed.Device) -> None:
    """A product of an adapted layer takes 2 FLOPs a weight and token forward and 2 backward to what lies before it."""
    found = run_small("model.dtype=float32")
    info, about = found.train_info, found.meta_info[history.SECTION]
    predicted = info["predicted"]
    assert predicted["decided_by"] == "speed"
    for kind in ("load", "train", "save"):
        low, middle, high = (predicted[f"{kind}_seconds{end}"] for end in ("_low", "", "_high"))
        assert 0 < low < middle < high
    assert about["device"] == known.key
    assert len(about["shape"]) > 0
    # Of every weight of a linear layer at least a forward and a backward product, of each token that is not padding.
    linear = info["base_parameters"] - info["coverage"]["roles"]["embeddings"]["weights"]
    assert 4 * linear * info["tokens"] * 0.8 < info["flops"] < 4 * 3 * linear * info["tokens"]
    assert info["mfu"] == pytest.approx(info["flops"] / 1e10 / info["train_seconds"])  # of 1e10 FLOPs a second
    known_of_it = history.of([found], known.key)
    each = info["train_seconds"] / info["steps"]
    assert known_of_it.steps == {about["shape"]: [history.Steps(info["train_seconds"], info["steps"], each)]}
    assert set(known_of_it.ratios) >= {"load", "train", "save"}


def test_what_the_plan_said_of_the_trial_on_this_device_stands_in_its_record(
    run_unwritten: RunSmall, known: speed.Device
) -> None:
    words = ["train.steps=2", "method.r=2"]
    before = run_unwritten(*words, "study=unplanned")
    for study, device in (("here", known.key), ("elsewhere", "another")):
        row = {"trial": before.run_info["trial"], "predicted_device": device, "predicted": PLANNED}
        store.folder(study).mkdir(parents=True)
        (store.folder(study) / store.PLAN).write_text(json.dumps([row]), encoding="utf-8")
    here, elsewhere = (
        run_unwritten(*words, f"study={study}").train_info["predicted"] for study in ("here", "elsewhere")
    )
    assert here == PLANNED
    assert elsewhere["train_seconds"] == before.train_info["predicted"]["train_seconds"]


def test_without_a_speed_nothing_is_predicted_and_the_flops_are_counted_all_the_same(
    run_unwritten: RunSmall, known: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.Device, "kept", lambda self: None)
    found = run_unwritten("train.steps=2")
    assert "predicted" not in found.train_info
    assert "mfu" not in found.train_info
    assert found.train_info["flops"] > 0
    assert found.meta_info[history.SECTION]["device"] == known.key


def test_what_fails_in_predicting_is_no_failure_of_the_trial(
    run_unwritten: RunSmall, known: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no formula")

    monkeypatch.setattr(duration, "estimate", broken)
    found = run_unwritten("train.steps=2")
    assert found.run_info["status"] == "success"
    assert not {"predicted", "flops", "mfu"} & set(found.train_info)


def test_flops_and_their_share_are_of_the_steps_that_were_taken(known: speed.Device) -> None:
    """5 of 20 steps of 8e10 FLOPs together are 2e10: 2 s at 1e10 a second, half of the 4 s that they took."""
    result = Result({"status": "stopped"}, {}, {}, train_info={"steps": 5, "train_seconds": 4.0})
    foreseen.count_flops(result, {"float32": 8e10}, 20, torch.device("cpu"))
    assert result.train_info["flops"] == 20_000_000_000
    assert result.train_info["mfu"] == pytest.approx(0.5)
