"""Records -> tables and figures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import peftsweep
from peftsweep import cli
from peftsweep.analysis.table import columns
from peftsweep.study import claims
from peftsweep.study.record import Result, host

Collect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def collect_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Collect:
    """Run `peftsweep-collect`: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["peftsweep-collect", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.collect()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def write(name: str, rank: int, accuracy: float | None, place: str = "default", **extra: Any) -> Path:
    """A record as a trial would leave it; ``accuracy`` None is a failed one."""
    folder = Path("multirun") / place / name
    failed = accuracy is None
    Result(
        run_info={
            "trial": name,
            "labels": [name],
            "study": place,
            "status": "failed" if failed else "success",
            "created_at": f"2026-01-01T00:{rank // 60:02}:{rank % 60:02}+00:00",
            "error": {"type": "RuntimeError", "message": "broken", "stage": "train"} if failed else None,
        },
        choices={"method": "lora", "quant": "4bit"},
        config={"method": {"r": rank, "target_modules": ["q_proj"]}, "seed": 0, "extra": extra},
        train_info={} if failed else {"adapter_bytes": 1000 * rank, "train_seconds": 2.5, "trainable_parameters": rank},
        memory={} if failed else {"train": {"rss_peak": 10**8 + rank, "allocated_peak": None}},
        eval_info={}
        if failed
        else {"task": {"accuracy": {"value": accuracy, "stderr": 0.03 * bool(accuracy), "n": 200}}},
    ).write(folder)
    (folder / "steps.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    return folder


def test_the_terminal_has_no_error_of_0_and_the_memory_that_the_answer_tells(collect_command: Collect) -> None:
    for rank, accuracy in ((8, 0.0), (16, 0.7)):
        record = write(f"r{rank}", rank, accuracy) / "result.json"
        content = json.loads(record.read_text())
        content["memory"]["predicted"] = {"peak_bytes": rank * 10**6}
        record.write_text(json.dumps(content))
    _, out, _ = collect_command("--no-plots")
    assert "0.000 (200 rows)" in out
    assert "0.000 ± 0.000" not in out
    assert "predicted memory" in out
    assert all(size in out for size in ("8.0 MB", "16.0 MB"))
    assert "100.0 MB" not in out  # of the whole process


def test_a_study_becomes_tables_plots_and_a_short_table(collect_command: Collect) -> None:
    for rank, accuracy in ((8, 0.4), (16, 0.6), (32, 0.8), (64, None)):
        write(f"lora-r{rank}", rank, accuracy)
    code, out, err = collect_command()
    assert (code, err) == (0, "")
    table = pd.read_parquet("multirun/default/results.parquet")
    assert table["config.method.r"].tolist() == [8, 16, 32, 64]
    assert table["run_info.status"].tolist() == ["success"] * 3 + ["failed"]
    assert table["eval_info.task.accuracy.value"].tolist()[:3] == [0.4, 0.6, 0.8]
    assert table["run_info.error.message"].tolist()[3] == "broken"
    assert json.loads(table["config.method.target_modules"][0]) == ["q_proj"]
    steps = pd.read_parquet("multirun/default/steps.parquet")
    assert len(steps) == 8  # half-written lines are passed over
    assert {"trial", "label", "study", "step", "loss"} <= set(steps.columns)
    plots = {file.name for file in Path("multirun/default/plots").iterdir()}
    assert {"rank_task.png", "adapter_size.png"} <= plots
    assert "0.800 ± 0.030" in out
    assert "± is one standard error over the test rows" in out
    assert "failed" in out
    lines = out.splitlines()
    assert lines[0].startswith("Use lora, r=32: 0.800")  # the answer comes first
    assert lines[-1] == "wrote multirun/default/report.html and multirun/default/RESULTS.md"  # the files to open


def test_nested_lists_gaps_and_new_columns_survive(collect_command: Collect) -> None:
    write("a", 8, 0.5, targets=[["q"], [{"k": 1}]], alpha=1)
    write("b", 16, 0.6, alpha="auto", new={"deep": True})
    write("c", 32, 0.7, alpha=None)
    assert collect_command("--no-plots")[0] == 0
    table = pd.read_parquet("multirun/default/results.parquet")
    assert json.loads(table["config.extra.targets"].tolist()[0]) == [["q"], [{"k": 1}]]
    assert table["config.extra.alpha"].tolist()[:2] == ["1", "auto"]
    assert table["config.extra.alpha"].isna().tolist() == [False, False, True]
    assert table["config.extra.new.deep"].isna().tolist() == [True, False, True]
    assert str(table["config.method.r"].dtype) == "Int64"
    assert not Path("multirun/default/plots").exists()


def test_a_broken_record_is_named_and_skipped(collect_command: Collect) -> None:
    write("good", 8, 0.5)
    (write("broken", 16, 0.5) / "result.json").write_text("{")
    (write("odd", 32, 0.5) / "result.json").write_text('{"schema_version": 1}')
    code, _, err = collect_command("--no-plots")
    assert code == 0
    assert sorted(line.split(":")[1].strip() for line in err.splitlines()) == [
        "multirun/default/broken/result.json",
        "multirun/default/odd/result.json",
    ]
    assert len(pd.read_parquet("multirun/default/results.parquet")) == 1


def test_several_studies_go_into_one_file(collect_command: Collect) -> None:
    write("a", 8, 0.5, place="first")
    write("b", 8, 0.5, place="second")
    code, _, _ = collect_command("--out", "all.parquet", "--no-plots")
    assert code == 0
    assert pd.read_parquet("all.parquet")["run_info.study"].tolist() == ["first", "second"]
    assert Path("multirun/second/results.parquet").exists()
    code, _, _ = collect_command("multirun/first", "--no-plots")
    assert code == 0


def test_only_failures_make_no_plot_and_no_error(collect_command: Collect) -> None:
    write("bad", 8, None)
    code, out, _ = collect_command()
    assert code == 0
    assert "failed" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no study under multirun/"),
        (["nope"], "study=nope: no such folder"),
        (["--out", "x.xls"], "must end in"),
        (["--quality-loss", "2"], "--quality-loss: must be a number, from 0 to below 1, not 2"),
    ],
)
def test_bad_input_is_one_line(words: list[str], problem: str, collect_command: Collect) -> None:
    code, _, err = collect_command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err


def test_load_gives_the_table_of_a_study_by_name_or_path() -> None:
    write("a", 8, 0.5)
    for where in ("default", Path("multirun/default")):
        assert peftsweep.load(where)["eval_info.task.accuracy.value"].tolist() == [0.5]
    with pytest.raises(peftsweep.InputError, match="did you mean 'default'"):
        peftsweep.load("defualt")


def test_compiling_is_compared_with_the_same_trial_without_it(collect_command: Collect) -> None:
    facts = {"compile_graphs": 2, "compile_seconds": 9.0, "recompile_seconds": 1.0}
    for rank in (8, 16):
        for backend, seconds in (("none", 0.5), ("inductor", 0.25 if rank == 8 else 0.75)):
            folder = write(f"r{rank}-{backend}", rank, 0.5)
            result = Result.read(folder)
            result.config["train"] = {"compile": backend, "compile_dynamic": None}
            result.train_info |= {"step_seconds_p50": seconds} | (facts if backend == "inductor" else {})
            result.write(folder)
    _, out, _ = collect_command("--no-plots")
    assert (
        "lora, r=8, compile=inductor: inductor steps are 2.00 times as fast as eager ones; pays from step 40 on" in out
    )
    assert "lora, r=16, compile=inductor: inductor steps are 0.67 times as fast as eager ones; never pays" in out
    table = peftsweep.load().set_index("run_info.trial")
    assert table["train_info.compile_speed_up"].to_dict()["r8-inductor"] == 2.0
    assert table["train_info.compile_break_even_step"].isna().sum() == 2


@pytest.mark.parametrize(("gpu", "gain"), [("H100", 2.0), ("T4", None)])
def test_compiling_is_not_compared_with_a_trial_on_another_device(gpu: str, gain: float | None) -> None:
    for backend, device, seconds in (("none", gpu, 0.5), ("inductor", "H100", 0.25)):
        folder = write(backend, 8, 0.5)
        result = Result.read(folder)
        result.config["train"] = {"compile": backend, "compile_dynamic": None}
        compiled = {"compile_graphs": 2, "compile_seconds": 9.0, "recompile_seconds": 1.0}
        result.train_info |= {"step_seconds_p50": seconds} | (compiled if backend == "inductor" else {})
        result.meta_info = {"torch": {"gpus": [device]}}
        result.write(folder)
    found = peftsweep.load().set_index("run_info.trial")["train_info.compile_speed_up"]
    assert (None if pd.isna(found["inductor"]) else found["inductor"]) == gain


def test_several_gpus_of_one_model_are_one_device() -> None:
    gpus = ['["H100", "H100"]', '["H100"]', "H100", '["H100", "A100"]', "[]", None]
    table = pd.DataFrame({"meta_info.torch.gpus": gpus, "meta_info.system.processor": "EPYC"})
    assert columns.devices(table).tolist() == ["H100", "H100", "H100", "H100, A100", "EPYC", "EPYC"]


def test_the_predicted_memory_is_held_against_the_measured(collect_command: Collect) -> None:
    for rank, predicted, allocated in ((8, 90, 100), (16, 120, 100), (32, 40, None)):
        folder = write(f"r{rank}", rank, 0.5)
        result = Result.read(folder)
        result.memory = {
            "predicted": {"peak_bytes": predicted},
            "start": {"rss": 1000},
            "train": {"allocated_peak": allocated, "rss_peak": 1050},
        }
        result.write(folder)
    _, out, _ = collect_command("--no-plots")
    assert "predicted training memory: median error +5% (-10% to +20% over 2 trials)" in out


def test_generation_has_a_table_of_its_own(collect_command: Collect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = write("r8", 8, 0.5)
    result = Result.read(folder)
    figures = {"seconds_p50": 0.5, "time_to_first_token_p50": 0.0201, "seconds_per_token_p50": 0.0035}
    overhead = {"value": 1.25, "low": 1.2, "high": 1.31}
    batch = {"batch_16": {"tokens_per_second": 4321.0}, "batch_1": {"tokens_per_second": 123.0}}
    result.generation_info = {"overall": {"base": figures, "adapted": figures | batch | {"overhead": overhead}}}
    result.write(folder)
    _, out, _ = collect_command("--no-plots")
    generation = out[out.index("generation") :]
    assert "+25.0% [+20.0%, +31.0%]" in generation
    assert "20.1" in generation
    assert generation.index("tokens/s at 1 ") < generation.index("tokens/s at 16")
    assert "4,321" in generation


def test_a_large_study_shows_its_best_trials(collect_command: Collect) -> None:
    for rank in range(1, 51):
        write(f"r{rank}", rank, None if rank == 50 else rank / 100)
    _, out, _ = collect_command("--no-plots")
    assert "50 trials: 49 success, 1 failed; the 40 best by task accuracy" in out
    rows = [line for line in out.splitlines() if "success" in line and "│" in line]
    assert len(rows) == 40
    assert "0.490" in rows[0]
    assert "0.100" in rows[-1]


def test_whatever_trials_differ_in_is_a_column_of_the_table(collect_command: Collect) -> None:
    write("first", 8, 0.5, alpha="one")
    write("second", 8, 0.6, alpha="two")
    _, out, _ = collect_command("--no-plots")
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in cells] == ["one", "two"]


def test_predicted_memory_has_no_error_where_no_device_measured_it(collect_command: Collect) -> None:
    for rank, predicted in ((8, 10**8), (16, 4 * 10**9)):
        folder = write(f"r{rank}", rank, 0.5)
        result = Result.read(folder)
        result.memory = {
            "predicted": {"peak_bytes": predicted},
            "start": {"rss": 10**9},
            "train": {"allocated_peak": None, "rss_peak": 6 * 10**9},
        }
        result.write(folder)
    _, out, _ = collect_command("--no-plots")
    assert "median error" not in out
    assert peftsweep.load().get("memory.predicted.error", pd.Series(dtype=float)).isna().all()


def test_the_peak_of_a_training_that_ran_out_of_memory_is_no_measure_of_it(collect_command: Collect) -> None:
    for name, status, predicted, allocated in (("whole", "success", 110, 100), ("cut-off", "oom", 300, 100)):
        folder = write(name, 8, 0.5)
        result = Result.read(folder)
        result.run_info["status"] = status
        result.memory = {"predicted": {"peak_bytes": predicted}, "train": {"allocated_peak": allocated}}
        result.write(folder)
    _, out, _ = collect_command("--no-plots")
    assert "predicted training memory: median error +10% (+10% to +10% over 1 trial), measured on the device" in out


def test_status_tells_how_a_study_stands_and_writes_nothing(collect_command: Collect) -> None:
    for rank in (8, 16, 32, 64, 128):
        write(f"r{rank}", rank, 0.5 if rank == 8 else None)
    place = Path("multirun/default")
    for name in ("lora-r1-aaaaaaaaaa", "lora-r2-bbbbbbbbbb"):
        (place / name / ".hydra").mkdir(parents=True)
        (place / name / ".hydra" / "config.yaml").write_text("")
    before = sorted(place.rglob("*"))
    with claims.claim(place, "aaaaaaaaaa"):
        code, out, err = collect_command("--status")
    assert (code, err) == (0, "")
    me = f"lora-r1-aaaaaaaaaa on {host()}, process {os.getpid()}"
    assert out.splitlines() == [
        "multirun/default: 5 trials: 1 success, 4 failed, 1 running",
        f"    running: {me}",
        "    cut off, the same command continues: lora-r2-bbbbbbbbbb",
        "    failed in train: RuntimeError: broken: lora, r=16; lora, r=32; lora, r=64 and 1 more",
    ]
    assert sorted(file for file in place.rglob("*") if ".claims" not in str(file)) == before
    assert "0 running" in collect_command("--status")[1]


def test_the_advice_is_of_the_trials_that_where_chooses(collect_command: Collect) -> None:
    for rank, accuracy in ((8, 0.4), (16, 0.6), (32, 0.9)):
        write(f"r{rank}", rank, accuracy)
    _, out, _ = collect_command("--no-plots", "--where", "config.method.r < 20")
    report = out.partition("wrote ")[0]
    assert "2 trials: 2 success (3 in the study)" in report
    assert "Use lora, r=16: 0.600" in report
    assert "0.900" not in report
    assert "RESULTS.md, of all 3 trials" in out
    _, out, _ = collect_command("--no-plots", "--where", "config.method.r > 99")
    assert "multirun/default: --where chooses none of 3 trials" in out
    assert "Use " not in out
