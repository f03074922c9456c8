"""Runs -> tables: the records of a study as results.parquet and steps.parquet, and a short table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from peftsweep import plot, record, study
from peftsweep.display import size
from peftsweep.errors import InputError
from peftsweep.record import RESULT, STEPS, RecordError, Result

RESULTS_FILE = "results.parquet"
STEPS_FILE = "steps.parquet"


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
    return _typed(pd.DataFrame([record.flat(row) for row in rows]))


def steps(results: Iterable[Result]) -> pd.DataFrame:
    """One row a logged step, with the trial's name, label and study before its own columns."""
    rows = []
    for result in results:
        file = (result.folder or Path()) / STEPS
        info = result.run_info
        name = {"trial": result.trial, "label": info["labels"][0], "study": info["study"]}
        rows += [name | record.flat(json.loads(line)) for line in _whole_lines(file)]
    return _typed(pd.DataFrame(rows, columns=None if rows else ["trial", "label", "study", "step"]))


def write_parquet(table: pd.DataFrame, file: Path) -> None:
    """Replace ``file`` by ``table``, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    table.to_parquet(temporary, index=False)
    temporary.replace(file)


def _whole_lines(file: Path) -> list[str]:
    """The lines of ``file``; what a killed trial left half written is passed over."""
    if not file.exists():
        return []
    return [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


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
    console = Console(highlight=False)
    shown = Table(title=title, title_justify="left", header_style="bold")
    rows = [_short(row, varying(table), scores(table)) for _, row in table.iterrows()]
    for column in rows[0]:
        shown.add_column(column, justify="left" if column in ("trial", "status") else "right")
    for row in rows:
        shown.add_row(*row.values())
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; wrapping would break the rows
    console.print(shown)


def varying(table: pd.DataFrame) -> list[str]:
    """The choices and settings that differ between the trials."""
    columns = [c for c in table.columns if c.startswith("choices.")]
    columns += ["config.method.r", "config.train.learning_rate", "config.train.steps", "config.seed"]
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
