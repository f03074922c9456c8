"""Studies of the first version: this one reads them, goes on with them and scores their adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import peftsweep
from peftsweep import cli
from tests.conftest import SMALL, records

Command = Callable[..., tuple[int, str, str]]
FIRST = Path(__file__).parents[1] / "fixtures" / "first_version"
STUDIES = {
    "ranks": ["method.r=2,4", "seed=0,1", *SMALL],
    "classifier": [
        *("model.task=seq_cls", "dataset=tiny_direction", "method.r=2", "train.steps=4", "dataset.samples=64"),
        *("train.batch_size=4", "eval.tiny_direction.samples=8"),
    ],
    "pack": ["method.r=2,4", "quant=4bit", *SMALL],
    "points": ["--config-dir", str(FIRST / "mine"), "point=glob(*)", *SMALL],
}


@pytest.fixture(autouse=True)
def first_version(scratch: Path) -> None:
    shutil.copytree(FIRST / "multirun", scratch / "multirun")


@pytest.mark.parametrize("study", STUDIES)
def test_trials_of_the_first_version_are_done(study: str, command: Command) -> None:
    code, out, _ = command(*STUDIES[study], f"study={study}", "dry_run=true")
    assert code == 0
    plan = json.loads(Path("multirun", study, "plan.json").read_text())
    assert {row["trial"]: row["state"] for row in plan} == dict.fromkeys(records(study), "success")
    assert f"{len(plan)} trial{'s' * (len(plan) > 1)}, 0 new" in out


@pytest.mark.parametrize("study", STUDIES)
def test_studies_of_the_first_version_are_tables(study: str) -> None:
    table = peftsweep.load(study)
    assert set(table["run_info.trial"]) == set(records(study))
    assert set(table["run_info.status"]) == {"success"}
    for result in records(study).values():
        row = table[table["run_info.trial"] == result.trial].iloc[0]
        assert row["train_info.final_loss"] == result.train_info["final_loss"]
        assert row["config.seed"] == result.config["seed"]


@pytest.mark.parametrize("study", ["ranks", "classifier", pytest.param("pack", marks=pytest.mark.slow)])
def test_adapters_of_the_first_version_score_as_recorded(study: str) -> None:
    trial = next(iter(records(study).values()))
    name = "tiny_direction" if study == "classifier" else "perplexity"
    words = STUDIES[study][1:4] if study == "classifier" else []
    again = cli.run_one(
        [
            f"adapter.path=multirun/{study}/{trial.trial}",
            f"eval=[{name}]",
            f"eval.{name}.samples=8",
            "study=again",
            "device=cpu",
            *words,
        ]
    )
    assert again.status.name == "success", again.error
    scores = {
        key: found for key, found in trial.eval_info[name].items() if isinstance(found, dict) and "value" in found
    }
    assert scores
    for key, before in scores.items():
        assert again.eval_info[name][key]["value"] == pytest.approx(before["value"], rel=1e-4), key
