"""Result files of PEFT's comparison, read and written.

PEFTSWEEP_PEFT names a checkout of huggingface/peft, whose own processing then reads ours and whose results we read.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import peftsweep
from peftsweep.analysis import interchange
from peftsweep.study import record
from peftsweep.study.record import Result
from tests.analysis.test_collect import Collect, collect_command, write

__all__ = ["collect_command"]  # the fixture

PEFT = os.environ.get("PEFTSWEEP_PEFT")
needs_peft = pytest.mark.skipif(not PEFT, reason="PEFTSWEEP_PEFT names no checkout of PEFT")
# A file in their layout, with numbers of my own.
THEIRS: dict[str, Any] = {
    "run_info": {
        "created_at": "2026-01-01T00:00:00+00:00",
        "total_time": 100.5,
        "experiment_name": "lora/example-rank8",
        "peft_branch": "main",
        "train_config": {
            "model_id": "meta-llama/Llama-3.2-3B",
            "dtype": "bfloat16",
            "max_seq_length": 512,
            "batch_size": 2,
            "batch_size_eval": 10,
            "max_steps": 20,
            "eval_steps": 10,
            "compile": False,
            "use_gc": True,
            "query_template": "Q: {query}",
            "seed": 3,
            "grad_norm_clip": 1.0,
            "optimizer_type": "AdamW",
            "optimizer_kwargs": {"lr": 3e-4, "weight_decay": 0.1},
            "lr_scheduler": "cosine",
            "use_amp": False,
            "autocast_adapter_dtype": True,
            "generation_kwargs": {"max_length": 80, "max_new_tokens": 30},
            "attn_implementation": None,
            "init_kv_cache_prefix": None,
        },
        "peft_config": {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 8,
            "use_dora": True,
            "target_modules": ["q"],
        }
        | {"revision": None, "inference_mode": False, "eva_config": None},
        "error_msg": "",
    },
    "train_info": {
        "accelerator_memory_reserved_avg": 1000,
        "accelerator_memory_max": 3000,
        "accelerator_memory_reserved_99th": 2000,
        "train_time": 90.0,
        "file_size": 4096,
        "num_trainable_params": 512,
        "num_total_params": 10**6,
        "status": "success",
        "metrics": [
            *(
                {"step": step, "valid accuracy": 0.5, "train loss": 2.0 / step, "train samples": 2 * step}
                | {"train time": 20.0, "eval time": 5.0, "tokens / sec": 50.0, "mem allocated avg": 900.0}
                | {"mem reserved avg": 950.0, "elapsed time": 4.0 * step}
                for step in (10, 20)
            ),
            {"step": 20, "test accuracy": 660 / 1319, "train loss": 0.1, "train samples": 40}
            | {"train total tokens": 2000, "forgetting": 0.02},
        ],
    },
    "meta_info": {
        "model_info": {"sha": "abc", "created_at": "2024-09-18T15:23:48+00:00"},
        "dataset_info": {"metamath": {"sha": "def", "created_at": None}, "gsm8k": {"sha": None, "created_at": None}},
        "package_info": {
            f"{name}-{kind}": "1.0"
            for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
            for kind in ("version", "commit-hash")
        },
        "system_info": {"system": "Linux", "accelerator": "NVIDIA L40S"},
        "pytorch_info": "built",
    },
}
# What their processing reads of a file, and as what: numbers must be numbers, or it stops.
RUN: dict[str, Any] = {"experiment_name": str, "total_time": float, "created_at": str, "peft_branch": (str, type(None))}
TRAIN: dict[str, Any] = {
    **dict.fromkeys(("accelerator_memory_reserved_avg", "accelerator_memory_max"), int),
    **dict.fromkeys(("accelerator_memory_reserved_99th", "file_size", "num_trainable_params"), int),
    "train_time": float,
    "status": str,
}
LAST: dict[str, Any] = {
    "train samples": int,
    "train total tokens": int,
    "train loss": float,
    "test accuracy": (float, type(None)),
}


def put(content: dict[str, Any], name: str, **run_info: Any) -> None:
    content = copy.deepcopy(content)
    content["run_info"] |= run_info
    record.write_json(Path("theirs/MetaMathQA/results") / f"{name}.json", content)


def test_their_results_become_a_study(collect_command: Collect) -> None:
    put(THEIRS, "one")
    plain = {"peft_type": "LORA", "r": 16}
    put(THEIRS, "two", experiment_name="lora/example-rank16", peft_config=plain)
    put(THEIRS, "full", experiment_name="full-finetuning/example", peft_config=None)
    Path("theirs/other.json").write_text('{"run_info": {}}')
    code, out, err = collect_command("--from-peft", "theirs")
    assert (code, err) == (0, "")
    assert "multirun/peft_comparison: 3 trials: 3 success" in out
    rows = pd.read_parquet("multirun/peft_comparison/results.parquet").set_index("run_info.labels")
    row = rows.loc['["lora/example-rank8"]']
    expected = {
        "choices.model": "llama3.2_3b",
        "choices.method": "dora",
        "choices.quant": "none",
        "config.method.r": 8,
        "config.seed": 3,
        "config.model.dtype": "bfloat16",
        "config.train.learning_rate": 3e-4,
        "config.train.steps": 20,
        "config.train.checkpointing": True,
        "config.dataset.max_length": 512,
        "run_info.status": "success",
        "train_info.train_seconds": 40.0,  # of the steps; theirs says 90 with all that was evaluated
        "train_info.published_train_seconds": 90.0,
        "train_info.tokens_per_second": 50.0,
        "train_info.adapter_bytes": 4096,
        "memory.train.reserved_peak": 3000,
        "eval_info.gsm8k.accuracy.value": 660 / 1319,
        "eval_info.gsm8k.accuracy.n": 1319,
        "eval_info.forgetting.loss_increase.value": 0.02,
        "meta_info.packages.peft.version": "1.0",
    }
    assert {key: row[key] for key in expected} == expected
    assert row["eval_info.gsm8k.accuracy.stderr"] == pytest.approx(math.sqrt(0.25 / 1318), rel=1e-5)
    assert sorted(rows["choices.method"]) == ["dora", "full", "lora"]
    steps = pd.read_parquet("multirun/peft_comparison/steps.parquet")
    assert steps["loss"].tolist() == [0.2, 0.1] * 3
    assert "learning_curves.png" in {file.name for file in Path("multirun/peft_comparison/plots").iterdir()}
    assert collect_command("--from-peft", "theirs", "mine", "--no-plots")[0] == 0
    assert len(peftsweep.load("mine")) == 3


def test_the_order_in_which_they_list_modules_is_no_setting(collect_command: Collect) -> None:
    """PEFT holds them as a set, and writes it in any order."""
    for name, modules in (("one", ["v_proj", "q_proj"]), ("other", ["q_proj", "v_proj"])):
        method = THEIRS["run_info"]["peft_config"] | {"target_modules": modules}
        put(THEIRS, name, experiment_name=f"lora/{name}", peft_config=method)
    assert collect_command("--from-peft", "theirs", "--no-plots")[0] == 0
    assert peftsweep.load("peft_comparison")["config.method.target_modules"].tolist() == ['["q_proj", "v_proj"]'] * 2


def test_an_accuracy_of_other_rows_than_the_test_s_has_no_interval(collect_command: Collect) -> None:
    """No number of GSM8K's 1,319 test rows is a half of them."""
    other = copy.deepcopy(THEIRS)
    other["train_info"]["metrics"][-1]["test accuracy"] = 0.5
    put(other, "one")
    assert collect_command("--from-peft", "theirs", "--no-plots")[0] == 0
    (row,) = peftsweep.load("peft_comparison").to_dict("records")
    assert row["eval_info.gsm8k.accuracy.value"] == 0.5
    assert pd.isna(row["eval_info.gsm8k.accuracy.stderr"])
    assert pd.isna(row["eval_info.gsm8k.accuracy.n"])


def test_steps_after_the_last_validation_are_in_no_seconds(collect_command: Collect) -> None:
    """The log has no seconds of these steps, so that the sum is no training's; the tokens a second are of the rest."""
    longer = copy.deepcopy(THEIRS)
    longer["train_info"]["metrics"][-1] |= {"step": 25, "train total tokens": 2500}
    put(longer, "one")
    assert collect_command("--from-peft", "theirs", "--no-plots")[0] == 0
    (row,) = peftsweep.load("peft_comparison").to_dict("records")
    assert pd.isna(row["train_info.train_seconds"])
    assert row["train_info.tokens_per_second"] == 50.0
    assert (row["train_info.steps"], row["train_info.tokens"]) == (25, 2500)


@pytest.mark.parametrize(
    ("section", "wrong", "message"),
    [
        ("last", {"test accuracy": 45.2}, "test accuracy: must be from 0 to 1"),
        ("first", {"train time": None}, "train time: null, not a number"),
        ("first", {"valid accuracy": 36}, "valid accuracy: must be from 0 to 1"),
        ("train_info", {"train_time": "90 s"}, "train_info.train_time: a text, not a number"),
        ("train_info", {"status": "done"}, "train_info.status: must be one of"),
    ],
)
def test_a_file_with_other_units_or_without_its_figures_is_left_out_in_one_line(
    section: str, wrong: dict[str, Any], message: str, collect_command: Collect
) -> None:
    odd = copy.deepcopy(THEIRS)
    places = {"last": odd["train_info"]["metrics"][-1], "first": odd["train_info"]["metrics"][0]}
    (places | odd)[section].update(wrong)
    put(odd, "odd", experiment_name="lora/odd")
    put(THEIRS, "one")
    code, out, err = collect_command("--from-peft", "theirs", "--no-plots")
    assert (code, err.count("\n")) == (0, 1)
    assert "odd.json" in err
    assert message in err
    assert "1 trial: 1 success" in out


def test_how_they_ended_is_told(collect_command: Collect) -> None:
    for name, message in (("a", "OutOfMemoryError: CUDA out of memory."), ("b", "manually interrupted")):
        failed = copy.deepcopy(THEIRS)
        failed["train_info"] |= {"status": "canceled", "metrics": []}
        put(failed, name, experiment_name=f"lora/{name}", error_msg=message)
    assert collect_command("--from-peft", "theirs")[0] == 0
    found = peftsweep.load("peft_comparison").set_index("run_info.labels")
    assert found["run_info.status"].tolist() == ["oom", "cancelled"]
    assert found["run_info.error.message"].tolist() == ["CUDA out of memory.", "manually interrupted"]


def test_an_older_checkout_does_not_replace_a_newer_result(collect_command: Collect) -> None:
    for day in (2, 1):
        put(THEIRS, "one", created_at=f"2026-01-0{day}T00:00:00+00:00")
        assert collect_command("--from-peft", "theirs", "--no-plots")[0] == 0
    assert peftsweep.load("peft_comparison")["run_info.created_at"].tolist() == ["2026-01-02T00:00:00+00:00"]


def test_there_and_back_again_says_the_same(collect_command: Collect) -> None:
    put(THEIRS, "one")
    assert collect_command("--from-peft", "theirs", "--to-peft", "back", "--no-plots")[0] == 0
    [file] = Path("back/results").iterdir()
    assert file.name == "lora--example-rank8.json"
    back = json.loads(file.read_text())
    assert back["train_info"].items() >= {k: v for k, v in THEIRS["train_info"].items() if k != "metrics"}.items()
    assert back["train_info"]["metrics"][-1] == THEIRS["train_info"]["metrics"][-1]
    for key in ("created_at", "total_time", "experiment_name", "peft_branch", "error_msg"):
        assert back["run_info"][key] == THEIRS["run_info"][key]
    assert back["run_info"]["train_config"] == THEIRS["run_info"]["train_config"]
    method = {"peft_type": "LORA", "r": 8, "use_dora": True, "target_modules": ["q"]}
    assert back["run_info"]["peft_config"] == method
    for key in ("model_info", "dataset_info", "package_info"):
        assert back["meta_info"][key] == THEIRS["meta_info"][key]
    assert back["meta_info"]["system_info"]["accelerator"] == "NVIDIA L40S"


def own(name: str, rank: int, accuracy: float | None) -> None:
    """A trial of ours, on a CPU, with what a real record holds beside what `write` gives."""
    folder = write(name, rank, accuracy)
    result = Result.read(folder)
    result.config |= {
        "method": {"_target_": "peft.AdaLoraConfig", "r": rank},
        "model": {"name_or_path": "tiny", "dtype": "float32", "revision": None},
        "train": {"batch_size": 4, "accumulation": 2, "learning_rate": 1e-4, "learning_rate_scale": 5.0}
        | {"optimizer": "torch.optim.SGD", "schedule": "linear", "weight_decay": 0.0, "steps": 10},
    }
    if accuracy is not None:
        result.memory["start"] = {"rss": 10**7}
        result.train_info |= {"steps": 10, "tokens": 500, "final_loss": 1.5, "total_parameters": 1000}
        result.run_info["total_seconds"] = 12.5
        result.eval_info["forgetting"] = {
            key: {"value": n, "stderr": 0.1, "n": 9} for n, key in ((3, "loss"), (2, "base_loss"))
        }
    result.write(folder)


def test_what_their_processing_reads_is_there(collect_command: Collect) -> None:
    own("r8", 8, 0.5)
    own("bad", 16, None)
    code, out, _ = collect_command("--to-peft", "for_peft", "--no-plots")
    assert code == 0
    assert "wrote 2 trials to for_peft" in out
    content = json.loads(Path("for_peft/results/lora--r8.json").read_text())
    for section, kinds in (("run_info", RUN), ("train_info", TRAIN)):
        for key, kind in kinds.items():
            assert isinstance(content[section][key], kind), key
    last = content["train_info"]["metrics"][-1]
    assert all(isinstance(last[key], kind) for key, kind in LAST.items())
    assert last == {
        "step": 10,
        "test accuracy": 0.5,
        "train loss": 1.5,
        "train samples": 80,
        "train total tokens": 500,
    } | {"forgetting": 1}
    assert content["run_info"]["peft_config"] == {"peft_type": "ADALORA", "r": 8}
    assert content["run_info"]["train_config"]["model_id"] == "tiny"
    assert content["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 5e-4, "weight_decay": 0.0}
    assert content["run_info"]["train_config"]["optimizer_type"] == "SGD"
    assert content["train_info"]["accelerator_memory_max"] == 10**8 + 8 - 10**7  # what the process grew by
    assert content["run_info"]["peftsweep"]["accelerator_memory"] == "resident memory of the process"
    assert content["run_info"]["peftsweep"]["test_accuracy"] == "task.accuracy"
    versions = {f"{name}-version" for name in interchange.PACKAGES}
    assert versions <= set(content["meta_info"]["package_info"])
    [cancelled] = Path("for_peft/cancelled_results").iterdir()
    content = json.loads(cancelled.read_text())
    assert (content["train_info"]["status"], content["run_info"]["error_msg"]) == ("canceled", "RuntimeError: broken")


def test_a_trial_that_their_processing_could_not_read_is_left_out(collect_command: Collect) -> None:
    write("old", 8, 0.5)
    folder = Path("multirun/default/old")
    result = Result.read(folder)
    result.config["model"] = {"name_or_path": "tiny"}
    result.write(folder)
    code, out, _ = collect_command("--to-peft", "for_peft", "--no-plots")
    assert code == 0
    assert "left out: lora/old: its record has no train samples, no train total tokens" in out
    assert not Path("for_peft").exists()


@pytest.mark.parametrize("key", ["optimizer_kwargs", "batch_size"])
def test_a_record_of_wrong_types_is_left_out_and_the_others_are_written(key: str, collect_command: Collect) -> None:
    trained: dict[str, Any] = {"steps": 4, "tokens": 5, "total_parameters": 6}
    for name in ("whole", "odd"):
        folder = write(name, 8, 0.5)
        result = Result.read(folder)
        odd: dict[str, Any] = {key: "nan"} if name == "odd" else {}
        result.config |= {"model": {"name_or_path": "tiny"}, "train": odd}
        result.train_info |= trained
        result.write(folder)
    code, out, err = collect_command("--to-peft", "for_peft", "--no-plots")
    assert (code, err) == (0, "")
    assert "left out: odd: its record holds something of a wrong type" in out
    assert "wrote 1 trial to for_peft" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--from-peft", "nowhere"], "--from-peft nowhere: no folder below it holds a result file"),
        (["--from-peft", "theirs", "a", "b"], "--from-peft: fills one study, not 2"),
        (["--out"], "--out: needs a value"),
        (["--svg=3"], "--svg: takes no value"),
        (["--statsu"], "--statsu: no such option; did you mean '--status'?"),
        (["--status", "--prune"], "--status --prune: each is instead of the table; give one"),
        (["--keep-best", "3"], "--keep-best: only with --prune"),
        (["--json", "--prune"], "--json: not with --prune"),
    ],
)
def test_bad_input_is_one_line(words: list[str], problem: str, collect_command: Collect) -> None:
    code, _, err = collect_command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err


def processing() -> Any:
    file = Path(str(PEFT)) / "method_comparison" / "processing.py"
    described = importlib.util.spec_from_file_location("peft_processing", file)
    assert described
    assert described.loader
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


@pytest.mark.slow
@needs_peft
def test_real_results_are_read_and_ours_are_loaded_by_their_processing(collect_command: Collect) -> None:
    place = Path(str(PEFT)) / "method_comparison" / "MetaMathQA" / "results"
    theirs = processing().load_df(str(place), "MetaMathQA").set_index("experiment_name")
    own("r8", 8, 0.5)
    assert collect_command("--from-peft", str(place))[0] == 0
    assert collect_command("--to-peft", "MetaMathQA", "--no-plots")[0] == 0
    both = processing().load_df("MetaMathQA/results", "MetaMathQA").set_index("experiment_name")
    assert len(both) == len(theirs) + 1
    assert both.loc["lora/r8", "test_accuracy"] == 0.5
    back = both.drop(index="lora/r8").loc[theirs.index]
    for column in (
        "model_id",
        "peft_type",
        "created_at",
        "train_time",
        "total_time",
        "file_size",
        "num_trainable_params",
    ):
        assert back[column].tolist() == theirs[column].tolist(), column
    for column in ("accelerator_memory_max", "accelerator_memory_reserved_99th", "train_samples", "train_total_tokens"):
        assert back[column].tolist() == theirs[column].tolist(), column
    for column in ("test_accuracy", "train_loss", "forgetting*"):
        assert back[column].tolist() == pytest.approx(theirs[column].tolist(), abs=1e-9), column
    preferences = processing().get_metric_preferences("MetaMathQA")
    for columns in (("accelerator_memory_max", "test_accuracy"), ("forgetting*", "test_accuracy")):
        fronts = [processing().compute_pareto_frontier(table, *columns, preferences) for table in (back, theirs)]
        assert sorted(fronts[0].index) == sorted(fronts[1].index)
