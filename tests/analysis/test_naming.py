"""A name tells what differs, and no more."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from peftsweep.analysis.statistics import effects, trials
from peftsweep.analysis.table import columns, naming
from peftsweep.config.compose import Trial
from peftsweep.study import record
from peftsweep.study.record import Result
from tests.conftest import SMALL

Command = Callable[..., tuple[int, str, str]]


def tree(choices: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """What a trial's record holds of it."""
    return {"choices": {"model": "causal_lm", "method": "lora", "quant": "none"} | (choices or {}), "config": config}


@pytest.mark.parametrize(
    ("trees", "names"),
    [
        ([tree(method={"r": r, "lora_alpha": 2 * r}) for r in (8, 16)], ["lora, r=8", "lora, r=16"]),
        ([tree(train={"learning_rate": rate}) for rate in (1e-3, 2e-5)], ["lora, lr=0.001", "lora, lr=2e-05"]),
        (
            [tree(model={"name_or_path": f"/models/meta/llama-{size}"}) for size in ("1b", "3b")],
            ["lora, model=llama-1b", "lora, model=llama-3b"],
        ),
        (
            [tree(dataset={"path": f"/home/me/data/{name}.jsonl"}) for name in ("alpaca", "dolly")],
            ["lora, path=alpaca.jsonl", "lora, path=dolly.jsonl"],
        ),
        (
            [tree(dataset={"path": f"/home/me/data/{name}/train.jsonl"}) for name in ("v1", "v2")],
            ["lora, path=v1/train.jsonl", "lora, path=v2/train.jsonl"],
        ),
        (
            [tree(eval={"gsm8k": {"prompt": prompt}}) for prompt in ("Q: {q}", "{q}\nA:")],
            ["lora, eval.gsm8k.prompt=Q: {q}", "lora, eval.gsm8k.prompt={q}\\nA:"],
        ),
        ([tree(label=name, method={"r": r}) for r, name in enumerate("ab")], ["a", "b"]),
        (
            [tree(label=name, method={"r": 8}, train={"steps": steps}) for name in "ab" for steps in (1, 2)],
            ["a, steps=1", "a, steps=2", "b, steps=1", "b, steps=2"],
        ),
        ([tree(label="a"), tree(label=None), tree({"method": "dora"}, label=None)], ["a", "lora", "dora"]),
        ([tree(label="a"), tree({"method": "dora"}, label=None)], ["a", "dora"]),
        ([tree(label="a")], ["a"]),
        ([tree({"quant": quant}, seed=seed) for quant in ("none", "4bit") for seed in (0, 1)], None),
        (
            [tree(targets={"roles": roles}) for roles in (["q", "v"], ["q"], None)],
            ["lora, roles=q+v", "lora, roles=q", "lora"],
        ),
        (
            [tree(train={"optimizer": name}) for name in ("torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit")],
            ["lora, optimizer=AdamW", "lora, optimizer=AdamW8bit"],
        ),
        ([tree(train={"learning_rate": rate}) for rate in (0.00012345678, 0.00012345679)], None),
        (
            [tree(dataset={"path": "a"}, eval={"x": {"path": x}}) for x in "bc"],
            ["lora, eval.x.path=b", "lora, eval.x.path=c"],
        ),
        ([tree(inference={"batch": size}) for size in (1, 2)], ["lora, batch=1", "lora, batch=2"]),
        ([tree(device=device) for device in ("cpu", "cuda")], ["lora, device=cpu", "lora, device=cuda"]),
    ],
)
def test_a_name_holds_what_differs_and_nothing_else(trees: list[dict[str, Any]], names: list[str] | None) -> None:
    found = naming.trial_names(trees)
    assert names is None or found == names
    assert len(set(found)) == len(trees)


def test_long_prompts_are_told_by_where_they_differ() -> None:
    start = "Answer the following question as briefly as you can, with a number and nothing else. "
    texts = [start + "Question: {q}", start + "Problem: {q}"]
    found = naming.trial_names([tree(dataset={"prompt": text}) for text in texts])
    assert len(set(found)) == 2
    assert max(map(len, found)) < 60
    assert ("Question" in found[0], "Problem" in found[1]) == (True, True)


def test_no_two_of_a_thousand_random_configurations_have_one_name() -> None:
    draw = np.random.default_rng(0)
    choices = {"method": ["lora", "dora"], "quant": ["none", "4bit", "8bit"], "model": ["causal_lm", "tiny"]}
    long = "word " * 30
    settings: dict[tuple[str, str], list[Any]] = {
        ("method", "r"): [4, 8, None],
        ("train", "learning_rate"): [1e-4, 0.0001000001, 3e-4],
        ("model", "name_or_path"): ["/a/b", "/c/b", "tiny"],
        ("dataset", "prompt"): ["{q}", "{q} ", long + "a" + long, long + "b" + long],
        ("targets", "roles"): [["q"], ["q", "v"], "q+v"],
    }
    for _ in range(20):
        trees = {}
        for _ in range(50):
            config: dict[str, Any] = {"seed": int(draw.integers(2))}
            for (group, key), values in settings.items():
                config.setdefault(group, {})[key] = values[draw.integers(len(values))]
            one = tree({key: str(draw.choice(values)) for key, values in choices.items()}, **config)
            trees[str(one)] = one
        assert len(set(naming.trial_names(list(trees.values())))) == len(trees)


def test_a_table_of_records_names_trials_as_the_sweep_did() -> None:
    trees = [
        tree(
            {"quant": quant},
            seed=seed,
            method={"r": 8},
            train={"learning_rate": rate, "epochs": 1.0},
            dataset={"path": None},
        )
        for quant, rate, seed in itertools.product(("none", "4bit"), (1e-3, 1e-4), (0, 1))
    ]
    table = pd.DataFrame([record.flat({"choices": one["choices"], "config": one["config"]}) for one in trees])
    assert columns.named_trials(table.convert_dtypes()) == naming.trial_names(trees)


def test_configurations_of_several_models_have_names_that_tell_the_model() -> None:
    rows = [
        {
            "run_info.trial": f"{model}{r}",
            "run_info.status": "success",
            "choices.model": "causal_lm",
            "choices.method": "lora",
            "config.model.name_or_path": f"/models/{model}",
            "config.method.r": r,
        }
        for model in ("one", "two")
        for r in (8, 16)
    ]
    tasks = trials.tasks(pd.DataFrame(rows).convert_dtypes())
    assert list(tasks) == ["causal_lm on dataset (model=one)", "causal_lm on dataset (model=two)"]
    names = [name for part in tasks.values() for name in effects.labels(part)]
    assert names == ["lora, r=8, model=one", "lora, r=16, model=one", "lora, r=8, model=two", "lora, r=16, model=two"]


def test_names_that_are_cut_stay_different() -> None:
    names = pd.Series([f"lora, {'long ' * 20}{n}{' end' * 20}" for n in range(3)])
    found = columns.shortened(names)
    assert found.nunique() == 3
    assert found.str.len().max() <= columns.LONGEST + 3


def test_two_learning_rates_have_two_names_in_the_dry_run_also_of_a_second_command(
    command: Command, compose: Callable[..., Trial]
) -> None:
    code, out, _ = command(*SMALL, "train.learning_rate=1e-3,1e-4", "dry_run=true")
    lines = out.splitlines()
    assert (code, [line.split("  ")[0] for line in lines[:2]]) == (0, ["lora, lr=0.001", "lora, lr=0.0001"])
    plan = record.read_json(Path("multirun/default/plan.json"))
    assert [row["name"] for row in plan] == ["lora, lr=0.001", "lora, lr=0.0001"]
    known = compose(*SMALL, "train.learning_rate=1e-4")
    about = {"trial": "x", "labels": ["x"], "study": "default", "status": "success", "identity": known.identity}
    Result(about | {"created_at": record.now()}, known.choices, known.tree).write(Path("multirun/default/x"))
    _, out, _ = command(*SMALL, "train.learning_rate=1e-3", "dry_run=true")
    assert out.startswith("lora, lr=0.001  ")
