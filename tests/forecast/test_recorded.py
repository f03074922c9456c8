"""What a trial notes of its time as it runs: what was predicted of it, what was measured, its FLOPs and their share."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.data.batches import batch_order, micro_batches
from peftsweep.forecast import duration, history, speed, timing
from peftsweep.study import store
from peftsweep.study.record import Result
from peftsweep.sweep import pack
from peftsweep.training import length
from peftsweep.trial import foreseen
from tests.conftest import UNWRITTEN

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
    monkeypatch.setattr(timing, "device_of", lambda *_: device)
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


@pytest.mark.slow  # three trials; a record holds what was predicted in the test above too
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


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.accumulation=3", "seed=1"],
        ["train.checkpointing=true"],
        pytest.param(["quant=4bit", "method.r=32"], marks=pytest.mark.slow),
    ],
)
def test_the_flops_of_a_lora_training_are_those_by_hand(
    words: list[str], compose: Callable[..., Trial], known: speed.Device
) -> None:
    """Of each real batch, which is padded to its longest row; the first products' inputs need no gradient."""
    trial = compose("dataset.samples=64", "train.steps=5", "train.batch_size=4", *words)
    config, rank = trial.config.train, int(trial.config.method["r"])
    assert trial.rows is not None
    rows = build.training_tokens(trial, build.load_tokenizer(trial), trial.rows.train)
    hidden, inner, layers, vocabulary = 128, 384, 4, 533  # of the embedded model
    base, ends = layers * (4 * hidden**2 + 3 * hidden * inner), layers * (4 * 2 * hidden + 3 * (hidden + inner))
    total = 0
    order = batch_order([len(row.ids) for row in rows], length.rows_per_step(config), trial.config.seed)
    for numbers in itertools.chain.from_iterable(
        itertools.islice(micro_batches(order, config.batch_size), config.steps)
    ):
        batch = [rows[number] for number in numbers]
        longest = max(len(row.ids) for row in batch)
        tokens, answers = len(batch) * longest, sum(row.answer_tokens for row in batch)
        attention = 2 * len(batch) * longest**2 * hidden * layers  # one product of all heads
        forward = 2 * tokens * (base + rank * ends) + 2 * attention
        inputs = 2 * tokens * (base - 3 * hidden**2 + rank * (ends - 3 * hidden))  # their gradients, but for q, k, v
        total += forward + inputs + 2 * tokens * rank * ends + 5 * attention + 2 * (2 * answers * hidden * vocabulary)
        total += forward if config.checkpointing else 0
    found = duration.estimate(trial, known, None, rows, timed=False, probe=False)
    assert found.flops == pytest.approx(total, rel=0.01)  # the prediction is of batches of mean size


def test_a_trial_in_a_pack_has_the_flops_of_the_trial_alone(compose: Callable[..., Trial], known: speed.Device) -> None:
    trials = [compose(*UNWRITTEN, "train.steps=2", f"method.r={rank}") for rank in (2, 8)]
    for trial, result in zip(trials, pack.run(trials), strict=True):
        assert result.train_info["packed"]["lanes"] == 2
        alone = duration.estimate(trial, known, timed=False, probe=False).flops
        assert result.train_info["flops"] == pytest.approx(alone, rel=1e-6)
        assert "mfu" not in result.train_info


def test_flops_and_their_share_are_of_the_steps_that_were_taken(known: speed.Device) -> None:
    """5 of 20 steps of 8e10 FLOPs together are 2e10: 2 s at 1e10 a second, half of the 4 s that they took."""
    result = Result({"status": "stopped"}, {}, {}, train_info={"steps": 5, "train_seconds": 4.0})
    foreseen.count_flops(result, {"float32": 8e10}, 20, torch.device("cpu"))
    assert result.train_info["flops"] == 20_000_000_000
    assert result.train_info["mfu"] == pytest.approx(0.5)
