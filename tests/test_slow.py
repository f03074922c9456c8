"""The dearer tier: what the embedded model promises, and real rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats

import peftsweep
from peftsweep.study.record import Result

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]
ACCURACY = "eval_info.tiny_math.accuracy.value"
BASE = "eval_info.tiny_math.base_accuracy.value"


def test_every_seed_and_quantisation_learns_the_task_at_rank_32(command: Command) -> None:
    assert command("method.r=32", "quant=none,8bit,4bit", "seed=0,1,2", "adapter.save=false")[0] == 0
    table = peftsweep.load()
    print(table[["choices.quant", "config.seed", ACCURACY, BASE, "run_info.total_seconds"]].to_string())
    assert len(table) == 9
    assert table[ACCURACY].min() >= 0.8
    assert table[BASE].max() <= 0.05


def test_accuracy_rises_with_the_rank(command: Command) -> None:
    assert command("method.r=1,8,32", "quant=4bit", "seed=0,1,2", "adapter.save=false")[0] == 0
    means = peftsweep.load().groupby("config.method.r")[ACCURACY].mean()
    print(means)
    assert means[1] < means[8] - 0.1
    assert means[8] < means[32] - 0.1


def test_accuracy_rises_with_the_modules(command: Command) -> None:
    assert command("method.r=32", "targets=q,qv,qkvo,all_linear", "adapter.save=false")[0] == 0
    assert command("method.r=1", "targets=qv", "seed=0,1,2", "study=least", "adapter.save=false")[0] == 0
    means = peftsweep.load().set_index("choices.targets")[ACCURACY]
    print(means)
    assert means["q"] < means["qv"] < means["qkvo"] < means["all_linear"] + 0.05
    assert means["qv"] < means["all_linear"] - 0.1
    assert peftsweep.load("least")[ACCURACY].max() <= 0.05


def test_other_methods_learn_too(command: Command) -> None:
    assert command("method=full,ia3", "adapter.save=false")[0] == 0
    means = peftsweep.load().set_index("choices.method")[ACCURACY]
    print(means)
    assert means["full"] > 0.6
    assert means["ia3"] > 0.1


@pytest.fixture
def gsm8k() -> Path:
    """Real rows, where PEFTSWEEP_DATA says they are."""
    folder = Path(os.environ.get("PEFTSWEEP_DATA", "")) / "gsm8k"
    if not (folder / "train.jsonl").is_file():
        pytest.skip("PEFTSWEEP_DATA names no folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    return folder


def test_a_rank_sweep_on_gsm8k_lowers_the_perplexity(command: Command, gsm8k: Path) -> None:
    words = ["dataset=gsm8k", f"dataset.path={gsm8k / 'train.jsonl'}", f"dataset.test_path={gsm8k / 'test.jsonl'}"]
    words += ["dataset.samples=500", "quant=4bit", "eval=perplexity", "eval.perplexity.samples=100"]
    assert command(*words, "train.steps=60", "method.r=2,8,32")[0] == 0
    table = peftsweep.load()
    before, after = (table[f"eval_info.perplexity.{kind}perplexity.value"] for kind in ("base_", ""))
    print(table[["config.method.r", "eval_info.perplexity.base_perplexity.value"]].assign(after=after).to_string())
    assert len(table) == 3
    assert (after < before / 10).all()


ENCODER, DATA = os.environ.get("PEFTSWEEP_ENCODER", ""), os.environ.get("PEFTSWEEP_DATA", "")


@pytest.mark.skipif(not ENCODER or not DATA, reason="PEFTSWEEP_ENCODER names a pretrained encoder, PEFTSWEEP_DATA rows")
def test_a_pretrained_encoder_learns_sentiment(command: Command) -> None:
    words = ["sweep=distilbert_sst2", "model=encoder", f"model.name_or_path={ENCODER}", "dataset.samples=3000"]
    words += [f"dataset.path={DATA}/sst2/train.tsv", f"dataset.test_path={DATA}/sst2/validation.tsv"]
    assert command(*words, "quiet=true")[0] == 0
    table = peftsweep.load()
    accuracy = "eval_info.sst2.accuracy.value"
    shown = ["run_info.labels", "config.seed", accuracy, "eval_info.sst2.f1.value", "train_info.train_seconds"]
    print(table[shown].to_string())
    assert len(table) == 9
    assert table["train_info.reloads"].all()
    by_label = table.groupby(["choices.method", "choices.quant"])[accuracy]
    spread = by_label.sem() * scipy.stats.t.ppf(0.975, 2)  # the 95% interval of a mean of three
    print(by_label.mean().to_frame("mean").assign(interval=spread).to_string())
    first = table[(table["config.seed"] == 0)].set_index(["choices.method", "choices.quant"])[accuracy]
    assert first["lora", "none"] >= 0.8
    assert by_label.mean().min() >= 0.78


@pytest.mark.skipif(not DATA, reason="PEFTSWEEP_DATA names the rows")
def test_the_commonsense_tasks_are_judged_in_every_way_beside_their_majority(command: Command) -> None:
    folder = Path(DATA) / "commonsense"
    names = {"boolq": 0.6217, "arc_easy": 0.2664, "openbookqa": 0.2760, "social_i_qa": 0.3362}
    words = ["dataset=commonsense_170k", f"dataset.path={folder}/commonsense_17k.jsonl", "dataset.samples=2000"]
    words += [f"eval=[{','.join(f'{name}_170k' for name in names)}]"]
    for name in names:
        words += [f"eval.{name}_170k.path={folder}/{name}_test.jsonl", f"eval.{name}_170k.max_new_tokens=24"]
        words += [f"eval.{name}_170k.batch_size=64"]
    assert command(*words, "train.epochs=1", "train.steps=0", "method.r=8")[0] == 0
    (result,) = [Result.read(file.parent) for file in Path("multirun/default").glob("*/result.json")]
    for name, majority in names.items():
        found = result.eval_info[f"{name}_170k"]
        print(
            name,
            {metric: score["value"] for metric, score in found.items() if isinstance(score, dict) and "n" in score},
        )
        assert found["majority"] == pytest.approx(majority, abs=5e-5)
        wanted = {"accuracy", "valid_fraction", "label_acc", "base_accuracy", "base_label_acc"}
        assert wanted | ({"choice_acc", "choice_acc_norm"} if name != "boolq" else set()) <= set(found)


def test_an_adapter_costs_time_in_generation_and_a_merged_one_does_not(command: Command) -> None:
    words = ["train=quick", "inference=standard", "inference.runs=20", "inference.samples=2"]
    assert command(*words, "inference.categories.long=null", "inference.batch_sizes=[1]", "eval=[perplexity]")[0] == 0
    table = peftsweep.load()
    found = {}
    for variant in ("adapted", "merged"):
        ends = (table[f"generation_info.overall.{variant}.overhead.{end}"][0] for end in ("low", "value", "high"))
        found[variant] = tuple(round(float(end) - 1, 4) for end in ends)
    print("overhead over the base, 95% interval:", found)
    assert found["adapted"][0] > 0
    assert found["merged"][0] <= 0.01  # 0 lies in the interval, or within a hundredth of it
    assert found["merged"][2] >= -0.01


def test_inductor_is_compared_with_eager_for_full_lora_and_qlora(command: Command) -> None:
    assert command("sweep=compile_study", "train.steps=60", "eval=[perplexity]", "adapter.save=false")[0] == 0
    table = peftsweep.load()
    gains = ["train_info.compile_speed_up", "train_info.compile_break_even_step", "train_info.compile_seconds"]
    counts = ["train_info.compile_graphs", "train_info.compile_graph_breaks", "train_info.compile_recompiles"]
    compiled = table[table["config.train.compile"] == "inductor"].set_index(["choices.method", "choices.quant"])
    print(compiled[gains + counts].to_string())
    assert len(compiled) == 3
    assert (compiled["train_info.compile_graph_breaks"] == 0).all()
    eager = table[table["config.train.compile"] == "none"].set_index(["choices.method", "choices.quant"])
    losses = pd.concat([compiled["train_info.final_loss"], eager["train_info.final_loss"]], axis=1, keys=["c", "e"])
    assert ((losses["c"] / losses["e"] - 1).abs() < 0.05).all()
