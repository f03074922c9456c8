"""The grids of conf/sweep and the named points of conf/point."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from peftsweep import cli, trial
from peftsweep.config import Trial, conf_dir

Compose = Callable[..., Trial]
Command = Callable[..., tuple[int, str, str]]

CONF = Path(conf_dir())
SMALL = ["model=tiny", "dataset=tiny_math"]
COMPARISON = {  # what PEFT's comparison trains with unless an experiment says otherwise
    "batch_size": 4,
    "steps": 5000,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 0.1,
    "clip": 1.0,
}
SWEEPS = (
    "distilbert_sst2",
    "hira_baselines",
    "methods",
    "module_ablation",
    "peft_comparison",
    "quant_study",
    "rank_ablation",
)
LACKING = 2  # of the 71 experiments: a prefix from a text, OSF (autocast_adapter_dtype=false)
POINTS = sorted(f"{file.parent.name}/{file.stem}" for file in (CONF / "point").glob("*/*.yaml"))
POINTS = [point for point in POINTS if not point.startswith("base/")]


def swept(point: str) -> str:
    """The word with which a sweep names a point: a folder of points is a group of its own."""
    folder, _, name = point.partition("/")
    return f"+point/{folder}={name}"


def said(point: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONF / "point" / f"{point}.yaml"))


def plan(command: Command, *words: str) -> list[dict[str, Any]]:
    """What ``dry_run=true`` writes for the words."""
    code, _, err = command(*words, "dry_run=true", "quiet=true")
    assert (code, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(Path("multirun/default/plan.json").read_text(encoding="utf-8"))
    return rows


def test_every_sweep_is_known_here() -> None:
    assert {file.stem for file in (CONF / "sweep").glob("*.yaml")} == set(SWEEPS)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes_validates_and_names_its_points(name: str, compose: Compose) -> None:
    compose(f"sweep={name}", *SMALL)
    params = cli.compose([f"sweep={name}", *SMALL]).hydra.sweeper.params
    assert all(isinstance(values, str) for values in params.values())
    (key, values), *others = params.items()
    assert others == []
    group = CONF / key.removeprefix("+")
    options = [file.stem for file in group.glob("*.yaml")] if values == "glob(*)" else values.split(",")
    assert len(options) >= 3
    if group.is_dir():  # else a key, such as method.r
        assert set(options) <= {file.stem for file in group.glob("*.yaml")}


@pytest.mark.parametrize("point", POINTS)
def test_every_point_is_its_label_its_method_and_its_training(point: str, compose: Compose) -> None:
    one = compose(*SMALL, swept(point))
    assert one.label == said(point)["label"]
    assert one.tree["method"] == said(point).get("method", {})  # and no field of another method
    recipe = COMPARISON if point.startswith("peft_comparison/") else {}
    expected = recipe | said(point).get("train", {})
    assert {key: one.tree["train"][key] for key in expected} == expected
    assert one.config.train.optimizer_kwargs == expected.get("optimizer_kwargs", {})


def test_the_points_of_the_comparison_carry_the_names_of_its_experiments() -> None:
    points = [point for point in POINTS if point.startswith("peft_comparison/")]
    labels = [said(point)["label"] for point in points]
    assert len(set(labels)) == len(labels) == 71 - LACKING
    for point, label in zip(points, labels, strict=True):
        file = re.sub(r"[^a-z0-9_.-]+", "-", label.lower().replace("/", "--"))
        assert point == f"peft_comparison/{file}"


def test_the_command_line_wins_over_a_point_and_over_a_sweep(compose: Compose) -> None:
    words = ["train.learning_rate=0.5", "train.steps=7", "method.r=3", "seed=5", "label=mine"]
    point = swept("peft_comparison/lora--llama-3.2-3b-rank64")
    for one in (compose(*SMALL, point, *words), compose("sweep=peft_comparison", *SMALL, *words, point)):
        train = one.config.train
        assert (train.learning_rate, train.steps, one.config.method["r"]) == (0.5, 7, 3)
        assert (one.config.seed, one.label) == (5, "mine")
        assert (one.choices["model"], one.choices["dataset"]) == ("tiny", "tiny_math")
    assert compose(swept("hira/lora"), *SMALL).config.seed == 36
    assert compose(swept("hira/lora"), *SMALL, "seed=5").config.seed == 5


def test_the_comparison_brings_its_model_and_its_data() -> None:
    cfg = cli.compose(["sweep=peft_comparison", "model.init=random"])
    assert (cfg.model.name_or_path, cfg.model.dtype.name) == ("meta-llama/Llama-3.2-3B", "bfloat16")
    assert (cfg.model.init.name, cfg.dataset.name, cfg.dataset.max_length) == ("random", "metamath", 768)
    assert list(cfg.eval) == ["gsm8k"]


def test_the_ranks_become_five_trials(command: Command) -> None:
    rows = plan(command, "sweep=rank_ablation", *SMALL)
    counts = [row["trainable_parameters"] for row in rows]
    assert [row["label"].split("-")[1:5] for row in rows] == [
        ["lora", f"r{rank}", "qkvo", "4bit"] for rank in (4, 8, 16, 32, 64)
    ]
    assert counts == [counts[0] * factor for factor in (1, 2, 4, 8, 16)]


def test_the_command_line_replaces_the_values_of_a_grid(command: Command) -> None:
    rows = plan(command, "sweep=rank_ablation", *SMALL, "method.r=2,3", "quant=none")
    assert [row["label"].split("-")[2:5] for row in rows] == [[f"r{rank}", "qkvo", "none"] for rank in (2, 3)]


def test_a_sweep_of_points_carries_their_labels(command: Command) -> None:
    rows = plan(command, "sweep=hira_baselines", *SMALL)
    assert [row["label"] for row in rows] == ["full", "hira", "ia3", "lora"]
    few = "+point/peft_comparison=glob([lora--*, full*], exclude=*rank64*)"  # the sweep's own key, so it replaces it
    rows = plan(command, "sweep=peft_comparison", *SMALL, few)
    assert {"lora/llama-3.2-3B-rank32", "full-finetuning/llama-3.2-3B-lr_0.00001"} < {row["label"] for row in rows}
    assert len({row["trial"] for row in rows}) == len(rows) == 9


@pytest.mark.parametrize(
    "name",
    [
        "boft--llama-3.2-3b-default",
        "ln_tuning--llama-3.2-3b-default",
        "lora--llama-3.2-3b-rank14-target-mlp-bdlora",
        "lora--llama-3.2-3b-rank32-kasa",
        "prefixtuning--llama-3.2-3b-lr_0.001",
        "vera--llama-3.2-3b-default",
    ],
)
def test_a_point_attaches_to_any_model_with_its_modules(name: str, compose: Compose) -> None:
    assert (trial.check(compose(*SMALL, swept(f"peft_comparison/{name}"))).trainable_parameters or 0) > 0
