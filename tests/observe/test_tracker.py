from __future__ import annotations

import inspect
import json
import logging
import os
import pydoc
import random
import sqlite3
import struct
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from omegaconf import OmegaConf

import peftsweep
from peftsweep.errors import InputError
from peftsweep.observe import tracker
from peftsweep.observe.display import Observer

CONF = Path(peftsweep.__file__).parents[2] / "conf" / "tracker"
TOOLS = ["tensorboard", "wandb", "mlflow", "trackio"]
ROWS: list[dict[str, Any]] = [
    {"step": 10, "steps": 20, "loss": 0.5, "memory_allocated": None},
    {"step": 20, "steps": 20, "loss": 0.25, "memory_allocated": None},
    {"step": 20, "steps": 20, "validation_loss": 0.75},
]


class Heard(Observer):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def stage(self, name: str) -> None:
        self.told.append(name)

    def step(self, row: dict[str, Any]) -> None:
        self.told.append(row)


class Broken:
    """A tool that raises where it is told to."""

    name = "broken"

    def __init__(self, where: str) -> None:
        self.where = where
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.where:
            raise ConnectionError(f"no {name}")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("store_init_configuration")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")


def trial(make: Callable[[], Any], observer: Observer | None = None) -> None:
    told = tracker.Tracker(observer or Observer())
    told.start(make, {"method.r": 8, "quant": None, "targets": ["q", "v"], "train.learning_rate": 1e-3})
    told.stage("train")
    for row in ROWS:
        told.step(row)
    told.end({"eval_info.sst2.accuracy.value": 0.875, "note": "x"}, "success")


def tool(name: str, folder: Path, trial_name: str = "lora-s0") -> Callable[[], Any]:
    return partial(getattr(tracker, name), folder=folder / "tracker", name=trial_name, study="ranks")


def needs(package: str) -> None:
    """Skip without importing: trackio reads its folder as it is imported."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


# ---- any tool --------------------------------------------------------------------------------------


def test_without_a_tool_the_observer_is_told_as_before() -> None:
    heard = Heard()
    told = tracker.Tracker(heard)
    told.stage("load")
    told.step(ROWS[0])
    told.end({}, "success")
    assert heard.told == ["load", ROWS[0]]


@pytest.mark.parametrize("where", ["make", "start", "store_init_configuration", "log", "finish"])
def test_a_tool_that_raises_is_dropped_with_one_warning_and_the_trial_goes_on(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard, broken = Heard(), Broken(where)

    def make() -> Broken:
        broken._call("make")
        return broken

    trial(make, heard)
    assert heard.told == ["train", *ROWS]
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"the tracker is dropped, the trial goes on: ConnectionError: no {where}"
    ]
    assert broken.calls.count(where) == (2 if where == "finish" else 1)
    assert where == "make" or broken.calls[-1] == "finish"


def test_what_a_tool_prints_goes_to_the_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Talkative(Broken):
        def start(self) -> None:
            print("see https://example.org")

    caplog.set_level(logging.INFO)
    trial(lambda: Talkative("nowhere"))
    assert capsys.readouterr().out == ""
    assert "see https://example.org" in caplog.text


def test_the_process_state_heeds_no_launcher_and_keeps_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    trial(lambda: Broken("nowhere"))
    assert PartialState().num_processes == 1
    assert not torch.distributed.is_initialized()
    assert dict(os.environ) == before


@pytest.mark.gpu
def test_a_tracker_leaves_the_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("tensorboard")
    monkeypatch.setattr(PartialState, "_shared_state", {})
    device, allocated = torch.cuda.current_device(), torch.cuda.memory_allocated()
    trial(tool("tensorboard", tmp_path))
    assert (torch.cuda.current_device(), torch.cuda.memory_allocated()) == (device, allocated)
    assert torch.zeros(1, device="cuda").device.index == device


# ---- what conf/tracker names -----------------------------------------------------------------------


def test_there_is_a_yaml_for_each_tool_and_one_for_none() -> None:
    assert sorted(file.stem for file in CONF.glob("*.yaml")) == sorted([*TOOLS, "none"])
    assert OmegaConf.load(CONF / "none.yaml") == {}


@pytest.mark.parametrize("name", TOOLS)
def test_a_yaml_names_every_option_of_its_function_with_its_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    options: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    function: Any = pydoc.locate(options.pop("_target_"))
    assert function is getattr(tracker, name)
    defaults = {key: p.default for key, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    assert options == defaults


def test_wandb_is_offline_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    node = OmegaConf.load(CONF / "wandb.yaml")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert node.mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert node.mode == "online"


@pytest.mark.parametrize("name", TOOLS)
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError) as error:
        tracker.check(f"peftsweep.observe.tracker.{name}")
    assert str(error.value) == f"tracker={name}: needs the package {name}; pip install 'peftsweep[{name}]'"


def test_a_folder_of_a_package_s_name_does_not_pass_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fancytool").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="needs the package fancytool"):
        tracker.check("peftsweep.observe.tracker.fancytool")


def test_a_tracker_of_the_user_s_own_is_not_looked_for() -> None:
    tracker.check("mine.tracker")


# ---- the tools -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_draws_no_random_numbers_and_writes_only_below_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needs(name)
    if name == "trackio":
        pytest.skip("keeps to one folder a process, that of the test below")
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("WANDB_CACHE_DIR", raising=False)
    monkeypatch.chdir(here)
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    trial(tool(name, Path("multirun")))
    assert random.getstate() == before[0]
    assert str(np.random.get_state(legacy=False)) == str(before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [path.name for path in here.iterdir()] == ["multirun"]
    assert not [path for path in home.rglob("*") if path.is_file()]
    assert capfd.readouterr().out == ""


def test_tensorboard_reads_the_numbers_back(tmp_path: Path) -> None:
    needs("tensorboard")
    trial(tool("tensorboard", tmp_path))
    events = tensorboard_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(20, 0.75)]
    assert events.Scalars("eval_info.sst2.accuracy.value")[0].value == 0.875
    assert events.Tensors("status/text_summary")[0].tensor_proto.string_val == [b"success"]
    assert "memory_allocated" not in events.Tags()["scalars"]


def test_a_trial_run_again_replaces_its_lines_in_tensorboard(tmp_path: Path) -> None:
    needs("tensorboard")
    trial(tool("tensorboard", tmp_path))
    trial(tool("tensorboard", tmp_path))
    assert [event.step for event in tensorboard_events(tmp_path).Scalars("loss")] == [10, 20]


def tensorboard_events(folder: Path) -> Any:
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tracker" / "tensorboard" / "lora-s0"))
    events.Reload()
    return events


def test_wandb_reads_the_numbers_back(tmp_path: Path) -> None:
    needs("wandb")
    trial(tool("wandb", tmp_path))
    import_module("wandb").teardown()  # its own process writes on after a run's end
    (file,) = (tmp_path / "tracker" / "wandb").glob("offline-run-*/*.wandb")
    history: dict[str, list[str]] = {}
    config: dict[str, str] = {}
    for record in wandb_records(file):
        for item in record.history.item:
            history.setdefault(item.key or ".".join(item.nested_key), []).append(item.value_json)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or ".".join(update.nested_key)] = update.value_json
    assert history["loss"] == ["0.5", "0.25"]
    assert history["validation_loss"] == ["0.75"]
    assert history["eval_info.sst2.accuracy.value"] == ["0.875"]
    assert history["status"] == ['"success"']
    assert config["method.r"] == "8"


def wandb_records(file: Path) -> list[Any]:
    """A short .wandb file: a header of 7 bytes, then LevelDB's log format (checksum, length, type, record)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, records = file.read_bytes(), 7, []
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1, "a record in several parts"
        records.append(Record.FromString(data[place + 7 : place + 7 + length]))
        place += 7 + length
    return records


def test_mlflow_reads_the_numbers_back(tmp_path: Path) -> None:
    needs("mlflow")
    trial(tool("mlflow", tmp_path))
    client = import_module("mlflow").MlflowClient(f"sqlite:///{tmp_path / 'tracker' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ranks")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "lora-s0"
    assert run.data.params["method.r"] == "8"
    assert run.data.tags["status"] == "success"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(10, 0.5), (20, 0.25)]
    assert run.data.metrics["eval_info.sst2.accuracy.value"] == 0.875


def test_a_trial_that_breaks_mlflow_leaves_no_run_open_for_the_next(tmp_path: Path) -> None:
    needs("mlflow")
    told = tracker.Tracker(Observer())
    told.start(tool("mlflow", tmp_path), {"a name mlflow refuses: \N{SNOWMAN}": 1})
    assert import_module("mlflow").active_run() is None


def test_trackio_reads_the_numbers_back_and_says_when_it_cannot_move(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    needs("trackio")
    state = torch.get_rng_state()
    trial(tool("trackio", tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    with sqlite3.connect(tmp_path / "tracker" / "trackio" / "ranks.db") as database:
        query = "select step, metrics from metrics where run_name = 'lora-s0' order by id"
        rows = [(step, json.loads(metrics)) for step, metrics in database.execute(query)]
    assert rows == [
        (10, {"steps": 20, "loss": 0.5}),
        (20, {"steps": 20, "loss": 0.25}),
        (20, {"steps": 20, "validation_loss": 0.75}),
        (20, {"eval_info.sst2.accuracy.value": 0.875}),
        (20, {"status": "success"}),
    ]
    trial(tool("trackio", tmp_path / "another"))
    assert f"trackio writes to {tmp_path / 'tracker' / 'trackio'}" in caplog.text
    assert not (tmp_path / "another" / "tracker" / "trackio").exists()
    assert capfd.readouterr().out == ""
