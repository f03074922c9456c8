"""Runs -> tables: the records of a study as results.parquet and steps.parquet, and a short table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from peftsweep import halving, plot, record, study
from peftsweep.display import show_table, size
from peftsweep.errors import InputError
from peftsweep.record import RESULT, STEPS, RecordError, Result

RESULTS_FILE = "results.parquet"
STEPS_FILE = "steps.parquet"
STEP, COMPILE = "train_info.step_seconds_p50", "config.train.compile"
NOT_TWINS = (COMPILE, "config.train.compile_dynamic", "config.train.pad_to_multiple_of", "config.label")
NO_SETTINGS = ("choices.profiler", "choices.tracker", "choices.inference")  # that change nothing of a trial
SPEED_UP, BREAK_EVEN = "train_info.compile_speed_up", "train_info.compile_break_even_step"
PREDICTED, PREDICTION_ERROR = "memory.predicted.peak_bytes", "memory.predicted.error"
RESIDENT_NOTE = "; on a CPU of the process's resident memory, in which a small model drowns"
ALLOCATED, RESIDENT = "memory.train.allocated_peak", "memory.train.rss_peak"


def main(names: Sequence[str], out: Path | None, *, plots: bool = True) -> int:
    """``peftsweep-collect``: tables and plots into each study, one table of all trials to ``out``."""
    if out is not None and out.suffix != ".parquet":
        raise InputError(f"--out {out}: must end in .parquet")
    found = [study.find(name) for name in names] if names else study.studies()
    if not found:
        raise InputError(f"no study under {study.ROOT}/; run peftsweep first, or name a study's folder")
    everything: list[Result] = []
    for folder in found:
        results = read(folder)
        everything += results
        if not results:
            print(f"{folder}: no trial yet")
            continue
        table = trials(results)
        write_parquet(table, folder / RESULTS_FILE)
        write_parquet(steps(results), folder / STEPS_FILE)
        print_table(table, str(folder))
        print_generation(table)
        for line in [*notes(table), *halving.notes(results)]:
            print(line)
        written = [folder / RESULTS_FILE, folder / STEPS_FILE, *(plot.study(table, folder / "plots") if plots else [])]
        print("wrote " + ", ".join(str(file) for file in written))
    if out is not None:
        write_parquet(trials(everything), out)
        print(f"wrote {out}")
    return 0


def read(folder: Path) -> list[Result]:
    """The records of a study, oldest first; a broken one is named on stderr and skipped."""
    results = []
    for file in folder.glob(f"*/{RESULT}"):
        try:
            results.append(Result.read(file.parent))
        except RecordError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return sorted(results, key=lambda result: (result.run_info["created_at"], result.trial))


def trials(results: Iterable[Result]) -> pd.DataFrame:
    """One row a trial, with dotted columns such as ``config.method.r``; lists are kept as JSON text."""
    rows = [record.plain(result) for result in results]
    for row in rows:
        row.pop("folder")
    return _typed(_with_comparisons(pd.DataFrame([record.flat(row) for row in rows])))


def _with_comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """Add what only several figures together tell: the error of the predicted memory, the gain of compiling."""
    if PREDICTED in table and RESIDENT in table:
        resident = table[RESIDENT] - table["memory.start.rss"]  # beyond what the process held before
        measured = table[ALLOCATED].fillna(resident) if ALLOCATED in table else resident
        table[PREDICTION_ERROR] = (table[PREDICTED] / measured.astype(float)).sub(1)
    if "train_info.compile_graphs" in table:
        same = [c for c in table.columns if c.startswith("config.") and c not in NOT_TWINS]
        twins = table[same].map(lambda value: "" if pd.isna(value) else str(value)).agg("|".join, axis=1)
        eager = table[table[COMPILE] == "none"].groupby(twins)[STEP].median()
        gains = [_compile_gain(row, eager.get(twin)) for (_, row), twin in zip(table.iterrows(), twins, strict=True)]
        table[[SPEED_UP, BREAK_EVEN]] = pd.DataFrame(gains, index=table.index, dtype=float)
    return table


def _compile_gain(row: pd.Series[Any], eager: float | None) -> tuple[float | None, float | None]:
    """How many times faster a compiled trial's median step is than its eager twin's, and after how many steps it pays.

    ``eager`` is the twin's, in seconds: of the trial that differs in nothing but how it is compiled. The break-even
    step is that at which the seconds of compiling have come back, and infinite where they never do.
    """
    if pd.isna(row["train_info.compile_graphs"]) or eager is None:
        return None, None
    compiled = float(row[STEP])
    spent = row["train_info.compile_seconds"] + row["train_info.recompile_seconds"]
    return eager / compiled, spent / (eager - compiled) if compiled < eager else math.inf


def steps(results: Iterable[Result]) -> pd.DataFrame:
    """One row a logged step, with the trial's name, label and study before its own columns."""
    rows = []
    for result in results:
        file = (result.folder or Path()) / STEPS
        info = result.run_info
        name = {"trial": result.trial, "label": info["labels"][0], "study": info["study"]}
        rows += [name | record.flat(row) for row in record.read_lines(file)]
    return _typed(pd.DataFrame(rows, columns=None if rows else ["trial", "label", "study", "step"]))


def write_parquet(table: pd.DataFrame, file: Path) -> None:
    """Replace ``file`` by ``table``, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    table.to_parquet(temporary, index=False)
    temporary.replace(file)


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Integers stay integers beside gaps; a column of mixed types (an option given as text or number) becomes text."""
    typed = table.convert_dtypes()
    for name in typed.select_dtypes(object).columns:
        values = typed[name]
        typed[name] = values.where(values.isna(), values.map(lambda v: v if isinstance(v, str) else json.dumps(v)))
        typed[name] = typed[name].astype("string")
    return typed


# ---- the short table -------------------------------------------------------------------------------


def print_table(table: pd.DataFrame, title: str) -> None:
    """What differs between the trials, how they ended, what they score and cost."""
    show_table(title, [_short(row, varying(table), scores(table)) for _, row in table.iterrows()])


def print_generation(table: pd.DataFrame) -> None:
    """How fast each trial generates: the medians over its categories, and the overheads with their 95% intervals."""
    rows = [
        _generated(row, variant)
        for _, row in table.iterrows()
        for variant in ("base", "adapted", "merged")
        if pd.notna(row.get(f"generation_info.overall.{variant}.seconds_p50"))
    ]
    if rows:
        show_table("generation", rows)


def _generated(row: pd.Series[Any], variant: str) -> dict[str, str]:
    prefix = f"generation_info.overall.{variant}."

    def cell(name: str, form: str, factor: float = 1.0) -> str:
        value = row.get(prefix + name)
        return "" if value is None or pd.isna(value) else form.format(value * factor)

    overhead, low, high = (row.get(f"{prefix}overhead.{part}") for part in ("value", "low", "high"))
    interval = "" if low is None or high is None or pd.isna(low) else f" [{low - 1:+.1%}, {high - 1:+.1%}]"
    sizes = sorted(
        int(name.split("_")[1].split(".")[0])
        for name in (c.removeprefix(prefix) for c in row.index if c.startswith(prefix))
        if name.startswith("batch_") and name.endswith(".tokens_per_second")
    )
    return {
        "trial": json.loads(row["run_info.labels"])[0],
        "model": variant,
        "first token ms": cell("time_to_first_token_p50", "{:.1f}", 1000),
        "next token ms": cell("seconds_per_token_p50", "{:.2f}", 1000),
        "overhead": "" if overhead is None or pd.isna(overhead) else f"{overhead - 1:+.1%}{interval}",
        **{f"tokens/s at {n}": cell(f"batch_{n}.tokens_per_second", "{:,.0f}") for n in sizes},
    }


def notes(table: pd.DataFrame) -> list[str]:
    """What compiling gained, and how far the predicted memory was from the measured."""
    lines = []
    for _, row in table[table[SPEED_UP].notna()].iterrows() if SPEED_UP in table else []:
        pays = "never pays" if math.isinf(row[BREAK_EVEN]) else f"pays from step {row[BREAK_EVEN]:,.0f} on"
        name = json.loads(row["run_info.labels"])[0]
        lines.append(f"{name}: {row[COMPILE]} steps are {row[SPEED_UP]:.2f} times as fast as eager ones; {pays}")
    errors = table[PREDICTION_ERROR].dropna().astype(float) if PREDICTION_ERROR in table else pd.Series(dtype=float)
    if not errors.empty:
        where = "" if ALLOCATED in table and table[ALLOCATED].notna().any() else RESIDENT_NOTE
        spread = f"{errors.min():+.0%} to {errors.max():+.0%} over {len(errors)} trials"
        lines.append(f"predicted training memory: median error {errors.median():+.0%} ({spread}){where}")
    return lines


def varying(table: pd.DataFrame) -> list[str]:
    """The choices and settings that differ between the trials."""
    columns = [c for c in table.columns if c.startswith("choices.") and c not in NO_SETTINGS]
    columns += ["config.method.r", "config.train.learning_rate", "config.train.steps", COMPILE, "config.seed"]
    return [c for c in columns if c in table and table[c].nunique(dropna=False) > 1]


def scores(table: pd.DataFrame) -> list[str]:
    """``<eval>.<metric>`` of every score, without the base's and those that explain another."""
    names = [c.removeprefix("eval_info.").removesuffix(".value") for c in table.columns if c.startswith("eval_info.")]
    known = [c for c in names if f"eval_info.{c}.value" in table]
    return [c for c in known if c.rpartition(".")[2] not in ("loss", "valid_fraction") and ".base_" not in c]


def _short(row: pd.Series[Any], differing: list[str], metrics: list[str]) -> dict[str, str]:
    def cell(column: str, form: str = "{}") -> str:
        value = row.get(column)
        return "" if value is None or pd.isna(value) else form.format(value)

    short = {c.rpartition(".")[2]: cell(c) for c in differing} or {"trial": json.loads(row["run_info.labels"])[0]}
    measured = {
        name: cell(f"eval_info.{name}.value", "{:.3f}") + cell(f"eval_info.{name}.stderr", " ± {:.3f}")
        for name in metrics
    }
    return short | {"status": row["run_info.status"]} | measured | _cost(row, cell)


def _cost(row: pd.Series[Any], cell: Any) -> dict[str, str]:
    device = row.get("memory.train.allocated_peak")
    peak = row.get("memory.train.rss_peak") if device is None or pd.isna(device) else device
    return {
        "trainable": cell("train_info.trainable_parameters", "{:,}"),
        "adapter": size(row["train_info.adapter_bytes"]) if cell("train_info.adapter_bytes") else "",
        "peak memory": "" if peak is None or pd.isna(peak) else size(peak),
        "train s": cell("train_info.train_seconds", "{:.1f}"),
        "tokens/s": cell("train_info.tokens_per_second", "{:,.0f}"),
    }
